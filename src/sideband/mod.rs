//! The sideband: how far the other nodes are in phase, told by an agent of its own thread, one a host.
//!
//! Nothing here is on the training path: [`node::Agent::report_step`] is a push under a short lock, and what the agent
//! finds is advice. Whoever does not hold the pre-shared key learns that a port is open, and nothing else.
//!
//! | module | what it is |
//! | --- | --- |
//! | [`frame`] | the wire format: bytes to values and back, pure |
//! | [`clock`] | the other clock: offset, delay, skew, and a bound |
//! | [`session`] | Noise `NNpsk0`: the handshake, then sealed records |
//! | [`peer`] | the table of peers: who to dial, who is alive, what their phase is; pure, the clock is an argument |
//! | [`node`] | the thread: sockets, the table, shutdown |
//! | [`keyfile`] | the key file: whose it is, who can read it, what it holds |
//! | [`fork`] | what a forked child keeps of the sockets: nothing |
//!
//! The wire format is in `docs/sideband.md`, field by field; `tests/sideband_document.rs` holds it against [`frame`].

pub mod clock;
pub mod fork;
pub mod frame;
pub mod keyfile;
pub mod node;
pub mod peer;
pub mod session;
