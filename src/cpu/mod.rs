//! The CPU side: vector conversions and the matrix product that the low-rank operations share.

pub mod gemm;
pub mod num;

use pulp::Arch;

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
/// torch falls back to a scalar product, which is 10 to 400 times slower than float32.
pub fn torch_product_is_fast(dtype: crate::tensor::DType) -> bool {
    use crate::tensor::DType;
    match dtype {
        DType::F32 | DType::F64 => true,
        #[cfg(target_arch = "x86_64")]
        DType::BF16 => {
            std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512dq")
                && std::arch::is_x86_feature_detected!("avx512vl")
        }
        #[cfg(target_arch = "x86_64")]
        DType::F16 => std::arch::is_x86_feature_detected!("avx512fp16"),
        _ => false,
    }
}
