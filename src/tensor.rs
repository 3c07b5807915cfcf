//! Borrowed views of tensors that somebody else owns.
//!
//! Safety contract of this module, upheld by `torch.rs` (torch's tensors) and by tests (vectors):
//! the memory behind a view stays allocated for the view's lifetime, every index inside `sizes` maps
//! through `strides` into that allocation, and nobody else writes to it while an operation runs.
//! Nothing in this crate frees tensor memory. `memory.rs` checks what of this can be checked.

use crate::error::{Error, Result};
use half::{bf16, f16};
use std::fmt;
use std::marker::PhantomData;

/// Element types that an operation can meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    F32,
    F64,
    BF16,
    F16,
    I32,
    I64,
    /// Anything else; the number is torch's scalar type code.
    Other(i32),
}

impl DType {
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::Other(_) => 1,
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
    }

    /// The common type of two floating types, as torch promotes them.
    pub fn promote(self, other: DType) -> DType {
        match (self, other) {
            (a, b) if a == b => a,
            (DType::F64, _) | (_, DType::F64) => DType::F64,
            _ => DType::F32,
        }
    }
}

/// Names of torch's scalar types by their codes, which are append-only.
const NAMES: [&str; 46] = [
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "float32",
    "float64",
    "complex32",
    "complex64",
    "complex128",
    "bool",
    "qint8",
    "quint8",
    "qint32",
    "bfloat16",
    "quint4x2",
    "quint2x4",
    "bits1x8",
    "bits2x4",
    "bits4x2",
    "bits8",
    "bits16",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e5m2fnuz",
    "float8_e4m3fnuz",
    "uint16",
    "uint32",
    "uint64",
    "uint1",
    "uint2",
    "uint3",
    "uint4",
    "uint5",
    "uint6",
    "uint7",
    "int1",
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
];

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "float32",
            DType::F64 => "float64",
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            DType::I32 => "int32",
            DType::I64 => "int64",
            DType::Other(code) => {
                return match usize::try_from(*code).ok().and_then(|i| NAMES.get(i)) {
                    Some(name) => f.write_str(name),
                    None => write!(f, "torch scalar type {code}"),
                };
            }
        })
    }
}

/// Where a tensor lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(i32),
    /// Torch's device type code.
    Other(i32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
            Device::Other(kind) => write!(f, "torch device type {kind}"),
        }
    }
}

/// A Rust type that is the element of a tensor.
pub trait Element: Copy + Send + Sync + 'static {
    const DTYPE: DType;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for bf16 {
    const DTYPE: DType = DType::BF16;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}
impl Element for i64 {
    const DTYPE: DType = DType::I64;
}

/// A read-only view: base pointer, sizes and strides in elements.
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    data: *const u8,
    sizes: &'a [i64],
    strides: &'a [i64],
    dtype: DType,
    device: Device,
}

// SAFETY: a view is a pointer to memory that, by the module's contract, outlives it and is not
// written while it is read; sharing the pointer between threads adds nothing to that.
unsafe impl Send for TensorRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorRef<'_> {}

impl<'a> TensorRef<'a> {
    /// # Safety
    /// The module's contract holds for `data`, `sizes` and `strides`; `data` is aligned for `dtype`.
    pub unsafe fn new(
        data: *const u8,
        sizes: &'a [i64],
        strides: &'a [i64],
        dtype: DType,
        device: Device,
    ) -> Self {
        Self {
            data,
            sizes,
            strides,
            dtype,
            device,
        }
    }

    pub fn sizes(&self) -> &'a [i64] {
        self.sizes
    }
    pub fn strides(&self) -> &'a [i64] {
        self.strides
    }
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    pub fn device(&self) -> Device {
        self.device
    }
    pub fn data(&self) -> *const u8 {
        self.data
    }
    pub fn numel(&self) -> usize {
        self.sizes.iter().map(|&s| s.max(0) as usize).product()
    }

    /// The last size, or 1 for a scalar.
    pub fn last(&self) -> usize {
        self.sizes.last().map_or(1, |&s| s.max(0) as usize)
    }

    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        for (&size, &stride) in self.sizes.iter().zip(self.strides).rev() {
            if size != 1 && stride != expected {
                return self.numel() == 0;
            }
            expected *= size.max(1);
        }
        true
    }

    /// The view as a matrix [product of the leading sizes, last size], if the strides allow that
    /// without a copy.
    pub fn rows(&self) -> Option<Mat> {
        let (&cols, lead) = self.sizes.split_last()?;
        let (&cs, lead_strides) = self.strides.split_last()?;
        let rows: i64 = lead.iter().try_fold(1i64, |rows, &n| rows.checked_mul(n))?;
        let mut rs = cols;
        let mut span: Option<i64> = None;
        if self.numel() != 0 {
            for (&size, &stride) in lead.iter().zip(lead_strides).rev() {
                if size == 1 {
                    continue;
                }
                match span {
                    None => rs = stride,
                    Some(next) if next != stride => return None,
                    Some(_) => {}
                }
                span = Some(stride * size);
            }
        }
        Some(Mat {
            data: self.data,
            dtype: self.dtype,
            rows: rows.max(0) as usize,
            cols: cols.max(0) as usize,
            rs: rs as isize,
            cs: cs as isize,
        })
    }

    /// A view [count, rows, cols] as `count` matrices.
    pub fn stack(&self) -> Option<Stack> {
        let (&[count, rows, cols], &[step, rs, cs]) = (self.sizes, self.strides) else {
            return None;
        };
        Some(Stack {
            first: Mat {
                data: self.data,
                dtype: self.dtype,
                rows: rows.max(0) as usize,
                cols: cols.max(0) as usize,
                rs: rs as isize,
                cs: cs as isize,
            },
            count: count.max(0) as usize,
            step: step as isize,
        })
    }

    /// The elements as a slice, if the view is contiguous and of type `E`.
    pub fn as_slice<E: Element>(&self) -> Option<&'a [E]> {
        if self.dtype != E::DTYPE || !self.is_contiguous() {
            return None;
        }
        if self.numel() == 0 {
            return Some(&[]);
        }
        // SAFETY: contiguous, of this element type, and alive for 'a by the module's contract.
        Some(unsafe { std::slice::from_raw_parts(self.data.cast::<E>(), self.numel()) })
    }
}

/// A view that an operation may write to.
pub struct TensorMut<'a> {
    view: TensorRef<'a>,
    exclusive: PhantomData<&'a mut u8>,
}

impl<'a> TensorMut<'a> {
    /// # Safety
    /// As [`TensorRef::new`], and no other view of the same memory is used while this one lives.
    pub unsafe fn new(
        data: *mut u8,
        sizes: &'a [i64],
        strides: &'a [i64],
        dtype: DType,
        device: Device,
    ) -> Self {
        Self {
            // SAFETY: the caller upholds the same contract.
            view: unsafe { TensorRef::new(data, sizes, strides, dtype, device) },
            exclusive: PhantomData,
        }
    }

    pub fn view(&self) -> &TensorRef<'a> {
        &self.view
    }

    pub fn rows(&mut self) -> Option<MatMut> {
        self.view.rows().map(|mat| MatMut { mat })
    }

    pub fn stack(&mut self) -> Option<StackMut> {
        self.view.stack().map(|stack| StackMut { stack })
    }

    pub fn as_mut_slice<E: Element>(&mut self) -> Option<&mut [E]> {
        let slice = self.view.as_slice::<E>()?;
        // SAFETY: this view is the only one of its memory (contract of `TensorMut::new`), and the
        // borrow of self keeps it so.
        Some(unsafe { std::slice::from_raw_parts_mut(slice.as_ptr().cast_mut(), slice.len()) })
    }
}

/// A matrix inside a tensor: pointer, shape and strides, all in elements of `dtype`.
#[derive(Clone, Copy, Debug)]
pub struct Mat {
    data: *const u8,
    pub dtype: DType,
    pub rows: usize,
    pub cols: usize,
    /// Elements from one row to the next.
    pub rs: isize,
    /// Elements from one column to the next.
    pub cs: isize,
}

// SAFETY: see `TensorRef`.
unsafe impl Send for Mat {}
// SAFETY: see `TensorRef`.
unsafe impl Sync for Mat {}

impl Mat {
    /// # Safety
    /// Every (row, col) inside the shape maps into live memory of type `E`.
    pub unsafe fn from_raw<E: Element>(
        data: *const E,
        rows: usize,
        cols: usize,
        rs: isize,
        cs: isize,
    ) -> Self {
        Mat {
            data: data.cast(),
            dtype: E::DTYPE,
            rows,
            cols,
            rs,
            cs,
        }
    }

    /// Rows and columns exchanged, without touching memory.
    pub fn t(self) -> Mat {
        Mat {
            rows: self.cols,
            cols: self.rows,
            rs: self.cs,
            cs: self.rs,
            ..self
        }
    }

    /// The columns `start .. start + count`.
    pub fn columns(self, start: usize, count: usize) -> Mat {
        assert!(start + count <= self.cols);
        Mat {
            data: self
                .data
                .wrapping_offset(start as isize * self.cs * self.dtype.size() as isize),
            cols: count,
            ..self
        }
    }

    /// One row as a matrix [1, cols].
    pub fn at_row(&self, row: usize) -> Mat {
        assert!(row < self.rows);
        Mat {
            data: self
                .data
                .wrapping_offset(row as isize * self.rs * self.dtype.size() as isize),
            rows: 1,
            ..*self
        }
    }

    /// Address of an element; the caller dereferences it only inside the shape.
    #[inline(always)]
    pub fn at<E: Element>(&self, row: usize, col: usize) -> *const E {
        debug_assert!(E::DTYPE == self.dtype && row < self.rows && col < self.cols);
        self.data
            .cast::<E>()
            .wrapping_offset(row as isize * self.rs + col as isize * self.cs)
    }

    pub fn data(&self) -> *const u8 {
        self.data
    }
}

/// A matrix that an operation writes: a [`Mat`] whose memory nobody else uses meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct MatMut {
    mat: Mat,
}

impl MatMut {
    /// # Safety
    /// As [`Mat::from_raw`], and the memory is not read or written through another path while this
    /// view is used.
    pub unsafe fn from_raw<E: Element>(
        data: *mut E,
        rows: usize,
        cols: usize,
        rs: isize,
        cs: isize,
    ) -> Self {
        MatMut {
            // SAFETY: the caller upholds the contract.
            mat: unsafe { Mat::from_raw(data, rows, cols, rs, cs) },
        }
    }

    pub fn mat(&self) -> &Mat {
        &self.mat
    }

    pub fn t(self) -> MatMut {
        MatMut { mat: self.mat.t() }
    }

    pub fn columns(self, start: usize, count: usize) -> MatMut {
        MatMut {
            mat: self.mat.columns(start, count),
        }
    }

    #[inline(always)]
    pub fn at<E: Element>(&self, row: usize, col: usize) -> *mut E {
        self.mat.at::<E>(row, col).cast_mut()
    }
}

/// out = beta out + alpha a b, all of one dtype; out [m, n], a [m, k], b [k, n]; beta is 0 or 1.
#[derive(Clone, Copy, Debug)]
pub struct DenseProduct {
    pub out: MatMut,
    pub beta: f64,
    pub alpha: f64,
    pub a: Mat,
    pub b: Mat,
}

impl DenseProduct {
    /// out = a b.
    pub fn new(out: MatMut, a: Mat, b: Mat) -> Self {
        DenseProduct {
            out,
            beta: 0.0,
            alpha: 1.0,
            a,
            b,
        }
    }

    /// The product times `alpha`.
    pub fn times(self, alpha: f64) -> Self {
        DenseProduct { alpha, ..self }
    }

    /// Added to what is in `out`, if so.
    pub fn onto(self, accumulate: bool) -> Self {
        let beta = if accumulate { 1.0 } else { 0.0 };
        DenseProduct { beta, ..self }
    }
}

/// Matrices of one shape and layout, the same distance apart.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    pub first: Mat,
    pub count: usize,
    /// Elements from one matrix to the next.
    pub step: isize,
}

impl Stack {
    pub fn at(&self, index: usize) -> Mat {
        debug_assert!(index < self.count);
        let bytes = index as isize * self.step * self.first.dtype.size() as isize;
        Mat {
            data: self.first.data.wrapping_offset(bytes),
            ..self.first
        }
    }

    /// Rows and columns of every matrix exchanged, without touching memory.
    pub fn t(self) -> Stack {
        Stack {
            first: self.first.t(),
            ..self
        }
    }
}

/// A [`Stack`] that an operation writes, whose memory nobody else uses meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct StackMut {
    stack: Stack,
}

impl StackMut {
    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    pub fn at(&self, index: usize) -> MatMut {
        MatMut {
            mat: self.stack.at(index),
        }
    }

    pub fn t(self) -> StackMut {
        StackMut {
            stack: self.stack.t(),
        }
    }
}

/// `[2, 3]` for messages.
pub fn shape(sizes: &[i64]) -> String {
    format!("{sizes:?}")
}

/// Fails unless the tensor is one of the four floating types that the operations take.
pub fn require_float(op: &'static str, name: &str, tensor: &TensorRef<'_>) -> Result<()> {
    if tensor.dtype().is_float() {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!(
            "{name} is {}; it must be float32, float64, bfloat16 or float16",
            tensor.dtype()
        ),
    ))
}
