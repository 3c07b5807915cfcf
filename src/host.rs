//! Services of the process that hosts the kernels: its threads and its dense matrix product.
//!
//! Inside Python both are torch's own (its thread pool, so that `torch.set_num_threads` holds and no
//! second pool competes; its oneDNN or MKL product). Scoped threads and this crate's own product stand in
//! without the `extension` feature, as in `cargo test`, and in the child of a fork: torch's pool (OpenMP) has
//! no threads there, and whoever waits for them waits for ever.

use crate::error::{Error, Result};
use crate::tensor::{Mat, MatMut};
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
pub use crate::bridge::threads;

#[cfg(not(feature = "extension"))]
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

type Body<'a> = &'a (dyn Fn(Range<usize>) + Sync);

fn run(op: &'static str, n: usize, grain: usize, body: Body<'_>) -> Result<()> {
    #[cfg(feature = "extension")]
    if !crate::bridge::forked() {
        return crate::bridge::run(op, n, grain, body);
    }
    let _ = op;
    own::run(n, grain, body);
    Ok(())
}

/// out = beta out + alpha a b, all of one dtype; `out` [m, n], `a` [m, k], `b` [k, n]; beta is 0 or 1.
pub fn dense_product(
    op: &'static str,
    out: MatMut,
    beta: f64,
    alpha: f64,
    a: Mat,
    b: Mat,
) -> Result<()> {
    #[cfg(feature = "extension")]
    if !crate::bridge::forked() {
        return crate::bridge::dense_product(op, out, beta, alpha, a, b);
    }
    own::dense_product(op, out, beta, alpha, a, b)
}

/// What stands in for torch's threads and product where they are not to be had.
mod own {
    use super::*;
    use crate::cpu::gemm::{Out, Parts, Plain, gemm};
    use crate::tensor::DType;

    pub fn run(n: usize, grain: usize, body: Body<'_>) {
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

    pub fn dense_product(
        op: &'static str,
        out: MatMut,
        beta: f64,
        alpha: f64,
        a: Mat,
        b: Mat,
    ) -> Result<()> {
        let (m, n, k) = (a.rows, b.cols, a.cols);
        let left = Plain::new(a);
        let sink = Out::one(out, beta != 0.0);
        let right = Parts::one(b, alpha);
        if out.mat().dtype == DType::F64 {
            gemm::<f64>(op, m, n, k, &left, &right, &sink)
        } else {
            gemm::<f32>(op, m, n, k, &left, &right, &sink)
        }
    }
}
