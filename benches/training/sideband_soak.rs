//! Does the sideband last? 64 real agents, each a process, for an hour under faults: memory and descriptors stay flat, and
//! nobody who is there is given up.
//!
//! `cargo bench --bench sideband_soak -- --minutes 60 --out benches/results/NAME.json`
//!
//! Every few seconds one of: a node is killed and comes back on its port, leaves and comes back at once, is stopped
//! (SIGSTOP, as a suspended machine) and goes on; a node or one pair is cut off; a node's link is slow; strangers flood a
//! port. A third of the nodes is never killed: their memory and descriptors are measured over the whole time. The result is
//! written anew each minute, so a run that was cut off has one too, and says how long it ran.

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tsugi_kpool::sideband::link::{Ending, Refusal};
use tsugi_kpool::sideband::node::{Agent, Bound, Config};
use tsugi_kpool::sideband::peer::State;
use tsugi_kpool::sideband::session::Key;

const NODES: usize = 64;
/// Nodes below this one are never killed, stopped or restarted.
const STEADY: usize = 24;
/// Nodes from this one on are reached through proxies that can cut and delay.
const PROXIED: usize = 56;
/// Below the ports that the system hands out by itself.
const PORT: u16 = 21000;
const HEARTBEAT_MS: u64 = 500;
const DEAD_AFTER_MS: u64 = 10_000;
/// A node that is only heard of is given up later by this: 60 heartbeats.
const FAR_MS: u64 = 60 * HEARTBEAT_MS;
/// Who was disturbed may be given up until then, and everybody knows the truth again after it.
const SETTLE_MS: u64 = DEAD_AFTER_MS + FAR_MS + 15_000;

/// All connect for the first time: nothing is judged and no fault made before.
const WARM_UP_MS: u64 = 60_000;

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_millis() as u64
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|a| a == "--agent") {
        return run_agent(arguments[at + 1].parse().unwrap());
    }
    let value = |name: &str| {
        let at = arguments.iter().position(|a| a == name)?;
        arguments.get(at + 1).cloned()
    };
    let Some(minutes) = value("--minutes") else {
        return println!(
            "sideband soak: not run without a time: cargo bench --bench sideband_soak -- --minutes 60"
        );
    };
    let minutes: f64 = minutes.parse().expect("--minutes N");
    let out = value("--out").unwrap_or_else(|| "/dev/stdout".into());
    Soak::start().run(minutes, &out);
}

// ---- one agent, in a process of its own ---------------------------------------------------------------------------

fn address(node: usize) -> String {
    format!("127.0.0.1:{}", PORT + node as u16)
}

/// As node `node` reaches `other`: directly, or through the proxy in front of it.
fn reached_at(node: usize, other: usize) -> String {
    let proxied = node >= PROXIED || other >= PROXIED;
    address(other + if proxied { 100 } else { 0 })
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn processor_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) * 10
}

/// Prints `up`, then `state TIME PEER STATE` for each change, `stall TIME MS` when it did not run, and
/// `sample TIME RSS FDS THREADS CPU REFUSED CLOSED` every 10 s; ends with a goodbye when a line or the end comes in.
fn run_agent(node: usize) {
    let bound = match Bound::listen(&address(node)) {
        Ok(bound) => bound,
        Err(error) => return println!("failed {error}"),
    };
    let config = Config {
        node: node as u16,
        peers: (0..NODES).map(|other| reached_at(node, other)).collect(),
        key: Key::new([3; 32]),
        job: 1,
        epoch: 0,
        heartbeat_ms: HEARTBEAT_MS,
        dead_after_ms: DEAD_AFTER_MS,
        expire_after_ms: 60_000,
    };
    let agent = Agent::start(bound, config).unwrap();
    println!("up");
    let (ended, end) = mpsc::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_line(&mut String::new());
        let _ = ended.send(());
    });
    let mut states = [State::Unknown; NODES];
    let mut last = Instant::now();
    for turn in 0u64.. {
        let over =
            end.recv_timeout(Duration::from_millis(100)) != Err(mpsc::RecvTimeoutError::Timeout);
        if over {
            break;
        }
        let waited = last.elapsed().as_millis();
        last = Instant::now();
        if waited > 1000 {
            println!("stall {} {waited}", now_ms());
        }
        if turn.is_multiple_of(10) {
            agent.report_step(turn as i64 / 10, 1000.0, 0.5, 0, 0);
        }
        let (views, counts) = agent.snapshot();
        for view in &views {
            let state = &mut states[usize::from(view.node)];
            if *state != view.state {
                *state = view.state;
                println!("state {} {} {:?}", now_ms(), view.node, view.state);
            }
        }
        if turn % 100 == 99 {
            let count = |folder: &str| std::fs::read_dir(folder).unwrap().count();
            println!(
                "sample {} {} {} {} {} {} {}",
                now_ms(),
                resident_kib(),
                count("/proc/self/fd"),
                count("/proc/self/task"),
                processor_ms(),
                list(&counts.refused),
                list(&counts.closed)
            );
        }
    }
    println!("stopped {}", agent.stop());
}

fn list(values: &[u64]) -> String {
    let each: Vec<String> = values.iter().map(u64::to_string).collect();
    each.join(",")
}

// ---- the links that can be cut and slow ---------------------------------------------------------------------------

#[derive(Default)]
struct Links {
    /// Nodes, and pairs with the lower node first, whose bytes wait.
    isolated: HashSet<usize>,
    cut: HashSet<(usize, usize)>,
    /// Nodes whose bytes come later.
    slow: HashMap<usize, Duration>,
}

type Shared = Arc<Mutex<Links>>;

fn proxy(node: usize, links: Shared) {
    let listener = TcpListener::bind(address(node + 100)).unwrap();
    for stream in listener.incoming() {
        let (Ok(stream), links) = (stream, Arc::clone(&links)) else {
            continue;
        };
        small_thread(move || connect(node, stream, links));
    }
}

fn small_thread(work: impl FnOnce() + Send + 'static) {
    let _ = std::thread::Builder::new().stack_size(64 << 10).spawn(work);
}

/// Reads who dials (`from` of the opening), then carries both ways.
fn connect(to: usize, mut dialler: TcpStream, links: Shared) {
    let mut first = [0; 36];
    if dialler.read_exact(&mut first).is_err() {
        return;
    }
    let from = usize::from(u16::from_le_bytes([first[24], first[25]]));
    wait_for(&links, from, to);
    let Ok(mut acceptor) = TcpStream::connect(address(to)) else {
        return;
    };
    let _ = (dialler.set_nodelay(true), acceptor.set_nodelay(true));
    if acceptor.write_all(&first).is_err() {
        return;
    }
    let (Ok(back), Ok(there)) = (acceptor.try_clone(), dialler.try_clone()) else {
        return;
    };
    let shared = Arc::clone(&links);
    small_thread(move || carry(back, there, shared, from, to));
    carry(dialler, acceptor, links, from, to);
}

fn wait_for(links: &Shared, from: usize, to: usize) {
    let slow = |l: &Links| l.slow.get(&from).or(l.slow.get(&to)).copied();
    let late = slow(&links.lock().unwrap());
    if let Some(late) = late {
        sleep(late);
    }
    let waits = |l: &Links| {
        let pair = (from.min(to), from.max(to));
        l.cut.contains(&pair) || l.isolated.contains(&from) || l.isolated.contains(&to)
    };
    while waits(&links.lock().unwrap()) {
        sleep(Duration::from_millis(50));
    }
}

fn carry(mut source: TcpStream, mut sink: TcpStream, links: Shared, from: usize, to: usize) {
    let mut chunk = [0; 8192];
    while let Ok(count @ 1..) = source.read(&mut chunk) {
        wait_for(&links, from, to);
        if sink.write_all(&chunk[..count]).is_err() {
            break;
        }
    }
    let _ = (
        source.shutdown(Shutdown::Both),
        sink.shutdown(Shutdown::Both),
    );
}

/// Strangers: 2,000 connections that say nothing, too much, or what is no handshake.
fn flood(node: usize) {
    let mut held = Vec::new();
    for n in 0..2000u32 {
        let Ok(mut stream) = TcpStream::connect(address(node)) else {
            continue;
        };
        let bytes = [&[0x52, 0][..], &n.to_le_bytes().repeat(20), &[0; 2]].concat();
        let _ = stream.write_all(&bytes[..(n as usize % 3) * 42]);
        held.push(stream);
        if held.len() > 100 {
            held.remove(0);
        }
        sleep(Duration::from_millis(2));
    }
}

// ---- the faults ---------------------------------------------------------------------------------------------------

#[derive(Clone, Copy)]
enum Kind {
    Kill,
    Leave,
    Stop,
    Isolate,
    CutPair,
    Slow,
    Flood,
}

const KINDS: [Kind; 7] = [
    Kind::Kill,
    Kind::Leave,
    Kind::Stop,
    Kind::Isolate,
    Kind::CutPair,
    Kind::Slow,
    Kind::Flood,
];

impl Kind {
    /// Others may rightly give the node up.
    fn excuses(self) -> bool {
        matches!(self, Kind::Kill | Kind::Leave | Kind::Stop | Kind::Isolate)
    }
}

#[derive(Clone, Copy)]
struct Fault {
    kind: Kind,
    node: usize,
    /// The other end of a pair that is cut.
    other: usize,
    start: u64,
    end: u64,
    over: bool,
}

struct Node {
    child: Child,
    /// What this node thinks of the others.
    states: [State; NODES],
    /// Until then it may have been starved by the machine.
    starved_until: u64,
    samples: Vec<Sample>,
}

#[derive(Clone, Copy)]
struct Sample {
    rss_kib: u64,
    fds: u64,
    threads: u64,
    cpu_ms: u64,
}

/// A line of an agent: its node, its process, and what it printed.
struct Said(usize, u32, String);

#[derive(Default)]
struct Counts {
    faults: HashMap<&'static str, u64>,
    deaths: u64,
    false_deaths: Vec<String>,
    deaths_while_starved: u64,
    false_suspicions: u64,
    restarts: u64,
    restarts_that_failed: Vec<String>,
    stops_that_failed: u64,
    checks: u64,
    wrong_after_settling: Vec<String>,
    stalls: u64,
    longest_stall_ms: u64,
}

struct Soak {
    nodes: Vec<Node>,
    links: Shared,
    faults: Vec<Fault>,
    said: mpsc::Receiver<Said>,
    tell: mpsc::Sender<Said>,
    counts: Counts,
    refused: HashMap<usize, (String, String)>,
    started: u64,
    random: u64,
    minutes: Vec<String>,
}

fn spawn(node: usize, tell: &mpsc::Sender<Said>) -> Node {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--agent", &node.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (lines, tell, pid) = (child.stdout.take().unwrap(), tell.clone(), child.id());
    small_thread(move || {
        for line in BufReader::new(lines).lines().map_while(Result::ok) {
            let _ = tell.send(Said(node, pid, line));
        }
    });
    Node {
        child,
        states: [State::Unknown; NODES],
        starved_until: 0,
        samples: Vec::new(),
    }
}

impl Soak {
    fn start() -> Self {
        let (tell, said) = mpsc::channel();
        let links = Shared::default();
        for node in 0..NODES {
            let links = Arc::clone(&links);
            small_thread(move || proxy(node, links));
        }
        Self {
            nodes: (0..NODES).map(|node| spawn(node, &tell)).collect(),
            links,
            faults: Vec::new(),
            said,
            tell,
            counts: Counts::default(),
            refused: HashMap::new(),
            started: now_ms(),
            random: now_ms() | 1,
            minutes: Vec::new(),
        }
    }

    fn below(&mut self, n: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random % n as u64) as usize
    }

    fn run(mut self, minutes: f64, out: &str) {
        let end = self.started + (minutes * 60_000.0) as u64;
        let (mut next_fault, mut next_minute) = (self.started + WARM_UP_MS, self.started + 60_000);
        while now_ms() < end {
            if let Ok(Said(node, pid, line)) = self.said.recv_timeout(Duration::from_millis(50)) {
                self.take(node, pid, &line);
            }
            let now = now_ms();
            self.end_faults(now);
            // The last ones end before the run does, so that all can be seen to be well again.
            if now >= next_fault && now + SETTLE_MS + 30_000 < end {
                next_fault = now + 4000 + self.below(6000) as u64;
                self.fault(now);
            }
            if now >= next_minute {
                next_minute += 60_000;
                self.minute();
                self.write(out, false);
            }
        }
        self.check_all(now_ms());
        self.minute();
        for node in 0..NODES {
            let _ = self.nodes[node]
                .child
                .stdin
                .take()
                .map(|mut i| i.write_all(b"stop\n"));
        }
        let last = now_ms() + 10_000;
        while now_ms() < last {
            if let Ok(Said(node, pid, line)) = self.said.recv_timeout(Duration::from_millis(100)) {
                self.take(node, pid, &line);
            }
        }
        for node in &mut self.nodes {
            let _ = (node.child.kill(), node.child.wait());
        }
        self.write(out, true);
    }

    fn signal(&self, node: usize, signal: i32) {
        // SAFETY: a signal to a child that was not waited for, so the number is still its.
        unsafe { libc::kill(self.nodes[node].child.id() as i32, signal) };
    }

    fn fault(&mut self, now: u64) {
        let kind = KINDS[self.below(KINDS.len())];
        let (from, to) = match kind {
            Kind::Kill | Kind::Leave | Kind::Stop => (STEADY, NODES),
            Kind::Isolate | Kind::CutPair | Kind::Slow => (PROXIED, NODES),
            Kind::Flood => (0, NODES),
        };
        let node = from + self.below(to - from);
        let disturbed = |n: usize| {
            self.faults
                .iter()
                .any(|f| f.node == n && now < f.end + SETTLE_MS)
        };
        let many = self
            .faults
            .iter()
            .filter(|f| f.kind.excuses() && now < f.end + SETTLE_MS)
            .count()
            > 7;
        if disturbed(node) || (kind.excuses() && many) {
            return;
        }
        let seconds = match kind {
            Kind::Kill if self.below(2) == 0 => 60,
            Kind::Kill => 1 + self.below(20),
            Kind::Leave => 0,
            Kind::Stop => 1 + self.below(30),
            Kind::Isolate => 2 + self.below(50),
            Kind::CutPair | Kind::Slow => 40,
            Kind::Flood => 5,
        };
        *self.counts.faults.entry(name(kind)).or_default() += 1;
        let other = self.below(node.max(1)); // of a pair that is cut, whose higher node is behind a proxy
        match kind {
            Kind::Kill => {
                let _ = (self.nodes[node].child.kill(), self.nodes[node].child.wait());
            }
            Kind::Leave => {
                let stdin = self.nodes[node].child.stdin.take();
                let _ = stdin.map(|mut stdin| stdin.write_all(b"stop\n"));
                let _ = self.nodes[node].child.wait();
            }
            Kind::Stop => self.signal(node, libc::SIGSTOP),
            Kind::Isolate => drop(self.links.lock().unwrap().isolated.insert(node)),
            Kind::CutPair => drop(self.links.lock().unwrap().cut.insert((other, node))),
            Kind::Slow => {
                let late = Duration::from_millis(50 + self.below(250) as u64);
                self.links.lock().unwrap().slow.insert(node, late);
            }
            Kind::Flood => small_thread(move || flood(node)),
        }
        self.faults.push(Fault {
            kind,
            node,
            other,
            start: now,
            end: now + 1000 * seconds as u64,
            over: false,
        });
    }

    fn end_faults(&mut self, now: u64) {
        for at in 0..self.faults.len() {
            let Fault {
                kind,
                node,
                other,
                start,
                end,
                over,
            } = self.faults[at];
            if over || now < end {
                continue;
            }
            self.faults[at].over = true;
            match kind {
                Kind::Kill | Kind::Leave => {
                    if end - start > SETTLE_MS {
                        self.check(node, &[State::Dead], now, "killed");
                    }
                    self.counts.restarts += 1;
                    let samples = std::mem::take(&mut self.nodes[node].samples);
                    self.nodes[node] = spawn(node, &self.tell);
                    self.nodes[node].samples = samples;
                }
                Kind::Stop => self.signal(node, libc::SIGCONT),
                Kind::Isolate => drop(self.links.lock().unwrap().isolated.remove(&node)),
                Kind::CutPair => drop(self.links.lock().unwrap().cut.remove(&(other, node))),
                Kind::Slow => drop(self.links.lock().unwrap().slow.remove(&node)),
                Kind::Flood => {}
            }
        }
        // Well again: everybody who was not disturbed himself sees it alive.
        let settled: Vec<usize> = self
            .faults
            .iter()
            .filter(|f| f.over && now > f.end + SETTLE_MS)
            .map(|f| f.node)
            .collect();
        self.faults.retain(|f| !f.over || now <= f.end + SETTLE_MS);
        for node in settled {
            self.check(node, &[State::Alive], now, "settled");
        }
    }

    fn excused(&self, node: usize, at: u64) -> bool {
        let touches = |f: &&Fault| f.node == node && f.kind.excuses() && f.start <= at;
        self.faults
            .iter()
            .any(|f| touches(&f) && at <= f.end + SETTLE_MS)
    }

    fn starved(&self, node: usize, at: u64) -> bool {
        at < self.nodes[node].starved_until
    }

    /// What all undisturbed nodes think of `node`.
    fn check(&mut self, node: usize, expected: &[State], now: u64, what: &str) {
        for other in (0..NODES).filter(|&o| o != node) {
            if self.excused(other, now) || self.starved(other, now) || self.starved(node, now) {
                continue;
            }
            self.counts.checks += 1;
            let state = self.nodes[other].states[node];
            if !expected.contains(&state) {
                let wrong = format!(
                    "{other} of {node}, {what}: {state:?} at {} s",
                    (now - self.started) / 1000
                );
                self.counts.wrong_after_settling.push(wrong);
            }
        }
    }

    fn check_all(&mut self, now: u64) {
        for node in 0..NODES {
            if !self.excused(node, now) {
                self.check(node, &[State::Alive], now, "at the end");
            }
        }
    }

    fn take(&mut self, node: usize, pid: u32, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if self.nodes[node].child.id() != pid && words.first() != Some(&"stopped") {
            return; // of a process that is gone
        }
        let number = |at: usize| {
            words
                .get(at)
                .and_then(|w| w.parse::<u64>().ok())
                .unwrap_or(0)
        };
        match words.first().copied().unwrap_or_default() {
            "state" => self.changed(node, number(2) as usize, words[3], number(1)),
            "stall" if !self.excused(node, number(1)) => {
                self.counts.stalls += 1;
                self.counts.longest_stall_ms = self.counts.longest_stall_ms.max(number(2));
                if number(2) > DEAD_AFTER_MS / 4 {
                    self.nodes[node].starved_until = number(1) + SETTLE_MS;
                }
            }
            "sample" => {
                self.refused
                    .insert(node, (words[6].into(), words[7].into()));
                self.nodes[node].samples.push(Sample {
                    rss_kib: number(2),
                    fds: number(3),
                    threads: number(4),
                    cpu_ms: number(5),
                });
            }
            "failed" => self
                .counts
                .restarts_that_failed
                .push(format!("{node}: {line}")),
            "stopped" if words[1] != "true" => self.counts.stops_that_failed += 1,
            _ => {}
        }
    }

    fn changed(&mut self, node: usize, peer: usize, state: &str, at: u64) {
        let state = match state {
            "Alive" => State::Alive,
            "Suspect" => State::Suspect,
            "Dead" => State::Dead,
            _ => State::Unknown,
        };
        self.nodes[node].states[peer] = state;
        if at < self.started + WARM_UP_MS {
            return;
        }
        let excused = self.excused(node, at) || self.excused(peer, at);
        let starved = self.starved(node, at) || self.starved(peer, at);
        match state {
            State::Dead => {
                self.counts.deaths += 1;
                if !excused && starved {
                    self.counts.deaths_while_starved += 1;
                } else if !excused {
                    let wrong = format!("{node} of {peer} at {} s", (at - self.started) / 1000);
                    self.counts.false_deaths.push(wrong);
                }
            }
            State::Suspect if !excused && !starved => self.counts.false_suspicions += 1,
            _ => {}
        }
    }

    /// The steady nodes' memory, descriptors and threads now, and the processor time of all.
    fn minute(&mut self) {
        let steady: Vec<Sample> = self.nodes[..STEADY]
            .iter()
            .filter_map(|n| n.samples.last().copied())
            .collect();
        let most = |of: fn(&Sample) -> u64| steady.iter().map(of).max().unwrap_or(0);
        let mean = |of: fn(&Sample) -> u64| {
            steady.iter().map(of).sum::<u64>() as f64 / steady.len().max(1) as f64
        };
        self.minutes.push(format!(
            r#"{{"seconds": {}, "rss_kib": {:.0}, "rss_kib_most": {}, "fds": {:.1}, "fds_most": {}, "threads_most": {}, "cpu_ms": {:.0}}}"#,
            (now_ms() - self.started) / 1000,
            mean(|s| s.rss_kib),
            most(|s| s.rss_kib),
            mean(|s| s.fds),
            most(|s| s.fds),
            most(|s| s.threads),
            mean(|s| s.cpu_ms),
        ));
    }

    fn write(&self, out: &str, finished: bool) {
        let c = &self.counts;
        let strings = |list: &[String]| {
            let first: Vec<String> = list.iter().take(50).map(|s| format!("{s:?}")).collect();
            format!("[{}]", first.join(", "))
        };
        let mut faults: Vec<String> = c
            .faults
            .iter()
            .map(|(k, n)| format!(r#""{k}": {n}"#))
            .collect();
        faults.sort();
        let sums = |names: &[&str], pick: fn(&(String, String)) -> &String| {
            let sum = |at: usize| -> u64 {
                let of = |counts: &(String, String)| {
                    pick(counts).split(',').nth(at)?.parse::<u64>().ok()
                };
                self.refused.values().filter_map(of).sum()
            };
            let each: Vec<String> = names
                .iter()
                .enumerate()
                .map(|(at, name)| format!(r#""{name}": {}"#, sum(at)))
                .collect();
            each.join(", ")
        };
        let text = format!(
            r#"{{
  "what": "sideband soak: cargo bench --bench sideband_soak",
  "nodes": {NODES}, "steady_nodes": {STEADY}, "heartbeat_ms": {HEARTBEAT_MS}, "dead_after_ms": {DEAD_AFTER_MS},
  "finished": {finished}, "seconds": {},
  "faults": {{{}}},
  "restarts": {}, "restarts_that_failed": {}, "stops_that_failed": {},
  "deaths": {}, "false_deaths": {}, "false_deaths_list": {}, "deaths_while_starved": {}, "false_suspicions": {},
  "checks": {}, "wrong_after_settling": {}, "wrong_after_settling_list": {},
  "stalls_over_1_s": {}, "longest_stall_ms": {},
  "refused": {{{}}},
  "closed": {{{}}},
  "minutes": [
    {}
  ]
}}
"#,
            (now_ms() - self.started) / 1000,
            faults.join(", "),
            c.restarts,
            strings(&c.restarts_that_failed),
            c.stops_that_failed,
            c.deaths,
            c.false_deaths.len(),
            strings(&c.false_deaths),
            c.deaths_while_starved,
            c.false_suspicions,
            c.checks,
            c.wrong_after_settling.len(),
            strings(&c.wrong_after_settling),
            c.stalls,
            c.longest_stall_ms,
            sums(&Refusal::ALL.map(|r| r.1), |c| &c.0),
            sums(&Ending::ALL.map(|e| e.1), |c| &c.1),
            self.minutes.join(",\n    ")
        );
        if let Err(error) = std::fs::write(out, text) {
            eprintln!("{out}: {error}");
        }
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Kill => "kill",
        Kind::Leave => "leave",
        Kind::Stop => "stop",
        Kind::Isolate => "isolate",
        Kind::CutPair => "cut_pair",
        Kind::Slow => "slow",
        Kind::Flood => "flood",
    }
}
