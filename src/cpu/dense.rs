//! The dense product: torch's own where torch can be had, else this crate's.

use super::gemm::{Out, Parts, Plain, gemm};
use crate::error::Result;
use crate::tensor::{DType, DenseProduct};

/// Torch's product inside Python (oneDNN or MKL), but not in the child of a fork, whose copy of torch's threads is dead.
pub fn dense_product(op: &'static str, product: &DenseProduct) -> Result<()> {
    #[cfg(feature = "extension")]
    if !crate::torch::forked() {
        return crate::torch::dense_product(op, crate::tensor::Device::Cpu, product);
    }
    own(op, product)
}

fn own(op: &'static str, product: &DenseProduct) -> Result<()> {
    let DenseProduct {
        out,
        beta,
        alpha,
        a,
        b,
    } = *product;
    let left = Plain::new(a);
    let sink = Out::one(out, beta != 0.0);
    let right = Parts::one(b, alpha);
    if out.mat().dtype == DType::F64 {
        gemm::<f64>(op, &left, &right, &sink)
    } else {
        gemm::<f32>(op, &left, &right, &sink)
    }
}
