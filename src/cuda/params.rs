//! The kernels' parameter structs, field by field as in `kernels/*.cu`.
//!
//! Both sides state the size of each struct, and the executor test runs every kernel through these.

use super::tile::TABLE_TENSORS;
use std::ffi::c_void;

/// Adapters of one call, as in `kernels/common.cuh`.
pub const MAX_ADAPTERS: usize = super::tile::MAX_ADAPTERS;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Adapters {
    pub ptr: [*mut c_void; MAX_ADAPTERS],
    pub stride: [i64; MAX_ADAPTERS],
    pub scale: [f64; MAX_ADAPTERS],
    pub begin: [i32; MAX_ADAPTERS + 1],
    pub count: i32,
}

impl Default for Adapters {
    fn default() -> Self {
        Adapters {
            ptr: [std::ptr::null_mut(); MAX_ADAPTERS],
            stride: [0; MAX_ADAPTERS],
            scale: [0.0; MAX_ADAPTERS],
            begin: [0; MAX_ADAPTERS + 1],
            count: 0,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Dropout {
    pub rng: *const c_void,
    pub factor: f64,
    pub threshold: u32,
}

#[repr(C)]
pub struct Shrink {
    pub x: *const c_void,
    pub rows: i64,
    pub inner: i64,
    pub x_stride: i64,
    pub h: *mut c_void,
    pub h_stride: i64,
    pub partial: *mut c_void,
    pub splits: i32,
    pub a: Adapters,
    pub dropout: Dropout,
}

#[repr(C)]
pub struct Expand {
    pub h: *const c_void,
    pub rows: i64,
    pub columns: i64,
    pub h_stride: i64,
    pub src: *const c_void,
    pub src_stride: i64,
    pub bias: *const c_void,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub w: Adapters,
    pub dropout: Dropout,
}

#[repr(C)]
pub struct DyPass {
    pub dy: *const c_void,
    pub rows: i64,
    pub columns: i64,
    pub dy_stride: i64,
    pub h: *const c_void,
    pub h_stride: i64,
    pub dh_partial: *mut c_void,
    pub db_partial: *mut c_void,
    pub rows_per_split: i64,
    pub b: Adapters,
}

#[repr(C)]
pub struct XPass {
    pub x: *const c_void,
    pub rows: i64,
    pub columns: i64,
    pub x_stride: i64,
    pub dh: *const c_void,
    pub dh_stride: i64,
    pub partial: *mut c_void,
    pub rows_per_split: i64,
    pub a: Adapters,
    pub dropout: Dropout,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct ReduceJob {
    pub partial: *const c_void,
    pub rows: i64,
    pub columns: i64,
    pub factor: f64,
    pub splits: i32,
    pub adapters_along_rows: i32,
}

#[repr(C)]
pub struct Reduce {
    pub job: [ReduceJob; 2],
    pub out: [Adapters; 2],
}

#[repr(C)]
pub struct Experts {
    pub f: Adapters,
    pub column: [i64; MAX_ADAPTERS],
    pub expert: [i64; MAX_ADAPTERS],
    pub ends: *const c_void,
    pub ends_stride: i64,
    pub ends_bytes: i32,
    pub experts: i32,
    pub x: *const c_void,
    pub rows: i64,
    pub features: i64,
    pub x_stride: i64,
    pub h: *mut c_void,
    pub h_stride: i64,
    pub src: *const c_void,
    pub src_stride: i64,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub dropout: Dropout,
}

#[repr(C)]
#[derive(Clone)]
pub struct TensorTable {
    pub sum: [*mut c_void; TABLE_TENSORS],
    pub grad: [*mut c_void; TABLE_TENSORS],
    pub first_chunk: [i64; TABLE_TENSORS + 1],
    pub numel: [i64; TABLE_TENSORS],
    pub count: i32,
}

impl Default for TensorTable {
    fn default() -> Self {
        TensorTable {
            sum: [std::ptr::null_mut(); TABLE_TENSORS],
            grad: [std::ptr::null_mut(); TABLE_TENSORS],
            first_chunk: [0; TABLE_TENSORS + 1],
            numel: [0; TABLE_TENSORS],
            count: 0,
        }
    }
}

#[repr(C)]
pub struct Accumulate {
    pub table: TensorTable,
    pub stats: *mut c_void,
    pub squares: *mut c_void,
    pub flags: *mut c_void,
    pub blocks: i32,
    pub first_block: i32,
    pub weight: f64,
    pub zero_grad: i32,
    pub update_stats: i32,
}

#[repr(C)]
pub struct Drain {
    pub table: TensorTable,
    pub stats: *mut c_void,
    pub scale: f64,
}

#[repr(C)]
pub struct Norm {
    pub table: TensorTable,
    pub norms: *mut c_void,
    pub first_block: i32,
}

#[repr(C)]
pub struct Finish {
    pub stats: *const c_void,
    pub norms: *const c_void,
    pub blocks: i32,
    pub numel: f64,
    pub out: *mut c_void,
}

#[repr(C)]
pub struct Variance {
    pub ring: *const c_void,
    pub numel: i64,
    pub slot_stride: i64,
    pub filled: i32,
    pub partial: *mut c_void,
}

#[repr(C)]
pub struct VarianceFinish {
    pub partial: *const c_void,
    pub blocks: i32,
    pub filled: i32,
    pub numel: f64,
    pub out: *mut c_void,
}

const _: () = {
    assert!(size_of::<Shrink>() == 1888);
    assert!(size_of::<Expand>() == 1896);
    assert!(size_of::<DyPass>() == 1872);
    assert!(size_of::<XPass>() == 1888);
    assert!(size_of::<Reduce>() == 3680);
    assert!(size_of::<Experts>() == 2952);
    assert!(size_of::<Accumulate>() == 16448);
    assert!(size_of::<Drain>() == 16416);
    assert!(size_of::<Norm>() == 16416);
    assert!(size_of::<Finish>() == 40);
    assert!(size_of::<Variance>() == 40);
    assert!(size_of::<VarianceFinish>() == 32);
};
