//! The two ends of a copy in its errors, and the failures that the copy of a tree continues after.

use std::io;
use std::path::Path;
use std::time::Duration;

use russh_sftp::client::error::Error as SftpError;
use russh_sftp::protocol::StatusCode;

use crate::error::{Error, ErrorKind, Result};

/// The timeout of one request.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// The maximum number of failures of one copy that are kept; the others are only counted.
const MOST_FAILURES: usize = 100;
/// The maximum number of names in the error of a whole copy.
const MOST_NAMED: usize = 3;

/// The two ends of a copy, for errors.
#[derive(Debug, Clone)]
pub(super) struct CopyEnds {
    pub(super) from: String,
    pub(super) to: String,
}

impl CopyEnds {
    /// Returns the ends of a copy from this host into a guest.
    pub(super) fn of_upload(from: &Path, guest: &str, to: &str) -> Self {
        Self { from: from.display().to_string(), to: format!("{guest}:{}", shown(to)) }
    }

    /// Returns the ends of a copy out of a guest to this host.
    pub(super) fn of_download(guest: &str, from: &str, to: &Path) -> Self {
        Self { from: format!("{guest}:{from}"), to: shown(&to.to_string_lossy()).to_owned() }
    }

    pub(super) fn problem(&self, kind: ErrorKind, problem: impl Into<String>) -> Error {
        Error::Copy {
            from: self.from.clone(),
            to: self.to.clone(),
            problem: problem.into(),
            kind,
            source: None,
        }
    }

    /// Creates the error for an action that this host refused.
    pub(super) fn local(&self, act: FileAction, path: &Path, source: io::Error) -> Error {
        let parent = || path.parent().unwrap_or(path).display().to_string();
        match (source.kind(), act) {
            (io::ErrorKind::NotFound, FileAction::Make | FileAction::Write)
                if path.parent().is_some_and(Path::is_dir) =>
            {
                self.nothing_made(&parent(), "on this host")
            }
            (io::ErrorKind::NotFound | io::ErrorKind::NotADirectory, _) => {
                self.missing(act, &parent(), "on this host")
            }
            (io::ErrorKind::PermissionDenied, _) => {
                self.problem(ErrorKind::InvalidInput, "permission denied on this host")
            }
            (kind, _) => Error::Copy {
                from: self.from.clone(),
                to: self.to.clone(),
                problem: format!("cannot {} {} on this host", act.verb(), path.display()),
                kind: Error::io(act.verb(), path)(kind.into()).kind(),
                source: Some(Box::new(source)),
            },
        }
    }

    /// Creates the error for an action that the guest refused.
    pub(super) fn remote(&self, act: FileAction, path: &str, error: SftpError) -> Error {
        match error {
            SftpError::Status(status) => match status.status_code {
                StatusCode::NoSuchFile => self.missing(act, parent_and_name(path).0, "in the guest"),
                StatusCode::PermissionDenied => {
                    self.problem(ErrorKind::InvalidInput, "permission denied in the guest")
                }
                _ => {
                    let (verb, said) = (act.verb(), status.error_message);
                    let problem = format!("the guest's SFTP server can't {verb} {path}: {said:?}");
                    self.problem(ErrorKind::Guest, problem)
                }
            },
            SftpError::Timeout => {
                let problem = format!("no reply from the guest for {} s", PATIENCE.as_secs());
                self.problem(ErrorKind::TimedOut, problem)
            }
            error => Error::Copy {
                from: self.from.clone(),
                to: self.to.clone(),
                problem: "the connection to the guest was lost".to_owned(),
                kind: ErrorKind::Guest,
                source: Some(Box::new(error)),
            },
        }
    }

    /// Returns the error for a missing source, or for a missing directory of the destination.
    fn missing(&self, act: FileAction, parent: &str, end: &str) -> Error {
        let problem = match act {
            FileAction::Find | FileAction::Read => format!("there is no such file {end}"),
            FileAction::Make | FileAction::Write => format!("there is no directory {parent} {end}"),
        };
        self.problem(ErrorKind::NotFound, problem)
    }

    /// Returns the error for a directory in which nothing can be created.
    pub(super) fn nothing_made(&self, dir: &str, end: &str) -> Error {
        self.problem(ErrorKind::InvalidInput, format!("nothing can be created in the directory {dir} {end}"))
    }

    /// Returns the error for a full file system of the guest.
    pub(super) fn full(&self, dir: &str, lacks: &str) -> Error {
        Error::Copy {
            from: self.from.clone(),
            to: self.to.clone(),
            problem: format!("the file system of {dir} in the guest is full"),
            kind: ErrorKind::Guest,
            source: Some(Box::new(io::Error::new(io::ErrorKind::StorageFull, lacks.to_owned()))),
        }
    }

    /// Returns the error for a special file; `found` is its kind.
    pub(super) fn special(&self, found: &str, end: &str) -> Error {
        let problem = format!("the file {end} is {found} (expected a regular file)");
        self.problem(ErrorKind::InvalidInput, problem)
    }

    /// Returns the error for a directory without `recursive`.
    pub(super) fn flat(&self) -> Error {
        Error::NotRecursive { from: self.from.clone(), to: self.to.clone() }
    }

    /// Returns the error for a directory whose destination is a file.
    pub(super) fn file_there(&self, end: &str) -> Error {
        self.problem(ErrorKind::InvalidInput, format!("a file of that name exists {end}"))
    }

    /// Returns the error for a destination that is a dangling symbolic link.
    pub(super) fn dangling(&self, end: &str) -> Error {
        let problem =
            format!("the destination {end} is a symbolic link without a target (expected a file or no file)");
        self.problem(ErrorKind::InvalidInput, problem)
    }

    /// Returns the error for a destination that is named as a directory and is not one; `there` is
    /// whether it exists.
    pub(super) fn no_dir(&self, there: bool, end: &str) -> Error {
        match there {
            true => {
                self.problem(ErrorKind::InvalidInput, format!("the destination {end} is not a directory"))
            }
            false => self.problem(ErrorKind::NotFound, format!("there is no such directory {end}")),
        }
    }

    /// Returns the error for a source without a name and a directory as the destination.
    pub(super) fn nameless(&self, end: &str) -> Error {
        let problem = format!(
            "a pipe has no name for its copy, and the destination {end} is a directory (expected {}/NAME)",
            self.to.trim_end_matches('/')
        );
        self.problem(ErrorKind::InvalidInput, problem)
    }
}

/// The action that was refused.
#[derive(Debug, Clone, Copy)]
pub(super) enum FileAction {
    Find,
    Read,
    Make,
    Write,
}

impl FileAction {
    fn verb(self) -> &'static str {
        match self {
            FileAction::Find => "find",
            FileAction::Read => "read",
            FileAction::Make => "make",
            FileAction::Write => "write",
        }
    }
}

/// The failures that the copy of a tree continues after.
#[derive(Debug, Default)]
pub(super) struct LeftOut {
    /// What has no name in UTF-8.
    unnamed: Vec<String>,
    failures: Vec<Error>,
    failed: usize,
}

impl LeftOut {
    /// Adds something that has no name in UTF-8.
    pub(super) fn add_unnamed(&mut self, what: String) {
        self.unnamed.push(what);
    }

    /// Adds the failure of one file or directory.
    ///
    /// # Errors
    /// The failure itself if nothing else could be copied either.
    pub(super) fn add(&mut self, failure: Error) -> Result<()> {
        if ends_all(&failure) {
            return Err(failure);
        }
        self.failed += 1;
        if self.failures.len() < MOST_FAILURES {
            self.failures.push(failure);
        }
        Ok(())
    }

    /// Returns the error for a copy that left something out; `skipped` is what can't be copied at
    /// all.
    pub(super) fn check(self, ends: &CopyEnds, skipped: &[String]) -> Result<()> {
        if self.unnamed.is_empty() && self.failures.is_empty() {
            return Ok(());
        }
        let mut parts = Vec::new();
        if !self.failures.is_empty() {
            let names = self.failures.iter().filter_map(|failure| match failure {
                Error::Copy { from, .. } => Some(from.as_str()),
                _ => None,
            });
            parts.push(format!(
                "{} could not be copied",
                listed(names.take(MOST_NAMED).collect(), self.failed)
            ));
        }
        if let Some(first) = self.unnamed.first() {
            parts.push(format!(
                "{} is not UTF-8, which SFTP requires",
                listed(vec![first], self.unnamed.len())
            ));
        }
        if let Some(first) = skipped.first() {
            let first = listed(vec![first], skipped.len());
            parts.push(format!("{first} was skipped: neither a file nor a directory nor a link"));
        }
        parts.push("all else was copied".to_owned());
        Err(Error::CopyPart {
            from: ends.from.as_str().into(),
            to: ends.to.as_str().into(),
            problem: parts.join("; ").into(),
            kind: if self.failures.is_empty() { ErrorKind::InvalidInput } else { ErrorKind::Io },
            more: u32::try_from(self.failed - self.failures.len()).unwrap_or(u32::MAX),
            failures: self.failures,
            skipped: skipped.into(),
        })
    }
}

/// Returns the first names, and how many more there are.
fn listed(names: Vec<&str>, all: usize) -> String {
    match all - names.len() {
        0 => names.join(", "),
        more => format!("{} (and {more} more)", names.join(", ")),
    }
}

/// Returns whether a failure ends the whole copy: a lost connection, a full disk.
pub(super) fn ends_all(failure: &Error) -> bool {
    let Error::Copy { kind, source, .. } = failure else { return true };
    let is_full =
        |error: &io::Error| matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
    match source {
        _ if *kind == ErrorKind::TimedOut => true,
        Some(source) => source.is::<SftpError>() || source.downcast_ref().is_some_and(is_full),
        None => false,
    }
}

/// Splits a path of the guest into its directory and its name.
pub(super) fn parent_and_name(path: &str) -> (&str, &str) {
    match path.rsplit_once('/') {
        None => (".", path),
        Some(("", name)) => ("/", name),
        Some((parent, name)) => (parent, name),
    }
}

/// Returns a path as errors show it: without the ending that requires a directory.
pub(super) fn shown(place: &str) -> &str {
    place.strip_suffix("/.").unwrap_or(place)
}
