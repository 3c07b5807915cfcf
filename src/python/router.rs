//! `tsugi_kpool._native.Router`.

use crate::router::{Record, Router as Pure, Strategy};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

fn value_error(text: String) -> PyErr {
    PyValueError::new_err(text)
}

/// Which K of N adapters are active in a step: see `src/router.rs`.
#[pyclass(module = "tsugi_kpool._native")]
pub struct Router(Pure);

#[pymethods]
impl Router {
    #[new]
    fn new(strategy: &str, n_adapters: usize, k_active: usize, seed: u64) -> PyResult<Self> {
        let strategy = Strategy::parse(strategy).map_err(value_error)?;
        Pure::new(strategy, n_adapters, k_active, seed)
            .map(Router)
            .map_err(value_error)
    }

    /// The active adapters of a step, ascending.
    fn choose<'py>(
        &self,
        py: Python<'py>,
        step: u64,
    ) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        pyo3::types::PyTuple::new(py, self.0.choose(step))
    }

    #[pyo3(signature = (step, active, loss=None))]
    fn record(&mut self, step: u64, active: Vec<usize>, loss: Option<f64>) -> PyResult<()> {
        self.0.record(step, &active, loss).map_err(value_error)
    }

    /// 64 bits that are equal where the next choices are.
    fn digest(&self, step: u64) -> u64 {
        self.0.digest(step)
    }

    /// (one more than the last active step, moving average of the loss) an adapter.
    fn records(&self) -> Vec<(u64, Option<f64>)> {
        self.0.records().iter().map(|r| (r.last, r.loss)).collect()
    }

    fn restore(&mut self, records: Vec<(u64, Option<f64>)>) -> PyResult<()> {
        let records = records
            .into_iter()
            .map(|(last, loss)| Record { last, loss })
            .collect();
        self.0.restore(records).map_err(value_error)
    }
}
