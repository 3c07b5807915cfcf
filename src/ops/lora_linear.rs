//! `lora_linear` and `lora_delta`: a frozen layer's output plus K adapters, in one call.
//!
//! Y = X W^T + b + sum over k of s_k B_k A_k drop_k(X), or the same sum added to a given base output.
//! The base product is torch's own; the adapters' products read X once and add onto Y in place.

use super::arguments::{
    Adapters, check_adapters, check_dropout, check_in_features, check_out_features, matrix, rows,
    same_device, same_dtype,
};
use super::frozen::{copy_rows, frozen_forward};
use super::lora_expand::expand;
use super::lora_shrink::shrink;
use crate::cpu::num::Real;
use crate::error::{Error, Result};
use crate::philox::Dropout;
use crate::tensor::{DType, Mat, MatMut, TensorRef, require_float, shape};

pub const LINEAR: &str = "lora_linear";
pub const DELTA: &str = "lora_delta";

/// Where the frozen layer's part of the output comes from.
pub enum Base {
    /// Compute it: W [O, I] and an optional bias, as a row [1, O].
    Weight(Mat, Option<Mat>),
    /// It is given, [M, O].
    Output(Mat),
}

/// A checked call.
pub struct Call {
    op: &'static str,
    pub x: Mat,
    pub base: Base,
    pub adapters: Adapters,
    pub dropout: Vec<Option<Dropout>>,
    pub h_dtype: DType,
    pub out_features: usize,
}

/// Arguments of both operations: exactly one of `base` and `weight` is given.
pub struct Args<'a> {
    pub base: Option<TensorRef<'a>>,
    pub x: TensorRef<'a>,
    pub weight: Option<TensorRef<'a>>,
    pub bias: Option<TensorRef<'a>>,
    pub a: &'a [TensorRef<'a>],
    pub b: &'a [TensorRef<'a>],
    pub scaling: &'a [f64],
    pub dropout_p: f64,
    pub rng: Option<TensorRef<'a>>,
}

pub fn check(args: &Args<'_>) -> Result<Call> {
    let op = if args.weight.is_some() { LINEAR } else { DELTA };
    let x = &args.x;
    require_float(op, "x", x)?;
    let x_mat = rows(op, "x", x)?;
    let adapters = check_adapters(op, ("x", x), Some(args.a), Some(args.b), Some(args.scaling))?;
    check_in_features(op, "x", x.sizes(), x_mat.cols, &adapters)?;
    let (base, out_features) = match (&args.weight, &args.base) {
        (Some(weight), None) => {
            same_device(op, "weight", weight, x.device(), "x")?;
            same_dtype(op, "weight", weight, x.dtype(), "x")?;
            let w = matrix(op, "weight", weight, "[out_features, in_features]")?;
            if w.cols != x_mat.cols {
                return Err(Error::argument(
                    op,
                    format!(
                        "x is {} but weight is {}: x's last size must be weight's in_features",
                        shape(x.sizes()),
                        shape(weight.sizes())
                    ),
                ));
            }
            check_out_features(
                op,
                "weight.T",
                &[w.cols as i64, w.rows as i64],
                w.rows,
                &adapters,
            )?;
            let bias = match &args.bias {
                None => None,
                Some(bias) => {
                    same_device(op, "bias", bias, x.device(), "x")?;
                    same_dtype(op, "bias", bias, x.dtype(), "x")?;
                    if bias.sizes() != [w.rows as i64] {
                        return Err(Error::argument(
                            op,
                            format!("bias is {}; it must be [{}]", shape(bias.sizes()), w.rows),
                        ));
                    }
                    bias.rows()
                }
            };
            (Base::Weight(w, bias), w.rows)
        }
        (None, Some(base)) => {
            same_device(op, "base", base, x.device(), "x")?;
            same_dtype(op, "base", base, x.dtype(), "x")?;
            let mat = rows(op, "base", base)?;
            let lead = x.sizes().len() - 1;
            if base.sizes().len() != x.sizes().len() || base.sizes()[..lead] != x.sizes()[..lead] {
                return Err(Error::argument(
                    op,
                    format!(
                        "base is {} but x is {}: their leading sizes must be the same",
                        shape(base.sizes()),
                        shape(x.sizes())
                    ),
                ));
            }
            check_out_features(op, "base", base.sizes(), mat.cols, &adapters)?;
            (Base::Output(mat), mat.cols)
        }
        _ => {
            return Err(Error::Internal {
                op,
                what: "exactly one of base and weight is expected".into(),
            });
        }
    };
    let dropout = check_dropout(
        op,
        args.dropout_p,
        args.rng.as_ref(),
        x.device(),
        args.a.len(),
    )?;
    Ok(Call {
        op,
        x: x_mat,
        base,
        h_dtype: x.dtype().promote(adapters.dtype),
        adapters,
        dropout,
        out_features,
    })
}

impl Call {
    /// Computes the output into `y` [M, O] and the adapters' inner products into `h` [M, R].
    pub fn run(&self, y: MatMut, h: MatMut) -> Result<()> {
        if self.h_dtype == DType::F64 {
            self.run_in::<f64>(y, h)
        } else {
            self.run_in::<f32>(y, h)
        }
    }

    fn run_in<T: Real>(&self, y: MatMut, h: MatMut) -> Result<()> {
        match &self.base {
            Base::Weight(weight, bias) => frozen_forward(self.op, self.x, *weight, *bias, y)?,
            Base::Output(base) => copy_rows(self.op, y, |row| base.at_row(row))?,
        }
        shrink::<T>(self.op, self.x, &self.adapters, &self.dropout, h)?;
        expand::<T>(self.op, *h.mat(), &self.adapters, y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::num::Stored;
    use crate::ops::testing::{Owned, noise};

    /// The formula, in float64, on the stored values.
    fn expected(
        x: &[f64],
        w: &[f64],
        bias: &[f64],
        a: &[f64],
        b: &[f64],
        s: f64,
        sizes: [usize; 4],
    ) -> Vec<f64> {
        let [m, i, o, r] = sizes;
        let mut y = vec![0.0; m * o];
        for t in 0..m {
            for p in 0..o {
                let mut sum = bias[p];
                for q in 0..i {
                    sum += x[t * i + q] * w[p * i + q];
                    for k in 0..r {
                        sum += s * b[p * r + k] * a[k * i + q] * x[t * i + q];
                    }
                }
                y[t * o + p] = sum;
            }
        }
        y
    }

    fn wide<E: Stored>(t: &Owned<E>) -> Vec<f64> {
        t.data.iter().map(|v| v.widen()).collect()
    }

    fn matches<E: Stored>(tolerance: f64) {
        for (m, i, o, r) in [
            (1, 1, 1, 1),
            (5, 7, 9, 3),
            (129, 64, 127, 8),
            (0, 4, 4, 2),
            (20, 33, 65, 1),
        ] {
            let x = Owned::<E>::new(&[m, i], noise(1));
            let w = Owned::<E>::new(&[o, i], noise(2));
            let bias = Owned::<E>::new(&[o], noise(3));
            let a = Owned::<E>::new(&[r, i], noise(4));
            let b = Owned::<E>::new(&[o, r], noise(5));
            let (mut y, mut h) = (
                Owned::<E>::new(&[m, o], |_| f64::NAN),
                Owned::<E>::new(&[m, r], |_| f64::NAN),
            );
            let call = check(&Args {
                base: None,
                x: x.view(),
                weight: Some(w.view()),
                bias: Some(bias.view()),
                a: &[a.view()],
                b: &[b.view()],
                scaling: &[2.0],
                dropout_p: 0.0,
                rng: None,
            })
            .unwrap();
            call.run(y.view_mut().rows().unwrap(), h.view_mut().rows().unwrap())
                .unwrap();
            let want = expected(
                &wide(&x),
                &wide(&w),
                &wide(&bias),
                &wide(&a),
                &wide(&b),
                2.0,
                [m, i, o, r],
            );
            let norm = want.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-30);
            let error = wide(&y)
                .iter()
                .zip(&want)
                .map(|(a, b)| (a - b).powi(2))
                .sum::<f64>()
                .sqrt();
            assert!(
                error <= tolerance * norm,
                "{m} {i} {o} {r}: {}",
                error / norm
            );
        }
    }

    #[test]
    fn equals_the_formula_in_every_dtype() {
        matches::<f32>(1e-6);
        matches::<f64>(1e-14);
        matches::<half::bf16>(8e-3);
        matches::<half::f16>(2e-3);
    }

    #[test]
    fn a_wrong_argument_is_named_with_its_value() {
        let x = Owned::<f32>::new(&[5, 6], noise(1));
        let a = Owned::<f32>::new(&[3, 7], noise(2));
        let b = Owned::<f32>::new(&[4, 3], noise(3));
        let w = Owned::<f32>::new(&[4, 6], noise(4));
        let mut args = Args {
            base: None,
            x: x.view(),
            weight: Some(w.view()),
            bias: None,
            a: &[a.view()],
            b: &[b.view()],
            scaling: &[1.0],
            dropout_p: 0.0,
            rng: None,
        };
        let text = |args: &Args<'_>| check(args).err().unwrap().to_string();
        assert!(text(&args).starts_with("lora_linear: x is [5, 6] but A[0] is [3, 7]"));
        let good = Owned::<f32>::new(&[3, 6], noise(2));
        let list = [good.view()];
        args.a = &list;
        assert!(check(&args).is_ok());
        args.scaling = &[1.0, 2.0];
        assert!(text(&args).contains("scaling has 2 factors but A has 1"));
        args.scaling = &[f64::NAN];
        assert!(text(&args).contains("scaling[0] is NaN"));
        args.scaling = &[1.0];
        args.dropout_p = 1.0;
        assert!(text(&args).contains("dropout_p is 1"));
        args.dropout_p = 0.5;
        assert!(text(&args).contains("rng is None"));
        args.dropout_p = 0.0;
        args.a = &[];
        assert!(text(&args).contains("A is an empty list"));
    }
}
