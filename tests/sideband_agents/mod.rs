//! What the tests with real agents share: agents in this process, and a host that holds the key and lies.

#![allow(dead_code)] // each test file uses a part

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};
use tsugi_kpool::sideband::frame::{Body, Frame, Heartbeat, Opening};
use tsugi_kpool::sideband::node::{Agent, Bound, Config};
use tsugi_kpool::sideband::session::{ANSWER, Dialling, Key, Session};

/// Agents of one job in this process, and their addresses.
pub fn start(nodes: usize, heartbeat_ms: u64, dead_after_ms: u64) -> (Vec<String>, Vec<Agent>) {
    let bound: Vec<Bound> = (0..nodes)
        .map(|_| Bound::listen("127.0.0.1:0").unwrap())
        .collect();
    let peers: Vec<String> = bound
        .iter()
        .map(|b| format!("127.0.0.1:{}", b.port()))
        .collect();
    let agent = |(node, bound): (usize, Bound)| {
        let config = Config {
            node: node as u16,
            peers: peers.clone(),
            key: Key::new([7; 32]),
            job: 1,
            epoch: 0,
            heartbeat_ms,
            dead_after_ms,
            expire_after_ms: 60_000,
        };
        Agent::start(bound, config).unwrap()
    };
    let agents = bound.into_iter().enumerate().map(agent).collect();
    (peers, agents)
}

pub fn until(seconds: u64, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !condition() {
        assert!(Instant::now() < end, "not within {seconds} s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A host with the key: a node of a job whose other agents are real.
pub struct Insider {
    pub stream: TcpStream,
    session: Session,
    pub frames: u64,
    beats: u64,
}

impl Insider {
    /// Says that it is node `from`; None if it is hung up on instead of answered.
    pub fn dial(address: &str, from: u16, to: u16, boot: u64) -> Option<Self> {
        let opening = Opening {
            job: 1,
            epoch: 0,
            from,
            to,
            boot,
        };
        let (dialling, first) = Dialling::start(&Key::new([7; 32]), opening).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
            .write_all(&[&(first.len() as u16).to_le_bytes(), &first[..]].concat())
            .unwrap();
        let mut answer = [0; 2 + ANSWER];
        stream.read_exact(&mut answer).ok()?;
        let (session, _) = dialling.finish(&answer[2..]).unwrap();
        Some(Self {
            stream,
            session,
            frames: 0,
            beats: 0,
        })
    }

    /// The next heartbeat as a sealed record.
    pub fn heartbeat(&mut self) -> Vec<u8> {
        self.beats += 1;
        let heartbeat = Heartbeat {
            beat: self.beats,
            sent: self.frames as i64,
            echo_sent: -1,
            echo_received: -1,
            step: -1,
            step_at: -1,
            step_ns: 0,
            next_ms: 50,
            fill: 0.0,
            fires: 0,
            holds: 0,
        };
        self.seal(Body::Heartbeat(heartbeat))
    }

    /// The next frame as a sealed record.
    pub fn seal(&mut self, body: Body) -> Vec<u8> {
        let frame = Frame {
            sequence: self.frames,
            body,
        };
        self.frames += 1;
        let mut sealed = Vec::new();
        self.session.seal(&frame.encode(), &mut sealed).unwrap();
        sealed
    }

    /// Sends until it is hung up on.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
        let mut heard = [0; 4096];
        while self.stream.read(&mut heard).unwrap_or(0) > 0 {}
    }
}
