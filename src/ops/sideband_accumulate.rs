//! `sideband_accumulate_`: S += w g for every parameter of an adapter, with the scalars of the trigger.
//!
//! `stats` `[8]` float64 holds m (snapshots), n (sum of weights), n2 (sum of squared weights),
//! Q (sum of w ||g||^2), the count of snapshots with a NaN or an infinity, and room for three more.
//! A snapshot that is not finite changes that count alone.

use super::arguments::{same_device, unsupported};
use crate::cpu::num::Stored;
use crate::cpu::{partial_sums, vectorized};
use crate::error::{Error, Result};
use crate::host::Pieces;
use crate::tensor::{DType, Device, TensorMut, TensorRef, require_float, shape};
use crate::with_float;
use std::sync::atomic::Ordering;

pub const OP: &str = "sideband_accumulate_";

/// Indices of the fields of `stats`.
pub mod field {
    pub const SNAPSHOTS: usize = 0;
    pub const WEIGHT: usize = 1;
    pub const WEIGHT_SQUARED: usize = 2;
    pub const NORM_SQUARED: usize = 3;
    pub const NON_FINITE: usize = 4;
    pub const COUNT: usize = 8;
}

/// Checks the lists S and g and the scalars that go with them.
pub fn check(
    op: &'static str,
    sum: &[TensorRef<'_>],
    stats: &TensorRef<'_>,
    grad: Option<&[TensorRef<'_>]>,
) -> Result<()> {
    check_stats(op, stats)?;
    if let Some(grad) = grad
        && grad.len() != sum.len()
    {
        return Err(Error::argument(
            op,
            format!("sum has {} tensors but grad has {}", sum.len(), grad.len()),
        ));
    }
    if sum.is_empty() {
        return Err(Error::argument(op, "sum is an empty list"));
    }
    for (k, s) in sum.iter().enumerate() {
        if s.dtype() != DType::F32 || !s.is_contiguous() {
            return Err(Error::argument(
                op,
                format!(
                    "sum[{k}] is {} with strides {:?}; it must be a contiguous float32 tensor",
                    s.dtype(),
                    s.strides()
                ),
            ));
        }
        same_device(op, &format!("sum[{k}]"), s, stats.device(), "stats")?;
        let Some(g) = grad.map(|grad| &grad[k]) else {
            continue;
        };
        require_float(op, &format!("grad[{k}]"), g)?;
        same_device(op, &format!("grad[{k}]"), g, stats.device(), "stats")?;
        if g.sizes() != s.sizes() {
            return Err(Error::argument(
                op,
                format!(
                    "sum[{k}] is {} but grad[{k}] is {}; they must have one shape",
                    shape(s.sizes()),
                    shape(g.sizes())
                ),
            ));
        }
    }
    Ok(())
}

pub(crate) fn check_stats(op: &'static str, stats: &TensorRef<'_>) -> Result<()> {
    if stats.dtype() != DType::F64
        || stats.sizes() != [field::COUNT as i64]
        || !stats.is_contiguous()
    {
        return Err(Error::argument(
            op,
            format!(
                "stats is {} of {}; it must be a contiguous float64 tensor [{}]",
                stats.dtype(),
                shape(stats.sizes()),
                field::COUNT
            ),
        ));
    }
    Ok(())
}

pub fn check_weight(weight: f64) -> Result<()> {
    if weight.is_finite() && weight > 0.0 {
        return Ok(());
    }
    Err(Error::argument(
        OP,
        format!("weight is {weight}; it must be finite and greater than 0"),
    ))
}

/// Adds the snapshot `grad`, whose tensors are contiguous, to `sum` and `stats`.
pub fn run(
    sum: &mut [TensorMut<'_>],
    stats: &mut TensorMut<'_>,
    grad: &[TensorRef<'_>],
    weight: f64,
) -> Result<()> {
    check_weight(weight)?;
    if stats.view().device() != Device::Cpu {
        return Err(unsupported(OP, stats.view().device()));
    }
    // Two passes over g: whether the snapshot is finite must be known before S changes.
    let norm_squared = sum_of_squares(OP, grad)?;
    let stats = stats
        .as_mut_slice::<f64>()
        .ok_or_else(|| internal("stats"))?;
    if !norm_squared.is_finite() {
        stats[field::NON_FINITE] += 1.0;
        return Ok(());
    }
    let mut targets = Vec::with_capacity(sum.len());
    for tensor in sum.iter_mut() {
        let slice = tensor
            .as_mut_slice::<f32>()
            .ok_or_else(|| internal("sum"))?;
        targets.push((slice.as_mut_ptr() as usize, slice.len()));
    }
    let work = Pieces::new(targets.iter().map(|(_, length)| *length));
    let weight_f32 = weight as f32;
    work.each(OP, &|_, tensor, span| {
        let (base, _) = targets[tensor];
        // SAFETY: pieces are disjoint ranges inside the tensor, each written by one task.
        let target = unsafe {
            std::slice::from_raw_parts_mut((base as *mut f32).add(span.start), span.len())
        };
        with_float!(grad[tensor].dtype(), E => {
            if let Some(g) = grad[tensor].as_slice::<E>() {
                add_scaled(target, &g[span.clone()], weight_f32);
            }
        });
    })?;
    stats[field::SNAPSHOTS] += 1.0;
    stats[field::WEIGHT] += weight;
    stats[field::WEIGHT_SQUARED] += weight * weight;
    stats[field::NORM_SQUARED] += weight * norm_squared;
    Ok(())
}

fn internal(name: &str) -> Error {
    Error::Internal {
        op: OP,
        what: format!("{name} changed after it was checked"),
    }
}

fn add_scaled<E: Stored>(target: &mut [f32], source: &[E], weight: f32) {
    vectorized(
        #[inline(always)]
        || {
            let mut wide = [0.0f32; 256];
            for (to, from) in target.chunks_mut(256).zip(source.chunks(256)) {
                let wide = &mut wide[..from.len()];
                E::widen_slice(from, wide);
                for (sum, value) in to.iter_mut().zip(wide.iter()) {
                    *sum += weight * *value;
                }
            }
        },
    );
}

/// Sum of squares over contiguous tensors, each value rounded to float32 first (as S will hold it);
/// added up in float64 in an order that does not depend on the thread count. Not finite if and only
/// if a value is not.
pub(crate) fn sum_of_squares(op: &'static str, tensors: &[TensorRef<'_>]) -> Result<f64> {
    let work = Pieces::new(tensors.iter().map(TensorRef::numel));
    let partial = partial_sums(op, work.count())?;
    work.each(op, &|piece, tensor, span| {
        let tensor = &tensors[tensor];
        let sum = with_float!(tensor.dtype(), E => {
            tensor.as_slice::<E>().map_or(f64::NAN, |values| squares(&values[span.clone()]))
        });
        partial[piece].store(sum.to_bits(), Ordering::Relaxed);
    })?;
    Ok(partial
        .iter()
        .map(|bits| f64::from_bits(bits.load(Ordering::Relaxed)))
        .sum())
}

fn squares<E: Stored>(values: &[E]) -> f64 {
    const LANES: usize = 16;
    vectorized(
        #[inline(always)]
        || {
            let mut sums = [0.0f64; LANES];
            let mut wide = [0.0f32; 256];
            for chunk in values.chunks(256) {
                let wide = &mut wide[..chunk.len()];
                E::widen_slice(chunk, wide);
                let mut groups = wide.chunks_exact(LANES);
                for group in groups.by_ref() {
                    for (sum, value) in sums.iter_mut().zip(group) {
                        let value = f64::from(*value);
                        *sum += value * value;
                    }
                }
                for (sum, value) in sums.iter_mut().zip(groups.remainder()) {
                    let value = f64::from(*value);
                    *sum += value * value;
                }
            }
            sums.iter().sum()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Owned, noise};

    #[test]
    fn a_snapshot_that_is_not_finite_changes_only_its_count() {
        let (mut s1, mut s2) = (
            Owned::<f32>::new(&[70_000], |_| 1.0),
            Owned::<f32>::new(&[3], |_| 2.0),
        );
        let mut stats = Owned::<f64>::new(&[8], |_| 0.0);
        let mut g1 = Owned::<half::bf16>::new(&[70_000], noise(1));
        let g2 = Owned::<f64>::new(&[3], noise(2));
        g1.data[69_999] = half::bf16::INFINITY;
        let mut sums = [s1.view_mut(), s2.view_mut()];
        run(
            &mut sums,
            &mut stats.view_mut(),
            &[g1.view(), g2.view()],
            2.0,
        )
        .unwrap();
        assert_eq!(stats.data, [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
        assert!(s1.data.iter().all(|v| *v == 1.0));
        g1.data[69_999] = half::bf16::ONE;
        let mut sums = [s1.view_mut(), s2.view_mut()];
        run(
            &mut sums,
            &mut stats.view_mut(),
            &[g1.view(), g2.view()],
            2.0,
        )
        .unwrap();
        let q: f64 = 2.0
            * (g1.data.iter().map(|v| v.to_f64().powi(2)).sum::<f64>()
                + g2.data
                    .iter()
                    .map(|v| f64::from(*v as f32).powi(2))
                    .sum::<f64>());
        assert_eq!(stats.data[..3], [1.0, 2.0, 4.0]);
        assert!((stats.data[3] - q).abs() < 1e-12 * q);
        assert_eq!(s2.data[1], 2.0 + 2.0 * g2.data[1] as f32);
        assert_eq!(s1.data[5], 1.0 + 2.0 * g1.data[5].to_f32());
    }

    #[test]
    fn large_finite_values_are_finite() {
        let values = Owned::<f32>::new(&[1000], |_| 3e38);
        assert!(sum_of_squares(OP, &[values.view()]).unwrap().is_finite());
    }

    #[test]
    fn bad_weights_and_shapes_are_named() {
        assert!(
            check_weight(0.0)
                .unwrap_err()
                .to_string()
                .contains("weight is 0")
        );
        assert!(check_weight(f64::NAN).is_err());
        let (s, g) = (
            Owned::<f32>::new(&[4], noise(1)),
            Owned::<f32>::new(&[5], noise(1)),
        );
        let stats = Owned::<f64>::new(&[8], |_| 0.0);
        let text = check(OP, &[s.view()], &stats.view(), Some(&[g.view()]))
            .unwrap_err()
            .to_string();
        assert!(text.contains("sum[0] is [4] but grad[0] is [5]"), "{text}");
        assert!(check(OP, &[], &stats.view(), Some(&[])).is_err());
        assert!(
            check(OP, &[s.view()], &s.view(), None)
                .unwrap_err()
                .to_string()
                .contains("stats is float32")
        );
    }
}
