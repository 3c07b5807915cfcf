//! The table of peers: which nodes to dial, which are alive, what to send. It is pure: time comes in as an argument, and what
//! is to be done goes out as [`Action`]s. So tests/sideband_simulation.rs drives the same code as the agent.
//!
//! Of each pair the lower node dials. Up to 32 nodes every pair is linked. Beyond, a node is linked to the nodes 1, 2, 4, ...
//! away on a ring, and hears of the rest through gossip: each node's beat count travels along, and only a count that has
//! grown is a sign of life. It also probes them (`probe.rs`).

use super::MS;
use super::clock::Exchange;
use super::frame::{Body, Frame, Heartbeat, MAX_INTERVAL_MS, MAX_RUMOURS, NO_STEP, Rumour};
use super::link::{Action, Echo, Established, Link, Refusal};
use super::peer::{Attempt, BACKOFF_FIRST, Boundary, Count, Peer, Settings, State, remember};
use std::collections::{HashMap, VecDeque};

/// Up to this many nodes everybody is linked to everybody.
pub const FULL_MESH: u16 = 32;
/// Most nodes of a job.
pub const MAX_NODES: u16 = 256;
/// Time between two heartbeats while no node steps: with two resends, a new link and jitter still suspect within 2 s.
const IDLE_INTERVAL: i64 = 250 * MS;
/// After a step the job counts as stepping for so many step durations, within these bounds.
const LINGER_STEPS: i64 = 4;
const LINGER_LEAST: i64 = 2000 * MS;
const LINGER_MOST: i64 = 60_000 * MS;
/// Longest time between two looks at who is late.
const LOOK: i64 = 100 * MS;
/// Longest time between two attempts to dial a node.
const BACKOFF_MOST: i64 = 750 * MS;
/// Longest time between two attempts to reach a node whose entry has expired.
const BACKOFF_EXPIRED: i64 = 5000 * MS;
/// A node that is not linked is probed once in this time.
pub(super) const PROBE_PERIOD: i64 = 1000 * MS;
/// Probes at a time, of this node and as many of others.
pub const MAX_PROBES: usize = 4;
const OWN_MARKS: usize = 1024;
const PEER_MARKS: usize = 64;

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

/// Everything one node knows.
pub struct Table {
    pub(super) settings: Settings,
    pub(super) peers: Vec<Peer>,
    links: HashMap<Link, usize>,
    pub(super) marks: VecDeque<Boundary>,
    pub(super) last: Option<Mark>,
    beat: u64,
    next_beat: i64,
    /// Until then the job counts as stepping.
    stepping_until: i64,
    ticked: i64,
    pub(super) next_link: Link,
    random: u64,
    gossip_from: usize,
    pub(super) next_probe: i64,
    /// The nodes that are still to be probed before all have their turn again.
    pub(super) turns: Vec<u16>,
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
            .map(|node| {
                let neighbour = linked(settings.nodes, settings.full_mesh, settings.node, node);
                Peer::new(node, neighbour, settings.heartbeat, now)
            })
            .collect();
        Self {
            peers,
            links: HashMap::new(),
            marks: VecDeque::new(),
            last: None,
            beat: 0,
            next_beat: now,
            stepping_until: now + LINGER_LEAST,
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
    pub(super) fn random(&mut self) -> u64 {
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
        let limit = peer.silence_limit(self.settings.heartbeat);
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
        let ours = |p: &Peer| p.dialling.is_some_and(|d| d.link == link);
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
        let crossed = peer.dialling.take().map(|d| d.link).filter(|&l| l != link);
        peer.interval = self.settings.heartbeat;
        self.next_beat = self.next_beat.min(now + self.settings.heartbeat);
        let beat = if peer.neighbour { peer.beat } else { 0 };
        let established = Established::new(link, dialled, beat, now);
        let old = peer.link.replace(established);
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
                || p.dialling.is_some_and(|d| d.link == link)
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
            BACKOFF_MOST
        };
        peer.retry_at = now + peer.backoff / 2 + (jitter % (peer.backoff as u64 / 2 + 1)) as i64;
        peer.backoff = (peer.backoff * 2).min(cap);
    }

    /// What the time asks for: heartbeats, dialling, links that went silent, suspicion.
    pub fn tick(&mut self, now: i64) -> Vec<Action> {
        // A process that was stopped heard nobody: that is no sign that anybody is dead.
        let slept = now - self.ticked - (4 * self.settings.heartbeat).max(2 * LOOK);
        self.ticked = now;
        if slept > 0 {
            for peer in &mut self.peers {
                peer.sleep(slept);
            }
        }
        let mut actions = Vec::new();
        for at in 0..self.peers.len() {
            self.look_at(at, now, &mut actions);
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

    /// One peer: its link may have to be closed or dialled, and it may have fallen silent.
    fn look_at(&mut self, at: usize, now: i64, actions: &mut Vec<Action>) {
        let settings = &self.settings;
        let Some(peer) = self.peers.get_mut(at) else {
            return;
        };
        if let Some((link, why)) = peer.ending(now, settings.heartbeat) {
            actions.push(Action::Close { link, why });
            self.closed(now, link);
            return;
        }
        peer.judge(now, settings);
        let ours = peer.neighbour && peer.node > settings.node;
        if ours && peer.apart() && now >= peer.retry_at {
            self.dial(at, now, actions);
        }
    }

    pub(super) fn dial(&mut self, at: usize, now: i64, actions: &mut Vec<Action>) {
        let link = self.name_link();
        if let Some(peer) = self.peers.get_mut(at) {
            peer.dialling = Some(Attempt { link, since: now });
            let node = peer.node;
            actions.push(Action::Dial { node, link });
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
                echo_sent: link.echo.sent,
                echo_received: link.echo.received,
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
        let heartbeat = self.settings.heartbeat;
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
        if !established.earns(now, heartbeat) {
            return Err(Refusal::Flood);
        }
        let frame = Frame::decode(bytes).map_err(|_| Refusal::Malformed)?;
        if frame.sequence != established.received_frames {
            return Err(Refusal::Sequence);
        }
        established.received_frames += 1;
        match frame.body {
            Body::Heartbeat(h) => {
                let before = established.echo.sent;
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
                established.echo = Echo {
                    sent: h.sent,
                    received: now,
                };
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
                peer.anchor = Count::new(h.beat, now);
                peer.last = Some(h);
                peer.backoff = BACKOFF_FIRST;
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
            let known = peer.beat.max(peer.vouched.beat);
            (rumour.beat > known, peer.anchor.beat)
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
            peer.vouched = Count::new(rumour.beat, now);
            if peer.state == State::Dead {
                peer.state = State::Suspect;
            }
            return;
        }
        if other_boot {
            peer.reboot(rumour.boot);
            peer.anchor = Count::new(rumour.beat, now);
        }
        peer.beat = rumour.beat;
        peer.step = rumour.step;
        peer.alive(now, self.settings.heartbeat);
    }
}

/// How long after a step of this duration, in ns, the job counts as stepping.
fn linger(duration: u64) -> i64 {
    let duration = i64::try_from(duration).unwrap_or(i64::MAX);
    duration
        .saturating_mul(LINGER_STEPS)
        .clamp(LINGER_LEAST, LINGER_MOST)
}
