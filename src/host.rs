//! The threads of the process that hosts the kernels.
//!
//! Inside Python they are torch's own (so that `torch.set_num_threads` holds and no second pool competes). Scoped
//! threads stand in without the `extension` feature, as in `cargo test`, and in the child of a fork: torch's pool
//! (OpenMP) has no threads there, and whoever waits for them waits for ever.

use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Runs `body` over `0..n` in contiguous pieces of at least `grain`, on the host's threads.
///
/// A panic in `body` is reported as an error after all pieces have ended; it does not cross the
/// foreign frames of the thread pool.
pub fn parallel_for(
    op: &'static str,
    n: usize,
    grain: usize,
    body: &(dyn Fn(Range<usize>) + Sync),
) -> Result<()> {
    if n == 0 {
        return Ok(());
    }
    let failed = AtomicBool::new(false);
    let guarded = |range: Range<usize>| {
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(range))).is_err() {
            failed.store(true, Ordering::Relaxed);
        }
    };
    if n <= grain || threads() == 1 {
        guarded(0..n);
    } else {
        run(op, n, grain.max(1), &guarded)?;
    }
    if failed.load(Ordering::Relaxed) {
        return Err(Error::Internal {
            op,
            what: "a worker thread panicked".into(),
        });
    }
    Ok(())
}

#[cfg(feature = "extension")]
pub use crate::torch::threads;

#[cfg(not(feature = "extension"))]
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

type Body<'a> = &'a (dyn Fn(Range<usize>) + Sync);

fn run(op: &'static str, n: usize, grain: usize, body: Body<'_>) -> Result<()> {
    #[cfg(feature = "extension")]
    if !crate::torch::forked() {
        return crate::torch::run(op, n, grain, body);
    }
    let _ = op;
    run_scoped(n, grain, body);
    Ok(())
}

/// What stands in for torch's threads where they are not to be had.
fn run_scoped(n: usize, grain: usize, body: Body<'_>) {
    let pieces = threads().min(n.div_ceil(grain));
    let step = n.div_ceil(pieces.max(1));
    std::thread::scope(|scope| {
        for start in (0..n).step_by(step) {
            let piece = move || body(start..(start + step).min(n));
            // The last piece is this thread's own; one that no thread can be had for is, too.
            let is_last = start + step >= n;
            let builder = std::thread::Builder::new();
            if is_last || builder.spawn_scoped(scope, piece).is_err() {
                piece();
            }
        }
    });
}

/// The elements of a list of tensors, cut into pieces that threads take in turn.
///
/// The pieces do not depend on the thread count, so partial sums added in their order are reproducible.
pub(crate) struct Pieces(Vec<(usize, Range<usize>)>);

impl Pieces {
    const LENGTH: usize = 16 * 1024;

    pub fn new(lengths: impl Iterator<Item = usize>) -> Self {
        let pieces = lengths.enumerate().flat_map(|(tensor, length)| {
            (0..length)
                .step_by(Self::LENGTH)
                .map(move |start| (tensor, start..(start + Self::LENGTH).min(length)))
        });
        Pieces(pieces.collect())
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Runs `body` for each piece: its number, its tensor, and its elements there.
    pub fn each(
        &self,
        op: &'static str,
        body: &(dyn Fn(usize, usize, Range<usize>) + Sync),
    ) -> Result<()> {
        parallel_for(op, self.0.len(), 2, &|range| {
            for piece in range {
                let (tensor, span) = &self.0[piece];
                body(piece, *tensor, span.clone());
            }
        })
    }
}
