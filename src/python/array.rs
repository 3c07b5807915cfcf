//! NumPy arrays, made here. NumPy is looked for when the first is asked for: nothing else needs it.

use numpy::{Element, IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;

/// An array [values], which owns them.
pub fn column<'py, T: Element>(
    py: Python<'py>,
    values: impl IntoIterator<Item = T>,
) -> PyResult<Bound<'py, PyArray1<T>>> {
    // Without this, a missing NumPy would be a panic.
    py.import("numpy")?;
    Ok(values.into_iter().collect::<Vec<_>>().into_pyarray(py))
}

/// An array [rows, columns], row by row.
pub fn table<'py, T: Element>(
    py: Python<'py>,
    values: impl IntoIterator<Item = T>,
    columns: usize,
) -> PyResult<Bound<'py, PyArray2<T>>> {
    let flat = column(py, values)?;
    let rows = flat.len()?.checked_div(columns).unwrap_or(0);
    flat.reshape([rows, columns])
}
