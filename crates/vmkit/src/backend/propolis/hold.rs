//! The lock of an operation: held while something of a VM is changed, also by every program that
//! the operation runs on the host.
//!
//! A program has the lock's file as its standard input. So the lock is not free before the last of
//! them has ended, even where the future that ran it was dropped or its process killed: a
//! `zfs clone` that is still at work can't finish behind a `destroy` that found nothing to destroy.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::time::Instant;

use crate::error::{Error, Result};
use crate::flock::{LockMode, LockWait, is_at, is_locked};
use crate::steps::step;

/// The lock, held until this and every copy of it is closed.
#[derive(Debug)]
pub(super) struct OperationLock(File);

impl OperationLock {
    /// Waits for the lock, whose file is made if need be; `None` where the directory is not there.
    ///
    /// # Errors
    /// `Busy` once the deadline has passed.
    pub(super) async fn take(path: &Path, deadline: Instant) -> Result<Option<Self>> {
        loop {
            step("operation: lock").map_err(Error::io("lock", path))?;
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = match options.open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io("open", path)(error)),
            };
            let file = locked(file, path, deadline).await?;
            // It may have been removed with its VM meanwhile; then the lock of the new file counts.
            if is_at(&file, path)? {
                return Ok(Some(Self(file)));
            }
        }
    }

    /// Returns a copy for the standard input of a program.
    pub(super) fn as_input(&self) -> io::Result<File> {
        self.0.try_clone()
    }
}

/// Returns whether an operation is at work.
pub(super) fn is_held(path: &Path) -> Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    is_locked(file).map_err(Error::io("lock", path))
}

/// Waits for the lock of an open file.
async fn locked(file: File, path: &Path, deadline: Instant) -> Result<File> {
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => return Ok(file),
        Err(Errno::WOULDBLOCK) => {}
        Err(errno) => return Err(Error::io("lock", path)(errno.into())),
    }
    let mut waiting = LockWait::begin(file, LockMode::Alone, path)?;
    match waiting.until(deadline).await.map_err(Error::io("lock", path))? {
        Some(locked) => Ok(locked),
        None => Err(Error::Busy {
            what: format!("{}, which is held during an operation on the VM,", path.display()),
            holder: None,
        }),
    }
}
