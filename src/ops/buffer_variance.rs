//! `buffer_variance`: mean over elements of the unbiased variance over the filled slots of a ring.
//!
//! One pass: deviations from the first slot are summed with their squares in float64, so a mean far
//! from zero costs no precision (shifted-data variance; Chan, Golub, LeVeque, "Algorithms for
//! computing the sample variance", The American Statistician 37(3), 1983).

use crate::cpu::num::Stored;
use crate::cpu::{partial_sums, vectorized};
use crate::error::{Error, Result};
use crate::host::parallel_for;
use crate::tensor::{Mat, TensorRef, require_float, shape};
use crate::with_float;
use std::sync::atomic::Ordering;

pub const OP: &str = "buffer_variance";

/// Elements of a slot that one task carries through all slots: two float64 sums each stay in L1.
const BLOCK: usize = 1024;

/// The ring as a matrix [window, numel].
pub fn check(ring: &TensorRef<'_>, filled: i64) -> Result<Mat> {
    require_float(OP, "ring", ring)?;
    if ring.sizes().len() != 2 {
        return Err(Error::argument(
            OP,
            format!(
                "ring is {}; it must be [window, numel]",
                shape(ring.sizes())
            ),
        ));
    }
    let window = ring.sizes()[0];
    if !(0..=window).contains(&filled) {
        return Err(Error::argument(
            OP,
            format!("filled is {filled}; it must be in [0, {window}], the ring's window"),
        ));
    }
    super::arguments::matrix(OP, "ring", ring, "[window, numel]")
}

/// +inf for fewer than two filled slots; NaN for slots of no elements.
pub fn run(ring: Mat, filled: usize) -> Result<f64> {
    if filled < 2 {
        return Ok(f64::INFINITY);
    }
    let blocks = ring.cols.div_ceil(BLOCK);
    let partial = partial_sums(OP, blocks)?;
    parallel_for(OP, blocks, 4, &|range| {
        for index in range {
            let first = index * BLOCK;
            let count = BLOCK.min(ring.cols - first);
            let sum = with_float!(ring.dtype, E => block::<E>(&ring, filled, first, count));
            partial[index].store(sum.to_bits(), Ordering::Relaxed);
        }
    })?;
    let total: f64 = partial
        .iter()
        .map(|bits| f64::from_bits(bits.load(Ordering::Relaxed)))
        .sum();
    Ok(total / (filled - 1) as f64 / ring.cols as f64)
}

/// `out[i] = ring[slot, first + i]`.
#[inline(always)]
fn load_slot<E: Stored>(ring: &Mat, slot: usize, first: usize, out: &mut [f64]) {
    let source = ring.at::<E>(slot, first);
    if ring.cs == 1 {
        // SAFETY: `out.len()` elements from (slot, first) on lie inside the slot.
        E::widen_slice(
            unsafe { std::slice::from_raw_parts(source, out.len()) },
            out,
        );
        return;
    }
    for (i, out) in out.iter_mut().enumerate() {
        // SAFETY: (slot, first + i) lies inside the ring.
        *out = unsafe { *source.wrapping_offset(i as isize * ring.cs) }.widen();
    }
}

/// Sum over the block's elements of their sums of squared deviations from their means.
fn block<E: Stored>(ring: &Mat, filled: usize, first: usize, count: usize) -> f64 {
    vectorized(
        #[inline(always)]
        || {
            let (mut shift, mut value) = ([0.0f64; BLOCK], [0.0f64; BLOCK]);
            let (mut sum, mut squares) = ([0.0f64; BLOCK], [0.0f64; BLOCK]);
            load_slot::<E>(ring, 0, first, &mut shift[..count]);
            for slot in 1..filled {
                load_slot::<E>(ring, slot, first, &mut value[..count]);
                let sums = sum.iter_mut().zip(&mut squares);
                for ((value, shift), (sum, squares)) in
                    value.iter().zip(&shift).zip(sums).take(count)
                {
                    let deviation = value - shift;
                    *sum += deviation;
                    *squares += deviation * deviation;
                }
            }
            let n = filled as f64;
            (0..count).map(|i| squares[i] - sum[i] * sum[i] / n).sum()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Owned, noise};

    #[test]
    fn equals_the_two_pass_variance() {
        for (window, numel, filled) in [(4, 1, 2), (8, 3_000, 8), (8, 1_025, 5)] {
            let ring = Owned::<f32>::new(&[window, numel], |i| 1000.0 + noise(2)(i));
            let mut expected = 0.0;
            for i in 0..numel {
                let column: Vec<f64> = (0..filled)
                    .map(|t| f64::from(ring.data[t * numel + i]))
                    .collect();
                let mean = column.iter().sum::<f64>() / filled as f64;
                expected +=
                    column.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (filled - 1) as f64;
            }
            expected /= numel as f64;
            let got = run(check(&ring.view(), filled as i64).unwrap(), filled).unwrap();
            assert!((got - expected).abs() < 1e-9 * expected, "{got} {expected}");
        }
    }

    #[test]
    fn too_few_slots_and_bad_arguments() {
        let ring = Owned::<f32>::new(&[3, 5], noise(1));
        assert_eq!(
            run(check(&ring.view(), 1).unwrap(), 1).unwrap(),
            f64::INFINITY
        );
        let text = check(&ring.view(), 4).unwrap_err().to_string();
        assert!(text.contains("filled is 4; it must be in [0, 3]"));
        assert!(check(&ring.view(), -1).is_err());
        let flat = Owned::<f32>::new(&[3], noise(1));
        assert!(
            check(&flat.view(), 0)
                .unwrap_err()
                .to_string()
                .contains("[window, numel]")
        );
    }
}
