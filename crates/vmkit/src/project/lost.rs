//! VMs of files that are no longer there: a project whose folder was moved or renamed has left its VMs behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::event::{Event, Happening};
use super::provision::elsewhere;
use super::up::Work;
use super::{Guests, ProjectManager};
use crate::handle::VmHandle;
use crate::hypervisor::Hypervisor;
use crate::spec::VmName;
use crate::vmfile::{MachinePlan, Project};

/// The VM of a machine whose file is no longer there.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lost {
    /// The name that the machine had.
    pub machine: String,
    /// The name of its VM.
    pub vm: VmName,
    /// Where its file was.
    pub file: PathBuf,
}

impl<H: Hypervisor + 'static, G: Guests> ProjectManager<H, G> {
    /// Finds and tells the VMs whose file is no longer there, if one of the machines has to be made: it may be one of them.
    ///
    /// No hypervisor is asked. What goes wrong here keeps no machine from coming up, so it is not told.
    pub(super) async fn tell_lost(&self, work: &Work, machines: &[&MachinePlan]) -> Vec<Lost> {
        let home = self.manager().home();
        if machines.iter().all(|machine| home.vm(&machine.vm).exists()) {
            return Vec::new();
        }
        let (manager, file) = (self.manager().clone(), work.project.file.clone());
        let look = move || manager.recorded().map(|vms| lost(&file, vms.iter()));
        let lost = elsewhere(look).await.unwrap_or_default();
        if !lost.is_empty() {
            (work.listener)(Event { machine: None, what: Happening::Lost(lost.clone()) });
        }
        lost
    }
}

/// Answers those VMs whose file is no longer there, in their order; those of the file at `own` are none of them.
pub(super) fn lost<'a>(own: &Path, vms: impl Iterator<Item = &'a VmHandle>) -> Vec<Lost> {
    // A file has many machines, and is looked for once.
    let mut gone: BTreeMap<&str, bool> = BTreeMap::new();
    let mut lost = Vec::new();
    for vm in vms {
        let labels = vm.spec.labels();
        let (Some(file), Some(machine)) = (labels.get(Project::LABEL), labels.get(MachinePlan::LABEL)) else {
            continue;
        };
        let path = Path::new(file);
        if path != own && *gone.entry(file).or_insert_with(|| matches!(path.try_exists(), Ok(false))) {
            lost.push(Lost { machine: machine.to_owned(), vm: vm.name().clone(), file: path.to_owned() });
        }
    }
    lost
}
