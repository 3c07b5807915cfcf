//! `lora_backward`: all gradients of `lora_linear` and `lora_delta`.
//!
//! dH_k = s_k dY B_k, dB_k = s_k dY^T H_k, dA_k = dH_k^T drop_k(X), and
//! dX = dY W + sum over k of mask_k (dH_k A_k); without W, the adapters' part of dX alone.
//! H is the forward pass' own; masks are drawn again from (seed, offset).

use super::arguments::{
    Adapters, Gradients, check_adapters, check_dropout, check_in_features, check_out_features,
    matrix, rows, same_device, same_dtype,
};
use super::frozen::frozen_backward;
use super::torch_products;
use crate::cpu::gemm::{Axis, Out, Parts, Plain, gemm};
use crate::cpu::num::Real;
use crate::cpu::zeros;
use crate::error::{Error, Result};
use crate::philox::Dropout;
use crate::tensor::{DType, Mat, MatMut, TensorRef, require_float, shape};

pub const OP: &str = "lora_backward";

/// Arguments of a call.
pub struct Args<'a> {
    pub grad: TensorRef<'a>,
    /// What dA needs, and nothing else does.
    pub x: Option<TensorRef<'a>>,
    /// What dB needs, and nothing else does.
    pub h: Option<TensorRef<'a>>,
    pub weight: Option<TensorRef<'a>>,
    pub a: &'a [TensorRef<'a>],
    pub b: &'a [TensorRef<'a>],
    pub scaling: &'a [f64],
    pub dropout_p: f64,
    pub rng: Option<TensorRef<'a>>,
    pub need_a: bool,
    pub need_b: bool,
}

/// A checked call.
pub struct Call {
    pub grad: Mat,
    /// There if dA is wanted.
    pub x: Option<Mat>,
    /// There if dB is wanted.
    pub h: Option<Mat>,
    pub in_features: usize,
    pub weight: Option<Mat>,
    pub adapters: Adapters,
    pub dropout: Vec<Option<Dropout>>,
}

pub fn check(args: &Args<'_>) -> Result<Call> {
    let grad = &args.grad;
    require_float(OP, "grad", grad)?;
    let grad_mat = rows(OP, "grad", grad)?;
    let adapters = check_adapters(
        OP,
        ("grad", grad),
        Some(args.a),
        Some(args.b),
        Some(args.scaling),
    )?;
    check_out_features(OP, "grad", grad.sizes(), grad_mat.cols, &adapters)?;
    let in_features = adapters.a.first().map_or(0, |a| a.cols);
    check_in_features(OP, "dx", &[in_features as i64], in_features, &adapters)?;
    let x = wanted(args.need_a, "x", "dA", &args.x)?;
    let h = wanted(args.need_b, "h", "dB", &args.h)?;
    if let Some(x) = x {
        same_dtype(OP, "grad", grad, x.dtype(), "x")?;
        same_device(OP, "grad", grad, x.device(), "x")?;
    }
    if let Some(h) = h {
        require_float(OP, "h", h)?;
        same_device(OP, "h", h, grad.device(), "grad")?;
    }
    let x_mat = x.map(|x| rows(OP, "x", x)).transpose()?;
    let h_mat = h.map(|h| rows(OP, "h", h)).transpose()?;
    if let (Some(x), Some(mat)) = (x, x_mat) {
        check_in_features(OP, "x", x.sizes(), mat.cols, &adapters)?;
    }
    let r = adapters.total_r();
    if x_mat.is_some_and(|x| x.rows != grad_mat.rows)
        || h_mat.is_some_and(|h| h.rows != grad_mat.rows || h.cols != r)
    {
        let of = |t: Option<&TensorRef<'_>>| t.map_or("None".into(), |t| shape(t.sizes()));
        return Err(Error::argument(
            OP,
            format!(
                "grad is {}, x is {} and h is {}: their leading sizes must be the same and h's last size the ranks' sum, {r}",
                shape(grad.sizes()),
                of(x),
                of(h)
            ),
        ));
    }
    let weight = match &args.weight {
        None => None,
        Some(weight) => {
            same_device(OP, "weight", weight, grad.device(), "grad")?;
            same_dtype(OP, "weight", weight, grad.dtype(), "grad")?;
            let w = matrix(OP, "weight", weight, "[out_features, in_features]")?;
            if w.rows != grad_mat.cols || w.cols != in_features {
                return Err(Error::argument(
                    OP,
                    format!(
                        "weight is {} but grad is {} and A[0] has {in_features} columns: weight must be [{}, {in_features}]",
                        shape(weight.sizes()),
                        shape(grad.sizes()),
                        grad_mat.cols,
                    ),
                ));
            }
            Some(w)
        }
    };
    let dropout = check_dropout(
        OP,
        args.dropout_p,
        args.rng.as_ref(),
        grad.device(),
        args.a.len(),
    )?;
    Ok(Call {
        grad: grad_mat,
        x: x_mat,
        h: h_mat,
        in_features,
        weight,
        adapters,
        dropout,
    })
}

/// An argument that one kind of gradient needs: there if that is wanted, and not looked at otherwise.
fn wanted<'a>(
    is_wanted: bool,
    name: &str,
    gradient: &str,
    tensor: &'a Option<TensorRef<'a>>,
) -> Result<Option<&'a TensorRef<'a>>> {
    match tensor {
        _ if !is_wanted => Ok(None),
        Some(tensor) => Ok(Some(tensor)),
        None => Err(Error::argument(
            OP,
            format!("{name} is None, but {gradient} is wanted and needs it"),
        )),
    }
}

impl Call {
    /// Computes the gradients that `out` asks for.
    pub fn run(&self, out: &Gradients) -> Result<()> {
        let h = self.h.map_or(self.adapters.dtype, |h| h.dtype);
        if [self.grad.dtype, h, self.adapters.dtype].contains(&DType::F64) {
            self.run_in::<f64>(out)
        } else {
            self.run_in::<f32>(out)
        }
    }

    fn run_in<T: Real>(&self, out: &Gradients) -> Result<()> {
        let m = self.grad.rows;
        let adapters = &self.adapters;
        let r = adapters.total_r();
        if torch_products::serves(self.grad.dtype, m, adapters, &self.dropout)
            && self.h.is_none_or(|h| h.dtype == self.grad.dtype)
        {
            if let (Some(dx), Some(weight)) = (out.x, self.weight) {
                frozen_backward(OP, self.grad, weight, dx)?;
            }
            let onto = self.weight.is_some();
            return torch_products::backward(OP, self.grad, self.x, self.h, adapters, out, onto);
        }
        let scaled = |mats: &[Mat]| -> Vec<(Mat, f64)> {
            mats.iter()
                .copied()
                .zip(adapters.scaling.iter().copied())
                .collect()
        };

        // dH in the compute type: it is used twice and never leaves this function.
        let needs_dh = out.x.is_some() || out.a.is_some();
        let mut dh = zeros::<T>(OP, if needs_dh { m.saturating_mul(r) } else { 0 })?;
        // SAFETY: `dh` has m x r elements and outlives every use of this view; tasks of the product
        // below write disjoint parts, and it is only read afterwards.
        let dh_mat = unsafe {
            MatMut::from_raw(
                dh.as_mut_ptr(),
                if needs_dh { m } else { 0 },
                r,
                r as isize,
                1,
            )
        };
        if !dh.is_empty() {
            let right = Parts::stacked(Axis::Columns, scaled(&adapters.b));
            gemm::<T>(OP, &Plain::new(self.grad), &right, &Out::one(dh_mat, false))?;
        }
        let dh = *dh_mat.mat();

        if let (Some(db), Some(h)) = (&out.b, self.h) {
            let parts = db.iter().zip(&adapters.scaling).map(|(b, s)| (b.t(), *s));
            gemm::<T>(
                OP,
                &Plain::new(h.t()),
                &Parts::one(self.grad, 1.0),
                &Out::stacked(parts),
            )?;
        }
        let masked = self.dropout.iter().any(Option::is_some);
        if let (Some(da), Some(x)) = (&out.a, self.x) {
            if !masked {
                let parts = da.iter().map(|a| (*a, 1.0));
                gemm::<T>(
                    OP,
                    &Plain::new(dh.t()),
                    &Parts::one(x, 1.0),
                    &Out::stacked(parts),
                )?;
            } else {
                for ((a, columns), dropout) in da.iter().zip(adapters.columns()).zip(&self.dropout)
                {
                    let left = Plain::new(dh.columns(columns.start, columns.len()).t());
                    let right = Parts::one(x, 1.0).with_dropout(*dropout);
                    gemm::<T>(OP, &left, &right, &Out::one(*a, false))?;
                }
            }
        }
        let Some(dx) = out.x else {
            return Ok(());
        };
        if let Some(weight) = self.weight {
            frozen_backward(OP, self.grad, weight, dx)?;
        }
        let mut accumulate = self.weight.is_some();
        if m == 0 {
            return Ok(());
        }
        if !masked {
            let right = Parts::stacked(Axis::Rows, adapters.a.iter().map(|a| (*a, 1.0)));
            return gemm::<T>(OP, &Plain::new(dh), &right, &Out::one(dx, accumulate));
        }
        for ((a, columns), dropout) in adapters.a.iter().zip(adapters.columns()).zip(&self.dropout)
        {
            let left = Plain::new(dh.columns(columns.start, columns.len()));
            let sink = Out::one(dx, accumulate).with_dropout(*dropout);
            gemm::<T>(OP, &left, &Parts::one(*a, 1.0), &sink)?;
            accumulate = true;
        }
        Ok(())
    }
}
