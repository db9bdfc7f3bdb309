//! Files copied into a guest and out of it, over the server's SFTP.
//!
//! What is being written has a name of its own, in the directory where it is going to be, and gets
//! its real one when it is whole. The guest is not trusted with this host: below the directory that
//! somebody named, everything is opened relative to its parent and no symbolic link is ever walked
//! through.
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

/// How much one request carries. Every server takes this much.
const CHUNK_BYTES: u32 = 32 * 1024;
/// What a file system needs for a new name at the least.
const SMALLEST_BLOCK: u64 = 4096;
/// How many requests are on their way at the same time: 2 MiB, which is SSH's window.
const IN_FLIGHT: usize = 64;
/// OpenSSH's rename that replaces what is there.
const POSIX_RENAME: &str = "posix-rename@openssh.com";

/// The files of a guest, as the user of the session may use them.
pub struct GuestFiles {
    raw: Arc<RawSftpSession>,
    /// The connection, for a program that finds the holes of a file; it ends with its session.
    connection: Weak<Handle<ServerVerifier>>,
    /// What errors call the guest.
    name: String,
    replaces: bool,
    /// The file in the guest that is being written.
    unfinished: Mutex<Option<String>>,
    /// The directories of the guest in which nothing of killed copies is left.
    swept: Mutex<HashSet<String>>,
}

/// How far a copy is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CopyProgress {
    /// The file that is being copied, at the end that it comes from.
    pub file: String,
    /// How much of it has been copied, in bytes; holes count.
    pub file_bytes: u64,
    /// How long it is, in bytes.
    pub file_size: u64,
    /// What was copied all in all.
    pub total: CopySummary,
}

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct CopySummary {
    /// How many files, symbolic links among them.
    pub files: u64,
    /// How many bytes of them; holes count.
    pub bytes: u64,
    /// What was left out: neither file nor directory nor symbolic link.
    pub skipped: Vec<String>,
}

/// Tells of the progress of a copy.
pub type CopyObserver<'a> = &'a mut (dyn FnMut(&CopyProgress) + Send);

impl Session {
    /// Begins to use the guest's files.
    ///
    /// # Errors
    /// `Guest` where its server has no SFTP; `TimedOut`.
    pub async fn files(&self, name: &str, timeout: Duration) -> Result<GuestFiles> {
        self.within(later(timeout), "the guest's SFTP server", self.begin_files(name)).await
    }

    async fn begin_files(&self, name: &str) -> Result<GuestFiles> {
        let mut channel = self.channel().await?;
        let failed = |error| self.failed("cannot begin SFTP", error);
        channel.request_subsystem(true, "sftp").await.map_err(failed)?;
        loop {
            match channel.wait().await {
                Some(russh::ChannelMsg::Success) => break,
                Some(russh::ChannelMsg::Failure | russh::ChannelMsg::Close) | None => {
                    return Err(self.problem(
                        "the guest's SSH server has no SFTP, which copies need: install `openssh-sftp-server` in the guest",
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

/// Returns why SFTP did not begin, by what came in its place.
fn not_begun(preface: &SftpPreface) -> String {
    let said = preface.first_line();
    let expected =
        "expected a login shell that runs what it is given, and OpenSSH's SFTP server in the guest";
    match said.is_empty() {
        true => format!("SFTP does not begin, and the guest says nothing else ({expected})"),
        false => format!("SFTP does not begin: the guest's shell printed {said:?} in its place ({expected})"),
    }
}

impl fmt::Debug for GuestFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Files({})", self.name)
    }
}

impl GuestFiles {
    /// Removes what a dropped copy has left half-written in the guest, if anything.
    pub async fn tidy_up(&self) {
        let unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(unfinished) = unfinished {
            // Whoever removes it later finds by its name what it is.
            let _ = self.raw.remove(unfinished).await;
        }
    }

    fn set_unfinished(&self, path: Option<String>) {
        *self.unfinished.lock().unwrap_or_else(PoisonError::into_inner) = path;
    }

    /// Returns the path as the server knows it: below the user's home where it is relative.
    fn path(path: &str) -> &str {
        match path.strip_prefix("~/").unwrap_or(path) {
            "" | "~" => ".",
            path => path,
        }
    }

    /// Returns what lies at a path, its last link followed; nothing where there is nothing.
    async fn look(&self, path: &str, ends: &CopyEnds) -> Result<Option<FileAttributes>> {
        match self.raw.stat(path).await {
            Ok(found) => Ok(Some(found.attrs)),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(ends.remote(FileAction::Find, path, error)),
        }
    }

    /// Creates the error for something that could not be made or written in the guest. Its server
    /// says that something is not there also of a directory in which nothing can be made, such as
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

    /// Returns the error for a file system that is full, where that is why the guest refused
    /// something in this directory, for which it has fewer bytes than needed: its server has one
    /// word for that and for all else.
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
        // A file system without a table of inodes has none at all.
        (found.inodes > 0 && found.inodes_avail == 0)
            .then(|| ends.full(dir, "no space left on device (no inode is free)"))
    }

    /// Returns the path without any symbolic link in it.
    async fn resolved(&self, path: &str, ends: &CopyEnds) -> Result<String> {
        let answer =
            self.raw.realpath(path).await.map_err(|error| ends.remote(FileAction::Find, path, error))?;
        let found = answer.files.into_iter().next().map(|file| file.filename);
        found.ok_or_else(|| ends.problem(ErrorKind::Guest, format!("the guest has no path for {path:?}")))
    }

    /// Gives a file its name, in the place of what has it.
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

/// Returns whether the server says that something is not there.
fn is_missing(error: &SftpError) -> bool {
    matches!(error, SftpError::Status(status) if status.status_code == StatusCode::NoSuchFile)
}

/// What a file of the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FileKind {
    File,
    Dir,
    Link,
    Other,
}

/// Tells what this is, by the type in the mode, which is a number and not a set of flags: a socket
/// has the bits of both a file and a directory.
fn kind(found: &FileAttributes) -> FileKind {
    match found.permissions.map(|mode| mode & 0o170_000) {
        Some(0o100_000) => FileKind::File,
        Some(0o040_000) => FileKind::Dir,
        Some(0o120_000) => FileKind::Link,
        _ => FileKind::Other,
    }
}

/// A name for what is not whole yet, beside what it will be.
fn unfinished(name: &str) -> String {
    let mark = Uuid::new_v4().simple().to_string();
    // A file's name has 255 bytes at the most.
    let mut cut = name.len().min(200);
    while !name.is_char_boundary(cut) {
        cut -= 1;
    }
    format!(".{}.vmkit-{}", &name[..cut], &mark[..8])
}

fn joined(dir: &str, name: &str) -> String {
    if dir.ends_with('/') { format!("{dir}{name}") } else { format!("{dir}/{name}") }
}

/// Returns the last part of a path as it was typed; nothing where that is no name in its directory
/// (`.`, `..`, `/`). What is copied then is what is in it, as `cp -r` and `scp -r` have it.
fn typed_name(path: &str) -> Option<&str> {
    match parent_and_name(path.trim_end_matches('/')).1 {
        "" | "." | ".." => None,
        name => Some(name),
    }
}

/// Returns what this is, for errors.
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
