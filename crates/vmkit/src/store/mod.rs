//! The storage of VMs: a directory for each, and no common file.
//!
//! Edge: files and locks. It reads and writes records; the manager interprets them.
//!
//! ```text
//! <vms>/NAME/vm.json    the VM as it was made, with what it was told to be since; synced to the disk
//! <vms>/NAME/run.json   the VM as it is now, with what is being done to it; synced only where what it shall be changes
//! <vms>/NAME/owner.lock held by the process that a VM is to go with
//! <vms>/NAME/lock       held while somebody works on the VM; has that process's PID
//! <vms>/NAME/…          what its backend keeps
//! ```
//!
//! Events of a VM matter as long as the host runs, and the page cache lives as long: a killed
//! process loses nothing of `run.json`. A power cut may, but it has ended the guest as well; the VM
//! then has the state of `vm.json`, and the backend examines what runs anyway. So no start, stop,
//! suspend or resume waits for a disk sync, which would take longer than the operation. A user's
//! changes of the configuration are rare, and both files are synced before they take effect.

mod bytes;
mod changes;
mod files;
mod home;
pub(crate) mod lock;
mod locked;
mod misplaced;
mod owner;
mod ownership;
mod portable;
mod read;
mod record;
#[cfg(feature = "ssh")]
mod turn;
mod v1;
#[cfg(test)]
mod v1_tests;

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use tokio::time::Instant;

pub use crate::host::ForeignFiles;
pub use crate::misplacement::Misplacement;
pub(crate) use changes::RecordChanges;
pub(crate) use files::stranger;
pub use home::Home;
pub(crate) use home::create_private;
pub(crate) use locked::LockedVm;
pub use owner::EphemeralGuard;
pub(crate) use owner::OwnerState;
pub(crate) use ownership::{denied, keep_owner, refuse_other_user};
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use portable::stored_image;
pub use record::{Intent, VmRecord};
#[cfg(feature = "ssh")]
pub(crate) use turn::{TurnFor, VmTurn};

use self::files::{LOCK, check_directory};
use self::read::read;
use crate::error::{Error, Result, Subject};
use crate::spec::VmName;
use crate::steps::step;

/// The records of all VMs of one home.
#[derive(Debug, Clone)]
pub(crate) struct RecordStore {
    home: Home,
}

impl RecordStore {
    pub(crate) fn new(home: Home) -> Self {
        Self { home }
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// Returns the names of all directories that may be a VM's, sorted.
    ///
    /// # Errors
    /// `Io`; `Host` if a link to the directories leads to nothing.
    pub(crate) fn names(&self) -> Result<Vec<VmName>> {
        let vms = self.home.vms();
        let entries = match fs::read_dir(vms) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return home::check_is_mounted(vms).map(|()| Vec::new());
            }
            Err(error) => return Err(denied("read", vms)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("read", vms))?;
            if let Some(name) = entry.file_name().to_str().and_then(|name| VmName::new(name).ok()) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Reads a VM's record without its lock.
    ///
    /// # Errors
    /// `NotFound` without a VM of that name, `Record` for a record that can't be used.
    pub(crate) fn read(&self, name: &VmName) -> Result<VmRecord> {
        read(&self.home, name)?.ok_or_else(|| self.missing(name))
    }

    /// Reads a VM's record without its lock, and returns whether its operation was interrupted: no
    /// process is running it.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub(crate) fn read_now(&self, name: &VmName) -> Result<(VmRecord, bool)> {
        let record = self.read(name)?;
        if record.intent.is_none() || lock::is_held(&self.home.vm(name).join(LOCK)) {
            return Ok((record, false));
        }
        // The operation may have ended since the record was read.
        let now = self.read(name)?;
        let is_cut_off = now == record;
        Ok((now, is_cut_off))
    }

    /// Returns when a VM's record was last written: at the end of the last operation on it.
    #[cfg(feature = "ssh")]
    pub(crate) fn changed_at(&self, name: &VmName) -> Option<std::time::SystemTime> {
        fs::metadata(self.home.vm(name).join(files::SINCE)).and_then(|found| found.modified()).ok()
    }

    /// Returns whether the VM still has this record, and no operation on it is running.
    pub(crate) fn is_left_alone(&self, record: &VmRecord) -> bool {
        let name = record.handle.name();
        let is_same = || self.read(name).is_ok_and(|now| now == *record);
        // Read again after the lock was checked: its holder may have removed the VM before that.
        is_same() && !lock::is_held(&self.home.vm(name).join(LOCK)) && is_same()
    }

    /// Reads a record of another home from its bytes; `path` is where they came from.
    ///
    /// # Errors
    /// `Record`.
    #[cfg(feature = "images")]
    pub(crate) fn decode(&self, path: &Path, bytes: &[u8]) -> Result<VmRecord> {
        files::decode(&self.home, path, bytes)
    }

    /// Starts to watch a VM's record.
    pub(crate) fn changes(&self, name: &VmName) -> Result<RecordChanges> {
        RecordChanges::of(&self.home.vm(name))
    }

    /// Locks an existing VM.
    ///
    /// # Errors
    /// `NotFound` without a VM of that name, `Busy` after the deadline.
    pub(crate) async fn lock(&self, name: &VmName, deadline: Instant) -> Result<LockedVm> {
        let dir = self.home.vm(name);
        self.home.refuse_other_user(&dir)?;
        match acquire(name, &dir, deadline).await? {
            Some(lock) => Ok(self.locked(name, dir, lock)),
            None => Err(self.missing(name)),
        }
    }

    /// Locks a name for a new VM; the directory is created if needed.
    ///
    /// # Errors
    /// `Busy` after the deadline; `Host` if the home can't be written; `Record` if the name belongs
    /// to something other than a directory.
    pub(crate) async fn lock_new(&self, name: &VmName, deadline: Instant) -> Result<LockedVm> {
        self.home.create()?;
        let dir = self.home.vm(name);
        loop {
            let made =
                step("create the VM's directory").and_then(|()| DirBuilder::new().mode(0o700).create(&dir));
            let is_new = match made {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    check_directory(&dir)?;
                    false
                }
                Err(error) => return Err(denied("create", &dir)(error)),
            };
            self.home.refuse_other_user(&dir)?;
            match acquire(name, &dir, deadline).await {
                Ok(Some(lock)) => return Ok(self.locked(name, dir, lock)),
                // The removal of a VM of this name has removed the directory; each attempt waits
                // for such a holder.
                Ok(None) if Instant::now() < deadline => tokio::task::yield_now().await,
                Ok(None) => return Err(Error::Busy { what: format!("VM `{name}`"), holder: None }),
                Err(error) => {
                    if is_new {
                        let _ = fs::remove_dir(&dir);
                    }
                    return Err(error);
                }
            }
        }
    }
}

impl RecordStore {
    /// Returns why there is no VM of this name.
    fn missing(&self, name: &VmName) -> Error {
        let not_found = || Error::not_found(Subject::Vm, name);
        home::check_is_mounted(&self.home.vm(name)).err().unwrap_or_else(not_found)
    }

    fn locked(&self, name: &VmName, dir: PathBuf, lock: lock::FileLock) -> LockedVm {
        LockedVm { name: name.clone(), dir, home: self.home.clone(), _lock: lock }
    }
}

/// Waits for a VM's lock; the error names the VM instead of the file.
async fn acquire(name: &VmName, dir: &Path, deadline: Instant) -> Result<Option<lock::FileLock>> {
    lock::acquire(&dir.join(LOCK), lock::LockMode::Alone, deadline).await.map_err(|error| match error {
        Error::Busy { holder, .. } => Error::Busy { what: format!("VM `{name}`"), holder },
        error => error,
    })
}
