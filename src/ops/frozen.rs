//! The frozen layer's own products, forward and backward, and rows that are copied into a new output.

use crate::cpu::dense::dense_product;
use crate::cpu::gemm::{Out, Parts, Plain, gemm};
use crate::cpu::num::Stored;
use crate::cpu::torch_product_is_fast;
use crate::error::Result;
use crate::host::parallel_for;
use crate::tensor::{DenseProduct, Mat, MatMut};
use crate::with_float;

/// Rows from which our own product beats torch's scalar one (bfloat16 and float16 on a CPU without
/// vector instructions for them); below it, converting the weight costs more than it saves.
const OWN_PRODUCT_ROWS: usize = 8;

/// Y = X W^T + b.
pub(crate) fn frozen_forward(
    op: &'static str,
    x: Mat,
    weight: Mat,
    bias: Option<Mat>,
    y: MatMut,
) -> Result<()> {
    if torch_product_is_fast(x.dtype) || x.rows < OWN_PRODUCT_ROWS {
        if let Some(bias) = &bias {
            copy_rows(op, y, |_| bias.at_row(0))?;
        }
        let product = DenseProduct::new(y, x, weight.t()).onto(bias.is_some());
        return dense_product(op, &product);
    }
    let out = Out::one(y, false).with_bias(bias);
    gemm::<f32>(op, &Plain::new(x), &Parts::one(weight.t(), 1.0), &out)
}

/// dX = dY W, for the backward pass.
pub(crate) fn frozen_backward(op: &'static str, grad: Mat, weight: Mat, dx: MatMut) -> Result<()> {
    if torch_product_is_fast(grad.dtype) {
        return dense_product(op, &DenseProduct::new(dx, grad, weight));
    }
    gemm::<f32>(
        op,
        &Plain::new(grad),
        &Parts::one(weight, 1.0),
        &Out::one(dx, false),
    )
}

/// Copies a row of the same dtype into every row of `y`.
pub(crate) fn copy_rows(
    op: &'static str,
    y: MatMut,
    source: impl Fn(usize) -> Mat + Sync,
) -> Result<()> {
    let (m, n) = (y.mat().rows, y.mat().cols);
    if n == 0 {
        return Ok(());
    }
    with_float!(y.mat().dtype, E => parallel_for(op, m, (1 << 15) / n + 1, &|rows| {
        for row in rows {
            copy_row::<E>(y, row, source(row));
        }
    }))
}

fn copy_row<E: Stored>(y: MatMut, row: usize, source: Mat) {
    let count = y.mat().cols;
    if y.mat().cs == 1 && source.cs == 1 {
        // SAFETY: row `row` of y, which this call owns, one row a task, and the source row are
        // contiguous and `count` long (checked in `check`); a new tensor overlaps nothing.
        unsafe {
            std::ptr::copy_nonoverlapping(source.at::<E>(0, 0), y.at::<E>(row, 0), count);
        }
        return;
    }
    for column in 0..count {
        // SAFETY: (row, column) lies inside both, as above.
        unsafe { *y.at::<E>(row, column) = *source.at::<E>(0, column) };
    }
}
