//! `lora_shrink`: H = drop(X) A_cat^T, [M, I] x K matrices [r_k, I] -> [M, R].

use super::arguments::{Adapters, check_adapters, check_dropout, check_in_features, rows};
use super::torch_products;
use crate::cpu::gemm::{Axis, Out, Parts, Plain, gemm};
use crate::cpu::num::Real;
use crate::error::Result;
use crate::philox::Dropout;
use crate::tensor::{DType, Mat, MatMut, TensorRef, require_float};

pub const OP: &str = "lora_shrink";

/// A checked call.
pub struct Call {
    pub x: Mat,
    pub adapters: Adapters,
    pub dropout: Vec<Option<Dropout>>,
    /// dtype of H: x and the adapters promoted.
    pub h_dtype: DType,
}

pub fn check(
    x: &TensorRef<'_>,
    a: &[TensorRef<'_>],
    p: f64,
    rng: Option<&TensorRef<'_>>,
) -> Result<Call> {
    require_float(OP, "x", x)?;
    let mat = rows(OP, "x", x)?;
    let adapters = check_adapters(OP, ("x", x), Some(a), None, None)?;
    check_in_features(OP, "x", x.sizes(), mat.cols, &adapters)?;
    let dropout = check_dropout(OP, p, rng, x.device(), a.len())?;
    Ok(Call {
        x: mat,
        h_dtype: x.dtype().promote(adapters.dtype),
        adapters,
        dropout,
    })
}

impl Call {
    /// Computes H into `h` [M, R].
    pub fn run(&self, h: MatMut) -> Result<()> {
        if self.h_dtype == DType::F64 {
            shrink::<f64>(OP, self.x, &self.adapters, &self.dropout, h)
        } else {
            shrink::<f32>(OP, self.x, &self.adapters, &self.dropout, h)
        }
    }
}

pub(crate) fn shrink<T: Real>(
    op: &'static str,
    x: Mat,
    adapters: &Adapters,
    dropout: &[Option<Dropout>],
    h: MatMut,
) -> Result<()> {
    if torch_products::serves(x.dtype, x.rows, adapters, dropout) {
        return torch_products::shrink(op, x, adapters, h);
    }
    if dropout.iter().all(Option::is_none) {
        let right = Parts::stacked(Axis::Columns, adapters.a.iter().map(|a| (a.t(), 1.0)));
        return gemm::<T>(op, &Plain::new(x), &right, &Out::one(h, false));
    }
    // Every adapter sees its own mask of X, so each has its own left operand.
    for ((a, columns), dropout) in adapters.a.iter().zip(adapters.columns()).zip(dropout) {
        let left = Plain::with_dropout(x, *dropout);
        let out = Out::one(h.columns(columns.start, columns.len()), false);
        gemm::<T>(op, &left, &Parts::one(a.t(), 1.0), &out)?;
    }
    Ok(())
}
