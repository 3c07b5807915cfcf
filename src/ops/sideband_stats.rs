//! `sideband_stats`: what the trigger looks at, from S and the scalars.
//!
//! V and P are those of [`crate::statistics`].

use super::sideband_accumulate::{field, sum_of_squares};
use crate::error::Result;
use crate::statistics::{Buffer, measured};
use crate::tensor::TensorRef;

pub const OP: &str = "sideband_stats";

/// The numbers in the order of [`measured`], for checked, contiguous arguments.
///
/// V is infinite while fewer than two snapshots are held, and never below zero; P is zero for none.
pub fn run(sum: &[TensorRef<'_>], stats: &[f64; field::COUNT]) -> Result<[f64; measured::COUNT]> {
    let norm = sum_of_squares(OP, sum)?;
    let numel: usize = sum.iter().map(TensorRef::numel).sum();
    Ok(statistics(stats, norm, numel))
}

/// The formulas alone.
pub fn statistics(
    stats: &[f64; field::COUNT],
    sum_norm_squared: f64,
    numel: usize,
) -> [f64; measured::COUNT] {
    let held = Buffer {
        m: stats[field::SNAPSHOTS],
        n: stats[field::WEIGHT],
        n2: stats[field::WEIGHT_SQUARED],
        q: stats[field::NORM_SQUARED],
        norm2: sum_norm_squared,
    };
    let mut out = [0.0; measured::COUNT];
    out[measured::SNAPSHOTS] = held.m;
    out[measured::WEIGHT] = held.n;
    out[measured::NORM_SQUARED] = held.q;
    out[measured::SUM_NORM_SQUARED] = held.norm2;
    out[measured::VARIANCE] = held.variance().unwrap_or(f64::INFINITY);
    out[measured::POWER] = if held.n > 0.0 { held.power() } else { 0.0 };
    out[measured::NUMEL] = numel as f64;
    out[measured::NON_FINITE] = stats[field::NON_FINITE];
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::sideband_accumulate;
    use crate::ops::testing::{Owned, noise};

    #[test]
    fn equals_the_textbook_variance_even_far_from_zero() {
        // Mean 1e3 times the standard deviation: V is a small difference of large numbers.
        let (count, window) = (5_000, 8);
        let snapshots: Vec<Owned<f32>> = (0..window)
            .map(|t| Owned::new(&[count], move |i| 1000.0 + noise(t + 1)(i)))
            .collect();
        let mut s = Owned::<f32>::new(&[count], |_| 0.0);
        let mut stats = Owned::<f64>::new(&[8], |_| 0.0);
        for g in &snapshots {
            sideband_accumulate::run(&mut [s.view_mut()], &mut stats.view_mut(), &[g.view()], 1.0)
                .unwrap();
        }
        let fields: [f64; 8] = stats.data.clone().try_into().unwrap();
        let out = run(&[s.view()], &fields).unwrap();
        let (mut v, mut p) = (0.0, 0.0);
        for i in 0..count {
            let mean = snapshots.iter().map(|g| f64::from(g.data[i])).sum::<f64>() / window as f64;
            v += snapshots
                .iter()
                .map(|g| (f64::from(g.data[i]) - mean).powi(2))
                .sum::<f64>()
                / (window - 1) as f64;
            p += mean * mean;
        }
        assert!(
            (out[measured::VARIANCE] - v).abs() < 0.02 * v,
            "{} {v}",
            out[measured::VARIANCE]
        );
        assert!((out[measured::POWER] - p).abs() < 1e-6 * p);
        assert_eq!(
            (out[measured::SNAPSHOTS], out[measured::NUMEL]),
            (8.0, 5000.0)
        );
    }

    #[test]
    fn undefined_until_two_snapshots() {
        assert_eq!(
            statistics(&[0.0; 8], 0.0, 10)[measured::VARIANCE..=measured::POWER],
            [f64::INFINITY, 0.0]
        );
        let held = [2.0, 2.0, 2.0, 8.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(statistics(&held, 20.0, 10)[measured::VARIANCE], 0.0);
        assert!(statistics(&held, f64::NAN, 10)[measured::VARIANCE].is_nan());
        assert_eq!(
            statistics(&[1.0, 2.0, 4.0, 8.0, 0.0, 0.0, 0.0, 0.0], 4.0, 10)[measured::VARIANCE],
            f64::INFINITY
        );
    }
}
