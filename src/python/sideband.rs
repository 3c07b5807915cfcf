//! The sideband's agent for Python; `tsugi_kpool/distributed/sideband.py` is the public face.

use super::array::column;
use crate::error::Error;
use crate::sideband::fork::Process;
use crate::sideband::frame;
use crate::sideband::keyfile;
use crate::sideband::link::{Ending, Refusal};
use crate::sideband::node::{Agent, Bound, Config};
use crate::sideband::peer::PHI_SUSPECT;
use crate::sideband::session::{self, Key};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::sync::{Mutex, PoisonError};

fn value_error(error: Error) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Listens when made, runs once `start` tells it who the others are.
#[pyclass(frozen)]
pub struct SidebandAgent {
    bound: Mutex<Option<Bound>>,
    agent: Mutex<Option<Agent>>,
    #[pyo3(get)]
    port: u16,
    process: Process,
}

impl SidebandAgent {
    /// In a forked child the locks may be held by a thread that is not there, so nothing may take them.
    fn running<T>(&self, work: impl FnOnce(&Agent) -> T) -> PyResult<T> {
        if self.forked() {
            return Err(PyRuntimeError::new_err(
                "the sideband runs in the process that this one was forked from: start a new one here",
            ));
        }
        let agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner);
        agent
            .as_ref()
            .map(work)
            .ok_or_else(|| PyRuntimeError::new_err("the sideband is not running"))
    }
}

#[pymethods]
impl SidebandAgent {
    #[new]
    fn new(address: &str) -> PyResult<Self> {
        let bound = Bound::listen(address).map_err(value_error)?;
        let port = bound.port();
        Ok(Self {
            bound: Mutex::new(Some(bound)),
            agent: Mutex::new(None),
            port,
            process: Process::this(),
        })
    }

    /// True in a child that was forked since this was made: the agent, its port and its connections are the parent's.
    #[getter]
    fn forked(&self) -> bool {
        !self.process.is_this()
    }

    #[pyo3(signature = (*, node, peers, key, job, epoch, heartbeat_ms, dead_after_ms, expire_after_ms))]
    #[allow(clippy::too_many_arguments)] // keyword-only: the names are at the call
    fn start(
        &self,
        node: u16,
        peers: Vec<String>,
        key: &str,
        job: u64,
        epoch: u64,
        heartbeat_ms: u64,
        dead_after_ms: u64,
        expire_after_ms: u64,
    ) -> PyResult<()> {
        let key = Key::from_hex(key).map_err(value_error)?;
        if self.forked() {
            return self.running(|_| ());
        }
        let bound = self
            .bound
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let bound =
            bound.ok_or_else(|| PyRuntimeError::new_err("the sideband was started before"))?;
        let config = Config {
            node,
            peers,
            key,
            job,
            epoch,
            heartbeat_ms,
            dead_after_ms,
            expire_after_ms,
        };
        let agent = Agent::start(bound, config).map_err(value_error)?;
        *self.agent.lock().unwrap_or_else(PoisonError::into_inner) = Some(agent);
        Ok(())
    }

    fn report_step(
        &self,
        step: i64,
        duration_ms: f64,
        fill: f32,
        fires: u32,
        holds: u32,
    ) -> PyResult<()> {
        self.running(|agent| agent.report_step(step, duration_ms, fill, fires, holds))
    }

    /// Arrays over the peers in order of node, and counts.
    fn snapshot<'py>(&self, py: Python<'py>) -> PyResult<pyo3::Bound<'py, PyDict>> {
        let (views, counts) = self.running(Agent::snapshot)?;
        let columns = PyDict::new(py);
        macro_rules! columns {
            ($($name:ident),*) => { $(
                columns.set_item(stringify!($name), column(py, views.iter().map(|v| v.$name))?)?;
            )* };
        }
        columns!(
            node, boot, silence_ms, phi, step, lag, drift_ms, bound_ms, offset_ms, skew_ppm,
            step_ms, fill, fires, holds
        );
        columns.set_item("state", column(py, views.iter().map(|v| v.state as u8))?)?;
        let refused = PyDict::new(py);
        for ((_, name), count) in Refusal::ALL.iter().zip(counts.refused) {
            refused.set_item(name, count)?;
        }
        columns.set_item("refused", refused)?;
        let closed = PyDict::new(py);
        for ((_, name), count) in Ending::ALL.iter().zip(counts.closed) {
            closed.set_item(name, count)?;
        }
        columns.set_item("closed", closed)?;
        columns.set_item("bytes_sent", counts.bytes_sent)?;
        columns.set_item("bytes_received", counts.bytes_received)?;
        Ok(columns)
    }

    /// Ends the thread within a second; true if it has ended, and the port is free, or never ran. In a forked child true.
    fn stop(&self, py: Python<'_>) -> bool {
        if self.forked() {
            return true;
        }
        self.bound
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let agent = self
            .agent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        py.detach(|| agent.is_none_or(|agent| agent.stop()))
    }
}

/// The key of a key file as hexadecimal digits.
#[pyfunction]
pub fn read_sideband_key(path: std::path::PathBuf) -> PyResult<String> {
    keyfile::read(&path)
        .map(|key| key.to_hex())
        .map_err(value_error)
}

/// Constants of `frame.rs`, `session.rs` and `peer.rs`, for who reads a snapshot or sends bytes.
#[pyfunction]
pub fn sideband_constants(py: Python<'_>) -> PyResult<pyo3::Bound<'_, PyDict>> {
    let constants = PyDict::new(py);
    constants.set_item("magic", pyo3::types::PyBytes::new(py, &frame::MAGIC))?;
    constants.set_item("version", frame::VERSION)?;
    constants.set_item("opening_bytes", frame::OPENING)?;
    constants.set_item("first_bytes", session::FIRST)?;
    constants.set_item("answer_bytes", session::ANSWER)?;
    constants.set_item("max_record_bytes", frame::MAX_RECORD)?;
    constants.set_item("phi_suspect", PHI_SUSPECT)?;
    Ok(constants)
}
