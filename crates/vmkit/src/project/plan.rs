//! What [`up`](super::ProjectManager::up) would do, without doing it.

use std::path::PathBuf;

use super::diff::{PlannedAction, action, changes_of, needed, pending};
use super::event::OrphanedVm;
use super::kept::MachineFiles;
use super::look::{MachineVm, found, machine_of};
use super::lost::lost;
use super::paths::{all_of, errors, missing};
use super::task::{DigestCache, ToDo, tasks, to_do};
use super::{GuestConnector, ProjectManager, ProjectOptions, StepReason, chosen, with_dependencies};
use crate::blocking::blocking;
use crate::error::Result;
use crate::hypervisor::Backend;
use crate::lifecycle::VmState;
use crate::manager::VmEntry;
use crate::spec::{SpecChange, VmName};
use crate::vmfile::{MachineConfig, Project};

/// What would be done about the machines of a project.
#[derive(Debug)]
#[non_exhaustive]
pub struct ProjectPlan {
    /// The project's name.
    pub project: String,
    /// Its file.
    pub file: PathBuf,
    /// The machines, in the order of the file.
    pub machines: Vec<PlannedMachine>,
    /// The VMs of machines that the file no longer has.
    pub left: Vec<RemovedMachine>,
    /// The VMs that this project has probably left behind, where a machine has to be made: it may
    /// be one of them.
    pub lost: Vec<OrphanedVm>,
}

/// What would be done about one machine.
#[derive(Debug)]
#[non_exhaustive]
pub struct PlannedMachine {
    /// Its name in the file.
    pub machine: String,
    /// The name of its VM.
    pub vm: VmName,
    /// Where its VM is in its life; `None` where there is none.
    pub state: Option<VmState>,
    /// What would be done about its VM, or why nothing can be.
    pub action: Result<PlannedAction>,
    /// What the file changed, and when each change would count.
    pub changes: Vec<SpecChange>,
    /// The fields that were changed already, and count from its next start on.
    pub pending: Vec<String>,
    /// The copies and steps that would be run.
    pub steps: Vec<PlannedStep>,
}

/// A copy or a step that would be run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PlannedStep {
    /// Its name.
    pub name: String,
    /// Why it would be run.
    pub why: StepReason,
    /// What the copy of a folder would leave out: sockets, named pipes and devices.
    pub left_out: Vec<PathBuf>,
}

/// The VM of a machine that the file no longer has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RemovedMachine {
    /// The name that the machine had.
    pub machine: String,
    /// The name of its VM.
    pub vm: VmName,
    /// Where the VM is in its life; `None` where that can't be told.
    pub state: Option<VmState>,
}

impl PlannedStep {
    pub(super) fn of(step: ToDo) -> Self {
        Self { name: step.task.name, why: step.why, left_out: step.left_out }
    }
}

impl PlannedMachine {
    /// Returns whether everything about this machine is right already.
    pub fn is_unchanged(&self) -> bool {
        matches!(self.action, Ok(PlannedAction::Keep)) && self.changes.is_empty() && self.steps.is_empty()
    }
}

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Returns what `up` would do now. Changes nothing, fetches nothing and waits for no lock.
    ///
    /// Files of the host that steps copy or run are read where their content decides.
    ///
    /// # Errors
    /// `NotFound` for a name that no machine has; `Io` where the home can't be read. What is wrong
    /// with a machine is told in its place.
    pub async fn plan(&self, project: &Project, options: &ProjectOptions) -> Result<ProjectPlan> {
        let machines = with_dependencies(project, chosen(project, &options.machines)?);
        let machines: Vec<MachineConfig> = machines.into_iter().cloned().collect();
        let mut listed = self.manager().list().await?;
        let mut hosts = Vec::with_capacity(machines.len());
        for machine in &machines {
            // Checked as if it were to be created; a machine that needs nothing of the host has no
            // finding.
            hosts.push(self.check_host(project, machine, PlannedAction::Make).await);
        }
        let (engine, project) = (self.clone(), project.clone());
        let plan = move || {
            let left = leftovers(&project, &listed);
            let digests = DigestCache::default();
            let mut planned = Vec::with_capacity(machines.len());
            for (machine, host) in machines.iter().zip(hosts) {
                let place = listed.binary_search_by(|listed| listed.name.cmp(&machine.vm));
                let listed = place.ok().map(|place| listed.remove(place));
                planned.push(engine.plan_machine(&project, machine, listed, host, &digests));
            }
            let is_made = |machine: &PlannedMachine| matches!(machine.action, Ok(PlannedAction::Make));
            let lost = match planned.iter().any(is_made) {
                true => lost(&project, listed.iter().filter_map(VmEntry::known)),
                false => Vec::new(),
            };
            ProjectPlan { project: project.name, file: project.file, machines: planned, left, lost }
        };
        blocking(plan).await
    }

    fn plan_machine(
        &self,
        project: &Project,
        machine: &MachineConfig,
        listed: Option<VmEntry>,
        host: Result<()>,
        digests: &DigestCache,
    ) -> PlannedMachine {
        let mut planned = PlannedMachine {
            machine: machine.name.clone(),
            vm: machine.vm.clone(),
            state: None,
            action: Ok(PlannedAction::Make),
            changes: Vec::new(),
            pending: Vec::new(),
            steps: Vec::new(),
        };
        let filled = self.fill(&mut planned, project, machine, listed, host, digests);
        if let Err(error) = filled {
            planned.action = Err(error);
        }
        planned
    }

    fn fill(
        &self,
        planned: &mut PlannedMachine,
        project: &Project,
        machine: &MachineConfig,
        listed: Option<VmEntry>,
        host: Result<()>,
        digests: &DigestCache,
    ) -> Result<()> {
        let found = listed.map_or(Ok(MachineVm::Nothing), |listed| found(project, machine, listed))?;
        if let MachineVm::Vm { vm, .. } = found {
            planned.changes = changes_of(project, machine, &vm)?;
            planned.action = Ok(action(&vm.state, &planned.changes));
            planned.pending = pending(&vm);
            planned.state = Some(vm.state);
        }
        let action = planned.state.as_ref().map_or(PlannedAction::Make, |it| needed(it, &planned.changes));
        planned.steps = self.planned_steps(project, machine, action, host, digests)?;
        Ok(())
    }

    fn planned_steps(
        &self,
        project: &Project,
        machine: &MachineConfig,
        action: PlannedAction,
        host: Result<()>,
        digests: &DigestCache,
    ) -> Result<Vec<PlannedStep>> {
        let is_new = matches!(action, PlannedAction::Make | PlannedAction::Recreate);
        let provisioned = match is_new {
            true => super::provisioned::ProvisionRecord::default(),
            false => MachineFiles::of(self.manager().home(), &machine.vm).provisioned()?,
        };
        let host = match action {
            PlannedAction::Resume | PlannedAction::Keep => Ok(()),
            _ => host,
        };
        let wrong = self.wrong_image(project, machine, action);
        let missing = missing(machine, action, &provisioned, digests);
        all_of(project, wrong.into_iter().chain(errors(project, machine, missing, host)))?;
        let steps = to_do(tasks(machine), &provisioned, false, digests)
            .map_err(|unreadable| project.blamed(machine, unreadable.into_error()))?;
        Ok(steps.into_iter().map(PlannedStep::of).collect())
    }
}

/// Returns the VMs that were machines of the project, and are none any more.
pub(super) fn leftovers(project: &Project, listed: &[VmEntry]) -> Vec<RemovedMachine> {
    let left = |listed: &VmEntry| {
        let machine = machine_of(project, listed.known()?)?;
        let is_machine = project.machine(machine).is_some_and(|machine| machine.vm == listed.name);
        (!is_machine).then(|| RemovedMachine {
            machine: machine.to_owned(),
            vm: listed.name.clone(),
            state: listed.handle.as_ref().ok().map(|vm| vm.state.clone()),
        })
    };
    listed.iter().filter_map(left).collect()
}
