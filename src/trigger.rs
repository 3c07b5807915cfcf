//! Decides HOLD or FIRE for one adapter, with the reason, and plans the length of its next window.
//!
//! Everything here is a pure function of its arguments, so ranks that received the same bytes decide
//! the same. Only +, -, *, /, square roots and rounding up are used: IEEE 754 defines these alike on
//! every processor. A logarithm from the system's library is not.
//!
//! V, P and what ranks make of them are in [`crate::statistics`].
//!
//! The relative statistic compares the variance of the mean over all ranks, V / (m world_size), with
//! theta^2 times the squared norm of the true gradient, P - V / m. It is the norm test for batch sizes
//! (Bollapragada, Byrd, Nocedal, SIAM J. Optim. 28(4), 2018; for local methods, arXiv:2406.13936).
//!
//! The noise scale statistic looks for the cheapest window. Longer windows send less but learn less per
//! step, and the cheapest length is sqrt(c b): c is the price of a FIRE in steps, and b the noise scale in
//! steps, V / (world_size ||E g||^2). The reason (McCandlish et al., arXiv:1812.06162): progress takes FIREs
//! in proportion to 1 + b / m and steps in proportion to m + b, and c (1 + b / m) + m + b is least there.

use crate::statistics::Agreed;

/// The statistic, with its threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Statistic {
    /// V / numel < eps.
    Variance { eps: f64 },
    /// V / (m world_size) <= theta^2 max(P - V / m, 0).
    Relative { theta: f64 },
    /// cost V / (m^2 world_size) <= max(P - V / m, 0).
    NoiseScale { cost: f64 },
}

/// What does not change during a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    pub statistic: Statistic,
    /// `buffer_capacity`: snapshots after which a buffer fires whatever it holds; at least 1.
    pub capacity: u64,
    /// Steps after which it fires whatever it holds.
    pub max_hold_steps: Option<u64>,
    pub max_drift_ms: f64,
    pub world_size: u64,
    /// Elements of the adapter.
    pub numel: u64,
}

/// Where an adapter stands when it is asked about, the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moment {
    /// Snapshots held, this step's included.
    pub held: u64,
    /// Steps since the first of them, this one included.
    pub age: u64,
    /// The bound of this window, at most `capacity`: a first window is shorter where adapters are staggered.
    pub bound: u64,
    /// A save, an evaluation or the end: nothing may stay.
    pub flush: bool,
    /// The largest drift between ranks that was agreed last.
    pub drift_ms: Option<f64>,
    /// The length that was planned for this window; None decides by the statistic, step by step.
    pub planned: Option<u64>,
    /// As agreed last: every gradient of this window so far, of whatever rank, held a NaN or an infinity.
    pub nothing_finite: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    Fire,
    FireFull,
    FireDeadline,
    FireFlush,
    HoldVariance,
    HoldDrift,
    HoldNonfinite,
    EmptyBuffer,
}

impl Reason {
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Fire => "fire",
            Reason::FireFull => "fire_full",
            Reason::FireDeadline => "fire_deadline",
            Reason::FireFlush => "fire_flush",
            Reason::HoldVariance => "hold_variance",
            Reason::HoldDrift => "hold_drift",
            Reason::HoldNonfinite => "hold_nonfinite",
            Reason::EmptyBuffer => "empty_buffer",
        }
    }

    pub fn fires(self) -> bool {
        matches!(
            self,
            Reason::Fire | Reason::FireFull | Reason::FireDeadline | Reason::FireFlush
        )
    }
}

/// HOLD or FIRE with its reason, and the two numbers that were compared; they are NaN where none were.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    pub reason: Reason,
    pub statistic: f64,
    pub threshold: f64,
}

/// What one rank put into a FIRE.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// The weight of what it sent.
    pub sent: f64,
    /// Gradients that it left out, since they held a NaN or an infinity.
    pub left_out: f64,
}

/// What became of a FIRE, when all ranks' shares are known: None where there is a gradient to apply.
///
/// `sum_is_finite` is about the sum over ranks, which can overflow although each rank's share is finite.
pub fn nothing_to_apply(shares: &[Share], sum_is_finite: bool) -> Option<Reason> {
    let sent: f64 = shares.iter().map(|s| s.sent).sum();
    if sent > 0.0 && sent.is_finite() && sum_is_finite {
        None
    } else if sent == 0.0 && shares.iter().all(|s| s.left_out == 0.0) {
        Some(Reason::EmptyBuffer)
    } else {
        Some(Reason::HoldNonfinite)
    }
}

/// Steps in a row, up to now, in which a rank had a gradient of an adapter but never a finite one.
///
/// A window with at least one finite gradient ends the row; a window without any gradient (a rank that has no data)
/// neither ends it nor makes it longer.
pub fn row_without_finite(before: u64, share: Share) -> u64 {
    if share.sent > 0.0 {
        0
    } else {
        before.saturating_add(share.left_out as u64)
    }
}

impl Rule {
    /// The statistic and its threshold; fires where the first is below (relative: not above) the second.
    fn compare(&self, agreed: &Agreed) -> Option<(f64, f64, bool)> {
        let (v, signal) = (agreed.variance?, agreed.signal?);
        Some(match self.statistic {
            Statistic::Variance { eps } => {
                let value = v / self.numel as f64;
                (value, eps, value < eps)
            }
            Statistic::Relative { theta } => {
                let value = v / (agreed.m * self.world_size as f64);
                let threshold = theta * theta * signal.max(0.0);
                (value, threshold, value <= threshold)
            }
            Statistic::NoiseScale { cost } => {
                let value = cost * v / (agreed.m * agreed.m * self.world_size as f64);
                let threshold = signal.max(0.0);
                (value, threshold, value <= threshold)
            }
        })
    }

    /// HOLD or FIRE; the first rule that matches, in the order of the lines below.
    pub fn decide(&self, moment: &Moment, agreed: Option<&Agreed>) -> Decision {
        let compared = match moment.planned {
            Some(length) => Some((moment.held as f64, length as f64, moment.held >= length)),
            None => agreed.and_then(|a| self.compare(a)),
        };
        let (statistic, threshold, passed) = compared.unwrap_or((f64::NAN, f64::NAN, false));
        let late = self.max_hold_steps.is_some_and(|max| moment.age >= max);
        let reason = if moment.held == 0 {
            Reason::EmptyBuffer
        } else if moment.held >= moment.bound.min(self.capacity) {
            Reason::FireFull
        } else if late {
            Reason::FireDeadline
        } else if moment.flush {
            Reason::FireFlush
        } else if self.drifted(moment.drift_ms) {
            Reason::HoldDrift
        } else if passed {
            Reason::Fire
        } else if moment.nothing_finite {
            Reason::HoldNonfinite
        } else {
            Reason::HoldVariance
        };
        Decision {
            reason,
            statistic,
            threshold,
        }
    }

    fn drifted(&self, drift_ms: Option<f64>) -> bool {
        drift_ms.is_some_and(|drift| drift > self.max_drift_ms)
    }

    /// The length of the next window, and the moving averages that it comes from.
    ///
    /// relative: m* = ceil(V / (world_size theta^2 ||E g||^2)), where the norm test would just pass;
    /// noise scale: ceil(sqrt(cost V / (world_size ||E g||^2)));
    /// variance: 1 where V / numel < eps, else `capacity`. Between 1 and `capacity`, and of the first two
    /// at most twice `held`, the window before: the estimate of one short window is hardly better than noise,
    /// and a window that is far too long is also long until its mistake is seen.
    pub fn plan(&self, trend: Option<Trend>, window: &Agreed, held: u64) -> (Option<Trend>, u64) {
        let trend = match (window.variance, window.signal) {
            (Some(variance), Some(signal)) => {
                let fresh = Trend { variance, signal };
                Some(trend.map_or(fresh, |old| old.follow(&fresh)))
            }
            _ => trend,
        };
        // No signal gives infinity: the cast saturates. NaN, from no variance either, becomes 0.
        let grown = |length: f64| (length.ceil() as u64).min(held.max(1).saturating_mul(2));
        let noise = |t: Trend| t.variance / (self.world_size as f64 * t.signal.max(0.0));
        let length = match (trend, self.statistic) {
            // One process and one snapshot: there is no variance yet, so look at two.
            (None, _) => 2,
            (Some(t), Statistic::Variance { eps }) if t.variance / (self.numel as f64) < eps => 1,
            (Some(_), Statistic::Variance { .. }) => self.capacity,
            (Some(t), Statistic::Relative { theta }) => grown(noise(t) / (theta * theta)),
            (Some(t), Statistic::NoiseScale { cost }) => grown((cost * noise(t)).sqrt()),
        };
        (trend, length.clamp(1, self.capacity))
    }

    /// Moves a planned length by up to a third, so that adapters which are active together do not fire in the same step.
    ///
    /// Adapters that fire in one step all want the network at once, and move by gradients that know nothing of each other's
    /// moves. `others` are the adapters that were active in the same step: of each, the steps until its window ends, and the
    /// length of its later windows.
    pub fn apart(&self, length: u64, others: &[(u64, u64)]) -> u64 {
        if length <= 1 {
            return length;
        }
        let slack = (length / 3).max(1);
        // Steps to the nearest end of another's window.
        let gap = |candidate: u64| {
            let nearest = others.iter().map(|&(left, period)| {
                let past = candidate.abs_diff(left) % period.max(1);
                past.min(period.max(1) - past)
            });
            nearest.min().unwrap_or(0)
        };
        (length - slack..=(length + slack).min(self.capacity))
            .min_by_key(|&l| (std::cmp::Reverse(gap(l)), l.abs_diff(length)))
            .unwrap_or(length)
    }

    /// The first window of an adapter: 1, 2, 3, ... in turn, so that adapters do not fire all in one step.
    pub fn first_window(&self, adapter: u64, planned: bool, stagger: bool) -> u64 {
        match (planned, stagger) {
            (true, false) => 1,
            (true, true) => 1 + adapter % self.capacity.min(4),
            (false, false) => self.capacity,
            (false, true) => self.capacity - adapter % (self.capacity / 2).max(1),
        }
    }
}

/// Moving averages of V and ||E g||^2, 3/4 of the old and 1/4 of the new.
///
/// Each is averaged by itself, and not their ratio or their logarithms. One window's estimate of ||E g||^2 is unbiased but may
/// be below zero, and only a plain mean of such estimates stays unbiased.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Trend {
    pub variance: f64,
    pub signal: f64,
}

impl Trend {
    fn follow(&self, new: &Trend) -> Trend {
        Trend {
            variance: 0.75 * self.variance + 0.25 * new.variance,
            signal: 0.75 * self.signal + 0.25 * new.signal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::statistics::testing::buffers;
    use crate::statistics::{Buffer, fold, pooled};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const RULE: Rule = Rule {
        statistic: Statistic::Relative { theta: 1.0 },
        capacity: 8,
        max_hold_steps: None,
        max_drift_ms: 250.0,
        world_size: 2,
        numel: 10,
    };
    const MOMENT: Moment = Moment {
        held: 3,
        age: 3,
        bound: 8,
        flush: false,
        drift_ms: None,
        planned: None,
        nothing_finite: false,
    };

    fn agreed(m: f64, variance: f64, signal: f64) -> Agreed {
        Agreed {
            m,
            variance: Some(variance),
            signal: Some(signal),
            power: signal + variance / m,
        }
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let good = agreed(3.0, 1.0, 10.0);
        let bad = agreed(3.0, 10.0, 0.1);
        let why = |moment: Moment, a: Option<&Agreed>| RULE.decide(&moment, a).reason;
        assert_eq!(
            why(
                Moment {
                    held: 0,
                    flush: true,
                    ..MOMENT
                },
                Some(&good)
            ),
            Reason::EmptyBuffer
        );
        assert_eq!(
            why(
                Moment {
                    held: 8,
                    flush: true,
                    ..MOMENT
                },
                Some(&bad)
            ),
            Reason::FireFull
        );
        assert_eq!(
            why(Moment { bound: 3, ..MOMENT }, Some(&bad)),
            Reason::FireFull
        );
        let hurried = Rule {
            max_hold_steps: Some(3),
            ..RULE
        };
        assert_eq!(
            hurried.decide(&MOMENT, Some(&bad)).reason,
            Reason::FireDeadline
        );
        assert_eq!(
            why(
                Moment {
                    flush: true,
                    drift_ms: Some(1e9),
                    ..MOMENT
                },
                Some(&bad)
            ),
            Reason::FireFlush
        );
        assert_eq!(
            why(
                Moment {
                    drift_ms: Some(250.1),
                    ..MOMENT
                },
                Some(&good)
            ),
            Reason::HoldDrift
        );
        assert_eq!(
            why(
                Moment {
                    drift_ms: Some(250.0),
                    ..MOMENT
                },
                Some(&good)
            ),
            Reason::Fire
        );
        assert_eq!(why(MOMENT, Some(&bad)), Reason::HoldVariance);
        assert_eq!(why(MOMENT, None), Reason::HoldVariance);
        assert_eq!(
            why(
                Moment {
                    planned: Some(3),
                    ..MOMENT
                },
                None
            ),
            Reason::Fire
        );
        assert_eq!(
            why(
                Moment {
                    planned: Some(4),
                    ..MOMENT
                },
                Some(&good)
            ),
            Reason::HoldVariance
        );
        assert_eq!(
            why(
                Moment {
                    planned: Some(3),
                    drift_ms: Some(251.0),
                    ..MOMENT
                },
                None
            ),
            Reason::HoldDrift
        );
    }

    #[test]
    fn a_hold_without_a_finite_gradient_says_so_and_ends_like_any_other() {
        let nothing = Moment {
            nothing_finite: true,
            ..MOMENT
        };
        let why = |moment: Moment| RULE.decide(&moment, None).reason;
        assert_eq!(why(nothing), Reason::HoldNonfinite);
        assert_eq!(
            why(Moment {
                flush: true,
                ..nothing
            }),
            Reason::FireFlush
        );
        assert_eq!(why(Moment { held: 8, ..nothing }), Reason::FireFull);
    }

    #[test]
    fn a_fire_that_carries_no_finite_gradient_applies_none() {
        let share = |sent, left_out| Share { sent, left_out };
        for (shares, finite, reason) in [
            (vec![share(2.0, 0.0), share(0.0, 3.0)], true, None),
            (
                vec![share(2.0, 0.0), share(1.0, 0.0)],
                false,
                Some(Reason::HoldNonfinite),
            ),
            (
                vec![share(0.0, 1.0), share(0.0, 0.0)],
                true,
                Some(Reason::HoldNonfinite),
            ),
            (
                vec![share(0.0, 0.0), share(0.0, 0.0)],
                true,
                Some(Reason::EmptyBuffer),
            ),
            (vec![], true, Some(Reason::EmptyBuffer)),
            (
                vec![share(f64::MAX, 0.0), share(f64::MAX, 0.0)],
                true,
                Some(Reason::HoldNonfinite),
            ),
        ] {
            assert_eq!(nothing_to_apply(&shares, finite), reason, "{shares:?}");
        }
        assert_eq!(row_without_finite(4, share(0.0, 3.0)), 7);
        assert_eq!(row_without_finite(4, share(0.0, 0.0)), 4);
        assert_eq!(row_without_finite(4, share(1.0, 3.0)), 0);
        assert_eq!(row_without_finite(u64::MAX, share(0.0, 1.0)), u64::MAX);
    }

    #[test]
    fn thresholds_are_strict_for_variance_and_inclusive_for_relative() {
        let rule = Rule {
            statistic: Statistic::Variance { eps: 0.5 },
            ..RULE
        };
        assert_eq!(
            rule.decide(&MOMENT, Some(&agreed(3.0, 5.0, 0.0))).reason,
            Reason::HoldVariance
        );
        assert_eq!(
            rule.decide(&MOMENT, Some(&agreed(3.0, 4.9, 0.0))).reason,
            Reason::Fire
        );
        // V / (m world_size) = 6 / (3 * 2) = 1.
        assert_eq!(
            RULE.decide(&MOMENT, Some(&agreed(3.0, 6.0, 1.0))).reason,
            Reason::Fire
        );
        assert_eq!(
            RULE.decide(&MOMENT, Some(&agreed(3.0, 6.0, 0.99))).reason,
            Reason::HoldVariance
        );
        assert_eq!(
            RULE.decide(&MOMENT, Some(&agreed(3.0, 6.0, -1.0))).reason,
            Reason::HoldVariance
        );
        let rule = Rule {
            statistic: Statistic::NoiseScale { cost: 3.0 },
            ..RULE
        };
        // cost V / (m^2 world_size) = 3 * 6 / (9 * 2) = 1.
        for (signal, reason) in [(1.0, Reason::Fire), (0.99, Reason::HoldVariance)] {
            assert_eq!(
                rule.decide(&MOMENT, Some(&agreed(3.0, 6.0, signal))).reason,
                reason
            );
        }
    }

    #[test]
    fn whatever_arrives_a_hold_ends_at_the_bound() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..20_000 {
            let wild = |rng: &mut StdRng| match rng.random_range(0..5) {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => 0.0,
                3 => -rng.random::<f64>(),
                _ => rng.random::<f64>() * 10f64.powi(rng.random_range(-300..300)),
            };
            let rule = Rule {
                statistic: match rng.random_range(0..3) {
                    0 => Statistic::Relative {
                        theta: wild(&mut rng),
                    },
                    1 => Statistic::NoiseScale {
                        cost: wild(&mut rng),
                    },
                    _ => Statistic::Variance {
                        eps: wild(&mut rng),
                    },
                },
                capacity: rng.random_range(1..40),
                max_hold_steps: rng.random::<bool>().then(|| rng.random_range(1..40)),
                ..RULE
            };
            let held = rng.random_range(0..45);
            let moment = Moment {
                held,
                age: held + rng.random_range(0..20),
                bound: rng.random_range(1..45),
                flush: rng.random(),
                drift_ms: rng.random::<bool>().then(|| wild(&mut rng)),
                planned: rng.random::<bool>().then(|| rng.random_range(1..100)),
                nothing_finite: rng.random(),
            };
            let seen = agreed(wild(&mut rng), wild(&mut rng), wild(&mut rng));
            let decision = rule.decide(&moment, Some(&seen));
            assert_eq!(
                format!("{decision:?}"),
                format!("{:?}", rule.decide(&moment, Some(&seen)))
            );
            let late = rule.max_hold_steps.is_some_and(|max| moment.age >= max);
            if held == 0 {
                assert_eq!(decision.reason, Reason::EmptyBuffer);
            } else if held >= rule.capacity || moment.flush || late {
                assert!(decision.reason.fires());
            }
            let (_, length) = rule.plan(
                rng.random::<bool>().then_some(Trend {
                    variance: 1.0,
                    signal: 1.0,
                }),
                &seen,
                held,
            );
            assert!((1..=rule.capacity).contains(&length));
            let first = rule.first_window(rng.random_range(0..100), rng.random(), rng.random());
            assert!((1..=rule.capacity).contains(&first));
        }
    }

    #[test]
    fn the_relative_statistic_does_not_change_with_the_scale_of_the_loss() {
        let mut rng = StdRng::seed_from_u64(3);
        for _ in 0..500 {
            let (ranks, norm2) = buffers(&mut rng, 2, 3, 0.4, 1.0, 20, true);
            // A power of two, so that not even rounding differs.
            let scaled: Vec<_> = ranks
                .iter()
                .map(|b| Buffer {
                    q: b.q * 4096.0,
                    norm2: b.norm2 * 4096.0,
                    ..*b
                })
                .collect();
            let reason = |r: &[Buffer]| RULE.decide(&MOMENT, Some(&fold(r))).reason;
            assert_eq!(reason(&ranks), reason(&scaled));
            assert_eq!(
                RULE.plan(None, &pooled(&ranks, norm2), 3).1,
                RULE.plan(None, &pooled(&scaled, norm2 * 4096.0), 3).1
            );
        }
    }

    #[test]
    fn the_planned_length_is_where_the_test_passes() {
        for statistic in [
            Statistic::Relative { theta: 0.8 },
            Statistic::NoiseScale { cost: 2.5 },
        ] {
            let rule = Rule {
                statistic,
                capacity: 1000,
                ..RULE
            };
            for (v, signal) in [(40.0, 1.0), (39.9, 1.0), (1.0, 30.0), (3.0, 0.01)] {
                let (_, length) = rule.plan(None, &agreed(1.0, v, signal), 1000);
                let passes = |m: u64| {
                    rule.decide(&MOMENT, Some(&agreed(m as f64, v, signal)))
                        .reason
                        == Reason::Fire
                };
                assert!(passes(length), "{v} {signal}: {length}");
                assert!(length == 1 || !passes(length - 1), "{v} {signal}: {length}");
            }
        }
    }

    #[test]
    fn the_noise_scale_makes_fires_and_steps_together_cheapest() {
        for (cost, b) in [(1.0, 7.0), (2.0, 30.0), (8.0, 3.0), (0.5, 0.1)] {
            let rule = Rule {
                statistic: Statistic::NoiseScale { cost },
                capacity: 1000,
                ..RULE
            };
            let (_, length) = rule.plan(None, &agreed(1.0, 2.0 * b, 1.0), 1000);
            let price = |m: f64| cost * (1.0 + b / m) + m + b;
            let best = (1..1000u64).min_by(|&x, &y| price(x as f64).total_cmp(&price(y as f64)));
            // Rounded up, where the cheapest whole number may be the one below.
            assert!(best.unwrap().abs_diff(length) <= 1, "{cost} {b}: {length}");
        }
    }

    #[test]
    fn a_plan_without_numbers_asks_for_two_snapshots_and_hidden_gradients_for_twice_as_many() {
        let one = fold(&[Buffer {
            m: 1.0,
            n: 1.0,
            n2: 1.0,
            q: 4.0,
            norm2: 4.0,
        }]);
        assert_eq!((one.variance, one.power), (None, 4.0));
        assert_eq!(RULE.plan(None, &one, 1), (None, 2));
        assert_eq!(
            Rule {
                capacity: 1,
                ..RULE
            }
            .plan(None, &one, 1),
            (None, 1)
        );
        for (held, length) in [(1, 2), (3, 6), (4, RULE.capacity), (40, RULE.capacity)] {
            assert_eq!(RULE.plan(None, &agreed(4.0, 5.0, -1.0), held).1, length);
        }
        assert_eq!(RULE.plan(None, &agreed(4.0, 0.0, 1.0), 4).1, 1);
        assert_eq!(pooled(&[], 0.0), fold(&[]));
    }

    #[test]
    fn one_window_of_noise_does_not_outweigh_the_trend() {
        let steady = RULE.plan(None, &agreed(2.0, 4.0, 1.0), 2);
        assert_eq!(steady.1, 2);
        // (3 * 1 - 1) / 4 = 0.5 of signal is left: twice the length, not `capacity`.
        assert_eq!(RULE.plan(steady.0, &agreed(2.0, 4.0, -1.0), 4).1, 4);
        assert_eq!(
            RULE.plan(steady.0, &agreed(2.0, 4.0, -3.1), 4).1,
            RULE.capacity
        );
    }

    #[test]
    fn windows_of_adapters_that_are_active_together_end_apart() {
        let rule = Rule {
            capacity: 100,
            ..RULE
        };
        // The other's (steps left, length), the length asked for, the length given.
        for (other, asked, given) in [
            ((2, 4), 4, 4),
            ((1, 4), 4, 3),
            ((2, 2), 2, 1),
            ((1, 2), 2, 2),
            ((1, 1), 6, 6), // ends in every step: nothing to gain
            ((6, 6), 6, 4),
            ((3, 6), 6, 6),
            ((3, 6), 1, 1),
        ] {
            assert_eq!(rule.apart(asked, &[other]), given, "{other:?} {asked}");
        }
        assert_eq!(rule.apart(7, &[]), 7);
        assert!(RULE.apart(RULE.capacity, &[(RULE.capacity, RULE.capacity)]) < RULE.capacity);
    }

    #[test]
    fn two_that_start_together_are_half_a_window_apart_soon_and_keep_their_length() {
        for (length, capacity) in (2..12).flat_map(|l| [(l, l), (l, 100)]) {
            let rule = Rule { capacity, ..RULE };
            let (mut held, mut planned) = ([0, 0], [length, length]);
            let mut ends = [Vec::new(), Vec::new()];
            for step in 0..20 * length {
                held = held.map(|h| h + 1);
                for i in 0..2 {
                    if held[i] >= planned[i] {
                        ends[i].push(step);
                        let other: u64 = planned[1 - i];
                        planned[i] =
                            rule.apart(length, &[(other.saturating_sub(held[1 - i]), length)]);
                        held[i] = 0;
                    }
                }
            }
            for pair in ends[0][10..].windows(2) {
                assert_eq!(pair[1] - pair[0], length);
                let gap = ends[1].iter().map(|e| e.abs_diff(pair[0])).min().unwrap();
                assert_eq!(gap, length / 2, "{length} of {capacity}");
            }
        }
    }

    #[test]
    fn first_windows_spread_the_adapters() {
        let lengths = |planned| {
            (0..8)
                .map(|i| RULE.first_window(i, planned, true))
                .collect::<Vec<_>>()
        };
        assert_eq!(lengths(true), [1, 2, 3, 4, 1, 2, 3, 4]);
        assert_eq!(lengths(false), [8, 7, 6, 5, 8, 7, 6, 5]);
        assert_eq!(RULE.first_window(5, true, false), 1);
        assert_eq!(RULE.first_window(5, false, false), RULE.capacity);
    }
}
