//! What a task says when it can't go on.

use std::fmt;
use std::io;
use std::path::Path;

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// A task's failure: a text for a developer, and the code that the process exits with.
#[derive(Debug)]
pub(crate) struct Error {
    pub(crate) text: String,
    pub(crate) exit_code: u8,
}

impl Error {
    /// Creates the failure of a task that was able to try.
    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self { text: text.into(), exit_code: 1 }
    }

    /// Creates the failure of a task that can't begin before the machine or the command line is
    /// changed.
    pub(crate) fn unready(text: impl Into<String>) -> Self {
        Self { text: text.into(), exit_code: 2 }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Adds the verb and the path to an I/O error, which knows neither.
pub(crate) trait PathContext<T> {
    /// Turns the error into "`verb` `path`: cause".
    fn at(self, verb: &str, path: &Path) -> Result<T>;
}

impl<T> PathContext<T> for io::Result<T> {
    fn at(self, verb: &str, path: &Path) -> Result<T> {
        self.map_err(|error| Error::failed(format!("{verb} {}: {error}", path.display())))
    }
}
