//! Files and directories of a VM, made private and removed; that one is gone already is success.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::steps::step;

/// Creates a directory of this user alone, with its parents.
///
/// # Errors
/// `Io`, `Host`.
pub(crate) fn make_private_dir(path: &Path) -> Result<()> {
    step("make a directory").map_err(Error::io("create", path))?;
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::io("create", path))
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
