//! The agent: one thread that polls all sockets, drives the table of peers, and shuts down.
//!
//! Memory is bounded. There are at most 64 unfinished handshakes of at most 84 bytes each; when another comes, the oldest
//! goes. Each peer has one link, with one record being read and at most 16 KiB waiting to be written. A frame that does not
//! fit is left out, and the next heartbeat says everything that it would have said.

use super::clock::{Clock, Monotonic};
use super::fork::{Owned, Process, guard};
use super::frame::{MAX_RECORD, Opening, record};
use super::link::{Action, Ending, Link, Refusal};
use super::peer::Settings;
use super::phase::View;
use super::session::{ANSWER, Dialling, FIRST, Key, Session, accept};
use super::table::{FULL_MESH, MAX_NODES, Mark, Table};
use crate::error::{Error, Result};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

const LISTENER: Token = Token(0);
const WAKER: Token = Token(1);
const MAX_PENDING: usize = 64;
const HANDSHAKE_LIMIT: i64 = 2_000_000_000;
/// Arrivals are collected for a tenth of a heartbeat, at most 5 ms, and read in one turn; for 20 ms while no node steps.
const MAX_TOGETHER: i64 = 5_000_000;
const IDLE_TOGETHER: i64 = 20_000_000;
const MAX_WAITING: usize = 16 * 1024;
const MAX_REPORTS: usize = 1024;
/// A connection is read at most this often in a turn. One that still has bytes then is a flood, and keeps nobody waiting.
const IN_A_ROW: usize = 64;

/// What an agent needs to know. `peers[i]` is the address of node `i` (`host:port`, own entry unused).
pub struct Config {
    pub node: u16,
    pub peers: Vec<String>,
    pub key: Key,
    /// Digest of the job's name, and the job's incarnation: nodes of another one are refused.
    pub job: u64,
    pub epoch: u64,
    pub heartbeat_ms: u64,
    pub dead_after_ms: u64,
    pub expire_after_ms: u64,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub refused: [u64; Refusal::ALL.len()],
    pub closed: [u64; Ending::ALL.len()],
    pub bytes_sent: u64,
    pub bytes_received: u64,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Heartbeats are rare now, so a step has to wake the thread.
    idle: AtomicBool,
    reports: Mutex<VecDeque<Mark>>,
    found: Mutex<(Vec<View>, Counts)>,
}

/// Takes a poisoned lock all the same: the value behind it is always replaced as a whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A bound port, not yet served: its number can be told to the other nodes first.
pub struct Bound(Owned<TcpListener>);

impl Bound {
    /// Listens on `address` (`host:port`; port 0 takes a free one).
    pub fn listen(address: &str) -> Result<Self> {
        let fail = |e: std::io::Error| {
            Error::argument("sideband", format!("cannot listen on {address:?}: {e}"))
        };
        guard().map_err(fail)?;
        // With SO_REUSEADDR, as the standard library sets it: the old agent's closed connections do not keep the port.
        let listener = std::net::TcpListener::bind(address).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        Ok(Self(Owned::new(TcpListener::from_std(listener))))
    }

    pub fn port(&self) -> u16 {
        self.0.0.local_addr().map_or(0, |a| a.port())
    }
}

/// Never sent: the other end is gone once the thread is over.
#[derive(PartialEq)]
enum Never {}

/// A running agent. Dropping it stops it. In a forked child it is as after [`Agent::stop`]: nothing there touches the thread,
/// its locks or its descriptors, which are the parent's.
pub struct Agent {
    shared: Arc<Shared>,
    waker: Arc<Waker>,
    /// Disconnected when the thread has dropped all that it had.
    done: Mutex<mpsc::Receiver<Never>>,
    clock: Arc<dyn Clock>,
    process: Process,
}

impl Agent {
    pub fn start(bound: Bound, config: Config) -> Result<Self> {
        let wrong = |what: String| Err(Error::argument("sideband", what));
        let nodes = config.peers.len();
        if nodes == 0 || nodes > usize::from(MAX_NODES) || usize::from(config.node) >= nodes {
            return wrong(format!(
                "node is {} of {nodes}, but there must be 1 to {MAX_NODES} nodes",
                config.node
            ));
        }
        if !(1..=10_000).contains(&config.heartbeat_ms) {
            return wrong(format!(
                "heartbeat_ms is {}, but must be 1 to 10000",
                config.heartbeat_ms
            ));
        }
        if config.dead_after_ms < 4 * config.heartbeat_ms
            || config.expire_after_ms < config.dead_after_ms
        {
            return wrong(format!(
                "dead_after_ms is {} and expire_after_ms {}, but must be at least 4 heartbeats of {} ms, and the second not less",
                config.dead_after_ms, config.expire_after_ms, config.heartbeat_ms
            ));
        }
        let fail = |e: std::io::Error| Error::argument("sideband", format!("cannot start: {e}"));
        let mut boot = [0; 8];
        getrandom::fill(&mut boot)
            .map_err(|e| Error::argument("sideband", format!("no random numbers: {e}")))?;
        let poll = Owned::new(Poll::new().map_err(fail)?);
        let waker = Arc::new(Waker::new(poll.0.registry(), WAKER).map_err(fail)?);
        let mut listener = bound.0;
        poll.0
            .registry()
            .register(&mut listener.0, LISTENER, Interest::READABLE)
            .map_err(fail)?;
        let clock: Arc<dyn Clock> = Arc::new(Monotonic::default());
        let ns = |ms: u64| i64::try_from(ms.min(1 << 40) * 1_000_000).unwrap_or(i64::MAX);
        let settings = Settings {
            node: config.node,
            nodes: nodes as u16,
            full_mesh: FULL_MESH,
            boot: u64::from_le_bytes(boot),
            heartbeat: ns(config.heartbeat_ms),
            dead_after: ns(config.dead_after_ms),
            expire_after: ns(config.expire_after_ms),
        };
        let together = (settings.heartbeat / 10).min(MAX_TOGETHER);
        let opening = Opening {
            job: config.job,
            epoch: config.epoch,
            from: config.node,
            to: config.node,
            boot: settings.boot,
        };
        let shared = Arc::new(Shared::default());
        let table = Table::new(settings, clock.now());
        *lock(&shared.found) = (table.views(clock.now()), Counts::default());
        let resolver = Resolver::start(Arc::clone(&waker)).map_err(fail)?;
        let runner = Runner {
            poll,
            listener,
            table,
            resolver,
            opening,
            config,
            links: HashMap::new(),
            waiting: HashMap::new(),
            pending: VecDeque::new(),
            shared: Arc::clone(&shared),
            clock: Arc::clone(&clock),
            counts: Counts::default(),
            together,
        };
        let (alive, done) = mpsc::channel::<Never>();
        std::thread::Builder::new()
            .name("tsugi-sideband".into())
            .spawn(move || {
                // Dropped last, after the listener and every connection, also if the thread panics.
                let _alive = alive;
                let mut runner = runner;
                runner.run();
            })
            .map_err(fail)?;
        Ok(Self {
            shared,
            waker,
            done: Mutex::new(done),
            clock,
            process: Process::this(),
        })
    }

    /// A step boundary was passed now; `step` counts from 0. A push under a short lock: the oldest goes if 1024 wait.
    pub fn report_step(&self, step: i64, duration_ms: f64, fill: f32, fires: u32, holds: u32) {
        if !self.process.is_this() {
            return;
        }
        let mark = Mark {
            step: step.max(0),
            at: self.clock.now(),
            duration: (duration_ms.max(0.0) * 1e6) as u64,
            fill: if fill.is_finite() {
                fill.clamp(0.0, 1.0)
            } else {
                0.0
            },
            fires,
            holds,
        };
        let mut reports = lock(&self.shared.reports);
        if reports.len() == MAX_REPORTS {
            reports.pop_front();
        }
        reports.push_back(mark);
        drop(reports);
        if self.shared.idle.swap(false, Ordering::AcqRel) {
            let _ = self.waker.wake();
        }
    }

    /// What was known at the last heartbeat; nothing in a forked child.
    pub fn snapshot(&self) -> (Vec<View>, Counts) {
        if !self.process.is_this() {
            return Default::default();
        }
        lock(&self.shared.found).clone()
    }

    /// Says goodbye and stops; returns within a second, true if listener and connections are closed by then. In a forked child
    /// it returns true at once, and the parent's agent goes on.
    pub fn stop(&self) -> bool {
        if !self.process.is_this() {
            return true;
        }
        self.shared.stop.store(true, Ordering::Release);
        let _ = self.waker.wake();
        let ended = lock(&self.done).recv_timeout(Duration::from_millis(900));
        ended == Err(mpsc::RecvTimeoutError::Disconnected)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Host names take time to look up, so a thread of its own does it.
struct Resolver {
    asked: mpsc::Sender<(u16, String)>,
    found: mpsc::Receiver<(u16, Vec<SocketAddr>)>,
    /// What was found and not tried yet, last first.
    untried: HashMap<u16, Vec<SocketAddr>>,
}

impl Resolver {
    fn start(waker: Arc<Waker>) -> std::io::Result<Self> {
        let (asked, questions) = mpsc::channel::<(u16, String)>();
        let (answers, found) = mpsc::channel();
        std::thread::Builder::new()
            .name("tsugi-resolver".into())
            .spawn(move || {
                for (node, address) in questions {
                    let mut all: Vec<SocketAddr> =
                        address.to_socket_addrs().into_iter().flatten().collect();
                    all.reverse();
                    if answers.send((node, all)).is_err() || waker.wake().is_err() {
                        break;
                    }
                }
            })?;
        Ok(Self {
            asked,
            found,
            untried: HashMap::new(),
        })
    }

    /// The next address to try; if there is none it is looked up, and comes through `found`.
    fn next(&mut self, node: u16, address: &str) -> Option<SocketAddr> {
        if let Ok(literal) = address.parse() {
            return Some(literal);
        }
        let next = self.untried.get_mut(&node).and_then(Vec::pop);
        if next.is_none() {
            let _ = self.asked.send((node, address.to_owned()));
        }
        next
    }
}

enum Stage {
    /// Accepted: nothing is known of the other side.
    Accepted {
        since: i64,
    },
    /// Accepted and answered: real with its first sealed frame.
    Answered {
        since: i64,
        session: Session,
        node: u16,
        boot: u64,
    },
    Dialled {
        dialling: Option<Dialling>,
        node: u16,
    },
    Established {
        session: Session,
    },
}

struct Connection {
    stream: Owned<TcpStream>,
    stage: Stage,
    read: Vec<u8>,
    write: Vec<u8>,
}

/// Why a connection is over.
enum Over {
    Ended(Ending),
    Refused(Refusal),
    /// Refused by the table, which has counted it.
    Counted,
}

struct Runner {
    poll: Owned<Poll>,
    listener: Owned<TcpListener>,
    table: Table,
    resolver: Resolver,
    opening: Opening,
    config: Config,
    links: HashMap<Link, Connection>,
    /// Dialled nodes whose address is being looked up.
    waiting: HashMap<Link, u16>,
    /// Accepted connections that are not established, oldest first.
    pending: VecDeque<Link>,
    shared: Arc<Shared>,
    clock: Arc<dyn Clock>,
    counts: Counts,
    /// Shortest time between two turns, ns.
    together: i64,
}

impl Runner {
    fn run(&mut self) {
        let mut events = Events::with_capacity(256);
        while !self.shared.stop.load(Ordering::Acquire) {
            let rest = (self.table.next_tick() - self.clock.now()).clamp(0, 1_000_000_000) as u64;
            // An interrupted or failed poll costs one turn; the pause keeps a lasting failure from spinning.
            if self
                .poll
                .0
                .poll(
                    &mut events,
                    Some(Duration::from_nanos(rest) + Duration::from_micros(200)),
                )
                .is_err()
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            for mark in lock(&self.shared.reports).drain(..) {
                self.table.report(mark);
            }
            for event in &events {
                match event.token() {
                    LISTENER => self.accept_all(),
                    WAKER => {}
                    Token(link) => {
                        self.serve(link as Link, event.is_read_closed() || event.is_error())
                    }
                }
            }
            self.dial_resolved();
            let now = self.clock.now();
            self.expire_pending(now);
            if now >= self.table.next_tick() {
                for action in self.table.tick(now) {
                    self.act(action);
                }
                self.counts.refused = self.table.refused();
                self.shared
                    .idle
                    .store(self.table.idle(now), Ordering::Release);
                *lock(&self.shared.found) = (self.table.views(now), self.counts);
            }
            // Heartbeats of many peers are read in one turn: fewer wake-ups, for a bound wider by half of this.
            let now = self.clock.now();
            let together = if self.table.idle(now) {
                IDLE_TOGETHER
            } else {
                self.together
            };
            let rest = (self.table.next_tick() - now).clamp(0, together);
            std::thread::sleep(Duration::from_nanos(rest as u64));
        }
        self.say_goodbye();
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Dial { node, link } => {
                let Some(address) = self.config.peers.get(usize::from(node)) else {
                    return;
                };
                match self.resolver.next(node, address) {
                    Some(address) => self.dial(link, node, address),
                    None => drop(self.waiting.insert(link, node)),
                }
            }
            Action::Send { link, bytes } => {
                let Some(connection) = self.links.get_mut(&link) else {
                    return;
                };
                let Stage::Established { session } = &mut connection.stage else {
                    return;
                };
                // The sequence counts what is sealed, so a link that cannot keep up is closed rather than thinned out.
                let fits = connection.write.len() + bytes.len() + 64 <= MAX_WAITING;
                if !fits || session.seal(&bytes, &mut connection.write).is_err() {
                    return self.close(link, Over::Ended(Ending::Full));
                }
                if let Err(why) = flush(connection, &mut self.counts) {
                    self.close(link, why);
                }
            }
            Action::Close { link, why } => self.close(link, Over::Ended(why)),
        }
    }

    fn dial_resolved(&mut self) {
        while let Ok((node, addresses)) = self.resolver.found.try_recv() {
            self.resolver.untried.insert(node, addresses);
            let Some(link) = self.waiting.iter().find(|w| *w.1 == node).map(|w| *w.0) else {
                continue;
            };
            self.waiting.remove(&link);
            match self.resolver.untried.get_mut(&node).and_then(Vec::pop) {
                Some(address) => self.dial(link, node, address),
                None => self.close(link, Over::Ended(Ending::Unreachable)),
            }
        }
    }

    fn dial(&mut self, link: Link, node: u16, address: SocketAddr) {
        let opening = Opening {
            to: node,
            ..self.opening
        };
        let started = TcpStream::connect(address)
            .ok()
            .zip(Dialling::start(&self.config.key, opening).ok());
        let Some((stream, (dialling, first))) = started else {
            return self.close(link, Over::Ended(Ending::Unreachable));
        };
        let mut write = (first.len() as u16).to_le_bytes().to_vec();
        write.extend_from_slice(&first);
        let stage = Stage::Dialled {
            dialling: Some(dialling),
            node,
        };
        self.add(link, Owned::new(stream), stage, write);
    }

    fn add(&mut self, link: Link, mut stream: Owned<TcpStream>, stage: Stage, write: Vec<u8>) {
        let _ = stream.0.set_nodelay(true);
        let both = Interest::READABLE | Interest::WRITABLE;
        if self
            .poll
            .0
            .registry()
            .register(&mut stream.0, Token(link as usize), both)
            .is_err()
        {
            return self.close(link, Over::Ended(Ending::Unreachable));
        }
        self.links.insert(
            link,
            Connection {
                stream,
                stage,
                read: Vec::new(),
                write,
            },
        );
    }

    fn accept_all(&mut self) {
        // Edge-triggered: the listener is read until it has no more, and the oldest handshake makes room.
        while let Ok((stream, _)) = self.listener.0.accept() {
            if self.pending.len() >= MAX_PENDING
                && let Some(oldest) = self.pending.front().copied()
            {
                self.close(oldest, Over::Refused(Refusal::Overflow));
            }
            let link = self.table.name_link();
            self.pending.push_back(link);
            let since = self.clock.now();
            self.add(
                link,
                Owned::new(stream),
                Stage::Accepted { since },
                Vec::new(),
            );
        }
    }

    fn expire_pending(&mut self, now: i64) {
        while let Some(link) = self.pending.front().copied() {
            let since = self.links.get(&link).map(|c| match &c.stage {
                Stage::Accepted { since } | Stage::Answered { since, .. } => *since,
                _ => now,
            });
            match since {
                Some(since) if now - since > HANDSHAKE_LIMIT => {
                    self.close(link, Over::Refused(Refusal::Handshake))
                }
                Some(_) => break,
                None => drop(self.pending.pop_front()),
            }
        }
    }

    /// Ends a link, and counts why.
    fn close(&mut self, link: Link, why: Over) {
        match why {
            Over::Refused(why) => self.table.refuse(why),
            Over::Ended(why) => {
                if let Some(count) = self.counts.closed.get_mut(why as usize) {
                    *count += 1;
                }
            }
            Over::Counted => {}
        }
        self.pending.retain(|&l| l != link);
        self.waiting.remove(&link);
        if let Some(mut connection) = self.links.remove(&link) {
            let _ = self.poll.0.registry().deregister(&mut connection.stream.0);
        }
        self.table.closed(self.clock.now(), link);
    }

    fn serve(&mut self, link: Link, ended: bool) {
        let Some(mut connection) = self.links.remove(&link) else {
            return;
        };
        let outcome = self.exchange(link, &mut connection, ended);
        self.links.insert(link, connection);
        if let Err(why) = outcome {
            self.close(link, why);
        }
    }

    fn exchange(
        &mut self,
        link: Link,
        connection: &mut Connection,
        ended: bool,
    ) -> std::result::Result<(), Over> {
        let gone = Over::Ended(match connection.stage {
            Stage::Dialled { .. } => Ending::Unreachable,
            _ => Ending::Ended,
        });
        flush(connection, &mut self.counts)?;
        let mut chunk = [0; 2 * MAX_RECORD];
        for _ in 0..IN_A_ROW {
            let count = match connection.stream.0.read(&mut chunk) {
                Ok(0) => return Err(gone),
                Ok(count) => count,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Err(gone),
            };
            self.counts.bytes_received += count as u64;
            connection
                .read
                .extend_from_slice(chunk.get(..count).unwrap_or_default());
            while self.one_record(link, connection)? {}
            // A read that leaves room emptied the socket, and what comes next is a new event; an end already came.
            if count < chunk.len() && !ended {
                return Ok(());
            }
        }
        // Nobody with an honest rate sends this much between two turns.
        Err(Over::Refused(Refusal::Flood))
    }

    /// Takes one complete record off `connection.read`; false if there is none.
    fn one_record(
        &mut self,
        link: Link,
        connection: &mut Connection,
    ) -> std::result::Result<bool, Over> {
        let limit = match connection.stage {
            Stage::Accepted { .. } => FIRST,
            Stage::Dialled { .. } => ANSWER,
            Stage::Answered { .. } | Stage::Established { .. } => MAX_RECORD,
        };
        let handshake = |_| Over::Refused(Refusal::Handshake);
        let Some((body, length)) = record(&connection.read, limit).map_err(handshake)? else {
            return Ok(false);
        };
        let body = body.to_vec();
        connection.read.drain(..length);
        let now = self.clock.now();
        let stage = std::mem::replace(&mut connection.stage, Stage::Accepted { since: now });
        connection.stage = match stage {
            Stage::Accepted { since } => {
                let own = Opening {
                    to: 0,
                    ..self.opening
                };
                let (session, answer, said) = accept(&self.config.key, &own, &body)
                    .map_err(|_| Over::Refused(Refusal::Handshake))?;
                self.table
                    .admits(now, said.from, said.boot)
                    .map_err(Over::Refused)?;
                connection
                    .write
                    .extend_from_slice(&(answer.len() as u16).to_le_bytes());
                connection.write.extend_from_slice(&answer);
                flush(connection, &mut self.counts)?;
                Stage::Answered {
                    since,
                    session,
                    node: said.from,
                    boot: said.boot,
                }
            }
            Stage::Dialled { dialling, node } => {
                let dialling = dialling.ok_or(Over::Ended(Ending::Unreachable))?;
                let (session, boot) = dialling
                    .finish(&body)
                    .map_err(|_| Over::Refused(Refusal::Handshake))?;
                self.establish(now, node, boot, link)?;
                Stage::Established { session }
            }
            Stage::Answered {
                mut session,
                node,
                boot,
                ..
            } => {
                let plain = session
                    .open(&body)
                    .map_err(|_| Over::Refused(Refusal::Handshake))?;
                self.establish(now, node, boot, link)?;
                self.pending.retain(|&l| l != link);
                self.table
                    .received(now, link, &plain)
                    .map_err(|_| Over::Counted)?;
                Stage::Established { session }
            }
            Stage::Established { mut session } => {
                let plain = session
                    .open(&body)
                    .map_err(|_| Over::Refused(Refusal::Malformed))?;
                self.table
                    .received(now, link, &plain)
                    .map_err(|_| Over::Counted)?;
                Stage::Established { session }
            }
        };
        Ok(true)
    }

    fn establish(
        &mut self,
        now: i64,
        node: u16,
        boot: u64,
        link: Link,
    ) -> std::result::Result<(), Over> {
        match self.table.linked(now, node, boot, link) {
            Ok(Some(old)) => self.close(old, Over::Ended(Ending::Replaced)),
            Ok(None) => {}
            Err(_) => return Err(Over::Counted),
        }
        Ok(())
    }

    fn say_goodbye(&mut self) {
        for (link, bytes) in self.table.goodbye() {
            if let Some(connection) = self.links.get_mut(&link)
                && let Stage::Established { session } = &mut connection.stage
                && session.seal(&bytes, &mut connection.write).is_ok()
            {
                let _ = flush(connection, &mut self.counts);
            }
        }
    }
}

/// Writes what the socket takes.
fn flush(connection: &mut Connection, counts: &mut Counts) -> std::result::Result<(), Over> {
    while !connection.write.is_empty() {
        match connection.stream.0.write(&connection.write) {
            Ok(count) => {
                counts.bytes_sent += count as u64;
                connection.write.drain(..count);
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => break,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Err(Over::Ended(Ending::Ended)),
        }
    }
    Ok(())
}
