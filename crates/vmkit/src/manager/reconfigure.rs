//! Changing the spec of an existing VM.
//!
//! A VM that lives or is saved is not affected: its record has the spec of the run, and next to it
//! the one for the next boot.

use tokio::time::Instant;

use super::{PATIENCE, VmManager};
use crate::error::{Error, Result, ValueProblem};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::image::inspect;
use crate::lifecycle::Operation;
use crate::span::{operation, within};
use crate::spec::{Mib, RootDisk, SpecChange, SpecPatch, TakesEffect, VmName, VmSpec, changes};

impl<H: Backend + 'static> VmManager<H> {
    /// Stores a new spec: it applies at once if nothing runs, otherwise from the next start on,
    /// when it becomes [`VmHandle::spec`]. Labels apply at once in either case. The change survives
    /// a power cut.
    ///
    /// The VM's name, its identity and the number of cloud-init's reruns are kept. It replaces an
    /// earlier spec for the next start.
    ///
    /// # State
    /// Any; unchanged. A spec without a change is success, and writes nothing.
    ///
    /// # Errors
    /// `InvalidInput` on the field if the VM would have to be recreated ([`changes`] shows that
    /// beforehand); `NotFound`; `Busy`; `InvalidState` for a VM that can only be removed; `Io` and
    /// `Host` if it can't be recorded.
    pub async fn reconfigure(&self, name: &VmName, spec: VmSpec) -> Result<VmHandle> {
        self.reconfigure_with(name, |_| Ok(spec)).await.map(|(vm, _)| vm)
    }

    /// Stores a new spec as [`reconfigure`](Self::reconfigure) does, and returns the changes as
    /// well: `edit` derives it from the VM's latest spec, with the lock held.
    ///
    /// # Errors
    /// Those of `edit`, and of [`reconfigure`](Self::reconfigure).
    pub async fn reconfigure_with(
        &self,
        name: &VmName,
        edit: impl FnOnce(VmSpec) -> Result<VmSpec>,
    ) -> Result<(VmHandle, Vec<SpecChange>)> {
        within(operation!("reconfigure", vm = name), self.write_edited(name, edit)).await
    }

    /// Changes fields of a VM as [`reconfigure`](Self::reconfigure) does, after checking the host
    /// for the new spec; returns the VM and the changes.
    ///
    /// # Errors
    /// Those of [`SpecPatch::apply_to`], [`check_host`](Self::check_host) and
    /// [`reconfigure`](Self::reconfigure).
    pub async fn set(&self, name: &VmName, patch: &SpecPatch) -> Result<(VmHandle, Vec<SpecChange>)> {
        let edit = |spec| patch.apply_to(spec);
        let (vm, wanted, changes) = self.plan_reconfigure(name, edit).await?;
        if changes.is_empty() {
            return Ok((vm, changes));
        }
        self.check_host(&wanted).await?;
        self.reconfigure_with(name, edit).await
    }

    async fn write_edited(
        &self,
        name: &VmName,
        edit: impl FnOnce(VmSpec) -> Result<VmSpec>,
    ) -> Result<(VmHandle, Vec<SpecChange>)> {
        let (locked, record) = self.take(name, Instant::now() + PATIENCE).await?;
        // Only to refuse a VM that can only be removed: an existing intent stays for the next
        // operation.
        self.settle(record.clone(), Operation::Start).await?;
        let mut changed = record.clone();
        let vm = &mut changed.handle;
        let (spec, changed_fields) = self.wanted(vm, edit)?;
        if changed_fields.iter().any(|change| ["data_disks", "cdrom"].contains(&change.field)) {
            self.check_disks(&spec)?;
        }
        let mut differing = changes(&vm.spec, &spec, false).into_iter();
        let waits = differing.any(|change| change.applies == TakesEffect::NextStart);
        if waits && self.state(vm).await?.has_memory() {
            vm.spec = vm.spec.clone().with_labels(spec.labels().clone());
            vm.next_spec = Some(Box::new(spec));
        } else {
            vm.spec = spec;
            vm.next_spec = None;
        }
        if changed != record {
            locked.write_wanted(&changed)?;
        }
        Ok((changed.handle, changed_fields))
    }

    /// Returns a VM as it is, its new spec and the changes; changes nothing, and waits for no lock.
    ///
    /// # Errors
    /// Those of `edit`, and of [`reconfigure`](Self::reconfigure) but `Busy`.
    pub async fn plan_reconfigure(
        &self,
        name: &VmName,
        edit: impl FnOnce(VmSpec) -> Result<VmSpec>,
    ) -> Result<(VmHandle, VmSpec, Vec<SpecChange>)> {
        let vm = self.info(name).await?;
        let (spec, changes) = self.wanted(&vm, edit)?;
        Ok((vm, spec, changes))
    }

    /// Returns a VM's new spec, and the changes compared with its latest one.
    ///
    /// # Errors
    /// `InvalidInput` on a field for which the VM would have to be recreated.
    fn wanted(
        &self,
        vm: &VmHandle,
        edit: impl FnOnce(VmSpec) -> Result<VmSpec>,
    ) -> Result<(VmSpec, Vec<SpecChange>)> {
        let so_far = vm.next_spec.as_deref().unwrap_or(&vm.spec);
        let spec = edit(so_far.clone())?.in_place_of(&vm.spec);
        if let Some(change) =
            changes(&vm.spec, &spec, false).iter().find(|change| change.applies == TakesEffect::Anew)
        {
            let expected = format!("the VM has {:?}, which can't be changed; recreate the VM", change.from);
            let error = Error::invalid(change.field, &change.to, expected);
            return Err(error.with_problem(ValueProblem::NeedsRecreate));
        }
        if self.abilities_of(vm).capabilities().local_files {
            check_disk(vm, &spec)?;
        }
        let changed = changes(so_far, &spec, false);
        Ok((spec, changed))
    }

    /// Returns the VM as it is to be started: with the spec for the next start, unless it lives or
    /// is saved.
    pub(super) async fn as_it_shall_start(&self, vm: VmHandle) -> Result<VmHandle> {
        match vm.next_spec.is_some() && !self.state(&vm).await?.has_memory() {
            true => Ok(vm.with_next_spec()),
            false => Ok(vm),
        }
    }
}

/// Refuses a first size for a disk that has its image's size, if it is smaller than that: the next
/// start could not apply it.
fn check_disk(vm: &VmHandle, spec: &VmSpec) -> Result<()> {
    let (Some(disk), Some(RootDisk { size: Some(size), .. })) = (vm.spec.disk(), spec.disk()) else {
        return Ok(());
    };
    if disk.size.is_some() {
        return Ok(());
    }
    // If the image can't be inspected any more, the next start reports it.
    match inspect(&disk.image) {
        Ok(image) if size.bytes() < image.virtual_size_bytes => {
            let bytes = image.virtual_size_bytes;
            let least = Mib::holding(bytes);
            let expected = format!(
                "the disk has its image's size of {bytes} bytes, and can only grow (expected at least {least})"
            );
            Err(Error::invalid("disk", size, expected))
        }
        _ => Ok(()),
    }
}
