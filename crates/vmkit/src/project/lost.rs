//! VMs of files that are no longer there: a project whose folder was moved or renamed has left its
//! VMs behind.

use std::collections::BTreeMap;
use std::path::Path;

use super::event::{EventKind, OrphanedVm, ProjectEvent};
use super::job::RunContext;
use super::{GuestConnector, ProjectManager, ProjectOptions, chosen};
use crate::blocking::blocking;
use crate::error::Result;
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::spec::VmName;
use crate::vmfile::{MachineConfig, MachineOrigin, Project};

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Returns the VMs that this project has probably left behind, where one of the machines that
    /// were chosen has no VM: it may be one of them. Changes nothing and asks no hypervisor.
    ///
    /// # Errors
    /// `NotFound` for a name that no machine has; `Io` where the home can't be read.
    pub async fn lost(&self, project: &Project, options: &ProjectOptions) -> Result<Vec<OrphanedVm>> {
        let machines = chosen(project, &options.machines)?;
        self.lost_of(project, &machines).await
    }

    /// Finds and tells the VMs that this project has probably left behind, if one of the machines
    /// has no VM.
    ///
    /// What goes wrong here keeps no machine from coming up or going down, so it is not told.
    pub(super) async fn tell_lost(&self, work: &RunContext, machines: &[&MachineConfig]) -> Vec<OrphanedVm> {
        let lost = self.lost_of(&work.project, machines).await.unwrap_or_default();
        if !lost.is_empty() {
            (work.listener)(ProjectEvent { machine: None, what: EventKind::Lost(lost.clone()) });
        }
        lost
    }

    async fn lost_of(&self, project: &Project, machines: &[&MachineConfig]) -> Result<Vec<OrphanedVm>> {
        let home = self.manager().home();
        if machines.iter().all(|machine| home.vm(&machine.vm).exists()) {
            return Ok(Vec::new());
        }
        let (manager, project) = (self.manager().clone(), project.clone());
        blocking(move || manager.recorded().map(|vms| lost(&project, vms.iter()))).await?
    }
}

/// Returns those VMs whose file is no longer there and was probably this project's, in their order.
///
/// It was where the project had the same name, or all its machines that are there are called as
/// machines of this one. Who has renamed the folder has changed the one and not the other.
pub(super) fn lost<'a>(project: &Project, vms: impl Iterator<Item = &'a VmHandle>) -> Vec<OrphanedVm> {
    let vms: Vec<(&VmName, MachineOrigin<'_>)> =
        vms.filter_map(|vm| Some((vm.name(), MachineOrigin::of(&vm.spec)?))).collect();
    // A file has many machines, and is looked for once.
    let mut is_left: BTreeMap<&Path, bool> = BTreeMap::new();
    for (_, origin) in &vms {
        let is_like = origin.project == project.name || project.machine(origin.machine).is_some();
        *is_left.entry(origin.file).or_insert(true) &= is_like;
    }
    is_left
        .retain(|file, is_like| *is_like && *file != project.file && matches!(file.try_exists(), Ok(false)));
    let left = vms.into_iter().filter(|(_, origin)| is_left.contains_key(origin.file));
    left.map(|(vm, origin)| OrphanedVm {
        machine: origin.machine.to_owned(),
        vm: vm.clone(),
        file: origin.file.to_owned(),
    })
    .collect()
}
