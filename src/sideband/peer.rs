//! The table of peers: whom to dial, who is alive, what their phase is. Pure: time comes in as an argument, and what is
//! to be done goes out as [`Action`]s, so the simulation of tests/sideband_simulation.rs drives what the agent runs.
//!
//! Of a pair the lower node dials. Up to 32 nodes that is everybody; beyond, a node keeps links to the nodes 1, 2, 4, ...
//! away on a ring, and hears of the rest through gossip: a node's beat count travels along and only a count that has
//! grown is a sign of life.
//!
//! There, it also probes as SWIM does (Das et al., DSN 2002): once a period it dials one of the other nodes for a few
//! heartbeats, in random order, all of them before one comes again, and those under suspicion at once. And it asks a
//! few of its neighbours to probe whom it suspects. What they hear comes back as gossip; whom others still hear is
//! suspect here, but not dead.
//!
//! Suspicion is phi accrual (Hayashibara et al., SRDS 2004): -log10 of the chance that a heartbeat comes later than this.

use super::clock::{Estimator, Exchange};
use super::frame::{Body, Frame, Heartbeat, MAX_INTERVAL_MS, MAX_RUMOURS, NO_STEP, Rumour};
use std::collections::{HashMap, VecDeque};

const MS: i64 = 1_000_000;
/// Up to this many nodes everybody is linked to everybody.
pub const FULL_MESH: u16 = 32;
/// Most nodes of a job.
pub const MAX_NODES: u16 = 256;
/// A link is given up after three heartbeats of silence, but not before TCP had two tries to resend (200 and 400 ms)
/// what was due at the announced time.
const RESENDS: i64 = 650 * MS;
/// Time between two heartbeats while no node steps: with two resends, a new link and jitter still suspect within 2 s.
const IDLE_INTERVAL: i64 = 250 * MS;
/// For so many of its own durations after a step, and at least for so long, but not longer than the third, the job counts as stepping.
const LINGER: (i64, i64, i64) = (4, 2000 * MS, 60_000 * MS);
/// Longest time between two looks at who is late.
const LOOK: i64 = 100 * MS;
/// A dialled link that is not established by then is given up.
const DIAL_LIMIT: i64 = 1000 * MS;
const BACKOFF: (i64, i64) = (50 * MS, 750 * MS);
/// Longest time between two attempts to reach a node whose entry has expired.
const BACKOFF_EXPIRED: i64 = 5000 * MS;
/// A living node whose [`View::phi`] is above this is suspect.
pub const PHI_SUSPECT: f64 = 8.0;
/// Silence beyond the announced time that two resends and a new link explain, for a linked node and for one that is only heard of, and the same in heartbeats.
const PAUSE: (i64, i64) = (1100 * MS, 3000 * MS);
const PAUSE_BEATS: (i64, i64) = (3, 60);
/// A node that is not linked is probed once in this time, and for so long, or for so many heartbeats if that is longer.
const PROBE_PERIOD: i64 = 1000 * MS;
const PROBE_TIME: i64 = 300 * MS;
const PROBE_BEATS: i64 = 4;
/// Probes at a time, of this node and as many of others, and suspects that neighbours are asked about in a period.
pub const MAX_PROBES: usize = 4;
const MAX_ASKED: usize = 4;
/// How many neighbours are asked to probe one suspect.
const ASKED: usize = 3;
const OWN_MARKS: usize = 1024;
const PEER_MARKS: usize = 64;
/// Frames a peer may send at once, and per heartbeat in the long run.
const BURST: f64 = 64.0;
const RATE: f64 = 4.0;
/// A third node's beat count is believed up to so many more than when it was last heard itself, and so many a heartbeat since.
const GROWTH: (u64, u64) = (256, 4);

/// A connection, named by whoever drives the table; never used twice.
pub type Link = u64;

#[derive(Debug, Clone)]
pub struct Settings {
    pub node: u16,
    pub nodes: u16,
    /// Up to this many nodes everybody is linked: [`FULL_MESH`], and less where a test wants a small ring.
    pub full_mesh: u16,
    pub boot: u64,
    /// All times in ns.
    pub heartbeat: i64,
    pub dead_after: i64,
    pub expire_after: i64,
}

/// A passed step boundary and the trigger's numbers at it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mark {
    pub step: i64,
    /// Local time of the boundary and duration of the step, ns.
    pub at: i64,
    pub duration: u64,
    pub fill: f32,
    pub fires: u32,
    pub holds: u32,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Dial { node: u16, link: Link },
    Send { link: Link, bytes: Vec<u8> },
    Close { link: Link, why: Ending },
}

/// Why a link or what came over it was refused; each is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// No key, or broken bytes, before a peer was known.
    Handshake,
    Malformed,
    Sequence,
    /// Claims an id that is not in the job, is ours, or belongs to a peer that is being heard.
    Identity,
    Flood,
    /// What was said cannot be: an answer before its question, a beat that does not grow.
    Lie,
    /// Too many unfinished handshakes; the oldest went.
    Overflow,
    /// Nobody's fault: no room for another probe, or two nodes dialled each other.
    Busy,
}

impl Refusal {
    pub const ALL: [(Refusal, &'static str); 8] = [
        (Refusal::Handshake, "handshake"),
        (Refusal::Malformed, "malformed"),
        (Refusal::Sequence, "sequence"),
        (Refusal::Identity, "identity"),
        (Refusal::Flood, "flood"),
        (Refusal::Lie, "lie"),
        (Refusal::Overflow, "overflow"),
        (Refusal::Busy, "busy"),
    ];
}

/// Why a link ended that was not refused; each is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The other side ended it, or the system did.
    Ended,
    /// Dialled, and nobody was there.
    Unreachable,
    /// Nothing came for too long.
    Silent,
    /// A probe had its time.
    Probe,
    /// Another link to the same node took its place.
    Replaced,
    /// The other side does not read what is sent.
    Full,
}

impl Ending {
    pub const ALL: [(Ending, &'static str); 6] = [
        (Ending::Ended, "ended"),
        (Ending::Unreachable, "unreachable"),
        (Ending::Silent, "silent"),
        (Ending::Probe, "probe"),
        (Ending::Replaced, "replaced"),
        (Ending::Full, "full"),
    ];
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// Not heard of yet.
    #[default]
    Unknown,
    Alive,
    Suspect,
    Dead,
}

/// What is known of one peer; times in ms, NaN where nothing is known.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct View {
    pub node: u16,
    pub state: State,
    pub boot: u64,
    pub silence_ms: f64,
    /// Suspicion, by which a living node becomes suspect: above [`PHI_SUSPECT`]. NaN before the first sign of life.
    pub phi: f64,
    /// Last step the peer reported, [`NO_STEP`] if none, and our last step minus it.
    pub step: i64,
    pub lag: i64,
    /// When the peer reached the latest step that both reached, minus when we did; while one of the two is overdue at the
    /// next step, at least how late it is. Positive: the peer is behind. True to within `bound_ms`. Stated for the living
    /// alone: what a suspect said last is old, and a suspect must not hold anybody.
    pub drift_ms: f64,
    pub bound_ms: f64,
    pub offset_ms: f64,
    pub skew_ppm: f64,
    pub step_ms: f64,
    pub fill: f32,
    pub fires: u32,
    pub holds: u32,
}

struct Established {
    link: Link,
    /// Dialled by us.
    ours: bool,
    since: i64,
    heard: i64,
    /// The peer's last beat; on a new link to a node known by gossip, which may be ahead of it, 0.
    beat: u64,
    sent_frames: u64,
    received_frames: u64,
    tokens: f64,
    refilled: i64,
    /// `sent` of the peer's last heartbeat and when it came; and the last of ours that it echoed.
    echo: (i64, i64),
    echoed: i64,
}

impl Established {
    fn send(&mut self, body: Body) -> Action {
        let bytes = Frame {
            sequence: self.sent_frames,
            body,
        }
        .encode();
        self.sent_frames += 1;
        Action::Send {
            link: self.link,
            bytes,
        }
    }
}

/// How late heartbeats come, after the interval that the one before announced.
#[derive(Default)]
struct Arrivals {
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

struct Peer {
    node: u16,
    neighbour: bool,
    boot: u64,
    /// A boot that was replaced does not come back through gossip.
    boot_before: u64,
    beat: u64,
    /// The beat that it said itself last, or that others told first, and when: what others tell is measured by it.
    anchor: (u64, i64),
    heard: i64,
    /// Time to its next heartbeat, as it said.
    interval: i64,
    /// The largest beat of this linked node that others told of, and when it grew.
    vouched: (u64, i64),
    state: State,
    arrivals: Arrivals,
    clock: Estimator,
    marks: VecDeque<(i64, i64)>,
    last: Option<Heartbeat>,
    step: i64,
    link: Option<Established>,
    dialling: Option<(Link, i64)>,
    retry_at: i64,
    backoff: i64,
    /// A neighbour asked whether it is there: probe it next, or say so next.
    asked: bool,
}

impl Peer {
    fn pause(&self, heartbeat: i64) -> i64 {
        if self.neighbour {
            PAUSE.0.max(PAUSE_BEATS.0 * heartbeat)
        } else {
            PAUSE.1.max(PAUSE_BEATS.1 * heartbeat)
        }
    }

    /// Suspicion at `now`.
    fn phi(&self, now: i64, heartbeat: i64) -> f64 {
        self.arrivals
            .phi(now - self.heard, self.interval, self.pause(heartbeat))
    }

    fn forget(&mut self) {
        self.clock = Estimator::default();
        self.marks.clear();
        self.last = None;
        self.step = NO_STEP;
        self.arrivals = Arrivals::default();
    }

    fn reboot(&mut self, boot: u64) {
        if self.boot != boot {
            self.forget();
            self.boot_before = self.boot;
            self.boot = boot;
            self.beat = 0;
            self.vouched.0 = 0;
        }
    }

    /// Whether a node that was at `known` at the anchor's time may be at `beat` now. A count far ahead would never be reached:
    /// later, true ones would be taken for old. Of a node that was never heard anything is believed, until it is probed.
    fn may_be_at(&self, beat: u64, known: u64, now: i64, heartbeat: i64) -> bool {
        let beats = (now - self.anchor.1).max(0) as u64 / heartbeat.max(1) as u64;
        self.boot == 0 || beat <= known.saturating_add(GROWTH.0 + GROWTH.1 * beats)
    }

    fn alive(&mut self, now: i64, heartbeat: i64) {
        if self.state == State::Alive {
            self.arrivals
                .heard(now - self.heard - self.interval, heartbeat);
        }
        self.state = State::Alive;
        self.heard = now;
    }
}

/// Everything one node knows.
pub struct Table {
    settings: Settings,
    peers: Vec<Peer>,
    links: HashMap<Link, usize>,
    marks: VecDeque<(i64, i64)>,
    last: Option<Mark>,
    beat: u64,
    next_beat: i64,
    /// Until then the job counts as stepping.
    stepping_until: i64,
    ticked: i64,
    next_link: Link,
    random: u64,
    gossip_from: usize,
    next_probe: i64,
    /// The nodes that are still to be probed before all have their turn again.
    turns: Vec<u16>,
    refused: [u64; Refusal::ALL.len()],
}

/// The distances on the ring at which nodes are linked.
fn linked(nodes: u16, full_mesh: u16, a: u16, b: u16) -> bool {
    let apart = a.abs_diff(b);
    a != b && (nodes <= full_mesh || apart.is_power_of_two() || (nodes - apart).is_power_of_two())
}

impl Table {
    pub fn new(settings: Settings, now: i64) -> Self {
        let peers = (0..settings.nodes)
            .filter(|&node| node != settings.node)
            .map(|node| Peer {
                node,
                neighbour: linked(settings.nodes, settings.full_mesh, settings.node, node),
                boot: 0,
                boot_before: 0,
                beat: 0,
                anchor: (0, now),
                heard: now,
                interval: settings.heartbeat,
                vouched: (0, now),
                state: State::Unknown,
                arrivals: Arrivals::default(),
                clock: Estimator::default(),
                marks: VecDeque::new(),
                last: None,
                step: NO_STEP,
                link: None,
                dialling: None,
                retry_at: now,
                backoff: BACKOFF.0,
                asked: false,
            })
            .collect();
        Self {
            peers,
            links: HashMap::new(),
            marks: VecDeque::new(),
            last: None,
            beat: 0,
            next_beat: now,
            stepping_until: now + LINGER.1,
            ticked: now,
            next_link: 1,
            random: settings.boot ^ (u64::from(settings.node) << 48),
            gossip_from: 0,
            next_probe: now + PROBE_PERIOD,
            turns: Vec::new(),
            refused: [0; Refusal::ALL.len()],
            settings,
        }
    }

    /// A fresh name for a connection.
    pub fn name_link(&mut self) -> Link {
        self.next_link += 1;
        self.next_link
    }

    /// A step boundary of this node.
    pub fn report(&mut self, mark: Mark) {
        if self.idle(mark.at) {
            self.next_beat = self.next_beat.min(mark.at);
        }
        self.stepping_until = self.stepping_until.max(mark.at + linger(mark.duration));
        remember(&mut self.marks, OWN_MARKS, mark.step, mark.at);
        self.last = Some(mark);
    }

    /// More nodes than are linked to each other: they gossip and probe.
    fn ring(&self) -> bool {
        self.settings.nodes > self.settings.full_mesh
    }

    /// No node of the job steps, so heartbeats come less often. Not beyond the full mesh, where beat counts travel far.
    pub fn idle(&self, now: i64) -> bool {
        !self.ring() && now > self.stepping_until
    }

    fn idle_interval(&self) -> i64 {
        IDLE_INTERVAL
            .min(self.settings.dead_after / 8)
            .max(self.settings.heartbeat)
    }

    /// Time from one heartbeat to the next.
    fn interval(&self, now: i64) -> i64 {
        if self.idle(now) {
            self.idle_interval()
        } else {
            self.settings.heartbeat
        }
    }

    /// Counts a refusal.
    pub fn refuse(&mut self, why: Refusal) {
        if let Some(count) = self.refused.get_mut(why as usize) {
            *count += 1;
        }
    }

    /// How often each of [`Refusal::ALL`] happened.
    pub fn refused(&self) -> [u64; Refusal::ALL.len()] {
        self.refused
    }

    /// When [`Table::tick`] wants to be called next.
    pub fn next_tick(&self) -> i64 {
        self.next_beat
            .min(self.ticked + LOOK.max(self.settings.heartbeat))
    }

    /// A splitmix64 step.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Whether the handshake of a node that dials us may go on.
    ///
    /// Of two linked nodes the lower one dials. To probe, any node may, if there is room and no link yet. Nobody takes the
    /// id of a node that is being heard.
    pub fn admits(&self, now: i64, node: u16, boot: u64) -> Result<(), Refusal> {
        let identity = Err(Refusal::Identity);
        let Some(peer) = self.peers.iter().find(|p| p.node == node) else {
            return identity;
        };
        let limit = self.silence_limit(peer.interval);
        if peer.link.as_ref().is_some_and(|l| now - l.heard <= limit) {
            // Who is being probed may not know yet that its own probe is not needed.
            return if peer.neighbour || peer.boot != boot {
                identity
            } else {
                Err(Refusal::Busy)
            };
        }
        if peer.neighbour {
            return if node < self.settings.node {
                Ok(())
            } else {
                identity
            };
        }
        if matches!(peer.state, State::Alive | State::Suspect) && peer.boot != boot {
            return identity;
        }
        // Both dial at the same time: the lower one's link stays.
        let crossed = peer.dialling.is_some() && node > self.settings.node;
        let theirs = |p: &&Peer| !p.neighbour && p.link.as_ref().is_some_and(|l| !l.ours);
        if crossed || self.peers.iter().filter(theirs).count() >= MAX_PROBES {
            return Err(Refusal::Busy);
        }
        Ok(())
    }

    /// A handshake is complete. `Err`: close it; it was counted.
    pub fn linked(
        &mut self,
        now: i64,
        node: u16,
        boot: u64,
        link: Link,
    ) -> Result<Option<Link>, Refusal> {
        let ours = |p: &Peer| p.dialling.is_some_and(|(l, _)| l == link);
        let at = self.peers.iter().position(|p| p.node == node);
        let dialled = at.and_then(|at| self.peers.get(at)).is_some_and(ours);
        if !dialled && let Err(why) = self.admits(now, node, boot) {
            self.refuse(why);
            return Err(why);
        }
        let Some((at, peer)) = at.and_then(|at| Some((at, self.peers.get_mut(at)?))) else {
            return Err(Refusal::Identity);
        };
        peer.reboot(boot);
        let crossed = peer.dialling.take().map(|(l, _)| l).filter(|&l| l != link);
        peer.interval = self.settings.heartbeat;
        self.next_beat = self.next_beat.min(now + self.settings.heartbeat);
        let old = peer.link.replace(Established {
            link,
            ours: dialled,
            since: now,
            heard: now,
            beat: if peer.neighbour { peer.beat } else { 0 },
            sent_frames: 0,
            received_frames: 0,
            tokens: BURST,
            refilled: now,
            echo: (-1, -1),
            echoed: -1,
        });
        self.links.insert(link, at);
        let old = old.map(|l| l.link).or(crossed);
        if let Some(old) = old {
            self.links.remove(&old);
        }
        Ok(old)
    }

    /// A link is gone, or an attempt to dial failed.
    pub fn closed(&mut self, now: i64, link: Link) {
        let jitter = self.random();
        self.links.remove(&link);
        let Some(peer) = self.peers.iter_mut().find(|p| {
            p.link.as_ref().is_some_and(|l| l.link == link)
                || p.dialling.is_some_and(|(l, _)| l == link)
        }) else {
            return;
        };
        if peer.link.as_ref().is_some_and(|l| l.link == link) {
            peer.link = None;
        } else {
            peer.dialling = None;
            peer.asked = false; // nobody there
        }
        let cap = if peer.step == NO_STEP && peer.state == State::Dead && peer.last.is_none() {
            BACKOFF_EXPIRED
        } else {
            BACKOFF.1
        };
        peer.retry_at = now + peer.backoff / 2 + (jitter % (peer.backoff as u64 / 2 + 1)) as i64;
        peer.backoff = (peer.backoff * 2).min(cap);
    }

    /// A link that is silent for longer is given up.
    fn silence_limit(&self, interval: i64) -> i64 {
        (3 * self.settings.heartbeat).max(interval + RESENDS)
    }

    /// What the time asks for: heartbeats, dialling, links that went silent, suspicion.
    pub fn tick(&mut self, now: i64) -> Vec<Action> {
        // A process that was stopped heard nobody: that is no sign that anybody is dead.
        let slept = now - self.ticked - (4 * self.settings.heartbeat).max(2 * LOOK);
        self.ticked = now;
        if slept > 0 {
            for peer in &mut self.peers {
                peer.heard += slept;
                peer.vouched.1 += slept;
                if let Some(link) = &mut peer.link {
                    link.heard += slept;
                }
            }
        }
        let mut actions = Vec::new();
        let heartbeat = self.settings.heartbeat;
        let probe_time = PROBE_TIME.max(PROBE_BEATS * heartbeat);
        for at in 0..self.peers.len() {
            let link = self.next_link + 1;
            let Some(limit) = self.peers.get(at).map(|p| self.silence_limit(p.interval)) else {
                break;
            };
            let Some(peer) = self.peers.get_mut(at) else {
                break;
            };
            let gone = peer.link.as_ref().and_then(|l| {
                // Who was probed waits a little longer, so that who probes ends it.
                let long = if l.ours { 1 } else { 2 } * probe_time;
                if now - l.heard > limit {
                    Some((l.link, Ending::Silent))
                } else if !peer.neighbour && now - l.since > long {
                    Some((l.link, Ending::Probe))
                } else {
                    None
                }
            });
            let late_dial = peer
                .dialling
                .filter(|&(_, since)| now - since > DIAL_LIMIT)
                .map(|(l, _)| (l, Ending::Unreachable));
            if let Some((link, why)) = gone.or(late_dial) {
                actions.push(Action::Close { link, why });
                self.closed(now, link);
                continue;
            }
            let dial = peer.neighbour && peer.node > self.settings.node && peer.link.is_none();
            if dial && peer.dialling.is_none() && now >= peer.retry_at {
                peer.dialling = Some((link, now));
                self.next_link = link;
                actions.push(Action::Dial {
                    node: peer.node,
                    link,
                });
            }
            let silence = now - peer.heard;
            // News of a third node takes its time.
            let late = if peer.neighbour {
                0
            } else {
                peer.pause(heartbeat)
            };
            if peer.state == State::Alive && peer.phi(now, heartbeat) > PHI_SUSPECT {
                peer.state = State::Suspect;
            }
            let unheard = silence.min(now - peer.vouched.1);
            if peer.state != State::Dead && unheard > self.settings.dead_after + late {
                peer.state = State::Dead;
            }
            if peer.state == State::Dead
                && silence > self.settings.expire_after
                && peer.link.is_none()
            {
                peer.forget();
            }
        }
        if self.ring() {
            self.probe(now, &mut actions);
        }
        if now >= self.next_beat {
            self.beat += 1;
            let interval = self.interval(now);
            self.next_beat = (self.next_beat + interval).max(now + interval / 2);
            self.send_beats(now, &mut actions);
        }
        actions
    }

    /// Dials whom it is time to probe, and asks neighbours about suspects.
    fn probe(&mut self, now: i64, actions: &mut Vec<Action>) {
        let due = now >= self.next_probe;
        let mut turn = None;
        if due {
            self.next_probe = now + PROBE_PERIOD;
            turn = self.next_turn();
            self.ask(actions);
        }
        for peer in self.peers.iter_mut().filter(|p| p.neighbour) {
            peer.asked &= peer.state == State::Alive;
        }
        let busy = |p: &Peer| p.dialling.is_some() || p.link.is_some();
        let ours = |p: &&Peer| {
            !p.neighbour && (p.dialling.is_some() || p.link.as_ref().is_some_and(|l| l.ours))
        };
        let room = MAX_PROBES.saturating_sub(self.peers.iter().filter(ours).count());
        // The one whose turn it is, then suspects from anywhere on: where they are many, others come first each time.
        let from = (self.random() % self.peers.len().max(1) as u64) as usize;
        let mut order: Vec<usize> = (from..self.peers.len()).chain(0..from).collect();
        order.sort_by_key(|&at| self.peers.get(at).map(|p| p.node) != turn);
        let wanted =
            |p: &Peer| p.asked || turn == Some(p.node) || (due && p.state == State::Suspect);
        order.retain(|&at| {
            let far = self.peers.get(at).filter(|p| !p.neighbour && !busy(p));
            far.is_some_and(wanted)
        });
        for at in order.into_iter().take(room) {
            self.next_link += 1;
            let link = self.next_link;
            if let Some(peer) = self.peers.get_mut(at) {
                peer.dialling = Some((link, now));
                actions.push(Action::Dial {
                    node: peer.node,
                    link,
                });
                turn = turn.filter(|&node| node != peer.node);
            }
        }
        let linked = |&node: &u16| {
            self.peers
                .iter()
                .any(|p| p.node == node && p.link.is_some())
        };
        if let Some(node) = turn.filter(|node| !linked(node)) {
            self.turns.push(node); // no room: it comes next
        }
    }

    /// The next of the nodes without a link, in an order that is drawn anew when all had their turn.
    fn next_turn(&mut self) -> Option<u16> {
        if self.turns.is_empty() {
            let far = self.peers.iter().filter(|p| !p.neighbour);
            self.turns = far.map(|p| p.node).collect();
            for last in (1..self.turns.len()).rev() {
                let other = (self.random() % (last as u64 + 1)) as usize;
                self.turns.swap(last, other);
            }
        }
        self.turns.pop()
    }

    /// Asks living neighbours to probe suspects.
    fn ask(&mut self, actions: &mut Vec<Action>) {
        let suspect = |p: &&Peer| p.state == State::Suspect;
        let mut suspects: Vec<u16> = self.peers.iter().filter(suspect).map(|p| p.node).collect();
        for _ in 0..suspects.len().min(MAX_ASKED) {
            let at = (self.random() % suspects.len() as u64) as usize;
            let node = suspects.swap_remove(at);
            let first = self.random() as usize;
            let mut living: Vec<&mut Established> = self
                .peers
                .iter_mut()
                .filter(|p| p.neighbour && p.state == State::Alive)
                .filter_map(|p| p.link.as_mut())
                .collect();
            let count = living.len();
            living.rotate_left(first.checked_rem(count).unwrap_or(0));
            for link in living.into_iter().take(ASKED) {
                actions.push(link.send(Body::Probe(node)));
            }
        }
    }

    fn send_beats(&mut self, now: i64, actions: &mut Vec<Action>) {
        let rumours = if self.ring() {
            self.rumours()
        } else {
            Vec::new()
        };
        let mark = self.last;
        let next_ms = self.interval(now) / MS;
        for peer in &mut self.peers {
            let Some(link) = &mut peer.link else { continue };
            let heartbeat = Heartbeat {
                beat: self.beat,
                sent: now,
                echo_sent: link.echo.0,
                echo_received: link.echo.1,
                step: mark.map_or(NO_STEP, |m| m.step),
                step_at: mark.map_or(-1, |m| m.at.min(now)),
                step_ns: mark.map_or(0, |m| m.duration),
                next_ms: next_ms.clamp(1, i64::from(MAX_INTERVAL_MS)) as u16,
                fill: mark.map_or(0.0, |m| m.fill),
                fires: mark.map_or(0, |m| m.fires),
                holds: mark.map_or(0, |m| m.holds),
            };
            actions.push(link.send(Body::Heartbeat(heartbeat)));
            if !rumours.is_empty() {
                actions.push(link.send(Body::Gossip(rumours.clone())));
            }
        }
    }

    /// The last frame of every link.
    pub fn goodbye(&self) -> Vec<(Link, Vec<u8>)> {
        let bye = |l: &Established| {
            (
                l.link,
                Frame {
                    sequence: l.sent_frames,
                    body: Body::Bye,
                }
                .encode(),
            )
        };
        self.peers
            .iter()
            .filter_map(|p| p.link.as_ref())
            .map(bye)
            .collect()
    }

    /// Those of the living whom somebody asked about, then the next of the others, in turn.
    fn rumours(&mut self) -> Vec<Rumour> {
        let living = |p: &Peer| p.state == State::Alive && p.beat > 0;
        let rumour = |p: &Peer| Rumour {
            node: p.node,
            boot: p.boot,
            beat: p.beat,
            step: p.step,
        };
        let mut rumours = Vec::new();
        for peer in self.peers.iter_mut().filter(|p| p.asked && living(p)) {
            peer.asked = false;
            rumours.push(rumour(peer));
        }
        let known: Vec<&Peer> = self.peers.iter().filter(|p| living(p)).collect();
        let count = known.len().min(MAX_RUMOURS.saturating_sub(rumours.len()));
        let from = self.gossip_from.checked_rem(known.len()).unwrap_or(0);
        rumours.extend(
            known
                .iter()
                .cycle()
                .skip(from)
                .take(count)
                .map(|p| rumour(p)),
        );
        rumours.truncate(MAX_RUMOURS);
        self.gossip_from = self.gossip_from.wrapping_add(count);
        rumours
    }

    /// A frame came over a link. `Err`: close the link and call [`Table::closed`]; it was counted.
    pub fn received(&mut self, now: i64, link: Link, bytes: &[u8]) -> Result<(), Refusal> {
        let result = self.take(now, link, bytes);
        if let Err(why) = result {
            self.refuse(why);
        }
        result
    }

    fn take(&mut self, now: i64, link: Link, bytes: &[u8]) -> Result<(), Refusal> {
        let heartbeat = self.settings.heartbeat as f64;
        let (own, slowest, was_idle) = (self.settings.node, self.idle_interval(), self.idle(now));
        let ring = self.ring();
        let peer = self
            .links
            .get(&link)
            .and_then(|&at| self.peers.get_mut(at))
            .ok_or(Refusal::Identity)?;
        let established = peer
            .link
            .as_mut()
            .filter(|l| l.link == link)
            .ok_or(Refusal::Identity)?;
        let earned = (now - established.refilled) as f64 / heartbeat * RATE;
        established.tokens = (established.tokens + earned).min(BURST) - 1.0;
        established.refilled = now;
        if established.tokens < 0.0 {
            return Err(Refusal::Flood);
        }
        let frame = Frame::decode(bytes).map_err(|_| Refusal::Malformed)?;
        if frame.sequence != established.received_frames {
            return Err(Refusal::Sequence);
        }
        established.received_frames += 1;
        match frame.body {
            Body::Heartbeat(h) => {
                let (before, _) = established.echo;
                let echo_known = h.echo_sent >= established.echoed && h.echo_sent <= now;
                if h.beat <= established.beat || h.sent <= before || !echo_known {
                    return Err(Refusal::Lie);
                }
                let fresh = h.echo_sent > established.echoed;
                if fresh {
                    let clock = &mut peer.clock;
                    match clock.exchange(h.echo_sent, h.echo_received, h.sent, now) {
                        Exchange::Agrees => {}
                        Exchange::Impossible => return Err(Refusal::Lie),
                        // Moments from before the jump compare with nothing any more, and it may be our own clock.
                        Exchange::Jumped => {
                            peer.marks.clear();
                            self.marks.clear();
                        }
                    }
                }
                established.echoed = h.echo_sent;
                established.echo = (h.sent, now);
                established.heard = now;
                established.beat = h.beat;
                if h.step != NO_STEP && peer.step != h.step {
                    remember(&mut peer.marks, PEER_MARKS, h.step, h.step_at);
                    self.stepping_until = self.stepping_until.max(now + linger(h.step_ns));
                    if was_idle {
                        self.next_beat = self.next_beat.min(now + self.settings.heartbeat);
                    }
                }
                peer.step = h.step;
                peer.beat = h.beat;
                peer.anchor = (h.beat, now);
                peer.last = Some(h);
                peer.backoff = BACKOFF.0;
                peer.alive(now, self.settings.heartbeat);
                peer.interval = (i64::from(h.next_ms) * MS).min(slowest);
            }
            // In a full mesh everybody hears everybody: what a third one says of a node could only be a lie.
            Body::Gossip(_) if !ring => return Err(Refusal::Lie),
            Body::Gossip(rumours) => {
                for rumour in rumours.into_iter().filter(|r| r.node != own) {
                    self.rumour(now, rumour);
                }
            }
            Body::Probe(node) => {
                let from = peer.node;
                let whom = self.peers.iter_mut().find(|p| p.node == node);
                let Some(whom) = whom.filter(|_| node != from && ring) else {
                    return Err(Refusal::Lie);
                };
                whom.asked = true;
            }
            Body::Bye => {
                peer.state = State::Dead;
                peer.heard = peer.heard.min(now - self.settings.dead_after);
            }
        }
        Ok(())
    }

    fn rumour(&mut self, now: i64, rumour: Rumour) {
        let Some(peer) = self.peers.iter_mut().find(|p| p.node == rumour.node) else {
            return;
        };
        let other_boot = peer.boot != rumour.boot;
        // Of another boot: it is heard, so the tale is old or a lie; or a boot that was replaced does not come back.
        let heard = peer.neighbour || peer.state == State::Alive;
        if other_boot && (heard || rumour.boot == peer.boot_before) {
            return;
        }
        if peer.neighbour && peer.boot == 0 {
            return; // a linked node speaks for itself first
        }
        // Another boot began to count after the one before was heard.
        let (grown, known) = if other_boot {
            (true, 0)
        } else {
            let known = peer.beat.max(peer.vouched.0);
            (rumour.beat > known, peer.anchor.0)
        };
        if !grown {
            return;
        }
        if !peer.may_be_at(rumour.beat, known, now, self.settings.heartbeat) {
            // The link stays: who passes it on may believe it. Of another boot it may be old and no lie.
            if !other_boot {
                self.refuse(Refusal::Lie);
            }
            return;
        }
        if peer.neighbour {
            // Who does not reach us and beats on for others is not dead. Its own frames alone say what it does.
            peer.vouched = (rumour.beat, now);
            if peer.state == State::Dead {
                peer.state = State::Suspect;
            }
            return;
        }
        if other_boot {
            peer.reboot(rumour.boot);
            peer.anchor = (rumour.beat, now);
        }
        peer.beat = rumour.beat;
        peer.step = rumour.step;
        peer.alive(now, self.settings.heartbeat);
    }

    /// What is known of every peer, in order of node.
    pub fn views(&self, now: i64) -> Vec<View> {
        self.peers.iter().map(|peer| self.view(now, peer)).collect()
    }

    fn view(&self, now: i64, peer: &Peer) -> View {
        let own = self.last.map_or(NO_STEP, |m| m.step);
        let (drift, bound) = self
            .drift(now, peer)
            .filter(|_| peer.state == State::Alive)
            .unwrap_or((f64::NAN, f64::NAN));
        let silence = now - peer.heard;
        let ms = MS as f64;
        View {
            node: peer.node,
            state: peer.state,
            boot: peer.boot,
            silence_ms: silence as f64 / ms,
            phi: match peer.state {
                State::Unknown => f64::NAN,
                _ => peer.phi(now, self.settings.heartbeat),
            },
            step: peer.step,
            lag: if peer.step == NO_STEP || own == NO_STEP {
                0
            } else {
                own - peer.step
            },
            drift_ms: drift / ms,
            bound_ms: bound / ms,
            offset_ms: peer.clock.offset(now).map_or(f64::NAN, |o| o.0 / ms),
            skew_ppm: peer.clock.skew() * 1e6,
            step_ms: peer.last.map_or(f64::NAN, |h| h.step_ns as f64 / ms),
            fill: peer.last.map_or(f32::NAN, |h| h.fill),
            fires: peer.last.map_or(0, |h| h.fires),
            holds: peer.last.map_or(0, |h| h.holds),
        }
    }

    /// Drift and its bound in ns; the definition is at [`View::drift_ms`].
    fn drift(&self, now: i64, peer: &Peer) -> Option<(f64, f64)> {
        if !peer.neighbour {
            return None; // probed now and then, which is not often enough for phase
        }
        let (own_step, last) = (self.last?.step, peer.last?);
        let common = peer.marks.iter().rev().find_map(|&(step, at)| {
            let here = self
                .marks
                .binary_search_by_key(&step, |m| m.0)
                .ok()
                .and_then(|i| self.marks.get(i))?;
            let (there, bound) = peer.clock.to_local(at)?;
            Some((there - here.1 as f64, bound))
        });
        let after = |marks: &VecDeque<(i64, i64)>, step| marks.iter().find(|m| m.0 > step).copied();
        let overdue = if own_step > last.step {
            let (seen, bound) = peer.clock.to_local(last.sent)?;
            after(&self.marks, last.step)
                .map(|m| (seen - m.1 as f64, bound))
                .filter(|late| late.0 > 0.0)
        } else {
            after(&peer.marks, own_step)
                .and_then(|m| peer.clock.to_local(m.1))
                .map(|(at, b)| (at - now as f64, b))
                .filter(|late| late.0 < 0.0)
        };
        match (common, overdue) {
            (Some(c), Some(o)) if own_step > last.step => Some(if o.0 > c.0 { o } else { c }),
            (Some(c), Some(o)) => Some(if o.0 < c.0 { o } else { c }),
            (one, other) => one.or(other),
        }
    }
}

/// How long after a step of this duration, in ns, the job counts as stepping.
fn linger(duration: u64) -> i64 {
    let duration = i64::try_from(duration).unwrap_or(i64::MAX);
    duration.saturating_mul(LINGER.0).clamp(LINGER.1, LINGER.2)
}

/// Appends a step boundary; a step that does not follow (training was rolled back) starts the history anew.
fn remember(marks: &mut VecDeque<(i64, i64)>, most: usize, step: i64, at: i64) {
    if marks.back().is_some_and(|&(last, _)| step <= last) {
        marks.clear();
    }
    if marks.len() == most {
        marks.pop_front();
    }
    marks.push_back((step, at));
}
