//! The present state of a machine.

use super::{GuestConnector, ProjectManager};
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::{FailureKind, Operation, VmState};
use crate::manager::VmEntry;
use crate::vmfile::{MachineConfig, Project};

/// The present state of a machine.
#[derive(Debug)]
pub(super) enum MachineVm {
    /// No VM; or one whose creation or removal was interrupted, which the next creation cleans up.
    Nothing,
    /// A VM, with its present state.
    Vm {
        /// The VM.
        vm: Box<VmHandle>,
        /// Whether an operation on it was interrupted; the next one cleans up.
        unsettled: bool,
    },
}

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Looks a machine's VM up.
    ///
    /// # Errors
    /// `AlreadyExists` for a foreign VM of its name; `Record`, `TimedOut` if the state can't be
    /// read.
    pub(super) async fn look(&self, project: &Project, machine: &MachineConfig) -> Result<MachineVm> {
        match self.manager().find(&machine.vm).await {
            Some(listed) => found(project, machine, listed),
            None => Ok(MachineVm::Nothing),
        }
    }
}

/// Returns the state of a machine from its VM in a list.
///
/// # Errors
/// As for [`ProjectManager::look`].
pub(super) fn found(project: &Project, machine: &MachineConfig, listed: VmEntry) -> Result<MachineVm> {
    if let Some(vm) = listed.known() {
        check_owner(project, machine, vm)?;
    }
    let vm = Box::new(listed.handle?);
    let unsettled = listed.interrupted;
    let operation = listed.intent.map(|intent| intent.operation);
    // A removal interrupted before its first step has left the VM unchanged.
    let is_cut = matches!(&vm.state, VmState::Failed { cause } if cause.kind == FailureKind::Interrupted);
    match operation {
        Some(Operation::Destroy) if unsettled && !is_cut && vm.state != VmState::Destroyed => {
            Ok(MachineVm::Vm { vm, unsettled })
        }
        Some(Operation::Prepare | Operation::Destroy) => Ok(MachineVm::Nothing),
        _ => Ok(MachineVm::Vm { vm, unsettled }),
    }
}

/// Returns the machine of the project that a VM belongs to, by its labels.
pub(super) fn machine_of<'a>(project: &Project, vm: &'a VmHandle) -> Option<&'a str> {
    let labels = vm.spec.labels();
    let is_ours = labels.get(Project::LABEL).is_some_and(|file| project.file.as_os_str() == file);
    labels.get(MachineConfig::LABEL).filter(|_| is_ours)
}

fn check_owner(project: &Project, machine: &MachineConfig, vm: &VmHandle) -> Result<()> {
    if machine_of(project, vm) == Some(&machine.name) {
        return Ok(());
    }
    let labels = vm.spec.labels();
    let owner = match (labels.get(Project::LABEL), labels.get(MachineConfig::LABEL)) {
        (Some(file), Some(name)) => format!("it is the machine `{name}` of {file}"),
        _ => "it belongs to no project".to_owned(),
    };
    Err(Error::Foreign { vm: machine.vm.clone(), owner })
}
