//! Copying files into a guest and out of it, by the server's SFTP.
//!
//! A file is written under a temporary name in its directory, and renamed when it is complete. The
//! guest is not trusted with this host: below the directory that the caller named, everything is
//! opened relative to its parent, and no symbolic link is followed.
//!
//! Source: draft-ietf-secsh-filexfer-02, which is SFTP version 3; OpenSSH's `PROTOCOL` for the
//! extensions.

mod download;
mod ends;
mod hello;
mod holes;
mod leftovers;
mod upload;

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use russh::client::Handle;
use russh_sftp::client::{Config, RawSftpSession, error::Error as SftpError};
use russh_sftp::protocol::{FileAttributes, Packet, StatusCode};
use uuid::Uuid;

pub use self::download::check_download;
use self::ends::{CopyEnds, FileAction, PATIENCE, parent_and_name};
use self::hello::{AfterPreface, SftpPreface};
pub use self::upload::check_upload;
use super::Session;
use super::verifier::ServerVerifier;
use crate::deadline::later;
use crate::error::{Error, ErrorKind, Result};

/// The size of one request; every server accepts this.
const CHUNK_BYTES: u32 = 32 * 1024;
/// The minimum free space that a file system needs for a new name.
const SMALLEST_BLOCK: u64 = 4096;
/// The number of pending requests: 2 MiB, which is SSH's window.
const IN_FLIGHT: usize = 64;
/// OpenSSH's rename, which replaces an existing file.
const POSIX_RENAME: &str = "posix-rename@openssh.com";

/// The files of a guest, with the rights of the session's user.
pub struct GuestFiles {
    raw: Arc<RawSftpSession>,
    /// The connection, for a program that finds the holes of a file; it ends with its session.
    connection: Weak<Handle<ServerVerifier>>,
    /// The guest's name in errors.
    name: String,
    replaces: bool,
    /// The temporary file in the guest that is being written.
    unfinished: Mutex<Option<String>>,
    /// The directories of the guest without leftovers.
    swept: Mutex<HashSet<String>>,
}

/// The progress of a copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CopyProgress {
    /// The file that is being copied: its source.
    pub file: String,
    /// How many bytes of it are copied; holes count.
    pub file_bytes: u64,
    /// Its length in bytes.
    pub file_size: u64,
    /// What was copied in all.
    pub total: CopySummary,
}

/// A summary of a copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CopySummary {
    /// The number of files, including symbolic links.
    pub files: u64,
    /// Their size in bytes; holes count.
    pub bytes: u64,
    /// What was skipped: neither a file nor a directory nor a symbolic link.
    pub skipped: Vec<String>,
}

/// Called with the progress of a copy.
pub type CopyObserver<'a> = &'a mut (dyn FnMut(&CopyProgress) + Send);

impl Session {
    /// Opens SFTP to the guest's files.
    ///
    /// # Errors
    /// `Guest` if its server has no SFTP; `TimedOut`.
    pub async fn files(&self, name: &str, timeout: Duration) -> Result<GuestFiles> {
        self.within(later(timeout), "the guest's SFTP server", self.begin_files(name)).await
    }

    async fn begin_files(&self, name: &str) -> Result<GuestFiles> {
        let mut channel = self.channel().await?;
        let failed = |error| self.failed("cannot start SFTP", error);
        channel.request_subsystem(true, "sftp").await.map_err(failed)?;
        loop {
            match channel.wait().await {
                Some(russh::ChannelMsg::Success) => break,
                Some(russh::ChannelMsg::Failure | russh::ChannelMsg::Close) | None => {
                    return Err(self.problem(
                        "the guest's SSH server has no SFTP, which copying needs: install `openssh-sftp-server` in the guest",
                    ));
                }
                Some(_) => {}
            }
        }
        let config = Config { request_timeout_secs: PATIENCE.as_secs(), ..Config::default() };
        let preface = SftpPreface::default();
        let stream = AfterPreface::new(channel.into_stream(), preface.clone());
        let raw = RawSftpSession::new_with_config(stream, config);
        let hello = raw.init().await.map_err(|error| self.problem(not_begun(&preface)).with_source(error))?;
        let replaces = hello.extensions.contains_key(POSIX_RENAME);
        Ok(GuestFiles {
            raw: Arc::new(raw),
            connection: self.connection(),
            name: name.to_owned(),
            replaces,
            unfinished: Mutex::default(),
            swept: Mutex::default(),
        })
    }
}

/// Returns why SFTP did not start, from the output in its place.
fn not_begun(preface: &SftpPreface) -> String {
    let said = preface.first_line();
    let expected = "expected a login shell that runs its command, and OpenSSH's SFTP server in the guest";
    match said.is_empty() {
        true => format!("SFTP did not start, and the guest printed nothing else ({expected})"),
        false => format!("SFTP did not start: the guest's shell printed {said:?} instead ({expected})"),
    }
}

impl fmt::Debug for GuestFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Files({})", self.name)
    }
}

impl GuestFiles {
    /// Removes the unfinished file of a dropped copy in the guest, if there is one.
    pub async fn tidy_up(&self) {
        let unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(unfinished) = unfinished {
            // If this fails, a later copy removes the file because of its name.
            let _ = self.raw.remove(unfinished).await;
        }
    }

    fn set_unfinished(&self, path: Option<String>) {
        *self.unfinished.lock().unwrap_or_else(PoisonError::into_inner) = path;
    }

    /// Returns the path for the server: a relative one starts at the user's home.
    fn path(path: &str) -> &str {
        match path.strip_prefix("~/").unwrap_or(path) {
            "" | "~" => ".",
            path => path,
        }
    }

    /// Returns the attributes of a path, following a link; `None` if it does not exist.
    async fn look(&self, path: &str, ends: &CopyEnds) -> Result<Option<FileAttributes>> {
        match self.raw.stat(path).await {
            Ok(found) => Ok(Some(found.attrs)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(ends.remote(FileAction::Find, path, error)),
        }
    }

    /// Creates the error for something that could not be created or written in the guest. Its
    /// server also reports "not found" for a directory in which nothing can be created, such as
    /// those of `/proc`.
    async fn unmade(&self, act: FileAction, path: &str, error: SftpError, ends: &CopyEnds) -> Error {
        let dir = parent_and_name(path).0;
        if let Some(full) = self.full(dir, &error, SMALLEST_BLOCK, ends).await {
            return full;
        }
        if is_missing(&error)
            && let Ok(Some(found)) = self.look(dir, ends).await
            && kind(&found) == FileKind::Dir
        {
            return ends.nothing_made(dir, "in the guest");
        }
        ends.remote(act, path, error)
    }

    /// Returns the error for a full file system, if that is why the guest refused an action in this
    /// directory, which has fewer free bytes than needed: the server has the same status for that
    /// and for all else.
    async fn full(&self, dir: &str, error: &SftpError, needed: u64, ends: &CopyEnds) -> Option<Error> {
        let SftpError::Status(status) = error else { return None };
        if status.status_code != StatusCode::Failure {
            return None;
        }
        let found = self.raw.statvfs(dir).await.ok()?;
        let room = found.blocks_avail.saturating_mul(found.fragment_size);
        if found.blocks > 0 && room < needed {
            return Some(ends.full(dir, &format!("no space left on device ({room} bytes are free)")));
        }
        // A file system without a table of inodes reports none at all.
        (found.inodes > 0 && found.inodes_avail == 0)
            .then(|| ends.full(dir, "no space left on device (no inode is free)"))
    }

    /// Returns the path without symbolic links.
    async fn resolved(&self, path: &str, ends: &CopyEnds) -> Result<String> {
        let answer =
            self.raw.realpath(path).await.map_err(|error| ends.remote(FileAction::Find, path, error))?;
        let found = answer.files.into_iter().next().map(|file| file.filename);
        found.ok_or_else(|| ends.problem(ErrorKind::Guest, format!("the guest did not resolve {path:?}")))
    }

    /// Renames a file, replacing an existing one.
    async fn rename(&self, from: &str, to: &str) -> Result<(), SftpError> {
        if self.replaces {
            let mut data = Vec::new();
            for path in [from, to] {
                let bytes = u32::try_from(path.len()).map_err(|_| SftpError::Limited("a path".to_owned()))?;
                data.extend_from_slice(&bytes.to_be_bytes());
                data.extend_from_slice(path.as_bytes());
            }
            return match self.raw.extended(POSIX_RENAME, data).await? {
                Packet::Status(status) if status.status_code == StatusCode::Ok => Ok(()),
                Packet::Status(status) => Err(SftpError::Status(status)),
                _ => Err(SftpError::UnexpectedPacket),
            };
        }
        match self.raw.remove(to).await {
            Err(error) if is_missing(&error) => {}
            removed => drop(removed?),
        }
        self.raw.rename(from, to).await.map(drop)
    }
}

/// Returns whether the server reports that something does not exist.
fn is_missing(error: &SftpError) -> bool {
    matches!(error, SftpError::Status(status) if status.status_code == StatusCode::NoSuchFile)
}

/// The kind of a file of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileKind {
    File,
    Dir,
    Link,
    Other,
}

/// Returns the kind, by the type in the mode. That is a number and not a set of flags: a socket has
/// the bits of both a file and a directory.
fn kind(found: &FileAttributes) -> FileKind {
    match found.permissions.map(|mode| mode & 0o170_000) {
        Some(0o100_000) => FileKind::File,
        Some(0o040_000) => FileKind::Dir,
        Some(0o120_000) => FileKind::Link,
        _ => FileKind::Other,
    }
}

/// Returns a temporary name for a file, in the same directory.
fn unfinished(name: &str) -> String {
    let mark = Uuid::new_v4().simple().to_string();
    // A file's name has at most 255 bytes.
    let mut cut = name.len().min(200);
    while !name.is_char_boundary(cut) {
        cut -= 1;
    }
    format!(".{}.vmkit-{}", &name[..cut], &mark[..8])
}

fn joined(dir: &str, name: &str) -> String {
    if dir.ends_with('/') { format!("{dir}{name}") } else { format!("{dir}/{name}") }
}

/// Returns the last part of a path as it was typed; `None` if that is not a name in its directory
/// (`.`, `..`, `/`). Then its content is copied, as by `cp -r` and `scp -r`.
fn typed_name(path: &str) -> Option<&str> {
    match parent_and_name(path.trim_end_matches('/')).1 {
        "" | "." | ".." => None,
        name => Some(name),
    }
}

/// Returns the kind of a file, for errors.
fn described(found: &FileAttributes) -> &'static str {
    match found.permissions.map(|mode| mode & 0o170_000) {
        Some(0o040_000) => "a directory",
        Some(0o120_000) => "a symbolic link",
        Some(0o010_000) => "a named pipe",
        Some(0o140_000) => "a socket",
        Some(0o020_000 | 0o060_000) => "a device",
        _ => "something else",
    }
}
