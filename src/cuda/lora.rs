//! The low-rank products on a device: shrink, expand, and the two passes of the backward.
//!
//! `lora_linear` writes the adapters' part (and the bias) first, and torch's product then accumulates the frozen layer
//! onto it: the dense product stays the vendor's, and Y is written by us once and read by nobody but its epilogue.

use super::params::{self, Adapters, MAX_ADAPTERS};
use super::tile::*;
use super::{Machine, launch, name};
use crate::error::{Error, Result};
use crate::ops::arguments::Gradients;
use crate::ops::lora_backward;
use crate::ops::lora_linear::{self, Base};
use crate::ops::{lora_expand, lora_shrink};
use crate::philox::threshold;
use crate::tensor::{DType, DenseProduct, Mat, MatMut};
use std::ffi::c_void;
use std::ptr::{null, null_mut};

/// The dropout of a call on a device: (seed, offset) stay there.
#[derive(Clone, Copy)]
pub struct Mask {
    threshold: u32,
    rng: *const c_void,
}

impl Mask {
    /// `rng` is the address of two int64, unused where p drops nothing.
    pub fn new(p: f64, rng: *const u8) -> Self {
        Mask {
            threshold: if rng.is_null() { 0 } else { threshold(p) },
            rng: rng.cast(),
        }
    }

    pub(super) fn none() -> Self {
        Mask::new(0.0, null())
    }

    pub(super) fn params(self) -> params::Dropout {
        params::Dropout {
            rng: self.rng,
            factor: self.factor(),
            threshold: self.threshold,
        }
    }

    fn factor(self) -> f64 {
        65536.0 / (65536.0 - f64::from(self.threshold))
    }
}

/// The dtypes of a call and what follows from them.
#[derive(Clone, Copy)]
pub(super) struct Kind {
    x: &'static str,
    adapter: &'static str,
    pub(super) x_size: usize,
    pub(super) size: usize,
    /// Bytes of a sum: fp64 for fp64, else fp32.
    acc: usize,
}

impl Kind {
    pub(super) fn of(op: &'static str, x: DType, adapter: DType) -> Result<Self> {
        let known = x == adapter || (adapter == DType::F32 && x != DType::F64);
        if !known {
            return Err(Error::argument(
                op,
                format!(
                    "on a CUDA device {adapter} adapters under {x} are not supported; use adapters of {x} or float32"
                ),
            ));
        }
        Ok(Kind {
            x: name(op, x)?,
            adapter: name(op, adapter)?,
            x_size: x.size(),
            size: adapter.size(),
            acc: if adapter == DType::F64 { 8 } else { 4 },
        })
    }

    /// Columns of R a block: the narrowest instance that holds them all, or the widest.
    fn tile(self, total: usize) -> usize {
        match self.size {
            8 => 16,
            _ if total <= 16 => 16,
            2 if total > 32 => 64,
            _ => 32,
        }
    }

    /// The name of a kernel that has one instance a pair of dtypes.
    pub(super) fn whole(self, stem: &str) -> String {
        format!("tsugi_{stem}_{}_{}", self.x, self.adapter)
    }

    fn instance(self, stem: &str, tile: usize) -> String {
        format!("tsugi_{stem}_{}_{}_r{tile}", self.x, self.adapter)
    }
}

/// Bytes of a row of a padded shared tile.
fn pitch(columns: usize, size: usize) -> usize {
    columns * size + 16
}

fn by_size(size: usize, of_16: usize, of_32: usize, of_64: usize) -> usize {
    match size {
        2 => of_16,
        4 => of_32,
        _ => of_64,
    }
}

fn shrink_shared(kind: Kind, tile: usize) -> usize {
    let columns = if kind.x_size == 2 { 64 } else { 32 };
    let stages = by_size(
        kind.size,
        SHRINK_STAGES_16,
        SHRINK_STAGES_32,
        SHRINK_STAGES_64,
    );
    stages * columns * (SHRINK_ROWS * kind.x_size + tile * kind.size)
}

fn expand_shared(kind: Kind, inner: usize, transposed: bool) -> usize {
    let weight = if transposed {
        inner * pitch(EXPAND_COLUMNS, kind.size)
    } else {
        EXPAND_COLUMNS * pitch(inner, kind.size)
    };
    EXPAND_ROWS * pitch(inner, kind.size) + weight
}

fn dy_columns(kind: Kind, tile: usize) -> usize {
    let wide = if kind.size == 2 && tile == 64 {
        DYPASS_WIDE_32
    } else {
        by_size(kind.size, DYPASS_WIDE_16, DYPASS_WIDE_32, DYPASS_WIDE_64)
    };
    DYPASS_THREADS / 32 * wide
}

fn dy_shared(kind: Kind, tile: usize) -> usize {
    let row = pitch(dy_columns(kind, tile), kind.x_size) + pitch(tile, kind.size);
    DYPASS_ROWS * (DYPASS_STAGES * row + DYPASS_THREADS / 32 * tile * kind.acc)
}

fn x_shared(kind: Kind, tile: usize) -> usize {
    let row = pitch(XPASS_COLUMNS, kind.x_size) + pitch(tile, kind.size);
    XPASS_STAGES * by_size(kind.size, XPASS_ROWS_16, XPASS_ROWS_32, XPASS_ROWS_32) * row
}

/// In how many pieces to cut `work` pieces of the summed dimension so that `blocks` of them fill the device `waves` times.
fn splits(machine: &dyn Machine, waves: usize, blocks: usize, work: usize) -> usize {
    (waves * machine.processors())
        .div_ceil(blocks.max(1))
        .clamp(1, work.clamp(1, 64))
}

/// A matrix whose rows are contiguous, as every kernel reads them.
pub(super) fn row_stride(op: &'static str, mat: &Mat) -> Result<i64> {
    if mat.cs == 1 || mat.cols <= 1 || mat.rows == 0 {
        return Ok(mat.rs as i64);
    }
    Err(Error::Internal {
        op,
        what: format!("a matrix with column stride {} reached the device", mat.cs),
    })
}

/// Adapters side by side: their matrices, columns of R and scales.
fn table(
    op: &'static str,
    mats: impl ExactSizeIterator<Item = Mat>,
    rs: &[usize],
    scale: impl Fn(usize) -> f64,
) -> Result<Adapters> {
    if rs.len() > MAX_ADAPTERS {
        return Err(Error::argument(
            op,
            format!(
                "{} adapters in one call; at most {MAX_ADAPTERS} on a CUDA device",
                rs.len()
            ),
        ));
    }
    let mut out = Adapters {
        count: rs.len() as i32,
        ..Adapters::default()
    };
    let mut begin = 0;
    for (k, (mat, &r)) in mats.zip(rs).enumerate() {
        out.ptr[k] = mat.data().cast_mut().cast();
        out.stride[k] = row_stride(op, &mat)?;
        out.scale[k] = scale(k);
        begin += r;
        out.begin[k + 1] = begin as i32;
    }
    Ok(out)
}

/// H or dH as the destination of a reduction: adapter k has the columns that are its own.
fn columns_of(
    op: &'static str,
    h: Mat,
    rs: &[usize],
    scale: impl Fn(usize) -> f64,
) -> Result<Adapters> {
    let mut begin = 0;
    let mats: Vec<Mat> = rs
        .iter()
        .map(|&r| {
            begin += r;
            h.columns(begin - r, r)
        })
        .collect();
    let mut out = table(op, mats.into_iter(), rs, scale)?;
    // One column of H is still a row stride away from the next row.
    out.stride[..rs.len()].fill(h.rs as i64);
    Ok(out)
}

const NO_JOB: params::ReduceJob = params::ReduceJob {
    partial: null(),
    rows: 0,
    columns: 0,
    factor: 1.0,
    splits: 0,
    adapters_along_rows: 0,
};

fn reduce(
    machine: &dyn Machine,
    op: &'static str,
    kind: Kind,
    jobs: &[(params::ReduceJob, Adapters)],
) -> Result<()> {
    let mut p = params::Reduce {
        job: [NO_JOB; 2],
        out: [Adapters::default(); 2],
    };
    for (i, (job, out)) in jobs.iter().enumerate() {
        p.job[i] = *job;
        p.out[i] = *out;
    }
    let size = jobs.iter().map(|(j, _)| j.rows * j.columns).max();
    let blocks = (size.unwrap_or(0) as usize).div_ceil(REDUCE_THREADS);
    let kernel = format!("tsugi_lora_reduce_{}", kind.adapter);
    let grid = [blocks.min(machine.processors() * 32), jobs.len(), 1];
    // SAFETY: lora_reduce takes params::Reduce; every destination was checked against its job's shape.
    unsafe { launch(machine, op, &kernel, grid, REDUCE_THREADS, 0, &p) }
}

/// H = drop(X) A^T.
fn shrink(
    machine: &dyn Machine,
    op: &'static str,
    x: Mat,
    a: &[Mat],
    mask: Mask,
    h: MatMut,
) -> Result<()> {
    let h = *h.mat();
    let kind = Kind::of(op, x.dtype, h.dtype)?;
    let rs: Vec<usize> = a.iter().map(|a| a.rows).collect();
    if x.rows == 0 || h.cols == 0 {
        return Ok(());
    }
    let tile = kind.tile(h.cols);
    let (row_tiles, r_tiles) = (x.rows.div_ceil(SHRINK_ROWS), h.cols.div_ceil(tile));
    let chunks = x.cols.div_ceil(if kind.x_size == 2 { 64 } else { 32 });
    // At least eight chunks a split: below, filling the pipeline costs more than it hides.
    let splits = splits(machine, 2, row_tiles * r_tiles, chunks / 8);
    let partial = if splits == 1 {
        null_mut()
    } else {
        machine.scratch(op, splits * x.rows * h.cols * kind.acc)?
    };
    let p = params::Shrink {
        x: x.data().cast(),
        rows: x.rows as i64,
        inner: x.cols as i64,
        x_stride: row_stride(op, &x)?,
        h: h.data().cast_mut().cast(),
        h_stride: h.rs as i64,
        partial,
        splits: splits as i32,
        a: table(op, a.iter().copied(), &rs, |_| 1.0)?,
        dropout: mask.params(),
    };
    let (kernel, shared) = (
        kind.instance("lora_shrink", tile),
        shrink_shared(kind, tile),
    );
    let grid = [row_tiles, r_tiles, splits];
    // SAFETY: lora_shrink takes params::Shrink, made of checked matrices and scratch of the size it writes.
    unsafe { launch(machine, op, &kernel, grid, SHRINK_THREADS, shared, &p)? };
    if splits == 1 {
        return Ok(());
    }
    let job = params::ReduceJob {
        partial,
        rows: x.rows as i64,
        columns: h.cols as i64,
        factor: mask.factor(),
        splits: splits as i32,
        adapters_along_rows: 0,
    };
    reduce(
        machine,
        op,
        kind,
        &[(job, columns_of(op, h, &rs, |_| 1.0)?)],
    )
}

/// out = src + bias + H diag(s) B^T, or with a mask out = src + mask(H A).
struct Expand<'a> {
    h: Mat,
    weights: &'a [Mat],
    scaling: Option<&'a [f64]>,
    mask: Option<Mask>,
    src: Option<Mat>,
    bias: Option<Mat>,
    out: MatMut,
}

impl<'a> Expand<'a> {
    /// Without what may be absent.
    fn new(h: Mat, weights: &'a [Mat], out: MatMut) -> Self {
        Expand {
            h,
            weights,
            scaling: None,
            mask: None,
            src: None,
            bias: None,
            out,
        }
    }
}

fn expand(machine: &dyn Machine, op: &'static str, call: &Expand<'_>) -> Result<()> {
    let Expand {
        h,
        weights,
        scaling,
        mask,
        src,
        bias,
        out,
    } = *call;
    let out = *out.mat();
    let transposed = mask.is_some();
    let kind = Kind::of(op, out.dtype, weights.first().map_or(h.dtype, |w| w.dtype))?;
    if h.dtype != weights.first().map_or(h.dtype, |w| w.dtype) {
        return Err(Error::argument(
            op,
            format!(
                "h is {} but the adapters are {}; on a CUDA device they must have one dtype",
                h.dtype, weights[0].dtype
            ),
        ));
    }
    let rs: Vec<usize> = weights
        .iter()
        .map(|w| if transposed { w.rows } else { w.cols })
        .collect();
    let inner_most = if kind.size == 8 {
        EXPAND_INNER_64
    } else {
        EXPAND_INNER
    };
    let inner = h.cols.next_multiple_of(16).min(inner_most);
    let p = params::Expand {
        h: h.data().cast(),
        rows: out.rows as i64,
        columns: out.cols as i64,
        h_stride: row_stride(op, &h)?,
        src: src.map_or(null(), |m| m.data().cast()),
        src_stride: src.map_or(Ok(0), |m| row_stride(op, &m))?,
        bias: bias.map_or(null(), |m| m.data().cast()),
        out: out.data().cast_mut().cast(),
        out_stride: row_stride(op, &out)?,
        w: table(op, weights.iter().copied(), &rs, |k| {
            scaling.and_then(|s| s.get(k)).copied().unwrap_or(1.0)
        })?,
        dropout: mask.unwrap_or(Mask::none()).params(),
    };
    let stem = if transposed { "lora_dx" } else { "lora_expand" };
    let kernel = kind.whole(stem);
    let blocks = out.rows.div_ceil(EXPAND_ROWS) * out.cols.div_ceil(EXPAND_COLUMNS);
    let shared = expand_shared(kind, inner, transposed);
    // SAFETY: lora_expand and lora_dx take params::Expand, made of checked matrices.
    unsafe {
        launch(
            machine,
            op,
            &kernel,
            [blocks, 1, 1],
            EXPAND_THREADS,
            shared,
            &p,
        )
    }
}

/// `lora_linear` and `lora_delta`.
pub fn lora_apply(
    machine: &dyn Machine,
    op: &'static str,
    call: &lora_linear::Call,
    mask: Mask,
    y: MatMut,
    h: MatMut,
) -> Result<()> {
    let (adapters, x) = (&call.adapters, call.x);
    shrink(machine, op, x, &adapters.a, mask, h)?;
    let (src, bias) = match &call.base {
        Base::Weight(_, bias) => (None, *bias),
        Base::Output(base) => (Some(*base), None),
    };
    let added = Expand {
        scaling: Some(&adapters.scaling),
        src,
        bias,
        ..Expand::new(*h.mat(), &adapters.b, y)
    };
    expand(machine, op, &added)?;
    if let Base::Weight(weight, _) = &call.base
        && x.cols > 0
        && y.mat().rows * y.mat().cols > 0
    {
        machine.dense_product(op, &DenseProduct::new(y, x, weight.t()).onto(true))?;
    }
    Ok(())
}

pub fn lora_shrink(
    machine: &dyn Machine,
    call: &lora_shrink::Call,
    mask: Mask,
    h: MatMut,
) -> Result<()> {
    shrink(machine, lora_shrink::OP, call.x, &call.adapters.a, mask, h)
}

/// Y += H diag(s) B^T.
pub fn lora_expand(machine: &dyn Machine, call: &lora_expand::Call, y: MatMut) -> Result<()> {
    let onto = Expand {
        scaling: Some(&call.adapters.scaling),
        src: Some(*y.mat()),
        ..Expand::new(call.h, &call.adapters.b, y)
    };
    expand(machine, lora_expand::OP, &onto)
}

pub fn lora_backward(
    machine: &dyn Machine,
    call: &lora_backward::Call,
    mask: Mask,
    out: &Gradients,
) -> Result<()> {
    let op = lora_backward::OP;
    let (dy, adapters) = (call.grad, &call.adapters);
    let kind = Kind::of(op, dy.dtype, adapters.dtype)?;
    if let Some(h) = call.h
        && h.dtype != adapters.dtype
    {
        return Err(Error::argument(
            op,
            format!(
                "h is {} but the adapters are {}; on a CUDA device h is what the forward pass returned",
                h.dtype, adapters.dtype
            ),
        ));
    }
    let rs: Vec<usize> = adapters.a.iter().map(|a| a.rows).collect();
    let r = adapters.total_r();
    let (need_dh, need_db) = (out.x.is_some() || out.a.is_some(), out.b.is_some());
    let dh_data = if need_dh {
        machine.scratch(op, dy.rows * r * kind.size)?
    } else {
        null_mut()
    };
    let dh = scratch_matrix(dh_data, adapters.dtype, dy.rows, r);
    if (need_dh || need_db) && r > 0 {
        dy_pass(
            machine,
            kind,
            call,
            &rs,
            need_dh.then_some(dh),
            out.b.as_deref(),
        )?;
    }
    if let (Some(da), Some(x)) = (&out.a, call.x)
        && r > 0
    {
        x_pass(machine, kind, x, dh, mask, &rs, da)?;
    }
    if let Some(dx) = out.x {
        let adapters_part = Expand {
            mask: Some(mask),
            ..Expand::new(dh, &adapters.a, dx)
        };
        expand(machine, op, &adapters_part)?;
        if let Some(weight) = call.weight
            && dy.cols > 0
            && dx.mat().rows * dx.mat().cols > 0
        {
            machine.dense_product(op, &DenseProduct::new(dx, dy, weight).onto(true))?;
        }
    }
    Ok(())
}

pub(super) fn scratch_matrix(data: *mut c_void, dtype: DType, rows: usize, cols: usize) -> Mat {
    let (rs, cs) = (cols as isize, 1);
    // SAFETY: the scratch memory has rows x cols elements of the dtype (the caller asked for as many), or the view
    // is not used.
    unsafe {
        match dtype {
            DType::F64 => Mat::from_raw(data.cast::<f64>(), rows, cols, rs, cs),
            DType::BF16 => Mat::from_raw(data.cast::<half::bf16>(), rows, cols, rs, cs),
            DType::F16 => Mat::from_raw(data.cast::<half::f16>(), rows, cols, rs, cs),
            _ => Mat::from_raw(data.cast::<f32>(), rows, cols, rs, cs),
        }
    }
}

/// dH = dY diag(s) B into `dh` and dB = s dY^T H into `db`.
fn dy_pass(
    machine: &dyn Machine,
    kind: Kind,
    call: &lora_backward::Call,
    rs: &[usize],
    dh: Option<Mat>,
    db: Option<&[MatMut]>,
) -> Result<()> {
    let (op, dy, adapters) = (lora_backward::OP, call.grad, &call.adapters);
    let r: usize = rs.iter().sum();
    let tile = kind.tile(r);
    let (column_blocks, r_tiles) = (dy.cols.div_ceil(dy_columns(kind, tile)), r.div_ceil(tile));
    // At least 128 rows a split, so that the partial dB stays small beside dY.
    let splits = splits(machine, 1, column_blocks * r_tiles, dy.rows / 128);
    let rows_per_split = dy.rows.div_ceil(splits).next_multiple_of(DYPASS_ROWS);
    let splits = dy.rows.div_ceil(rows_per_split.max(1));
    // Null for what is not wanted: the kernel then neither computes nor writes it.
    let scratch_if = |is_wanted: bool, elements: usize| match is_wanted {
        true => machine.scratch(op, elements * kind.acc),
        false => Ok(null_mut()),
    };
    let dh_partial = scratch_if(dh.is_some(), column_blocks * dy.rows * r)?;
    let db_partial = scratch_if(db.is_some(), splits * dy.cols * r)?;
    let h = call.h.filter(|_| db.is_some());
    let scale = |k: usize| adapters.scaling[k];
    let p = params::DyPass {
        dy: dy.data().cast(),
        rows: dy.rows as i64,
        columns: dy.cols as i64,
        dy_stride: row_stride(op, &dy)?,
        h: h.map_or(null(), |h| h.data().cast()),
        h_stride: h.map_or(Ok(0), |h| row_stride(op, &h))?,
        dh_partial,
        db_partial,
        rows_per_split: rows_per_split as i64,
        b: table(op, adapters.b.iter().copied(), rs, scale)?,
    };
    let (kernel, shared) = (kind.instance("lora_dy_pass", tile), dy_shared(kind, tile));
    let grid = [column_blocks, r_tiles, splits];
    // SAFETY: lora_dy_pass takes params::DyPass, made of checked matrices and scratch of the sizes it writes.
    unsafe { launch(machine, op, &kernel, grid, DYPASS_THREADS, shared, &p)? };
    let mut jobs = Vec::with_capacity(2);
    // No column block or no split leaves a sum of nothing: the reduction then writes zeros.
    if let Some(dh) = dh {
        let job = params::ReduceJob {
            partial: dh_partial,
            rows: dy.rows as i64,
            columns: r as i64,
            factor: 1.0,
            splits: column_blocks as i32,
            adapters_along_rows: 0,
        };
        jobs.push((job, columns_of(op, dh, rs, scale)?));
    }
    if let Some(db) = db {
        let job = params::ReduceJob {
            partial: db_partial,
            rows: dy.cols as i64,
            columns: r as i64,
            factor: 1.0,
            splits: splits as i32,
            adapters_along_rows: 0,
        };
        jobs.push((job, table(op, db.iter().map(|m| *m.mat()), rs, scale)?));
    }
    reduce(machine, op, kind, &jobs)
}

/// dA = dH^T drop(X).
fn x_pass(
    machine: &dyn Machine,
    kind: Kind,
    x: Mat,
    dh: Mat,
    mask: Mask,
    rs: &[usize],
    da: &[MatMut],
) -> Result<()> {
    let op = lora_backward::OP;
    let tile = kind.tile(dh.cols);
    let (column_blocks, r_tiles) = (x.cols.div_ceil(XPASS_COLUMNS), dh.cols.div_ceil(tile));
    let splits = splits(machine, 2, column_blocks * r_tiles, x.rows / 128);
    let rows_per_split = x.rows.div_ceil(splits).next_multiple_of(XPASS_ROWS_16);
    let splits = x.rows.div_ceil(rows_per_split.max(1));
    let partial = machine.scratch(op, splits * dh.cols * x.cols * kind.acc)?;
    let out = table(op, da.iter().map(|m| *m.mat()), rs, |_| 1.0)?;
    let p = params::XPass {
        x: x.data().cast(),
        rows: x.rows as i64,
        columns: x.cols as i64,
        x_stride: row_stride(op, &x)?,
        dh: dh.data().cast(),
        dh_stride: dh.rs as i64,
        partial,
        rows_per_split: rows_per_split as i64,
        a: out,
        dropout: mask.params(),
    };
    let (kernel, shared) = (kind.instance("lora_x_pass", tile), x_shared(kind, tile));
    let grid = [column_blocks, r_tiles, splits];
    // SAFETY: lora_x_pass takes params::XPass, made of checked matrices and scratch of the size it writes.
    unsafe { launch(machine, op, &kernel, grid, XPASS_THREADS, shared, &p)? };
    let job = params::ReduceJob {
        partial,
        rows: dh.cols as i64,
        columns: x.cols as i64,
        factor: mask.factor(),
        splits: splits as i32,
        adapters_along_rows: 1,
    };
    reduce(machine, op, kind, &[(job, out)])
}

/// The dtypes of activations and adapters that kernels are built for.
const PAIRS: [(DType, DType); 6] = [
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F16),
    (DType::BF16, DType::F32),
    (DType::F16, DType::F32),
    (DType::F32, DType::F32),
    (DType::F64, DType::F64),
];

pub(super) fn kernel_names() -> Vec<String> {
    let mut names = Vec::new();
    for (x, adapter) in PAIRS {
        let Ok(kind) = Kind::of("names", x, adapter) else {
            continue;
        };
        let mut tiles: Vec<usize> = (1..=256).map(|r| kind.tile(r)).collect();
        tiles.dedup();
        for stem in ["lora_shrink", "lora_dy_pass", "lora_x_pass"] {
            names.extend(tiles.iter().map(|&tile| kind.instance(stem, tile)));
        }
        for stem in ["lora_expand", "lora_dx"] {
            names.push(kind.whole(stem));
        }
        names.push(format!("tsugi_lora_reduce_{}", kind.adapter));
    }
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every instance must fit the 99 KB a block that the smaller devices of compute capability 8 offer.
    #[test]
    fn shared_memory_fits_every_device() {
        let mut largest = 0;
        for (x, adapter) in PAIRS {
            let kind = Kind::of("test", x, adapter).unwrap();
            for r in [1, 16, 17, 32, 33, 64, 256] {
                let tile = kind.tile(r);
                let inner = r.next_multiple_of(16).min(if kind.size == 8 {
                    EXPAND_INNER_64
                } else {
                    EXPAND_INNER
                });
                for bytes in [
                    shrink_shared(kind, tile),
                    dy_shared(kind, tile),
                    x_shared(kind, tile),
                    expand_shared(kind, inner, false),
                    expand_shared(kind, inner, true),
                ] {
                    largest = largest.max(bytes);
                }
            }
        }
        // Static shared memory comes on top: at most 768 bytes.
        assert!(largest + 768 <= 99 * 1024, "{largest}");
    }

    #[test]
    fn unsupported_dtypes_are_named() {
        let text = Kind::of("lora_linear", DType::F32, DType::F64)
            .err()
            .unwrap()
            .to_string();
        assert!(text.contains("float64 adapters under float32"), "{text}");
    }
}
