//! The adapters' products by torch's own matrix product, where that is the faster one: for low-precision
//! types that it runs on hardware units (AMX, AVX-512 bfloat16) which this crate's product does not use,
//! and for a handful of tokens, where it has matrix-vector products.
//!
//! Many tokens: the K adapters are copied side by side (R x I and O x R elements, small beside X), so
//! that X and dY are read once. Few tokens: reading the adapters is all the work, so they are taken one
//! by one where they lie. Results go onto Y and dX in place. Only without dropout, and for adapters of
//! x's own dtype.

use super::arguments::{Adapters, Gradients};
use crate::cpu::dense::dense_product;
use crate::cpu::num::Stored;
use crate::cpu::{torch_product_is_fast, zeros};
use crate::error::Result;
use crate::philox::Dropout;
use crate::tensor::{DType, DenseProduct, Mat, MatMut};
use crate::with_float;

/// Tokens up to which the adapters are taken one by one.
const FEW: usize = 4;

/// Whether this path serves a call on `rows` tokens.
pub(crate) fn serves(
    x: DType,
    rows: usize,
    adapters: &Adapters,
    dropout: &[Option<Dropout>],
) -> bool {
    let fast = match x {
        DType::BF16 | DType::F16 => torch_product_is_fast(x),
        _ => rows <= FEW,
    };
    fast && adapters.dtype == x && dropout.iter().all(Option::is_none)
}

/// A matrix of this module's own, row-major.
struct Scratch {
    /// Words of eight bytes, aligned for every element type.
    data: Vec<u64>,
    dtype: DType,
    rows: usize,
    cols: usize,
}

impl Scratch {
    fn new(op: &'static str, dtype: DType, rows: usize, cols: usize) -> Result<Self> {
        let bytes = rows.saturating_mul(cols).saturating_mul(dtype.size());
        Ok(Scratch {
            data: zeros(op, bytes.div_ceil(8))?,
            dtype,
            rows,
            cols,
        })
    }

    fn mat(&mut self) -> MatMut {
        let (rows, cols) = (self.rows, self.cols);
        with_float!(self.dtype, E => {
            // SAFETY: `data` has room for rows x cols elements, every bit pattern of which is a value
            // of E; callers use the view only while `self` lives and is not otherwise touched.
            unsafe { MatMut::from_raw(self.data.as_mut_ptr().cast::<E>(), rows, cols, cols as isize, 1) }
        })
    }
}

/// `to = factor * from`, element by element, of one dtype and shape.
fn copy(from: Mat, to: MatMut, factor: f64) {
    let factor = factor as f32;
    with_float!(from.dtype, E => {
        for row in 0..from.rows {
            for col in 0..from.cols {
                // SAFETY: (row, col) lies inside both; `to` is written by this call alone.
                unsafe { *to.at::<E>(row, col) = E::narrow(factor * (*from.at::<E>(row, col)).widen::<f32>()) };
            }
        }
    });
}

/// One factor for all adapters, if they share it.
fn common(scaling: &[f64]) -> Option<f64> {
    let first = *scaling.first()?;
    scaling.iter().all(|s| *s == first).then_some(first)
}

/// A_cat [R, I], copied only where there are several adapters.
fn stack_a(op: &'static str, adapters: &Adapters, scratch: &mut Option<Scratch>) -> Result<Mat> {
    if let [only] = adapters.a.as_slice() {
        return Ok(*only);
    }
    let cols = adapters.a.first().map_or(0, |a| a.cols);
    let out = scratch
        .insert(Scratch::new(op, adapters.dtype, adapters.total_r(), cols)?)
        .mat();
    for (a, span) in adapters.a.iter().zip(adapters.columns()) {
        copy(*a, out.t().columns(span.start, span.len()).t(), 1.0);
    }
    Ok(*out.mat())
}

/// B_cat [O, R] and the factor that goes with its product; unequal factors are folded in.
fn stack_b(
    op: &'static str,
    adapters: &Adapters,
    scratch: &mut Option<Scratch>,
) -> Result<(Mat, f64)> {
    if let ([only], [s]) = (adapters.b.as_slice(), adapters.scaling.as_slice()) {
        return Ok((*only, *s));
    }
    let rows = adapters.b.first().map_or(0, |b| b.rows);
    let out = scratch
        .insert(Scratch::new(op, adapters.dtype, rows, adapters.total_r())?)
        .mat();
    let alpha = common(&adapters.scaling);
    for ((b, span), s) in adapters
        .b
        .iter()
        .zip(adapters.columns())
        .zip(&adapters.scaling)
    {
        copy(
            *b,
            out.columns(span.start, span.len()),
            if alpha.is_some() { 1.0 } else { *s },
        );
    }
    Ok((*out.mat(), alpha.unwrap_or(1.0)))
}

pub(crate) fn shrink(op: &'static str, x: Mat, adapters: &Adapters, h: MatMut) -> Result<()> {
    if x.rows <= FEW {
        for (a, span) in adapters.a.iter().zip(adapters.columns()) {
            let part = h.columns(span.start, span.len());
            dense_product(op, &DenseProduct::new(part, x, a.t()))?;
        }
        return Ok(());
    }
    let mut scratch = None;
    let a = stack_a(op, adapters, &mut scratch)?;
    dense_product(op, &DenseProduct::new(h, x, a.t()))
}

pub(crate) fn expand(op: &'static str, h: Mat, adapters: &Adapters, y: MatMut) -> Result<()> {
    if h.rows <= FEW {
        for ((b, span), s) in adapters
            .b
            .iter()
            .zip(adapters.columns())
            .zip(&adapters.scaling)
        {
            let part = h.columns(span.start, span.len());
            let product = DenseProduct::new(y, part, b.t()).times(*s);
            dense_product(op, &product.onto(true))?;
        }
        return Ok(());
    }
    let mut scratch = None;
    let (b, alpha) = stack_b(op, adapters, &mut scratch)?;
    dense_product(op, &DenseProduct::new(y, h, b.t()).times(alpha).onto(true))
}

/// All but the frozen weight's part of dX, which is in `out.x` already if `onto_x`.
pub(crate) fn backward(
    op: &'static str,
    grad: Mat,
    x: Option<Mat>,
    h: Option<Mat>,
    adapters: &Adapters,
    out: &Gradients,
    onto_x: bool,
) -> Result<()> {
    if grad.rows <= FEW {
        return backward_one_by_one(op, grad, x, h, adapters, out, onto_x);
    }
    let r = adapters.total_r();
    let (mut a_scratch, mut b_scratch) = (None, None);
    let needs_dh = out.x.is_some() || out.a.is_some();
    let mut dh = Scratch::new(op, adapters.dtype, if needs_dh { grad.rows } else { 0 }, r)?;
    let dh = dh.mat();
    if needs_dh {
        let (b, alpha) = stack_b(op, adapters, &mut b_scratch)?;
        dense_product(op, &DenseProduct::new(dh, grad, b).times(alpha))?;
    }
    let dh = *dh.mat();
    if let (Some(db), Some(h)) = (&out.b, h) {
        // One pass over dY for all adapters, then each its columns.
        let mut all = Scratch::new(op, adapters.dtype, grad.cols, r)?;
        let all = all.mat();
        dense_product(op, &DenseProduct::new(all, grad.t(), h))?;
        for ((b, span), s) in db.iter().zip(adapters.columns()).zip(&adapters.scaling) {
            copy(all.mat().columns(span.start, span.len()), *b, *s);
        }
    }
    if let (Some(da), Some(x)) = (&out.a, x) {
        let mut all = Scratch::new(op, adapters.dtype, r, x.cols)?;
        let all = all.mat();
        dense_product(op, &DenseProduct::new(all, dh.t(), x))?;
        for (a, span) in da.iter().zip(adapters.columns()) {
            copy(all.mat().t().columns(span.start, span.len()).t(), *a, 1.0);
        }
    }
    match out.x {
        Some(dx) => {
            let a = stack_a(op, adapters, &mut a_scratch)?;
            dense_product(op, &DenseProduct::new(dx, dh, a).onto(onto_x))
        }
        None => Ok(()),
    }
}

fn backward_one_by_one(
    op: &'static str,
    grad: Mat,
    x: Option<Mat>,
    h: Option<Mat>,
    adapters: &Adapters,
    out: &Gradients,
    onto_x: bool,
) -> Result<()> {
    let mut onto = onto_x;
    for (k, span) in adapters.columns().into_iter().enumerate() {
        let (a, b, s) = (adapters.a[k], adapters.b[k], adapters.scaling[k]);
        if let (Some(db), Some(h)) = (&out.b, h) {
            let part = h.columns(span.start, span.len());
            dense_product(op, &DenseProduct::new(db[k], grad.t(), part).times(s))?;
        }
        if out.x.is_none() && out.a.is_none() {
            continue;
        }
        let mut scratch = Scratch::new(op, adapters.dtype, grad.rows, span.len())?;
        let dh = scratch.mat();
        dense_product(op, &DenseProduct::new(dh, grad, b).times(s))?;
        if let (Some(da), Some(x)) = (&out.a, x) {
            dense_product(op, &DenseProduct::new(da[k], dh.mat().t(), x))?;
        }
        if let Some(dx) = out.x {
            dense_product(op, &DenseProduct::new(dx, *dh.mat(), a).onto(onto))?;
            onto = true;
        }
    }
    Ok(())
}
