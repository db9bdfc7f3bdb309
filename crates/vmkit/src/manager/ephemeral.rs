//! VMs that live no longer than the process that made them.
//!
//! Such a process removes its VM itself. For the one that was killed, whoever comes next does: the
//! VM is marked by a label from its first record on, and its owner holds a lock that dies with it.

use tokio::time::Instant;
use tracing::warn;

use super::{PATIENCE, VmManager};
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::span::{operation, within};
use crate::spec::{VmName, VmSpec};
use crate::store::{EphemeralGuard, OwnerState};

/// The label of a VM that is to go with its owner.
const EPHEMERAL: &str = "vmkit.ephemeral";

/// Returns whether a VM is to go with the process that made it.
pub(super) fn is_ephemeral(spec: &VmSpec) -> bool {
    spec.labels().get(EPHEMERAL).is_some()
}

impl<H: Backend + 'static> VmManager<H> {
    /// Creates a VM that goes with its owner: once the answered [`EphemeralGuard`] is dropped, or this
    /// process has ended however it did, [`remove_orphans`](Self::remove_orphans) removes it,
    /// running or not.
    ///
    /// # Errors
    /// Those of [`create`](Self::create).
    pub async fn create_ephemeral(&self, spec: VmSpec) -> Result<(VmHandle, EphemeralGuard)> {
        let spec = spec.with_label(EPHEMERAL, "")?;
        let (vm, owner) = self.create_owned(spec).await?;
        Ok((vm, owner.expect("a VM with the label has an owner when it is made")))
    }

    /// Removes the VMs whose owner has ended, and answers their names; one that somebody works on
    /// is left alone.
    ///
    /// What can't be removed is warned of, and stays for the next one to try.
    ///
    /// # Errors
    /// `Io` or `Host` when the home can't be read; never for a single VM.
    pub async fn remove_orphans(&self) -> Result<Vec<VmName>> {
        let mut removed = Vec::new();
        for name in self.store.names()? {
            let record = self.store.read(&name);
            if !record.is_ok_and(|record| is_ephemeral(&record.handle.spec)) {
                continue;
            }
            match self.remove_orphan_by(&name, Instant::now()).await {
                Ok(true) => removed.push(name),
                Ok(false) => {}
                Err(error) if matches!(error.kind(), ErrorKind::Busy | ErrorKind::NotFound) => {}
                // Its owner will, or who comes next of that user.
                Err(Error::OtherUser { .. }) => {}
                Err(error) => warn!(vm = %name, %error, "cannot remove a VM whose owner has ended"),
            }
        }
        Ok(removed)
    }

    /// Removes the VM of this name if its owner has ended, and waits for whoever works on it;
    /// answers whether it was there.
    ///
    /// For the owner itself, which lets go of the VM first and then sees it removed. A VM of the
    /// name that is somebody else's by now is left alone.
    ///
    /// # Errors
    /// `Busy` after 30 s; those of [`Hypervisor::destroy`](crate::Hypervisor::destroy). The VM is then left to
    /// [`remove_orphans`](Self::remove_orphans).
    pub async fn remove_orphan(&self, name: &VmName) -> Result<bool> {
        match self.remove_orphan_by(name, Instant::now() + PATIENCE).await {
            Err(Error::NotFound { what: Subject::Vm, .. }) => Ok(false),
            removed => removed,
        }
    }

    async fn remove_orphan_by(&self, name: &VmName, deadline: Instant) -> Result<bool> {
        let locked = self.store.lock(name, deadline).await?;
        // Read again under the lock: another VM may have the name by now.
        match locked.record()? {
            Some(record) if is_ephemeral(&record.handle.spec) => match locked.owner_state()? {
                OwnerState::Runs => Ok(false),
                // The mark comes with the VM's making, and goes with its removal.
                OwnerState::Unknown if !record.is_unfinished() => {
                    warn!(
                        vm = %name,
                        "kept: the VM goes with a command, and in a copy of its home nothing shows whether that has ended; remove it by hand"
                    );
                    Ok(false)
                }
                OwnerState::Unknown | OwnerState::Ended => {
                    let span = operation!("remove", vm = name);
                    within(span, self.remove_locked(locked, record, true)).await?;
                    Ok(true)
                }
            },
            _ => Ok(false),
        }
    }
}
