//! The mark of a VM that lives no longer than a process: a file that this process keeps locked.
//!
//! The kernel lets go of the lock however the process ends, in whatever namespace it lived. So a
//! free lock is proof that the VM is no longer needed.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use super::LockedVm;
use crate::error::{Error, Result};
use crate::steps::step;

/// The name of that file in the VM's directory.
pub(super) const OWNER: &str = "owner.lock";

/// Keeps an ephemeral VM from being removed by another process; dropped, the VM may be removed.
#[derive(Debug)]
pub struct EphemeralGuard(#[expect(dead_code, reason = "it is locked as long as it is open")] File);

impl LockedVm {
    /// Creates this process the VM's owner.
    pub(crate) fn own(&self) -> Result<EphemeralGuard> {
        let path = self.dir.join(OWNER);
        step("own the VM").map_err(Error::io("create", &path))?;
        let options = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = options.map_err(Error::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(EphemeralGuard(file)),
            Err(TryLockError::WouldBlock) => {
                Err(Error::Busy { what: format!("the owner's lock of VM `{}`", self.name), holder: None })
            }
            Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
        }
    }

    /// Returns whether the process that owns the VM is there. Ask only while its making is not
    /// under way: the VM's lock, which is held here, sees to that.
    pub(crate) fn has_owner(&self) -> Result<bool> {
        let path = self.dir.join(OWNER);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(Error::io("lock", path)(error)),
        }
    }
}
