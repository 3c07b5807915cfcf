//! What the arguments of several operations have in common: the adapters, where gradients go, and their checks.

use crate::error::{Error, Result};
use crate::philox::Dropout;
use crate::tensor::{DType, Device, Mat, MatMut, TensorRef, require_float, shape};
use std::ops::Range;

/// Most adapters of one call: the adapter's number has 16 bits of the dropout counter.
pub const MAX_ADAPTERS: usize = 65536;

/// The K adapters of a call after checking: the matrices `A[k]` `[r_k, in]` and `B[k]` `[out, r_k]`.
pub struct Adapters {
    pub a: Vec<Mat>,
    pub b: Vec<Mat>,
    pub scaling: Vec<f64>,
    pub dtype: DType,
}

impl Adapters {
    /// The columns of H that belong to each adapter.
    pub fn columns(&self) -> Vec<Range<usize>> {
        let rs = if self.a.is_empty() {
            self.b.iter().map(|b| b.cols).collect::<Vec<_>>()
        } else {
            self.a.iter().map(|a| a.rows).collect()
        };
        rs.into_iter()
            .scan(0, |start, r| {
                let range = *start..*start + r;
                *start += r;
                Some(range)
            })
            .collect()
    }

    /// R: the sum of the adapters' r.
    pub fn total_r(&self) -> usize {
        self.columns().last().map_or(0, |range| range.end)
    }
}

/// Where the wanted gradients go; `None` is not computed.
#[derive(Default)]
pub struct Gradients {
    /// [M, I], of x's dtype.
    pub x: Option<MatMut>,
    /// Each like `A[k]`, of the adapters' dtype.
    pub a: Option<Vec<MatMut>>,
    /// Each like `B[k]`.
    pub b: Option<Vec<MatMut>>,
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
    let rs = a
        .iter()
        .map(|a| a.rows)
        .chain(b.iter().filter(|_| a.is_empty()).map(|b| b.cols));
    if rs
        .clone()
        .try_fold(0usize, |sum, r| sum.checked_add(r))
        .is_none_or(|sum| i64::try_from(sum).is_err())
    {
        return Err(Error::argument(
            op,
            format!(
                "the ranks r of {list} add up to more than 64 bits hold: {:?}",
                rs.collect::<Vec<_>>()
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

/// Fails unless every `A[k]` has `features` columns, those of `name`.
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

/// Fails unless every `B[k]` has `features` rows, those of `name`.
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

/// The sentence about a device that this build does not compute on.
pub(crate) fn unsupported(op: &'static str, device: Device) -> Error {
    let here = if cfg!(feature = "cuda") {
        "the CPU and on CUDA devices"
    } else {
        "the CPU"
    };
    Error::argument(
        op,
        format!("tensors are on {device}; this build computes on {here} only"),
    )
}
