//! `lora_expand_`: Y += H diag(s) B_cat^T, in place, [M, R] x K matrices [O, r_k] -> [M, O].

use super::arguments::{Adapters, check_adapters, check_out_features, rows, same_device};
use super::torch_products;
use crate::cpu::gemm::{Axis, Out, Parts, Plain, gemm};
use crate::cpu::num::Real;
use crate::error::{Error, Result};
use crate::tensor::{DType, Mat, MatMut, TensorRef, require_float, shape};

pub const OP: &str = "lora_expand_";

/// A checked call.
pub struct Call {
    pub h: Mat,
    pub adapters: Adapters,
}

pub fn check(
    y: &TensorRef<'_>,
    h: &TensorRef<'_>,
    b: &[TensorRef<'_>],
    scaling: &[f64],
) -> Result<Call> {
    require_float(OP, "y", y)?;
    require_float(OP, "h", h)?;
    same_device(OP, "h", h, y.device(), "y")?;
    let y_mat = rows(OP, "y", y)?;
    let h_mat = rows(OP, "h", h)?;
    let adapters = check_adapters(OP, ("y", y), None, Some(b), Some(scaling))?;
    check_out_features(OP, "y", y.sizes(), y_mat.cols, &adapters)?;
    let lead = |t: &TensorRef<'_>| t.sizes().len() - 1;
    if y.sizes()[..lead(y)] != h.sizes()[..lead(h)] {
        return Err(Error::argument(
            OP,
            format!(
                "y is {} but h is {}: their leading sizes must be the same",
                shape(y.sizes()),
                shape(h.sizes())
            ),
        ));
    }
    let shared = |(&size, &stride): (&i64, &i64)| size > 1 && stride == 0;
    if y.sizes().iter().zip(y.strides()).any(shared) {
        return Err(Error::argument(
            OP,
            format!(
                "y is {} with strides {:?}: its elements share memory, so it cannot be written in place",
                shape(y.sizes()),
                y.strides()
            ),
        ));
    }
    if h_mat.cols != adapters.total_r() {
        return Err(Error::argument(
            OP,
            format!(
                "h is {} but the ranks of B add up to {}: h's last size must be their sum",
                shape(h.sizes()),
                adapters.total_r()
            ),
        ));
    }
    Ok(Call { h: h_mat, adapters })
}

impl Call {
    /// Adds to `y` [M, O].
    pub fn run(&self, y: MatMut) -> Result<()> {
        if [y.mat().dtype, self.h.dtype, self.adapters.dtype].contains(&DType::F64) {
            expand::<f64>(OP, self.h, &self.adapters, y)
        } else {
            expand::<f32>(OP, self.h, &self.adapters, y)
        }
    }
}

pub(crate) fn expand<T: Real>(
    op: &'static str,
    h: Mat,
    adapters: &Adapters,
    y: MatMut,
) -> Result<()> {
    let parts = adapters
        .b
        .iter()
        .zip(&adapters.scaling)
        .map(|(b, s)| (b.t(), *s));
    let right = Parts::stacked(Axis::Rows, parts);
    if h.cols == 0 {
        return Ok(());
    }
    if h.dtype == y.mat().dtype && torch_products::serves(h.dtype, h.rows, adapters, &[]) {
        return torch_products::expand(op, h, adapters, y);
    }
    gemm::<T>(op, &Plain::new(h), &right, &Out::one(y, true))
}
