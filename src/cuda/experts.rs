//! `lora_experts` on a device: three kernels, each one launch for all experts.
//!
//! Where one expert's rows end stays on the device: the grids have as many blocks as there can be tiles.

use super::lora::{Kind, Mask, row_stride, scratch_matrix};
use super::params::{self, MAX_ADAPTERS};
use super::tile::*;
use super::{Machine, launch};
use crate::error::{Error, Result};
use crate::ops::lora_experts::{Call, Gradients, OP};
use crate::tensor::{DType, Mat, MatMut, Stack};
use std::ptr::{null, null_mut};

/// Bytes of a row of a padded shared tile.
fn pitch(columns: usize, size: usize) -> usize {
    columns * size + 16
}

/// Shared memory of the three kernels, in the order down, up, factors.
fn shared(kind: Kind) -> [usize; 3] {
    let (x, f) = (
        pitch(EXPERTS_FEATURES, kind.x_size),
        pitch(EXPERTS_FEATURES, kind.size),
    );
    let h = pitch(EXPERTS_RANKS, kind.size);
    [
        EXPERTS_ROWS * x + EXPERTS_RANKS * f,
        EXPERTS_ROWS * h + EXPERTS_RANKS * f,
        EXPERTS_RANKS * (x + h),
    ]
}

/// The kernels' parameters for the factors `stacks`, [E, r_k, n] each, with what belongs to the rows still missing.
fn params(call: &Call, stacks: &[Stack], scaling: Option<&[f64]>) -> Result<params::Experts> {
    if stacks.len() > MAX_ADAPTERS {
        return Err(Error::argument(
            OP,
            format!(
                "{} adapters in one call; at most {MAX_ADAPTERS} on a CUDA device",
                stacks.len()
            ),
        ));
    }
    let experts = stacks.first().map_or(0, |stack| stack.count);
    let mut p = params::Experts {
        f: params::Adapters::default(),
        column: [0; MAX_ADAPTERS],
        expert: [0; MAX_ADAPTERS],
        ends: call.ends.address as *const _,
        ends_stride: call.ends.step,
        ends_bytes: call.ends.dtype.size() as i32,
        experts: experts as i32,
        x: null(),
        rows: call.rows as i64,
        features: stacks.first().map_or(0, |stack| stack.first.cols) as i64,
        x_stride: 0,
        h: null_mut(),
        h_stride: 0,
        src: null(),
        src_stride: 0,
        out: null_mut(),
        out_stride: 0,
        dropout: Mask::none().params(),
    };
    p.f.count = stacks.len() as i32;
    let mut begin = 0;
    for (k, stack) in stacks.iter().enumerate() {
        p.f.ptr[k] = stack.first.data().cast_mut().cast();
        p.f.stride[k] = stack.first.rs as i64;
        p.column[k] = stack.first.cs as i64;
        p.expert[k] = stack.step as i64;
        p.f.scale[k] = scaling.map_or(1.0, |scaling| scaling[k]);
        begin += stack.first.rows;
        p.f.begin[k + 1] = begin as i32;
    }
    Ok(p)
}

/// Blocks that hold all rows, whichever experts they belong to: every expert, and nobody, may leave one tile unfilled.
fn row_tiles(p: &params::Experts) -> usize {
    if p.rows == 0 {
        return 0;
    }
    (p.rows as usize).div_ceil(EXPERTS_ROWS) + p.experts as usize
}

/// H = s drop(X) F^T.
fn down(
    device: &dyn Machine,
    kind: Kind,
    mut p: params::Experts,
    x: Mat,
    mask: Mask,
    h: Mat,
) -> Result<()> {
    (p.x, p.x_stride) = (x.data().cast(), row_stride(OP, &x)?);
    (p.h, p.h_stride) = (h.data().cast_mut().cast(), h.rs as i64);
    p.dropout = mask.params();
    let kernel = kind.whole("lora_experts_down");
    let grid = [row_tiles(&p), h.cols.div_ceil(EXPERTS_RANKS), 1];
    // SAFETY: lora_experts_down takes params::Experts, made of checked tensors; h is [rows, R].
    unsafe {
        launch(
            device,
            OP,
            &kernel,
            grid,
            EXPERTS_THREADS,
            shared(kind)[0],
            &p,
        )
    }
}

/// out = src + mask(H diag(s) F).
fn up(
    device: &dyn Machine,
    kind: Kind,
    mut p: params::Experts,
    h: Mat,
    mask: Mask,
    src: Option<Mat>,
    out: Mat,
) -> Result<()> {
    (p.h, p.h_stride) = (h.data().cast_mut().cast(), h.rs as i64);
    if let Some(src) = src {
        (p.src, p.src_stride) = (src.data().cast(), row_stride(OP, &src)?);
    }
    (p.out, p.out_stride) = (out.data().cast_mut().cast(), row_stride(OP, &out)?);
    p.dropout = mask.params();
    let kernel = kind.whole("lora_experts_up");
    let grid = [row_tiles(&p), out.cols.div_ceil(EXPERTS_FEATURES), 1];
    // SAFETY: lora_experts_up takes params::Experts, made of checked tensors.
    unsafe {
        launch(
            device,
            OP,
            &kernel,
            grid,
            EXPERTS_THREADS,
            shared(kind)[1],
            &p,
        )
    }
}

/// The factors of `p` = s H^T drop(X), expert by expert.
fn factors(
    device: &dyn Machine,
    kind: Kind,
    mut p: params::Experts,
    h: Mat,
    x: Mat,
    mask: Mask,
) -> Result<()> {
    (p.x, p.x_stride) = (x.data().cast(), row_stride(OP, &x)?);
    (p.h, p.h_stride) = (h.data().cast_mut().cast(), row_stride(OP, &h)?);
    p.dropout = mask.params();
    let kernel = kind.whole("lora_experts_factors");
    let grid = [
        x.cols.div_ceil(EXPERTS_FEATURES),
        h.cols.div_ceil(EXPERTS_RANKS),
        p.experts as usize,
    ];
    // SAFETY: lora_experts_factors takes params::Experts, made of checked tensors; the factors are the call's own.
    unsafe {
        launch(
            device,
            OP,
            &kernel,
            grid,
            EXPERTS_THREADS,
            shared(kind)[2],
            &p,
        )
    }
}

pub fn lora_experts(
    device: &dyn Machine,
    call: &Call,
    mask: Mask,
    y: MatMut,
    h: MatMut,
) -> Result<()> {
    let (base, x) = (call.given(call.base, "base")?, call.given(call.x, "x")?);
    let kind = Kind::of(OP, x.dtype, call.adapters.dtype)?;
    let scaling = Some(call.adapters.scaling.as_slice());
    let (a, b) = (
        params(call, &call.a, None)?,
        params(call, &call.b, scaling)?,
    );
    down(device, kind, a, x, mask, *h.mat())?;
    up(
        device,
        kind,
        b,
        *h.mat(),
        Mask::none(),
        Some(base),
        *y.mat(),
    )
}

pub fn lora_experts_backward(
    device: &dyn Machine,
    call: &Call,
    mask: Mask,
    out: &Gradients,
) -> Result<()> {
    let grad = call.given(call.grad, "grad")?;
    let kind = Kind::of(OP, grad.dtype, call.adapters.dtype)?;
    let scaling = Some(call.adapters.scaling.as_slice());
    let r = call.adapters.total_r();
    if let (Some(db), Some(h)) = (&out.b, call.h) {
        if h.dtype != call.adapters.dtype {
            return Err(Error::argument(
                OP,
                format!(
                    "h is {} but the adapters are {}; on a CUDA device h is what the forward pass returned",
                    h.dtype, call.adapters.dtype
                ),
            ));
        }
        let db: Vec<Stack> = db.iter().map(|b| *b.t().stack()).collect();
        factors(
            device,
            kind,
            params(call, &db, scaling)?,
            h,
            grad,
            Mask::none(),
        )?;
    }
    if out.x.is_none() && out.a.is_none() {
        return Ok(());
    }
    let data = device.scratch(OP, call.rows * r * kind.size)?;
    let dh = scratch_matrix(data, call.adapters.dtype, call.rows, r);
    down(
        device,
        kind,
        params(call, &call.b, scaling)?,
        grad,
        Mask::none(),
        dh,
    )?;
    if let (Some(da), Some(x)) = (&out.a, call.x) {
        let da: Vec<Stack> = da.iter().map(|a| *a.stack()).collect();
        factors(device, kind, params(call, &da, None)?, dh, x, mask)?;
    }
    if let Some(dx) = &out.x {
        up(
            device,
            kind,
            params(call, &call.a, None)?,
            dh,
            mask,
            None,
            *dx.mat(),
        )?;
    }
    Ok(())
}

pub(super) fn kernel_names() -> Vec<String> {
    let mut names = Vec::new();
    for (x, adapter) in [
        (DType::BF16, DType::BF16),
        (DType::F16, DType::F16),
        (DType::BF16, DType::F32),
        (DType::F16, DType::F32),
        (DType::F32, DType::F32),
        (DType::F64, DType::F64),
    ] {
        if let Ok(kind) = Kind::of("names", x, adapter) {
            names.extend(
                ["down", "up", "factors"].map(|stem| kind.whole(&format!("lora_experts_{stem}"))),
            );
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every instance must fit the 99 KB a block that the smaller devices of compute capability 8 offer.
    #[test]
    fn shared_memory_fits_every_device() {
        for (x, adapter) in [
            (DType::BF16, DType::BF16),
            (DType::BF16, DType::F32),
            (DType::F64, DType::F64),
        ] {
            let kind = Kind::of("test", x, adapter).unwrap();
            let most = shared(kind).into_iter().max().unwrap();
            assert!(most + 1024 <= 99 * 1024, "{most}");
        }
    }
}
