//! The table of peers under a simulated network and clocks: 10,000 seeds of delays, partitions, crashes and forgery.
//!
//! Invariants: a replayed frame is never accepted, tables stay bounded, a crash is noticed, everybody is back after a heal,
//! and whenever a drift is stated it is true within its bound.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use tsugi_kpool::sideband::frame::{Body, Frame, Heartbeat, Rumour};
use tsugi_kpool::sideband::link::{Action, Link, Refusal};
use tsugi_kpool::sideband::peer::{PHI_SUSPECT, Settings, State};
use tsugi_kpool::sideband::table::{MAX_PROBES, Mark, Table};

const MS: i64 = 1_000_000;
const HEARTBEAT: i64 = 200 * MS;
const DEAD_AFTER: i64 = 2500 * MS;
const STEP: i64 = 170 * MS;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

enum Event {
    Tick(usize),
    Step(usize),
    /// The connection request of a dialler, and its completion there.
    Accept {
        from: usize,
        to: usize,
        wire: u64,
    },
    Linked {
        from: usize,
        to: usize,
        wire: u64,
    },
    Bytes {
        to: usize,
        wire: u64,
        bytes: Vec<u8>,
        replay: bool,
    },
    Hangup {
        to: usize,
        wire: u64,
    },
}

struct Node {
    table: Table,
    boot: u64,
    /// Local time = origin + true time * rate.
    origin: i64,
    ppm: i64,
    up: bool,
    step: i64,
    /// (node, step) was reached at this true time.
    reached: HashMap<i64, i64>,
    links: BTreeMap<u64, Link>,
    wires: HashMap<Link, (u64, usize)>,
}

impl Node {
    fn local(&self, now: i64) -> i64 {
        self.origin + now + now / 1_000_000 * self.ppm
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Stepping,
    /// Nobody steps, so heartbeats get rare.
    Idle,
    /// More nodes than are linked to each other, as beyond 32.
    Ring,
}

impl Kind {
    fn full_mesh(self) -> u16 {
        if self == Kind::Ring { 4 } else { 32 }
    }
}

struct World {
    nodes: Vec<Node>,
    random: Random,
    queue: BinaryHeap<Reverse<(i64, u64)>>,
    events: HashMap<u64, Event>,
    count: u64,
    now: i64,
    delay: Vec<Vec<i64>>,
    /// Wires arrive in order; the last arrival of each direction.
    arrived: HashMap<(u64, usize), i64>,
    /// Pairs, the lower node first, that do not reach each other.
    cut: Vec<(usize, usize)>,
    replays: u64,
    /// One in so many segments is lost and sent again after 200, 400, ... ms; 0: none, and no replays then either.
    loss: u64,
}

impl World {
    fn new(seed: u64, heartbeat: i64, kind: Kind) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..4 {
            random.below(2);
        }
        let count = match kind {
            Kind::Ring => 6 + random.below(3) as usize,
            Kind::Stepping | Kind::Idle => 2 + random.below(3) as usize,
        };
        let delay = (0..count)
            .map(|_| (0..count).map(|_| 1 + random.below(25) as i64).collect())
            .collect();
        let mut world = Self {
            nodes: Vec::new(),
            random,
            queue: BinaryHeap::new(),
            events: HashMap::new(),
            count: 0,
            now: 0,
            delay,
            arrived: HashMap::new(),
            cut: Vec::new(),
            replays: 0,
            loss: 0,
        };
        for node in 0..count {
            let origin = world.random.below(86_400_000) as i64 * MS;
            let ppm = world.random.below(201) as i64 - 100;
            let boot = world.random.below(u64::MAX);
            world.nodes.push(Node {
                table: Table::new(
                    Settings {
                        heartbeat,
                        full_mesh: kind.full_mesh(),
                        ..settings(node, count, boot)
                    },
                    origin,
                ),
                boot,
                origin,
                ppm,
                up: true,
                step: -1,
                reached: HashMap::new(),
                links: BTreeMap::new(),
                wires: HashMap::new(),
            });
            world.at(0, Event::Tick(node));
            let first = world.random.below(400) as i64 * MS;
            if kind != Kind::Idle {
                world.at(first, Event::Step(node));
            }
        }
        world
    }

    fn at(&mut self, time: i64, event: Event) {
        self.count += 1;
        self.queue.push(Reverse((time, self.count)));
        self.events.insert(self.count, event);
    }

    fn open(&self, a: usize, b: usize) -> bool {
        !self.cut.contains(&(a.min(b), a.max(b)))
    }

    /// Bytes on their way, in order; what is sent into a cut is lost with its wire.
    fn send(&mut self, from: usize, to: usize, wire: u64, bytes: Vec<u8>) {
        if !self.open(from, to) {
            return;
        }
        let mut jitter = self.random.below(3 * MS as u64) as i64;
        let mut resend = 200 * MS;
        while self.loss > 0 && self.random.below(self.loss) == 0 {
            jitter += resend;
            resend *= 2;
        }
        let time = (self.now + self.delay[from][to] * MS + jitter)
            .max(self.arrived.get(&(wire, to)).map_or(0, |t| t + 1));
        self.arrived.insert((wire, to), time);
        if self.loss == 0 && self.random.below(40) == 0 {
            self.at(
                time + 1,
                Event::Bytes {
                    to,
                    wire,
                    bytes: bytes.clone(),
                    replay: true,
                },
            );
        }
        self.at(
            time,
            Event::Bytes {
                to,
                wire,
                bytes,
                replay: false,
            },
        );
    }

    fn hang_up(&mut self, node: usize, wire: u64, other: usize) {
        let Some(link) = self.nodes[node].links.remove(&wire) else {
            return;
        };
        self.nodes[node].wires.remove(&link);
        let now = self.nodes[node].local(self.now);
        self.nodes[node].table.closed(now, link);
        if self.open(node, other) {
            let time = self.now + self.delay[node][other] * MS;
            self.at(time, Event::Hangup { to: other, wire });
        }
    }

    fn act(&mut self, node: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Dial { node: to, link } => {
                    let to = usize::from(to);
                    self.count += 1;
                    let wire = self.count;
                    self.nodes[node].links.insert(wire, link);
                    self.nodes[node].wires.insert(link, (wire, to));
                    let lost = self.loss > 0 && self.random.below(self.loss) == 0;
                    if self.open(node, to) && !lost {
                        let time = self.now + self.delay[node][to] * MS;
                        self.at(
                            time,
                            Event::Accept {
                                from: node,
                                to,
                                wire,
                            },
                        );
                    }
                }
                Action::Send { link, bytes } => {
                    if let Some(&(wire, to)) = self.nodes[node].wires.get(&link) {
                        self.send(node, to, wire, bytes);
                    }
                }
                Action::Close { link, .. } => {
                    if let Some(&(wire, to)) = self.nodes[node].wires.get(&link) {
                        self.hang_up(node, wire, to);
                    }
                }
            }
        }
    }

    fn run_until(&mut self, end: i64) {
        while let Some(&Reverse((time, id))) = self.queue.peek() {
            if time > end {
                break;
            }
            self.queue.pop();
            self.now = time;
            let event = self.events.remove(&id).unwrap();
            self.handle(event);
        }
        self.now = end;
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick(node) => {
                let now = self.nodes[node].local(self.now);
                if self.nodes[node].up {
                    let actions = self.nodes[node].table.tick(now);
                    self.act(node, actions);
                }
                self.at(self.now + 50 * MS, Event::Tick(node));
            }
            Event::Step(node) => {
                let wait = STEP + self.random.below(20) as i64 * MS;
                self.at(self.now + wait, Event::Step(node));
                let now = self.now;
                if !self.nodes[node].up {
                    return;
                }
                let at = &mut self.nodes[node];
                at.step += 1;
                at.reached.insert(at.step, now);
                let mark = Mark {
                    step: at.step,
                    at: at.local(now),
                    duration: 1,
                    fill: 0.5,
                    fires: 0,
                    holds: 0,
                };
                at.table.report(mark);
            }
            Event::Accept { from, to, wire } => {
                if !self.nodes[to].up || !self.nodes[from].up {
                    return;
                }
                let (now, boot) = (self.nodes[to].local(self.now), self.nodes[from].boot);
                let link = self.nodes[to].table.name_link();
                match self.nodes[to].table.linked(now, from as u16, boot, link) {
                    Ok(old) => {
                        self.nodes[to].links.insert(wire, link);
                        self.nodes[to].wires.insert(link, (wire, from));
                        if let Some(&(old, _)) = old.and_then(|old| self.nodes[to].wires.get(&old))
                        {
                            self.hang_up(to, old, from);
                        }
                        let time = self.now + self.delay[to][from] * MS;
                        self.arrived.insert((wire, from), time);
                        self.at(time, Event::Linked { from, to, wire });
                    }
                    Err(_) => {
                        let time = self.now + self.delay[to][from] * MS;
                        self.at(time, Event::Hangup { to: from, wire });
                    }
                }
            }
            Event::Linked { from, to, wire } => {
                let (now, boot) = (self.nodes[from].local(self.now), self.nodes[to].boot);
                if let Some(&link) = self.nodes[from].links.get(&wire)
                    && self.open(from, to)
                    && self.nodes[from]
                        .table
                        .linked(now, to as u16, boot, link)
                        .is_err()
                {
                    self.hang_up(from, wire, to);
                }
            }
            Event::Bytes {
                to,
                wire,
                bytes,
                replay,
            } => {
                let Some(&link) = self.nodes[to].links.get(&wire) else {
                    return;
                };
                let other = self.nodes[to].wires[&link].1;
                if !self.nodes[to].up || !self.open(to, other) {
                    return;
                }
                let now = self.nodes[to].local(self.now);
                let before = self.nodes[to].table.refused();
                let outcome = self.nodes[to].table.received(now, link, &bytes);
                if replay {
                    self.replays += 1;
                    assert!(outcome.is_err(), "a replay was accepted");
                    let after = self.nodes[to].table.refused();
                    assert_eq!(
                        before.iter().sum::<u64>() + 1,
                        after.iter().sum::<u64>(),
                        "and not counted"
                    );
                }
                if outcome.is_err() {
                    self.hang_up(to, wire, other);
                }
            }
            Event::Hangup { to, wire } => {
                if let Some(link) = self.nodes[to].links.remove(&wire) {
                    self.nodes[to].wires.remove(&link);
                    let now = self.nodes[to].local(self.now);
                    self.nodes[to].table.closed(now, link);
                }
            }
        }
        for node in &self.nodes {
            assert!(node.links.len() < 2 * self.nodes.len(), "links grow");
        }
    }

    fn state(&self, node: usize, of: usize) -> State {
        let views = self.nodes[node]
            .table
            .views(self.nodes[node].local(self.now));
        views
            .iter()
            .find(|v| usize::from(v.node) == of)
            .unwrap()
            .state
    }

    /// Every stated drift against the truth; returns how many were stated.
    fn check_drift(&self) -> usize {
        let mut stated = 0;
        for (at, node) in self.nodes.iter().enumerate().filter(|n| n.1.up) {
            for view in node
                .table
                .views(node.local(self.now))
                .iter()
                .filter(|v| v.state == State::Alive)
            {
                let other = &self.nodes[usize::from(view.node)];
                if view.drift_ms.is_nan() {
                    continue;
                }
                stated += 1;
                // True drifts of the steps around the reported one; an overdue step bounds its drift from one side.
                let near = (view.step.min(node.step) - 6).max(0)..=view.step.max(node.step) + 1;
                let drifts = near.clone().filter_map(|s| {
                    Some((other.reached.get(&s)? - node.reached.get(&s)?) as f64 / 1e6)
                });
                let (low, high) = drifts.fold((f64::INFINITY, f64::NEG_INFINITY), |m, d| {
                    (m.0.min(d), m.1.max(d))
                });
                let waiting =
                    near.filter_map(|s| match (other.reached.get(&s), node.reached.get(&s)) {
                        (None, Some(mine)) => Some((self.now - mine) as f64 / 1e6),
                        (Some(theirs), None) => Some((theirs - self.now) as f64 / 1e6),
                        _ => None,
                    });
                let (low, high) = waiting.fold((low, high), |m, d| (m.0.min(d), m.1.max(d)));
                let inside =
                    view.drift_ms >= low - view.bound_ms && view.drift_ms <= high + view.bound_ms;
                assert!(
                    inside,
                    "{at} of {}: {} not in {low} .. {high} by {}",
                    view.node, view.drift_ms, view.bound_ms
                );
                assert!(
                    view.bound_ms < 60.0,
                    "the bound {} says nothing",
                    view.bound_ms
                );
            }
        }
        stated
    }
}

fn settings(node: usize, nodes: usize, boot: u64) -> Settings {
    Settings {
        node: node as u16,
        nodes: nodes as u16,
        full_mesh: 32,
        boot,
        heartbeat: HEARTBEAT,
        dead_after: DEAD_AFTER,
        expire_after: 10 * DEAD_AFTER,
    }
}

/// Start, then a crash or a partition, then its end.
fn one(seed: u64) -> (u64, usize) {
    let (kind, heartbeat) = match seed % 16 {
        0..4 => (Kind::Idle, 50 * MS),
        4 => (Kind::Ring, 50 * MS),
        _ => (Kind::Stepping, HEARTBEAT),
    };
    let mut world = World::new(seed, heartbeat, kind);
    let count = world.nodes.len();
    // An idle job's heartbeats are rare 2 s after its start.
    let start = if kind == Kind::Idle { 3000 } else { 1800 } * MS;
    world.run_until(start);
    for node in &world.nodes {
        let refused = node.table.refused()[Refusal::Identity as usize];
        assert_eq!(
            refused, 0,
            "seed {seed}: honest nodes were taken for others"
        );
    }
    let mut stated = world.check_drift();
    let victim = world.random.below(count as u64) as usize;
    let other = (victim + 1) % count;
    let crash = world.random.below(2) == 0;
    if crash {
        world.nodes[victim].up = false;
    } else {
        world.cut = vec![(victim.min(other), victim.max(other))];
    }
    // Suspicion takes up to 2 s with TCP's resends allowed for; then death in its configured time.
    world.run_until(start + 2050 * MS);
    assert!(
        matches!(world.state(other, victim), State::Suspect | State::Dead),
        "seed {seed}: {:?} after 2 s, crash {crash}",
        world.state(other, victim)
    );
    world.run_until(start + DEAD_AFTER + 500 * MS);
    let outcome = if kind == Kind::Ring && !crash {
        State::Suspect // others hear it
    } else {
        State::Dead
    };
    assert_eq!(
        world.state(other, victim),
        outcome,
        "seed {seed}: crash {crash}"
    );
    for node in (0..count).filter(|&n| n != victim && n != other) {
        assert_eq!(
            world.state(node, other),
            State::Alive,
            "seed {seed}: {node} gave up {other}"
        );
    }
    if crash {
        let (boot, now) = (world.random.below(u64::MAX), world.now);
        let node = &mut world.nodes[victim];
        node.boot = boot;
        node.origin += 5_000_000 * MS;
        let settings = Settings {
            heartbeat,
            full_mesh: kind.full_mesh(),
            ..settings(victim, count, boot)
        };
        node.table = Table::new(settings, node.local(now));
        node.links.clear();
        node.wires.clear();
        node.reached.clear();
        node.up = true;
    }
    world.cut.clear();
    let end = world.now + 3000 * MS;
    world.run_until(end);
    let back = (0..4).any(|_| {
        // A replay may just have taken a link down: one of a few moments has to show it up.
        let later = world.now + 300 * MS;
        let up = world.state(other, victim) == State::Alive
            && world.state(victim, other) == State::Alive;
        world.run_until(later);
        up
    });
    assert!(back, "seed {seed}: not back after the heal, crash {crash}");
    for node in &world.nodes {
        let lies = node.table.refused()[Refusal::Lie as usize];
        assert_eq!(lies, 0, "seed {seed}: honest nodes were taken for liars");
    }
    stated += world.check_drift();
    (world.replays, stated)
}

#[test]
fn ten_thousand_networks_keep_the_invariants() {
    let first = std::env::var("SIDEBAND_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(0);
    let (mut replays, mut stated) = (0, 0);
    for seed in first..first + 10_000 {
        let (r, s) = one(seed);
        replays += r;
        stated += s;
    }
    assert!(
        replays > 10_000 && stated > 10_000,
        "{replays} replays, {stated} drifts: too little was tried"
    );
}

fn beat(sequence: u64, beat: u64, sent: i64) -> Vec<u8> {
    let heartbeat = Heartbeat {
        beat,
        sent,
        echo_sent: -1,
        echo_received: -1,
        step: -1,
        step_at: -1,
        step_ns: 0,
        next_ms: 200,
        fill: 0.0,
        fires: 0,
        holds: 0,
    };
    frame(sequence, Body::Heartbeat(heartbeat))
}

fn frame(sequence: u64, body: Body) -> Vec<u8> {
    Frame { sequence, body }.encode()
}

#[test]
fn a_flood_and_a_lie_are_refused_and_counted() {
    let mut table = Table::new(settings(1, 3, 1), 0);
    let link = table.name_link();
    assert_eq!(table.linked(0, 0, 7, link), Ok(None));
    let flood = (0..1000).find_map(|n| {
        table
            .received(0, link, &beat(n, n + 1, n as i64))
            .err()
            .map(|e| (n, e))
    });
    assert_eq!(flood, Some((64, Refusal::Flood)));

    let second = table.name_link();
    assert_eq!(
        table.linked(100 * MS, 0, 8, second),
        Err(Refusal::Identity),
        "the id is in use"
    );
    assert_eq!(
        table.linked(100 * MS, 1, 8, second),
        Err(Refusal::Identity),
        "the id is ours"
    );
    assert_eq!(
        table.linked(100 * MS, 9, 8, second),
        Err(Refusal::Identity),
        "the id is nobody's"
    );
    table.closed(100 * MS, link);
    assert_eq!(table.linked(100 * MS, 0, 8, second), Ok(None));
    assert_eq!(table.received(100 * MS, second, &beat(0, 5, 10)), Ok(()));
    assert_eq!(
        table.received(150 * MS, second, &beat(1, 5, 20)),
        Err(Refusal::Lie),
        "the beat does not grow"
    );
    assert_eq!(table.refused()[Refusal::Identity as usize], 3);
    assert_eq!(table.refused()[Refusal::Lie as usize], 1);
}

#[test]
fn ten_minutes_at_one_percent_loss_raise_no_suspicion() {
    let mut lost = [0; 2];
    for seed in 0..16 {
        let (kind, missed) = [(Kind::Stepping, 200.0), (Kind::Idle, 450.0)][seed as usize % 2];
        let mut world = World::new(seed, 50 * MS, kind);
        world.loss = 100;
        world.run_until(2000 * MS);
        for moment in 20..6000 {
            world.run_until(moment * 100 * MS);
            for node in &world.nodes {
                for view in node.table.views(node.local(world.now)) {
                    assert_eq!(
                        view.state,
                        State::Alive,
                        "seed {seed} at {} s: {view:?}",
                        moment / 10
                    );
                    lost[seed as usize % 2] += u64::from(view.silence_ms > missed);
                }
            }
        }
    }
    // Stepping, then idle, whose heartbeats are a fifth as many.
    assert!(
        lost[0] > 1000 && lost[1] > 40,
        "{lost:?}: nothing was lost, so nothing was tried"
    );
}

#[test]
fn who_is_cut_off_from_its_neighbours_is_found_by_probes() {
    for seed in 0..40 {
        let mut world = World::new(seed, 50 * MS, Kind::Ring);
        let count = world.nodes.len();
        if count == 7 {
            continue; // 3 is 7 - 4: all are linked
        }
        let far = |a: usize, b: usize| {
            !a.abs_diff(b).is_power_of_two() && !(count - a.abs_diff(b)).is_power_of_two()
        };
        world.run_until(2000 * MS);
        let alone = world.random.below(count as u64) as usize;
        world.cut = (0..count)
            .filter(|&n| n != alone && !far(n, alone))
            .map(|n| (n.min(alone), n.max(alone)))
            .collect();
        let mut suspected = false;
        for _ in 0..200 {
            let later = world.now + 100 * MS;
            world.run_until(later);
            for node in (0..count).filter(|&n| n != alone) {
                for (a, b) in [(node, alone), (alone, node)] {
                    let state = world.state(a, b);
                    assert_ne!(state, State::Dead, "seed {seed}: {a} gave up {b}");
                    suspected |= state == State::Suspect;
                }
            }
        }
        assert!(suspected, "seed {seed}: nothing was cut");
        // And without the last ways to it, it is dead for all.
        world.cut = (0..count)
            .filter(|&n| n != alone)
            .map(|n| (n.min(alone), n.max(alone)))
            .collect();
        let end = world.now + 12_000 * MS;
        world.run_until(end);
        for node in (0..count).filter(|&n| n != alone) {
            assert_eq!(world.state(node, alone), State::Dead, "seed {seed}: {node}");
        }
    }
}

/// Node 20 of a ring of 40, at time 0; those that it is linked to, and those that it is not.
fn far_and_near() -> (Table, Vec<u16>, Vec<u16>) {
    let settings = Settings {
        heartbeat: 50 * MS,
        ..settings(20, 40, 1)
    };
    let (near, far) = (0..40)
        .filter(|&n| n != 20)
        .partition(|n: &u16| n.abs_diff(20).is_power_of_two());
    (Table::new(settings, 0), near, far)
}

#[test]
fn every_far_node_is_probed_once_before_one_is_again() {
    let (mut table, near, far) = far_and_near();
    let mut rounds = [Vec::new(), Vec::new(), Vec::new()];
    let mut now = 0;
    let mut probed = 0;
    while probed < 3 * far.len() {
        now += 100 * MS;
        for action in table.tick(now) {
            if let Action::Dial { node, .. } = action
                && !near.contains(&node)
            {
                rounds[probed / far.len()].push(node);
                probed += 1;
            }
        }
        assert!(now < 200_000 * MS, "{probed} probes only");
    }
    assert_ne!(rounds[0], rounds[1], "the order is drawn anew");
    for round in &mut rounds {
        round.sort();
        assert_eq!(*round, far);
    }
}

#[test]
fn probes_are_few_end_by_themselves_and_take_nobodys_place() {
    let (mut table, near, far) = far_and_near();
    let mut admitted = Vec::new();
    for &node in &far {
        let link = table.name_link();
        match table.linked(0, node, 7, link) {
            Ok(old) => admitted.push((node, link, old)),
            Err(why) => assert_eq!(why, Refusal::Busy, "{node}"),
        }
    }
    assert_eq!(admitted.len(), MAX_PROBES);
    let lower: Vec<u16> = near.iter().copied().filter(|&n| n < 20).collect();
    for &node in &lower {
        let link = table.name_link();
        assert_eq!(table.linked(0, node, 7, link), Ok(None), "{node}");
    }
    // Who is heard keeps its id, against another boot with a count; a neighbour that should wait to be dialled too.
    let (node, link, _) = admitted[0];
    assert_eq!(table.received(0, link, &beat(0, 1, 1)), Ok(()));
    let other = table.name_link();
    assert_eq!(table.linked(1, node, 8, other), Err(Refusal::Identity));
    assert_eq!(table.linked(1, node, 7, other), Err(Refusal::Busy));
    assert_eq!(table.linked(1, 21, 7, other), Err(Refusal::Identity));
    // Their places taken, this node still probes.
    let dialled = |actions: &[Action]| {
        actions
            .iter()
            .any(|a| matches!(a, Action::Dial { node, .. } if far.contains(node)))
    };
    let mut probed = false;
    // All probes are over in a second, whatever their nodes say; the neighbours' links stay.
    let mut closed = Vec::new();
    for n in 1..=10 {
        let now = n * 100 * MS;
        let _ = table.received(now, link, &beat(n as u64, n as u64 + 1, now));
        let actions = table.tick(now);
        probed |= dialled(&actions);
        for action in actions {
            if let Action::Close { link, .. } = action {
                closed.push(link);
            }
        }
    }
    assert!(admitted.iter().all(|(_, link, _)| closed.contains(link)));
    assert!(probed);
    assert_eq!(
        table.linked(1000 * MS, far[20], 7, other),
        Ok(None),
        "no room again"
    );
    // While it counts as alive, nobody comes in its name with another boot.
    let again = table.name_link();
    assert_eq!(
        table.linked(1000 * MS, node, 8, again),
        Err(Refusal::Identity)
    );
    assert_eq!(table.linked(1000 * MS, node, 7, again), Ok(None));
    // The node that was heard is not taken for dead because its probe is over.
    let state = |table: &Table| {
        table
            .views(1000 * MS)
            .iter()
            .find(|v| v.node == node)
            .unwrap()
            .state
    };
    assert_eq!(state(&table), State::Alive);
}

#[test]
fn neighbours_are_asked_about_a_suspect_and_probe_it_or_say_that_they_hear_it() {
    let (mut table, near, far) = far_and_near();
    // The lower neighbours dial; 19 then falls silent.
    let lower: Vec<u16> = near.iter().copied().filter(|&n| n < 20).collect();
    let mut links = HashMap::new();
    for &node in &lower {
        let link = table.name_link();
        assert_eq!(table.linked(0, node, 7, link), Ok(None));
        links.insert(link, node);
    }
    let mut asked = Vec::new();
    for n in 0..60u64 {
        let now = n as i64 * 50 * MS;
        for (&link, &node) in &links {
            if node != 19 || n < 5 {
                assert_eq!(table.received(now, link, &beat(n, n + 1, now + 1)), Ok(()));
            }
        }
        for action in table.tick(now) {
            if let Action::Send { link, bytes } = action
                && let Body::Probe(about) = Frame::decode(&bytes).unwrap().body
            {
                asked.push((now, links[&link], about));
            }
        }
    }
    let first: Vec<_> = asked.iter().filter(|a| a.0 == asked[0].0).collect();
    assert_eq!(first.len(), 3, "{asked:?}");
    assert!(first.iter().all(|a| a.1 != 19 && a.2 == 19), "{asked:?}");

    // Asked about a node without a link: it is dialled at the next turn of the clock, not a period later.
    let (&link, _) = links.iter().find(|(_, node)| **node == 18).unwrap();
    let now = 60 * 50 * MS;
    assert_eq!(
        table.received(now, link, &frame(60, Body::Probe(far[7]))),
        Ok(())
    );
    let dialled = |actions: &[Action], whom: u16| {
        actions
            .iter()
            .any(|a| matches!(a, Action::Dial { node, .. } if *node == whom))
    };
    assert!(dialled(&table.tick(now + MS), far[7]));
    // About one that is heard: the next gossip begins with it.
    assert_eq!(
        table.received(now, link, &frame(61, Body::Probe(16))),
        Ok(())
    );
    let gossip = table.tick(now + 60 * MS).into_iter().find_map(|a| match a {
        Action::Send { bytes, .. } => match Frame::decode(&bytes).unwrap().body {
            Body::Gossip(rumours) => Some(rumours[0].node),
            _ => None,
        },
        _ => None,
    });
    assert_eq!(gossip, Some(16));
    // About itself, about us, about nobody, and where everybody is linked: a lie.
    for (k, about) in [18, 20, 40].into_iter().enumerate() {
        let lie = frame(62 + k as u64, Body::Probe(about));
        assert_eq!(
            table.received(now, link, &lie),
            Err(Refusal::Lie),
            "{about}"
        );
    }
    let mut small = Table::new(settings(1, 3, 1), 0);
    let link = small.name_link();
    assert_eq!(small.linked(0, 0, 7, link), Ok(None));
    assert_eq!(
        small.received(0, link, &frame(0, Body::Probe(2))),
        Err(Refusal::Lie)
    );
}

#[test]
fn only_a_beat_of_the_same_boot_vouches_for_a_silent_neighbour() {
    for (boot, outcome) in [(7, State::Suspect), (8, State::Dead)] {
        let (mut table, _, _) = far_and_near();
        let (silent, other) = (table.name_link(), table.name_link());
        assert_eq!(table.linked(0, 19, 7, silent), Ok(None));
        assert_eq!(table.linked(0, 18, 7, other), Ok(None));
        assert_eq!(table.received(0, silent, &beat(0, 1, 1)), Ok(()));
        let mut now = 0;
        for n in 0..80 {
            now = n as i64 * 50 * MS;
            let rumour = Rumour {
                node: 19,
                boot,
                beat: 2 + n,
                step: -1,
            };
            let _ = table.tick(now);
            assert_eq!(
                table.received(now, other, &beat(2 * n, n + 1, now + 1)),
                Ok(())
            );
            let gossip = frame(2 * n + 1, Body::Gossip(vec![rumour]));
            assert_eq!(table.received(now, other, &gossip), Ok(()));
        }
        let views = table.views(now);
        let view = views.iter().find(|v| v.node == 19).unwrap();
        assert_eq!(view.state, outcome, "boot {boot}");
    }
}

#[test]
fn a_far_suspect_is_probed_in_every_period() {
    let (mut table, _, far) = far_and_near();
    let link = table.name_link();
    assert_eq!(table.linked(0, 19, 7, link), Ok(None));
    let mut dialled = Vec::new();
    for n in 0..240 {
        let now = n as i64 * 50 * MS;
        assert_eq!(
            table.received(now, link, &beat(2 * n, n + 1, now + 1)),
            Ok(())
        );
        // The last that anybody heard of it was in the first second.
        let rumour = Rumour {
            node: far[3],
            boot: 9,
            beat: 1 + n.min(20),
            step: -1,
        };
        let gossip = frame(2 * n + 1, Body::Gossip(vec![rumour]));
        assert_eq!(table.received(now, link, &gossip), Ok(()));
        for action in table.tick(now) {
            if let Action::Dial { node, link } = action {
                if node == far[3] {
                    dialled.push(now / MS);
                }
                table.closed(now, link); // nobody there
            }
        }
        let views = table.views(now);
        let view = views.iter().find(|v| v.node == far[3]).unwrap();
        if view.state == State::Suspect {
            let other = table.name_link();
            let taken = table.linked(now, far[3], 8, other);
            assert_eq!(taken, Err(Refusal::Identity), "it may still be there");
        }
        if view.state == State::Dead {
            let while_suspect = dialled.iter().filter(|&&at| at > 4500).count();
            assert!(
                while_suspect >= 2,
                "dead at {} ms, dialled at {dialled:?}",
                now / MS
            );
            return;
        }
    }
    panic!("not dead after 12 s");
}

#[test]
fn of_many_far_suspects_others_are_probed_each_time() {
    let (mut table, near, far) = far_and_near();
    let gossip = |n: u64, age: u64| {
        let rumours = far.iter().map(|&node| Rumour {
            node,
            boot: 9,
            beat: 1 + age,
            step: -1,
        });
        frame(2 * n + 1, Body::Gossip(rumours.collect()))
    };
    let link = table.name_link();
    assert_eq!(table.linked(0, 19, 7, link), Ok(None));
    let mut dialled = Vec::new();
    for n in 0..200u64 {
        let now = n as i64 * 50 * MS;
        assert_eq!(
            table.received(now, link, &beat(2 * n, n + 1, now + 1)),
            Ok(())
        );
        assert_eq!(table.received(now, link, &gossip(n, n.min(20))), Ok(()));
        for action in table.tick(now) {
            if let Action::Dial { node, link } = action {
                dialled.push((now / MS, node));
                table.closed(now, link);
            }
        }
    }
    // 29 of them in the four periods or so between suspicion and death: not the same few each time.
    let mut whom: Vec<u16> = dialled
        .iter()
        .filter(|d| d.0 > 4000 && !near.contains(&d.1))
        .map(|d| d.1)
        .collect();
    whom.sort();
    whom.dedup();
    assert!(
        whom.len() > 9,
        "{} of {}: {dialled:?}",
        whom.len(),
        far.len()
    );
}

#[test]
fn strangers_that_hold_their_places_do_not_stop_our_own_probes() {
    let (mut table, near, far) = far_and_near();
    for n in 0..10 {
        table.tick(n * 100 * MS);
    }
    for &node in far.iter().rev().take(MAX_PROBES) {
        let link = table.name_link();
        assert_eq!(table.linked(950 * MS, node, 7, link), Ok(None));
    }
    let dials = |actions: Vec<Action>| {
        let far = |a: &Action| matches!(a, Action::Dial { node, .. } if !near.contains(node));
        actions.iter().any(far)
    };
    assert!((10..13).any(|n| dials(table.tick(n * 100 * MS))));
}

/// Heartbeats of node 0 to node 1 of three, 50 ms apart, with gossip about node 2 in between where there is some.
fn heard_with_gossip(
    table: &mut Table,
    link: Link,
    beats: u64,
    rumour: Option<Rumour>,
) -> Option<Refusal> {
    let mut sequence = 0;
    for n in 0..beats {
        let now = n as i64 * 50 * MS;
        table.tick(now);
        if let Err(why) = table.received(now, link, &beat(sequence, n + 1, now + 1)) {
            return Some(why);
        }
        sequence += 1;
        if let Some(rumour) = rumour {
            let grown = Rumour {
                beat: rumour.beat + n,
                ..rumour
            };
            if let Err(why) = table.received(now, link, &frame(sequence, Body::Gossip(vec![grown])))
            {
                return Some(why);
            }
            sequence += 1;
        }
    }
    None
}

#[test]
fn in_a_full_mesh_nobody_speaks_of_a_third() {
    for (nodes, told) in [
        (3, Some(Refusal::Lie)),
        (32, Some(Refusal::Lie)),
        (33, None),
        (40, None),
    ] {
        let mut table = Table::new(
            Settings {
                heartbeat: 50 * MS,
                ..settings(1, nodes, 1)
            },
            0,
        );
        let link = table.name_link();
        assert_eq!(table.linked(0, 0, 7, link), Ok(None));
        let rumour = Rumour {
            node: 2,
            boot: 9,
            beat: 5,
            step: -1,
        };
        assert_eq!(
            heard_with_gossip(&mut table, link, 3, Some(rumour)),
            told,
            "{nodes} nodes"
        );
        assert_eq!(
            table.refused()[Refusal::Lie as usize],
            u64::from(told.is_some()),
            "{nodes} nodes"
        );
    }
}

/// A node that left (with a goodbye, or in silence) and that a host with the key goes on to praise.
#[test]
fn a_node_that_left_a_full_mesh_is_dead_whatever_another_says() {
    for goodbye in [true, false] {
        let mut table = Table::new(
            Settings {
                heartbeat: 50 * MS,
                ..settings(2, 3, 1)
            },
            0,
        );
        let (left, liar) = (table.name_link(), table.name_link());
        assert_eq!(table.linked(0, 1, 9, left), Ok(None));
        assert_eq!(table.received(0, left, &beat(0, 5, 1)), Ok(()));
        if goodbye {
            assert_eq!(table.received(1, left, &frame(1, Body::Bye)), Ok(()));
        }
        table.closed(1, left);
        assert_eq!(table.linked(0, 0, 7, liar), Ok(None));
        let rumour = Rumour {
            node: 1,
            boot: 9,
            beat: 50,
            step: 3,
        };
        assert_eq!(
            heard_with_gossip(&mut table, liar, 3, Some(rumour)),
            Some(Refusal::Lie)
        );
        let end = DEAD_AFTER + 200 * MS;
        for now in (0..=end).step_by(100 * MS as usize) {
            table.tick(now);
        }
        assert_eq!(table.views(end)[1].state, State::Dead, "goodbye {goodbye}");
    }
}

/// Heartbeats, then silence: at each moment the state beside the reported phi is the one that this phi decides.
#[test]
fn the_phi_that_is_reported_is_the_phi_that_decides() {
    // (nodes, heartbeat, node that falls silent): linked ones at three paces, and one that is only heard of.
    for (nodes, heartbeat, silent) in [
        (3, 50, 0u16),
        (3, 500, 0),
        (3, 2000, 0),
        (40, 50, 4),
        (40, 200, 4),
    ] {
        let heartbeat = heartbeat * MS;
        let dead_after = 60_000 * MS;
        let mut table = Table::new(
            Settings {
                heartbeat,
                dead_after,
                ..settings(1, nodes, 1)
            },
            0,
        );
        let link = table.name_link();
        let far = silent != 0;
        assert_eq!(table.linked(0, 0, 7, link), Ok(None));
        let (mut sequence, mut beats, mut suspect_at, mut alive) = (0, 0, None, 0);
        let mut next = 0;
        for now in (0..200_000 * MS).step_by(25 * MS as usize) {
            if now >= next && (far || beats < 20) {
                next += heartbeat;
                beats += 1;
                assert_eq!(
                    table.received(now, link, &beat(sequence, beats, now + 1)),
                    Ok(())
                );
                sequence += 1;
                if far && beats <= 20 {
                    let rumours = vec![Rumour {
                        node: silent,
                        boot: 9,
                        beat: beats,
                        step: -1,
                    }];
                    assert_eq!(
                        table.received(now, link, &frame(sequence, Body::Gossip(rumours))),
                        Ok(())
                    );
                    sequence += 1;
                }
            }
            for action in table.tick(now) {
                if let Action::Dial { link, .. } = action {
                    table.closed(now, link);
                }
            }
            let views = table.views(now);
            let view = views.iter().find(|v| v.node == silent).unwrap();
            match view.state {
                State::Alive => assert!(view.phi <= PHI_SUSPECT, "{heartbeat}: alive at {view:?}"),
                State::Suspect => {
                    assert!(view.phi > PHI_SUSPECT, "{heartbeat}: suspect at {view:?}")
                }
                State::Unknown => assert!(view.phi.is_nan()),
                State::Dead => {}
            }
            alive += u32::from(view.state == State::Alive);
            if view.state == State::Suspect && suspect_at.is_none() {
                suspect_at = Some(view.silence_ms);
            }
        }
        assert!(
            alive > 40 && suspect_at.is_some(),
            "{nodes} {heartbeat}: {alive} alive, suspect {suspect_at:?}"
        );
    }
}

#[test]
fn a_suspects_drift_is_not_stated() {
    let mut table = Table::new(
        Settings {
            heartbeat: 50 * MS,
            ..settings(1, 2, 1)
        },
        0,
    );
    let link = table.name_link();
    assert_eq!(table.linked(0, 0, 7, link), Ok(None));
    let mut stated = 0;
    for n in 0..40i64 {
        let now = n * 50 * MS;
        table.tick(now);
        table.report(Mark {
            step: n,
            at: now,
            duration: 1,
            fill: 0.0,
            fires: 0,
            holds: 0,
        });
        if n < 10 {
            // Its clock is ours, and our last heartbeat is echoed at once.
            let Body::Heartbeat(h) = Frame::decode(&beat(0, n as u64 + 1, now)).unwrap().body
            else {
                unreachable!()
            };
            let h = Heartbeat {
                echo_sent: now - 50 * MS.min(n * 50 * MS) - 1,
                echo_received: now - 1,
                step: n,
                step_at: now,
                ..h
            };
            let _ = table.received(now, link, &frame(n as u64, Body::Heartbeat(h)));
        }
        let view = table.views(now)[0];
        stated += u32::from(!view.drift_ms.is_nan());
        assert!(
            view.state == State::Alive || view.drift_ms.is_nan(),
            "{view:?}"
        );
    }
    assert!(stated > 5, "no drift was ever stated");
    assert_eq!(table.views(2000 * MS)[0].state, State::Suspect);
}

/// A beat count that runs far ahead, once: about a far node, and about a neighbour that others vouch for.
#[test]
fn a_beat_count_far_ahead_is_not_believed_and_true_ones_still_count() {
    let (mut table, _, far) = far_and_near();
    let link = table.name_link();
    assert_eq!(table.linked(0, 19, 7, link), Ok(None));
    let silent = table.name_link();
    assert_eq!(table.linked(0, 18, 9, silent), Ok(None));
    assert_eq!(table.received(0, silent, &beat(0, 1, 1)), Ok(()));
    table.closed(1, silent);
    let victim = far[3];
    let tell = |table: &mut Table, n: u64, count: u64| {
        let now = n as i64 * 50 * MS;
        for action in table.tick(now) {
            if let Action::Dial { link, .. } = action {
                table.closed(now, link); // probes do not get through
            }
        }
        assert_eq!(
            table.received(now, link, &beat(2 * n, n + 1, now + 1)),
            Ok(())
        );
        let rumours = [victim, 18].map(|node| Rumour {
            node,
            boot: 9,
            beat: count,
            step: -1,
        });
        assert_eq!(
            table.received(now, link, &frame(2 * n + 1, Body::Gossip(rumours.to_vec()))),
            Ok(())
        );
    };
    for n in 0..200 {
        let lie = n == 20;
        tell(&mut table, n, if lie { u64::MAX } else { 2 + n });
    }
    assert_eq!(table.refused()[Refusal::Lie as usize], 2);
    let now = 199 * 50 * MS;
    let views = table.views(now);
    let state = |node: u16| views.iter().find(|v| v.node == node).unwrap().state;
    assert_eq!(state(victim), State::Alive);
    assert_eq!(state(18), State::Suspect, "others vouch for it");
}

/// A node's monotonic clock leaps a day ahead while it runs, as when a virtual machine is moved.
#[test]
fn a_clock_that_leaps_makes_nobody_dead_and_drift_is_true_again() {
    let mut stated = 0;
    for seed in 0..60 {
        let kind = [Kind::Stepping, Kind::Idle, Kind::Ring][seed as usize % 3];
        let heartbeat = if kind == Kind::Stepping {
            HEARTBEAT
        } else {
            50 * MS
        };
        let mut world = World::new(seed, heartbeat, kind);
        world.run_until(4000 * MS);
        let count = world.nodes.len();
        let leaper = world.random.below(count as u64) as usize;
        let leap = [86_400_000, 3_600_000, 30_000][world.random.below(3) as usize] * MS;
        world.nodes[leaper].origin += leap;
        for moment in 0..80 {
            world.run_until((4000 + 100 * moment) * MS);
            for (a, b) in (0..count)
                .flat_map(|a| (0..count).map(move |b| (a, b)))
                .filter(|(a, b)| a != b)
            {
                let state = world.state(a, b);
                assert_ne!(
                    state,
                    State::Dead,
                    "seed {seed}: {a} gave up {b} after the leap of {leaper}"
                );
            }
            if moment < 11 {
                continue; // five heartbeats; after eight exchanges nothing from before would be left anyway
            }
            for node in &world.nodes {
                // Steps are apart by tenths of a second, and the leap is 30 s at least.
                for view in node.table.views(node.local(world.now)) {
                    stated += u32::from(!view.drift_ms.is_nan());
                    assert!(
                        view.drift_ms.is_nan() || view.drift_ms.abs() < 2000.0,
                        "seed {seed}, {moment}: {view:?}"
                    );
                }
            }
        }
        for (a, b) in (0..count)
            .flat_map(|a| (0..count).map(move |b| (a, b)))
            .filter(|(a, b)| a != b)
        {
            assert_eq!(world.state(a, b), State::Alive, "seed {seed}: {a} of {b}");
        }
    }
    assert!(stated > 1000, "{stated} drifts: too little was tried");
}

/// A peer that was heard just before this node's step is not late yet, and not early either.
#[test]
fn nothing_is_stated_of_a_first_step_before_anybody_is_late_at_it() {
    let mut table = Table::new(settings(1, 2, 1), 0);
    let link = table.name_link();
    assert_eq!(table.linked(0, 0, 7, link), Ok(None));
    table.tick(0);
    let Body::Heartbeat(h) = Frame::decode(&beat(0, 1, 20 * MS)).unwrap().body else {
        unreachable!()
    };
    let echo = Heartbeat {
        echo_sent: 0,
        echo_received: 10 * MS,
        ..h
    };
    let bytes = frame(0, Body::Heartbeat(echo));
    assert_eq!(table.received(30 * MS, link, &bytes), Ok(()));
    table.report(Mark {
        step: 0,
        at: 40 * MS,
        duration: 1,
        fill: 0.0,
        fires: 0,
        holds: 0,
    });
    assert!(table.views(40 * MS)[0].drift_ms.is_nan());
    // Heard once more without the step: late by the time since.
    let later = Heartbeat {
        beat: 2,
        sent: 90 * MS,
        ..echo
    };
    let bytes = frame(1, Body::Heartbeat(later));
    assert_eq!(table.received(100 * MS, link, &bytes), Ok(()));
    let view = table.views(100 * MS)[0];
    assert!((view.drift_ms - 50.0).abs() <= view.bound_ms, "{view:?}");
}
