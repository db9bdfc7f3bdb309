//! What a VM that is there already shall be from now on.
//!
//! A VM that lives goes on as it is: its record says what runs, and what it shall be waits beside
//! that for the next start.

use tokio::time::Instant;

use super::{PATIENCE, VmManager, VmRequest};
use crate::error::{Error, Result, ValueProblem};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::image::inspect;
use crate::span::{operation, within};
use crate::spec::{Mib, RootDisk, SpecChange, SpecPatch, TakesEffect, VmName, VmSpec, changes};

impl<H: Backend + 'static> VmManager<H> {
    /// Writes down what a VM shall be: at once if nothing runs, else from its next start on, when
    /// it becomes [`VmHandle::spec`]. Labels are written at once in either case. What is written
    /// outlives a power cut.
    ///
    /// The VM's name, its identity and how often cloud-init was run again stay as they are. What
    /// was to apply at the next start before is forgotten.
    ///
    /// # State
    /// Any, which stays. Writing down what is there already is success, and writes nothing.
    ///
    /// # Errors
    /// `InvalidInput` on the field where the VM would have to be recreated ([`changes`] tells
    /// beforehand); `NotFound`; `Busy`; `InvalidState` for a VM that can only be removed; `Io` and
    /// `Host` where it can't be recorded.
    pub async fn reconfigure(&self, name: &VmName, spec: VmSpec) -> Result<VmHandle> {
        self.reconfigure_with(name, |_| Ok(spec)).await.map(|(vm, _)| vm)
    }

    /// Writes down what a VM shall be, as [`reconfigure`](Self::reconfigure) does, and returns what
    /// changed as well: `edit` makes it of what the VM was to be so far, while nobody else can
    /// change that.
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

    /// Changes fields of a VM, as [`reconfigure`](Self::reconfigure) does, once the host was checked
    /// for what the VM shall be; returns the VM and what changed.
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
        // Only to refuse what can only be removed: an intent that is there stays for the operation
        // that comes next.
        self.settle(record.clone(), VmRequest::Start).await?;
        let mut changed = record.clone();
        let vm = &mut changed.handle;
        let (spec, changed_fields) = self.wanted(vm, edit)?;
        if changed_fields.iter().any(|change| ["data_disks", "cdrom"].contains(&change.field)) {
            self.check_disks(&spec)?;
        }
        let mut differing = changes(&vm.spec, &spec, false).into_iter();
        let waits = differing.any(|change| change.applies == TakesEffect::NextStart);
        if waits && self.state(vm).await?.is_live() {
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

    /// Returns a VM as it is now, what it would be, and what would change by it; changes nothing,
    /// and waits for nobody.
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

    /// Returns what a VM shall be, and what changes by it beside what it was to be so far.
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
            let expected =
                format!("it is {:?}, and only a VM that is made anew can be otherwise", change.from);
            let error = Error::invalid(change.field, &change.to, expected);
            return Err(error.with_problem(ValueProblem::NeedsRecreate));
        }
        if self.abilities_of(vm).capabilities().local_files {
            check_disk(vm, &spec)?;
        }
        let changed = changes(so_far, &spec, false);
        Ok((spec, changed))
    }

    /// Returns the VM as it shall be started: what waited for this becomes what it is, unless it
    /// lives already.
    pub(super) async fn as_it_shall_start(&self, vm: VmHandle) -> Result<VmHandle> {
        match vm.next_spec.is_some() && !self.state(&vm).await?.is_live() {
            true => Ok(vm.with_next_spec()),
            false => Ok(vm),
        }
    }
}

/// Refuses a size for a disk that had none so far and is as large as its image, where that is
/// larger: the next start could not do it.
fn check_disk(vm: &VmHandle, spec: &VmSpec) -> Result<()> {
    let (Some(disk), Some(RootDisk { size: Some(size), .. })) = (vm.spec.disk(), spec.disk()) else {
        return Ok(());
    };
    if disk.size.is_some() {
        return Ok(());
    }
    // An image that can't be looked at any more is the next start's to tell of.
    match inspect(&disk.image) {
        Ok(image) if size.bytes() < image.virtual_size_bytes => {
            let bytes = image.virtual_size_bytes;
            let least = Mib::holding(bytes);
            let expected = format!(
                "the disk has {bytes} bytes, as its image has, and only grows: name at least {least}"
            );
            Err(Error::invalid("disk", size, expected))
        }
        _ => Ok(()),
    }
}
