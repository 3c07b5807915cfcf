//! The matrix product behind the low-rank operations: C[m, n] = sum over k of L[m, k] R[k, n].
//!
//! What makes it worth having beside torch's product: operands are read in their own dtype and
//! converted, scaled and masked while they are packed, R may be several adapters' matrices side by
//! side, and results go to several adapters' matrices, so nothing is concatenated, cast or masked in
//! memory. Blocking after Goto and van de Geijn, "Anatomy of high-performance matrix multiplication",
//! ACM TOMS 34(3), 2008.
//!
//! A sum over k runs in one fixed order for every thread count, so results are reproducible bitwise.

use crate::cpu::num::{Real, Stored};
use crate::cpu::{vectorized, zeros};
use crate::error::Result;
use crate::host::parallel_for;
use crate::philox::{DRAWS, Dropout, LANES};
use crate::tensor::{Mat, MatMut};
use crate::with_float;
use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Rows up to which packing R would cost more than multiplying with it.
const FEW: usize = 4;
/// Columns that one task of a product of few rows takes.
const NC_FEW: usize = 256;
/// Rows up to which a wide product reads R where it lies: packing pays from the fourth tile on.
const UNPACKED_ROWS: usize = 3 * MR;
/// Rows of a register tile.
const MR: usize = 6;
/// Vectors of a register tile's row; 6 x 2 accumulators leave room for operands in 16 registers.
const VECTORS: usize = 2;
/// Widest register tile in elements: two AVX-512 vectors of float32.
const MAX_NR: usize = 32;
/// Depth of a block: an R panel of KC x 16 float32 is half of a 32 KiB first-level cache.
pub(crate) const KC: usize = 256;
/// Rows of an L block: MC x KC float32 stays in a 512 KiB second-level cache beside the results.
const MC: usize = 96;
/// Columns that one task of a wide product takes.
const NC_WIDE: usize = 64;
/// Columns of a shallow product's inner block, so that its results stay in the second-level cache.
const NC_SHALLOW: usize = 256;
/// Bytes of packed R that are shared between threads at once.
const SHARED_BYTES: usize = 8 << 20;
/// Multiply-adds below which another thread costs more than it saves.
pub(crate) const GRAIN: usize = 1 << 18;

/// The left operand: one matrix [m, k], optionally under dropout (element (row, column)).
pub struct Plain {
    mat: Mat,
    dropout: Option<Dropout>,
}

impl Plain {
    pub fn new(mat: Mat) -> Self {
        Plain { mat, dropout: None }
    }

    pub fn with_dropout(mat: Mat, dropout: Option<Dropout>) -> Self {
        Plain { mat, dropout }
    }

    fn is_direct<T: Real>(&self) -> bool {
        self.mat.dtype == T::DTYPE && self.dropout.is_none()
    }

    /// L[rows, ks] as a strided matrix of the compute type, in place if it is one already.
    fn block<T: Real>(
        &self,
        rows: Range<usize>,
        ks: Range<usize>,
        scratch: &mut Vec<T>,
    ) -> Block<T> {
        if rows.is_empty() || ks.is_empty() {
            return Block {
                data: scratch.as_ptr(),
                rs: 0,
                cs: 0,
            };
        }
        if self.is_direct::<T>() {
            return Block {
                data: self.mat.at::<T>(rows.start, ks.start),
                rs: self.mat.rs,
                cs: self.mat.cs,
            };
        }
        let (m, k) = (rows.len(), ks.len());
        let by_rows = self.dropout.is_some() || self.mat.cs.abs() <= self.mat.rs.abs();
        scratch.resize(m * k, T::default());
        let (lines, length) = if by_rows { (m, k) } else { (k, m) };
        vectorized(
            #[inline(always)]
            || {
                for (line, out) in scratch.chunks_exact_mut(length).enumerate().take(lines) {
                    if by_rows {
                        let row = rows.start + line;
                        load_line(&self.mat, row, ks.start, 1.0, out);
                        if let Some(dropout) = &self.dropout {
                            mask_line(dropout, row, ks.start, out);
                        }
                    } else {
                        load_line(&self.mat.t(), ks.start + line, rows.start, 1.0, out);
                    }
                }
            },
        );
        let (rs, cs) = if by_rows {
            (k as isize, 1)
        } else {
            (1, m as isize)
        };
        Block {
            data: scratch.as_ptr(),
            rs,
            cs,
        }
    }
}

pub(super) struct Block<T> {
    pub(super) data: *const T,
    pub(super) rs: isize,
    pub(super) cs: isize,
}

/// Along which axis of R the parts stand side by side.
#[derive(Clone, Copy, PartialEq)]
pub enum Axis {
    /// Parts are [k, n_i]: their columns follow each other.
    Columns,
    /// Parts are [k_i, n]: their rows follow each other.
    Rows,
}

struct Part {
    mat: Mat,
    start: usize,
    scale: f64,
}

/// The right operand: one or more matrices, each with a factor, optionally under dropout.
pub struct Parts {
    parts: Vec<Part>,
    axis: Axis,
    dropout: Option<Dropout>,
}

impl Parts {
    pub fn one(mat: Mat, scale: f64) -> Self {
        Parts::stacked(Axis::Columns, std::iter::once((mat, scale)))
    }

    pub fn stacked(axis: Axis, mats: impl IntoIterator<Item = (Mat, f64)>) -> Self {
        let mut start = 0;
        let parts = mats
            .into_iter()
            .map(|(mat, scale)| {
                let part = Part { mat, start, scale };
                start += if axis == Axis::Columns {
                    mat.cols
                } else {
                    mat.rows
                };
                part
            })
            .collect();
        Parts {
            parts,
            axis,
            dropout: None,
        }
    }

    /// The mask's row is R's row, its column R's column; for one matrix only.
    pub fn with_dropout(mut self, dropout: Option<Dropout>) -> Self {
        debug_assert!(self.parts.len() == 1);
        self.dropout = dropout;
        self
    }

    /// Address of R[ks.start, cols.start] and the row stride, where a tile can read R as it stands.
    fn direct<T: Real>(&self, ks: &Range<usize>, cols: &Range<usize>) -> Option<(*const T, isize)> {
        match self.parts.as_slice() {
            [part]
                if part.scale == 1.0
                    && part.mat.cs == 1
                    && part.mat.dtype == T::DTYPE
                    && self.dropout.is_none()
                    && !ks.is_empty() =>
            {
                Some((part.mat.at::<T>(ks.start, cols.start), part.mat.rs))
            }
            _ => None,
        }
    }

    /// Packs R[ks, cols] as `dst[(k - ks.start) * nr + (n - cols.start)]`, zero beyond the columns.
    fn pack<T: Real>(&self, ks: Range<usize>, cols: Range<usize>, nr: usize, dst: &mut [T]) {
        let width = cols.len();
        if ks.is_empty() {
            // No depth, no panel: there is no place in `dst` for a second part to begin at either.
            return;
        }
        vectorized(
            #[inline(always)]
            || {
                if width < nr {
                    dst.fill(T::default());
                }
                for part in &self.parts {
                    let (span, wanted) = match self.axis {
                        Axis::Columns => (part.start..part.start + part.mat.cols, &cols),
                        Axis::Rows => (part.start..part.start + part.mat.rows, &ks),
                    };
                    let first = span.start.max(wanted.start);
                    let last = span.end.min(wanted.end);
                    if first >= last {
                        continue;
                    }
                    let inside = first - span.start..last - span.start;
                    let (rows, columns, k0, j0) = match self.axis {
                        Axis::Columns => (ks.clone(), inside, 0, first - cols.start),
                        Axis::Rows => (inside, cols.clone(), first - ks.start, 0),
                    };
                    if part.mat.rs != 1 || part.mat.cs == 1 {
                        load_rows(
                            &part.mat,
                            rows,
                            columns,
                            part.scale,
                            &mut dst[k0 * nr + j0..],
                            nr,
                        );
                    } else {
                        load_transposed(
                            &part.mat,
                            rows,
                            columns,
                            part.scale,
                            &mut dst[k0 * nr + j0..],
                            nr,
                        );
                    }
                }
                if let Some(dropout) = &self.dropout {
                    mask_panel(dropout, ks.clone(), cols.clone(), nr, dst);
                }
            },
        );
    }
}

impl Parts {
    /// `results[i, j] += sum over k of lines[i, k] R[k, cols.start + j]`, both row-major.
    #[inline(always)]
    fn add_products<T: Real>(&self, lines: &[T], k: usize, cols: Range<usize>, results: &mut [T]) {
        let width = cols.len();
        if k == 0 {
            return;
        }
        for part in &self.parts {
            let (ks, columns, j0) = match self.axis {
                Axis::Columns => {
                    let first = part.start.max(cols.start);
                    let last = (part.start + part.mat.cols).min(cols.end);
                    if first >= last {
                        continue;
                    }
                    (
                        0..k,
                        first - part.start..last - part.start,
                        first - cols.start,
                    )
                }
                Axis::Rows => (part.start..part.start + part.mat.rows, cols.clone(), 0),
            };
            if ks.is_empty() {
                continue;
            }
            with_float!(part.mat.dtype, E => {
                part.add_products::<E, T>(lines, k, ks, columns, &mut results[j0..], width)
            });
        }
    }
}

impl Part {
    /// [`Parts::add_products`] for the columns of one part, which meet `ks` of the lines.
    #[inline(always)]
    fn add_products<E: Stored, T: Real>(
        &self,
        lines: &[T],
        k: usize,
        ks: Range<usize>,
        columns: Range<usize>,
        results: &mut [T],
        width: usize,
    ) {
        let factor = T::from_f64(self.scale);
        let mat = &self.mat;
        let mut buffer = [T::default(); NC_FEW];
        if mat.rs == 1 && mat.cs != 1 {
            for (j, column) in columns.enumerate() {
                // SAFETY: the column's ks.len() elements lie inside the matrix, contiguous.
                let source =
                    unsafe { std::slice::from_raw_parts(mat.at::<E>(0, column), ks.len()) };
                for (line, sums) in lines.chunks_exact(k).zip(results.chunks_mut(width)) {
                    sums[j] = sums[j] + factor * dot(source, &line[ks.clone()], &mut buffer);
                }
            }
            return;
        }
        for (i, depth) in ks.enumerate() {
            let row: &[T] = if mat.cs == 1 {
                // SAFETY: these columns of row i lie inside the matrix, contiguous.
                let source = unsafe {
                    std::slice::from_raw_parts(mat.at::<E>(i, columns.start), columns.len())
                };
                widened(source, &mut buffer)
            } else {
                load_line(mat, i, columns.start, 1.0, &mut buffer[..columns.len()]);
                &buffer[..columns.len()]
            };
            for (line, sums) in lines.chunks_exact(k).zip(results.chunks_mut(width)) {
                let value = factor * line[depth];
                for (sum, right) in sums.iter_mut().zip(row) {
                    *sum = *sum + value * *right;
                }
            }
        }
    }
}

/// `source` in the compute type: itself, or converted into `buffer`.
#[inline(always)]
fn widened<'a, E: Stored, T: Real>(source: &'a [E], buffer: &'a mut [T]) -> &'a [T] {
    if E::DTYPE == T::DTYPE {
        // SAFETY: equal dtypes are one and the same Rust type.
        return unsafe { std::slice::from_raw_parts(source.as_ptr().cast::<T>(), source.len()) };
    }
    let out = &mut buffer[..source.len()];
    E::widen_slice(source, out);
    out
}

/// Sum of products in 16 interleaved partial sums, added in a fixed order.
#[inline(always)]
fn dot<E: Stored, T: Real>(source: &[E], line: &[T], buffer: &mut [T; NC_FEW]) -> T {
    const SUMS: usize = 16;
    let mut sums = [T::default(); SUMS];
    for (from, with) in source.chunks(NC_FEW).zip(line.chunks(NC_FEW)) {
        let wide = widened(from, buffer);
        let (mut a, mut b) = (wide.chunks_exact(SUMS), with.chunks_exact(SUMS));
        for (a, b) in a.by_ref().zip(b.by_ref()) {
            for i in 0..SUMS {
                sums[i] = sums[i] + a[i] * b[i];
            }
        }
        for (i, (a, b)) in a.remainder().iter().zip(b.remainder()).enumerate() {
            sums[i] = sums[i] + *a * *b;
        }
    }
    let mut half = SUMS / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] = sums[i] + sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// Where results go: one or more matrices that share C's rows or are stacked along them.
pub struct Out {
    parts: Vec<(MatMut, usize, f64)>,
    accumulate: bool,
    bias: Option<Mat>,
    dropout: Option<Dropout>,
}

impl Out {
    /// All of C goes to `mat` (added to it if `accumulate`).
    pub fn one(mat: MatMut, accumulate: bool) -> Self {
        Out {
            parts: vec![(mat, 0, 1.0)],
            accumulate,
            bias: None,
            dropout: None,
        }
    }

    /// Consecutive rows of C go to consecutive matrices, each multiplied by its factor.
    pub fn stacked(mats: impl IntoIterator<Item = (MatMut, f64)>) -> Self {
        let mut start = 0;
        let parts = mats
            .into_iter()
            .map(|(mat, scale)| {
                let part = (mat, start, scale);
                start += mat.mat().rows;
                part
            })
            .collect();
        Out {
            parts,
            accumulate: false,
            bias: None,
            dropout: None,
        }
    }

    /// A row [1, n] added to every row of the result.
    pub fn with_bias(mut self, bias: Option<Mat>) -> Self {
        self.bias = bias;
        self
    }

    /// Results are multiplied by the mask of their (row, column) before they are written.
    pub fn with_dropout(mut self, dropout: Option<Dropout>) -> Self {
        self.dropout = dropout;
        self
    }

    /// Base pointer and row stride, where a tile can be written as it stands in registers.
    fn direct<T: Real>(&self) -> Option<(MatMut, bool)> {
        match self.parts.as_slice() {
            [(mat, 0, scale)]
                if *scale == 1.0
                    && mat.mat().dtype == T::DTYPE
                    && mat.mat().cs == 1
                    && self.bias.is_none()
                    && self.dropout.is_none() =>
            {
                Some((*mat, self.accumulate))
            }
            _ => None,
        }
    }

    /// Writes C[rows, cols], given row-major with `cols.len()` elements a row.
    fn store<T: Real>(&self, rows: Range<usize>, cols: Range<usize>, c: &mut [T]) {
        let width = cols.len();
        if width == 0 {
            return;
        }
        vectorized(
            #[inline(always)]
            || {
                for (part, start, scale) in &self.parts {
                    let first = rows.start.max(*start);
                    let last = rows.end.min(start + part.mat().rows);
                    if first >= last {
                        continue;
                    }
                    for row in first..last {
                        let line = &mut c[(row - rows.start) * width..][..width];
                        if *scale != 1.0 {
                            let scale = T::from_f64(*scale);
                            line.iter_mut().for_each(|value| *value = *value * scale);
                        }
                        if let Some(dropout) = &self.dropout {
                            mask_line(dropout, row, cols.start, line);
                        }
                        if let Some(bias) = &self.bias {
                            with_float!(bias.dtype, E => {
                                for (value, column) in line.iter_mut().zip(cols.clone()) {
                                    // SAFETY: column < n, the bias' length, checked by the caller of `gemm`.
                                    *value = *value + unsafe { *bias.at::<E>(0, column) }.widen();
                                }
                            });
                        }
                    }
                    let block = &c[(first - rows.start) * width..][..(last - first) * width];
                    with_float!(part.mat().dtype, E => {
                        store_block::<E, T>(part, first - start, cols.start, width, block, self.accumulate)
                    });
                }
            },
        );
    }
}

#[inline(always)]
fn store_block<E: Stored, T: Real>(
    out: &MatMut,
    row0: usize,
    col0: usize,
    width: usize,
    block: &[T],
    accumulate: bool,
) {
    let put = |row: usize, col: usize, value: T| {
        let cell = out.at::<E>(row0 + row, col0 + col);
        // SAFETY: (row, col) lies inside the matrix, and threads write disjoint blocks of it
        // (`gemm` hands every (rows, cols) block to one task).
        unsafe {
            *cell = E::narrow(if accumulate {
                (*cell).widen::<T>() + value
            } else {
                value
            });
        }
    };
    if out.mat().rs.abs() < out.mat().cs.abs() {
        // Columns are (nearly) contiguous: go down them in strips, so that both sides stay in cache.
        let rows = block.len() / width;
        for strip in (0..rows).step_by(LINES) {
            let lines = &block[strip * width..];
            let count = LINES.min(rows - strip);
            if count == LINES && out.mat().rs == 1 && !accumulate {
                for col in 0..width {
                    let cells = out.at::<E>(row0 + strip, col0 + col);
                    // SAFETY: as in `put`; the column's cells are contiguous.
                    let cells = unsafe { &mut *cells.cast::<[E; LINES]>() };
                    for (j, cell) in cells.iter_mut().enumerate() {
                        *cell = E::narrow(lines[j * width + col]);
                    }
                }
                continue;
            }
            for col in 0..width {
                for j in 0..count {
                    put(strip + j, col, lines[j * width + col]);
                }
            }
        }
        return;
    }
    for (row, line) in block.chunks_exact(width).enumerate() {
        if out.mat().cs == 1 {
            let cells = out.at::<E>(row0 + row, col0);
            // SAFETY: as in `put`; the row's cells are contiguous.
            let cells = unsafe { std::slice::from_raw_parts_mut(cells, width) };
            if accumulate {
                for (cell, value) in cells.iter_mut().zip(line) {
                    *cell = E::narrow(cell.widen::<T>() + *value);
                }
            } else {
                for (cell, value) in cells.iter_mut().zip(line) {
                    *cell = E::narrow(*value);
                }
            }
        } else {
            for (col, value) in line.iter().enumerate() {
                put(row, col, *value);
            }
        }
    }
}

/// `out[j] = scale * mat[row, start + j]`.
#[inline(always)]
pub(super) fn load_line<T: Real>(mat: &Mat, row: usize, start: usize, scale: f64, out: &mut [T]) {
    if out.is_empty() {
        return;
    }
    with_float!(mat.dtype, E => {
        let first = mat.at::<E>(row, start);
        debug_assert!(start + out.len() <= mat.cols);
        if mat.cs == 1 {
            // SAFETY: `out.len()` elements from (row, start) on lie inside the row.
            E::widen_slice(unsafe { std::slice::from_raw_parts(first, out.len()) }, out);
        } else {
            for (j, value) in out.iter_mut().enumerate() {
                // SAFETY: (row, start + j) lies inside the matrix.
                *value = unsafe { *first.wrapping_offset(j as isize * mat.cs) }.widen();
            }
        }
    });
    if scale != 1.0 {
        let scale = T::from_f64(scale);
        out.iter_mut().for_each(|value| *value = *value * scale);
    }
}

/// `dst[i * ld + j] = scale * mat[rows.start + i, columns.start + j]`, reading along the rows.
#[inline(always)]
fn load_rows<T: Real>(
    mat: &Mat,
    rows: Range<usize>,
    columns: Range<usize>,
    scale: f64,
    dst: &mut [T],
    ld: usize,
) {
    let width = columns.len();
    if mat.cs != 1 {
        for (i, row) in rows.enumerate() {
            load_line(mat, row, columns.start, scale, &mut dst[i * ld..][..width]);
        }
        return;
    }
    let factor = T::from_f64(scale);
    with_float!(mat.dtype, E => {
        for (row, out) in rows.zip(dst.chunks_mut(ld)) {
            let out = &mut out[..width];
            // SAFETY: columns.start .. columns.end lie inside the row, whose elements are contiguous.
            let source = unsafe { std::slice::from_raw_parts(mat.at::<E>(row, columns.start), width) };
            E::widen_slice(source, out);
            if scale != 1.0 {
                out.iter_mut().for_each(|value| *value = *value * factor);
            }
        }
    });
}

/// `dst[i * ld + j] = scale * mat[rows.start + i, columns.start + j]`, reading down the columns, for a
/// matrix whose columns are contiguous.
#[inline(always)]
fn load_transposed<T: Real>(
    mat: &Mat,
    rows: Range<usize>,
    columns: Range<usize>,
    scale: f64,
    dst: &mut [T],
    ld: usize,
) {
    with_float!(mat.dtype, E => {
        for (group, first) in columns.clone().step_by(LINES).enumerate() {
            let count = LINES.min(columns.end - first);
            for start in rows.clone().step_by(CHUNK) {
                let length = CHUNK.min(rows.end - start);
                let dst = &mut dst[(start - rows.start) * ld + group * LINES..];
                // SAFETY: each column's elements start .. start + length lie inside the matrix and are
                // contiguous, since its row stride is 1 (checked by the caller's choice of this path).
                let column = |j: usize| unsafe {
                    std::slice::from_raw_parts(mat.at::<E>(start, first + j), length)
                };
                transpose_into::<E, T>(count, column, T::from_f64(scale), scale != 1.0, dst, ld);
            }
        }
    });
}

/// Columns that are interleaved at once.
const LINES: usize = 8;
/// Elements of a column that are converted at once.
const CHUNK: usize = 64;

/// `dst[i * ld + j] = factor * column(j)[i]` for up to eight columns of up to `CHUNK` elements.
#[inline(always)]
fn transpose_into<'a, E: Stored, T: Real>(
    count: usize,
    column: impl Fn(usize) -> &'a [E],
    factor: T,
    scaled: bool,
    dst: &mut [T],
    ld: usize,
) {
    let mut lines = [[T::default(); CHUNK]; LINES];
    let mut length = 0;
    for (j, line) in lines.iter_mut().enumerate().take(count) {
        let source = column(j);
        length = source.len();
        E::widen_slice(source, &mut line[..length]);
        if scaled {
            line[..length]
                .iter_mut()
                .for_each(|value| *value = *value * factor);
        }
    }
    for i in 0..length.min(CHUNK) {
        let out = &mut dst[i * ld..][..count];
        if let Ok(out) = <&mut [T; LINES]>::try_from(&mut *out) {
            for j in 0..LINES {
                out[j] = lines[j][i];
            }
        } else {
            for (value, line) in out.iter_mut().zip(&lines) {
                *value = line[i];
            }
        }
    }
}

/// Multiplies a piece of a row by its dropout factors.
#[inline(always)]
pub(super) fn mask_line<T: Real>(dropout: &Dropout, row: usize, start: usize, line: &mut [T]) {
    let scale = T::from_f64(dropout.scale);
    let mut done = 0;
    while done < line.len() {
        let column = start + done;
        let skip = column % DRAWS;
        let draws = dropout.draws_along_row(row, (column / DRAWS) as u32);
        let count = (LANES * DRAWS - skip).min(line.len() - done);
        for (value, draw) in line[done..done + count].iter_mut().zip(&draws[skip..]) {
            *value = if dropout.keeps(*draw) {
                *value * scale
            } else {
                T::default()
            };
        }
        done += count;
    }
}

/// Multiplies a packed panel by its dropout factors; the mask's rows run along k.
#[inline(always)]
fn mask_panel<T: Real>(
    dropout: &Dropout,
    ks: Range<usize>,
    cols: Range<usize>,
    nr: usize,
    dst: &mut [T],
) {
    let scale = T::from_f64(dropout.scale);
    let mut column = cols.start;
    while column < cols.end {
        let skip = column % DRAWS;
        let count = (DRAWS - skip).min(cols.end - column);
        for first in ks.clone().step_by(LANES) {
            let draws = dropout.draws_down_rows(first, (column / DRAWS) as u32);
            for lane in 0..LANES.min(ks.end - first) {
                let at = (first - ks.start + lane) * nr + column - cols.start;
                for (value, draw) in dst[at..at + count]
                    .iter_mut()
                    .zip(&draws[lane * DRAWS + skip..])
                {
                    *value = if dropout.keeps(*draw) {
                        *value * scale
                    } else {
                        T::default()
                    };
                }
            }
        }
        column += count;
    }
}

/// One L block times consecutive R panels, into C.
pub(super) struct Tiles<T> {
    pub(super) left: Block<T>,
    pub(super) rows: usize,
    pub(super) panels: *const T,
    /// Elements from one panel to the next.
    pub(super) panel_stride: usize,
    /// Elements from one row of a panel to the next.
    pub(super) row_stride: isize,
    pub(super) k: usize,
    pub(super) cols: usize,
    pub(super) c: *mut T,
    pub(super) ldc: isize,
    pub(super) accumulate: bool,
}

impl<T: Real> WithSimd for Tiles<T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let nr = VECTORS * size_of::<T::Vector<S>>() / size_of::<T>();
        for (panel, col) in (0..self.cols).step_by(nr).enumerate() {
            // SAFETY: the caller's panels cover ceil(cols / nr) times k x nr elements.
            let right = unsafe { self.panels.add(panel * self.panel_stride) };
            let width = nr.min(self.cols - col);
            let mut row = 0;
            while row < self.rows {
                let count = MR.min(self.rows - row);
                // SAFETY: rows row .. row + count and columns col .. col + width lie inside L and C
                // (contract of `Tiles`), and C's tile belongs to this task alone.
                unsafe {
                    match count {
                        6 => self.tile::<S, 6>(simd, right, row, col, width, nr),
                        5 => self.tile::<S, 5>(simd, right, row, col, width, nr),
                        4 => self.tile::<S, 4>(simd, right, row, col, width, nr),
                        3 => self.tile::<S, 3>(simd, right, row, col, width, nr),
                        2 => self.tile::<S, 2>(simd, right, row, col, width, nr),
                        _ => self.tile::<S, 1>(simd, right, row, col, width, nr),
                    }
                }
                row += count;
            }
        }
    }
}

impl<T: Real> Tiles<T> {
    /// # Safety
    /// `right` holds k x nr elements; rows `row .. row + ROWS` of L and the C tile
    /// [ROWS, width] at (row, col) are inside their memory.
    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize>(
        &self,
        simd: S,
        right: *const T,
        row: usize,
        col: usize,
        width: usize,
        nr: usize,
    ) {
        // SAFETY: every access below stays inside what the function's contract names: L at
        // (row + i, 0 .. k), the panel's k x nr elements, C at (row + i, col .. col + width).
        unsafe {
            let lanes = nr / VECTORS;
            let mut acc = [[T::splat(simd, T::default()); VECTORS]; ROWS];
            let mut left = self.left.data.wrapping_offset(row as isize * self.left.rs);
            let mut right = right;
            for _ in 0..self.k {
                let mut b = [T::splat(simd, T::default()); VECTORS];
                for (v, vector) in b.iter_mut().enumerate() {
                    *vector = right.add(v * lanes).cast::<T::Vector<S>>().read_unaligned();
                }
                for (i, sums) in acc.iter_mut().enumerate() {
                    let a = T::splat(simd, *left.wrapping_offset(i as isize * self.left.rs));
                    for (sum, vector) in sums.iter_mut().zip(&b) {
                        *sum = T::fma(simd, a, *vector, *sum);
                    }
                }
                left = left.wrapping_offset(self.left.cs);
                right = right.wrapping_offset(self.row_stride);
            }
            let c = self
                .c
                .wrapping_offset(row as isize * self.ldc)
                .wrapping_add(col);
            // Tests outside of the loops over the tile, so that these are unrolled and the sums stay in registers.
            if width == nr && self.accumulate {
                for (i, sums) in acc.iter().enumerate() {
                    let line = c.wrapping_offset(i as isize * self.ldc);
                    for (v, sum) in sums.iter().enumerate() {
                        let cell = line.add(v * lanes).cast::<T::Vector<S>>();
                        cell.write_unaligned(T::sum(simd, cell.read_unaligned(), *sum));
                    }
                }
            } else if width == nr {
                for (i, sums) in acc.iter().enumerate() {
                    let line = c.wrapping_offset(i as isize * self.ldc);
                    for (v, sum) in sums.iter().enumerate() {
                        let cell = line.add(v * lanes).cast::<T::Vector<S>>();
                        cell.write_unaligned(*sum);
                    }
                }
            } else {
                for (i, sums) in acc.iter().enumerate() {
                    let line = c.wrapping_offset(i as isize * self.ldc);
                    let mut buffer = [T::default(); MAX_NR];
                    for (v, sum) in sums.iter().enumerate() {
                        buffer
                            .as_mut_ptr()
                            .add(v * lanes)
                            .cast::<T::Vector<S>>()
                            .write_unaligned(*sum);
                    }
                    for (j, value) in buffer.iter().enumerate().take(width) {
                        let cell = line.add(j);
                        *cell = if self.accumulate {
                            *cell + *value
                        } else {
                            *value
                        };
                    }
                }
            }
        }
    }
}

/// Columns of a packed panel for the instruction set in use.
pub(crate) fn panel_width<T: Real>() -> usize {
    struct Width<T>(std::marker::PhantomData<T>);
    impl<T: Real> WithSimd for Width<T> {
        type Output = usize;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            VECTORS * size_of::<T::Vector<S>>() / size_of::<T>()
        }
    }
    Arch::new().dispatch(Width::<T>(std::marker::PhantomData))
}

/// C[m, n] = L[m, k] R[k, n], written to `out`: L says m and k, `out` says n.
pub fn gemm<T: Real>(op: &'static str, left: &Plain, right: &Parts, out: &Out) -> Result<()> {
    let product = Product {
        op,
        m: left.mat.rows,
        n: out.parts.first().map_or(0, |(mat, _, _)| mat.mat().cols),
        k: left.mat.cols,
        left,
        right,
        out,
    };
    product.run::<T>()
}

/// Depth blocks 0..KC, KC..2KC, ...; one empty block where k is zero, so that results are still written.
fn depth_blocks(k: usize) -> impl Iterator<Item = Range<usize>> {
    (0..k.max(1))
        .step_by(KC)
        .map(move |start| start..(start + KC).min(k))
}

/// A raw pointer that tasks share; each writes its own part.
pub(crate) struct Shared<T>(pub(crate) *mut T);
// SAFETY: users of `Shared` write disjoint ranges from different threads.
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    pub(crate) fn get(&self) -> *mut T {
        self.0
    }
}

/// What one task keeps from block to block: L in the compute type, and results on their way to `out`.
#[derive(Default)]
struct Scratch<T> {
    stage: Vec<T>,
    results: Vec<T>,
}

/// One call of [`gemm`].
#[derive(Clone, Copy)]
struct Product<'a> {
    op: &'static str,
    m: usize,
    n: usize,
    k: usize,
    left: &'a Plain,
    right: &'a Parts,
    out: &'a Out,
}

impl Product<'_> {
    fn run<T: Real>(&self) -> Result<()> {
        let Self { m, n, .. } = *self;
        if m == 0 || n == 0 {
            return Ok(());
        }
        if m <= FEW && self.right.dropout.is_none() {
            self.few_rows::<T>()
        } else if m >= n || (m >= MC && m * 8 >= n) {
            self.tall::<T>()
        } else {
            self.wide::<T>()
        }
    }

    /// Split between threads by rows, against a packed R that they share.
    fn tall<T: Real>(&self) -> Result<()> {
        let Self { op, m, n, k, .. } = *self;
        let nr = panel_width::<T>();
        let panel = k * nr;
        let per_pass = (SHARED_BYTES / (panel.max(1) * size_of::<T>())).clamp(1, n.div_ceil(nr));
        let mut packed = zeros::<T>(op, panel.saturating_mul(per_pass))?;
        let mut block_start = 0;
        while block_start < n {
            let block_cols = (per_pass * nr).min(n - block_start);
            let shared = Shared(packed.as_mut_ptr());
            parallel_for(
                op,
                block_cols.div_ceil(nr),
                (GRAIN / panel.max(1)).max(1),
                &|panels| {
                    for p in panels {
                        let first = block_start + p * nr;
                        let cols = first..(first + nr).min(block_start + block_cols);
                        // SAFETY: panel p of `packed` belongs to this iteration alone.
                        let dst = unsafe {
                            std::slice::from_raw_parts_mut(shared.get().add(p * panel), panel)
                        };
                        for ks in depth_blocks(k) {
                            self.right.pack(
                                ks.clone(),
                                cols.clone(),
                                nr,
                                &mut dst[ks.start * nr..ks.end * nr],
                            );
                        }
                    }
                },
            )?;
            let packed = packed.as_slice();
            let inner = if k <= KC { NC_SHALLOW } else { block_cols };
            parallel_for(op, m, (GRAIN / (block_cols * k.max(1))).max(MR), &|rows| {
                let mut scratch = Scratch::default();
                for first in rows.clone().step_by(MC) {
                    let rows = first..(first + MC).min(rows.end);
                    for sub in (0..block_cols).step_by(inner) {
                        let width = inner.min(block_cols - sub);
                        let cols = block_start + sub..block_start + sub + width;
                        let source = |_: &Range<usize>, ks: &Range<usize>| {
                            let first = packed[(sub / nr) * panel + ks.start * nr..].as_ptr();
                            (first, panel, nr as isize)
                        };
                        self.block(rows.clone(), cols, &mut scratch, source);
                    }
                }
            })?;
            block_start += block_cols;
        }
        Ok(())
    }

    /// Split between threads by columns, each packing its own part of R.
    fn wide<T: Real>(&self) -> Result<()> {
        let Self { op, m, n, k, .. } = *self;
        let nr = panel_width::<T>();
        // Every task reads all of L: where it must be converted, once for all.
        let direct = self.left.is_direct::<T>();
        let mut elements = zeros::<T>(op, if direct { 0 } else { m.saturating_mul(k) })?;
        let whole = self.left.block::<T>(0..m, 0..k, &mut elements);
        // SAFETY: the block covers [m, k] of L or of `elements`, which outlives it.
        let left = Plain::new(unsafe { Mat::from_raw(whole.data, m, k, whole.rs, whole.cs) });
        let converted = Product {
            left: &left,
            ..*self
        };
        let tasks = n.div_ceil(NC_WIDE);
        // Packing an element costs about as much as eight rows' multiply-adds with it.
        let grain = (GRAIN / (NC_WIDE * k.max(1) * (m + 8))).max(1);
        parallel_for(op, tasks, grain, &|tasks| {
            let mut scratch = Scratch::default();
            let mut packed = vec![T::default(); KC.min(k) * NC_WIDE.next_multiple_of(nr)];
            for task in tasks {
                let cols = task * NC_WIDE..((task + 1) * NC_WIDE).min(n);
                let source = |cols: &Range<usize>, ks: &Range<usize>| {
                    let panel = ks.len() * nr;
                    if m <= UNPACKED_ROWS
                        && cols.len().is_multiple_of(nr)
                        && let Some((data, row_stride)) = self.right.direct::<T>(ks, cols)
                    {
                        return (data, nr, row_stride);
                    }
                    for (p, first) in cols.clone().step_by(nr).enumerate() {
                        let part = first..(first + nr).min(cols.end);
                        self.right.pack(
                            ks.clone(),
                            part,
                            nr,
                            &mut packed[p * panel..(p + 1) * panel],
                        );
                    }
                    (packed.as_ptr(), panel, nr as isize)
                };
                converted.block(0..m, cols, &mut scratch, source);
            }
        })
    }

    /// At most `FEW` rows: R is read once, where it lies.
    fn few_rows<T: Real>(&self) -> Result<()> {
        let Self { op, m, n, k, .. } = *self;
        let mut lines = zeros::<T>(op, m.saturating_mul(k))?;
        for (row, line) in lines.chunks_exact_mut(k.max(1)).enumerate() {
            load_line(&self.left.mat, row, 0, 1.0, line);
            if let Some(dropout) = &self.left.dropout {
                mask_line(dropout, row, 0, line);
            }
        }
        let lines = lines.as_slice();
        let grain = (GRAIN / 2 / (NC_FEW * k.max(1))).max(1);
        parallel_for(op, n.div_ceil(NC_FEW), grain, &|tasks| {
            for task in tasks {
                let cols = task * NC_FEW..((task + 1) * NC_FEW).min(n);
                let mut results = [T::default(); FEW * NC_FEW];
                let results = &mut results[..m * cols.len()];
                vectorized(
                    #[inline(always)]
                    || self.right.add_products(lines, k, cols.clone(), results),
                );
                self.out.store(0..m, cols, results);
            }
        })
    }

    /// C[rows, cols], with R's panels for a depth block coming from `source`.
    fn block<T: Real>(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &mut Scratch<T>,
        mut source: impl FnMut(&Range<usize>, &Range<usize>) -> (*const T, usize, isize),
    ) {
        let Scratch { stage, results } = scratch;
        let direct = self.out.direct::<T>();
        let (c, ldc, mut accumulate) = match &direct {
            Some((mat, accumulate)) => (
                mat.at::<T>(rows.start, cols.start),
                mat.mat().rs,
                *accumulate,
            ),
            None => {
                results.resize(rows.len() * cols.len(), T::default());
                (results.as_mut_ptr(), cols.len() as isize, false)
            }
        };
        for ks in depth_blocks(self.k) {
            let (panels, panel_stride, row_stride) = source(&cols, &ks);
            let tiles = Tiles {
                left: self.left.block(rows.clone(), ks.clone(), stage),
                rows: rows.len(),
                panels,
                panel_stride,
                row_stride,
                k: ks.len(),
                cols: cols.len(),
                c,
                ldc,
                accumulate,
            };
            Arch::new().dispatch(tiles);
            accumulate = true;
        }
        if direct.is_none() {
            self.out.store(rows, cols, results);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;
    use half::{bf16, f16};

    fn value(i: usize) -> f64 {
        (((i * 7919 + 13) % 251) as f64 - 125.0) / 64.0
    }

    fn matrix<E: Stored>(rows: usize, cols: usize) -> Vec<E> {
        (0..rows * cols).map(|i| E::narrow(value(i))).collect()
    }

    fn view<E: Stored>(data: &[E], rows: usize, cols: usize) -> Mat {
        // SAFETY: test vectors outlive the views made of them.
        unsafe { Mat::from_raw(data.as_ptr(), rows, cols, cols as isize, 1) }
    }

    fn view_mut<E: Stored>(data: &mut [E], rows: usize, cols: usize) -> MatMut {
        // SAFETY: as above, and the test does not touch `data` while the view is used.
        unsafe { MatMut::from_raw(data.as_mut_ptr(), rows, cols, cols as isize, 1) }
    }

    fn check<E: Stored, T: Real>(m: usize, n: usize, k: usize, tolerance: f64) {
        let (a, b) = (matrix::<E>(m, k), matrix::<E>(k, n));
        for transposed in [false, true] {
            let bt: Vec<E> = (0..n * k).map(|i| b[(i % k) * n + i / k]).collect();
            let right = if transposed {
                Parts::one(view(&bt, n, k).t(), 0.5)
            } else {
                Parts::one(view(&b, k, n), 0.5)
            };
            let mut c: Vec<E> = vec![E::narrow(1.0f64); m * n];
            let out = Out::one(view_mut(&mut c, m, n), true);
            gemm::<T>("test", &Plain::new(view(&a, m, k)), &right, &out).unwrap();
            for i in 0..m {
                for j in 0..n {
                    let sum: f64 = (0..k)
                        .map(|l| a[i * k + l].widen::<f64>() * b[l * n + j].widen::<f64>())
                        .sum();
                    let expected = 1.0 + 0.5 * sum;
                    let got = c[i * n + j].widen::<f64>();
                    let scale = 1.0 + k as f64;
                    assert!(
                        (got - expected).abs() <= tolerance * scale,
                        "{m}x{n}x{k} [{i},{j}]: {got} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn products_of_every_type_and_awkward_size() {
        for (m, n, k) in [
            (1, 1, 1),
            (0, 5, 3),
            (5, 0, 3),
            (4, 5, 0),
            (7, 33, 300),
            (129, 127, 65),
            (200, 17, 513),
            (3, 200, 700),
        ] {
            check::<f32, f32>(m, n, k, 1e-6);
            check::<f64, f64>(m, n, k, 1e-14);
            check::<bf16, f32>(m, n, k, 1e-2);
            check::<f16, f32>(m, n, k, 2e-3);
        }
    }

    #[test]
    fn parts_stack_along_either_axis_with_their_factors() {
        let (m, k) = (9, 70);
        let (a, b1, b2) = (
            matrix::<f32>(m, k),
            matrix::<f32>(k, 3),
            matrix::<f32>(k, 20),
        );
        let mut c = vec![0.0f32; m * 23];
        let parts = Parts::stacked(
            Axis::Columns,
            [(view(&b1, k, 3), 2.0), (view(&b2, k, 20), -1.0)],
        );
        gemm::<f32>(
            "test",
            &Plain::new(view(&a, m, k)),
            &parts,
            &Out::one(view_mut(&mut c, m, 23), false),
        )
        .unwrap();
        let (l1, l2) = (matrix::<f32>(3, 11), matrix::<f32>(20, 11));
        let mut d = vec![0.0f32; m * 11];
        let rows = Parts::stacked(
            Axis::Rows,
            [(view(&l1, 3, 11), 1.0), (view(&l2, 20, 11), 3.0)],
        );
        gemm::<f32>(
            "test",
            &Plain::new(view(&c, m, 23)),
            &rows,
            &Out::one(view_mut(&mut d, m, 11), false),
        )
        .unwrap();
        for i in 0..m {
            let h: Vec<f64> = (0..23)
                .map(|r| {
                    (0..k)
                        .map(|l| {
                            f64::from(a[i * k + l])
                                * if r < 3 {
                                    2.0 * f64::from(b1[l * 3 + r])
                                } else {
                                    -f64::from(b2[l * 20 + r - 3])
                                }
                        })
                        .sum()
                })
                .collect();
            for j in 0..11 {
                let expected: f64 = (0..23)
                    .map(|r| {
                        h[r] * if r < 3 {
                            f64::from(l1[r * 11 + j])
                        } else {
                            3.0 * f64::from(l2[(r - 3) * 11 + j])
                        }
                    })
                    .sum();
                assert!(
                    (f64::from(d[i * 11 + j]) - expected).abs() < 1e-2,
                    "{} {expected}",
                    d[i * 11 + j]
                );
            }
        }
    }

    #[test]
    fn results_scatter_to_transposed_matrices() {
        let (k, n) = (40, 70);
        let (l, r) = (matrix::<f32>(k, 5), matrix::<f32>(k, n));
        let (mut first, mut second) = (vec![bf16::ZERO; n * 2], vec![bf16::ZERO; n * 3]);
        let out = Out::stacked([
            (view_mut(&mut first, n, 2).t(), 1.0),
            (view_mut(&mut second, n, 3).t(), 2.0),
        ]);
        gemm::<f32>(
            "test",
            &Plain::new(view(&l, k, 5).t()),
            &Parts::one(view(&r, k, n), 1.0),
            &out,
        )
        .unwrap();
        for j in 0..n {
            for i in 0..5 {
                let sum: f64 = (0..k)
                    .map(|t| f64::from(l[t * 5 + i]) * f64::from(r[t * n + j]))
                    .sum();
                let (got, expected) = if i < 2 {
                    (first[j * 2 + i], sum)
                } else {
                    (second[j * 3 + i - 2], 2.0 * sum)
                };
                assert!((got.to_f64() - expected).abs() < 5e-3 * expected.abs() + 1e-3);
            }
        }
    }

    #[test]
    fn masks_agree_wherever_they_are_applied() {
        let (m, k, n) = (37, 90, 10);
        let dropout = Dropout::new(0.4, [7, 3], 2);
        let x = matrix::<f32>(m, k);
        let mut masked = x.clone();
        for row in 0..m {
            mask_line(
                dropout.as_ref().unwrap(),
                row,
                0,
                &mut masked[row * k..(row + 1) * k],
            );
        }
        assert!(masked.iter().filter(|v| **v == 0.0).count() > m * k / 4);
        let w = matrix::<f32>(k, n);
        let run = |left: Plain, right: Parts, out_rows: usize, out_cols: usize| {
            let mut c = vec![0.0f32; out_rows * out_cols];
            gemm::<f32>(
                "test",
                &left,
                &right,
                &Out::one(view_mut(&mut c, out_rows, out_cols), false),
            )
            .unwrap();
            c
        };
        let a = run(
            Plain::with_dropout(view(&x, m, k), dropout),
            Parts::one(view(&w, k, n), 1.0),
            m,
            n,
        );
        let b = run(
            Plain::new(view(&masked, m, k)),
            Parts::one(view(&w, k, n), 1.0),
            m,
            n,
        );
        assert_eq!(a, b);
        let h = matrix::<f32>(m, 6);
        let a = run(
            Plain::new(view(&h, m, 6).t()),
            Parts::one(view(&x, m, k), 1.0).with_dropout(dropout),
            6,
            k,
        );
        let b = run(
            Plain::new(view(&h, m, 6).t()),
            Parts::one(view(&masked, m, k), 1.0),
            6,
            k,
        );
        assert_eq!(a, b);
        let ones = vec![1.0f32; m];
        let mut c = x.clone();
        let row = vec![1.0f32; k];
        let out = Out::one(view_mut(&mut c, m, k), true).with_dropout(dropout);
        gemm::<f32>(
            "test",
            &Plain::new(view(&ones, m, 1)),
            &Parts::one(view(&row, 1, k), 1.0),
            &out,
        )
        .unwrap();
        for (i, (value, start)) in c.iter().zip(&x).enumerate() {
            let factor = if masked[i] == 0.0 && x[i] != 0.0 {
                0.0
            } else {
                dropout.unwrap().scale as f32
            };
            if x[i] != 0.0 {
                assert_eq!(*value, start + factor);
            }
        }
    }

    #[test]
    fn the_thread_count_does_not_change_a_bit() {
        // `tall` splits by rows and `wide` by columns; a few rows alone must give the same bits.
        let (m, n, k) = (100, 40, 600);
        let (a, b) = (matrix::<f32>(m, k), matrix::<f32>(k, n));
        let mut c = vec![0.0f32; m * n];
        gemm::<f32>(
            "test",
            &Plain::new(view(&a, m, k)),
            &Parts::one(view(&b, k, n), 1.0),
            &Out::one(view_mut(&mut c, m, n), false),
        )
        .unwrap();
        for row in [0, 50, 94] {
            let mut some = vec![0.0f32; 6 * n];
            gemm::<f32>(
                "test",
                &Plain::new(view(&a[row * k..], 6, k)),
                &Parts::one(view(&b, k, n), 1.0),
                &Out::one(view_mut(&mut some, 6, n), false),
            )
            .unwrap();
            assert_eq!(some, c[row * n..(row + 6) * n]);
        }
        assert_eq!(view(&a, m, k).dtype, DType::F32);
    }
}
