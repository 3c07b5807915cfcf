//! tsugi-kpool: LoRA kernels for PyTorch and PEFT, in Rust.
//!
//! K LoRA adapters that are active on the same tokens cost what one adapter of their summed rank
//! costs: `Y = X W^T + b + sum over k of s_k B_k A_k drop_k(X)` in one call, forward and backward.
//!
//! # The map
//!
//! | module | what it is |
//! | --- | --- |
//! | [`ops`] | the operations, one file each: checks, CPU path, tests |
//! | [`cuda`] | the same operations on a device: launches, and with feature `cuda` the kernels and the driver |
//! | [`cpu`] | the matrix product and conversions that they share |
//! | [`philox`] | dropout masks from a counter |
//! | [`router`] | which K of N adapters are active in a step (pure, seeded) |
//! | [`tensor`] | borrowed views of tensors that torch owns |
//! | [`memory`] | bounds, alignment and overlap of those views |
//! | [`host`] | threads and dense products of the process we run in (torch's, inside Python) |
//! | [`sideband`] | how far the other nodes are in phase: an agent of its own thread |
//! | [`trigger`] | HOLD or FIRE: the decision, its reason, the length of the next window; pure |
//! | [`error`] | the one error type |
//! | `bridge` | feature `extension`: cxx, the only door for tensors |
//! | `python` | feature `extension`: pyo3, the only door for everything without tensors |
//!
//! # The two flows
//!
//! *A layer's forward and backward*: `torch.ops.tsugi.lora_linear` -> `cpp/ops.cpp` (adapter) ->
//! `bridge` (views, allocation through torch) -> [`ops::lora_linear`] (checks, then torch's product for
//! the frozen weight and [`cpu::gemm`] for the adapters). Autograd is in `python/tsugi_kpool/ops.py`.
//!
//! *A gradient snapshot*: `torch.ops.tsugi.sideband_accumulate_` -> `bridge` ->
//! [`ops::sideband_accumulate`]: S += w g and the trigger's scalars; [`ops::sideband_stats`] reads them,
//! [`ops::sideband_drain`] turns S into a gradient.
//!
//! # Words
//!
//! | word | meaning |
//! | --- | --- |
//! | M, I, O | tokens, in-features, out-features |
//! | r, R | LoRA rank of one adapter, sum over the active ones |
//! | N, K | adapters in the pool, adapters active in a call |
//! | A, B, H | A `[r, I]`, B `[O, r]` as in PEFT; H = drop(X) A^T `[M, R]` |
//! | S, Q, m, n | an adapter's accumulated gradient, sum of squared norms, snapshots, weight |
//! | rank | a distributed process, never r |

#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic)
)]

pub mod cpu;
pub mod cuda;
pub mod error;
pub mod host;
pub mod memory;
pub mod ops;
pub mod philox;
pub mod router;
pub mod sideband;
pub mod tensor;
pub mod trigger;

#[cfg(feature = "extension")]
mod bridge;
#[cfg(feature = "extension")]
mod python;
