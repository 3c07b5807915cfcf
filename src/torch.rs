//! The floor: what torch does for this crate. Tensors and their facts, allocation, copies, dense products, threads.
//!
//! Only torch's stable ABI lies below (cpp/torch.cpp). No C++ exception crosses where Rust cannot take it: what may throw
//! returns `Result`, and the facts of a tensor were read when C++ made it.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use crate::error::{Error, Result};
use crate::memory::{self, Facts};
use crate::tensor::{DType, DenseProduct, Device, Mat, TensorMut, TensorRef};
use cxx::{CxxVector, UniquePtr};
use std::ops::Range;

// The lints are for what is written here, not for the code that the macro expands to.
#[allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]
// Without the kernels nobody asks for torch's stream.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
#[cxx::bridge(namespace = "tsugi")]
pub mod ffi {
    /// A matrix in memory that somebody else owns; strides in elements, torch's scalar type code.
    struct Matrix {
        data: usize,
        rows: i64,
        cols: i64,
        row_stride: i64,
        col_stride: i64,
        dtype: i32,
        /// CUDA device, or -1 for the CPU.
        device: i32,
    }

    unsafe extern "C++" {
        include!("tsugi-kpool/cpp/torch.h");

        type Tensor;
        fn name(self: &Tensor) -> &CxxString;
        fn data(self: &Tensor) -> *const u8;
        fn sizes(self: &Tensor) -> &[i64];
        fn strides(self: &Tensor) -> &[i64];
        #[rust_name = "dtype_code"]
        fn dtype(self: &Tensor) -> i32;
        fn device_type(self: &Tensor) -> i32;
        fn device_index(self: &Tensor) -> i32;
        fn storage_offset(self: &Tensor) -> i64;
        fn storage_bytes(self: &Tensor) -> i64;

        fn empty(sizes: &[i64], dtype: i32, like: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn empty_strided(
            sizes: &[i64],
            strides: &[i64],
            dtype: i32,
            like: &Tensor,
        ) -> Result<UniquePtr<Tensor>>;
        fn copy_(destination: &Tensor, source: &Tensor) -> Result<()>;
        fn zero_(tensor: &Tensor) -> Result<()>;
        fn list() -> UniquePtr<CxxVector<Tensor>>;
        fn push(list: Pin<&mut CxxVector<Tensor>>, tensor: UniquePtr<Tensor>);

        fn dense_product(out: &Matrix, beta: f64, alpha: f64, a: &Matrix, b: &Matrix)
        -> Result<()>;
        fn parallel_for(
            n: i64,
            grain: i64,
            context: usize,
            body: fn(i64, i64, usize),
        ) -> Result<()>;
        fn num_threads() -> u32;
        fn forked() -> bool;
        fn cuda_stream(device: i32) -> Result<usize>;
    }

    impl CxxVector<Tensor> {}
}

pub use ffi::Tensor;

/// What an operation returns: new tensors, in the order of its schema.
pub type Tensors = UniquePtr<CxxVector<Tensor>>;

// ---- torch's scalar type codes ----

fn dtype_of(code: i32) -> DType {
    match code {
        3 => DType::I32,
        4 => DType::I64,
        5 => DType::F16,
        6 => DType::F32,
        7 => DType::F64,
        15 => DType::BF16,
        other => DType::Other(other),
    }
}

fn code_of(dtype: DType) -> i32 {
    match dtype {
        DType::I32 => 3,
        DType::I64 => 4,
        DType::F16 => 5,
        DType::F32 => 6,
        DType::F64 => 7,
        DType::BF16 => 15,
        DType::Other(code) => code,
    }
}

fn failed(op: &'static str) -> impl Fn(cxx::Exception) -> Error {
    move |error| Error::Torch {
        op,
        what: error.what().to_owned(),
    }
}

// ---- tensors ----

impl Tensor {
    pub fn dtype(&self) -> DType {
        dtype_of(self.dtype_code())
    }

    pub fn device(&self) -> Device {
        match self.device_type() {
            0 => Device::Cpu,
            1 => Device::Cuda(self.device_index()),
            other => Device::Other(other),
        }
    }

    pub fn facts(&self) -> Facts<'_> {
        Facts {
            name: self.name().to_str().unwrap_or("an argument"),
            data: self.data(),
            sizes: self.sizes(),
            strides: self.strides(),
            element_bytes: self.dtype().size(),
            storage_offset: self.storage_offset(),
            storage_bytes: self.storage_bytes(),
        }
    }

    pub fn view(&self, op: &'static str) -> Result<TensorRef<'_>> {
        let facts = self.facts();
        facts.check(op)?;
        facts.check_alignment(op)?;
        // SAFETY: C++ holds a reference to the tensor for the whole call; all elements lie inside its storage and are
        // aligned, as was just checked. For a dtype that no operation takes (`DType::Other`) the check knew one byte
        // an element, and nothing is read.
        Ok(unsafe {
            TensorRef::new(
                facts.data,
                facts.sizes,
                facts.strides,
                self.dtype(),
                self.device(),
            )
        })
    }

    /// Callers made sure that the tensor is written by nobody else and read through no other view: it is new, or
    /// `check_written` had it among the written arguments.
    pub fn view_mut(&self, op: &'static str) -> Result<TensorMut<'_>> {
        let view = self.view(op)?;
        // SAFETY: as in `view`, and this function's own contract.
        Ok(unsafe {
            TensorMut::new(
                view.data().cast_mut(),
                view.sizes(),
                view.strides(),
                view.dtype(),
                view.device(),
            )
        })
    }
}

/// A new contiguous tensor, of arbitrary values, on `like`'s device.
pub fn empty(
    op: &'static str,
    sizes: &[i64],
    dtype: DType,
    like: &Tensor,
) -> Result<UniquePtr<Tensor>> {
    ffi::empty(sizes, code_of(dtype), like).map_err(failed(op))
}

/// A new tensor of arbitrary values, of the sizes and dtype of another, and of its layout if that is dense.
pub fn empty_like(op: &'static str, like: &Tensor) -> Result<UniquePtr<Tensor>> {
    let strides = memory::dense_strides(like.sizes(), like.strides());
    ffi::empty_strided(like.sizes(), &strides, like.dtype_code(), like).map_err(failed(op))
}

pub fn list(tensors: impl IntoIterator<Item = UniquePtr<Tensor>>) -> Tensors {
    let mut list = ffi::list();
    for tensor in tensors {
        ffi::push(list.pin_mut(), tensor);
    }
    list
}

/// Whether torch's own loops must not run over a tensor: in the child of a fork they wait for threads that are not
/// there, and at an odd address they may use instructions that need an even one.
fn not_for_torch(tensor: &Tensor) -> bool {
    tensor.device() == Device::Cpu && (forked() || !tensor.facts().is_aligned())
}

/// Copies between tensors of one shape and dtype that share no memory.
pub fn copy_(op: &'static str, to: &Tensor, from: &Tensor) -> Result<()> {
    if !not_for_torch(to) && !not_for_torch(from) {
        return ffi::copy_(to, from).map_err(failed(op));
    }
    let (target, source) = (to.facts(), from.facts());
    target.check(op)?;
    source.check(op)?;
    if target.sizes != source.sizes || to.dtype_code() != from.dtype_code() {
        return Err(Error::Internal {
            op,
            what: "a copy of another shape or dtype".into(),
        });
    }
    let width = target.element_bytes as i64;
    let strides = (target.strides, source.strides);
    memory::each_offset(target.sizes, strides, (0, 0), &mut |to, from| {
        // SAFETY: both elements lie inside their storages (just checked), of `width` bytes each; one of the two tensors
        // is new, so they share nothing.
        unsafe {
            let target = target
                .data
                .cast_mut()
                .wrapping_offset((to * width) as isize);
            let source = source.data.wrapping_offset((from * width) as isize);
            std::ptr::copy_nonoverlapping(source, target, width as usize);
        }
    });
    Ok(())
}

/// Zeroes a written argument.
pub fn zero_(op: &'static str, tensor: &Tensor) -> Result<()> {
    if !not_for_torch(tensor) {
        return ffi::zero_(tensor).map_err(failed(op));
    }
    let facts = tensor.facts();
    facts.check(op)?;
    let width = facts.element_bytes as i64;
    let strides = (facts.strides, facts.strides);
    memory::each_offset(facts.sizes, strides, (0, 0), &mut |at, _| {
        // SAFETY: the element lies inside the storage (just checked) and is written by nobody else (`check_written`).
        unsafe {
            let target = facts.data.cast_mut().wrapping_offset((at * width) as isize);
            std::ptr::write_bytes(target, 0, width as usize);
        }
    });
    Ok(())
}

// ---- products and threads ----

/// `device` is a CUDA device, or -1 for the CPU.
fn matrix(mat: &Mat, device: i32) -> ffi::Matrix {
    ffi::Matrix {
        data: mat.data() as usize,
        rows: mat.rows as i64,
        cols: mat.cols as i64,
        row_stride: mat.rs as i64,
        col_stride: mat.cs as i64,
        dtype: code_of(mat.dtype),
        device,
    }
}

/// Torch's own product, of matrices on one device.
pub fn dense_product(op: &'static str, device: Device, product: &DenseProduct) -> Result<()> {
    let out = product.out.mat();
    if out.rows == 0 || out.cols == 0 {
        return Ok(());
    }
    let index = match device {
        Device::Cuda(index) => index,
        _ => -1,
    };
    let there = |mat: &Mat| matrix(mat, index);
    ffi::dense_product(
        &there(out),
        product.beta,
        product.alpha,
        &there(&product.a),
        &there(&product.b),
    )
    .map_err(failed(op))
}

pub fn threads() -> usize {
    ffi::num_threads() as usize
}

/// Whether this process is the child of a fork: torch's threads stayed with the parent.
pub fn forked() -> bool {
    ffi::forked()
}

/// Torch's current stream on a CUDA device.
#[cfg(feature = "cuda")]
pub fn stream(op: &'static str, device: i32) -> Result<usize> {
    ffi::cuda_stream(device).map_err(failed(op))
}

/// Runs `body` over pieces of `0..n` on torch's threads; `body` does not panic (`host::parallel_for` sees to it).
pub fn run(
    op: &'static str,
    n: usize,
    grain: usize,
    body: &(dyn Fn(Range<usize>) + Sync),
) -> Result<()> {
    fn call(begin: i64, end: i64, context: usize) {
        // SAFETY: `context` is the address of the `body` reference of the enclosing call of `run`,
        // which waits for all pieces.
        let body = unsafe { *(context as *const &(dyn Fn(Range<usize>) + Sync)) };
        body(begin as usize..end as usize);
    }
    let context = std::ptr::from_ref(&body) as usize;
    ffi::parallel_for(n as i64, grain as i64, context, call).map_err(failed(op))
}
