//! The only door for everything without tensors: the Python module `tsugi_kpool._native`.
//!
//! Loading it also registers `torch.ops.tsugi.*` (the tables of cpp/ops.cpp).

mod array;
mod record;
mod router;
mod sideband;
mod trigger;

use pyo3::prelude::*;

/// Facts about this build and this machine, for `tsugi_kpool.doctor`.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, pyo3::types::PyDict>> {
    use crate::cpu::{instruction_set, torch_product_is_fast};
    use crate::tensor::DType;
    let info = pyo3::types::PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("instruction_set", instruction_set())?;
    info.set_item(
        "torch_bfloat16_product_is_fast",
        torch_product_is_fast(DType::BF16),
    )?;
    info.set_item(
        "torch_float16_product_is_fast",
        torch_product_is_fast(DType::F16),
    )?;
    info.set_item("cuda_kernels", cfg!(feature = "cuda"))?;
    Ok(info)
}

/// What each kernel that is built in needs: (name, architecture, registers, bytes spilled, bytes of static shared memory).
#[cfg(feature = "cuda")]
#[pyfunction]
fn kernel_resources() -> Vec<(&'static str, &'static str, u32, u32, u32)> {
    crate::cuda::driver::resources().to_vec()
}

/// The names of the kernels that the operations launch.
#[pyfunction]
fn kernel_names() -> Vec<String> {
    crate::cuda::kernel_names()
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    router::register(module)?;
    trigger::register(module)?;
    module.add_class::<sideband::SidebandAgent>()?;
    module.add_function(wrap_pyfunction!(sideband::read_sideband_key, module)?)?;
    module.add_function(wrap_pyfunction!(sideband::sideband_constants, module)?)?;
    module.add_function(wrap_pyfunction!(kernel_names, module)?)?;
    #[cfg(feature = "cuda")]
    module.add_function(wrap_pyfunction!(kernel_resources, module)?)?;
    module.add_function(wrap_pyfunction!(build_info, module)?)
}
