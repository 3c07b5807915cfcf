//! The operations: one file each, with its checks, its CPU path and its tests.
//!
//! Every file has the same two levels: `check`, which turns arguments into shapes or a sentence, and
//! `run`, which computes into memory the caller allocated. Nothing here allocates or frees tensors.

pub mod buffer_variance;
pub mod lora_backward;
pub mod lora_expand;
pub mod lora_experts;
pub mod lora_linear;
pub mod lora_shrink;
pub mod sideband_accumulate;
pub mod sideband_drain;
pub mod sideband_stats;
mod torch_products;

use crate::error::{Error, Result};
use crate::philox::Dropout;
use crate::tensor::{DType, Device, Mat, TensorRef, require_float, shape};
use std::ops::Range;

/// Most adapters of one call: the adapter's number has 16 bits of the dropout counter.
pub const MAX_ADAPTERS: usize = 65536;

/// The K adapters of a call after checking: the matrices A[k] [r_k, in] and B[k] [out, r_k].
pub struct Adapters {
    pub a: Vec<Mat>,
    pub b: Vec<Mat>,
    pub scaling: Vec<f64>,
    pub dtype: DType,
}

impl Adapters {
    /// The columns of H that belong to each adapter.
    pub fn columns(&self) -> Vec<Range<usize>> {
        let ranks = if self.a.is_empty() {
            self.b.iter().map(|b| b.cols).collect::<Vec<_>>()
        } else {
            self.a.iter().map(|a| a.rows).collect()
        };
        ranks
            .into_iter()
            .scan(0, |start, r| {
                let range = *start..*start + r;
                *start += r;
                Some(range)
            })
            .collect()
    }

    /// R: the sum of the adapters' ranks.
    pub fn total_rank(&self) -> usize {
        self.columns().last().map_or(0, |range| range.end)
    }
}

/// A two-dimensional argument as a matrix.
pub(crate) fn matrix(
    op: &'static str,
    name: &str,
    tensor: &TensorRef<'_>,
    meaning: &str,
) -> Result<Mat> {
    if tensor.sizes().len() != 2 {
        return Err(Error::argument(
            op,
            format!(
                "{name} is {}; it must be a matrix {meaning}",
                shape(tensor.sizes())
            ),
        ));
    }
    tensor.rows().ok_or_else(|| Error::Internal {
        op,
        what: format!("{name} could not be viewed as a matrix"),
    })
}

/// An argument [..., columns] as a matrix of rows; the caller made it collapsible.
pub(crate) fn rows(op: &'static str, name: &str, tensor: &TensorRef<'_>) -> Result<Mat> {
    if tensor.sizes().is_empty() {
        return Err(Error::argument(
            op,
            format!("{name} is a scalar; it must have at least one dimension"),
        ));
    }
    tensor.rows().ok_or_else(|| Error::Internal {
        op,
        what: format!(
            "{name} with strides {:?} was not made contiguous",
            tensor.strides()
        ),
    })
}

pub(crate) fn same_device(
    op: &'static str,
    name: &str,
    tensor: &TensorRef<'_>,
    device: Device,
    reference: &str,
) -> Result<()> {
    if tensor.device() == device {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!(
            "{name} is on {} but {reference} is on {device}; move them to one device",
            tensor.device()
        ),
    ))
}

pub(crate) fn same_dtype(
    op: &'static str,
    name: &str,
    tensor: &TensorRef<'_>,
    dtype: DType,
    reference: &str,
) -> Result<()> {
    if tensor.dtype() == dtype {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!(
            "{name} is {} but {reference} is {dtype}; they must have one dtype",
            tensor.dtype()
        ),
    ))
}

/// Checks the lists that describe the adapters. `inner` is x with its in-features where A is given.
pub(crate) fn check_adapters(
    op: &'static str,
    like: (&str, &TensorRef<'_>),
    a: Option<&[TensorRef<'_>]>,
    b: Option<&[TensorRef<'_>]>,
    scaling: Option<&[f64]>,
) -> Result<Adapters> {
    let (like_name, like) = like;
    let count = a.or(b).map_or(0, <[_]>::len);
    let list = if a.is_some() { "A" } else { "B" };
    if count == 0 {
        return Err(Error::argument(
            op,
            format!("{list} is an empty list; at least one adapter (K >= 1) is needed"),
        ));
    }
    if count > MAX_ADAPTERS {
        return Err(Error::argument(
            op,
            format!("{list} has {count} adapters; at most {MAX_ADAPTERS} fit in one call"),
        ));
    }
    if let (Some(a), Some(b)) = (a, b)
        && a.len() != b.len()
    {
        return Err(Error::argument(
            op,
            format!("A has {} adapters but B has {}", a.len(), b.len()),
        ));
    }
    if let Some(scaling) = scaling {
        if scaling.len() != count {
            return Err(Error::argument(
                op,
                format!(
                    "scaling has {} factors but {list} has {count} adapters",
                    scaling.len()
                ),
            ));
        }
        if let Some((k, value)) = scaling.iter().enumerate().find(|(_, s)| !s.is_finite()) {
            return Err(Error::argument(
                op,
                format!("scaling[{k}] is {value}; it must be finite"),
            ));
        }
    }
    let mut dtype = None;
    let mut mats = |name: &str, tensors: &[TensorRef<'_>], meaning: &str| -> Result<Vec<Mat>> {
        let mut out = Vec::with_capacity(tensors.len());
        for (k, tensor) in tensors.iter().enumerate() {
            let name = format!("{name}[{k}]");
            require_float(op, &name, tensor)?;
            let first = *dtype.get_or_insert(tensor.dtype());
            same_dtype(op, &name, tensor, first, "the first adapter")?;
            same_device(op, &name, tensor, like.device(), like_name)?;
            out.push(matrix(op, &name, tensor, meaning)?);
        }
        Ok(out)
    };
    let a = mats("A", a.unwrap_or(&[]), "[r, in_features]")?;
    let b = mats("B", b.unwrap_or(&[]), "[out_features, r]")?;
    for (k, (a, b)) in a.iter().zip(&b).enumerate() {
        if a.rows != b.cols {
            return Err(Error::argument(
                op,
                format!(
                    "A[{k}] is [{}, {}] but B[{k}] is [{}, {}]: their ranks r differ ({} and {})",
                    a.rows, a.cols, b.rows, b.cols, a.rows, b.cols
                ),
            ));
        }
    }
    let ranks = a
        .iter()
        .map(|a| a.rows)
        .chain(b.iter().filter(|_| a.is_empty()).map(|b| b.cols));
    if ranks
        .clone()
        .try_fold(0usize, |sum, r| sum.checked_add(r))
        .is_none_or(|sum| i64::try_from(sum).is_err())
    {
        return Err(Error::argument(
            op,
            format!(
                "the ranks r of {list} add up to more than 64 bits hold: {:?}",
                ranks.collect::<Vec<_>>()
            ),
        ));
    }
    let dtype = dtype.unwrap_or(like.dtype());
    let wide_enough = like.dtype().promote(dtype) == dtype || like.dtype() == DType::F64;
    if !wide_enough {
        return Err(Error::argument(
            op,
            format!(
                "the adapters are {dtype} under {like_name} of {}; they must have its dtype or a wider one",
                like.dtype()
            ),
        ));
    }
    Ok(Adapters {
        a,
        b,
        scaling: scaling.map_or_else(|| vec![1.0; count], <[f64]>::to_vec),
        dtype,
    })
}

/// Fails unless every A[k] has `features` columns, those of `name`.
pub(crate) fn check_in_features(
    op: &'static str,
    name: &str,
    sizes: &[i64],
    features: usize,
    adapters: &Adapters,
) -> Result<()> {
    for (k, a) in adapters.a.iter().enumerate() {
        if a.cols != features {
            return Err(Error::argument(
                op,
                format!(
                    "{name} is {} but A[{k}] is [{}, {}]: {name}'s last size must be A's in_features",
                    shape(sizes),
                    a.rows,
                    a.cols
                ),
            ));
        }
    }
    Ok(())
}

/// Fails unless every B[k] has `features` rows, those of `name`.
pub(crate) fn check_out_features(
    op: &'static str,
    name: &str,
    sizes: &[i64],
    features: usize,
    adapters: &Adapters,
) -> Result<()> {
    for (k, b) in adapters.b.iter().enumerate() {
        if b.rows != features {
            return Err(Error::argument(
                op,
                format!(
                    "{name} is {} but B[{k}] is [{}, {}]: {name}'s last size must be B's out_features",
                    shape(sizes),
                    b.rows,
                    b.cols
                ),
            ));
        }
    }
    Ok(())
}

/// The dropout of each adapter; all `None` where nothing is dropped.
pub(crate) fn check_dropout(
    op: &'static str,
    p: f64,
    rng: Option<&TensorRef<'_>>,
    device: Device,
    count: usize,
) -> Result<Vec<Option<Dropout>>> {
    if !(0.0..1.0).contains(&p) {
        return Err(Error::argument(
            op,
            format!("dropout_p is {p}; it must be in [0, 1)"),
        ));
    }
    let Some(rng) = rng else {
        if p > 0.0 {
            return Err(Error::argument(
                op,
                format!(
                    "dropout_p is {p} but rng is None; pass an int64 tensor [2] of (seed, offset)"
                ),
            ));
        }
        return Ok(vec![None; count]);
    };
    if rng.dtype() != DType::I64 || rng.sizes() != [2] {
        return Err(Error::argument(
            op,
            format!(
                "rng is {} of {}; it must be int64 [2], (seed, offset)",
                rng.dtype(),
                shape(rng.sizes())
            ),
        ));
    }
    same_device(op, "rng", rng, device, "x")?;
    if device != Device::Cpu && rng.is_contiguous() {
        // A kernel reads it there.
        return Ok(vec![None; count]);
    }
    let state = match rng.as_slice::<i64>() {
        Some([seed, offset]) => [*seed, *offset],
        _ => {
            return Err(Error::argument(
                op,
                "rng is not contiguous; pass rng.contiguous()",
            ));
        }
    };
    Ok((0..count).map(|k| Dropout::new(p, state, k)).collect())
}

pub(crate) fn require_cpu(op: &'static str, device: Device) -> Result<()> {
    if device == Device::Cpu {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!("tensors are on {device}; this build computes on the CPU only"),
    ))
}

/// Elements of a list of tensors, cut into pieces that threads take in turn.
///
/// The pieces do not depend on the thread count, so partial sums added in their order are reproducible.
pub(crate) fn pieces(lengths: impl Iterator<Item = usize>) -> Vec<(usize, Range<usize>)> {
    const PIECE: usize = 16 * 1024;
    lengths
        .enumerate()
        .flat_map(|(index, length)| {
            (0..length)
                .step_by(PIECE)
                .map(move |start| (index, start..(start + PIECE).min(length)))
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod testing {
    //! Owned tensors for unit tests.
    use crate::cpu::num::Stored;
    use crate::tensor::{Device, TensorMut, TensorRef};

    pub struct Owned<E> {
        pub data: Vec<E>,
        sizes: Vec<i64>,
        strides: Vec<i64>,
    }

    impl<E: Stored> Owned<E> {
        pub fn new(sizes: &[usize], value: impl Fn(usize) -> f64) -> Self {
            let count = sizes.iter().product();
            let mut strides = vec![1i64; sizes.len()];
            for i in (0..sizes.len().saturating_sub(1)).rev() {
                strides[i] = strides[i + 1] * sizes[i + 1] as i64;
            }
            Owned {
                data: (0..count).map(|i| E::narrow(value(i))).collect(),
                sizes: sizes.iter().map(|&s| s as i64).collect(),
                strides,
            }
        }

        pub fn view(&self) -> TensorRef<'_> {
            // SAFETY: the vector has the shape it was made with and outlives the view.
            unsafe {
                TensorRef::new(
                    self.data.as_ptr().cast(),
                    &self.sizes,
                    &self.strides,
                    E::DTYPE,
                    Device::Cpu,
                )
            }
        }

        pub fn view_mut(&mut self) -> TensorMut<'_> {
            // SAFETY: as in `view`, and the borrow is exclusive.
            unsafe {
                TensorMut::new(
                    self.data.as_mut_ptr().cast(),
                    &self.sizes,
                    &self.strides,
                    E::DTYPE,
                    Device::Cpu,
                )
            }
        }
    }

    /// Deterministic values of about unit size, different for each `seed`.
    pub fn noise(seed: usize) -> impl Fn(usize) -> f64 {
        move |i| {
            let hash = ((i + 1).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 10_007;
            hash as f64 / 5_003.5 - 1.0
        }
    }
}
