//! The CPU side: vector conversions, the matrix product that the low-rank operations share, and the dense one.

pub mod dense;
pub mod gemm;
pub(crate) mod grouped;
pub mod num;

use crate::error::{Error, Result};
use crate::tensor::DType;
use pulp::Arch;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

/// The instruction set chosen at run time, for `doctor` and for benchmarks' headers.
pub fn instruction_set() -> &'static str {
    match Arch::new() {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => "AVX-512",
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => "AVX2 + FMA",
        _ => "scalar",
    }
}

/// Whether torch's own matrix product of this type runs on vector or matrix units here.
///
/// oneDNN takes bfloat16 from AVX-512 (BW, DQ, VL) on and float16 from AVX-512-FP16 on; below that
/// torch falls back to a scalar product, which is 10 to 400 times slower than float32. The environment
/// variable `TSUGI_CPU_PRODUCT` = `torch` or `own` overrides the choice for the two low-precision types.
pub fn torch_product_is_fast(dtype: DType) -> bool {
    static CHOICE: OnceLock<Option<bool>> = OnceLock::new();
    let forced = CHOICE.get_or_init(|| match std::env::var("TSUGI_CPU_PRODUCT").as_deref() {
        Ok("torch") => Some(true),
        Ok("own") => Some(false),
        _ => None,
    });
    match dtype {
        DType::F32 | DType::F64 => true,
        DType::BF16 | DType::F16 => forced.unwrap_or_else(|| has_units_for(dtype)),
        _ => false,
    }
}

#[cfg(target_arch = "x86_64")]
fn has_units_for(dtype: DType) -> bool {
    use std::arch::is_x86_feature_detected;
    if dtype == DType::F16 {
        return is_x86_feature_detected!("avx512fp16");
    }
    is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_units_for(_: DType) -> bool {
    false
}

/// `count` zeros, or an error where there is no memory for them: aborting the process is not ours to do.
pub(crate) fn zeros<T: Clone + Default>(op: &'static str, count: usize) -> Result<Vec<T>> {
    let mut out = Vec::new();
    out.try_reserve_exact(count).map_err(|_| Error::Internal {
        op,
        what: format!("no memory for {count} elements of an intermediate result"),
    })?;
    out.resize(count, T::default());
    Ok(out)
}

/// `count` sums of tasks, as the bits of float64; an error where there is no memory for them.
pub(crate) fn partial_sums(op: &'static str, count: usize) -> Result<Vec<AtomicU64>> {
    let zeros = zeros::<u64>(op, count)?;
    Ok(zeros.into_iter().map(AtomicU64::new).collect())
}

/// Runs `body` compiled for the best instruction set of this machine.
///
/// `body` must be an `#[inline(always)]` closure, or the compiler may keep it as a function of its own,
/// built for the baseline instruction set. (`FnMut` for the same reason: calling a shared closure as
/// `FnOnce` goes through a shim.)
pub(crate) fn vectorized<R>(body: impl FnMut() -> R) -> R {
    struct Body<F>(F);
    impl<R, F: FnMut() -> R> pulp::WithSimd for Body<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(mut self, _: S) -> R {
            (self.0)()
        }
    }
    Arch::new().dispatch(Body(body))
}
