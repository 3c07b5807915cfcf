//! Which K of N adapters are active in a step.
//!
//! A pure function of (strategy, seed, step, what was recorded): resuming at step t chooses as never having stopped, and
//! every rank that recorded the same chooses the same. [`Router::digest`] is what ranks compare.
//!
//! | strategy | the set of step t |
//! | --- | --- |
//! | round robin | t K, t K + 1, ... modulo N: consecutive sets are disjoint where 2 K <= N, and N steps use every adapter K times |
//! | random | K of N without replacement, from Philox with key = seed and counter = (draw, 0, step) |
//! | loss-aware | first those that were not active for [`Router::patience`] steps, then those of the highest moving average of recorded losses; one without a loss comes before all that have one |
//!
//! Ties go to the adapter that waited longest, then to the lower index, so loss-aware starts as a round robin.

use crate::philox::philox4x32;

/// Weight of the past in the moving average of losses.
const MOMENTUM: f64 = 0.9;
/// Loss-aware routing revisits every adapter within this many rounds of ceil(N / K) steps.
const ROUNDS: u64 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    RoundRobin,
    Random,
    LossAware,
}

impl Strategy {
    pub const NAMES: [(&'static str, Strategy); 3] = [
        ("round_robin", Strategy::RoundRobin),
        ("random", Strategy::Random),
        ("loss_aware", Strategy::LossAware),
    ];

    pub fn parse(name: &str) -> Result<Self, String> {
        Self::NAMES
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, strategy)| *strategy)
            .ok_or_else(|| {
                let known: Vec<String> =
                    Self::NAMES.iter().map(|(n, _)| format!("'{n}'")).collect();
                format!(
                    "routing_strategy is '{name}', expected one of {}",
                    known.join(", ")
                )
            })
    }
}

/// What is known of one adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Record {
    /// One more than the step in which it was last active; 0 if it never was.
    pub last: u64,
    /// Moving average of the losses of the steps in which it was active.
    pub loss: Option<f64>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Router {
    strategy: Strategy,
    k: usize,
    seed: u64,
    records: Vec<Record>,
}

impl Router {
    /// Fails where 1 <= k <= n <= 2^32 does not hold.
    pub fn new(strategy: Strategy, n: usize, k: usize, seed: u64) -> Result<Self, String> {
        if n == 0 || n > u32::MAX as usize {
            return Err(format!("n_adapters is {n}, expected 1 to {}", u32::MAX));
        }
        if k == 0 || k > n {
            return Err(format!("k_active is {k}, expected 1 to n_adapters = {n}"));
        }
        Ok(Router {
            strategy,
            k,
            seed,
            records: vec![Record::default(); n],
        })
    }

    pub fn adapters(&self) -> usize {
        self.records.len()
    }

    /// Steps after which an adapter is active again, whatever the losses (loss-aware).
    ///
    /// The wait itself is bounded by `patience + ceil(N / K)`: all may be due at once.
    pub fn patience(&self) -> u64 {
        ROUNDS * (self.adapters().div_ceil(self.k) as u64)
    }

    /// The active adapters of `step`, ascending.
    pub fn choose(&self, step: u64) -> Vec<usize> {
        let (n, k) = (self.adapters(), self.k);
        let mut chosen: Vec<usize> = match self.strategy {
            Strategy::RoundRobin => {
                let first = (u128::from(step) * k as u128 % n as u128) as usize;
                (0..k).map(|i| (first + i) % n).collect()
            }
            Strategy::Random => {
                // The first k places of a Fisher-Yates shuffle.
                let mut order: Vec<usize> = (0..n).collect();
                let mut draws = Draws::new(self.seed, step);
                for i in 0..k {
                    let other = i + draws.below((n - i) as u32) as usize;
                    order.swap(i, other);
                }
                order.truncate(k);
                order
            }
            Strategy::LossAware => {
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|&a, &b| {
                    self.urgency(b, step)
                        .total_cmp(&self.urgency(a, step))
                        .then_with(|| (self.last(a), a).cmp(&(self.last(b), b)))
                });
                order.truncate(k);
                order
            }
        };
        chosen.sort_unstable();
        chosen
    }

    fn record_of(&self, adapter: usize) -> Record {
        self.records.get(adapter).copied().unwrap_or_default()
    }

    fn last(&self, adapter: usize) -> u64 {
        self.record_of(adapter).last
    }

    /// What loss-aware routing sorts by: the loss, and infinity for whoever is due or unknown.
    fn urgency(&self, adapter: usize, step: u64) -> f64 {
        let record = self.record_of(adapter);
        let waited = step.saturating_add(1).saturating_sub(record.last);
        match record.loss {
            Some(loss) if waited <= self.patience() => loss,
            _ => f64::INFINITY,
        }
    }

    /// Notes that `active` ran in `step`, with its loss where there is one; a loss that is not finite is left out.
    pub fn record(&mut self, step: u64, active: &[usize], loss: Option<f64>) -> Result<(), String> {
        let n = self.adapters();
        if let Some(outside) = active.iter().find(|adapter| **adapter >= n) {
            return Err(format!(
                "active has adapter {outside}, expected 0 to {}",
                n - 1
            ));
        }
        let loss = loss.filter(|loss| loss.is_finite());
        for &adapter in active {
            let Some(record) = self.records.get_mut(adapter) else {
                continue;
            };
            record.last = record.last.max(step.saturating_add(1));
            if let Some(loss) = loss {
                let past = record.loss.unwrap_or(loss);
                record.loss = Some(MOMENTUM * past + (1.0 - MOMENTUM) * loss);
            }
        }
        Ok(())
    }

    /// What [`Router::restore`] takes; the rest is configuration.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    pub fn restore(&mut self, records: Vec<Record>) -> Result<(), String> {
        if records.len() != self.adapters() {
            return Err(format!(
                "the saved router has {} adapters and this one {}: n_adapters must be the same",
                records.len(),
                self.adapters()
            ));
        }
        self.records = records;
        Ok(())
    }

    /// 64 bits (FNV-1a) of the configuration, the step and everything that was recorded: equal where the next choices are.
    pub fn digest(&self, step: u64) -> u64 {
        let words = [
            self.strategy as u64,
            self.adapters() as u64,
            self.k as u64,
            self.seed,
            step,
        ];
        let records = self
            .records
            .iter()
            .flat_map(|record| [record.last, record.loss.map_or(u64::MAX, f64::to_bits)]);
        words
            .into_iter()
            .chain(records)
            .flat_map(u64::to_le_bytes)
            .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            })
    }
}

/// Uniform 32-bit draws of one step: Philox4x32 with ten rounds.
struct Draws {
    key: [u32; 2],
    step: u64,
    taken: u32,
}

impl Draws {
    fn new(seed: u64, step: u64) -> Self {
        Draws {
            key: [seed as u32, (seed >> 32) as u32],
            step,
            taken: 0,
        }
    }

    fn next(&mut self) -> u32 {
        let counter = [self.taken, 0, self.step as u32, (self.step >> 32) as u32];
        self.taken = self.taken.wrapping_add(1);
        let [[first, ..], ..] = philox4x32(
            counter.map(|word| [word; crate::philox::LANES]),
            self.key,
            10,
        );
        first
    }

    /// Uniform in 0..n, without bias (Lemire, "Fast random integer generation in an interval", 2019).
    fn below(&mut self, n: u32) -> u32 {
        let unfair = n.wrapping_neg() % n.max(1);
        loop {
            let product = u64::from(self.next()) * u64::from(n);
            if product as u32 >= unfair {
                return (product >> 32) as u32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    const STRATEGIES: [Strategy; 3] = [Strategy::RoundRobin, Strategy::Random, Strategy::LossAware];

    /// Random pools, from one adapter to many.
    fn pools() -> impl Iterator<Item = (usize, usize, u64)> {
        let mut rng = StdRng::seed_from_u64(7);
        (0..200).map(move |_| {
            let n = rng.random_range(1..40);
            (n, rng.random_range(1..=n), rng.random())
        })
    }

    /// Runs a router over `steps` with losses that depend on adapter and step, and hands out each choice.
    fn run(router: &mut Router, steps: std::ops::Range<u64>, mut each: impl FnMut(u64, &[usize])) {
        for step in steps {
            let active = router.choose(step);
            each(step, &active);
            let loss = active
                .iter()
                .map(|a| ((a * 31) as f64 + step as f64).sin())
                .sum();
            router.record(step, &active, Some(loss)).unwrap();
        }
    }

    #[test]
    fn a_choice_is_k_different_adapters_in_order() {
        for (n, k, seed) in pools() {
            for strategy in STRATEGIES {
                let mut router = Router::new(strategy, n, k, seed).unwrap();
                run(&mut router, 0..50, |_, active| {
                    assert_eq!(active.len(), k);
                    assert!(
                        active.windows(2).all(|pair| pair[0] < pair[1]),
                        "{active:?}"
                    );
                    assert!(active.iter().all(|a| *a < n));
                });
            }
        }
    }

    #[test]
    fn a_choice_does_not_depend_on_being_asked_before() {
        for (n, k, seed) in pools() {
            for strategy in STRATEGIES {
                let mut whole = Router::new(strategy, n, k, seed).unwrap();
                let mut choices = Vec::new();
                run(&mut whole, 0..60, |_, active| choices.push(active.to_vec()));
                // Stopped at step 25, saved, loaded elsewhere, asked twice.
                let mut first = Router::new(strategy, n, k, seed).unwrap();
                run(&mut first, 0..25, |_, _| ());
                let mut second = Router::new(strategy, n, k, seed).unwrap();
                second.restore(first.records().to_vec()).unwrap();
                assert_eq!(first.digest(25), second.digest(25));
                assert_eq!(second.choose(25), second.choose(25));
                run(&mut second, 25..60, |step, active| {
                    assert_eq!(active, choices[step as usize])
                });
                assert_eq!(second.digest(60), whole.digest(60));
            }
        }
    }

    #[test]
    fn round_robin_is_even_and_consecutive_sets_are_disjoint() {
        for (n, k, seed) in pools() {
            let router = Router::new(Strategy::RoundRobin, n, k, seed).unwrap();
            let mut used = vec![0; n];
            for step in 0..n as u64 {
                let (now, next) = (router.choose(step), router.choose(step + 1));
                now.iter().for_each(|a| used[*a] += 1);
                assert!(
                    2 * k > n || now.iter().all(|a| !next.contains(a)),
                    "n={n} k={k} step={step}"
                );
            }
            assert_eq!(used, vec![k; n]);
            // Far steps, where a product of 64 bits would overflow.
            assert_eq!(router.choose(u64::MAX).len(), k);
        }
    }

    #[test]
    fn random_is_uniform_and_depends_on_seed_and_step() {
        let (n, k, steps) = (7, 3, 7000);
        let router = Router::new(Strategy::Random, n, k, 42).unwrap();
        let mut used = vec![0.0; n];
        let mut pairs = 0.0;
        for step in 0..steps {
            let active = router.choose(step);
            active.iter().for_each(|a| used[*a] += 1.0);
            pairs += f64::from(u8::from(active.contains(&0) && active.contains(&6)));
        }
        // Four standard deviations of a binomial.
        let within = |count: f64, p: f64| {
            let mean = steps as f64 * p;
            (count - mean).abs() < 4.0 * (mean * (1.0 - p)).sqrt()
        };
        assert!(
            used.iter().all(|count| within(*count, 3.0 / 7.0)),
            "{used:?}"
        );
        assert!(within(pairs, 3.0 / 7.0 * 2.0 / 6.0), "{pairs}");
        let other = Router::new(Strategy::Random, n, k, 43).unwrap();
        assert!((0..50).any(|step| router.choose(step) != other.choose(step)));
        assert!((0..50).any(|step| router.choose(step) != router.choose(step + 1)));
        // These bits are a contract between ranks of different builds.
        let first: Vec<Vec<usize>> = (0..4).map(|step| router.choose(step)).collect();
        assert_eq!(first, [[1, 4, 6], [0, 1, 3], [2, 4, 5], [0, 3, 4]]);
    }

    #[test]
    fn loss_aware_prefers_high_losses_and_starves_nobody() {
        for (n, k, seed) in pools() {
            let mut router = Router::new(Strategy::LossAware, n, k, seed).unwrap();
            let bound = router.patience() + n.div_ceil(k) as u64;
            let mut last = vec![0; n];
            for step in 0..400 {
                let active = router.choose(step);
                for (a, last) in last.iter().enumerate() {
                    assert!(
                        step - last <= bound,
                        "n={n} k={k}: adapter {a} waits since {last}"
                    );
                }
                active.iter().for_each(|a| last[*a] = step + 1);
                // One adapter is always worst.
                let loss = if active.contains(&(n - 1)) { 9.0 } else { 1.0 };
                router.record(step, &active, Some(loss)).unwrap();
            }
        }
        let mut router = Router::new(Strategy::LossAware, 4, 1, 0).unwrap();
        let mut used = [0; 4];
        for step in 0..100 {
            let active = router.choose(step);
            used[active[0]] += 1;
            router
                .record(step, &active, Some(if active == [2] { 5.0 } else { 1.0 }))
                .unwrap();
        }
        assert!(used[2] > 75, "{used:?}");
    }

    #[test]
    fn a_loss_that_is_not_finite_is_left_out() {
        let mut router = Router::new(Strategy::LossAware, 2, 1, 0).unwrap();
        router.record(0, &[0], Some(f64::NAN)).unwrap();
        assert_eq!(
            router.records()[0],
            Record {
                last: 1,
                loss: None
            }
        );
        router.record(1, &[0], Some(2.0)).unwrap();
        router.record(2, &[0], Some(f64::INFINITY)).unwrap();
        assert_eq!(
            router.records()[0],
            Record {
                last: 3,
                loss: Some(2.0)
            }
        );
    }

    #[test]
    fn a_digest_tells_any_difference() {
        let router = Router::new(Strategy::RoundRobin, 8, 2, 0).unwrap();
        let mut recorded = router.clone();
        recorded.record(0, &[3], Some(1.0)).unwrap();
        let digests = [
            router.digest(0),
            router.digest(1),
            recorded.digest(0),
            Router::new(Strategy::Random, 8, 2, 0).unwrap().digest(0),
            Router::new(Strategy::RoundRobin, 9, 2, 0)
                .unwrap()
                .digest(0),
            Router::new(Strategy::RoundRobin, 8, 3, 0)
                .unwrap()
                .digest(0),
            Router::new(Strategy::RoundRobin, 8, 2, 1)
                .unwrap()
                .digest(0),
        ];
        let different: std::collections::HashSet<u64> = digests.into();
        assert_eq!(different.len(), digests.len());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let says = |result: Result<Router, String>| result.unwrap_err();
        assert_eq!(
            says(Router::new(Strategy::Random, 0, 1, 0)),
            "n_adapters is 0, expected 1 to 4294967295"
        );
        assert_eq!(
            says(Router::new(Strategy::Random, 4, 5, 0)),
            "k_active is 5, expected 1 to n_adapters = 4"
        );
        assert_eq!(
            Strategy::parse("robin").unwrap_err(),
            "routing_strategy is 'robin', expected one of 'round_robin', 'random', 'loss_aware'"
        );
        let mut router = Router::new(Strategy::Random, 4, 2, 0).unwrap();
        assert_eq!(
            router.record(0, &[4], None).unwrap_err(),
            "active has adapter 4, expected 0 to 3"
        );
        assert!(
            router
                .restore(vec![Record::default(); 3])
                .unwrap_err()
                .contains("has 3 adapters and this one 4")
        );
    }
}
