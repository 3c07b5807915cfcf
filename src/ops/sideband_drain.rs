//! `sideband_drain_`: FIRE: grad = scale S in grad's dtype, then S = 0 and stats = 0.

use crate::cpu::num::Stored;
use crate::cpu::vectorized;
use crate::error::{Error, Result};
use crate::host::Pieces;
use crate::tensor::TensorMut;
use crate::with_float;

pub const OP: &str = "sideband_drain_";

pub fn check_scale(scale: f64) -> Result<()> {
    if scale.is_finite() {
        return Ok(());
    }
    Err(Error::argument(
        OP,
        format!("scale is {scale}; it must be finite"),
    ))
}

/// Drains checked arguments whose tensors are contiguous.
pub fn run(
    sum: &mut [TensorMut<'_>],
    stats: &mut TensorMut<'_>,
    grad: &mut [TensorMut<'_>],
    scale: f64,
) -> Result<()> {
    let mut pairs = Vec::with_capacity(sum.len());
    for (s, g) in sum.iter_mut().zip(grad.iter_mut()) {
        let s = s.as_mut_slice::<f32>().ok_or_else(|| internal("sum"))?;
        pairs.push((
            s.as_mut_ptr() as usize,
            s.len(),
            g.view().data() as usize,
            g.view().dtype(),
        ));
    }
    let work = Pieces::new(pairs.iter().map(|pair| pair.1));
    let scale = scale as f32;
    work.each(OP, &|_, tensor, span| {
        let (source, _, target, dtype) = pairs[tensor];
        with_float!(dtype, E => {
            // SAFETY: both tensors are contiguous, of these dtypes and of one length (checked);
            // pieces are disjoint, and the views are exclusive.
            unsafe {
                let source = std::slice::from_raw_parts_mut((source as *mut f32).add(span.start), span.len());
                let target = std::slice::from_raw_parts_mut((target as *mut E).add(span.start), span.len());
                drain(source, target, scale);
            }
        });
    })?;
    stats
        .as_mut_slice::<f64>()
        .ok_or_else(|| internal("stats"))?
        .fill(0.0);
    Ok(())
}

fn internal(name: &str) -> Error {
    Error::Internal {
        op: OP,
        what: format!("{name} changed after it was checked"),
    }
}

fn drain<E: Stored>(source: &mut [f32], target: &mut [E], scale: f32) {
    vectorized(
        #[inline(always)]
        || {
            for (sum, out) in source.iter_mut().zip(target.iter_mut()) {
                *out = E::narrow(scale * *sum);
                *sum = 0.0;
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Owned, noise};

    #[test]
    fn writes_the_mean_and_clears_everything() {
        let mut s = Owned::<f32>::new(&[40_001], noise(3));
        let before = s.data.clone();
        let mut stats = Owned::<f64>::new(&[8], |_| 5.0);
        let mut g = Owned::<half::bf16>::new(&[40_001], |_| f64::NAN);
        run(
            &mut [s.view_mut()],
            &mut stats.view_mut(),
            &mut [g.view_mut()],
            0.25,
        )
        .unwrap();
        assert!(s.data.iter().all(|v| *v == 0.0) && stats.data.iter().all(|v| *v == 0.0));
        for (out, value) in g.data.iter().zip(&before) {
            assert_eq!(*out, half::bf16::from_f32(0.25 * value));
        }
        assert!(check_scale(f64::INFINITY).is_err());
    }
}
