//! Services of the process that hosts the kernels: its threads and its dense matrix product.
//!
//! Inside Python both are torch's own (its thread pool, so that `torch.set_num_threads` holds and no
//! second pool competes; its oneDNN or MKL product). Without the `extension` feature, as in
//! `cargo test`, scoped threads and this crate's own product stand in.

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
pub use crate::bridge::{dense_product, run, threads};

#[cfg(not(feature = "extension"))]
pub use standalone::{dense_product, run, threads};

#[cfg(not(feature = "extension"))]
mod standalone {
    use super::*;
    use crate::cpu::gemm::{Out, Parts, Plain, gemm};
    use crate::tensor::{DType, Mat, MatMut};

    pub fn threads() -> usize {
        std::thread::available_parallelism().map_or(1, |n| n.get())
    }

    pub fn run(
        _op: &'static str,
        n: usize,
        grain: usize,
        body: &(dyn Fn(Range<usize>) + Sync),
    ) -> Result<()> {
        let pieces = threads().min(n.div_ceil(grain));
        let step = n.div_ceil(pieces);
        std::thread::scope(|scope| {
            for start in (0..n).step_by(step) {
                scope.spawn(move || body(start..(start + step).min(n)));
            }
        });
        Ok(())
    }

    /// out = beta out + alpha a b, all of one dtype; `out` [m, n], `a` [m, k], `b` [k, n].
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
