//! The mark of a VM that lives no longer than a process: a file that this process keeps locked.
//!
//! The kernel frees the lock however the process ends, in whatever namespace it lived. A copy of
//! the directory has a file that no process ever locked, so the mark also names the directory that
//! it was made for: only there is a free lock proof that the VM is no longer needed.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::files::{OWNER, UNFINISHED_OWNER};
use super::locked::LockedVm;
use crate::error::{Error, Result};
use crate::flock::{FileLock, LockMode};
use crate::host::process::boot_id;
use crate::input_file::open_regular;
use crate::steps::step;

/// More than a mark has.
const MARK_BYTES: u64 = 256;

/// Keeps an ephemeral VM from being removed by another process; dropped, the VM may be removed.
#[derive(Debug)]
pub struct EphemeralGuard(#[expect(dead_code, reason = "it is locked as long as it is there")] FileLock);

/// What the mark shows of the process that an ephemeral VM goes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OwnerState {
    /// The process runs.
    Runs,
    /// The process has ended.
    Ended,
    /// The mark was made for another directory, or is gone: it shows nothing.
    Unknown,
}

impl LockedVm {
    /// Creates this process the VM's owner.
    pub(crate) fn own(&self) -> Result<EphemeralGuard> {
        let (path, unfinished) = (self.dir.join(OWNER), self.dir.join(UNFINISHED_OWNER));
        let mark = mark(&self.dir)?;
        let owned = || {
            step("own the VM")?;
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
            file.write_all(mark.as_bytes())?;
            FileLock::try_take(file, LockMode::Alone)
        };
        let lock = match owned().map_err(Error::io("create", &unfinished))? {
            Ok(lock) => lock,
            Err(_) => {
                let what = format!("the owner's lock of VM `{}`", self.name);
                return Err(Error::Busy { what, holder: None });
            }
        };
        fs::rename(&unfinished, &path).map_err(Error::io("create", path))?;
        Ok(EphemeralGuard(lock))
    }

    /// Returns what the mark shows of the VM's owner. Ask only while no other process creates the
    /// VM: the VM's lock, which is held here, sees to that.
    pub(crate) fn owner_state(&self) -> Result<OwnerState> {
        let path = self.dir.join(OWNER);
        let file = match open_regular(&path) {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => {
                return Ok(OwnerState::Unknown);
            }
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let Ok(lock) = FileLock::try_take(file, LockMode::Shared).map_err(Error::io("lock", path))? else {
            return Ok(OwnerState::Runs);
        };
        let mut found = String::new();
        let read = lock.file().take(MARK_BYTES).read_to_string(&mut found);
        let is_ours = read.is_ok() && is_same_directory(&found, &mark(&self.dir)?);
        Ok(if is_ours { OwnerState::Ended } else { OwnerState::Unknown })
    }
}

/// Returns the mark of a directory: its inode, its device, and the boot in which the device has
/// that number.
fn mark(dir: &Path) -> Result<String> {
    let found = fs::metadata(dir).map_err(Error::io("examine", dir))?;
    Ok(format!("{} {} {}", found.ino(), found.dev(), boot_id()?))
}

fn is_same_directory(found: &str, mark: &str) -> bool {
    let fields = |mark: &str| {
        let mut fields = mark.split(' ').map(str::to_owned);
        Some([fields.next()?, fields.next()?, fields.next()?])
    };
    match (fields(found), fields(mark)) {
        (Some([inode, device, boot]), Some([now_inode, now_device, now_boot])) => {
            inode == now_inode && (device == now_device || boot != now_boot)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_known_by_its_inode_and_within_a_boot_by_its_device() {
        let is_same = |found| is_same_directory(found, "7 8 boot");
        assert!(is_same("7 8 boot") && is_same("7 9 earlier"));
        for other in ["6 8 boot", "7 9 boot", "6 8 earlier", "", "7", "\u{0}"] {
            assert!(!is_same(other), "{other:?}");
        }
    }
}
