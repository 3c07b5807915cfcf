//! Element types: conversion to the type that is computed in, and back with one rounding.

use crate::tensor::{DType, Element};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::Simd;

/// A type that products are accumulated in: float32, or float64 where an operand is float64.
pub trait Real:
    Element + Default + PartialOrd + std::ops::Mul<Output = Self> + std::ops::Add<Output = Self>
{
    type Vector<S: Simd>: Copy;
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;
    fn fma<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    fn sum<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// The sum of a vector's lanes, in an order that depends on the instruction set alone.
    fn sum_of_lanes<S: Simd>(simd: S, a: Self::Vector<S>) -> Self;
    fn from_f64(value: f64) -> Self;
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    fn to_f64(self) -> f64;
}

impl Real for f32 {
    type Vector<S: Simd> = S::f32s;
    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: f32) -> S::f32s {
        simd.splat_f32s(value)
    }
    #[inline(always)]
    fn fma<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, c)
    }
    #[inline(always)]
    fn sum<S: Simd>(simd: S, a: S::f32s, b: S::f32s) -> S::f32s {
        simd.add_f32s(a, b)
    }
    #[inline(always)]
    fn sum_of_lanes<S: Simd>(simd: S, a: S::f32s) -> f32 {
        simd.reduce_sum_f32s(a)
    }
    #[inline(always)]
    fn from_f64(value: f64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    type Vector<S: Simd> = S::f64s;
    #[inline(always)]
    fn splat<S: Simd>(simd: S, value: f64) -> S::f64s {
        simd.splat_f64s(value)
    }
    #[inline(always)]
    fn fma<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_e_f64s(a, b, c)
    }
    #[inline(always)]
    fn sum<S: Simd>(simd: S, a: S::f64s, b: S::f64s) -> S::f64s {
        simd.add_f64s(a, b)
    }
    #[inline(always)]
    fn sum_of_lanes<S: Simd>(simd: S, a: S::f64s) -> f64 {
        simd.reduce_sum_f64s(a)
    }
    #[inline(always)]
    fn from_f64(value: f64) -> f64 {
        value
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f64 {
        f64::from(value)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
}

/// A stored type: what a tensor holds.
pub trait Stored: Element {
    fn widen<T: Real>(self) -> T;
    fn narrow<T: Real>(value: T) -> Self;
    /// `dst[i] = src[i]` for equal lengths, in vector code where the type allows.
    #[inline(always)]
    fn widen_slice<T: Real>(src: &[Self], dst: &mut [T]) {
        for (out, value) in dst.iter_mut().zip(src) {
            *out = value.widen();
        }
    }
}

impl Stored for f32 {
    #[inline(always)]
    fn widen<T: Real>(self) -> T {
        T::from_f32(self)
    }
    #[inline(always)]
    fn narrow<T: Real>(value: T) -> f32 {
        value.to_f32()
    }
}

impl Stored for f64 {
    #[inline(always)]
    fn widen<T: Real>(self) -> T {
        T::from_f64(self)
    }
    #[inline(always)]
    fn narrow<T: Real>(value: T) -> f64 {
        value.to_f64()
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen<T: Real>(self) -> T {
        T::from_f32(f32::from_bits(u32::from(self.to_bits()) << 16))
    }
    /// Round to nearest even without a branch, so that loops over it stay vector code.
    #[inline(always)]
    fn narrow<T: Real>(value: T) -> bf16 {
        let bits = value.to_f32().to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet_nan = (bits >> 16) | 0x40;
        let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
        bf16::from_bits(if is_nan { quiet_nan } else { rounded } as u16)
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widen<T: Real>(self) -> T {
        T::from_f32(self.to_f32())
    }
    #[inline(always)]
    fn narrow<T: Real>(value: T) -> f16 {
        f16::from_f32(value.to_f32())
    }
    #[inline(always)]
    fn widen_slice<T: Real>(src: &[f16], dst: &mut [T]) {
        let mut buffer = [0.0f32; 64];
        for (from, to) in src.chunks(64).zip(dst.chunks_mut(64)) {
            let wide = &mut buffer[..from.len()];
            from.convert_to_f32_slice(wide);
            for (out, value) in to.iter_mut().zip(wide.iter()) {
                *out = T::from_f32(*value);
            }
        }
    }
}

/// Calls `$body` with `$E` bound to the Rust type of a floating `$dtype`.
#[macro_export]
macro_rules! with_float {
    ($dtype:expr, $E:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::F32 => {
                type $E = f32;
                $body
            }
            $crate::tensor::DType::F64 => {
                type $E = f64;
                $body
            }
            $crate::tensor::DType::BF16 => {
                type $E = half::bf16;
                $body
            }
            $crate::tensor::DType::F16 => {
                type $E = half::f16;
                $body
            }
            // Every operation checks its dtypes before it computes.
            other => unreachable!("{other} is not a floating type"),
        }
    };
}

/// The type that sums are kept in for operands of these dtypes.
pub fn compute_dtype(dtypes: &[DType]) -> DType {
    if dtypes.contains(&DType::F64) {
        DType::F64
    } else {
        DType::F32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounding_is_the_standard_one() {
        let mut bits = 1u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            let ours = <bf16 as Stored>::narrow(value);
            let standard = bf16::from_f32(value);
            assert!(
                ours == standard || (ours.is_nan() && standard.is_nan()),
                "{value:e}"
            );
        }
        for value in [0.0, -0.0, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE] {
            assert_eq!(
                <bf16 as Stored>::narrow(value).to_bits(),
                bf16::from_f32(value).to_bits()
            );
        }
    }

    #[test]
    fn slices_widen_like_elements() {
        let halves: Vec<f16> = (0..130)
            .map(|i| f16::from_f32(i as f32 * 0.37 - 20.0))
            .collect();
        let mut wide = vec![0.0f32; 130];
        f16::widen_slice(&halves, &mut wide);
        for (half, value) in halves.iter().zip(&wide) {
            assert_eq!(half.to_f32(), *value);
        }
    }
}
