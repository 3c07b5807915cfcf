//! The sideband: one agent a host, in a thread of its own, measures how far the other hosts are ahead or behind.
//!
//! Nothing here is on the training path: [`node::Agent::report_step`] is a push under a short lock, and what the agent
//! finds is advice. A stranger without the pre-shared key learns that a port is open, and nothing else.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`frame`] | the wire format: bytes to values and back, pure |
//! | [`clock`] | another node's clock: offset, delay, skew, and a bound |
//! | [`session`] | the handshake (Noise `NNpsk0`), then sealed records |
//! | [`link`] | one connection: why it was refused or ended, what was counted on it |
//! | [`peer`] | one peer: what was heard of it, and whether it is alive |
//! | [`table`] | all peers: which to dial, what to send; pure, time is an argument |
//! | `probe` | looks after the nodes that are not linked, where there are many |
//! | [`phase`] | what is reported of the peers: state, suspicion, drift |
//! | [`node`] | the thread: sockets, the table, shutdown |
//! | [`keyfile`] | the key file and its checks |
//! | [`fork`] | takes the sockets from a forked child |
//!
//! The wire format is in `docs/sideband.md`, field by field; `tests/sideband_document.rs` holds it against [`frame`].

pub mod clock;
pub mod fork;
pub mod frame;
pub mod keyfile;
pub mod link;
pub mod node;
pub mod peer;
pub mod phase;
mod probe;
pub mod session;
pub mod table;

/// Nanoseconds of a millisecond: times of this module are in ns.
const MS: i64 = 1_000_000;
