//! Tuples whose fields have names in Python too: what a `collections.namedtuple` makes, so old code may index and unpack them.

use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple};

/// A kind of tuple.
pub struct Record {
    name: &'static str,
    fields: &'static [&'static str],
    class: PyOnceLock<Py<PyAny>>,
}

impl Record {
    pub const fn new(name: &'static str, fields: &'static [&'static str]) -> Self {
        Self {
            name,
            fields,
            class: PyOnceLock::new(),
        }
    }

    fn class<'py>(&'py self, py: Python<'py>) -> PyResult<&'py Bound<'py, PyAny>> {
        let class = self.class.get_or_try_init(py, || {
            let named = PyDict::new(py);
            named.set_item("module", "tsugi_kpool._native")?;
            let make = py.import("collections")?.getattr("namedtuple")?;
            let class = make.call((self.name, self.fields.to_vec()), Some(&named))?;
            PyResult::Ok(class.unbind())
        })?;
        Ok(class.bind(py))
    }

    /// One of them; the values are in the order of the fields.
    pub fn make<'py>(
        &'static self,
        py: Python<'py>,
        values: impl IntoPyObject<'py, Target = PyTuple, Output = Bound<'py, PyTuple>, Error = PyErr>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.class(py)?.call1(values.into_pyobject(py)?)
    }

    pub fn register(&'static self, module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add(self.name, self.class(module.py())?)
    }
}
