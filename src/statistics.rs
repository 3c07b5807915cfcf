//! V and P of a gradient buffer, and what ranks agree on: one formula for the op that measures and the trigger that decides.
//!
//! One rank's buffer of an adapter, m snapshots g_t of weights n_t: S = sum n_t g_t, n = sum n_t,
//! n2 = sum n_t^2, Q = sum n_t ||g_t||^2. From these
//!
//! ```text
//! V = (Q - ||S||^2 / n) / (n - n2 / n)   total unbiased variance of one snapshot
//! P = ||S / n||^2                        squared norm of the mean; E P = ||E g||^2 + V n2 / n^2
//! ```
//!
//! n^2 / n2, the effective number of snapshots, is m where all weights are equal.

/// Where each number is in what `sideband_stats` returns.
pub mod measured {
    pub const SNAPSHOTS: usize = 0;
    pub const WEIGHT: usize = 1;
    pub const NORM_SQUARED: usize = 2;
    pub const SUM_NORM_SQUARED: usize = 3;
    pub const VARIANCE: usize = 4;
    pub const POWER: usize = 5;
    pub const NUMEL: usize = 6;
    pub const NON_FINITE: usize = 7;
    pub const COUNT: usize = 8;
}

/// One rank's scalars of one adapter: the record's fields of the same names.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Buffer {
    /// Snapshots.
    pub m: f64,
    /// Sum of weights, and of squared weights.
    pub n: f64,
    pub n2: f64,
    /// Sum of n_t ||g_t||^2.
    pub q: f64,
    /// ||S||^2.
    pub norm2: f64,
}

/// What all ranks know of an adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Agreed {
    /// Effective snapshots a rank, n^2 / n2, the mean over the ranks that hold any.
    pub m: f64,
    /// V; None where no rank (or not all ranks together) has two snapshots.
    pub variance: Option<f64>,
    /// ||E g||^2 without bias, P - V / m; below zero where noise hides the gradient. None without V.
    pub signal: Option<f64>,
    /// P.
    pub power: f64,
}

impl Buffer {
    /// V; None below two snapshots. Never below zero, which rounding may leave.
    pub fn variance(&self) -> Option<f64> {
        let degrees = self.n - self.n2 / self.n;
        let variance = (self.q - self.norm2 / self.n) / degrees;
        // Not `max`, which makes 0 of NaN: a sum that is no number must not look like one without variance.
        let variance = if variance < 0.0 { 0.0 } else { variance };
        (self.m >= 2.0 && degrees > 0.0).then_some(variance)
    }

    /// P, of a buffer that holds something.
    pub fn power(&self) -> f64 {
        self.norm2 / (self.n * self.n)
    }

    /// Effective snapshots.
    fn effective(&self) -> f64 {
        self.n * self.n / self.n2
    }
}

/// The mean of V and of P over the ranks that have them, in rank order: variance within ranks.
pub fn fold(ranks: &[Buffer]) -> Agreed {
    let mean = |values: &mut dyn Iterator<Item = f64>| {
        let (mut sum, mut count) = (0.0, 0.0);
        for value in values {
            sum += value;
            count += 1.0;
        }
        (count > 0.0).then(|| sum / count)
    };
    let filled = || ranks.iter().filter(|b| b.n > 0.0);
    let m = mean(&mut filled().map(Buffer::effective)).unwrap_or(0.0);
    let power = mean(&mut filled().map(Buffer::power)).unwrap_or(0.0);
    let variance = mean(&mut filled().filter_map(Buffer::variance));
    Agreed {
        m,
        variance,
        signal: variance.map(|v| power - v / m),
        power,
    }
}

/// V and P over the snapshots of all ranks together, variance between ranks included.
///
/// `norm2` is ||sum over ranks of S||^2, which only a reduce can tell; two ranks of one snapshot each
/// are enough for V.
pub fn pooled(ranks: &[Buffer], norm2: f64) -> Agreed {
    let mut all = Buffer {
        m: 0.0,
        n: 0.0,
        n2: 0.0,
        q: 0.0,
        norm2,
    };
    let mut filled = 0.0;
    for b in ranks.iter().filter(|b| b.n > 0.0) {
        all.m += b.m;
        all.n += b.n;
        all.n2 += b.n2;
        all.q += b.q;
        filled += 1.0;
    }
    if filled == 0.0 {
        return fold(&[]);
    }
    let (variance, power, effective) = (all.variance(), all.power(), all.effective());
    Agreed {
        m: effective / filled,
        variance,
        signal: variance.map(|v| power - v / effective),
        power,
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Buffers as ranks would hold them.
    use super::Buffer;
    use rand::RngExt;
    use rand::rngs::StdRng;

    /// The buffers of `ranks` ranks with `m` snapshots each of `mean` plus noise, and ||sum of S||^2.
    pub fn buffers(
        rng: &mut StdRng,
        ranks: usize,
        m: usize,
        mean: f64,
        sd: f64,
        numel: usize,
        weighted: bool,
    ) -> (Vec<Buffer>, f64) {
        let mut total = vec![0.0; numel];
        let list = (0..ranks)
            .map(|_| {
                let mut s = vec![0.0; numel];
                let mut b = Buffer {
                    m: 0.0,
                    n: 0.0,
                    n2: 0.0,
                    q: 0.0,
                    norm2: 0.0,
                };
                for _ in 0..m {
                    let w = if weighted {
                        rng.random_range(1..5) as f64
                    } else {
                        1.0
                    };
                    for value in &mut s {
                        // Uniform noise of variance sd^2.
                        let g = mean + sd * 12f64.sqrt() * (rng.random::<f64>() - 0.5);
                        *value += w * g;
                        b.q += w * g * g;
                    }
                    b.m += 1.0;
                    b.n += w;
                    b.n2 += w * w;
                }
                b.norm2 = s.iter().map(|x| x * x).sum();
                for (t, x) in total.iter_mut().zip(&s) {
                    *t += x;
                }
                b
            })
            .collect();
        (list, total.iter().map(|x| x * x).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::testing::buffers;
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn both_ways_to_agree_estimate_variance_and_signal_without_bias() {
        let mut rng = StdRng::seed_from_u64(7);
        for weighted in [false, true] {
            let (numel, mean, sd) = (50, 0.3, 1.7);
            let (want_v, want_signal) = (numel as f64 * sd * sd, numel as f64 * mean * mean);
            for together in [false, true] {
                let (mut v, mut signal) = (0.0, 0.0);
                let rounds = 4_000;
                for _ in 0..rounds {
                    // Together, one snapshot a rank is enough.
                    let (ranks, norm2) = buffers(
                        &mut rng,
                        3,
                        if together { 1 } else { 4 },
                        mean,
                        sd,
                        numel,
                        weighted,
                    );
                    let a = if together {
                        pooled(&ranks, norm2)
                    } else {
                        fold(&ranks)
                    };
                    v += a.variance.unwrap() / rounds as f64;
                    signal += a.signal.unwrap() / rounds as f64;
                }
                assert!(
                    (v / want_v - 1.0).abs() < 0.02,
                    "{weighted} {together}: {v} for {want_v}"
                );
                // fold takes the mean of n^2 / n2 where ranks differ, which costs it a little under weights.
                let slack = if weighted && !together { 1.0 } else { 0.5 };
                assert!(
                    (signal - want_signal).abs() < slack,
                    "{weighted} {together}: {signal} for {want_signal}"
                );
            }
        }
    }
}
