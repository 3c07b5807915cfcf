//! What a forked child keeps of the sideband: nothing.
//!
//! A child of `fork` (a DataLoader worker, multiprocessing) has a copy of every descriptor, but not the agent's thread. It
//! would keep the port after the parent is gone, and hold connections that nobody reads. So every socket of an agent is
//! [`Owned`], and a handler that the system runs in the child puts an empty descriptor in the place of each.
//!
//! The child may use no lock: the agent's thread, which it does not have, may hold it. A set of atomic bits needs none. And a
//! number is never closed in the child but replaced, so whoever drops its owner there later closes the child's own.
//! Descriptors are close-on-exec, so a started program has none either.

use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// Descriptors from this number on are not replaced in a child; Linux gives a process at most so many by default.
const MOST: usize = 1 << 20;

/// One bit a descriptor number: an agent of this process owns it. Pages that are never touched cost nothing.
static OWNED: [AtomicU64; MOST / 64] = [const { AtomicU64::new(0) }; MOST / 64];
/// What the numbers stand for in a child: /dev/null.
static EMPTY: AtomicI32 = AtomicI32::new(-1);
/// How often this process was forked off since the library was loaded: a child has one more than its parent.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// The process that made something, as its forked children do not see themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process(u64);

impl Process {
    pub fn this() -> Self {
        Self(FORKS.load(Ordering::Relaxed))
    }

    /// False in a child that was forked after this was made.
    pub fn is_this(self) -> bool {
        self == Self::this()
    }
}

/// Installs the handler, once a process.
pub fn guard() -> std::io::Result<()> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let failure = *INSTALLED.get_or_init(|| {
        match std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
        {
            Ok(empty) => EMPTY.store(empty.into_raw_fd(), Ordering::Release),
            Err(e) => return e.raw_os_error().unwrap_or(libc::EIO),
        }
        // SAFETY: the handler is a function of this library, which is never unloaded (Python unloads no module).
        unsafe { libc::pthread_atfork(None, None, Some(in_child)) }
    });
    match failure {
        0 => Ok(()),
        error => Err(std::io::Error::from_raw_os_error(error)),
    }
}

/// Runs in a forked child before `fork` returns there: atomics and dup3 alone, which need no lock and no memory.
extern "C" fn in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
    let empty = EMPTY.load(Ordering::Acquire);
    for (word, bits) in OWNED.iter().enumerate() {
        let mut owned = bits.swap(0, Ordering::Relaxed);
        while owned != 0 {
            let fd = word * 64 + owned.trailing_zeros() as usize;
            // SAFETY: `fd` is a socket of an agent: a bit is set after its socket is open and cleared before it is closed,
            // so the number belongs to nobody else, and what owns it here goes on to own it.
            unsafe { libc::dup3(empty, fd as RawFd, libc::O_CLOEXEC) };
            owned &= owned - 1;
        }
    }
}

/// A descriptor that no forked child keeps. A socket is shut down before it is closed: its connection ends and its port is
/// free even where a child that was forked in the wrong moment (between the system's call and the bit) has a copy.
pub struct Owned<S: AsRawFd>(pub S);

impl<S: AsRawFd> Owned<S> {
    pub fn new(descriptor: S) -> Self {
        let fd = descriptor.as_raw_fd() as usize;
        if let Some(bits) = OWNED.get(fd / 64) {
            bits.fetch_or(1 << (fd % 64), Ordering::Relaxed);
        }
        Self(descriptor)
    }
}

impl<S: AsRawFd> Drop for Owned<S> {
    fn drop(&mut self) {
        let fd = self.0.as_raw_fd();
        // SAFETY: the descriptor is open until `self.0` is dropped, after this. What is no socket is left as it is.
        unsafe { libc::shutdown(fd, libc::SHUT_RDWR) };
        if let Some(bits) = OWNED.get(fd as usize / 64) {
            bits.fetch_and(!(1 << (fd as usize % 64)), Ordering::Relaxed);
        }
    }
}
