//! What can be told of a VM that is to be made before its image is fetched, which may take long.

use super::VmManager;
use crate::error::{Error, Result, Subject};
use crate::handle::{BackendTag, VmHandle};
use crate::hypervisor::Hypervisor;
use crate::image::check_disc;
use crate::input_file::InputFile;
use crate::kernel_file::{check_initrd, check_kernel};
use crate::lifecycle::{FailureKind, VmState};
use crate::spec::{Boot, DataDisk, VmName, VmSpec};

impl<H: Hypervisor + 'static> VmManager<H> {
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

    /// Refuses what a spec asks of this host and can never have here: files that are not there, but
    /// for the image of its root disk, which may have to be fetched; disks that the VM has twice,
    /// or that other VMs or images have; a kernel that QEMU does not boot; more memory than there
    /// is; a user or a bridge that it does not have. It is asked for QEMU's VMs only: another
    /// backend may run them elsewhere.
    ///
    /// # Errors
    /// `InvalidInput` with the field and the value.
    pub async fn check_host(&self, spec: &VmSpec) -> Result<()> {
        if *self.backend_of(spec) != BackendTag::Qemu {
            return Ok(());
        }
        if let Boot::Kernel(kernel) = spec.boot() {
            check_kernel(&kernel.path, spec.machine().arch())?;
            kernel.initrd.as_deref().map_or(Ok(()), check_initrd)?;
        }
        for disk in spec.data_disks() {
            if let DataDisk::Existing { path, readonly } = disk {
                InputFile::data_disk(path, *readonly)?;
            }
        }
        spec.cdrom().map_or(Ok(()), check_disc)?;
        self.check_disks(spec)?;
        #[cfg(all(target_os = "linux", feature = "qemu"))]
        {
            crate::host::demands::check(spec).await?;
            if let crate::spec::NetworkConfig::Tap { bridge } = spec.network() {
                crate::network::check_bridge(bridge).await?;
            }
        }
        Ok(())
    }

    /// Refuses a VM whose files no longer allow a start, such as an image that was changed under
    /// it.
    ///
    /// # Errors
    /// `InvalidInput` with the field and the path.
    pub(super) async fn check_restart(&self, vm: &VmHandle) -> Result<()> {
        #[cfg(all(target_os = "linux", feature = "qemu"))]
        if vm.backend == BackendTag::Qemu {
            return crate::backend::qemu::check_restart(vm).await;
        }
        let _ = vm;
        Ok(())
    }
}
