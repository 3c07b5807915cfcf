//! The operations on a CUDA device: which kernel runs on which grid, with which parameters.
//!
//! | part | what it is |
//! | --- | --- |
//! | [`lora`] | lora_linear, lora_delta, lora_shrink, lora_expand_, lora_backward |
//! | [`experts`] | lora_experts and its gradients |
//! | [`buffer`] | sideband_accumulate_, sideband_stats, sideband_drain_, buffer_variance |
//! | [`params`] | the kernels' parameter structs |
//! | [`tile`] | the block sizes, read from `kernels/` at build time |
//! | `driver` | feature `cuda`: the fatbin, the driver API, torch's stream |
//!
//! Everything but `driver` is pure: it speaks to a [`Machine`], which is the driver in the Python module and the
//! host executor in `tests/executor.rs`, so that what is launched on a GPU is what is tested without one.
//!
//! Nothing here allocates or frees torch's memory, waits for the device or copies to it: parameters travel with the
//! launch, so a call can be captured in a CUDA graph.

pub mod buffer;
pub mod experts;
pub mod lora;
pub mod params;

#[cfg(feature = "cuda")]
pub mod driver;

/// Block sizes, each defined once beside its kernel.
pub mod tile {
    include!(concat!(env!("OUT_DIR"), "/tile.rs"));
}

use crate::error::{Error, Result};
use crate::tensor::{DType, DenseProduct};
use std::ffi::c_void;

/// One kernel launch.
pub struct Launch<'a> {
    pub kernel: &'a str,
    pub grid: [usize; 3],
    pub threads: usize,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// The kernel's only parameter.
    pub params: *const c_void,
    pub params_bytes: usize,
}

/// What an operation needs of the machine. Launches of one call run in order.
pub trait Machine {
    /// # Safety
    /// The parameters are those of this kernel, and every address in them is valid for it until it has run.
    unsafe fn launch(&self, op: &'static str, launch: &Launch<'_>) -> Result<()>;
    /// Memory of the device, aligned to 16 bytes, until the launches of this call have run.
    fn scratch(&self, op: &'static str, bytes: usize) -> Result<*mut c_void>;
    /// Multiprocessors.
    fn processors(&self) -> usize;
    /// The vendor's product, as [`crate::cpu::dense::dense_product`].
    fn dense_product(&self, op: &'static str, product: &DenseProduct) -> Result<()>;
}

/// Launches `kernel` with `params`, unless the grid is empty.
///
/// # Safety
/// As [`Machine::launch`]: `P` is the struct that `kernel` takes.
unsafe fn launch<P>(
    machine: &dyn Machine,
    op: &'static str,
    kernel: &str,
    grid: [usize; 3],
    threads: usize,
    shared: usize,
    params: &P,
) -> Result<()> {
    if grid.contains(&0) {
        return Ok(());
    }
    if grid[0] > i32::MAX as usize || grid[1] > 65535 || grid[2] > 65535 {
        return Err(Error::argument(
            op,
            format!(
                "the tensors are too large for one launch of {kernel}: its grid would be {grid:?}"
            ),
        ));
    }
    let launch = Launch {
        kernel,
        grid,
        threads,
        shared,
        params: std::ptr::from_ref(params).cast(),
        params_bytes: size_of::<P>(),
    };
    // SAFETY: the caller's promise.
    unsafe { machine.launch(op, &launch) }
}

/// The dtype's part of a kernel's name.
fn name(op: &'static str, dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::BF16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        DType::F32 => Ok("f32"),
        DType::F64 => Ok("f64"),
        other => Err(Error::Internal {
            op,
            what: format!("no kernel for {other}"),
        }),
    }
}

/// The names of all kernels that this module can ask for.
pub fn kernel_names() -> Vec<String> {
    let mut names = lora::kernel_names();
    names.extend(experts::kernel_names());
    names.extend(buffer::kernel_names());
    names
}
