//! One connection: its name, what is to be done with it, why it was refused or ended, and what was counted on it.

use super::frame::{Body, Frame};

/// A connection, named by whoever drives the table; never used twice.
pub type Link = u64;

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

/// `sent` of the peer's last heartbeat, and when it came here; -1 before the first.
#[derive(Clone, Copy)]
pub(super) struct Echo {
    pub sent: i64,
    pub received: i64,
}

impl Echo {
    pub const NONE: Echo = Echo {
        sent: -1,
        received: -1,
    };
}

/// Frames a peer may send at once, and per heartbeat in the long run.
const BURST: f64 = 64.0;
const RATE: f64 = 4.0;

/// A link that is up.
pub(super) struct Established {
    pub link: Link,
    /// Dialled by us.
    pub ours: bool,
    pub since: i64,
    pub heard: i64,
    /// The peer's last beat; on a new link to a node known by gossip, which may be ahead of it, 0.
    pub beat: u64,
    pub sent_frames: u64,
    pub received_frames: u64,
    pub tokens: f64,
    pub refilled: i64,
    /// `sent` of the peer's last heartbeat and when it came; and the last of ours that it echoed.
    pub echo: Echo,
    pub echoed: i64,
}

impl Established {
    pub fn new(link: Link, ours: bool, beat: u64, now: i64) -> Self {
        Self {
            link,
            ours,
            since: now,
            heard: now,
            beat,
            sent_frames: 0,
            received_frames: 0,
            tokens: BURST,
            refilled: now,
            echo: Echo::NONE,
            echoed: -1,
        }
    }

    /// A frame came: false where its sender has sent too many.
    pub fn earns(&mut self, now: i64, heartbeat: i64) -> bool {
        let earned = (now - self.refilled) as f64 / heartbeat as f64 * RATE;
        self.tokens = (self.tokens + earned).min(BURST) - 1.0;
        self.refilled = now;
        self.tokens >= 0.0
    }

    pub fn send(&mut self, body: Body) -> Action {
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
