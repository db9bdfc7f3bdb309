//! What the file and a VM differ in, and what that means for the VM.
//!
//! Pure: a machine and a VM in, an action and changes out.

use crate::error::Result;
use crate::handle::VmHandle;
use crate::lifecycle::VmState;
use crate::spec::{SpecChange, TakesEffect, changes};
use crate::vmfile::{MachineConfig, Project};

/// What would be done about a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PlannedAction {
    /// It is made and started.
    Make,
    /// It has to be removed and recreated, which is done only when asked for.
    Recreate,
    /// It is started.
    Start,
    /// It is resumed.
    Resume,
    /// It runs, and stays as it is but for its changes.
    Keep,
}

impl PlannedAction {
    /// Returns it in a word, such as `make`.
    pub fn as_str(self) -> &'static str {
        match self {
            PlannedAction::Make => "make",
            PlannedAction::Recreate => "recreate",
            PlannedAction::Start => "start",
            PlannedAction::Resume => "resume",
            PlannedAction::Keep => "keep",
        }
    }
}

/// Returns what is to be done about a VM that is there.
pub(super) fn action(state: &VmState, changes: &[SpecChange]) -> PlannedAction {
    match state {
        _ if changes.iter().any(|change| change.applies == TakesEffect::Anew) => PlannedAction::Recreate,
        VmState::Running => PlannedAction::Keep,
        VmState::Suspended | VmState::Saved => PlannedAction::Resume,
        _ => PlannedAction::Start,
    }
}

/// Returns what a VM's files are needed for now. One that runs needs them for its next start, if
/// that is to be another one.
pub(super) fn needed(state: &VmState, changes: &[SpecChange]) -> PlannedAction {
    match action(state, changes) {
        PlannedAction::Keep | PlannedAction::Resume
            if changes.iter().any(|change| change.applies == TakesEffect::NextStart) =>
        {
            PlannedAction::Start
        }
        action => action,
    }
}

/// Returns what the file changed about a machine whose VM is there, since that was written down.
pub(super) fn changes_of(
    project: &Project,
    machine: &MachineConfig,
    vm: &VmHandle,
) -> Result<Vec<SpecChange>> {
    let wanted = machine.spec_over(&vm.spec).map_err(|error| project.blamed(machine, error))?;
    Ok(changes(vm.next_spec.as_deref().unwrap_or(&vm.spec), &wanted, vm.state.has_memory()))
}

/// Returns which fields were changed already, and count from the VM's next start on.
pub(super) fn pending(vm: &VmHandle) -> Vec<String> {
    let next = vm.next_spec.iter().flat_map(|next| changes(&vm.spec, next, false));
    next.map(|change| change.field.to_owned()).collect()
}
