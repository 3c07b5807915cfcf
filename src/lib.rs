//! tsugi-kpool: LoRA kernels for PyTorch and PEFT, in Rust.
//!
//! K LoRA adapters that are active on the same tokens cost what one adapter of their summed r
//! costs: `Y = X W^T + b + sum over k of s_k B_k A_k drop_k(X)` in one call, forward and backward.
//!
//! # The map
//!
//! | module | what it is |
//! | --- | --- |
//! | [`ops`] | the operations, one file each: checks, CPU path, tests |
//! | [`cuda`] | the same operations on a device: launches, and with feature `cuda` the kernels and the driver |
//! | [`cpu`] | the matrix products and conversions that they share |
//! | [`philox`] | dropout masks from a counter |
//! | [`router`] | which K of N adapters are active in a step (pure, seeded) |
//! | [`tensor`] | borrowed views of tensors that torch owns |
//! | [`memory`] | bounds, alignment and overlap of those views |
//! | [`host`] | threads of the process we run in (torch's, inside Python) |
//! | [`sideband`] | how far the other nodes are in phase: an agent with a thread of its own |
//! | [`statistics`] | variance and power of a gradient buffer, on one rank and over all; pure |
//! | [`trigger`] | HOLD or FIRE: the decision, its reason, the length of the next window; pure |
//! | [`error`] | the one error type |
//! | `torch` | feature `extension`: what torch does for us, the floor below `host` and `cpu::dense` |
//! | `bridge` | feature `extension`: cxx, the only door for tensors |
//! | `python` | feature `extension`: pyo3, the only door for everything without tensors |
//!
//! # The four flows
//!
//! *A layer's forward and backward*: `torch.ops.tsugi.lora_linear` -> `cpp/ops.cpp` (adapter) -> `bridge` (views, new
//! tensors) -> [`ops::lora_linear`] (checks), then on the CPU [`cpu::dense`] for the frozen weight and [`cpu::gemm`]
//! for the adapters, on a device [`cuda::lora`]. Autograd is Python's.
//!
//! *A gradient, from backward to the wire*: `torch.ops.tsugi.sideband_accumulate_` -> `bridge` ->
//! [`ops::sideband_accumulate`]: S += w g and the scalars of the trigger; [`ops::sideband_stats`] makes numbers of them
//! ([`statistics`]), which Python exchanges between ranks. When they say FIRE, ranks reduce S, and
//! [`ops::sideband_drain`] turns it into a gradient.
//!
//! *A decision*: `python` (the agreed numbers of all ranks) -> [`statistics::fold`] or [`statistics::pooled`] ->
//! [`trigger::Rule::decide`]: HOLD or FIRE with its reason; [`trigger::Rule::plan`]: how long the next window is. Which
//! adapters a step has is [`router::Router::select`]'s. All of it is pure, so every rank concludes the same.
//!
//! *A heartbeat, from one host to the trigger of another*: [`sideband::node`] (the thread) asks [`sideband::table`] what is
//! due, seals it ([`sideband::session`]) and sends it; there [`sideband::frame`] reads it, [`sideband::clock`] learns the
//! other clock, [`sideband::phase`] says how far the two are apart; `python` hands that out as a snapshot.
//!
//! # Words
//!
//! | word | meaning |
//! | --- | --- |
//! | M, I, O | tokens, in-features, out-features |
//! | r, R | width of one adapter (PEFT's `r`), sum over the active ones |
//! | N, K | adapters in the pool, adapters active in a call |
//! | A, B, H | A `[r, I]`, B `[O, r]` as in PEFT; H = drop(X) A^T `[M, R]` |
//! | S, Q, m, n | an adapter's accumulated gradient, sum of squared norms, snapshots, weight |
//! | V, P | variance of one snapshot, squared norm of their mean |
//! | window | from one FIRE of an adapter to the next; a HOLD in it keeps S |
//! | rank | a distributed process, never r |
//! | node | a host in the sideband |
//! | the sideband | the agent between hosts; `sideband_*` among the operations are the gradient buffer's |
//! | machine | what runs kernels: a device, or the host executor in tests |

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
pub mod statistics;
pub mod tensor;
pub mod trigger;

#[cfg(feature = "extension")]
mod bridge;
#[cfg(feature = "extension")]
mod python;
#[cfg(feature = "extension")]
mod torch;
