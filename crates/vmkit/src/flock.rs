//! What all locks in files need, beside `flock` itself.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Waits in the kernel until the lock of an open file is had, whatever signals come.
///
/// It has no deadline, and no descriptor to poll: for a thread that nobody waits for.
pub(crate) fn wait_in_kernel(file: &File, operation: FlockOperation) -> Result<(), Errno> {
    loop {
        match flock(file, operation) {
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}

/// Tells whether an open file is the one that the path names now: the one that was locked may have been removed, and another made.
///
/// # Errors
/// `Io`, `Host`.
pub(crate) fn is_at(file: &File, path: &Path) -> Result<bool> {
    let held = file.metadata().map_err(Error::io("look at", path))?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("look at", path)(error)),
    }
}
