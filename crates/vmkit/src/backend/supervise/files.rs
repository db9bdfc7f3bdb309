//! Files and directories of a VM, made private and removed; that one is gone already is success.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use super::SupervisionPaths;
use crate::error::{Error, Result};
use crate::flock::is_locked;
use crate::input_file::open_regular;
use crate::steps::step;
use crate::store::denied;

/// Creates a directory of this user alone, with its parents.
///
/// # Errors
/// `Io`, `Host`.
pub(crate) fn make_private_dir(path: &Path) -> Result<()> {
    step("create a directory").map_err(Error::io("create", path))?;
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::io("create", path))
}

/// Returns whether a process holds the lock `alive`, without keeping it.
pub(crate) fn is_held(place: &SupervisionPaths) -> Result<bool> {
    let path = &place.alive;
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(denied("open", path)(error)),
    };
    is_locked(file).map_err(Error::io("lock", path))
}

/// Removes a file. A directory that took its place stays, for the removal of the VM's directory.
///
/// # Errors
/// `Io`, `Host`.
pub(crate) fn remove_file(path: &Path) -> Result<()> {
    step("remove a file").map_err(Error::io("remove", path))?;
    match fs::remove_file(path) {
        Err(error) if !is_gone(&error) && error.kind() != io::ErrorKind::IsADirectory => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Removes a directory, unless it has foreign files in it.
///
/// # Errors
/// `Io`, `Host`.
pub(crate) fn remove_dir(path: &Path) -> Result<()> {
    step("remove a directory").map_err(Error::io("remove", path))?;
    match fs::remove_dir(path) {
        Err(error) if !is_gone(&error) && error.kind() != io::ErrorKind::DirectoryNotEmpty => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Returns whether an error says that what was to be removed or read is not there.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
