//! The only door for tensors: torch's dispatcher on one side, the operations on the other.
//!
//! What crosses it: borrowed tensors inwards, newly allocated tensors and error sentences outwards. No
//! panic crosses: every entry point runs under `guard`. C++ keeps each borrowed tensor alive for the
//! whole call, which is what the views of `tensor.rs` rely on.

#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

use crate::cuda::{self, low_rank::Mask};
use crate::error::{Error, Result};
use crate::ops::sideband_accumulate::field;
use crate::ops::{
    self, buffer_variance as ring_op, lora_backward as backward_op, lora_expand, lora_linear,
    lora_shrink as shrink_op,
};
use crate::ops::{sideband_accumulate, sideband_drain, sideband_stats as stats_op};
use crate::tensor::{DType, Device, Mat, MatMut, TensorMut, TensorRef};
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
        fn data(self: &Tensor) -> *const u8;
        fn sizes(self: &Tensor) -> &[i64];
        fn strides(self: &Tensor) -> &[i64];
        fn dtype(self: &Tensor) -> i32;
        fn device_type(self: &Tensor) -> i32;
        fn device_index(self: &Tensor) -> i32;

        fn empty(sizes: &[i64], dtype: i32, like: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn contiguous(tensor: &Tensor) -> Result<UniquePtr<Tensor>>;
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
            x: &Tensor,
            h: &Tensor,
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
    fn view(&self) -> TensorRef<'_> {
        let (sizes, strides) = (self.sizes(), self.strides());
        // SAFETY: C++ holds a reference to the tensor for the whole call, torch guarantees that its
        // sizes and strides stay inside its storage and that the storage is aligned for its dtype.
        unsafe {
            TensorRef::new(
                self.data(),
                sizes,
                strides,
                dtype_of(self.dtype()),
                device_of(self),
            )
        }
    }

    fn view_mut(&self) -> TensorMut<'_> {
        let (sizes, strides) = (self.sizes(), self.strides());
        // SAFETY: as in `view`; the schema marks the argument as written (or it was just allocated),
        // and no operation makes two mutable views of one argument.
        unsafe {
            TensorMut::new(
                self.data().cast_mut(),
                sizes,
                strides,
                dtype_of(self.dtype()),
                device_of(self),
            )
        }
    }
}

/// A tensor whose rows a matrix can address: the argument itself, or a contiguous copy of it.
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
    fn view(&self) -> TensorRef<'_> {
        self.get().view()
    }
}

fn torch(op: &'static str) -> impl Fn(cxx::Exception) -> Error {
    move |error| Error::Torch {
        op,
        what: error.what().to_owned(),
    }
}

/// On a device the elements of a row must be neighbours too.
fn with_rows<'a>(op: &'static str, tensor: &'a Tensor) -> Result<Rows<'a>> {
    let on_cpu = device_of(tensor) == Device::Cpu;
    let fits = |mat: Mat| on_cpu || mat.cs == 1 || mat.cols <= 1;
    if tensor.sizes().is_empty() || tensor.view().rows().is_some_and(fits) {
        return Ok(Rows::Same(tensor));
    }
    Ok(Rows::Copy(ffi::contiguous(tensor).map_err(torch(op))?))
}

fn contiguous<'a>(op: &'static str, tensor: &'a Tensor) -> Result<Rows<'a>> {
    if tensor.view().is_contiguous() {
        return Ok(Rows::Same(tensor));
    }
    Ok(Rows::Copy(ffi::contiguous(tensor).map_err(torch(op))?))
}

fn all_with_rows<'a>(op: &'static str, tensors: &'a CxxVector<Tensor>) -> Result<Vec<Rows<'a>>> {
    tensors.iter().map(|t| with_rows(op, t)).collect()
}

fn row_views<'a>(rows: &'a [Rows<'a>]) -> Vec<TensorRef<'a>> {
    rows.iter().map(Rows::view).collect()
}

fn views(tensors: &CxxVector<Tensor>) -> Vec<TensorRef<'_>> {
    tensors.iter().map(Tensor::view).collect()
}

fn new(op: &'static str, sizes: &[i64], dtype: DType, like: &Tensor) -> Result<UniquePtr<Tensor>> {
    ffi::empty(sizes, code_of(dtype), like).map_err(torch(op))
}

/// The rows of a tensor that `new` made, which are always addressable.
fn out_rows(op: &'static str, tensor: &Tensor) -> Result<MatMut> {
    tensor.view_mut().rows().ok_or_else(|| Error::Internal {
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
        let base = base
            .iter()
            .next()
            .map(|base| with_rows(op, base))
            .transpose()?;
        let bias = bias
            .iter()
            .next()
            .map(|bias| with_rows(op, bias))
            .transpose()?;
        let (a, b) = (all_with_rows(op, a)?, all_with_rows(op, b)?);
        let rng = rng.iter().next();
        let call = lora_linear::check(&lora_linear::Args {
            base: base.as_ref().map(Rows::view),
            x: x.view(),
            weight: weight.iter().next().map(Tensor::view),
            bias: bias.as_ref().map(Rows::view),
            a: &row_views(&a),
            b: &row_views(&b),
            scaling,
            dropout_p,
            rng: rng.map(Tensor::view),
        })?;
        let device = device(op, x.get())?;
        let sizes = x.view().sizes();
        let y = new(
            op,
            &with_last(sizes, call.out_features),
            x.view().dtype(),
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
        let rng_view = rng.map(Tensor::view);
        let call = shrink_op::check(&x.view(), &row_views(&a), dropout_p, rng_view.as_ref())?;
        let device = device(op, x.get())?;
        let sizes = with_last(x.view().sizes(), call.adapters.total_rank());
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
        let h = with_rows(op, h)?;
        let target = with_rows(op, y)?;
        let b = all_with_rows(op, b)?;
        let call = lora_expand::check(&target.view(), &h.view(), &row_views(&b), scaling)?;
        let rows = out_rows(op, target.get())?;
        match &device(op, target.get())? {
            None => call.run(rows)?,
            Some(device) => cuda::low_rank::lora_expand(device, &call, rows)?,
        }
        if let Rows::Copy(copy) = &target {
            ffi::copy_(y, copy).map_err(torch(op))?;
        }
        Ok(())
    })
}

#[allow(clippy::too_many_arguments)]
fn lora_backward(
    grad: &Tensor,
    x: &Tensor,
    h: &Tensor,
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
        let (grad, x, h) = (with_rows(op, grad)?, with_rows(op, x)?, with_rows(op, h)?);
        let (a_rows, b_rows) = (all_with_rows(op, a)?, all_with_rows(op, b)?);
        let rng = rng.iter().next();
        let call = backward_op::check(&backward_op::Args {
            grad: grad.view(),
            x: x.view(),
            h: h.view(),
            weight: weight.iter().next().map(Tensor::view),
            a: &row_views(&a_rows),
            b: &row_views(&b_rows),
            scaling,
            dropout_p,
            rng: rng.map(Tensor::view),
        })?;
        let device = device(op, x.get())?;
        let like = |tensors: &CxxVector<Tensor>, wanted: bool| -> Result<Vec<UniquePtr<Tensor>>> {
            let wanted = tensors.iter().filter(|_| wanted);
            wanted
                .map(|t| new(op, t.sizes(), dtype_of(t.dtype()), t))
                .collect()
        };
        let empty_or_like = if need_x {
            x.view().sizes().to_vec()
        } else {
            vec![0]
        };
        let dx = new(op, &empty_or_like, x.view().dtype(), x.get())?;
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

fn sideband_accumulate_(
    sum: &CxxVector<Tensor>,
    stats: &Tensor,
    grad: &CxxVector<Tensor>,
    weight: f64,
    zero_grad: bool,
) -> Result<()> {
    let op = sideband_accumulate::OP;
    guard(op, || {
        sideband_accumulate::check(op, &views(sum), &stats.view(), Some(&views(grad)))?;
        sideband_accumulate::check_weight(weight)?;
        let device = device(op, stats)?;
        let held = grad
            .iter()
            .map(|g| contiguous(op, g))
            .collect::<Result<Vec<_>>>()?;
        let snapshot: Vec<TensorRef<'_>> = held.iter().map(Rows::view).collect();
        let mut sums: Vec<TensorMut<'_>> = sum.iter().map(Tensor::view_mut).collect();
        let mut stats = stats.view_mut();
        if let Some(device) = &device {
            cuda::sideband::accumulate(device, &sums, &stats, &snapshot, weight, zero_grad)?;
        } else {
            sideband_accumulate::run(&mut sums, &mut stats, &snapshot, weight)?;
        }
        if zero_grad {
            for (g, held) in grad.iter().zip(&held) {
                // The kernel has zeroed what it read; that is the gradient itself unless it had to be copied.
                if device.is_none() || matches!(held, Rows::Copy(_)) {
                    ffi::zero_(g).map_err(torch(op))?;
                }
            }
        }
        Ok(())
    })
}

/// The fields of a checked `stats` tensor.
fn fields(op: &'static str, stats: &Tensor) -> Result<[f64; field::COUNT]> {
    let view = stats.view();
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
        let sums = views(sum);
        sideband_accumulate::check(op, &sums, &stats.view(), None)?;
        let device = device(op, stats)?;
        let out = new(op, &[field::COUNT as i64], DType::F64, stats)?;
        if let Some(device) = &device {
            cuda::sideband::statistics(device, &sums, &stats.view(), &out.view_mut())?;
            return Ok(collect([out]));
        }
        let values = stats_op::run(&sums, &fields(op, stats)?)?;
        if let Some(slice) = out.view_mut().as_mut_slice::<f64>() {
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
        sideband_accumulate::check(op, &views(sum), &stats.view(), Some(&views(grad)))?;
        sideband_drain::check_scale(scale)?;
        let device = device(op, stats)?;
        let targets = grad
            .iter()
            .map(|g| contiguous(op, g))
            .collect::<Result<Vec<_>>>()?;
        let mut sums: Vec<TensorMut<'_>> = sum.iter().map(Tensor::view_mut).collect();
        let mut out: Vec<TensorMut<'_>> = targets.iter().map(|t| t.get().view_mut()).collect();
        let mut stats = stats.view_mut();
        match &device {
            None => sideband_drain::run(&mut sums, &mut stats, &mut out, scale)?,
            Some(device) => cuda::sideband::drain(device, &sums, &stats, &out, scale)?,
        }
        for (g, target) in grad.iter().zip(&targets) {
            if let Rows::Copy(copy) = target {
                ffi::copy_(g, copy).map_err(torch(op))?;
            }
        }
        Ok(())
    })
}

fn buffer_variance(ring: &Tensor, filled: i64) -> Result<Tensors> {
    let op = ring_op::OP;
    guard(op, || {
        let mat = ring_op::check(&ring.view(), filled)?;
        let device = device(op, ring)?;
        let out = new(op, &[], DType::F64, ring)?;
        if let Some(device) = &device {
            let rows = with_rows(op, ring)?;
            let mat = ring_op::check(&rows.view(), filled)?;
            let slot = out.data().cast_mut().cast();
            cuda::sideband::variance(device, mat, filled as usize, slot)?;
            return Ok(collect([out]));
        }
        let value = ring_op::run(mat, filled as usize)?;
        if let Some(slot) = out
            .view_mut()
            .as_mut_slice::<f64>()
            .and_then(<[f64]>::first_mut)
        {
            *slot = value;
        }
        Ok(collect([out]))
    })
}
