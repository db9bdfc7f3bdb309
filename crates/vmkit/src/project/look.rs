//! What there is of a machine.

use super::{GuestConnector, ProjectManager};
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::{FailureKind, Operation, VmState};
use crate::manager::VmEntry;
use crate::vmfile::{MachineConfig, Project};

/// What there is of a machine.
#[derive(Debug)]
pub(super) enum MachineVm {
    /// No VM; or one whose making or removal was cut off, which is swept when it is made.
    Nothing,
    /// Its VM, with the state that it has now.
    Vm {
        /// The VM.
        vm: Box<VmHandle>,
        /// Whether an operation on it was cut off; the next one settles what that left.
        unsettled: bool,
    },
}

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Looks for a machine's VM.
    ///
    /// # Errors
    /// `AlreadyExists` for a VM of its name that is somebody else's; `Record`, `TimedOut` where it
    /// can't be told.
    pub(super) async fn look(&self, project: &Project, machine: &MachineConfig) -> Result<MachineVm> {
        match self.manager().find(&machine.vm).await {
            Some(listed) => found(project, machine, listed),
            None => Ok(MachineVm::Nothing),
        }
    }
}

/// Returns what a VM that was listed is to a machine whose VM has that name.
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
    // A removal that was interrupted before it had removed anything has left the VM as it was.
    let is_cut = matches!(&vm.state, VmState::Failed { cause } if cause.kind == FailureKind::Interrupted);
    match operation {
        Some(Operation::Destroy) if unsettled && !is_cut && vm.state != VmState::Destroyed => {
            Ok(MachineVm::Vm { vm, unsettled })
        }
        Some(Operation::Prepare | Operation::Destroy) => Ok(MachineVm::Nothing),
        _ => Ok(MachineVm::Vm { vm, unsettled }),
    }
}

/// Tells which machine of the project a VM is, by its labels.
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
        _ => "it is of no project".to_owned(),
    };
    Err(Error::Foreign { vm: machine.vm.clone(), owner })
}
