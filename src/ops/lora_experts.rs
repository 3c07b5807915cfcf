//! `lora_experts`: K adapters on the experts of a mixture, for rows that are sorted by expert.
//!
//! Expert e has the rows `ends[e-1] .. ends[e]`. On them, with A_ke [r_k, I] and B_ke [O, r_k] its own factors,
//! Y = base + sum over k of s_k drop_k(X) A_ke^T B_ke^T; rows from `ends[E-1]` on belong to nobody and keep base.
//! Backward, expert by expert: dH_k = s_k dY B_ke, dB_ke = s_k dY^T H_k, dA_ke = dH_k^T drop_k(X) and
//! dX = sum over k of mask_k(dH_k A_ke).
//!
//! The work follows the rows: an expert that has none is not read. Tasks are a few rows of one expert, or for dA and
//! dB a few columns of some experts; how they are cut does not depend on the threads, so results do not either.

use super::arguments::{
    Adapters, check_adapters, check_dropout, check_in_features, check_out_features, matrix,
    same_device, same_dtype,
};
use crate::cpu::gemm::{GRAIN, KC, Shared};
use crate::cpu::grouped::{
    Dots, Lines, Spread, gather, lines_of, outer, padded, scatter, stage, store,
};
use crate::cpu::num::{Real, Stored};
use crate::cpu::zeros;
use crate::error::{Error, Result};
use crate::host::parallel_for;
use crate::philox::Dropout;
use crate::tensor::{DType, Device, Mat, MatMut, Stack, StackMut, TensorRef, require_float, shape};
use crate::with_float;
use std::ops::Range;

pub const OP: &str = "lora_experts";

/// Experts whose factors are gathered at once: in PEFT's layout of B, so many lie in one cache line of float32.
const GROUP: usize = 16;
/// Rows of a task: with some hundred columns of results they stay in the second-level cache.
const ROWS: usize = 48;
/// Columns of results that a task of rows makes at once.
const COLUMNS: usize = 256;
/// Columns of dA or dB that one task makes.
const FACTOR_COLUMNS: usize = 64;
/// Most elements of dA or dB that one task holds before it writes them.
const FACTOR_ELEMENTS: usize = 1 << 15;

/// Which rows an expert has.
pub struct Ends {
    /// The tensor, which a kernel reads.
    pub address: usize,
    pub dtype: DType,
    pub step: i64,
    /// On the CPU what it holds, checked: expert e has the rows `known[e] .. known[e + 1]`.
    known: Option<Vec<usize>>,
}

/// A checked call, forward or backward.
pub struct Call {
    /// Forward: what the results are added to.
    pub base: Option<Mat>,
    /// Backward: dL/dY.
    pub grad: Option<Mat>,
    /// Forward, and backward if dA is wanted.
    pub x: Option<Mat>,
    /// Backward, if dB is wanted.
    pub h: Option<Mat>,
    pub ends: Ends,
    /// `A[k]` as [E, r_k, I].
    pub a: Vec<Stack>,
    /// `B[k]` as [E, r_k, O].
    pub b: Vec<Stack>,
    /// What the experts have in common: the sizes and factors of the adapters.
    pub adapters: Adapters,
    pub dropout: Vec<Option<Dropout>>,
    pub rows: usize,
    pub in_features: usize,
    pub out_features: usize,
    pub h_dtype: DType,
}

/// Arguments that forward and backward share.
pub struct Args<'a> {
    pub ends: TensorRef<'a>,
    pub a: &'a [TensorRef<'a>],
    pub b: &'a [TensorRef<'a>],
    pub scaling: &'a [f64],
    pub dropout_p: f64,
    pub rng: Option<TensorRef<'a>>,
}

/// The forward pass: base [M, O] and x [M, I].
pub fn check_forward(base: &TensorRef<'_>, x: &TensorRef<'_>, args: &Args<'_>) -> Result<Call> {
    require_float(OP, "x", x)?;
    let x_mat = matrix(OP, "x", x, "[rows, in_features]")?;
    same_device(OP, "base", base, x.device(), "x")?;
    same_dtype(OP, "base", base, x.dtype(), "x")?;
    let base_mat = matrix(OP, "base", base, "[rows, out_features]")?;
    if base_mat.rows != x_mat.rows {
        return Err(Error::argument(
            OP,
            format!(
                "base is {} but x is {}: they must have the same rows",
                shape(base.sizes()),
                shape(x.sizes())
            ),
        ));
    }
    let call = check("x", x, args)?;
    check_in_features(OP, "x", x.sizes(), x_mat.cols, &call.adapters)?;
    check_out_features(OP, "base", base.sizes(), base_mat.cols, &call.adapters)?;
    Ok(Call {
        base: Some(base_mat),
        x: Some(x_mat),
        ..call
    })
}

/// The backward pass: grad [M, O]; x [M, I] for dA and h [M, R] for dB, where those are wanted.
pub fn check_backward(
    grad: &TensorRef<'_>,
    x: Option<&TensorRef<'_>>,
    h: Option<&TensorRef<'_>>,
    args: &Args<'_>,
) -> Result<Call> {
    require_float(OP, "grad", grad)?;
    let grad_mat = matrix(OP, "grad", grad, "[rows, out_features]")?;
    let call = check("grad", grad, args)?;
    check_out_features(OP, "grad", grad.sizes(), grad_mat.cols, &call.adapters)?;
    let r = call.adapters.total_r();
    let of_grad = |name: &str, tensor: &TensorRef<'_>, columns: usize| -> Result<Mat> {
        require_float(OP, name, tensor)?;
        same_device(OP, name, tensor, grad.device(), "grad")?;
        let mat = matrix(OP, name, tensor, "[rows, features]")?;
        if (mat.rows, mat.cols) == (grad_mat.rows, columns) {
            return Ok(mat);
        }
        Err(Error::argument(
            OP,
            format!(
                "{name} is {} but must be [{}, {columns}]",
                shape(tensor.sizes()),
                grad_mat.rows
            ),
        ))
    };
    if let Some(x) = x {
        same_dtype(OP, "grad", grad, x.dtype(), "x")?;
    }
    let x = x.map(|x| of_grad("x", x, call.in_features)).transpose()?;
    let h = h.map(|h| of_grad("h", h, r)).transpose()?;
    Ok(Call {
        grad: Some(grad_mat),
        x,
        h,
        ..call
    })
}

/// All but the rows' own arguments, of which `like` is one: its rows, dtype and device are those of the call.
fn check(name: &str, like: &TensorRef<'_>, args: &Args<'_>) -> Result<Call> {
    let rows = like.sizes().first().map_or(0, |&rows| rows.max(0) as usize);
    let experts = check_ends_shape(&args.ends, like.device(), name)?;
    let a = of_one_expert("A", args.a, experts, "[experts, r, in_features]")?;
    let b = of_one_expert("B", args.b, experts, "[experts, out_features, r]")?;
    let adapters = check_adapters(OP, (name, like), Some(&a), Some(&b), Some(args.scaling))?;
    let (in_features, out_features) = (
        adapters.a.first().map_or(0, |a| a.cols),
        adapters.b.first().map_or(0, |b| b.rows),
    );
    check_in_features(OP, "A[0]", a[0].sizes(), in_features, &adapters)?;
    check_out_features(OP, "B[0]", b[0].sizes(), out_features, &adapters)?;
    let dropout = check_dropout(
        OP,
        args.dropout_p,
        args.rng.as_ref(),
        like.device(),
        args.a.len(),
    )?;
    let stacks = |tensors: &[TensorRef<'_>]| -> Result<Vec<Stack>> {
        let stacks = tensors.iter().map(|t| t.stack());
        stacks.collect::<Option<_>>().ok_or(Error::Internal {
            op: OP,
            what: "a factor changed after it was checked".into(),
        })
    };
    Ok(Call {
        base: None,
        grad: None,
        x: None,
        h: None,
        ends: read_ends(&args.ends, rows)?,
        a: stacks(args.a)?,
        b: stacks(args.b)?.into_iter().map(Stack::t).collect(),
        h_dtype: like.dtype().promote(adapters.dtype),
        adapters,
        dropout,
        rows,
        in_features,
        out_features,
    })
}

/// The first expert's matrix of each factor, whose sizes and layout are those of all.
fn of_one_expert<'a>(
    name: &str,
    tensors: &[TensorRef<'a>],
    experts: usize,
    meaning: &str,
) -> Result<Vec<TensorRef<'a>>> {
    let first = tensors.iter().enumerate().map(|(k, tensor)| {
        let sizes = tensor.sizes();
        if sizes.len() != 3 || sizes[0] != experts as i64 {
            return Err(Error::argument(
                OP,
                format!(
                    "{name}[{k}] is {}; it must be {meaning} with ends' {experts} experts",
                    shape(sizes)
                ),
            ));
        }
        // SAFETY: the first matrix of a view that upholds the contract; with no expert it is not read.
        Ok(unsafe {
            TensorRef::new(
                tensor.data(),
                &sizes[1..],
                &tensor.strides()[1..],
                tensor.dtype(),
                tensor.device(),
            )
        })
    });
    first.collect()
}

fn check_ends_shape(ends: &TensorRef<'_>, device: Device, name: &str) -> Result<usize> {
    same_device(OP, "ends", ends, device, name)?;
    match (ends.dtype(), ends.sizes()) {
        (DType::I32 | DType::I64, &[experts]) => Ok(experts.max(0) as usize),
        (dtype, sizes) => Err(Error::argument(
            OP,
            format!(
                "ends is {dtype} of {}; it must be int32 or int64 [experts], the row after each expert's last",
                shape(sizes)
            ),
        )),
    }
}

/// On the CPU with the values, checked; a device is not asked for them.
fn read_ends(ends: &TensorRef<'_>, rows: usize) -> Result<Ends> {
    let (experts, step) = (ends.sizes()[0], ends.strides()[0]);
    let there = |known| Ends {
        address: ends.data() as usize,
        dtype: ends.dtype(),
        step,
        known,
    };
    if ends.device() != Device::Cpu {
        return Ok(there(None));
    }
    let mut bounds = vec![0];
    for e in 0..experts {
        let at = (e * step) as isize;
        // SAFETY: element e of a view of this dtype, which upholds the contract of `TensorRef`.
        let end = unsafe {
            match ends.dtype() {
                DType::I32 => i64::from(*ends.data().cast::<i32>().wrapping_offset(at)),
                _ => *ends.data().cast::<i64>().wrapping_offset(at),
            }
        };
        let last = bounds[bounds.len() - 1];
        let fits = usize::try_from(end).is_ok_and(|end| (last..=rows).contains(&end));
        if !fits {
            return Err(Error::argument(
                OP,
                format!(
                    "ends[{e}] is {end}; it must be at least {last}, where the expert before ends, and at most the {rows} rows of x"
                ),
            ));
        }
        bounds.push(end as usize);
    }
    Ok(there(Some(bounds)))
}

/// Where the wanted gradients go; `None` is not computed.
#[derive(Default)]
pub struct Gradients {
    /// [M, I], of x's dtype.
    pub x: Option<MatMut>,
    /// Each like `A[k]`, [E, r_k, I].
    pub a: Option<Vec<StackMut>>,
    /// Each like `B[k]`, [E, O, r_k].
    pub b: Option<Vec<StackMut>>,
}

/// Rows of one expert, which is number `member` of a group.
struct Task {
    member: usize,
    rows: Range<usize>,
}

/// The factors of a group of experts, as lines: member i's A_k at `a[i][k]`, its s_k B_k one under the other at `b[i]`.
struct Gathered<T> {
    a: Vec<Vec<Lines<T>>>,
    b: Vec<Lines<T>>,
    /// What had to be copied, which the lines point into.
    _memory: Vec<T>,
}

impl Call {
    /// Computes the output into `y` [M, O] and the adapters' inner products into `h` [M, R].
    pub fn run(&self, y: MatMut, h: MatMut) -> Result<()> {
        if self.computes_in_f64() {
            self.forward::<f64>(y, h)
        } else {
            self.forward::<f32>(y, h)
        }
    }

    /// Computes the gradients that `out` asks for.
    pub fn run_backward(&self, out: &Gradients) -> Result<()> {
        if self.computes_in_f64() {
            self.backward::<f64>(out)
        } else {
            self.backward::<f32>(out)
        }
    }

    /// Fails where a gradient is wanted without what it is computed from.
    pub fn check_wanted(&self, a: bool, b: bool) -> Result<()> {
        let missing = match (a && self.x.is_none(), b && self.h.is_none()) {
            (true, _) => "x is None, but dA is wanted and needs it",
            (_, true) => "h is None, but dB is wanted and needs it",
            _ => return Ok(()),
        };
        Err(Error::argument(OP, missing))
    }

    fn computes_in_f64(&self) -> bool {
        let h = self.h.map_or(self.h_dtype, |h| h.dtype);
        [self.h_dtype, h].contains(&DType::F64)
    }

    fn bounds(&self) -> Result<&[usize]> {
        self.ends.known.as_deref().ok_or_else(|| Error::Internal {
            op: OP,
            what: "ends is on a device".into(),
        })
    }

    /// An argument that this pass cannot do without.
    pub fn given(&self, mat: Option<Mat>, name: &str) -> Result<Mat> {
        mat.ok_or_else(|| Error::Internal {
            op: OP,
            what: format!("{name} is missing"),
        })
    }

    /// The experts that have rows, in groups, with the group's rows cut into tasks.
    fn groups(&self) -> Result<Vec<(Vec<usize>, Vec<Task>)>> {
        let bounds = self.bounds()?;
        let busy: Vec<usize> = (0..bounds.len() - 1)
            .filter(|&e| bounds[e] < bounds[e + 1])
            .collect();
        let groups = busy.chunks(GROUP).map(|experts| {
            let tasks = experts.iter().enumerate().flat_map(|(member, &e)| {
                let end = bounds[e + 1];
                (bounds[e]..end).step_by(ROWS).map(move |first| Task {
                    member,
                    rows: first..(first + ROWS).min(end),
                })
            });
            (experts.to_vec(), tasks.collect())
        });
        Ok(groups.collect())
    }

    /// The rows from which on there is no expert.
    fn unrouted(&self) -> Result<Range<usize>> {
        let end = self.bounds()?.last().copied().unwrap_or(0);
        Ok(end..self.rows)
    }

    fn gathered<T: Real>(
        &self,
        experts: &[usize],
        with_a: bool,
        with_b: bool,
    ) -> Result<Gathered<T>> {
        let columns = self.adapters.columns();
        let r = self.adapters.total_r();
        // One more line of the cache: rows a power of two apart would fall on each other in it.
        let pitch = |n: usize| padded::<T>(n) + 64 / size_of::<T>();
        let (lda, ldb) = (pitch(self.in_features), pitch(self.out_features));
        // A factor that is made of lines already is read where it lies.
        let direct = |stack: &Stack, e: usize| lines_of::<T>(&stack.at(e));
        let copied: Vec<usize> = (0..self.a.len())
            .filter(|&k| with_a && direct(&self.a[k], experts[0]).is_none())
            .collect();
        let copied_ranks: usize = copied.iter().map(|&k| columns[k].len()).sum();
        let of_b = if with_b { r * ldb } else { 0 };
        let each = (copied_ranks * lda).saturating_add(of_b);
        let mut memory = zeros::<T>(OP, each.saturating_mul(experts.len()))?;
        let shared = Shared(memory.as_mut_ptr());
        let mut a_start = vec![0; self.a.len()];
        let mut at = of_b;
        for &k in &copied {
            a_start[k] = at;
            at += columns[k].len() * lda;
        }
        let block =
            |task: usize, n: usize| task * FACTOR_COLUMNS..((task + 1) * FACTOR_COLUMNS).min(n);
        let grain = (GRAIN / 4 / (FACTOR_COLUMNS * r.max(1) * experts.len())).max(1);
        if with_b {
            let tasks = self.out_features.div_ceil(FACTOR_COLUMNS);
            parallel_for(OP, tasks, grain, &|tasks| {
                for columns_of_b in tasks.map(|task| block(task, self.out_features)) {
                    for ((stack, ranks), s) in
                        self.b.iter().zip(&columns).zip(&self.adapters.scaling)
                    {
                        // SAFETY: member i has `each` elements from i * each on, r rows of B first; these columns
                        // are this task's own.
                        unsafe {
                            gather(stack, experts, columns_of_b.clone(), *s, ldb, |i| {
                                shared.get().add(i * each + ranks.start * ldb)
                            });
                        }
                    }
                }
            })?;
        }
        if !copied.is_empty() {
            let tasks = self.in_features.div_ceil(FACTOR_COLUMNS);
            parallel_for(OP, tasks, grain, &|tasks| {
                for columns_of_a in tasks.map(|task| block(task, self.in_features)) {
                    for &k in &copied {
                        // SAFETY: as above; adapter k's rows of A begin at `a_start[k]`.
                        unsafe {
                            gather(&self.a[k], experts, columns_of_a.clone(), 1.0, lda, |i| {
                                shared.get().add(i * each + a_start[k])
                            });
                        }
                    }
                }
            })?;
        }
        let line = |i: usize, start: usize, ld: usize| Lines {
            data: memory.as_ptr().wrapping_add(i * each + start),
            ld: ld as isize,
        };
        let a = experts.iter().enumerate().map(|(i, &e)| {
            let of_k = |k: usize| direct(&self.a[k], e).unwrap_or_else(|| line(i, a_start[k], lda));
            (0..self.a.len()).map(of_k).collect()
        });
        Ok(Gathered {
            a: if with_a { a.collect() } else { Vec::new() },
            b: (0..experts.len()).map(|i| line(i, 0, ldb)).collect(),
            _memory: memory,
        })
    }

    /// Tasks that one thread takes at least: each row meets all R ranks with both its features.
    fn grain(&self, tasks: &[Task]) -> usize {
        let of_row = self.adapters.total_r().max(1) * (self.in_features + self.out_features);
        let rows: usize = tasks.iter().map(|task| task.rows.len()).sum();
        (GRAIN * tasks.len() / (rows * of_row).max(1)).max(1)
    }

    // ---- forward ----

    fn forward<T: Real>(&self, y: MatMut, h: MatMut) -> Result<()> {
        let (base, x) = (self.given(self.base, "base")?, self.given(self.x, "x")?);
        for (experts, tasks) in self.groups()? {
            let factors = self.gathered::<T>(&experts, true, true)?;
            parallel_for(OP, tasks.len(), self.grain(&tasks), &|range| {
                let mut scratch = Scratch::default();
                for task in &tasks[range] {
                    self.forward_rows(base, x, &factors, task, y, h, &mut scratch);
                }
            })?;
        }
        let rest = self.unrouted()?;
        let grain = (GRAIN / 8 / (self.out_features + 1)).max(1);
        parallel_for(OP, rest.len(), grain, &|range| {
            for row in range.map(|i| rest.start + i) {
                copy_row(&base, &y, row, 0..self.out_features);
                zero_row(&h, row);
            }
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn forward_rows<T: Real>(
        &self,
        base: Mat,
        x: Mat,
        factors: &Gathered<T>,
        task: &Task,
        y: MatMut,
        h: MatMut,
        scratch: &mut Scratch<T>,
    ) {
        let (rows, m) = (task.rows.clone(), task.rows.len());
        let r = self.adapters.total_r();
        let Scratch {
            staged,
            ranks,
            results,
        } = scratch;
        ranks.clear();
        ranks.resize(m * r, T::default());
        let mut lines = None;
        for (k, columns) in self.adapters.columns().into_iter().enumerate() {
            let dropout = self.dropout[k].as_ref();
            if lines.is_none() || dropout.is_some() {
                lines = Some(rows_of(&x, rows.clone(), dropout, staged));
            }
            let Some(x) = lines else { continue };
            // SAFETY: m rows of x and r_k of A with I features, padded; `ranks` has m rows of R.
            unsafe {
                Dots {
                    x,
                    rows: m,
                    f: factors.a[task.member][k],
                    columns: columns.len(),
                    n: padded::<T>(self.in_features),
                    c: ranks.as_mut_ptr().add(columns.start),
                    ldc: r,
                }
                .run();
            }
        }
        store(&h, None, rows.start, 0, r, ranks);
        let direct = y.mat().dtype == T::DTYPE;
        for first in (0..self.out_features).step_by(COLUMNS) {
            let columns = first..(first + COLUMNS).min(self.out_features);
            let width = columns.len();
            let (c, ldc, source) = if direct {
                let c = y.at::<T>(rows.start, first);
                (
                    c,
                    y.mat().rs,
                    Some(source_of(&base, &y, rows.clone(), columns)),
                )
            } else {
                results.resize(m * width, T::default());
                (results.as_mut_ptr(), width as isize, None)
            };
            let spread = Spread {
                h: ranks.as_ptr(),
                ldh: r,
                rows: m,
                f: factors.b[task.member].from(0, first),
                depth: r,
                source,
                c,
                ldc,
                width,
            };
            // SAFETY: `ranks` is [m, R], B's lines are padded, and these cells of y or `results` are this task's own.
            unsafe { spread.run() };
            if !direct {
                store(&y, Some(&base), rows.start, first, width, results);
            }
        }
    }

    // ---- backward ----

    fn backward<T: Real>(&self, out: &Gradients) -> Result<()> {
        let grad = self.given(self.grad, "grad")?;
        let r = self.adapters.total_r();
        let needs_dh = out.x.is_some() || out.a.is_some();
        let mut dh = zeros::<T>(
            OP,
            if needs_dh {
                self.rows.saturating_mul(r)
            } else {
                0
            },
        )?;
        let shared = Shared(dh.as_mut_ptr());
        if needs_dh {
            for (experts, tasks) in self.groups()? {
                let factors = self.gathered::<T>(&experts, out.x.is_some(), true)?;
                parallel_for(OP, tasks.len(), self.grain(&tasks), &|range| {
                    let mut scratch = Scratch::default();
                    for task in &tasks[range] {
                        // SAFETY: rows of dH that this task alone has.
                        let ranks = unsafe { shared.get().add(task.rows.start * r) };
                        self.backward_rows(grad, &factors, task, ranks, out.x, &mut scratch);
                    }
                })?;
            }
        }
        if let Some(dx) = &out.x {
            for row in self.unrouted()? {
                zero_row(dx, row);
            }
        }
        let all = 0..r;
        if let (Some(da), Some(x)) = (&out.a, self.x) {
            let dh = Lines {
                data: dh.as_ptr(),
                ld: r as isize,
            };
            let columns = self.adapters.columns();
            let mut sinks: Vec<Sink> = (0..da.len())
                .map(|k| Sink::new(da[k], columns[k].start, 1.0))
                .collect();
            if self.dropout.iter().all(Option::is_none) {
                self.factors(dh, all.clone(), x, None, &sinks)?;
            } else {
                // Each adapter sees its own mask of X.
                for (k, sink) in sinks.iter_mut().enumerate() {
                    sink.start = 0;
                    let (ranks, dropout) = (columns[k].clone(), self.dropout[k].as_ref());
                    self.factors(dh, ranks, x, dropout, std::slice::from_ref(sink))?;
                }
            }
        }
        if let (Some(db), Some(h)) = (&out.b, self.h) {
            let (columns, scaling) = (self.adapters.columns(), &self.adapters.scaling);
            let sinks: Vec<Sink> = (0..db.len())
                .map(|k| Sink::new(db[k].t(), columns[k].start, scaling[k]))
                .collect();
            let mut staged = Vec::<T>::new();
            // Only its elements are read: no tile reaches beyond a row of H.
            let h = if h.dtype == T::DTYPE && h.cs == 1 {
                Lines {
                    data: h.data().cast(),
                    ld: h.rs,
                }
            } else {
                stage(&h, 0..self.rows, 0..r, None, &mut staged)
            };
            self.factors(h, all, grad, None, &sinks)?;
        }
        Ok(())
    }

    /// dH of a task's rows, and from it dX.
    fn backward_rows<T: Real>(
        &self,
        grad: Mat,
        factors: &Gathered<T>,
        task: &Task,
        dh: *mut T,
        dx: Option<MatMut>,
        scratch: &mut Scratch<T>,
    ) {
        let (rows, m) = (task.rows.clone(), task.rows.len());
        let r = self.adapters.total_r();
        let Scratch {
            staged, results, ..
        } = scratch;
        // SAFETY: m rows of dY and R of s B with O features, padded; `dh` has m rows of R.
        unsafe {
            Dots {
                x: rows_of(&grad, rows.clone(), None, staged),
                rows: m,
                f: factors.b[task.member],
                columns: r,
                n: padded::<T>(self.out_features),
                c: dh,
                ldc: r,
            }
            .run();
        }
        let Some(dx) = dx else { return };
        let masked = self.dropout.iter().any(Option::is_some);
        let direct = dx.mat().dtype == T::DTYPE && !masked;
        for first in (0..self.in_features).step_by(COLUMNS) {
            let width = COLUMNS.min(self.in_features - first);
            let (c, ldc) = if direct {
                (dx.at::<T>(rows.start, first), dx.mat().rs)
            } else {
                results.resize(m * width, T::default());
                (results.as_mut_ptr(), width as isize)
            };
            for (k, columns) in self.adapters.columns().into_iter().enumerate() {
                let spread = Spread {
                    h: dh.wrapping_add(columns.start),
                    ldh: r,
                    rows: m,
                    f: factors.a[task.member][k].from(0, first),
                    depth: columns.len(),
                    source: (k > 0).then_some(Lines { data: c, ld: ldc }),
                    c,
                    ldc,
                    width,
                };
                let Some(dropout) = &self.dropout[k] else {
                    // SAFETY: dH is [m, R], A's lines are padded, and these cells of dX or `results` are the task's own.
                    unsafe { spread.run() };
                    continue;
                };
                staged.clear();
                staged.resize(m * width, T::default());
                // SAFETY: as above; `staged` is [m, width].
                unsafe {
                    Spread {
                        source: None,
                        c: staged.as_mut_ptr(),
                        ldc: width as isize,
                        ..spread
                    }
                    .run();
                }
                add_masked(dropout, rows.start, first, width, staged, results, k > 0);
            }
            if !direct {
                store(&dx, None, rows.start, first, width, results);
            }
        }
    }

    /// For every expert `sink[ranks] = scale (left[rows, ranks])^T right[rows, :]`, an expert without rows getting zeros.
    fn factors<T: Real>(
        &self,
        left: Lines<T>,
        ranks: Range<usize>,
        right: Mat,
        dropout: Option<&Dropout>,
        sinks: &[Sink],
    ) -> Result<()> {
        let bounds = self.bounds()?;
        let (experts, n, r) = (bounds.len() - 1, right.cols, ranks.len());
        let group = (FACTOR_ELEMENTS / (FACTOR_COLUMNS * r.max(1))).clamp(1, GROUP);
        let blocks = n.div_ceil(FACTOR_COLUMNS);
        let average = self.rows * group / experts.max(1);
        let cost = FACTOR_COLUMNS * r.max(1) * (average + 8 * group);
        let direct = lines_of::<T>(&right).filter(|_| dropout.is_none());
        parallel_for(
            OP,
            experts.div_ceil(group) * blocks,
            (GRAIN / cost).max(1),
            &|tasks| {
                let (mut staged, mut sums) = (Vec::new(), Vec::new());
                for task in tasks {
                    let first = task / blocks * group;
                    let members = first..(first + group).min(experts);
                    let column = task % blocks * FACTOR_COLUMNS;
                    let columns = column..(column + FACTOR_COLUMNS).min(n);
                    let width = columns.len();
                    sums.clear();
                    sums.resize(members.len() * r * width, T::default());
                    for e in members.clone() {
                        let c = sums[(e - first) * r * width..].as_mut_ptr();
                        for start in (bounds[e]..bounds[e + 1]).step_by(KC) {
                            let rows = start..(start + KC).min(bounds[e + 1]);
                            let lines = direct.map_or_else(
                                || {
                                    stage(
                                        &right,
                                        rows.clone(),
                                        columns.clone(),
                                        dropout,
                                        &mut staged,
                                    )
                                },
                                |lines| lines.from(start, column),
                            );
                            let of_rows = left.from(start, ranks.start);
                            // SAFETY: the rows lie inside both operands, `right`'s lines are readable up to whole tiles,
                            // and `sums` has r rows of `width` for each member.
                            unsafe {
                                outer(
                                    of_rows.data,
                                    of_rows.ld,
                                    rows.len(),
                                    lines,
                                    r,
                                    c,
                                    width,
                                    width,
                                );
                            }
                        }
                    }
                    for sink in sinks {
                        let from = |i: usize| sums[(i * r + sink.start) * width..].as_ptr();
                        // SAFETY: member i's sums are r rows of `width`; these columns of these experts are this task's own.
                        unsafe {
                            scatter(
                                &sink.stack,
                                members.clone(),
                                columns.clone(),
                                sink.scale,
                                width,
                                from,
                            );
                        }
                    }
                }
            },
        )
    }
}

/// Memory that a thread's tasks use one after the other.
#[derive(Default)]
struct Scratch<T> {
    staged: Vec<T>,
    ranks: Vec<T>,
    results: Vec<T>,
}

/// Where the ranks from `start` on of a product go: dA_k as it is, dB_k with its last two sizes exchanged.
struct Sink {
    stack: StackMut,
    start: usize,
    scale: f64,
}

impl Sink {
    fn new(stack: StackMut, start: usize, scale: f64) -> Self {
        Sink {
            stack,
            start,
            scale,
        }
    }
}

/// Rows as lines: where they lie, or staged.
fn rows_of<T: Real>(
    mat: &Mat,
    rows: Range<usize>,
    dropout: Option<&Dropout>,
    staged: &mut Vec<T>,
) -> Lines<T> {
    match lines_of::<T>(mat) {
        Some(lines) if dropout.is_none() => lines.from(rows.start, 0),
        _ => stage(mat, rows, 0..mat.cols, dropout, staged),
    }
}

/// Base where it lies; or in y, where it has none of its rows side by side.
fn source_of<T: Real>(
    base: &Mat,
    y: &MatMut,
    rows: Range<usize>,
    columns: Range<usize>,
) -> Lines<T> {
    let from = if base.cs == 1 {
        *base
    } else {
        for row in rows.clone() {
            copy_row(base, y, row, columns.clone());
        }
        *y.mat()
    };
    Lines {
        data: from.at::<T>(rows.start, columns.start),
        ld: from.rs,
    }
}

/// `sums (+)= mask(part)` for the mask's rows from `row0` and columns from `column0` on.
fn add_masked<T: Real>(
    dropout: &Dropout,
    row0: usize,
    column0: usize,
    width: usize,
    part: &mut [T],
    sums: &mut [T],
    accumulate: bool,
) {
    crate::cpu::grouped::mask(dropout, row0, column0, width, part);
    for (sum, value) in sums.iter_mut().zip(part.iter()) {
        *sum = if accumulate { *sum + *value } else { *value };
    }
}

fn copy_row(from: &Mat, to: &MatMut, row: usize, columns: Range<usize>) {
    with_float!(from.dtype, E => {
        if columns.is_empty() {
            return;
        }
        let (source, target) = (from.at::<E>(row, columns.start), to.at::<E>(row, columns.start));
        if from.cs == 1 {
            // SAFETY: these columns of the row lie inside both matrices, side by side (`to` is new); one task a row.
            unsafe { std::ptr::copy_nonoverlapping(source, target, columns.len()) };
            return;
        }
        for j in 0..columns.len() {
            // SAFETY: as above.
            unsafe { *target.wrapping_add(j) = *source.wrapping_offset(j as isize * from.cs) };
        }
    });
}

fn zero_row(mat: &MatMut, row: usize) {
    with_float!(mat.mat().dtype, E => {
        for column in 0..mat.mat().cols {
            // SAFETY: inside the matrix, in a row that no other task writes.
            unsafe { *mat.at::<E>(row, column) = E::narrow(0.0f32) };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{Owned, noise};

    fn view_of(ends: &[i64]) -> TensorRef<'_> {
        let sizes = Box::leak(Box::new([ends.len() as i64]));
        // SAFETY: the slice has these sizes and outlives the view.
        unsafe { TensorRef::new(ends.as_ptr().cast(), sizes, &[1], DType::I64, Device::Cpu) }
    }

    fn wide<E: Stored>(t: &Owned<E>) -> Vec<f64> {
        t.data.iter().map(|v| v.widen()).collect()
    }

    fn matches<E: Stored>(tolerance: f64) {
        for (ends, m, i, o, r) in [
            (vec![1], 1, 1, 1, 1),
            (vec![3, 3, 60], 64, 40, 33, 5),
            (vec![0, 130], 130, 64, 300, 16),
        ] {
            let experts = ends.len();
            let (x, base) = (
                Owned::<E>::new(&[m, i], noise(1)),
                Owned::<E>::new(&[m, o], noise(2)),
            );
            let a = Owned::<E>::new(&[experts, r, i], noise(3));
            let b = Owned::<E>::new(&[experts, o, r], noise(4));
            let (mut y, mut h) = (
                Owned::<E>::new(&[m, o], |_| f64::NAN),
                Owned::<E>::new(&[m, r], |_| f64::NAN),
            );
            let args = Args {
                ends: view_of(&ends),
                a: &[a.view()],
                b: &[b.view()],
                scaling: &[2.0],
                dropout_p: 0.0,
                rng: None,
            };
            let call = check_forward(&base.view(), &x.view(), &args).unwrap();
            call.run(y.view_mut().rows().unwrap(), h.view_mut().rows().unwrap())
                .unwrap();
            let (xs, aa, bb, mut want) = (wide(&x), wide(&a), wide(&b), wide(&base));
            for t in 0..*ends.last().unwrap() as usize {
                let e = ends.iter().position(|&end| (t as i64) < end).unwrap();
                for p in 0..o {
                    for k in 0..r {
                        let inner: f64 = (0..i)
                            .map(|q| xs[t * i + q] * aa[(e * r + k) * i + q])
                            .sum();
                        want[t * o + p] += 2.0 * inner * bb[(e * o + p) * r + k];
                    }
                }
            }
            let norm = want.iter().map(|v| v * v).sum::<f64>().sqrt();
            let error: f64 = wide(&y)
                .iter()
                .zip(&want)
                .map(|(got, want)| (got - want).powi(2))
                .sum();
            assert!(
                error.sqrt() <= tolerance * norm,
                "{ends:?}: {}",
                error.sqrt() / norm
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
    fn ends_that_decrease_or_exceed_the_rows_are_named() {
        let x = Owned::<f32>::new(&[5, 2], noise(1));
        let base = Owned::<f32>::new(&[5, 3], noise(2));
        let a = Owned::<f32>::new(&[2, 1, 2], noise(3));
        let b = Owned::<f32>::new(&[2, 3, 1], noise(4));
        let said = |ends: &[i64]| {
            let args = Args {
                ends: view_of(ends),
                a: &[a.view()],
                b: &[b.view()],
                scaling: &[1.0],
                dropout_p: 0.0,
                rng: None,
            };
            let refused = check_forward(&base.view(), &x.view(), &args).err();
            refused.map_or(String::new(), |error| error.to_string())
        };
        assert_eq!(said(&[0, 5]), "");
        assert!(said(&[3, 2]).contains("ends[1] is 2; it must be at least 3"));
        assert!(said(&[-1, 2]).contains("ends[0] is -1"));
        assert!(said(&[1, 6]).contains("at most the 5 rows"));
        assert!(said(&[1, 2, 5]).contains("A[0] is [2, 1, 2]"));
    }
}
