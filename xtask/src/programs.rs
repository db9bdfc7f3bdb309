//! Other programs: where they are, and running them so that a failure says what they said.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use crate::error::{Error, Result};

/// Finds a program in [`search_path`].
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    search_path().map(|directory| directory.join(program)).find(|candidate| candidate.is_file())
}

/// Returns the directories of `PATH`, and the `sbin` directories that Debian leaves out of a user's
/// `PATH`.
fn search_path() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let own: Vec<PathBuf> = std::env::split_paths(&path).collect();
    own.into_iter().chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
}

/// Creates the command of a program that [`find`] finds.
///
/// # Errors
///
/// A program that is missing, with the task that installs it.
pub(crate) fn command(program: &str) -> Result<Command> {
    let found = find(program).ok_or_else(|| {
        Error::unready(format!("the program {program} is missing: `cargo xtask setup` installs it"))
    })?;
    let mut command = Command::new(found);
    // What is parsed here is parsed in English.
    command.env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
    if let Ok(path) = std::env::join_paths(search_path()) {
        command.env("PATH", path);
    }
    Ok(command)
}

/// Runs a command whose output goes to the terminal.
///
/// # Errors
///
/// A command that can't be run, or that exits with anything but 0.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    // Standard output belongs to the data of the task itself.
    let status = command.stdout(std::io::stderr()).status().map_err(|error| cannot_run(command, &error))?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::failed(format!("{} ended with {status}", show(command))))
    }
}

/// Runs a command and returns what it wrote to standard output.
///
/// # Errors
///
/// A command that can't be run, or that exits with anything but 0: then with what it said.
pub(crate) fn capture(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().map_err(|error| cannot_run(command, &error))?;
    if output.status.success() { Ok(output.stdout) } else { Err(said(command, &output)) }
}

/// Like [`capture`], for a program that writes text.
pub(crate) fn capture_text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&capture(command)?).into_owned())
}

/// Writes the command as a shell would take it, as long as no argument needs quotes. A script is
/// shown as `…`.
pub(crate) fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words =
        words.map(OsStr::to_string_lossy).map(|word| if word.contains('\n') { "…".into() } else { word });
    words.collect::<Vec<_>>().join(" ")
}

fn cannot_run(command: &Command, error: &std::io::Error) -> Error {
    Error::failed(format!("run {}: {error}", show(command)))
}

fn said(command: &Command, output: &Output) -> Error {
    let words = String::from_utf8_lossy(&output.stderr);
    Error::failed(format!("{} ended with {}:\n{}", show(command), output.status, words.trim_end()))
}
