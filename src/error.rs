//! The crate's one error type. A message names the tensor, file, row or flag, gives the numbers, and says what to do.

use std::path::{Path, PathBuf};

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong. `Display` is written for the person at the terminal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An op got a tensor of a shape, dtype, layout or device that it does not take.
    #[error("{op}: {problem}")]
    Op {
        /// The op's name, as in `backend::custom_ops`.
        op: &'static str,
        /// Which tensor, what it is, what it should be.
        problem: String,
    },
    /// A file or folder says something that cannot be used.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The operating system refused a file operation.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A flag, a configuration key or a library argument has a value that cannot be used.
    #[error("{name}: {problem}")]
    Setting {
        /// The flag (`--rank`) or key (`rank`).
        name: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Training stopped because going on would produce a wrong or useless adapter.
    #[error("training stopped at step {step}: {problem}")]
    Training {
        /// The optimizer step, from 1.
        step: usize,
        /// What was seen and what to do.
        problem: String,
    },
    /// A device that was asked for is not there, or cannot do what was asked.
    #[error("device {device}: {problem}")]
    Device {
        /// The device's name: `cpu`, `cuda` or `metal`.
        device: String,
        /// What is missing.
        problem: String,
    },
    /// A model could not be brought from the hub.
    #[error("hub model '{model}': {problem}")]
    Hub {
        /// The model's name as given.
        model: String,
        /// What happened and what to do.
        problem: String,
    },
    /// A chat template or a tokenizer failed.
    #[error("{0}")]
    Text(String),
    /// An error that Candle returned.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// [`Error::Op`] from anything printable.
    pub fn op(op: &'static str, problem: impl Into<String>) -> Self {
        Self::Op { op, problem: problem.into() }
    }

    /// [`Error::File`] from anything printable.
    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), problem: problem.into() }
    }

    /// [`Error::Io`], for `map_err`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// [`Error::Setting`] from anything printable.
    pub fn setting(name: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Setting { name: name.into(), problem: problem.into() }
    }
}

/// Inside Candle's ops and graphs our errors travel as Candle errors and keep their text.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(inner) => inner,
            other => Self::wrap(other),
        }
    }
}
