//! The one error type of the crate: a sentence that names the operation, the argument and its value.

use std::fmt;

/// What went wrong, in words a user can act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// An argument has a shape, dtype, device or value that the operation does not take.
    Argument { op: &'static str, what: String },
    /// The tensor library that owns the memory reported a failure.
    Torch { op: &'static str, what: String },
    /// The driver refused or failed; a fault of an earlier kernel is reported by the next call that meets it.
    Cuda { op: &'static str, what: String },
    /// A defect of this library: reported instead of aborting the process.
    Internal { op: &'static str, what: String },
}

/// Shorthand used by every fallible function of the crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn argument(op: &'static str, what: impl Into<String>) -> Self {
        Error::Argument {
            op,
            what: what.into(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Argument { op, what } => write!(f, "{op}: {what}"),
            Error::Torch { op, what } => write!(f, "{op}: torch reported: {what}"),
            Error::Cuda { op, what } => write!(f, "{op}: CUDA reported: {what}"),
            Error::Internal { op, what } => write!(
                f,
                "{op}: internal error, please report it together with the call: {what}"
            ),
        }
    }
}

impl std::error::Error for Error {}
