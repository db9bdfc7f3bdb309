//! Removes VMs, and directories that are no usable VM: those that were copied or renamed by hand,
//! and those whose record this vmkit can't read.

use tokio::time::Instant;
use tracing::warn;

use super::{PATIENCE, VmManager, found, sweep};
use crate::backend::supervise::alive;
use crate::error::{Error, Result, Subject};
use crate::hypervisor::Backend;
use crate::span::{operation, within};
use crate::spec::{VmName, VmSpec};
use crate::store::{LockedVm, Misplacement};

impl<H: Backend + 'static> VmManager<H> {
    /// Removes a VM and all that belongs to it; a VM that lives only with `force`.
    ///
    /// Removes what an interrupted `create` or `remove` left, too. A directory that was copied or
    /// renamed by hand is removed, and nothing outside it. With `force` a VM whose record is spoilt
    /// or newer than this vmkit is removed as well, once nothing of it runs.
    ///
    /// # Errors
    /// `InvalidState` for a VM that lives, without `force`; those of
    /// [`Hypervisor::destroy`](crate::Hypervisor::destroy).
    pub async fn remove(&self, name: &VmName, force: bool) -> Result<()> {
        let remove = async {
            let locked = self.store.lock(name, Instant::now() + PATIENCE).await?;
            match found(&locked, force) {
                Ok(Some(record)) => self.remove_locked(locked, record, force).await,
                Ok(None) => sweep(locked),
                Err(error @ Error::Misplaced { .. }) => self.remove_misplaced(locked, error, force).await,
                Err(error @ Error::Record { .. }) if force => remove_unread(locked, error),
                Err(error) => Err(error),
            }
        };
        within(operation!("remove", vm = name), remove).await
    }

    /// Locks the name of a new VM, and removes what an interrupted creation or removal left.
    ///
    /// # Errors
    /// `AlreadyExists`; `Busy`; those of the home.
    pub(super) async fn lock_free(&self, spec: &VmSpec) -> Result<LockedVm> {
        let locked = self.store.lock_new(spec.name(), Instant::now() + PATIENCE).await?;
        match locked.record()? {
            Some(record) if record.is_unfinished() && !self.is_whole(&record).await? => {
                self.hypervisor.destroy(record.handle).await?
            }
            Some(_) => return Err(Error::already_exists(Subject::Vm, spec.name())),
            None => {}
        }
        if let Some(path) = locked.stranger()? {
            let problem =
                format!("the directory of the VM `{}` exists, without a record of its owner", spec.name());
            return Err(Error::record(path, problem));
        }
        locked.clear()?;
        Ok(locked)
    }

    /// Removes a directory whose record is of a VM of another name, and nothing of that VM.
    async fn remove_misplaced(&self, locked: LockedVm, error: Error, force: bool) -> Result<()> {
        if matches!(error, Error::Misplaced { how: Misplacement::Link, .. }) {
            return locked.remove_link();
        }
        match locked.misplaced_record()? {
            // Another backend may know the VM by its identity, which is that of the other one.
            Some(record) if self.abilities_of(&record.handle).capabilities().vm_is_directory => {
                self.remove_locked(locked, record, force).await
            }
            _ => Err(error),
        }
    }
}

/// Removes the directory of a VM whose record can't be read, while nothing runs there.
///
/// # Errors
/// `Busy` where something runs; `error` for a VM that may run without the lock of this directory.
fn remove_unread(locked: LockedVm, error: Error) -> Result<()> {
    let Some(_alone) = alive::try_take_unread(locked.dir())? else { return Err(error) };
    warn!(%error, "removing a VM whose record can't be read, by force");
    locked.remove()
}
