//! Which K of N adapters are active in a step.
//!
//! A choice is a pure function of (strategy, seed, step, recorded losses). A run resumed at step t
//! therefore chooses as if it had never stopped, and ranks that recorded the same losses choose alike.
//!
//! * `round_robin`: adapters tK, tK + 1, ..., tK + K - 1 modulo N. Consecutive sets are disjoint where
//!   2K <= N, and every adapter is active equally often over N / gcd(N, K) steps.
//! * `random`: K of N without replacement, drawn from ChaCha8 with the seed as key and the step as stream.
//! * `loss_aware`: one place rotates through all adapters, so none is left out for long; the others go to
//!   the adapters with the highest moving average of loss, those without a loss first. K = 1 alternates.

use crate::error::{Error, Result};
use chacha20::{ChaCha8Rng, rand_core::Rng, rand_core::SeedableRng};
use std::cmp::Ordering;

const OP: &str = "router";
/// Weight of the past in the moving average of an adapter's loss.
const MOMENTUM: f64 = 0.9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    RoundRobin,
    Random,
    LossAware,
}

impl Strategy {
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "round_robin" => Ok(Self::RoundRobin),
            "random" => Ok(Self::Random),
            "loss_aware" => Ok(Self::LossAware),
            _ => Err(Error::argument(
                OP,
                format!(
                    "strategy is \"{name}\", expected \"round_robin\", \"random\" or \"loss_aware\""
                ),
            )),
        }
    }
}

/// Chooses K of N; holds nothing but its settings and the moving averages of the losses.
#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    strategy: Strategy,
    n: usize,
    k: usize,
    seed: u64,
    losses: Vec<Option<f64>>,
}

impl Router {
    pub fn new(strategy: Strategy, n: usize, k: usize, seed: u64) -> Result<Self> {
        if k < 1 || k > n {
            return Err(Error::argument(
                OP,
                format!("k is {k}, expected 1 to n = {n}"),
            ));
        }
        Ok(Self {
            strategy,
            n,
            k,
            seed,
            losses: vec![None; n],
        })
    }

    /// Adapters of a step.
    pub fn k(&self) -> usize {
        self.k
    }

    /// The moving average of each adapter's loss; `None` where none was recorded.
    pub fn losses(&self) -> &[Option<f64>] {
        &self.losses
    }

    /// Puts back what [`Self::losses`] returned.
    pub fn set_losses(&mut self, losses: Vec<Option<f64>>) -> Result<()> {
        if losses.len() != self.n {
            return Err(Error::argument(
                OP,
                format!(
                    "state holds {} losses, expected n = {}",
                    losses.len(),
                    self.n
                ),
            ));
        }
        if let Some(loss) = losses.iter().flatten().find(|loss| !loss.is_finite()) {
            return Err(Error::argument(
                OP,
                format!("state holds the loss {loss}, expected finite ones"),
            ));
        }
        self.losses = losses;
        Ok(())
    }

    /// Folds the loss of a step into the averages of its active adapters. A loss that is not finite is left
    /// out, as the step's gradients are.
    pub fn record_loss(&mut self, active: &[usize], loss: f64) -> Result<()> {
        if let Some(i) = active.iter().find(|&&i| i >= self.n) {
            return Err(Error::argument(
                OP,
                format!("active holds {i}, expected adapters below n = {}", self.n),
            ));
        }
        if loss.is_finite() {
            for &i in active {
                if let Some(average) = self.losses.get_mut(i) {
                    let before = average.unwrap_or(loss);
                    *average = Some(MOMENTUM * before + (1.0 - MOMENTUM) * loss);
                }
            }
        }
        Ok(())
    }

    /// The K adapters of a step, ascending.
    pub fn select(&self, step: u64) -> Vec<usize> {
        let mut chosen = match self.strategy {
            Strategy::RoundRobin => self.rotate(step).take(self.k).collect(),
            Strategy::Random => self.draw(step),
            Strategy::LossAware => self.by_loss(step),
        };
        chosen.sort_unstable();
        chosen
    }

    /// All adapters in turn, beginning where the round robin of this step does.
    fn rotate(&self, step: u64) -> impl Iterator<Item = usize> + use<> {
        let n = self.n as u64;
        let first = (step % n) as u128 * self.k as u128 % n as u128;
        (0..n).map(move |i| ((first as u64 + i) % n) as usize)
    }

    /// The first K places of a Fisher-Yates shuffle, without bias from the range of a draw.
    fn draw(&self, step: u64) -> Vec<usize> {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(step);
        let mut order: Vec<usize> = (0..self.n).collect();
        for i in 0..self.k {
            let left = (self.n - i) as u64;
            let usable = u64::MAX - u64::MAX % left;
            let draw = loop {
                let draw = rng.next_u64();
                if draw < usable {
                    break draw % left;
                }
            };
            order.swap(i, i + draw as usize);
        }
        order.truncate(self.k);
        order
    }

    fn by_loss(&self, step: u64) -> Vec<usize> {
        let n = self.n as u64;
        let mut chosen = Vec::with_capacity(self.k);
        if self.k > 1 {
            chosen.push((step % n) as usize);
        } else if step.is_multiple_of(2) {
            return vec![(step / 2 % n) as usize];
        }
        // A stable sort: among equals, the round robin decides.
        let mut order: Vec<usize> = self.rotate(step).collect();
        let loss = |i: &usize| self.losses.get(*i).copied().flatten();
        order.sort_by(|a, b| match (loss(a), loss(b)) {
            (None, None) => Ordering::Equal,
            (None, Some(_)) => Ordering::Less,
            (Some(_), None) => Ordering::Greater,
            (Some(a), Some(b)) => b.total_cmp(&a),
        });
        for i in order {
            if chosen.len() < self.k && !chosen.contains(&i) {
                chosen.push(i);
            }
        }
        chosen
    }

    /// 64 bits that differ (all but surely) where two routers could choose differently from `step` on: FNV-1a
    /// over the settings, the step and the losses.
    pub fn digest(&self, step: u64) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |word: u64| {
            for byte in word.to_le_bytes() {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        add(self.strategy as u64);
        add(self.n as u64);
        add(self.k as u64);
        add(self.seed);
        add(step);
        for loss in &self.losses {
            add(u64::from(loss.is_some()));
            add(loss.unwrap_or(0.0).to_bits());
        }
        hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt as _, rngs::StdRng};

    const STRATEGIES: [Strategy; 3] = [Strategy::RoundRobin, Strategy::Random, Strategy::LossAware];

    /// Calls `check` with routers of random shape, at a random step, after random losses.
    fn for_any(cases: u64, check: impl Fn(&mut Router, u64, &mut StdRng)) {
        for case in 0..cases {
            let mut rng = StdRng::seed_from_u64(case);
            let n = rng.random_range(1..=40);
            let k = rng.random_range(1..=n);
            for strategy in STRATEGIES {
                let mut router = Router::new(strategy, n, k, rng.next_u64()).unwrap();
                for _ in 0..rng.random_range(0..60) {
                    let step = rng.random_range(0..1000);
                    let active = router.select(step);
                    router
                        .record_loss(&active, rng.random_range(-4.0..4.0))
                        .unwrap();
                }
                // Small steps, and the largest.
                let step = rng.next_u64() >> rng.random_range(0..64);
                check(&mut router, step, &mut rng);
            }
        }
    }

    #[test]
    fn chooses_k_different_adapters_in_order() {
        for_any(300, |router, step, _| {
            let active = router.select(step);
            assert_eq!(active.len(), router.k);
            assert!(
                active.windows(2).all(|pair| pair[0] < pair[1]),
                "{active:?}"
            );
            assert!(active.iter().all(|&i| i < router.n));
        });
    }

    #[test]
    fn is_a_pure_function_of_step_and_losses() {
        for_any(200, |router, step, rng| {
            let mut twin = Router::new(router.strategy, router.n, router.k, router.seed).unwrap();
            twin.set_losses(router.losses().to_vec()).unwrap();
            for _ in 0..5 {
                twin.select(rng.next_u64());
            }
            assert_eq!(router.select(step), twin.select(step));
            assert_eq!(router.digest(step), twin.digest(step));
        });
    }

    #[test]
    fn round_robin_covers_evenly_with_disjoint_neighbours() {
        for_any(200, |router, step, _| {
            if router.strategy != Strategy::RoundRobin {
                return;
            }
            let step = step >> 1;
            let mut count = vec![0; router.n];
            for t in 0..router.n as u64 {
                let active = router.select(step + t);
                if 2 * router.k <= router.n {
                    let next = router.select(step + t + 1);
                    assert!(active.iter().all(|i| !next.contains(i)));
                }
                active.iter().for_each(|&i| count[i] += 1);
            }
            assert_eq!(count, vec![router.k; router.n]);
        });
    }

    #[test]
    fn random_is_uniform_and_steps_are_independent() {
        let (n, k, steps) = (9, 3, 30_000);
        let router = Router::new(Strategy::Random, n, k, 7).unwrap();
        let mut single = vec![0u64; n];
        let mut again = 0;
        let mut last: Vec<usize> = vec![];
        for step in 0..steps {
            let active = router.select(step);
            active.iter().for_each(|&i| single[i] += 1);
            again += active.iter().filter(|i| last.contains(i)).count();
            last = active;
        }
        let p = k as f64 / n as f64;
        let deviation = 5.0 * (steps as f64 * p * (1.0 - p)).sqrt();
        for count in single {
            assert!((count as f64 - steps as f64 * p).abs() < deviation);
        }
        // An active adapter is active in the next step with probability p too.
        assert!((again as f64 / (steps as f64 * k as f64) - p).abs() < 0.01);
        let other = Router::new(Strategy::Random, n, k, 8).unwrap();
        let same = (0..1000).filter(|&t| router.select(t) == other.select(t));
        assert!(same.count() < 50);
    }

    /// The draws are part of what a checkpoint means: they may not change with a library.
    #[test]
    fn random_choices_are_fixed() {
        let router = Router::new(Strategy::Random, 8, 2, 0).unwrap();
        let first: Vec<_> = (0..4).map(|t| router.select(t)).collect();
        assert_eq!(first, [[0, 6], [0, 3], [0, 5], [4, 6]]);
    }

    #[test]
    fn loss_aware_revisits_every_adapter_whatever_the_losses() {
        for_any(200, |router, step, _| {
            if router.strategy != Strategy::LossAware {
                return;
            }
            let step = step >> 1;
            let within = router.n as u64 * if router.k == 1 { 2 } else { 1 };
            let mut seen = vec![false; router.n];
            for t in 0..within {
                let active = router.select(step + t);
                active.iter().for_each(|&i| seen[i] = true);
                // The worst adapter stays the worst.
                router.record_loss(&active[..1], 1e6).unwrap();
            }
            assert!(seen.iter().all(|&s| s), "n {}, k {}", router.n, router.k);
        });
    }

    #[test]
    fn loss_aware_prefers_the_highest_loss() {
        let mut router = Router::new(Strategy::LossAware, 8, 2, 0).unwrap();
        for i in 0..8 {
            router
                .record_loss(&[i], if i == 5 { 3.0 } else { 1.0 })
                .unwrap();
        }
        for step in 0..40 {
            assert!(router.select(step).contains(&5));
        }
        // A single place alternates between its turn and the highest loss.
        let mut one = Router::new(Strategy::LossAware, 4, 1, 0).unwrap();
        for i in 0..4 {
            one.record_loss(&[i], if i == 2 { 3.0 } else { 1.0 })
                .unwrap();
        }
        let chosen: Vec<_> = (0..8).map(|t| one.select(t)[0]).collect();
        assert_eq!(chosen, [0, 2, 1, 2, 2, 2, 3, 2]);
    }

    #[test]
    fn a_loss_is_averaged_and_one_that_is_not_finite_left_out() {
        let mut router = Router::new(Strategy::LossAware, 3, 2, 0).unwrap();
        router.record_loss(&[0, 2], 2.0).unwrap();
        router.record_loss(&[2], 1.0).unwrap();
        router.record_loss(&[1, 2], f64::NAN).unwrap();
        assert_eq!(
            router.losses(),
            [Some(2.0), None, Some(0.9 * 2.0 + (1.0 - 0.9) * 1.0)]
        );
    }

    #[test]
    fn the_digest_sees_everything_that_decides() {
        let base = Router::new(Strategy::LossAware, 8, 2, 3).unwrap();
        let mut other_loss = base.clone();
        other_loss.record_loss(&[1], 0.0).unwrap();
        let digests = [
            base.digest(0),
            base.digest(1),
            Router::new(Strategy::Random, 8, 2, 3).unwrap().digest(0),
            Router::new(Strategy::LossAware, 9, 2, 3).unwrap().digest(0),
            Router::new(Strategy::LossAware, 8, 3, 3).unwrap().digest(0),
            Router::new(Strategy::LossAware, 8, 2, 4).unwrap().digest(0),
            other_loss.digest(0),
        ];
        for (i, a) in digests.iter().enumerate() {
            assert!(digests[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn wrong_arguments_are_a_sentence() {
        let what = |result: Result<Router>| result.unwrap_err().to_string();
        assert_eq!(
            what(Router::new(Strategy::Random, 4, 5, 0)),
            "router: k is 5, expected 1 to n = 4"
        );
        assert_eq!(
            what(Router::new(Strategy::Random, 4, 0, 0)),
            "router: k is 0, expected 1 to n = 4"
        );
        assert!(
            Strategy::parse("best")
                .unwrap_err()
                .to_string()
                .contains("strategy is \"best\"")
        );
        let mut router = Router::new(Strategy::LossAware, 2, 1, 0).unwrap();
        assert!(router.record_loss(&[2], 1.0).is_err());
        assert!(router.set_losses(vec![None]).is_err());
        assert!(router.set_losses(vec![None, Some(f64::NAN)]).is_err());
    }
}
