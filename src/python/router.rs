//! `tsugi_kpool._native.Router`: [`crate::router`] for Python.

use super::array;
use crate::error::Error;
use crate::router::{Router, Strategy};
use numpy::PyArray2;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

#[pyclass(name = "Router", module = "tsugi_kpool._native")]
pub struct PyRouter(Router);

#[pymethods]
impl PyRouter {
    #[new]
    fn new(strategy: &str, n: usize, k: usize, seed: u64) -> PyResult<Self> {
        Ok(Self(Router::new(Strategy::parse(strategy)?, n, k, seed)?))
    }

    fn select<'py>(&self, py: Python<'py>, step: u64) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.select(step))
    }

    /// The adapters of `count` steps from `first` on, [count, k].
    fn table<'py>(
        &self,
        py: Python<'py>,
        first: u64,
        count: u64,
    ) -> PyResult<Bound<'py, PyArray2<i64>>> {
        let steps = (0..count).map(|i| self.0.select(first.saturating_add(i)));
        let chosen = steps.flat_map(|active| active.into_iter().map(|adapter| adapter as i64));
        array::table(py, chosen, self.0.k())
    }

    fn record_loss(&mut self, active: Vec<usize>, loss: f64) -> PyResult<()> {
        Ok(self.0.record_loss(&active, loss)?)
    }

    fn digest(&self, step: u64) -> u64 {
        self.0.digest(step)
    }

    #[getter]
    fn losses(&self) -> Vec<Option<f64>> {
        self.0.losses().to_vec()
    }

    #[setter]
    fn set_losses(&mut self, losses: Vec<Option<f64>>) -> PyResult<()> {
        Ok(self.0.set_losses(losses)?)
    }
}

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyRouter>()
}
