//! The only door for tensors: torch's dispatcher on one side, the operations on the other.
//!
//! What crosses it: borrowed tensors inwards, newly allocated tensors and error sentences outwards. No
//! panic crosses: every entry point runs under `guard`. No C++ exception does where Rust cannot take it: what
//! may throw returns `Result`, and the facts of a tensor were read when C++ made it.
//!
//! What the views of `tensor.rs` rely on: C++ keeps each borrowed tensor alive for the whole call; a view is made
//! by `Tensor::view` alone, which checks that all elements lie in the storage, aligned (`memory.rs`); and an
//! operation that writes calls `check_written` first.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use crate::cuda::{self, low_rank::Mask};
use crate::error::{Error, Result};
use crate::memory::{self, Facts};
use crate::ops::sideband_accumulate::field;
use crate::ops::{
    self, buffer_variance as ring_op, lora_backward as backward_op, lora_expand, lora_experts,
    lora_linear, lora_shrink as shrink_op,
};
use crate::ops::{sideband_accumulate, sideband_drain, sideband_stats as stats_op};
use crate::tensor::{DType, Device, Mat, MatMut, StackMut, TensorMut, TensorRef};
use cxx::{CxxVector, UniquePtr};
use std::cell::RefCell;
use std::ffi::c_void;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

type Tensors = UniquePtr<CxxVector<ffi::Tensor>>;

// The lints are for what is written here, not for the code that the macro expands to.
#[allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]
// Without the kernels nobody asks for torch's stream.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
#[cxx::bridge(namespace = "tsugi")]
mod ffi {
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
        include!("tsugi-kpool/cpp/ops.h");

        type Tensor;
        fn name(self: &Tensor) -> &CxxString;
        fn data(self: &Tensor) -> *const u8;
        fn sizes(self: &Tensor) -> &[i64];
        fn strides(self: &Tensor) -> &[i64];
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

    extern "Rust" {
        #[allow(clippy::too_many_arguments)]
        fn lora_apply(
            base: &CxxVector<Tensor>,
            x: &Tensor,
            weight: &CxxVector<Tensor>,
            bias: &CxxVector<Tensor>,
            a: &CxxVector<Tensor>,
            b: &CxxVector<Tensor>,
            scaling: &[f64],
            dropout_p: f64,
            rng: &CxxVector<Tensor>,
        ) -> Result<UniquePtr<CxxVector<Tensor>>>;
        fn lora_shrink(
            x: &Tensor,
            a: &CxxVector<Tensor>,
            dropout_p: f64,
            rng: &CxxVector<Tensor>,
        ) -> Result<UniquePtr<CxxVector<Tensor>>>;
        fn lora_expand_(
            y: &Tensor,
            h: &Tensor,
            b: &CxxVector<Tensor>,
            scaling: &[f64],
        ) -> Result<()>;
        #[allow(clippy::too_many_arguments)]
        fn lora_backward(
            grad: &Tensor,
            x: &CxxVector<Tensor>,
            h: &CxxVector<Tensor>,
            weight: &CxxVector<Tensor>,
            a: &CxxVector<Tensor>,
            b: &CxxVector<Tensor>,
            scaling: &[f64],
            dropout_p: f64,
            rng: &CxxVector<Tensor>,
            need_x: bool,
            need_a: bool,
            need_b: bool,
        ) -> Result<UniquePtr<CxxVector<Tensor>>>;
        #[allow(clippy::too_many_arguments)]
        fn lora_experts_apply(
            base: &Tensor,
            x: &Tensor,
            ends: &Tensor,
            a: &CxxVector<Tensor>,
            b: &CxxVector<Tensor>,
            scaling: &[f64],
            dropout_p: f64,
            rng: &CxxVector<Tensor>,
        ) -> Result<UniquePtr<CxxVector<Tensor>>>;
        #[allow(clippy::too_many_arguments)]
        fn lora_experts_backward(
            grad: &Tensor,
            x: &CxxVector<Tensor>,
            h: &CxxVector<Tensor>,
            ends: &Tensor,
            a: &CxxVector<Tensor>,
            b: &CxxVector<Tensor>,
            scaling: &[f64],
            dropout_p: f64,
            rng: &CxxVector<Tensor>,
            need_x: bool,
            need_a: bool,
            need_b: bool,
        ) -> Result<UniquePtr<CxxVector<Tensor>>>;
        fn sideband_accumulate_(
            sum: &CxxVector<Tensor>,
            stats: &Tensor,
            grad: &CxxVector<Tensor>,
            weight: f64,
            zero_grad: bool,
        ) -> Result<()>;
        fn sideband_stats(
            sum: &CxxVector<Tensor>,
            stats: &Tensor,
        ) -> Result<UniquePtr<CxxVector<Tensor>>>;
        fn sideband_drain_(
            sum: &CxxVector<Tensor>,
            stats: &Tensor,
            grad: &CxxVector<Tensor>,
            scale: f64,
        ) -> Result<()>;
        fn buffer_variance(ring: &Tensor, filled: i64) -> Result<UniquePtr<CxxVector<Tensor>>>;
    }
}

use ffi::Tensor;

// ---- torch's scalar type and device codes ----

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

fn device_of(tensor: &Tensor) -> Device {
    match tensor.device_type() {
        0 => Device::Cpu,
        1 => Device::Cuda(tensor.device_index()),
        other => Device::Other(other),
    }
}

// ---- views and outputs ----

impl Tensor {
    fn facts(&self) -> Facts<'_> {
        Facts {
            name: self.name().to_str().unwrap_or("an argument"),
            data: self.data(),
            sizes: self.sizes(),
            strides: self.strides(),
            element_bytes: dtype_of(self.dtype()).size(),
            storage_offset: self.storage_offset(),
            storage_bytes: self.storage_bytes(),
        }
    }

    fn view(&self, op: &'static str) -> Result<TensorRef<'_>> {
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
                dtype_of(self.dtype()),
                device_of(self),
            )
        })
    }

    /// Callers made sure that the tensor is written by nobody else and read through no other view: it is new, or
    /// `check_written` had it among the written arguments.
    fn view_mut(&self, op: &'static str) -> Result<TensorMut<'_>> {
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

/// Fails where a written argument shares memory with itself or another argument.
fn check_written(op: &'static str, written: &[&Tensor], read: &[&Tensor]) -> Result<()> {
    memory::check_written(op, &checked_facts(op, written)?, &checked_facts(op, read)?)
}

fn checked_facts<'a>(op: &'static str, tensors: &[&'a Tensor]) -> Result<Vec<Facts<'a>>> {
    let checked = tensors.iter().map(|tensor| {
        let facts = tensor.facts();
        facts.check(op).map(|()| facts)
    });
    checked.collect()
}

/// A tensor that an operation can address: the argument itself, or a contiguous, aligned copy of it.
enum Rows<'a> {
    Same(&'a Tensor),
    Copy(UniquePtr<Tensor>),
}

impl Rows<'_> {
    fn get(&self) -> &Tensor {
        match self {
            Rows::Same(tensor) => tensor,
            Rows::Copy(tensor) => tensor,
        }
    }
    fn view(&self, op: &'static str) -> Result<TensorRef<'_>> {
        self.get().view(op)
    }
}

fn torch(op: &'static str) -> impl Fn(cxx::Exception) -> Error {
    move |error| Error::Torch {
        op,
        what: error.what().to_owned(),
    }
}

/// Whether torch's own loops must not run over a tensor: in the child of a fork they wait for threads that are not
/// there, and at an odd address they may use instructions that need an even one.
fn not_for_torch(tensor: &Tensor) -> bool {
    device_of(tensor) == Device::Cpu && (forked() || !tensor.facts().is_aligned())
}

/// Copies between tensors of one shape and dtype that share no memory.
fn copy_(op: &'static str, to: &Tensor, from: &Tensor) -> Result<()> {
    if !not_for_torch(to) && !not_for_torch(from) {
        return ffi::copy_(to, from).map_err(torch(op));
    }
    let (target, source) = (to.facts(), from.facts());
    target.check(op)?;
    source.check(op)?;
    if target.sizes != source.sizes || to.dtype() != from.dtype() {
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
fn zero_(op: &'static str, tensor: &Tensor) -> Result<()> {
    if !not_for_torch(tensor) {
        return ffi::zero_(tensor).map_err(torch(op));
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

/// The tensor itself where it is aligned and `fits` takes its layout; else a copy. One of a dtype that no operation
/// takes stays as it is, for the operation to name.
fn addressable<'a>(
    op: &'static str,
    tensor: &'a Tensor,
    fits: impl Fn(&TensorRef<'_>) -> bool,
) -> Result<Rows<'a>> {
    let facts = tensor.facts();
    facts.check(op)?;
    let dtype = dtype_of(tensor.dtype());
    if !dtype.is_float() || (facts.is_aligned() && fits(&tensor.view(op)?)) {
        return Ok(Rows::Same(tensor));
    }
    let copy = new(op, tensor.sizes(), dtype, tensor)?;
    copy_(op, &copy, tensor)?;
    Ok(Rows::Copy(copy))
}

/// A tensor whose rows a matrix can address; on a device the elements of a row must be neighbours too.
fn with_rows<'a>(op: &'static str, tensor: &'a Tensor) -> Result<Rows<'a>> {
    let on_cpu = device_of(tensor) == Device::Cpu;
    let fits = |mat: Mat| on_cpu || mat.cs == 1 || mat.cols <= 1;
    addressable(op, tensor, |view| {
        view.sizes().is_empty() || view.rows().is_some_and(fits)
    })
}

fn contiguous<'a>(op: &'static str, tensor: &'a Tensor) -> Result<Rows<'a>> {
    addressable(op, tensor, |view| view.is_contiguous())
}

fn all_contiguous<'a>(op: &'static str, tensors: &'a CxxVector<Tensor>) -> Result<Vec<Rows<'a>>> {
    tensors.iter().map(|t| contiguous(op, t)).collect()
}

/// A tensor of any layout.
fn aligned<'a>(op: &'static str, tensor: &'a Tensor) -> Result<Rows<'a>> {
    addressable(op, tensor, |_| true)
}

fn all_aligned<'a>(op: &'static str, tensors: &'a CxxVector<Tensor>) -> Result<Vec<Rows<'a>>> {
    tensors.iter().map(|t| aligned(op, t)).collect()
}

/// An argument that may be absent, which is an empty list.
fn optional<'a>(
    tensors: &'a CxxVector<Tensor>,
    make: impl Fn(&'a Tensor) -> Result<Rows<'a>>,
) -> Result<Option<Rows<'a>>> {
    tensors.iter().next().map(make).transpose()
}

fn optional_view<'a>(
    op: &'static str,
    rows: &'a Option<Rows<'a>>,
) -> Result<Option<TensorRef<'a>>> {
    rows.as_ref().map(|rows| rows.view(op)).transpose()
}

fn all_with_rows<'a>(op: &'static str, tensors: &'a CxxVector<Tensor>) -> Result<Vec<Rows<'a>>> {
    tensors.iter().map(|t| with_rows(op, t)).collect()
}

fn row_views<'a>(op: &'static str, rows: &'a [Rows<'a>]) -> Result<Vec<TensorRef<'a>>> {
    rows.iter().map(|rows| rows.view(op)).collect()
}

fn views<'a>(op: &'static str, tensors: &'a CxxVector<Tensor>) -> Result<Vec<TensorRef<'a>>> {
    tensors.iter().map(|t| t.view(op)).collect()
}

fn views_mut<'a>(op: &'static str, tensors: &'a CxxVector<Tensor>) -> Result<Vec<TensorMut<'a>>> {
    tensors.iter().map(|t| t.view_mut(op)).collect()
}

fn new(op: &'static str, sizes: &[i64], dtype: DType, like: &Tensor) -> Result<UniquePtr<Tensor>> {
    ffi::empty(sizes, code_of(dtype), like).map_err(torch(op))
}

/// A tensor of the sizes and dtype of another, and of its layout if that is dense.
fn new_like(op: &'static str, like: &Tensor) -> Result<UniquePtr<Tensor>> {
    let strides = memory::dense_strides(like.sizes(), like.strides());
    ffi::empty_strided(like.sizes(), &strides, like.dtype(), like).map_err(torch(op))
}

/// The matrices of a tensor [count, rows, cols] that `new_like` made.
fn out_stack(op: &'static str, tensor: &Tensor) -> Result<StackMut> {
    tensor.view_mut(op)?.stack().ok_or_else(|| Error::Internal {
        op,
        what: "a new tensor has no matrices".into(),
    })
}

/// The rows of a tensor that `new` made, which are always addressable.
fn out_rows(op: &'static str, tensor: &Tensor) -> Result<MatMut> {
    tensor.view_mut(op)?.rows().ok_or_else(|| Error::Internal {
        op,
        what: "a new tensor has no rows".into(),
    })
}

fn collect(tensors: impl IntoIterator<Item = UniquePtr<Tensor>>) -> Tensors {
    let mut list = ffi::list();
    for tensor in tensors {
        ffi::push(list.pin_mut(), tensor);
    }
    list
}

/// `sizes` with its last entry replaced.
fn with_last(sizes: &[i64], last: usize) -> Vec<i64> {
    let mut sizes = sizes.to_vec();
    if let Some(size) = sizes.last_mut() {
        *size = last as i64;
    }
    sizes
}

/// Runs an operation; a panic inside it becomes an error sentence.
fn guard<R>(op: &'static str, body: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic".to_owned());
        Err(Error::Internal { op, what })
    })
}

// ---- services of torch for `host.rs` ----

fn matrix(mat: &Mat) -> ffi::Matrix {
    ffi::Matrix {
        data: mat.data() as usize,
        rows: mat.rows as i64,
        cols: mat.cols as i64,
        row_stride: mat.rs as i64,
        col_stride: mat.cs as i64,
        dtype: code_of(mat.dtype),
        device: -1,
    }
}

/// out = beta out + alpha a b with torch's own product; one dtype, on the CPU.
pub fn dense_product(
    op: &'static str,
    out: MatMut,
    beta: f64,
    alpha: f64,
    a: Mat,
    b: Mat,
) -> Result<()> {
    if out.mat().rows == 0 || out.mat().cols == 0 {
        return Ok(());
    }
    ffi::dense_product(&matrix(out.mat()), beta, alpha, &matrix(&a), &matrix(&b)).map_err(torch(op))
}

pub fn threads() -> usize {
    ffi::num_threads() as usize
}

/// Whether this process is the child of a fork.
pub fn forked() -> bool {
    ffi::forked()
}

// ---- a CUDA device ----

/// The device of a call's tensors, with torch's current stream there and the memory that the call borrowed of torch.
struct OnDevice<'a> {
    like: &'a Tensor,
    index: i32,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    stream: usize,
    processors: usize,
    held: RefCell<Vec<UniquePtr<Tensor>>>,
}

/// The device that a call runs on; `None` is the CPU.
fn device<'a>(op: &'static str, like: &'a Tensor) -> Result<Option<OnDevice<'a>>> {
    match device_of(like) {
        Device::Cpu => Ok(None),
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => Ok(Some(OnDevice {
            like,
            index,
            stream: ffi::cuda_stream(index).map_err(torch(op))?,
            processors: cuda::driver::processors(op, index)?,
            held: RefCell::default(),
        })),
        other => Err(ops::require_cpu(op, other)
            .err()
            .unwrap_or(Error::Internal {
                op,
                what: format!("no way to compute on {other}"),
            })),
    }
}

impl cuda::Device for OnDevice<'_> {
    #[cfg(feature = "cuda")]
    unsafe fn launch(&self, op: &'static str, launch: &cuda::Launch<'_>) -> Result<()> {
        let stream = self.stream as *mut c_void;
        // SAFETY: the caller's promise; torch returned this stream for this device.
        unsafe { cuda::driver::launch(op, self.index, stream, launch) }
    }

    #[cfg(not(feature = "cuda"))]
    unsafe fn launch(&self, op: &'static str, launch: &cuda::Launch<'_>) -> Result<()> {
        Err(Error::Internal {
            op,
            what: format!("this build has no kernel {}", launch.kernel),
        })
    }

    /// Torch's caching allocator gives it, ordered by the stream: it may be handed on when the call returns, and
    /// what then uses it runs after the kernels of this call.
    fn scratch(&self, op: &'static str, bytes: usize) -> Result<*mut c_void> {
        let tensor = new(op, &[bytes.div_ceil(8) as i64], DType::F64, self.like)?;
        let address = tensor.data().cast_mut().cast();
        self.held.borrow_mut().push(tensor);
        Ok(address)
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn dense_product(
        &self,
        op: &'static str,
        out: MatMut,
        beta: f64,
        alpha: f64,
        a: Mat,
        b: Mat,
    ) -> Result<()> {
        let there = |mat: &Mat| ffi::Matrix {
            device: self.index,
            ..matrix(mat)
        };
        ffi::dense_product(&there(out.mat()), beta, alpha, &there(&a), &there(&b))
            .map_err(torch(op))
    }
}

/// The dropout of a call on a device.
fn mask(dropout_p: f64, rng: Option<&Tensor>) -> Mask {
    Mask::new(dropout_p, rng.map_or(std::ptr::null(), |rng| rng.data()))
}

type Body<'a> = &'a (dyn Fn(Range<usize>) + Sync);

/// Runs `body` over `0..n` on torch's threads; `body` does not panic (`host::parallel_for` sees to it).
pub fn run(op: &'static str, n: usize, grain: usize, body: Body<'_>) -> Result<()> {
    fn call(begin: i64, end: i64, context: usize) {
        // SAFETY: `context` is the address of the `body` reference of the enclosing call of `run`,
        // which waits for all pieces.
        let body = unsafe { *(context as *const Body<'_>) };
        body(begin as usize..end as usize);
    }
    let context = std::ptr::from_ref(&body) as usize;
    ffi::parallel_for(n as i64, grain as i64, context, call).map_err(torch(op))
}

// ---- the operations ----

#[allow(clippy::too_many_arguments)]
fn lora_apply(
    base: &CxxVector<Tensor>,
    x: &Tensor,
    weight: &CxxVector<Tensor>,
    bias: &CxxVector<Tensor>,
    a: &CxxVector<Tensor>,
    b: &CxxVector<Tensor>,
    scaling: &[f64],
    dropout_p: f64,
    rng: &CxxVector<Tensor>,
) -> Result<Tensors> {
    let op = if weight.is_empty() {
        lora_linear::DELTA
    } else {
        lora_linear::LINEAR
    };
    guard(op, || {
        let x = with_rows(op, x)?;
        let base = optional(base, |base| with_rows(op, base))?;
        let weight = optional(weight, |weight| aligned(op, weight))?;
        let bias = optional(bias, |bias| with_rows(op, bias))?;
        let (a, b) = (all_with_rows(op, a)?, all_with_rows(op, b)?);
        let rng = rng.iter().next();
        let call = lora_linear::check(&lora_linear::Args {
            base: optional_view(op, &base)?,
            x: x.view(op)?,
            weight: optional_view(op, &weight)?,
            bias: optional_view(op, &bias)?,
            a: &row_views(op, &a)?,
            b: &row_views(op, &b)?,
            scaling,
            dropout_p,
            rng: rng.map(|rng| rng.view(op)).transpose()?,
        })?;
        let device = device(op, x.get())?;
        let sizes = x.get().sizes();
        let y = new(
            op,
            &with_last(sizes, call.out_features),
            call.x.dtype,
            x.get(),
        )?;
        let h = new(
            op,
            &with_last(sizes, call.adapters.total_rank()),
            call.h_dtype,
            x.get(),
        )?;
        let (y_rows, h_rows) = (out_rows(op, &y)?, out_rows(op, &h)?);
        match &device {
            None => call.run(y_rows, h_rows)?,
            Some(device) => {
                let mask = mask(dropout_p, rng);
                cuda::low_rank::lora_apply(device, op, &call, mask, y_rows, h_rows)?;
            }
        }
        Ok(collect([y, h]))
    })
}

fn lora_shrink(
    x: &Tensor,
    a: &CxxVector<Tensor>,
    dropout_p: f64,
    rng: &CxxVector<Tensor>,
) -> Result<Tensors> {
    let op = shrink_op::OP;
    guard(op, || {
        let x = with_rows(op, x)?;
        let a = all_with_rows(op, a)?;
        let rng = rng.iter().next();
        let rng_view = rng.map(|rng| rng.view(op)).transpose()?;
        let call = shrink_op::check(
            &x.view(op)?,
            &row_views(op, &a)?,
            dropout_p,
            rng_view.as_ref(),
        )?;
        let device = device(op, x.get())?;
        let sizes = with_last(x.get().sizes(), call.adapters.total_rank());
        let h = new(op, &sizes, call.h_dtype, x.get())?;
        let rows = out_rows(op, &h)?;
        match &device {
            None => call.run(rows)?,
            Some(device) => {
                cuda::low_rank::lora_shrink(device, &call, mask(dropout_p, rng), rows)?;
            }
        }
        Ok(collect([h]))
    })
}

fn lora_expand_(y: &Tensor, h: &Tensor, b: &CxxVector<Tensor>, scaling: &[f64]) -> Result<()> {
    let op = lora_expand::OP;
    guard(op, || {
        let rows_of_h = with_rows(op, h)?;
        let target = with_rows(op, y)?;
        let rows_of_b = all_with_rows(op, b)?;
        let call = lora_expand::check(
            &target.view(op)?,
            &rows_of_h.view(op)?,
            &row_views(op, &rows_of_b)?,
            scaling,
        )?;
        let read: Vec<&Tensor> = b.iter().chain([h]).collect();
        check_written(op, &[y], &read)?;
        let rows = out_rows(op, target.get())?;
        match &device(op, target.get())? {
            None => call.run(rows)?,
            Some(device) => cuda::low_rank::lora_expand(device, &call, rows)?,
        }
        if let Rows::Copy(copy) = &target {
            copy_(op, y, copy)?;
        }
        Ok(())
    })
}

#[allow(clippy::too_many_arguments)]
fn lora_backward(
    grad: &Tensor,
    x: &CxxVector<Tensor>,
    h: &CxxVector<Tensor>,
    weight: &CxxVector<Tensor>,
    a: &CxxVector<Tensor>,
    b: &CxxVector<Tensor>,
    scaling: &[f64],
    dropout_p: f64,
    rng: &CxxVector<Tensor>,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> Result<Tensors> {
    let op = backward_op::OP;
    guard(op, || {
        let grad = with_rows(op, grad)?;
        let x = optional(x, |x| with_rows(op, x))?;
        let h = optional(h, |h| with_rows(op, h))?;
        let weight = optional(weight, |weight| aligned(op, weight))?;
        let (a_rows, b_rows) = (all_with_rows(op, a)?, all_with_rows(op, b)?);
        let rng = rng.iter().next();
        let call = backward_op::check(&backward_op::Args {
            grad: grad.view(op)?,
            x: optional_view(op, &x)?,
            h: optional_view(op, &h)?,
            weight: optional_view(op, &weight)?,
            a: &row_views(op, &a_rows)?,
            b: &row_views(op, &b_rows)?,
            scaling,
            dropout_p,
            rng: rng.map(|rng| rng.view(op)).transpose()?,
            need_a,
            need_b,
        })?;
        let device = device(op, grad.get())?;
        let like = |tensors: &CxxVector<Tensor>, wanted: bool| -> Result<Vec<UniquePtr<Tensor>>> {
            let wanted = tensors.iter().filter(|_| wanted);
            wanted
                .map(|t| new(op, t.sizes(), dtype_of(t.dtype()), t))
                .collect()
        };
        let sizes = if need_x {
            with_last(grad.get().sizes(), call.in_features)
        } else {
            vec![0]
        };
        let dx = new(op, &sizes, call.grad.dtype, grad.get())?;
        let (da, db) = (like(a, need_a)?, like(b, need_b)?);
        let mats = |tensors: &[UniquePtr<Tensor>]| -> Result<Vec<MatMut>> {
            tensors.iter().map(|t| out_rows(op, t)).collect()
        };
        let gradients = backward_op::Gradients {
            x: need_x.then(|| out_rows(op, &dx)).transpose()?,
            a: need_a.then(|| mats(&da)).transpose()?,
            b: need_b.then(|| mats(&db)).transpose()?,
        };
        match &device {
            None => call.run(&gradients)?,
            Some(device) => {
                cuda::low_rank::lora_backward(device, &call, mask(dropout_p, rng), &gradients)?;
            }
        }
        Ok(collect([dx].into_iter().chain(da).chain(db)))
    })
}

#[allow(clippy::too_many_arguments)]
fn lora_experts_apply(
    base: &Tensor,
    x: &Tensor,
    ends: &Tensor,
    a: &CxxVector<Tensor>,
    b: &CxxVector<Tensor>,
    scaling: &[f64],
    dropout_p: f64,
    rng: &CxxVector<Tensor>,
) -> Result<Tensors> {
    let op = lora_experts::OP;
    guard(op, || {
        let (base, x) = (with_rows(op, base)?, with_rows(op, x)?);
        let (a, b) = (all_aligned(op, a)?, all_aligned(op, b)?);
        let rng = rng.iter().next();
        let call = lora_experts::check_forward(
            &base.view(op)?,
            &x.view(op)?,
            &lora_experts::Args {
                ends: ends.view(op)?,
                a: &row_views(op, &a)?,
                b: &row_views(op, &b)?,
                scaling,
                dropout_p,
                rng: rng.map(|rng| rng.view(op)).transpose()?,
            },
        )?;
        let device = device(op, x.get())?;
        let rows = |columns: usize| [call.rows as i64, columns as i64];
        let dtype = dtype_of(x.get().dtype());
        let y = new(op, &rows(call.out_features), dtype, x.get())?;
        let r = call.adapters.total_rank();
        let h = new(op, &rows(r), call.h_dtype, x.get())?;
        let (y_rows, h_rows) = (out_rows(op, &y)?, out_rows(op, &h)?);
        match &device {
            None => call.run(y_rows, h_rows)?,
            Some(device) => {
                let mask = mask(dropout_p, rng);
                cuda::experts::lora_experts(device, &call, mask, y_rows, h_rows)?;
            }
        }
        Ok(collect([y, h]))
    })
}

#[allow(clippy::too_many_arguments)]
fn lora_experts_backward(
    grad: &Tensor,
    x: &CxxVector<Tensor>,
    h: &CxxVector<Tensor>,
    ends: &Tensor,
    a: &CxxVector<Tensor>,
    b: &CxxVector<Tensor>,
    scaling: &[f64],
    dropout_p: f64,
    rng: &CxxVector<Tensor>,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> Result<Tensors> {
    let op = lora_experts::OP;
    guard(op, || {
        let grad = with_rows(op, grad)?;
        let x = optional(x, |x| with_rows(op, x))?;
        let h = optional(h, |h| with_rows(op, h))?;
        let (a_held, b_held) = (all_aligned(op, a)?, all_aligned(op, b)?);
        let rng = rng.iter().next();
        let call = lora_experts::check_backward(
            &grad.view(op)?,
            optional_view(op, &x)?.as_ref(),
            optional_view(op, &h)?.as_ref(),
            &lora_experts::Args {
                ends: ends.view(op)?,
                a: &row_views(op, &a_held)?,
                b: &row_views(op, &b_held)?,
                scaling,
                dropout_p,
                rng: rng.map(|rng| rng.view(op)).transpose()?,
            },
        )?;
        let device = device(op, grad.get())?;
        let sizes = if need_x {
            vec![call.rows as i64, call.in_features as i64]
        } else {
            vec![0]
        };
        let dx = new(op, &sizes, dtype_of(grad.get().dtype()), grad.get())?;
        let like = |tensors: &CxxVector<Tensor>, wanted: bool| -> Result<Vec<UniquePtr<Tensor>>> {
            let wanted = tensors.iter().filter(|_| wanted);
            wanted.map(|tensor| new_like(op, tensor)).collect()
        };
        let (da, db) = (like(a, need_a)?, like(b, need_b)?);
        let stacks = |tensors: &[UniquePtr<Tensor>]| -> Result<Vec<StackMut>> {
            tensors.iter().map(|t| out_stack(op, t)).collect()
        };
        let gradients = lora_experts::Gradients {
            x: need_x.then(|| out_rows(op, &dx)).transpose()?,
            a: need_a.then(|| stacks(&da)).transpose()?,
            b: need_b.then(|| stacks(&db)).transpose()?,
        };
        match &device {
            None => call.run_backward(&gradients)?,
            Some(device) => {
                let mask = mask(dropout_p, rng);
                cuda::experts::lora_experts_backward(device, &call, mask, &gradients)?;
            }
        }
        Ok(collect([dx].into_iter().chain(da).chain(db)))
    })
}

fn sideband_accumulate_(
    sum: &CxxVector<Tensor>,
    stats: &Tensor,
    grad: &CxxVector<Tensor>,
    weight: f64,
    zero_grad: bool,
) -> Result<()> {
    let op = sideband_accumulate::OP;
    guard(op, || {
        let held = all_contiguous(op, grad)?;
        let snapshot = row_views(op, &held)?;
        sideband_accumulate::check(op, &views(op, sum)?, &stats.view(op)?, Some(&snapshot))?;
        sideband_accumulate::check_weight(weight)?;
        let kept: Vec<&Tensor> = sum.iter().chain([stats]).collect();
        let grads: Vec<&Tensor> = grad.iter().collect();
        if zero_grad {
            check_written(op, &[kept, grads].concat(), &[])?;
        } else {
            check_written(op, &kept, &grads)?;
        }
        let device = device(op, stats)?;
        let mut sums = views_mut(op, sum)?;
        let mut stats = stats.view_mut(op)?;
        if let Some(device) = &device {
            cuda::sideband::accumulate(device, &sums, &stats, &snapshot, weight, zero_grad)?;
        } else {
            sideband_accumulate::run(&mut sums, &mut stats, &snapshot, weight)?;
        }
        if zero_grad {
            for (g, held) in grad.iter().zip(&held) {
                // The kernel has zeroed what it read; that is the gradient itself unless it had to be copied.
                if device.is_none() || matches!(held, Rows::Copy(_)) {
                    zero_(op, g)?;
                }
            }
        }
        Ok(())
    })
}

/// The fields of a checked `stats` tensor.
fn fields(op: &'static str, stats: &Tensor) -> Result<[f64; field::COUNT]> {
    let view = stats.view(op)?;
    let slice = view
        .as_slice::<f64>()
        .and_then(|s| <[f64; field::COUNT]>::try_from(s).ok());
    slice.ok_or_else(|| Error::Internal {
        op,
        what: "stats changed after it was checked".into(),
    })
}

fn sideband_stats(sum: &CxxVector<Tensor>, stats: &Tensor) -> Result<Tensors> {
    let op = stats_op::OP;
    guard(op, || {
        let sums = views(op, sum)?;
        sideband_accumulate::check(op, &sums, &stats.view(op)?, None)?;
        let device = device(op, stats)?;
        let out = new(op, &[field::COUNT as i64], DType::F64, stats)?;
        if let Some(device) = &device {
            cuda::sideband::statistics(device, &sums, &stats.view(op)?, &out.view_mut(op)?)?;
            return Ok(collect([out]));
        }
        let values = stats_op::run(&sums, &fields(op, stats)?)?;
        if let Some(slice) = out.view_mut(op)?.as_mut_slice::<f64>() {
            slice.copy_from_slice(&values);
        }
        Ok(collect([out]))
    })
}

fn sideband_drain_(
    sum: &CxxVector<Tensor>,
    stats: &Tensor,
    grad: &CxxVector<Tensor>,
    scale: f64,
) -> Result<()> {
    let op = sideband_drain::OP;
    guard(op, || {
        let targets = all_contiguous(op, grad)?;
        let snapshot = row_views(op, &targets)?;
        sideband_accumulate::check(op, &views(op, sum)?, &stats.view(op)?, Some(&snapshot))?;
        sideband_drain::check_scale(scale)?;
        let written: Vec<&Tensor> = sum.iter().chain([stats]).chain(grad.iter()).collect();
        check_written(op, &written, &[])?;
        let device = device(op, stats)?;
        let mut sums = views_mut(op, sum)?;
        let mut out = targets
            .iter()
            .map(|target| target.get().view_mut(op))
            .collect::<Result<Vec<_>>>()?;
        let mut stats = stats.view_mut(op)?;
        match &device {
            None => sideband_drain::run(&mut sums, &mut stats, &mut out, scale)?,
            Some(device) => cuda::sideband::drain(device, &sums, &stats, &out, scale)?,
        }
        for (g, target) in grad.iter().zip(&targets) {
            if let Rows::Copy(copy) = target {
                copy_(op, g, copy)?;
            }
        }
        Ok(())
    })
}

fn buffer_variance(ring: &Tensor, filled: i64) -> Result<Tensors> {
    let op = ring_op::OP;
    guard(op, || {
        let rows = with_rows(op, ring)?;
        let mat = ring_op::check(&rows.view(op)?, filled)?;
        let device = device(op, ring)?;
        let out = new(op, &[], DType::F64, ring)?;
        if let Some(device) = &device {
            let slot = out.data().cast_mut().cast();
            cuda::sideband::variance(device, mat, filled as usize, slot)?;
            return Ok(collect([out]));
        }
        let value = ring_op::run(mat, filled as usize)?;
        if let Some(slot) = out
            .view_mut(op)?
            .as_mut_slice::<f64>()
            .and_then(<[f64]>::first_mut)
        {
            *slot = value;
        }
        Ok(collect([out]))
    })
}
