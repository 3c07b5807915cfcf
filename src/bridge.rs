//! The only door for tensors: torch's dispatcher on one side, the operations on the other.
//!
//! What crosses it: borrowed tensors inwards, newly allocated tensors and error sentences outwards. No
//! panic crosses: every entry point runs under `guard`. What torch does for us is in `torch.rs`.
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

use crate::cuda::{self, lora::Mask};
use crate::error::{Error, Result};
use crate::memory::{self, Facts};
use crate::ops::arguments::{self, Gradients};
use crate::ops::sideband_accumulate::field;
use crate::ops::{
    buffer_variance, lora_backward, lora_expand, lora_experts, lora_linear, lora_shrink,
    sideband_accumulate, sideband_drain, sideband_stats,
};
use crate::statistics::measured;
use crate::tensor::{DType, DenseProduct, Device, Mat, MatMut, StackMut, TensorMut, TensorRef};
use crate::torch::{self, Tensor, Tensors};
use cxx::{CxxVector, UniquePtr};
use std::cell::RefCell;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

// The lints are for what is written here, not for the code that the macro expands to.
#[allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]
#[cxx::bridge(namespace = "tsugi::bridge")]
mod ffi {
    /// Arguments of `lora_linear` and `lora_delta`; what may be absent is a list of none or one.
    struct Apply<'a> {
        base: &'a CxxVector<Tensor>,
        x: &'a Tensor,
        weight: &'a CxxVector<Tensor>,
        bias: &'a CxxVector<Tensor>,
        a: &'a CxxVector<Tensor>,
        b: &'a CxxVector<Tensor>,
        scaling: &'a [f64],
        dropout_p: f64,
        rng: &'a CxxVector<Tensor>,
    }

    /// Arguments of `lora_backward`.
    struct Backward<'a> {
        grad: &'a Tensor,
        x: &'a CxxVector<Tensor>,
        h: &'a CxxVector<Tensor>,
        weight: &'a CxxVector<Tensor>,
        a: &'a CxxVector<Tensor>,
        b: &'a CxxVector<Tensor>,
        scaling: &'a [f64],
        dropout_p: f64,
        rng: &'a CxxVector<Tensor>,
        need_x: bool,
        need_a: bool,
        need_b: bool,
    }

    /// Arguments of `lora_experts`.
    struct Experts<'a> {
        base: &'a Tensor,
        x: &'a Tensor,
        ends: &'a Tensor,
        a: &'a CxxVector<Tensor>,
        b: &'a CxxVector<Tensor>,
        scaling: &'a [f64],
        dropout_p: f64,
        rng: &'a CxxVector<Tensor>,
    }

    /// Arguments of the gradients of `lora_experts`.
    struct ExpertsBackward<'a> {
        grad: &'a Tensor,
        x: &'a CxxVector<Tensor>,
        h: &'a CxxVector<Tensor>,
        ends: &'a Tensor,
        a: &'a CxxVector<Tensor>,
        b: &'a CxxVector<Tensor>,
        scaling: &'a [f64],
        dropout_p: f64,
        rng: &'a CxxVector<Tensor>,
        need_x: bool,
        need_a: bool,
        need_b: bool,
    }

    unsafe extern "C++" {
        include!("tsugi-kpool/cpp/torch.h");

        #[namespace = "tsugi"]
        type Tensor = crate::torch::Tensor;
    }

    extern "Rust" {
        fn lora_apply(args: &Apply<'_>) -> Result<UniquePtr<CxxVector<Tensor>>>;
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
        fn lora_backward(args: &Backward<'_>) -> Result<UniquePtr<CxxVector<Tensor>>>;
        fn lora_experts_apply(args: &Experts<'_>) -> Result<UniquePtr<CxxVector<Tensor>>>;
        fn lora_experts_backward(
            args: &ExpertsBackward<'_>,
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

// ---- views and outputs ----

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

/// The tensor itself where it is aligned and `fits` takes its layout; else a copy. One of a dtype that no operation
/// takes stays as it is, for the operation to name.
fn addressable<'a>(
    op: &'static str,
    tensor: &'a Tensor,
    fits: impl Fn(&TensorRef<'_>) -> bool,
) -> Result<Rows<'a>> {
    let facts = tensor.facts();
    facts.check(op)?;
    let dtype = tensor.dtype();
    if !dtype.is_float() || (facts.is_aligned() && fits(&tensor.view(op)?)) {
        return Ok(Rows::Same(tensor));
    }
    let copy = torch::empty(op, tensor.sizes(), dtype, tensor)?;
    torch::copy_(op, &copy, tensor)?;
    Ok(Rows::Copy(copy))
}

/// A tensor whose rows a matrix can address; on a device the elements of a row must be neighbours too.
fn with_rows<'a>(op: &'static str, tensor: &'a Tensor) -> Result<Rows<'a>> {
    let on_cpu = tensor.device() == Device::Cpu;
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

/// The rows of a tensor that `new` made, which are always addressable.
fn out_rows(op: &'static str, tensor: &Tensor) -> Result<MatMut> {
    tensor.view_mut(op)?.rows().ok_or_else(|| Error::Internal {
        op,
        what: "a new tensor has no rows".into(),
    })
}

/// The matrices of a new tensor [count, rows, cols].
fn out_stack(op: &'static str, tensor: &Tensor) -> Result<StackMut> {
    tensor.view_mut(op)?.stack().ok_or_else(|| Error::Internal {
        op,
        what: "a new tensor has no matrices".into(),
    })
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
    match like.device() {
        Device::Cpu => Ok(None),
        #[cfg(feature = "cuda")]
        Device::Cuda(index) => Ok(Some(OnDevice {
            like,
            index,
            stream: torch::stream(op, index)?,
            processors: cuda::driver::processors(op, index)?,
            held: RefCell::default(),
        })),
        other => Err(arguments::unsupported(op, other)),
    }
}

impl cuda::Machine for OnDevice<'_> {
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
        let tensor = torch::empty(op, &[bytes.div_ceil(8) as i64], DType::F64, self.like)?;
        let address = tensor.data().cast_mut().cast();
        self.held.borrow_mut().push(tensor);
        Ok(address)
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn dense_product(&self, op: &'static str, product: &DenseProduct) -> Result<()> {
        torch::dense_product(op, Device::Cuda(self.index), product)
    }
}

/// The dropout of a call on a device.
fn mask(dropout_p: f64, rng: Option<&Tensor>) -> Mask {
    Mask::new(dropout_p, rng.map_or(std::ptr::null(), |rng| rng.data()))
}

// ---- the operations ----

fn lora_apply(args: &ffi::Apply<'_>) -> Result<Tensors> {
    let op = if args.weight.is_empty() {
        lora_linear::DELTA
    } else {
        lora_linear::LINEAR
    };
    guard(op, || {
        let x = with_rows(op, args.x)?;
        let base = optional(args.base, |base| with_rows(op, base))?;
        let weight = optional(args.weight, |weight| aligned(op, weight))?;
        let bias = optional(args.bias, |bias| with_rows(op, bias))?;
        let (a, b) = (all_with_rows(op, args.a)?, all_with_rows(op, args.b)?);
        let rng = args.rng.iter().next();
        let call = lora_linear::check(&lora_linear::Args {
            base: optional_view(op, &base)?,
            x: x.view(op)?,
            weight: optional_view(op, &weight)?,
            bias: optional_view(op, &bias)?,
            a: &row_views(op, &a)?,
            b: &row_views(op, &b)?,
            scaling: args.scaling,
            dropout_p: args.dropout_p,
            rng: rng.map(|rng| rng.view(op)).transpose()?,
        })?;
        let device = device(op, x.get())?;
        let sizes = x.get().sizes();
        let y = torch::empty(
            op,
            &with_last(sizes, call.out_features),
            call.x.dtype,
            x.get(),
        )?;
        let h = torch::empty(
            op,
            &with_last(sizes, call.adapters.total_r()),
            call.h_dtype,
            x.get(),
        )?;
        let (y_rows, h_rows) = (out_rows(op, &y)?, out_rows(op, &h)?);
        match &device {
            None => call.run(y_rows, h_rows)?,
            Some(device) => {
                let mask = mask(args.dropout_p, rng);
                cuda::lora::lora_apply(device, op, &call, mask, y_rows, h_rows)?;
            }
        }
        Ok(torch::list([y, h]))
    })
}

fn lora_shrink(
    x: &Tensor,
    a: &CxxVector<Tensor>,
    dropout_p: f64,
    rng: &CxxVector<Tensor>,
) -> Result<Tensors> {
    let op = lora_shrink::OP;
    guard(op, || {
        let x = with_rows(op, x)?;
        let a = all_with_rows(op, a)?;
        let rng = rng.iter().next();
        let rng_view = rng.map(|rng| rng.view(op)).transpose()?;
        let call = lora_shrink::check(
            &x.view(op)?,
            &row_views(op, &a)?,
            dropout_p,
            rng_view.as_ref(),
        )?;
        let device = device(op, x.get())?;
        let sizes = with_last(x.get().sizes(), call.adapters.total_r());
        let h = torch::empty(op, &sizes, call.h_dtype, x.get())?;
        let rows = out_rows(op, &h)?;
        match &device {
            None => call.run(rows)?,
            Some(device) => {
                cuda::lora::lora_shrink(device, &call, mask(dropout_p, rng), rows)?;
            }
        }
        Ok(torch::list([h]))
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
            Some(device) => cuda::lora::lora_expand(device, &call, rows)?,
        }
        if let Rows::Copy(copy) = &target {
            torch::copy_(op, y, copy)?;
        }
        Ok(())
    })
}

fn lora_backward(args: &ffi::Backward<'_>) -> Result<Tensors> {
    let op = lora_backward::OP;
    guard(op, || {
        let grad = with_rows(op, args.grad)?;
        let x = optional(args.x, |x| with_rows(op, x))?;
        let h = optional(args.h, |h| with_rows(op, h))?;
        let weight = optional(args.weight, |weight| aligned(op, weight))?;
        let (a_rows, b_rows) = (all_with_rows(op, args.a)?, all_with_rows(op, args.b)?);
        let rng = args.rng.iter().next();
        let call = lora_backward::check(&lora_backward::Args {
            grad: grad.view(op)?,
            x: optional_view(op, &x)?,
            h: optional_view(op, &h)?,
            weight: optional_view(op, &weight)?,
            a: &row_views(op, &a_rows)?,
            b: &row_views(op, &b_rows)?,
            scaling: args.scaling,
            dropout_p: args.dropout_p,
            rng: rng.map(|rng| rng.view(op)).transpose()?,
            need_a: args.need_a,
            need_b: args.need_b,
        })?;
        let device = device(op, grad.get())?;
        let like = |tensors: &CxxVector<Tensor>, wanted: bool| -> Result<Vec<UniquePtr<Tensor>>> {
            let wanted = tensors.iter().filter(|_| wanted);
            wanted
                .map(|t| torch::empty(op, t.sizes(), t.dtype(), t))
                .collect()
        };
        let sizes = if args.need_x {
            with_last(grad.get().sizes(), call.in_features)
        } else {
            vec![0]
        };
        let dx = torch::empty(op, &sizes, call.grad.dtype, grad.get())?;
        let (da, db) = (like(args.a, args.need_a)?, like(args.b, args.need_b)?);
        let mats = |tensors: &[UniquePtr<Tensor>]| -> Result<Vec<MatMut>> {
            tensors.iter().map(|t| out_rows(op, t)).collect()
        };
        let gradients = Gradients {
            x: args.need_x.then(|| out_rows(op, &dx)).transpose()?,
            a: args.need_a.then(|| mats(&da)).transpose()?,
            b: args.need_b.then(|| mats(&db)).transpose()?,
        };
        match &device {
            None => call.run(&gradients)?,
            Some(device) => {
                cuda::lora::lora_backward(device, &call, mask(args.dropout_p, rng), &gradients)?;
            }
        }
        Ok(torch::list([dx].into_iter().chain(da).chain(db)))
    })
}

fn lora_experts_apply(args: &ffi::Experts<'_>) -> Result<Tensors> {
    let op = lora_experts::OP;
    guard(op, || {
        let (base, x) = (with_rows(op, args.base)?, with_rows(op, args.x)?);
        let (a, b) = (all_aligned(op, args.a)?, all_aligned(op, args.b)?);
        let rng = args.rng.iter().next();
        let call = lora_experts::check_forward(
            &base.view(op)?,
            &x.view(op)?,
            &lora_experts::Args {
                ends: args.ends.view(op)?,
                a: &row_views(op, &a)?,
                b: &row_views(op, &b)?,
                scaling: args.scaling,
                dropout_p: args.dropout_p,
                rng: rng.map(|rng| rng.view(op)).transpose()?,
            },
        )?;
        let device = device(op, x.get())?;
        let rows = |columns: usize| [call.rows as i64, columns as i64];
        let y = torch::empty(op, &rows(call.out_features), x.get().dtype(), x.get())?;
        let r = call.adapters.total_r();
        let h = torch::empty(op, &rows(r), call.h_dtype, x.get())?;
        let (y_rows, h_rows) = (out_rows(op, &y)?, out_rows(op, &h)?);
        match &device {
            None => call.run(y_rows, h_rows)?,
            Some(device) => {
                let mask = mask(args.dropout_p, rng);
                cuda::experts::lora_experts(device, &call, mask, y_rows, h_rows)?;
            }
        }
        Ok(torch::list([y, h]))
    })
}

fn lora_experts_backward(args: &ffi::ExpertsBackward<'_>) -> Result<Tensors> {
    let op = lora_experts::OP;
    guard(op, || {
        let grad = with_rows(op, args.grad)?;
        let x = optional(args.x, |x| with_rows(op, x))?;
        let h = optional(args.h, |h| with_rows(op, h))?;
        let (a, b) = (all_aligned(op, args.a)?, all_aligned(op, args.b)?);
        let rng = args.rng.iter().next();
        let call = lora_experts::check_backward(
            &grad.view(op)?,
            optional_view(op, &x)?.as_ref(),
            optional_view(op, &h)?.as_ref(),
            &lora_experts::Args {
                ends: args.ends.view(op)?,
                a: &row_views(op, &a)?,
                b: &row_views(op, &b)?,
                scaling: args.scaling,
                dropout_p: args.dropout_p,
                rng: rng.map(|rng| rng.view(op)).transpose()?,
            },
        )?;
        call.check_wanted(args.need_a, args.need_b)?;
        let device = device(op, grad.get())?;
        let like = |tensors: &CxxVector<Tensor>, wanted: bool| -> Result<Vec<UniquePtr<Tensor>>> {
            let wanted = tensors.iter().filter(|_| wanted);
            wanted.map(|tensor| torch::empty_like(op, tensor)).collect()
        };
        let sizes = if args.need_x {
            vec![call.rows as i64, call.in_features as i64]
        } else {
            vec![0]
        };
        let dx = torch::empty(op, &sizes, grad.get().dtype(), grad.get())?;
        let (da, db) = (like(args.a, args.need_a)?, like(args.b, args.need_b)?);
        let stacks = |tensors: &[UniquePtr<Tensor>]| -> Result<Vec<StackMut>> {
            tensors.iter().map(|t| out_stack(op, t)).collect()
        };
        let gradients = lora_experts::Gradients {
            x: args.need_x.then(|| out_rows(op, &dx)).transpose()?,
            a: args.need_a.then(|| stacks(&da)).transpose()?,
            b: args.need_b.then(|| stacks(&db)).transpose()?,
        };
        match &device {
            None => call.run_backward(&gradients)?,
            Some(device) => {
                let mask = mask(args.dropout_p, rng);
                cuda::experts::lora_experts_backward(device, &call, mask, &gradients)?;
            }
        }
        Ok(torch::list([dx].into_iter().chain(da).chain(db)))
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
            cuda::buffer::accumulate(device, &sums, &stats, &snapshot, weight, zero_grad)?;
        } else {
            sideband_accumulate::run(&mut sums, &mut stats, &snapshot, weight)?;
        }
        if zero_grad {
            for (g, held) in grad.iter().zip(&held) {
                // The kernel has zeroed what it read; that is the gradient itself unless it had to be copied.
                if device.is_none() || matches!(held, Rows::Copy(_)) {
                    torch::zero_(op, g)?;
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
    let op = sideband_stats::OP;
    guard(op, || {
        let sums = views(op, sum)?;
        sideband_accumulate::check(op, &sums, &stats.view(op)?, None)?;
        let device = device(op, stats)?;
        let out = torch::empty(op, &[measured::COUNT as i64], DType::F64, stats)?;
        if let Some(device) = &device {
            cuda::buffer::statistics(device, &sums, &stats.view(op)?, &out.view_mut(op)?)?;
            return Ok(torch::list([out]));
        }
        let values = sideband_stats::run(&sums, &fields(op, stats)?)?;
        if let Some(slice) = out.view_mut(op)?.as_mut_slice::<f64>() {
            slice.copy_from_slice(&values);
        }
        Ok(torch::list([out]))
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
            Some(device) => cuda::buffer::drain(device, &sums, &stats, &out, scale)?,
        }
        for (g, target) in grad.iter().zip(&targets) {
            if let Rows::Copy(copy) = target {
                torch::copy_(op, g, copy)?;
            }
        }
        Ok(())
    })
}

fn buffer_variance(ring: &Tensor, filled: i64) -> Result<Tensors> {
    let op = buffer_variance::OP;
    guard(op, || {
        let rows = with_rows(op, ring)?;
        let mat = buffer_variance::check(&rows.view(op)?, filled)?;
        let device = device(op, ring)?;
        let out = torch::empty(op, &[], DType::F64, ring)?;
        if let Some(device) = &device {
            let slot = out.data().cast_mut().cast();
            cuda::buffer::variance(device, mat, filled as usize, slot)?;
            return Ok(torch::list([out]));
        }
        let value = buffer_variance::run(mat, filled as usize)?;
        if let Some(slot) = out
            .view_mut(op)?
            .as_mut_slice::<f64>()
            .and_then(<[f64]>::first_mut)
        {
            *slot = value;
        }
        Ok(torch::list([out]))
    })
}
