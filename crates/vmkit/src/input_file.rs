//! Opens the files that a user named, which may turn out to be anything.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::{Error, Result};

/// A regular file, open for reading.
#[derive(Debug)]
pub(crate) struct InputFile {
    /// The open file.
    pub(crate) file: File,
    /// Where it is: absolute, without symbolic links.
    pub(crate) path: PathBuf,
    /// How long it is.
    pub(crate) bytes: u64,
}

impl InputFile {
    /// Opens the regular file at `path` and never waits for one: a FIFO or a device is refused
    /// unopened.
    ///
    /// # Errors
    /// `InvalidInput` on `field` where there is no file, one that may not be read, or anything but
    /// a regular file.
    pub(crate) fn open(field: &'static str, path: &Path) -> Result<Self> {
        let refused = |why: &str| Error::invalid(field, path.display(), why);
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => refused("there is no such file"),
            io::ErrorKind::NotADirectory => refused("a part of this path is not a directory"),
            io::ErrorKind::PermissionDenied => refused("this user may not read it"),
            _ => Error::io("open", path)(source),
        };
        let check = |metadata: &Metadata| match special(metadata) {
            Some(what) => Err(refused(&format!("this is {what}: name a regular file"))),
            None => Ok(()),
        };
        let found = path.canonicalize().map_err(failed)?;
        // Asked before it is opened, since opening alone has effects on some devices, and after,
        // since only that is certain.
        check(&found.metadata().map_err(failed)?)?;
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let file = OpenOptions::new().read(true).custom_flags(flags).open(&found).map_err(failed)?;
        let metadata = file.metadata().map_err(Error::io("examine", path))?;
        check(&metadata)?;
        Ok(Self { file, path: found, bytes: metadata.len() })
    }
}

/// Returns what this is, unless it is a regular file.
fn special(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    match () {
        () if kind.is_file() => None,
        () if kind.is_dir() => Some("a directory"),
        () if kind.is_fifo() => Some("a named pipe"),
        () if kind.is_socket() => Some("a socket"),
        () => Some("a device"),
    }
}
