//! Saving a VM's guest to disk.

use std::time::Duration;

use tokio::time::Instant;

use super::{PATIENCE, VmManager, VmRequest};
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::{Operation, VmState};
use crate::span::{operation, within};
use crate::spec::VmName;

impl<H: Backend + 'static> VmManager<H> {
    /// Writes the memory of a VM's guest to disk and ends its process; [`start`](Self::start) and
    /// [`resume`](Self::resume) continue it from there, also after a reboot of the host.
    ///
    /// Changes of the VM that wait for its next start wait on: that start continues the guest.
    ///
    /// # Errors
    /// `InvalidState` unless it lives or is saved; `Unsupported` by a backend without
    /// [`SaveToDisk`](crate::abilities::SaveToDisk); those of
    /// [`SaveToDisk::save`](crate::abilities::SaveToDisk::save).
    pub async fn save(&self, name: &VmName) -> Result<VmHandle> {
        within(operation!("save", vm = name), self.operate(name, &[VmRequest::Save])).await
    }

    /// Discards the memory of a saved VM, which is `Stopped` then; does nothing to any other VM.
    ///
    /// The guest is in the position of a machine after a power cut.
    ///
    /// # Errors
    /// `NotFound`; `Busy`; those of [`Hypervisor::stop`](crate::Hypervisor::stop).
    pub async fn discard_saved(&self, name: &VmName) -> Result<VmHandle> {
        let discard = async {
            let (locked, record) = self.take(name, Instant::now() + PATIENCE).await?;
            let record = self.finish_restore(&locked, record).await?;
            let vm = self.settle(record, Operation::Stop).await?;
            match self.is_saved(&vm).await {
                true => Ok(self.carry_out(&locked, vm, VmRequest::Stop(Duration::ZERO)).await?.vm),
                false => Ok(vm),
            }
        };
        within(operation!("discard_saved", vm = name), discard).await
    }

    /// Returns the room that a VM's saved guest takes on disk, in bytes; `None` if it is not saved.
    ///
    /// # Errors
    /// `NotFound`; `Record`; those of
    /// [`SaveToDisk::saved_bytes`](crate::abilities::SaveToDisk::saved_bytes).
    pub async fn saved_bytes(&self, name: &VmName) -> Result<Option<u64>> {
        let vm = self.store.read(name)?.handle;
        match self.abilities_of(&vm).save_to_disk() {
            Some(disk) => disk.saved_bytes(&vm).await,
            None => Ok(None),
        }
    }

    /// Returns whether a VM's guest is saved, as far as that can be found out now.
    pub(super) async fn is_saved(&self, vm: &VmHandle) -> bool {
        self.abilities_of(vm).save_to_disk().is_some()
            && self.state(vm).await.is_ok_and(|state| state == VmState::Saved)
    }

    pub(super) async fn save_by_backend(&self, vm: &VmHandle) -> Result<VmHandle> {
        match self.abilities_of(vm).save_to_disk() {
            Some(disk) => disk.save(vm).await,
            None => Err(Error::Unsupported {
                backend: vm.backend.clone(),
                what: "saving a guest to disk".to_owned(),
            }),
        }
    }
}
