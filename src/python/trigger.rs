//! The trigger in Python: plain numbers in, tuples of named numbers out.

use super::record::Record;
use crate::statistics::{self, Agreed, Buffer};
use crate::trigger::{self, Moment, Rule, Share, Statistic, Trend};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Numbers from Python: m, V or None, ||E g||^2 or None, P; what [`AGREED`] makes, or any tuple of them.
type AgreedTuple = (f64, Option<f64>, Option<f64>, f64);

static DECISION: Record = Record::new("Decision", &["fires", "reason", "statistic", "threshold"]);
static AGREED: Record = Record::new("Agreed", &["m", "variance", "signal", "power"]);
static TREND: Record = Record::new("Trend", &["variance", "signal"]);
static PLAN: Record = Record::new("Plan", &["trend", "length"]);

/// What decides HOLD or FIRE for one adapter; unchanging.
#[pyclass(frozen, module = "tsugi_kpool._native")]
pub struct TriggerRule(Rule);

fn buffers(ranks: Vec<[f64; 5]>) -> Vec<Buffer> {
    ranks
        .into_iter()
        .map(|[m, n, n2, q, norm2]| Buffer { m, n, n2, q, norm2 })
        .collect()
}

fn agreed((m, variance, signal, power): AgreedTuple) -> Agreed {
    Agreed {
        m,
        variance,
        signal,
        power,
    }
}

fn tuple(py: Python<'_>, a: Agreed) -> PyResult<Bound<'_, PyAny>> {
    AGREED.make(py, (a.m, a.variance, a.signal, a.power))
}

#[pymethods]
impl TriggerRule {
    #[new]
    #[pyo3(signature = (trigger, threshold, *, capacity, max_hold_steps, max_drift_ms, world_size, numel))]
    fn new(
        trigger: &str,
        threshold: f64,
        capacity: u64,
        max_hold_steps: Option<u64>,
        max_drift_ms: f64,
        world_size: u64,
        numel: u64,
    ) -> PyResult<Self> {
        let statistic = match trigger {
            "variance" => Statistic::Variance { eps: threshold },
            "relative" => Statistic::Relative { theta: threshold },
            "noise_scale" => Statistic::NoiseScale { cost: threshold },
            other => {
                return Err(PyValueError::new_err(format!(
                    "trigger is {other:?}, not \"variance\", \"relative\" or \"noise_scale\""
                )));
            }
        };
        for (name, value) in [
            ("capacity", capacity),
            ("world_size", world_size),
            ("numel", numel),
        ] {
            if value == 0 {
                return Err(PyValueError::new_err(format!(
                    "{name} is 0, not at least 1"
                )));
            }
        }
        Ok(Self(Rule {
            statistic,
            capacity,
            max_hold_steps,
            max_drift_ms,
            world_size,
            numel,
        }))
    }

    #[pyo3(signature = (*, held, age, bound, flush, drift_ms, planned, agreed, nothing_finite=false))]
    #[allow(clippy::too_many_arguments)] // keywords in Python
    fn decide<'py>(
        &self,
        py: Python<'py>,
        held: u64,
        age: u64,
        bound: u64,
        flush: bool,
        drift_ms: Option<f64>,
        planned: Option<u64>,
        agreed: Option<AgreedTuple>,
        nothing_finite: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let moment = Moment {
            held,
            age,
            bound,
            flush,
            drift_ms,
            planned,
            nothing_finite,
        };
        let decision = self.0.decide(&moment, agreed.map(self::agreed).as_ref());
        let reason = decision.reason;
        let (statistic, threshold) = (decision.statistic, decision.threshold);
        DECISION.make(py, (reason.fires(), reason.as_str(), statistic, threshold))
    }

    fn plan<'py>(
        &self,
        py: Python<'py>,
        trend: Option<(f64, f64)>,
        window: AgreedTuple,
        held: u64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let trend = trend.map(|(variance, signal)| Trend { variance, signal });
        let (trend, length) = self.0.plan(trend, &agreed(window), held);
        let trend = trend.map(|t| TREND.make(py, (t.variance, t.signal)));
        PLAN.make(py, (trend.transpose()?, length))
    }

    fn apart(&self, length: u64, others: Vec<(u64, u64)>) -> u64 {
        self.0.apart(length, &others)
    }

    fn first_window(&self, adapter: u64, planned: bool, stagger: bool) -> u64 {
        self.0.first_window(adapter, planned, stagger)
    }
}

/// The mean over ranks of V and P of rows (m, n, n2, Q, ||S||^2).
#[pyfunction]
fn trigger_fold(py: Python<'_>, ranks: Vec<[f64; 5]>) -> PyResult<Bound<'_, PyAny>> {
    tuple(py, statistics::fold(&buffers(ranks)))
}

/// V and P of all ranks' snapshots together; norm2 is ||sum over ranks of S||^2.
#[pyfunction]
fn trigger_pool(py: Python<'_>, ranks: Vec<[f64; 5]>, norm2: f64) -> PyResult<Bound<'_, PyAny>> {
    tuple(py, statistics::pooled(&buffers(ranks), norm2))
}

fn shares(ranks: Vec<[f64; 2]>) -> Vec<Share> {
    ranks
        .into_iter()
        .map(|[sent, left_out]| Share { sent, left_out })
        .collect()
}

/// Why a FIRE has nothing to apply, or None where it has; rows are each rank's (weight sent, gradients left out).
#[pyfunction]
fn trigger_nothing_to_apply(ranks: Vec<[f64; 2]>, sum_is_finite: bool) -> Option<&'static str> {
    trigger::nothing_to_apply(&shares(ranks), sum_is_finite).map(|reason| reason.as_str())
}

/// Each rank's steps in a row without a finite gradient, `before` with this window's rows (weight sent, left out) added.
#[pyfunction]
fn trigger_rows_without_finite(before: Vec<u64>, ranks: Vec<[f64; 2]>) -> Vec<u64> {
    before
        .into_iter()
        .zip(shares(ranks))
        .map(|(before, share)| trigger::row_without_finite(before, share))
        .collect()
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    for record in [&DECISION, &AGREED, &TREND, &PLAN] {
        record.register(module)?;
    }
    module.add_class::<TriggerRule>()?;
    module.add_function(wrap_pyfunction!(trigger_fold, module)?)?;
    module.add_function(wrap_pyfunction!(trigger_pool, module)?)?;
    module.add_function(wrap_pyfunction!(trigger_nothing_to_apply, module)?)?;
    module.add_function(wrap_pyfunction!(trigger_rows_without_finite, module)?)
}
