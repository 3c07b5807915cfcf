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
//! # Wire format, version 1
//!
//! Everything is a record: `u16` length (little-endian, 1 to 4096), then that many bytes. Integers are little-endian.
//!
//! ```text
//! dialler -> acceptor   opening 34 bytes | Noise message 1 (48 bytes)        the opening is the Noise prologue
//! acceptor -> dialler   Noise message 2: key, tag, and sealed [node u16 | boot u64]
//! then both ways        sealed frames: version u8 | type u8 | sequence u64 | body
//!
//! opening    magic "TKSB" | version u8 | 0 u8 | job u64 | epoch u64 | from u16 | to u16 | boot u64
//! heartbeat  type 1: beat u64 | sent i64 | echo_sent i64 | echo_received i64 | step i64 | step_at i64 |
//!            step_ns u64 | next_ms u16 | fill f32 | fires u32 | holds u32
//! gossip     type 2: count u8 | count x [node u16 | boot u64 | beat u64 | step i64]
//! bye        type 3: empty
//! ```
//!
//! Times are nanoseconds of the sender's own monotonic clock. `echo_sent` is the `sent` of the last heartbeat that the
//! sender received and `echo_received` when that was, so every heartbeat completes four timestamps. A sequence starts at
//! zero on each connection and counts by one; anything else closes the connection.

pub mod clock;
pub mod fork;
pub mod frame;
pub mod keyfile;
pub mod node;
pub mod peer;
pub mod session;
