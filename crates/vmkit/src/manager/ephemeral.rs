//! Ephemeral VMs, which are removed when the process that created them ends.
//!
//! Such a process removes its VM itself. If it was killed, the next process does: the VM has a
//! label from its first record on, and its owner holds a lock that the kernel releases.

use tokio::time::Instant;
use tracing::warn;

use super::{PATIENCE, VmManager};
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::span::{operation, within};
use crate::spec::{VmName, VmSpec};
use crate::store::{EphemeralGuard, OwnerState};

/// The label of an ephemeral VM.
const EPHEMERAL: &str = "vmkit.ephemeral";

/// Returns whether a VM is ephemeral.
pub(super) fn is_ephemeral(spec: &VmSpec) -> bool {
    spec.labels().get(EPHEMERAL).is_some()
}

/// Returns the spec of an ephemeral VM.
pub(super) fn marked(spec: VmSpec) -> Result<VmSpec> {
    spec.with_label(EPHEMERAL, "")
}

impl<H: Backend + 'static> VmManager<H> {
    /// Creates an ephemeral VM: when the returned [`EphemeralGuard`] is dropped, or this process
    /// has ended for whatever reason, [`remove_orphans`](Self::remove_orphans) removes the VM,
    /// whether it runs or not.
    ///
    /// # Errors
    /// Those of [`create`](Self::create).
    pub async fn create_ephemeral(&self, spec: VmSpec) -> Result<(VmHandle, EphemeralGuard)> {
        let (vm, owner) = self.create_owned(marked(spec)?).await?;
        Ok((vm, owner.expect("a VM with the label has an owner when it is made")))
    }

    /// Removes the VMs whose owner has ended, and returns their names; one that an operation works
    /// on is skipped.
    ///
    /// If a VM can't be removed, this logs a warning, and the next call tries again.
    ///
    /// # Errors
    /// `Io` or `Host` if the home can't be read; never for a single VM.
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
                // Its owner will, or another process of that user.
                Err(Error::OtherUser { .. }) => {}
                Err(error) => warn!(vm = %name, %error, "cannot remove a VM whose owner has ended"),
            }
        }
        Ok(removed)
    }

    /// Removes the VM of this name if its owner has ended, after waiting for an operation on it;
    /// returns whether it existed.
    ///
    /// For the owner itself, which releases the VM first and then waits for its removal. A VM of
    /// the name that belongs to another owner by now is not touched.
    ///
    /// # Errors
    /// `Busy` after 30 s; those of [`Hypervisor::destroy`](crate::Hypervisor::destroy). The VM is
    /// then left to [`remove_orphans`](Self::remove_orphans).
    pub async fn remove_orphan(&self, name: &VmName) -> Result<bool> {
        match self.remove_orphan_by(name, Instant::now() + PATIENCE).await {
            Err(Error::NotFound { what: Subject::Vm, .. }) => Ok(false),
            removed => removed,
        }
    }

    async fn remove_orphan_by(&self, name: &VmName, deadline: Instant) -> Result<bool> {
        let locked = self.store.lock(name, deadline).await?;
        // Read again with the lock held: another VM may have the name by now.
        match locked.record()? {
            Some(record) if is_ephemeral(&record.handle.spec) => match locked.owner_state()? {
                OwnerState::Runs => Ok(false),
                // The owner's mark exists from the VM's creation to its removal.
                OwnerState::Unknown if !record.is_unfinished() => {
                    warn!(
                        vm = %name,
                        "kept: the VM belongs to a command, and a copied home does not show whether that has ended; remove it by hand"
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
