//! Estimates another node's clock from the four timestamps of each exchange.
//!
//! offset = ((t2 - t1) + (t3 - t4)) / 2 and delay = (t4 - t1) - (t3 - t2), as in NTP (Mills, RFC 5905). The true offset is
//! within delay / 2, however the delay splits between the two directions. Of the last eight exchanges the one of least delay
//! counts. Skew is the slope of a least-squares line through one offset a second.

use std::collections::VecDeque;
use std::time::Instant;

/// Local time in nanoseconds; it never runs backwards, and its zero means nothing to another node.
pub trait Clock: Send + Sync {
    fn now(&self) -> i64;
}

/// The system's monotonic clock, from the moment this was made.
pub struct Monotonic(Instant);

impl Default for Monotonic {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock for Monotonic {
    fn now(&self) -> i64 {
        i64::try_from(self.0.elapsed().as_nanos()).unwrap_or(i64::MAX)
    }
}

/// Two clocks may run apart by this much, relatively: five times what quartz does.
pub const MAX_SKEW: f64 = 500e-6;
const SAMPLES: usize = 8;
const SLOPE_POINTS: usize = 32;
const SLOPE_EVERY: i64 = 1_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    at: i64,
    offset: f64,
    /// Half of the delay, and what the clocks may have run apart while the answer waited.
    bound: f64,
}

/// What one exchange says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    Agrees,
    /// No two running clocks can say this and what was said before: one of them jumped. What was known is forgotten.
    Jumped,
    /// An answer before its question.
    Impossible,
}

/// What is known about one other clock.
#[derive(Debug, Clone, Default)]
pub struct Estimator {
    samples: VecDeque<Sample>,
    slope: VecDeque<(i64, f64)>,
    skew: f64,
}

impl Estimator {
    /// One exchange: sent `t1` and received `t4` here, received `t2` and answered `t3` there.
    pub fn exchange(&mut self, t1: i64, t2: i64, t3: i64, t4: i64) -> Exchange {
        let delay = (t4 - t1) as f64 - (t3 - t2) as f64;
        let waited = (t4 - t1) as f64;
        if t4 < t1 || t3 < t2 || delay < -2.0 * MAX_SKEW * waited - 1000.0 {
            return Exchange::Impossible;
        }
        let offset = ((t2 - t1) as f64 + (t3 - t4) as f64) / 2.0;
        let bound = delay.max(0.0) / 2.0 + MAX_SKEW * waited;
        // The truth is within both bounds, so they have to overlap.
        let apart = self
            .offset(t4)
            .map(|(known, by)| (known - offset).abs() - by);
        let jumped = apart.is_some_and(|apart| apart > bound + 1000.0);
        if jumped {
            *self = Self::default();
        }
        if self.samples.len() == SAMPLES {
            self.samples.pop_front();
        }
        self.samples.push_back(Sample {
            at: t4,
            offset,
            bound,
        });
        let due = self
            .slope
            .back()
            .is_none_or(|last| t4 - last.0 >= SLOPE_EVERY);
        if let (true, Some(best)) = (due, self.best(t4)) {
            if self.slope.len() == SLOPE_POINTS {
                self.slope.pop_front();
            }
            self.slope.push_back((best.at, best.offset));
            self.skew = self.fit();
        }
        if jumped {
            Exchange::Jumped
        } else {
            Exchange::Agrees
        }
    }

    fn best(&self, at: i64) -> Option<Sample> {
        let cost = |s: &Sample| s.bound + 2.0 * MAX_SKEW * (at - s.at).abs() as f64;
        self.samples
            .iter()
            .min_by(|a, b| cost(a).total_cmp(&cost(b)))
            .copied()
    }

    /// How much faster the other clock runs, relatively; zero until four seconds are covered.
    pub fn skew(&self) -> f64 {
        self.skew
    }

    fn fit(&self) -> f64 {
        let (Some(first), Some(last)) = (self.slope.front(), self.slope.back()) else {
            return 0.0;
        };
        if last.0 - first.0 < 4 * SLOPE_EVERY {
            return 0.0;
        }
        let n = self.slope.len() as f64;
        let points = self
            .slope
            .iter()
            .map(|p| ((p.0 - first.0) as f64, p.1 - first.1));
        let (x, y) = points
            .clone()
            .fold((0.0, 0.0), |sum, p| (sum.0 + p.0 / n, sum.1 + p.1 / n));
        let (xy, xx) = points.fold((0.0, 0.0), |sum, p| {
            (sum.0 + (p.0 - x) * (p.1 - y), sum.1 + (p.0 - x) * (p.0 - x))
        });
        (xy / xx.max(1.0)).clamp(-MAX_SKEW, MAX_SKEW)
    }

    /// The other clock's time `theirs` on this clock, and how far off that can be, both in ns.
    pub fn to_local(&self, theirs: i64) -> Option<(f64, f64)> {
        let newest = self.samples.back()?;
        let about = theirs as f64 - newest.offset;
        let best = self.best(about as i64)?;
        let age = about - best.at as f64;
        let local = theirs as f64 - best.offset - self.skew() * age;
        Some((local, best.bound + 2.0 * MAX_SKEW * age.abs()))
    }

    /// The other clock minus this one at local time `at`, and its bound, both in ns.
    pub fn offset(&self, at: i64) -> Option<(f64, f64)> {
        let best = self.best(at)?;
        let age = (at - best.at) as f64;
        Some((
            best.offset + self.skew() * age,
            best.bound + 2.0 * MAX_SKEW * age.abs(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    #[test]
    fn a_day_apart_100_ppm_and_20_ms_of_asymmetry_stay_within_the_bound() {
        let day = 86_400_000 * MS;
        for (there, back) in [(21, 1), (1, 21), (1, 1)] {
            for ppm in [-100.0, 0.0, 100.0] {
                let theirs = |t: i64| t + day + (t as f64 * ppm * 1e-6) as i64;
                let mut clock = Estimator::default();
                for beat in 0..400 {
                    let t1 = beat * 50 * MS;
                    let t2 = t1 + (there + (beat * 7) % 5) * MS;
                    let t3 = t2 + 33 * MS;
                    let t4 = t3 + (back + (beat * 3) % 4) * MS;
                    let said = clock.exchange(t1, theirs(t2), theirs(t3), t4);
                    assert_eq!(said, Exchange::Agrees);
                    for moment in [t4 - 2000 * MS, t4 - 40 * MS, t4] {
                        let (local, bound) = clock.to_local(theirs(moment)).unwrap();
                        assert!(
                            (local - moment as f64).abs() <= bound,
                            "{there}/{back} {ppm}: {local} {moment} {bound}"
                        );
                    }
                }
                let (_, bound) = clock.offset(20_000 * MS).unwrap();
                assert!(
                    bound < ((there + back) / 2 + 1) as f64 * MS as f64,
                    "{bound}"
                );
                assert!(
                    (clock.skew() - ppm * 1e-6).abs() < 60e-6,
                    "{ppm}: {}",
                    clock.skew()
                );
            }
        }
    }

    #[test]
    fn an_answer_before_its_question_is_refused() {
        let mut clock = Estimator::default();
        assert_eq!(
            clock.exchange(10 * MS, 0, 20 * MS, 11 * MS),
            Exchange::Impossible
        );
        assert_eq!(clock.exchange(10 * MS, 5, 4, 11 * MS), Exchange::Impossible);
        assert_eq!(clock.exchange(10 * MS, 4, 5, 9 * MS), Exchange::Impossible);
        assert_eq!(clock.to_local(0), None);
    }
}
