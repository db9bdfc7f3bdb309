//! What a VM that is there already shall be from now on.
//!
//! A VM that lives goes on as it is: its record says what runs, and what it shall be waits beside that for the next start.

use tokio::time::Instant;

use super::{Order, PATIENCE, VmManager};
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Hypervisor;
use crate::spec::{Applies, VmName, VmSpec, changes};

impl<H: Hypervisor + 'static> VmManager<H> {
    /// Writes down what a VM shall be: at once if nothing runs, else from its next start on, when it becomes
    /// [`VmHandle::spec`]. Labels are written at once in either case. What is written outlives a power cut.
    ///
    /// The VM's name, its identity and how often cloud-init was run again stay as they are. What was to apply at the next
    /// start before is forgotten.
    ///
    /// # State
    /// Any, which stays. Writing down what is there already is success, and writes nothing.
    ///
    /// # Errors
    /// `InvalidInput` on the field where the VM would have to be made anew ([`changes`] tells beforehand); `NotFound`; `Busy`;
    /// `InvalidState` for a VM that can only be removed; `Io` and `Host` where it can't be recorded.
    pub async fn reconfigure(&self, name: &VmName, spec: VmSpec) -> Result<VmHandle> {
        let (locked, record) = self.take(name, Instant::now() + PATIENCE).await?;
        // Only to refuse what can only be removed: an intent that is there stays for the operation that comes next.
        self.settle(record.clone(), Order::Start).await?;
        let mut changed = record.clone();
        let vm = &mut changed.handle;
        let spec = spec.in_place_of(&vm.spec);
        let found = changes(&vm.spec, &spec, false);
        if let Some(change) = found.iter().find(|change| change.applies == Applies::Anew) {
            let expected =
                format!("it is {:?}, and only a VM that is made anew can be otherwise", change.from);
            return Err(Error::invalid(change.field, &change.to, expected));
        }
        let waits = found.iter().any(|change| change.applies == Applies::NextStart);
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
        Ok(changed.handle)
    }

    /// Answers the VM as it shall be started: what waited for this becomes what it is, unless it lives already.
    pub(super) async fn as_it_shall_start(&self, mut vm: VmHandle) -> Result<VmHandle> {
        if let Some(spec) = vm.next_spec.take() {
            if self.state(&vm).await?.is_live() {
                vm.next_spec = Some(spec);
            } else {
                // What was counted meanwhile goes on from there.
                vm.spec = spec.in_place_of(&vm.spec);
            }
        }
        Ok(vm)
    }
}
