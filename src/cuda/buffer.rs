//! The gradient buffer on a device: accumulate, statistics, drain, and the variance of a ring.
//!
//! All tensors of an adapter share a launch; more than [`TABLE_TENSORS`] of them, or of more than one dtype, take several.

use super::params;
use super::tile::*;
use super::{Machine, launch, name};
use crate::error::{Error, Result};
use crate::ops::{buffer_variance, sideband_accumulate, sideband_drain, sideband_stats};
use crate::tensor::{DType, Mat, TensorMut, TensorRef};
use std::ffi::c_void;
use std::ptr::null_mut;

const DTYPES: [DType; 4] = [DType::BF16, DType::F16, DType::F32, DType::F64];

/// Tensors of one dtype that go through a launch together.
struct Group {
    dtype: DType,
    table: params::TensorTable,
}

impl Group {
    fn chunks(&self) -> usize {
        self.table.first_chunk[self.table.count as usize] as usize
    }

    /// Blocks that keep the device busy; a block takes several chunks where there are more.
    fn blocks(&self, machine: &dyn Machine) -> usize {
        self.chunks().clamp(1, machine.processors() * 4)
    }
}

/// Cuts the tensors into tables; `grad` gives the dtype, which is fp32 where there is none.
fn groups(
    op: &'static str,
    sum: &[TensorRef<'_>],
    grad: Option<&[TensorRef<'_>]>,
) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for (i, s) in sum.iter().enumerate() {
        let g = grad.map(|grad| &grad[i]);
        if !s.is_contiguous() || g.is_some_and(|g| !g.is_contiguous()) {
            return Err(Error::Internal {
                op,
                what: format!("tensor {i} reached the device without being made contiguous"),
            });
        }
        let dtype = g.map_or(DType::F32, TensorRef::dtype);
        let room =
            |group: &Group| group.dtype == dtype && (group.table.count as usize) < TABLE_TENSORS;
        let at = match groups.iter().position(room) {
            Some(at) => at,
            None => {
                groups.push(Group {
                    dtype,
                    table: params::TensorTable::default(),
                });
                groups.len() - 1
            }
        };
        let table = &mut groups[at].table;
        let k = table.count as usize;
        table.sum[k] = s.data().cast_mut().cast();
        table.grad[k] = g.map_or(null_mut(), |g| g.data().cast_mut().cast());
        table.numel[k] = s.numel() as i64;
        table.first_chunk[k + 1] = table.first_chunk[k] + s.numel().div_ceil(TABLE_CHUNK) as i64;
        table.count += 1;
    }
    Ok(groups)
}

/// S += w g and the scalars, unless a value is not finite; all decided on the device.
pub fn accumulate(
    machine: &dyn Machine,
    sum: &[TensorMut<'_>],
    stats: &TensorMut<'_>,
    grad: &[TensorRef<'_>],
    weight: f64,
    zero_grad: bool,
) -> Result<()> {
    let op = sideband_accumulate::OP;
    let sums: Vec<TensorRef<'_>> = sum.iter().map(|s| *s.view()).collect();
    let groups = groups(op, &sums, Some(grad))?;
    let blocks: Vec<usize> = groups.iter().map(|g| g.blocks(machine)).collect();
    let total: usize = blocks.iter().sum();
    let squares = machine.scratch(op, total * size_of::<f64>())?;
    let flags = machine.scratch(op, total * size_of::<i32>())?;
    let mut first = 0;
    let launches: Vec<(String, usize, params::Accumulate)> = groups
        .iter()
        .zip(&blocks)
        .enumerate()
        .map(|(i, (group, &blocks))| {
            let p = params::Accumulate {
                table: group.table.clone(),
                stats: stats.view().data().cast_mut().cast(),
                squares,
                flags,
                blocks: total as i32,
                first_block: first,
                weight,
                zero_grad: zero_grad.into(),
                update_stats: i32::from(i + 1 == groups.len()),
            };
            first += blocks as i32;
            Ok((name(op, group.dtype)?.to_owned(), blocks, p))
        })
        .collect::<Result<_>>()?;
    // Every gradient is looked at before any sum changes.
    for stem in ["inspect", "accumulate"] {
        for (dtype, blocks, p) in &launches {
            let kernel = format!("tsugi_sideband_{stem}_{dtype}");
            // SAFETY: both kernels take params::Accumulate, made of checked tensors and scratch for every block.
            unsafe { launch(machine, op, &kernel, [*blocks, 1, 1], TABLE_THREADS, 0, p)? };
        }
    }
    Ok(())
}

/// (m, n, Q, ||S||^2, V, P, numel, non-finite snapshots) into `out`, eight fp64 on the device.
pub fn statistics(
    machine: &dyn Machine,
    sum: &[TensorRef<'_>],
    stats: &TensorRef<'_>,
    out: &TensorMut<'_>,
) -> Result<()> {
    let op = sideband_stats::OP;
    let groups = groups(op, sum, None)?;
    let total: usize = groups.iter().map(|g| g.blocks(machine)).sum();
    let norms = machine.scratch(op, total * size_of::<f64>())?;
    let mut first = 0;
    for group in groups {
        let blocks = group.blocks(machine);
        let p = params::Norm {
            table: group.table,
            norms,
            first_block: first,
        };
        first += blocks as i32;
        let grid = [blocks, 1, 1];
        // SAFETY: sideband_norm takes params::Norm, made of checked tensors and scratch for every block.
        unsafe {
            launch(
                machine,
                op,
                "tsugi_sideband_norm",
                grid,
                TABLE_THREADS,
                0,
                &p,
            )?
        };
    }
    let p = params::Finish {
        stats: stats.data().cast(),
        norms,
        blocks: total as i32,
        numel: sum.iter().map(TensorRef::numel).sum::<usize>() as f64,
        out: out.view().data().cast_mut().cast(),
    };
    // SAFETY: sideband_finish takes params::Finish; stats and out have eight elements (checked, or just made).
    unsafe {
        launch(
            machine,
            op,
            "tsugi_sideband_finish",
            [1, 1, 1],
            STATS_THREADS,
            0,
            &p,
        )
    }
}

/// grad = scale S, S = 0, stats = 0.
pub fn drain(
    machine: &dyn Machine,
    sum: &[TensorMut<'_>],
    stats: &TensorMut<'_>,
    grad: &[TensorMut<'_>],
    scale: f64,
) -> Result<()> {
    let op = sideband_drain::OP;
    let sums: Vec<TensorRef<'_>> = sum.iter().map(|s| *s.view()).collect();
    let grads: Vec<TensorRef<'_>> = grad.iter().map(|g| *g.view()).collect();
    for group in groups(op, &sums, Some(&grads))? {
        let kernel = format!("tsugi_sideband_drain_{}", name(op, group.dtype)?);
        let grid = [group.blocks(machine), 1, 1];
        let p = params::Drain {
            table: group.table,
            stats: stats.view().data().cast_mut().cast(),
            scale,
        };
        // SAFETY: sideband_drain takes params::Drain, made of checked tensors.
        unsafe { launch(machine, op, &kernel, grid, TABLE_THREADS, 0, &p)? };
    }
    Ok(())
}

/// The mean over elements of the unbiased variance over the first `filled` slots, into one fp64 on the device.
pub fn variance(machine: &dyn Machine, ring: Mat, filled: usize, out: *mut c_void) -> Result<()> {
    let op = buffer_variance::OP;
    if ring.cs != 1 && ring.cols > 1 {
        return Err(Error::Internal {
            op,
            what: format!("a ring with column stride {} reached the device", ring.cs),
        });
    }
    // Each thread takes eight columns at a time. Nothing to read still has one block, which leaves 0.
    let groups = if filled < 2 { 0 } else { ring.cols.div_ceil(8) };
    let blocks = groups
        .div_ceil(VARIANCE_THREADS)
        .clamp(1, machine.processors() * 8);
    let partial = machine.scratch(op, blocks * size_of::<f64>())?;
    let p = params::Variance {
        ring: ring.data().cast(),
        numel: if filled < 2 { 0 } else { ring.cols as i64 },
        slot_stride: ring.rs as i64,
        filled: filled as i32,
        partial,
    };
    let kernel = format!("tsugi_buffer_variance_{}", name(op, ring.dtype)?);
    // SAFETY: buffer_variance takes params::Variance: the ring was checked, scratch has room for every block.
    unsafe {
        launch(
            machine,
            op,
            &kernel,
            [blocks, 1, 1],
            VARIANCE_THREADS,
            0,
            &p,
        )?
    };
    let p = params::VarianceFinish {
        partial,
        blocks: blocks as i32,
        filled: filled as i32,
        numel: ring.cols as f64,
        out,
    };
    let kernel = "tsugi_buffer_variance_finish";
    // SAFETY: buffer_variance_finish takes params::VarianceFinish; `out` is one fp64 (the caller's new tensor).
    unsafe { launch(machine, op, kernel, [1, 1, 1], VARIANCE_THREADS, 0, &p) }
}

pub(super) fn kernel_names() -> Vec<String> {
    let mut names: Vec<String> = [
        "tsugi_sideband_norm",
        "tsugi_sideband_finish",
        "tsugi_buffer_variance_finish",
    ]
    .map(String::from)
    .to_vec();
    for dtype in DTYPES {
        let Ok(dtype) = name("names", dtype) else {
            continue;
        };
        for stem in [
            "sideband_inspect",
            "sideband_accumulate",
            "sideband_drain",
            "buffer_variance",
        ] {
            names.push(format!("tsugi_{stem}_{dtype}"));
        }
    }
    names
}
