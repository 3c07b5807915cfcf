//! Products of some rows with the factors of the expert that they belong to: what `lora_experts` runs in its tasks.
//!
//! With n features and R ranks, F [R, n] the factors of one expert:
//!
//!   dots    H[m, R] = X[m, n] F^T        spread  C[m, n] = H[m, R] F + base        outer  C[R, n] += H[m, R]^T X[m, n]
//!
//! Nothing here starts a thread: the caller's tasks are the threads' work, and their sizes do not depend on how many
//! threads there are. Operands are [`Lines`]: rows of the compute type, readable up to whole register tiles. What is in
//! memory like that is read where it lies; the rest is converted, masked, scaled or gathered while it is staged.

use super::gemm::{Block, KC, Tiles, load_line, mask_line, panel_width};
use super::num::{Real, Stored};
use super::vectorized;
use crate::philox::Dropout;
use crate::tensor::{Mat, MatMut, Stack, StackMut};
use crate::with_float;
use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Experts that are gathered at once and columns that are scattered at once: the cache lines of so many stay in the
/// first-level cache.
const STRIP: usize = 16;
/// Rows and columns of a tile of `dots`, with operands in 16 registers.
const ROWS: usize = 3;
const COLUMNS: usize = 4;

/// Rows of contiguous elements, `ld` apart; what lies beyond a row's features up to the next whole tile may be read.
#[derive(Clone, Copy)]
pub(crate) struct Lines<T> {
    pub data: *const T,
    pub ld: isize,
}

// SAFETY: `Lines` are read only, and whoever makes them keeps the memory while tasks run.
unsafe impl<T> Send for Lines<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Lines<T> {}

impl<T> Lines<T> {
    pub fn from(self, row: usize, column: usize) -> Self {
        let at = self.data.wrapping_offset(row as isize * self.ld);
        Lines {
            data: at.wrapping_add(column),
            ..self
        }
    }
}

/// Columns up to which rows of `n` features can be read.
pub(crate) fn padded<T: Real>(n: usize) -> usize {
    n.next_multiple_of(panel_width::<T>())
}

/// The matrix where it lies, if its rows are lines.
pub(crate) fn lines_of<T: Real>(mat: &Mat) -> Option<Lines<T>> {
    let fits = mat.dtype == T::DTYPE && mat.cs == 1 && mat.cols.is_multiple_of(panel_width::<T>());
    fits.then(|| Lines {
        data: mat.data().cast(),
        ld: mat.rs,
    })
}

/// `mat[rows, columns]` as lines in `stage`, under the dropout of its own rows and columns.
pub(crate) fn stage<T: Real>(
    mat: &Mat,
    rows: Range<usize>,
    columns: Range<usize>,
    dropout: Option<&Dropout>,
    stage: &mut Vec<T>,
) -> Lines<T> {
    let (width, ld) = (columns.len(), padded::<T>(columns.len()));
    stage.clear();
    stage.resize(rows.len() * ld, T::default());
    vectorized(
        #[inline(always)]
        || {
            for (row, line) in rows.clone().zip(stage.chunks_exact_mut(ld.max(1))) {
                let line = &mut line[..width];
                load_line(mat, row, columns.start, 1.0, line);
                if let Some(dropout) = dropout {
                    mask_line(dropout, row, columns.start, line);
                }
            }
        },
    );
    Lines {
        data: stage.as_ptr(),
        ld: ld as isize,
    }
}

/// `to(i)[j * ld + c] = scale * stack.at(experts[i])[j, c]` for the columns c given.
///
/// Where a matrix' rows are not contiguous, memory is read along the columns with the experts innermost: PEFT's B is
/// [O, r, E] there, so that it is read from one end to the other, and once, whichever experts are wanted.
///
/// # Safety
/// `to(i)` is memory for the rows of one matrix, `ld` elements apart, whose columns `columns` nobody else uses.
pub(crate) unsafe fn gather<T: Real>(
    stack: &Stack,
    experts: &[usize],
    columns: Range<usize>,
    scale: f64,
    ld: usize,
    to: impl Fn(usize) -> *mut T,
) {
    let (mat, factor) = (stack.first, T::from_f64(scale));
    vectorized(
        #[inline(always)]
        || {
            if mat.cs == 1 {
                for (i, &expert) in experts.iter().enumerate() {
                    for row in 0..mat.rows {
                        // SAFETY: the caller's promise.
                        let line = unsafe {
                            let first = to(i).add(row * ld + columns.start);
                            std::slice::from_raw_parts_mut(first, columns.len())
                        };
                        load_line(&stack.at(expert), row, columns.start, scale, line);
                    }
                }
                return;
            }
            with_float!(mat.dtype, E => {
                for (part, experts) in experts.chunks(STRIP).enumerate() {
                    let (mut lines, mut steps) = ([std::ptr::null_mut(); STRIP], [0isize; STRIP]);
                    for (i, &expert) in experts.iter().enumerate() {
                        lines[i] = to(part * STRIP + i);
                        steps[i] = expert as isize * stack.step;
                    }
                    let (lines, steps) = (&lines[..experts.len()], &steps[..experts.len()]);
                    for column in columns.clone() {
                        for row in 0..mat.rows {
                            let cell = mat.at::<E>(row, column);
                            for (line, step) in lines.iter().zip(steps) {
                                // SAFETY: (row, column) lies inside every expert's matrix; the caller's promise.
                                unsafe {
                                    let value = (*cell.wrapping_offset(*step)).widen::<T>();
                                    *line.add(row * ld + column) = value * factor;
                                }
                            }
                        }
                    }
                }
            });
        },
    );
}

/// `stack.at(first_expert + i)[j, columns.start + c] = scale * from(i)[j * ld + c]`, strip by strip as [`gather`].
///
/// # Safety
/// `from(i)` holds the rows of one matrix, `ld` elements apart; nobody else uses these columns of these matrices.
pub(crate) unsafe fn scatter<T: Real>(
    stack: &StackMut,
    experts: Range<usize>,
    columns: Range<usize>,
    scale: f64,
    ld: usize,
    from: impl Fn(usize) -> *const T,
) {
    let factor = T::from_f64(scale);
    let mat = stack.stack().first;
    let strip = if mat.cs == 1 { columns.len() } else { STRIP };
    vectorized(
        #[inline(always)]
        || {
            with_float!(mat.dtype, E => {
                for first in columns.clone().step_by(strip.max(1)) {
                    let width = strip.min(columns.end - first);
                    for row in 0..mat.rows {
                        for (i, expert) in experts.clone().enumerate() {
                            // SAFETY: the caller's promise.
                            let line = unsafe {
                                let start = from(i).add(row * ld + first - columns.start);
                                std::slice::from_raw_parts(start, width)
                            };
                            let cell = stack.at(expert).at::<E>(row, first);
                            for (j, value) in line.iter().enumerate() {
                                // SAFETY: (row, first + j) lies inside the matrix and is this call's own.
                                unsafe { *cell.wrapping_offset(j as isize * mat.cs) = E::narrow(*value * factor) };
                            }
                        }
                    }
                }
            })
        },
    );
}

/// `c[i * ldc + j] = sum over n of x[i, n] f[j, n]`: a tile of rows and factors at a time, vectors along n.
pub(crate) struct Dots<T> {
    pub x: Lines<T>,
    pub rows: usize,
    pub f: Lines<T>,
    pub columns: usize,
    pub n: usize,
    pub c: *mut T,
    pub ldc: usize,
}

impl<T: Real> Dots<T> {
    /// # Safety
    /// `x` and `f` have `rows` and `columns` lines of `n` features, zero beyond or whole tiles; `c` is the caller's own.
    pub unsafe fn run(self) {
        Arch::new().dispatch(self);
    }
}

impl<T: Real> WithSimd for Dots<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Factors outside: they stay in the first-level cache while the rows pass.
        for column in (0..self.columns).step_by(COLUMNS) {
            for row in (0..self.rows).step_by(ROWS) {
                let (m, n) = (self.rows - row, self.columns - column);
                // SAFETY: the tile lies inside both operands and the result (contract of `run`).
                unsafe {
                    match (m, n) {
                        (1, 1) => self.tile::<S, 1, 1>(simd, row, column),
                        (1, 2) => self.tile::<S, 1, 2>(simd, row, column),
                        (1, 3) => self.tile::<S, 1, 3>(simd, row, column),
                        (1, _) => self.tile::<S, 1, 4>(simd, row, column),
                        (2, 1) => self.tile::<S, 2, 1>(simd, row, column),
                        (2, 2) => self.tile::<S, 2, 2>(simd, row, column),
                        (2, 3) => self.tile::<S, 2, 3>(simd, row, column),
                        (2, _) => self.tile::<S, 2, 4>(simd, row, column),
                        (_, 1) => self.tile::<S, 3, 1>(simd, row, column),
                        (_, 2) => self.tile::<S, 3, 2>(simd, row, column),
                        (_, 3) => self.tile::<S, 3, 3>(simd, row, column),
                        _ => self.tile::<S, 3, 4>(simd, row, column),
                    }
                }
            }
        }
    }
}

impl<T: Real> Dots<T> {
    /// # Safety
    /// M rows from `row` on and N factors from `column` on are inside the operands.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const N: usize>(
        &self,
        simd: S,
        row: usize,
        column: usize,
    ) {
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        let (x, f) = (self.x.from(row, 0), self.f.from(column, 0));
        let mut sums = [[T::splat(simd, T::default()); N]; M];
        // SAFETY: reads stay inside the lines' padded features (contract of `run`); the cells are the caller's own.
        unsafe {
            for at in (0..self.n).step_by(lanes) {
                // The rows in registers, the factors one by one: three and one beside twelve sums.
                let mut left = [T::splat(simd, T::default()); M];
                for (i, vector) in left.iter_mut().enumerate() {
                    *vector = x.from(i, at).data.cast::<T::Vector<S>>().read_unaligned();
                }
                for j in 0..N {
                    let right = f.from(j, at).data.cast::<T::Vector<S>>().read_unaligned();
                    for (row, left) in sums.iter_mut().zip(left) {
                        row[j] = T::fma(simd, left, right, row[j]);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    *self.c.add((row + i) * self.ldc + column + j) = T::sum_of_lanes(simd, *sum);
                }
            }
        }
    }
}

/// `c = h f (+ source)`: c [rows, width], h [rows, depth] with `ldh`, f [depth, width or a whole tile more]. The source may
/// be c itself. Few ranks make a shallow product, where what is added matters as much as what is multiplied.
pub(crate) struct Spread<T> {
    pub h: *const T,
    pub ldh: usize,
    pub rows: usize,
    pub f: Lines<T>,
    pub depth: usize,
    pub source: Option<Lines<T>>,
    pub c: *mut T,
    pub ldc: isize,
    pub width: usize,
}

impl<T: Real> Spread<T> {
    /// # Safety
    /// The operands are of these sizes; `c`, with rows `ldc` apart, is the caller's own.
    pub unsafe fn run(self) {
        Arch::new().dispatch(self);
    }
}

impl<T: Real> WithSimd for Spread<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let nr = 2 * size_of::<T::Vector<S>>() / size_of::<T>();
        for column in (0..self.width).step_by(nr) {
            for row in (0..self.rows).step_by(6) {
                // SAFETY: the tile lies inside the operands and the result (contract of `run`).
                unsafe {
                    match self.rows - row {
                        1 => self.tile::<S, 1>(simd, row, column),
                        2 => self.tile::<S, 2>(simd, row, column),
                        3 => self.tile::<S, 3>(simd, row, column),
                        4 => self.tile::<S, 4>(simd, row, column),
                        5 => self.tile::<S, 5>(simd, row, column),
                        _ => self.tile::<S, 6>(simd, row, column),
                    }
                }
            }
        }
    }
}

impl<T: Real> Spread<T> {
    /// # Safety
    /// M rows from `row` on are inside the operands, and two vectors from `column` on inside f.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize>(&self, simd: S, row: usize, column: usize) {
        let lanes = size_of::<T::Vector<S>>() / size_of::<T>();
        let mut sums = [[T::splat(simd, T::default()); 2]; M];
        // SAFETY: `run`'s contract; whole vectors of the source and of c are touched only where they lie inside `width`.
        unsafe {
            let h = self.h.add(row * self.ldh);
            for k in 0..self.depth {
                let f = self.f.from(k, column).data;
                let first = f.cast::<T::Vector<S>>().read_unaligned();
                let second = f.add(lanes).cast::<T::Vector<S>>().read_unaligned();
                for (i, sums) in sums.iter_mut().enumerate() {
                    let value = T::splat(simd, *h.add(i * self.ldh + k));
                    sums[0] = T::fma(simd, value, first, sums[0]);
                    sums[1] = T::fma(simd, value, second, sums[1]);
                }
            }
            let c = |i: usize| {
                let line = self.c.wrapping_offset((row + i) as isize * self.ldc);
                line.wrapping_add(column)
            };
            if self.width - column >= 2 * lanes {
                if let Some(source) = self.source {
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let from = source.from(row + i, column).data;
                        let first = from.cast::<T::Vector<S>>().read_unaligned();
                        let second = from.add(lanes).cast::<T::Vector<S>>().read_unaligned();
                        sums[0] = T::sum(simd, first, sums[0]);
                        sums[1] = T::sum(simd, second, sums[1]);
                    }
                }
                for (i, sums) in sums.iter().enumerate() {
                    c(i).cast::<T::Vector<S>>().write_unaligned(sums[0]);
                    c(i).add(lanes)
                        .cast::<T::Vector<S>>()
                        .write_unaligned(sums[1]);
                }
                return;
            }
            for (i, sums) in sums.iter().enumerate() {
                // Room for two vectors of the widest kind.
                let mut line = [T::default(); 32];
                let start = line.as_mut_ptr();
                start.cast::<T::Vector<S>>().write_unaligned(sums[0]);
                start
                    .add(lanes)
                    .cast::<T::Vector<S>>()
                    .write_unaligned(sums[1]);
                for (j, value) in line.iter().enumerate().take(self.width - column) {
                    let from = self
                        .source
                        .map(|source| *source.from(row + i, column + j).data);
                    *c(i).add(j) = from.map_or(*value, |from| from + *value);
                }
            }
        }
    }
}

/// `c += h^T x`: c [R, width], h [rows, R] with `ldh`, x [rows, width or a whole tile more]; in parts of [`KC`] rows.
///
/// # Safety
/// The operands are of these sizes; `c` is the caller's own.
#[allow(clippy::too_many_arguments)]
pub(crate) unsafe fn outer<T: Real>(
    h: *const T,
    ldh: isize,
    rows: usize,
    x: Lines<T>,
    ranks: usize,
    c: *mut T,
    ldc: usize,
    width: usize,
) {
    for first in (0..rows).step_by(KC) {
        Arch::new().dispatch(Tiles {
            left: Block {
                data: h.wrapping_offset(first as isize * ldh),
                rs: 1,
                cs: ldh,
            },
            rows: ranks,
            panels: x.from(first, 0).data,
            panel_stride: panel_width::<T>(),
            row_stride: x.ld,
            k: KC.min(rows - first),
            cols: width,
            c,
            ldc: ldc as isize,
            accumulate: true,
        });
    }
}

/// `out[row0 + i, col0 + j] = c[i * width + j]`, plus what `base` has there, rounded once; the rows of `out` are contiguous.
pub(crate) fn store<T: Real>(
    out: &MatMut,
    base: Option<&Mat>,
    row0: usize,
    col0: usize,
    width: usize,
    c: &mut [T],
) {
    if width == 0 {
        return;
    }
    debug_assert!(out.mat().cs == 1);
    let mut line_of_base = Vec::new();
    if base.is_some() {
        line_of_base.resize(width, T::default());
    }
    vectorized(
        #[inline(always)]
        || {
            with_float!(out.mat().dtype, E => {
                for (i, line) in c.chunks_exact_mut(width).enumerate() {
                    if let Some(base) = base {
                        load_line(base, row0 + i, col0, 1.0, &mut line_of_base);
                        for (value, base) in line.iter_mut().zip(&line_of_base) {
                            *value = *base + *value;
                        }
                    }
                    // SAFETY: these cells lie inside row row0 + i, side by side, and are the caller's own.
                    let cells = unsafe {
                        std::slice::from_raw_parts_mut(out.at::<E>(row0 + i, col0), width)
                    };
                    for (cell, value) in cells.iter_mut().zip(line.iter()) {
                        *cell = E::narrow(*value);
                    }
                }
            })
        },
    );
}

/// Multiplies rows of `width` elements by the mask from (row0, column0) on.
pub(crate) fn mask<T: Real>(
    dropout: &Dropout,
    row0: usize,
    column0: usize,
    width: usize,
    c: &mut [T],
) {
    vectorized(
        #[inline(always)]
        || {
            for (i, line) in c.chunks_exact_mut(width).enumerate() {
                mask_line(dropout, row0 + i, column0, line);
            }
        },
    );
}
