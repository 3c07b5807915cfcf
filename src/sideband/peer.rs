//! One peer: what was heard of it, whether it is alive, where its link stands.
//!
//! Suspicion is phi accrual (Hayashibara et al., SRDS 2004): -log10 of the chance that a heartbeat comes later than this.

use super::MS;
use super::clock::Estimator;
use super::frame::{Heartbeat, NO_STEP};
use super::link::{Ending, Established, Link};
use std::collections::VecDeque;

/// A living node whose [`View::phi`](super::phase::View::phi) is above this is suspect.
pub const PHI_SUSPECT: f64 = 8.0;
/// Extra silence that is borne before a node is suspected, beyond the time that it announced: of a linked node, TCP may
/// resend twice and a new link may be needed; of one that is only heard of, the same on every hop.
const LINKED_PAUSE: i64 = 1100 * MS;
const HEARSAY_PAUSE: i64 = 3000 * MS;
/// The least of the same in heartbeats.
const LINKED_PAUSE_BEATS: i64 = 3;
const HEARSAY_PAUSE_BEATS: i64 = 60;
/// A link is given up after three heartbeats of silence, but not before TCP had two tries to resend (200 and 400 ms)
/// what was due at the announced time.
const RESENDS: i64 = 650 * MS;
/// A dialled link that is not established by then is given up.
const DIAL_LIMIT: i64 = 1000 * MS;
/// A probe's link stays for so long, or for so many heartbeats if that is longer.
const PROBE_TIME: i64 = 300 * MS;
const PROBE_BEATS: i64 = 4;
/// Time until a lost link is dialled again, the first time; it doubles from try to try.
pub(super) const BACKOFF_FIRST: i64 = 50 * MS;
/// A third node's beat count is believed up to so many more than when it was last heard itself, and so many a heartbeat since.
const GROWTH: u64 = 256;
const GROWTH_PER_BEAT: u64 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// Not heard of yet.
    #[default]
    Unknown,
    Alive,
    Suspect,
    Dead,
}

/// What a node was told about its job.
#[derive(Debug, Clone)]
pub struct Settings {
    pub node: u16,
    pub nodes: u16,
    /// Up to this many nodes everybody is linked: [`FULL_MESH`](super::table::FULL_MESH), and less where a test wants a small ring.
    pub full_mesh: u16,
    pub boot: u64,
    /// All times in ns.
    pub heartbeat: i64,
    pub dead_after: i64,
    pub expire_after: i64,
}

/// A beat count, and when it was reached.
#[derive(Clone, Copy)]
pub(super) struct Count {
    pub beat: u64,
    pub at: i64,
}

impl Count {
    pub fn new(beat: u64, at: i64) -> Self {
        Self { beat, at }
    }
}

/// A step boundary, and when it was passed.
#[derive(Clone, Copy)]
pub(super) struct Boundary {
    pub step: i64,
    pub at: i64,
}

/// A link that was dialled and is not up yet.
#[derive(Clone, Copy)]
pub(super) struct Attempt {
    pub link: Link,
    pub since: i64,
}

/// How late heartbeats come, after the interval that the one before announced.
#[derive(Default)]
pub(super) struct Arrivals {
    mean: f64,
    variance: f64,
}

impl Arrivals {
    fn heard(&mut self, late: i64, heartbeat: i64) {
        let late = late.clamp(0, (4 * heartbeat).max(1000 * MS)) as f64;
        let apart = late - self.mean;
        self.mean += apart / 16.0;
        self.variance += (apart * apart - self.variance) / 16.0;
    }

    /// `interval` was announced; silence of `pause` beyond it is nothing unusual.
    fn phi(&self, silence: i64, interval: i64, pause: i64) -> f64 {
        let usual = interval as f64 + self.mean.min(pause as f64);
        let deviation = self
            .variance
            .sqrt()
            .clamp(20.0 * MS as f64, 100.0 * MS as f64);
        let y = (silence as f64 - usual - pause as f64) / deviation;
        // The logistic approximation of the normal distribution's tail.
        let odds = y * (1.5976 + 0.070566 * y * y);
        if odds > 700.0 {
            odds / std::f64::consts::LN_10
        } else {
            odds.exp().ln_1p() / std::f64::consts::LN_10
        }
    }
}

pub(super) struct Peer {
    pub node: u16,
    pub neighbour: bool,
    pub boot: u64,
    /// A boot that was replaced does not come back through gossip.
    pub boot_before: u64,
    pub beat: u64,
    /// The beat that it said itself last, or that others told first, and when: what others tell is measured by it.
    pub anchor: Count,
    pub heard: i64,
    /// Time to its next heartbeat, as it said.
    pub interval: i64,
    /// The largest beat of this linked node that others told of, and when it grew.
    pub vouched: Count,
    pub state: State,
    pub arrivals: Arrivals,
    pub clock: Estimator,
    pub marks: VecDeque<Boundary>,
    pub last: Option<Heartbeat>,
    pub step: i64,
    pub link: Option<Established>,
    pub dialling: Option<Attempt>,
    pub retry_at: i64,
    pub backoff: i64,
    /// A neighbour asked whether it is there: probe it next, or say so next.
    pub asked: bool,
}

impl Peer {
    pub fn new(node: u16, neighbour: bool, heartbeat: i64, now: i64) -> Self {
        Self {
            node,
            neighbour,
            boot: 0,
            boot_before: 0,
            beat: 0,
            anchor: Count::new(0, now),
            heard: now,
            interval: heartbeat,
            vouched: Count::new(0, now),
            state: State::Unknown,
            arrivals: Arrivals::default(),
            clock: Estimator::default(),
            marks: VecDeque::new(),
            last: None,
            step: NO_STEP,
            link: None,
            dialling: None,
            retry_at: now,
            backoff: BACKOFF_FIRST,
            asked: false,
        }
    }

    /// Neither linked nor about to be.
    pub fn apart(&self) -> bool {
        self.dialling.is_none() && self.link.is_none()
    }

    /// A link that is silent for longer is given up.
    pub fn silence_limit(&self, heartbeat: i64) -> i64 {
        (3 * heartbeat).max(self.interval + RESENDS)
    }

    /// The link, up or dialled, that has had its time.
    pub fn ending(&self, now: i64, heartbeat: i64) -> Option<(Link, Ending)> {
        let up = self.link.as_ref().and_then(|l| {
            if now - l.heard > self.silence_limit(heartbeat) {
                Some((l.link, Ending::Silent))
            } else if !self.neighbour && now - l.since > probe_time(heartbeat, l.ours) {
                Some((l.link, Ending::Probe))
            } else {
                None
            }
        });
        let dialled = self.dialling.filter(|d| now - d.since > DIAL_LIMIT);
        up.or(dialled.map(|d| (d.link, Ending::Unreachable)))
    }

    /// Suspects or gives up a node that is silent, and forgets one that has been for long.
    pub fn judge(&mut self, now: i64, settings: &Settings) {
        let silence = now - self.heard;
        // News of a third node takes its time.
        let late = if self.neighbour {
            0
        } else {
            self.pause(settings.heartbeat)
        };
        if self.state == State::Alive && self.phi(now, settings.heartbeat) > PHI_SUSPECT {
            self.state = State::Suspect;
        }
        let unheard = silence.min(now - self.vouched.at);
        if self.state != State::Dead && unheard > settings.dead_after + late {
            self.state = State::Dead;
        }
        if self.state == State::Dead && silence > settings.expire_after && self.link.is_none() {
            self.forget();
        }
    }

    /// This process was stopped for so long and heard nobody.
    pub fn sleep(&mut self, time: i64) {
        self.heard += time;
        self.vouched.at += time;
        if let Some(link) = &mut self.link {
            link.heard += time;
        }
    }

    pub fn pause(&self, heartbeat: i64) -> i64 {
        if self.neighbour {
            LINKED_PAUSE.max(LINKED_PAUSE_BEATS * heartbeat)
        } else {
            HEARSAY_PAUSE.max(HEARSAY_PAUSE_BEATS * heartbeat)
        }
    }

    /// Suspicion at `now`.
    pub fn phi(&self, now: i64, heartbeat: i64) -> f64 {
        self.arrivals
            .phi(now - self.heard, self.interval, self.pause(heartbeat))
    }

    pub fn forget(&mut self) {
        self.clock = Estimator::default();
        self.marks.clear();
        self.last = None;
        self.step = NO_STEP;
        self.arrivals = Arrivals::default();
    }

    pub fn reboot(&mut self, boot: u64) {
        if self.boot != boot {
            self.forget();
            self.boot_before = self.boot;
            self.boot = boot;
            self.beat = 0;
            self.vouched.beat = 0;
        }
    }

    /// Whether a node that was at `known` at the anchor's time may be at `beat` now. A count far ahead would never be reached:
    /// later, true ones would be taken for old. Of a node that was never heard anything is believed, until it is probed.
    pub fn may_be_at(&self, beat: u64, known: u64, now: i64, heartbeat: i64) -> bool {
        let beats = (now - self.anchor.at).max(0) as u64 / heartbeat.max(1) as u64;
        self.boot == 0 || beat <= known.saturating_add(GROWTH + GROWTH_PER_BEAT * beats)
    }

    pub fn alive(&mut self, now: i64, heartbeat: i64) {
        if self.state == State::Alive {
            self.arrivals
                .heard(now - self.heard - self.interval, heartbeat);
        }
        self.state = State::Alive;
        self.heard = now;
    }
}

/// How long a probe's link stays. The probed side waits longer, so that the prober is the one to close.
fn probe_time(heartbeat: i64, ours: bool) -> i64 {
    let time = PROBE_TIME.max(PROBE_BEATS * heartbeat);
    if ours { time } else { 2 * time }
}

/// Appends a step boundary; a step that does not follow (training was rolled back) starts the history anew.
pub(super) fn remember(marks: &mut VecDeque<Boundary>, most: usize, step: i64, at: i64) {
    if marks.back().is_some_and(|last| step <= last.step) {
        marks.clear();
    }
    if marks.len() == most {
        marks.pop_front();
    }
    marks.push_back(Boundary { step, at });
}
