//! Programs that a test writes and has run.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes a program of this text, in place of one that is there.
///
/// A process of its own writes it. A file that is open to be written can't be executed, and what a
/// test process has open, a child that another of its threads is just starting has open as well.
///
/// # Errors
/// Those of running `install`, and that it failed.
pub fn write_program(path: &Path, text: &str) -> io::Result<()> {
    let mut install =
        Command::new("install").args(["-m", "755", "/dev/stdin"]).arg(path).stdin(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = install.stdin.take() {
        stdin.write_all(text.as_bytes())?;
    }
    match install.wait()? {
        status if status.success() => Ok(()),
        status => Err(io::Error::other(format!("install -m 755 /dev/stdin {}: {status}", path.display()))),
    }
}
