//! The operations as they run on a device, on the host executor instead of one: the launches of `src/cuda/`, with the
//! parameters, grids and scratch memory that a GPU would get, over the cases of `tests/cases.py`, against fp64 on the CPU.

#[path = "kernels/build.rs"]
mod build;

use half::{bf16, f16};
use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::sync::{Mutex, OnceLock};
use tsugi_kpool::cuda::{Launch, Machine, buffer, experts, lora, lora::Mask};
use tsugi_kpool::error::{Error, Result};
use tsugi_kpool::ops::arguments::Gradients;
use tsugi_kpool::ops::{
    buffer_variance, lora_backward, lora_expand, lora_experts, lora_linear, lora_shrink,
    sideband_accumulate, sideband_drain, sideband_stats,
};
use tsugi_kpool::tensor::{
    DType, DenseProduct, Device, Element, MatMut, StackMut, TensorMut, TensorRef,
};

// ---- the stand-in for a device ----

type SimtLaunch = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    c_uint,
    usize,
    *const c_void,
    usize,
    c_int,
    *mut c_char,
    usize,
) -> c_int;

/// The executor has one state a process: launches take turns.
fn simt() -> &'static Mutex<SimtLaunch> {
    static SIMT: OnceLock<Mutex<SimtLaunch>> = OnceLock::new();
    SIMT.get_or_init(|| {
        let library = build::build("executor", ".so", &["-fPIC", "-shared"]);
        // SAFETY: our own library, whose initialisers only fill tables; leaked, so the symbol stays valid.
        let library = Box::leak(Box::new(
            unsafe { libloading::Library::new(library) }.unwrap(),
        ));
        // SAFETY: the type is that of `simt_launch` in tests/kernels/executor.cpp.
        Mutex::new(*unsafe { library.get::<SimtLaunch>(b"simt_launch\0") }.unwrap())
    })
}

#[derive(Default)]
struct Executor {
    scratch: RefCell<Vec<Vec<u128>>>,
    launches: Cell<usize>,
    seed: c_int,
}

impl Machine for Executor {
    unsafe fn launch(&self, op: &'static str, launch: &Launch<'_>) -> Result<()> {
        let run = simt().lock().unwrap_or_else(|e| e.into_inner());
        let name = CString::new(launch.kernel).unwrap();
        let grid = launch.grid.map(|n| n as c_uint);
        let mut fault = [0u8; 400];
        self.launches.set(self.launches.get() + 1);
        // SAFETY: the caller's promise; the executor checks the size of the parameters.
        let failed = unsafe {
            run(
                name.as_ptr(),
                grid.as_ptr(),
                launch.threads as c_uint,
                launch.shared,
                launch.params,
                launch.params_bytes,
                self.seed,
                fault.as_mut_ptr().cast(),
                fault.len(),
            )
        };
        if failed == 0 {
            return Ok(());
        }
        let end = fault.iter().position(|b| *b == 0).unwrap();
        Err(Error::Cuda {
            op,
            what: String::from_utf8_lossy(&fault[..end]).into_owned(),
        })
    }

    fn scratch(&self, _op: &'static str, bytes: usize) -> Result<*mut c_void> {
        // NaN in every dtype: nothing that nobody wrote can pass for a result.
        let mut memory = vec![u128::MAX; bytes.div_ceil(16)];
        let address = memory.as_mut_ptr().cast();
        self.scratch.borrow_mut().push(memory);
        Ok(address)
    }

    fn processors(&self) -> usize {
        16
    }

    fn dense_product(&self, op: &'static str, product: &DenseProduct) -> Result<()> {
        tsugi_kpool::cpu::dense::dense_product(op, product)
    }
}

// ---- tensors ----

trait Float: Element {
    fn narrow(value: f64) -> Self;
    fn wide(self) -> f64;
    const TOLERANCE: f64;
}
macro_rules! float {
    ($type:ty, $narrow:expr, $wide:expr, $tolerance:expr) => {
        impl Float for $type {
            fn narrow(value: f64) -> Self {
                ($narrow)(value)
            }
            fn wide(self) -> f64 {
                ($wide)(self)
            }
            const TOLERANCE: f64 = $tolerance;
        }
    };
}
// As in tests/cases.py; sums of sums in fp32 may lose a little more than one rounding.
float!(f32, |v| v as f32, f64::from, 4e-6);
float!(f64, |v| v, |v| v, 1e-13);
float!(bf16, bf16::from_f64, bf16::to_f64, 4e-3);
float!(f16, f16::from_f64, f16::to_f64, 6e-4);

struct Tensor<E> {
    data: Vec<E>,
    sizes: Vec<i64>,
    strides: Vec<i64>,
}

impl<E: Float> Tensor<E> {
    fn filled(sizes: &[usize], value: impl Fn(usize) -> f64) -> Self {
        let mut strides = vec![1i64; sizes.len()];
        for i in (0..sizes.len().saturating_sub(1)).rev() {
            strides[i] = strides[i + 1] * sizes[i + 1].max(1) as i64;
        }
        Tensor {
            data: (0..sizes.iter().product())
                .map(|i| E::narrow(value(i)))
                .collect(),
            sizes: sizes.iter().map(|s| *s as i64).collect(),
            strides,
        }
    }
    fn noise(sizes: &[usize], seed: usize, scale: f64) -> Self {
        Self::filled(sizes, |i| {
            let hash = ((i + 1).wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) % 10_007;
            scale * (hash as f64 / 5_003.5 - 1.0)
        })
    }
    /// What is to be overwritten, as NaN.
    fn unwritten(sizes: &[usize]) -> Self {
        Self::filled(sizes, |_| f64::NAN)
    }
    fn exact(&self) -> Tensor<f64> {
        let sizes: Vec<usize> = self.sizes.iter().map(|s| *s as usize).collect();
        Tensor::filled(&sizes, |i| self.data[i].wide())
    }
    fn view(&self) -> TensorRef<'_> {
        // SAFETY: the vector has the shape it was made with and outlives the view.
        unsafe {
            TensorRef::new(
                self.data.as_ptr().cast(),
                &self.sizes,
                &self.strides,
                E::DTYPE,
                Device::Cpu,
            )
        }
    }
    fn view_mut(&mut self) -> TensorMut<'_> {
        // SAFETY: as in `view`, and the borrow is exclusive.
        unsafe {
            TensorMut::new(
                self.data.as_mut_ptr().cast(),
                &self.sizes,
                &self.strides,
                E::DTYPE,
                Device::Cpu,
            )
        }
    }
    fn rows(&mut self) -> MatMut {
        self.view_mut().rows().unwrap()
    }
}

fn views<E: Float>(tensors: &[Tensor<E>]) -> Vec<TensorRef<'_>> {
    tensors.iter().map(Tensor::view).collect()
}

fn close<E: Float>(what: &str, got: &Tensor<E>, want: &Tensor<f64>) {
    assert_eq!(got.data.len(), want.data.len(), "{what}");
    let norm = want.data.iter().map(|v| v * v).sum::<f64>().sqrt();
    let error = got
        .data
        .iter()
        .zip(&want.data)
        .map(|(g, w)| (g.wide() - w).powi(2))
        .sum::<f64>()
        .sqrt();
    assert!(
        error <= E::TOLERANCE * norm,
        "{what}: relative error {:.2e}",
        error / norm
    );
}

// ---- cases ----

#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    inputs: usize,
    outputs: usize,
    ranks: Vec<usize>,
    p: f64,
}

/// The list of tests/cases.py, and one call that is large enough to be split.
fn cases() -> Vec<Case> {
    let text = include_str!("cases.py");
    let list = text.split_once("CASES = [").unwrap().1;
    let list = list.split_once("\n]").unwrap().0;
    let mut cases: Vec<Case> = list.lines().filter_map(parse).collect();
    assert!(cases.len() >= 13, "{}", cases.len());
    cases.push(Case {
        rows: 300,
        inputs: 1100,
        outputs: 600,
        ranks: vec![16, 16],
        p: 0.1,
    });
    cases.push(Case {
        rows: 9,
        inputs: 40,
        outputs: 70,
        ranks: vec![64, 64, 20],
        p: 0.0,
    });
    cases
}

/// `Case((2, 65), 127, 129, (3, 8, 1), 0.5),`, where a tuple may be repeated: `(16,) * 4`.
fn parse(line: &str) -> Option<Case> {
    let inside = line
        .trim()
        .strip_prefix("Case(")?
        .trim_end_matches(',')
        .strip_suffix(')')?;
    let numbers = |text: &str| -> Vec<usize> {
        text.split(',')
            .filter_map(|n| n.trim().parse().ok())
            .collect()
    };
    let (lead, rest) = inside.strip_prefix('(')?.split_once(')')?;
    let (middle, rest) = rest.split_once('(')?;
    let (ranks, rest) = rest.split_once(')')?;
    let (repeat, p) = match rest.split_once(',') {
        Some((repeat, p)) => (repeat, p.trim().parse().ok()?),
        None => (rest, 0.0),
    };
    let times = repeat
        .trim()
        .strip_prefix("* ")
        .map_or(1, |n| n.parse().unwrap());
    let sizes = numbers(middle);
    Some(Case {
        rows: numbers(lead).iter().product(),
        inputs: sizes[0],
        outputs: sizes[1],
        ranks: numbers(ranks).repeat(times),
        p,
    })
}

const RNG: [i64; 2] = [-0x1234_5678_9abc_def0, 3 << 32 | 5];

fn rng() -> Tensor64 {
    Tensor64
}

/// (seed, offset) as a tensor.
struct Tensor64;
impl Tensor64 {
    fn view(&self) -> TensorRef<'static> {
        // SAFETY: two int64 that live for ever.
        unsafe {
            TensorRef::new(
                RNG.as_ptr().cast(),
                &[2],
                &[1],
                tsugi_kpool::tensor::DType::I64,
                Device::Cpu,
            )
        }
    }
}

fn mask(case: &Case) -> Mask {
    mask_of(case.p)
}

fn mask_of(p: f64) -> Mask {
    let rng: *const u8 = if p > 0.0 {
        rng().view().data()
    } else {
        std::ptr::null()
    };
    Mask::new(p, rng)
}

struct Call<X, P> {
    x: Tensor<X>,
    weight: Tensor<X>,
    bias: Tensor<X>,
    base: Tensor<X>,
    grad: Tensor<X>,
    h: Tensor<P>,
    a: Vec<Tensor<P>>,
    b: Vec<Tensor<P>>,
    scaling: Vec<f64>,
}

impl<X: Float, P: Float> Call<X, P> {
    fn of(case: &Case) -> Self {
        let (m, i, o) = (case.rows, case.inputs, case.outputs);
        let total: usize = case.ranks.iter().sum();
        let fan_in = (i.max(1) as f64).powf(-0.5);
        Call {
            x: Tensor::noise(&[m, i], 1, 1.0),
            weight: Tensor::noise(&[o, i], 2, fan_in),
            bias: Tensor::noise(&[o], 3, 1.0),
            base: Tensor::noise(&[m, o], 4, 1.0),
            grad: Tensor::noise(&[m, o], 5, 1.0),
            h: Tensor::noise(&[m, total], 6, 1.0),
            a: case
                .ranks
                .iter()
                .enumerate()
                .map(|(k, r)| Tensor::noise(&[*r, i], 10 + k, fan_in))
                .collect(),
            b: case
                .ranks
                .iter()
                .enumerate()
                .map(|(k, r)| Tensor::noise(&[o, *r], 30 + k, 0.5))
                .collect(),
            scaling: (0..case.ranks.len())
                .map(|k| 2.0 / (k + 1) as f64)
                .collect(),
        }
    }

    fn exact(&self) -> Call<f64, f64> {
        Call {
            x: self.x.exact(),
            weight: self.weight.exact(),
            bias: self.bias.exact(),
            base: self.base.exact(),
            grad: self.grad.exact(),
            h: self.h.exact(),
            a: self.a.iter().map(Tensor::exact).collect(),
            b: self.b.iter().map(Tensor::exact).collect(),
            scaling: self.scaling.clone(),
        }
    }

    /// Y and H, on the executor or, without one, on the CPU.
    fn apply(&self, case: &Case, on: Option<&Executor>, linear: bool) -> (Tensor<X>, Tensor<P>) {
        let mut y = Tensor::<X>::unwritten(&[case.rows, case.outputs]);
        let mut h = Tensor::<P>::unwritten(&[case.rows, case.ranks.iter().sum()]);
        let call = lora_linear::check(&lora_linear::Args {
            base: (!linear).then(|| self.base.view()),
            x: self.x.view(),
            weight: linear.then(|| self.weight.view()),
            bias: linear.then(|| self.bias.view()),
            a: &views(&self.a),
            b: &views(&self.b),
            scaling: &self.scaling,
            dropout_p: case.p,
            rng: (case.p > 0.0).then(|| rng().view()),
        })
        .unwrap();
        match on {
            Some(machine) => {
                let (y, h) = (y.rows(), h.rows());
                lora::lora_apply(machine, "test", &call, mask(case), y, h).unwrap();
            }
            None => call.run(y.rows(), h.rows()).unwrap(),
        }
        (y, h)
    }

    fn pieces(&self, case: &Case, on: Option<&Executor>) -> (Tensor<P>, Tensor<X>) {
        let mut h = Tensor::<P>::unwritten(&[case.rows, case.ranks.iter().sum()]);
        let random = (case.p > 0.0).then(|| rng().view());
        let call =
            lora_shrink::check(&self.x.view(), &views(&self.a), case.p, random.as_ref()).unwrap();
        match on {
            Some(machine) => lora::lora_shrink(machine, &call, mask(case), h.rows()).unwrap(),
            None => call.run(h.rows()).unwrap(),
        }
        let mut y = Tensor::<X>::filled(&[case.rows, case.outputs], |i| self.base.data[i].wide());
        let call =
            lora_expand::check(&y.view(), &self.h.view(), &views(&self.b), &self.scaling).unwrap();
        match on {
            Some(machine) => lora::lora_expand(machine, &call, y.rows()).unwrap(),
            None => call.run(y.rows()).unwrap(),
        }
        (h, y)
    }

    fn backward(
        &self,
        case: &Case,
        on: Option<&Executor>,
        with_weight: bool,
    ) -> (Tensor<X>, Vec<Tensor<P>>, Vec<Tensor<P>>) {
        let mut dx = Tensor::<X>::unwritten(&[case.rows, case.inputs]);
        let like = |sizes: [usize; 2]| Tensor::<P>::unwritten(&sizes);
        let mut da: Vec<_> = case.ranks.iter().map(|r| like([*r, case.inputs])).collect();
        let mut db: Vec<_> = case
            .ranks
            .iter()
            .map(|r| like([case.outputs, *r]))
            .collect();
        let call = lora_backward::check(&lora_backward::Args {
            grad: self.grad.view(),
            x: Some(self.x.view()),
            h: Some(self.h.view()),
            weight: with_weight.then(|| self.weight.view()),
            a: &views(&self.a),
            b: &views(&self.b),
            scaling: &self.scaling,
            dropout_p: case.p,
            rng: (case.p > 0.0).then(|| rng().view()),
            need_a: true,
            need_b: true,
        })
        .unwrap();
        let out = Gradients {
            x: Some(dx.rows()),
            a: Some(da.iter_mut().map(Tensor::rows).collect()),
            b: Some(db.iter_mut().map(Tensor::rows).collect()),
        };
        match on {
            Some(machine) => lora::lora_backward(machine, &call, mask(case), &out).unwrap(),
            None => call.run(&out).unwrap(),
        }
        (dx, da, db)
    }
}

fn every_case<X: Float, P: Float>() {
    for (index, case) in cases().iter().enumerate() {
        let call = Call::<X, P>::of(case);
        let exact = call.exact();
        let machine = Executor {
            seed: index as c_int % 4,
            ..Executor::default()
        };
        let on = Some(&machine);
        let what = format!("{:?}/{:?} {case:?}", X::DTYPE, P::DTYPE);
        for linear in [true, false] {
            let (y, h) = call.apply(case, on, linear);
            let (want_y, want_h) = exact.apply(case, None, linear);
            // What is rounded on the way: the adapters' part (before the frozen product is added), H, then Y.
            close_rounded(&format!("{what} y, linear {linear}"), &y, &want_y, 3.0);
            close(&format!("{what} h"), &h, &want_h);
        }
        let (h, y) = call.pieces(case, on);
        let (want_h, want_y) = exact.pieces(case, None);
        close(&format!("{what} shrink"), &h, &want_h);
        close(&format!("{what} expand"), &y, &want_y);
        for with_weight in [true, false] {
            let (dx, da, db) = call.backward(case, on, with_weight);
            let (want_dx, want_da, want_db) = exact.backward(case, None, with_weight);
            close_rounded(
                &format!("{what} dx, weight {with_weight}"),
                &dx,
                &want_dx,
                3.0,
            );
            for (k, (got, want)) in da.iter().zip(&want_da).enumerate() {
                close_rounded(&format!("{what} dA {k}"), got, want, 2.0);
            }
            for (k, (got, want)) in db.iter().zip(&want_db).enumerate() {
                close(&format!("{what} dB {k}"), got, want);
            }
        }
        assert!(case.rows == 0 || machine.launches.get() > 0);
    }
}

/// `roundings`: how many results on the way were rounded to the dtype.
fn close_rounded<E: Float>(what: &str, got: &Tensor<E>, want: &Tensor<f64>, roundings: f64) {
    let norm = want.data.iter().map(|v| v * v).sum::<f64>().sqrt();
    let error = got
        .data
        .iter()
        .zip(&want.data)
        .map(|(g, w)| (g.wide() - w).powi(2))
        .sum::<f64>()
        .sqrt();
    assert!(
        error <= roundings * E::TOLERANCE * norm,
        "{what}: relative error {:.2e}",
        error / norm
    );
}

#[test]
fn low_rank_bf16() {
    every_case::<bf16, bf16>();
}
#[test]
fn low_rank_f16() {
    every_case::<f16, f16>();
}
#[test]
fn low_rank_bf16_under_f32_adapters() {
    every_case::<bf16, f32>();
}
#[test]
fn low_rank_f16_under_f32_adapters() {
    every_case::<f16, f32>();
}
#[test]
fn low_rank_f32() {
    every_case::<f32, f32>();
}
#[test]
fn low_rank_f64() {
    every_case::<f64, f64>();
}

// ---- the experts of a mixture ----

/// Rows of each expert, then of none, features, ranks, dropout; whether B has PEFT's layout.
struct Mixture {
    counts: &'static [i32],
    rest: usize,
    inputs: usize,
    outputs: usize,
    ranks: &'static [usize],
    p: f64,
    peft: bool,
}

const MIXTURES: &[Mixture] = &[
    mixture(&[3, 0, 5], 2, 7, 9, &[3], 0.0, true),
    mixture(&[1], 0, 1, 1, &[1], 0.0, true),
    mixture(&[0, 0], 4, 8, 8, &[4], 0.0, false),
    mixture(&[64, 1, 0, 129], 70, 64, 136, &[8, 3], 0.0, true),
    mixture(&[40, 30], 0, 130, 70, &[16, 40, 1], 0.25, true),
    mixture(&[0, 150, 0], 1, 65, 129, &[3, 8], 0.5, false),
    mixture(&[3, 2], 1, 16, 5, &[2, 0], 0.0, true),
];

#[allow(clippy::too_many_arguments)]
const fn mixture(
    counts: &'static [i32],
    rest: usize,
    inputs: usize,
    outputs: usize,
    ranks: &'static [usize],
    p: f64,
    peft: bool,
) -> Mixture {
    Mixture {
        counts,
        rest,
        inputs,
        outputs,
        ranks,
        p,
        peft,
    }
}

struct Experts<X, P> {
    base: Tensor<X>,
    x: Tensor<X>,
    grad: Tensor<X>,
    h: Tensor<P>,
    a: Vec<Tensor<P>>,
    b: Vec<Tensor<P>>,
    ends: Vec<i32>,
    scaling: Vec<f64>,
}

/// [experts, outputs, r] whose expert index runs fastest, or contiguous.
fn of_experts<E: Float>(sizes: [usize; 3], peft: bool, values: Tensor<E>) -> Tensor<E> {
    let [experts, outputs, r] = sizes.map(|n| n as i64);
    Tensor {
        sizes: vec![experts, outputs, r],
        strides: if peft {
            vec![1, r * experts, experts]
        } else {
            vec![outputs * r, r, 1]
        },
        ..values
    }
}

impl<X: Float, P: Float> Experts<X, P> {
    fn of(mixture: &Mixture) -> Self {
        let ends: Vec<i32> = mixture
            .counts
            .iter()
            .scan(0, |end, count| {
                *end += count;
                Some(*end)
            })
            .collect();
        let (e, i, o) = (ends.len(), mixture.inputs, mixture.outputs);
        let m = *ends.last().unwrap() as usize + mixture.rest;
        let numbered = || mixture.ranks.iter().copied().enumerate();
        Experts {
            base: Tensor::noise(&[m, o], 1, 1.0),
            x: Tensor::noise(&[m, i], 2, 1.0),
            grad: Tensor::noise(&[m, o], 3, 1.0),
            h: Tensor::noise(&[m, mixture.ranks.iter().sum()], 4, 1.0),
            a: numbered()
                .map(|(k, r)| Tensor::noise(&[e, r, i], 10 + k, (i as f64).powf(-0.5)))
                .collect(),
            b: numbered()
                .map(|(k, r)| {
                    let values = Tensor::noise(&[e * o * r], 30 + k, 0.5);
                    of_experts([e, o, r], mixture.peft, values)
                })
                .collect(),
            ends,
            scaling: numbered().map(|(k, _)| 2.0 / (k + 1) as f64).collect(),
        }
    }

    fn exact(&self) -> Experts<f64, f64> {
        let exact = |tensors: &[Tensor<P>]| {
            tensors
                .iter()
                .map(|t| Tensor {
                    data: t.data.iter().map(|v| v.wide()).collect(),
                    sizes: t.sizes.clone(),
                    strides: t.strides.clone(),
                })
                .collect()
        };
        Experts {
            base: self.base.exact(),
            x: self.x.exact(),
            grad: self.grad.exact(),
            h: self.h.exact(),
            a: exact(&self.a),
            b: exact(&self.b),
            ends: self.ends.clone(),
            scaling: self.scaling.clone(),
        }
    }

    fn ends(&self) -> TensorRef<'_> {
        // SAFETY: the vector outlives the view; the sizes are leaked, a few bytes a test.
        unsafe {
            TensorRef::new(
                self.ends.as_ptr().cast(),
                Box::leak(Box::new([self.ends.len() as i64])),
                &[1],
                DType::I32,
                Device::Cpu,
            )
        }
    }

    fn forward(&self, mixture: &Mixture, on: Option<&Executor>) -> (Tensor<X>, Tensor<P>) {
        let rows = self.x.sizes[0] as usize;
        let mut y = Tensor::<X>::unwritten(&[rows, mixture.outputs]);
        let mut h = Tensor::<P>::unwritten(&[rows, mixture.ranks.iter().sum()]);
        let call = lora_experts::check_forward(
            &self.base.view(),
            &self.x.view(),
            &lora_experts::Args {
                ends: self.ends(),
                a: &views(&self.a),
                b: &views(&self.b),
                scaling: &self.scaling,
                dropout_p: mixture.p,
                rng: (mixture.p > 0.0).then(|| rng().view()),
            },
        )
        .unwrap();
        match on {
            Some(machine) => {
                let mask = mask_of(mixture.p);
                experts::lora_experts(machine, &call, mask, y.rows(), h.rows()).unwrap();
            }
            None => call.run(y.rows(), h.rows()).unwrap(),
        }
        (y, h)
    }

    #[allow(clippy::type_complexity)]
    fn backward(
        &self,
        mixture: &Mixture,
        on: Option<&Executor>,
    ) -> (Tensor<X>, Vec<Tensor<P>>, Vec<Tensor<P>>) {
        let mut dx = Tensor::<X>::unwritten(&[self.x.sizes[0] as usize, mixture.inputs]);
        let like = |t: &Tensor<P>| Tensor {
            data: vec![P::narrow(f64::NAN); t.data.len()],
            sizes: t.sizes.clone(),
            strides: t.strides.clone(),
        };
        let mut da: Vec<_> = self.a.iter().map(like).collect();
        let mut db: Vec<_> = self.b.iter().map(like).collect();
        let call = lora_experts::check_backward(
            &self.grad.view(),
            Some(&self.x.view()),
            Some(&self.h.view()),
            &lora_experts::Args {
                ends: self.ends(),
                a: &views(&self.a),
                b: &views(&self.b),
                scaling: &self.scaling,
                dropout_p: mixture.p,
                rng: (mixture.p > 0.0).then(|| rng().view()),
            },
        )
        .unwrap();
        let stack = |t: &mut Tensor<P>| -> StackMut { t.view_mut().stack().unwrap() };
        let out = lora_experts::Gradients {
            x: Some(dx.rows()),
            a: Some(da.iter_mut().map(stack).collect()),
            b: Some(db.iter_mut().map(stack).collect()),
        };
        match on {
            Some(machine) => {
                let mask = mask_of(mixture.p);
                experts::lora_experts_backward(machine, &call, mask, &out).unwrap();
            }
            None => call.run_backward(&out).unwrap(),
        }
        (dx, da, db)
    }
}

fn every_mixture<X: Float, P: Float>() {
    for (index, mixture) in MIXTURES.iter().enumerate() {
        let call = Experts::<X, P>::of(mixture);
        let exact = call.exact();
        let machine = Executor {
            seed: index as c_int % 4,
            ..Executor::default()
        };
        let on = Some(&machine);
        let what = format!("{:?}/{:?} {:?}", X::DTYPE, P::DTYPE, mixture.counts);
        let ((y, h), (want_y, want_h)) = (call.forward(mixture, on), exact.forward(mixture, None));
        close_rounded(&format!("{what} y"), &y, &want_y, 2.0);
        close(&format!("{what} h"), &h, &want_h);
        let (dx, da, db) = call.backward(mixture, on);
        let (want_dx, want_da, want_db) = exact.backward(mixture, None);
        close_rounded(&format!("{what} dx"), &dx, &want_dx, 2.0);
        for (k, (got, want)) in da.iter().zip(&want_da).enumerate() {
            close_rounded(&format!("{what} dA {k}"), got, want, 2.0);
        }
        for (k, (got, want)) in db.iter().zip(&want_db).enumerate() {
            close(&format!("{what} dB {k}"), got, want);
        }
        // Forward: down, up. Backward: down, two of factors, up.
        assert_eq!(machine.launches.get(), 6, "{what}");
    }
}

#[test]
fn experts_bf16() {
    every_mixture::<bf16, bf16>();
}
#[test]
fn experts_f16_under_f32_adapters() {
    every_mixture::<f16, f32>();
}
#[test]
fn experts_bf16_under_f32_adapters() {
    every_mixture::<bf16, f32>();
}
#[test]
fn experts_f16() {
    every_mixture::<f16, f16>();
}
#[test]
fn experts_f32() {
    every_mixture::<f32, f32>();
}
#[test]
fn experts_f64() {
    every_mixture::<f64, f64>();
}

/// A device is not asked for ends before a launch, so it is the kernels that must notice.
#[test]
fn ends_out_of_order_make_every_result_a_nan_on_a_device() {
    for wrong in [[5, 3, 8], [2, 3, 9], [-1, 3, 8], [2, 3, i32::MAX]] {
        let mixture = mixture(&[2, 1, 5], 0, 6, 5, &[2], 0.0, true);
        let call = Experts::<f32, f32>::of(&mixture);
        let machine = Executor::default();
        // Changed after they were looked at, as a device's are without our knowing.
        let ends: *mut i32 = Box::leak(Box::new([2, 3, 8])).as_mut_ptr();
        // SAFETY: three int32 that live for ever.
        let view = unsafe { TensorRef::new(ends.cast(), &[3], &[1], DType::I32, Device::Cpu) };
        let (mut y, mut h) = (
            Tensor::<f32>::unwritten(&[8, 5]),
            Tensor::<f32>::unwritten(&[8, 2]),
        );
        let checked = lora_experts::check_forward(
            &call.base.view(),
            &call.x.view(),
            &lora_experts::Args {
                ends: view,
                a: &views(&call.a),
                b: &views(&call.b),
                scaling: &call.scaling,
                dropout_p: 0.0,
                rng: None,
            },
        )
        .unwrap();
        // SAFETY: as above; nobody reads them meanwhile.
        unsafe { ends.copy_from_nonoverlapping(wrong.as_ptr(), 3) };
        y.data.fill(1.0);
        experts::lora_experts(
            &machine,
            &checked,
            Mask::new(0.0, std::ptr::null()),
            y.rows(),
            h.rows(),
        )
        .unwrap();
        let written = y.data.iter().filter(|v| **v != 1.0);
        assert!(
            written.clone().count() > 0 && written.clone().all(|v| v.is_nan()),
            "{wrong:?}"
        );
    }
}

// ---- the statistics of gradients ----

/// More tensors than one launch takes, of three dtypes, one of them empty.
#[test]
fn buffer_of_many_tensors_and_dtypes() {
    let machine = Executor::default();
    let sizes: Vec<usize> = (0..700)
        .map(|i| if i == 3 { 0 } else { i % 7 + 1 })
        .collect();
    let mut sums: Vec<Tensor<f32>> = sizes
        .iter()
        .map(|n| Tensor::filled(&[*n], |_| 0.0))
        .collect();
    let mut stats = Tensor::<f64>::filled(&[8], |_| 0.0);
    let (mut cpu_sums, mut cpu_stats): (Vec<Tensor<f32>>, _) = (
        sizes
            .iter()
            .map(|n| Tensor::filled(&[*n], |_| 0.0))
            .collect(),
        Tensor::<f64>::filled(&[8], |_| 0.0),
    );
    for step in 0..3 {
        let mut low: Vec<Tensor<bf16>> = Vec::new();
        let mut high: Vec<Tensor<f64>> = Vec::new();
        let mut middle: Vec<Tensor<f32>> = Vec::new();
        for (i, n) in sizes.iter().enumerate() {
            match i % 3 {
                0 => low.push(Tensor::noise(&[*n], i + step, 1.0)),
                1 => high.push(Tensor::noise(&[*n], i + step, 1.0)),
                _ => middle.push(Tensor::noise(&[*n], i + step, 1.0)),
            }
        }
        if step == 1 {
            low[200].data[0] = bf16::INFINITY;
        }
        let (mut l, mut h, mut m) = (low.iter(), high.iter(), middle.iter());
        let grads: Vec<TensorRef<'_>> = (0..sizes.len())
            .map(|i| match i % 3 {
                0 => l.next().unwrap().view(),
                1 => h.next().unwrap().view(),
                _ => m.next().unwrap().view(),
            })
            .collect();
        let weight = 1.0 + step as f64;
        {
            let views: Vec<TensorMut<'_>> = sums.iter_mut().map(Tensor::view_mut).collect();
            buffer::accumulate(&machine, &views, &stats.view_mut(), &grads, weight, false).unwrap();
        }
        let mut views: Vec<TensorMut<'_>> = cpu_sums.iter_mut().map(Tensor::view_mut).collect();
        sideband_accumulate::run(&mut views, &mut cpu_stats.view_mut(), &grads, weight).unwrap();
    }
    assert_eq!(stats.data[..3], cpu_stats.data[..3]);
    assert_eq!(stats.data[4], 1.0);
    assert!((stats.data[3] / cpu_stats.data[3] - 1.0).abs() < 1e-12);
    for (got, want) in sums.iter().zip(&cpu_sums) {
        close("S", got, &want.exact());
    }

    let mut out = Tensor::<f64>::unwritten(&[8]);
    buffer::statistics(&machine, &views(&sums), &stats.view(), &out.view_mut()).unwrap();
    let fields: [f64; 8] = stats.data.clone().try_into().unwrap();
    let want = sideband_stats::run(&views(&sums), &fields).unwrap();
    for (got, want) in out.data.iter().zip(want) {
        assert!(
            (got - want).abs() <= 1e-11 * want.abs(),
            "{:?} is not {want:?}",
            out.data
        );
    }

    let mut grads: Vec<Tensor<f16>> = sizes.iter().map(|n| Tensor::unwritten(&[*n])).collect();
    let mut cpu_grads: Vec<Tensor<f16>> = sizes.iter().map(|n| Tensor::unwritten(&[*n])).collect();
    {
        let s: Vec<TensorMut<'_>> = sums.iter_mut().map(Tensor::view_mut).collect();
        let g: Vec<TensorMut<'_>> = grads.iter_mut().map(Tensor::view_mut).collect();
        buffer::drain(&machine, &s, &stats.view_mut(), &g, 0.25).unwrap();
    }
    let mut s: Vec<TensorMut<'_>> = cpu_sums.iter_mut().map(Tensor::view_mut).collect();
    let mut g: Vec<TensorMut<'_>> = cpu_grads.iter_mut().map(Tensor::view_mut).collect();
    sideband_drain::run(&mut s, &mut cpu_stats.view_mut(), &mut g, 0.25).unwrap();
    assert_eq!(stats.data, [0.0; 8]);
    for (got, want) in grads.iter().zip(&cpu_grads) {
        assert_eq!(got.data, want.data);
    }
    assert!(sums.iter().all(|s| s.data.iter().all(|v| *v == 0.0)));
}

#[test]
fn variance_of_a_ring() {
    let machine = Executor::default();
    for (window, filled, numel) in [(4, 4, 1), (5, 3, 129), (2, 1, 7), (3, 3, 0), (6, 6, 5000)] {
        let ring = Tensor::<bf16>::noise(&[window, numel], 9, 3.0);
        let mat = buffer_variance::check(&ring.view(), filled).unwrap();
        let want = buffer_variance::run(mat, filled as usize).unwrap();
        let mut out = f64::NAN;
        let slot = std::ptr::from_mut(&mut out).cast();
        buffer::variance(&machine, mat, filled as usize, slot).unwrap();
        assert!(
            out == want || (out - want).abs() <= 1e-5 * want || (out.is_nan() && want.is_nan()),
            "{window} {filled} {numel}: {out} is not {want}"
        );
    }
}

#[test]
fn more_adapters_than_a_launch_takes_is_an_error() {
    let case = Case {
        rows: 2,
        inputs: 3,
        outputs: 4,
        ranks: vec![1; 65],
        p: 0.0,
    };
    let call = Call::<f32, f32>::of(&case);
    let checked = lora_shrink::check(&call.x.view(), &views(&call.a), 0.0, None).unwrap();
    let mut h = Tensor::<f32>::unwritten(&[2, 65]);
    let machine = Executor::default();
    let text = lora::lora_shrink(&machine, &checked, mask(&case), h.rows())
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("65 adapters in one call; at most 64"),
        "{text}"
    );
}
