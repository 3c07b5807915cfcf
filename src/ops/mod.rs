//! The operations: one file each, with its checks, its CPU path and its tests.
//!
//! Every file has the same two levels: `check`, which turns arguments into shapes or a sentence, and
//! `run`, which computes into memory the caller allocated. Nothing here allocates or frees tensors.
//! They share [`arguments`] (adapters and checks), `frozen` (the frozen layer's own products) and
//! `torch_products` (the adapters' products by torch, where that is faster).

pub mod arguments;
pub mod buffer_variance;
mod frozen;
pub mod lora_backward;
pub mod lora_expand;
pub mod lora_experts;
pub mod lora_linear;
pub mod lora_shrink;
pub mod sideband_accumulate;
pub mod sideband_drain;
pub mod sideband_stats;
mod torch_products;

#[cfg(test)]
pub(crate) mod testing {
    //! Owned tensors for unit tests.
    use crate::cpu::num::Stored;
    use crate::tensor::{Device, TensorMut, TensorRef};

    pub struct Owned<E> {
        pub data: Vec<E>,
        sizes: Vec<i64>,
        strides: Vec<i64>,
    }

    impl<E: Stored> Owned<E> {
        pub fn new(sizes: &[usize], value: impl Fn(usize) -> f64) -> Self {
            let count = sizes.iter().product();
            let mut strides = vec![1i64; sizes.len()];
            for i in (0..sizes.len().saturating_sub(1)).rev() {
                strides[i] = strides[i + 1] * sizes[i + 1] as i64;
            }
            Owned {
                data: (0..count).map(|i| E::narrow(value(i))).collect(),
                sizes: sizes.iter().map(|&s| s as i64).collect(),
                strides,
            }
        }

        pub fn view(&self) -> TensorRef<'_> {
            // SAFETY: the vector has the shape it was made with and outlives the view.
            unsafe {
                TensorRef::new(
                    self.data.as_ptr().cast(),
                    &self.sizes,
                    &self.strides,
                    E::DTYPE,
                    Device::Cpu,
                )
            }
        }

        pub fn view_mut(&mut self) -> TensorMut<'_> {
            // SAFETY: as in `view`, and the borrow is exclusive.
            unsafe {
                TensorMut::new(
                    self.data.as_mut_ptr().cast(),
                    &self.sizes,
                    &self.strides,
                    E::DTYPE,
                    Device::Cpu,
                )
            }
        }
    }

    /// Deterministic values of about unit size, different for each `seed`.
    pub fn noise(seed: usize) -> impl Fn(usize) -> f64 {
        move |i| {
            let hash = ((i + 1).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 10_007;
            hash as f64 / 5_003.5 - 1.0
        }
    }
}
