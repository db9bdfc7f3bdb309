//! What can be told of a VM that is to be made before its image is fetched, which may take long.

use super::VmManager;
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::{FailureKind, VmState};
use crate::spec::{VmName, VmSpec};

impl<H: Backend + 'static> VmManager<H> {
    /// Refuses a name in use. Whether it still is free counts when the VM is made.
    ///
    /// # Errors
    /// `AlreadyExists`.
    pub async fn check_free(&self, name: &VmName) -> Result<()> {
        let is_begun = |state: &VmState| match state {
            VmState::Preparing => true,
            VmState::Failed { cause } => cause.kind == FailureKind::Interrupted,
            _ => false,
        };
        match self.info(name).await {
            Ok(vm) if !is_begun(&vm.state) => Err(Error::already_exists(Subject::Vm, name)),
            // What else is wrong with it is told when the VM is made.
            _ => Ok(()),
        }
    }

    /// Refuses what a spec asks of its host and can never have there, as far as its backend can
    /// tell ([`Preflight`](crate::abilities::Preflight)): files that are not there, but for the
    /// image of its root disk, which may have to be fetched; disks that the VM has twice, or that
    /// other VMs or images have; for QEMU, a kernel that it does not boot, more memory than there
    /// is, a user or a bridge that the host does not have.
    ///
    /// # Errors
    /// `InvalidInput` with the field and the value.
    pub async fn check_host(&self, spec: &VmSpec) -> Result<()> {
        if let Some(preflight) = self.abilities_for(spec).preflight() {
            preflight.check_spec(spec).await?;
        }
        self.check_disks(spec)
    }

    /// Refuses a VM whose files no longer allow a start, such as an image that was changed under
    /// it.
    ///
    /// # Errors
    /// `InvalidInput` with the field and the path.
    pub(super) async fn check_restart(&self, vm: &VmHandle) -> Result<()> {
        match self.abilities_of(vm).preflight() {
            Some(preflight) => preflight.check_restart(vm).await,
            None => Ok(()),
        }
    }
}
