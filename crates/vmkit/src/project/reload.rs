//! `reload`: machines stopped and brought up again, so that everything that the file says counts.

use std::sync::Arc;

use super::diff::{PlannedAction, action, changes_of};
use super::event::{EventListener, MachineOutcome, MachineReport, ProjectReport};
use super::job::{MachineJob, RunContext};
use super::look::MachineVm;
use super::{GuestConnector, ProjectManager, ProjectOptions, chosen};
use crate::error::Result;
use crate::hypervisor::Backend;
use crate::launch::ResolvedVm;
use crate::vmfile::Project;

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Shuts down the machines that were chosen and brings them up again, as [`up`](Self::up) does,
    /// with what the file changed.
    ///
    /// A machine that can't be brought up again as the file says is left running. After an
    /// interruption, `up` finishes it.
    ///
    /// # Errors
    /// Those of [`up`](Self::up).
    pub async fn reload(
        &self,
        project: &Project,
        options: &ProjectOptions,
        listener: EventListener,
    ) -> Result<ProjectReport> {
        let machines = chosen(project, &options.machines)?;
        let _lock = self.lock(project, options, &listener).await?;
        let work = RunContext::new(project, options, listener);
        let mut fit = Vec::new();
        let mut refused = Vec::new();
        // Held to the end: the image that a machine is recreated from stays there meanwhile.
        let mut makings = Vec::new();
        self.check_paths(&work, &machines, true).await?;
        for machine in machines {
            let mut turn = MachineJob::new(self, &work, machine);
            match turn.check().await {
                Ok(found) => {
                    makings.extend(found);
                    fit.push(machine);
                }
                Err(error) => refused.push(turn.report(Err(error))),
            }
        }
        let stopped = self.take_down(&work, fit.clone(), false).await;
        let is_down = |name: &str| {
            stopped
                .machines
                .iter()
                .any(|report| report.machine == name && matches!(report.end, MachineOutcome::Fine))
        };
        fit.retain(|machine| is_down(&machine.name));
        let mut started = self.bring_up(&work, fit).await;
        for mut report in stopped.machines {
            match started.machines.iter_mut().find(|started| started.machine == report.machine) {
                Some(started) => {
                    report.done.append(&mut started.done);
                    started.done = report.done;
                }
                None => refused.push(report),
            }
        }
        started.machines.extend(refused);
        let place = |report: &MachineReport| {
            project.machines.iter().position(|machine| machine.name == report.machine)
        };
        started.machines.sort_by_key(place);
        Ok(started)
    }
}

impl<H: Backend + 'static, G: GuestConnector> MachineJob<H, G> {
    /// Checks whether the machine could be brought up again; returns what it would be recreated
    /// from, if it would be.
    async fn check(&mut self) -> Result<Option<ResolvedVm>> {
        let project = Arc::clone(&self.work.project);
        let MachineVm::Vm { vm, .. } = self.engine.look(&project, &self.machine).await? else {
            return Ok(None);
        };
        let changes = changes_of(&project, &self.machine, &vm)?;
        match action(&vm.state, &changes) {
            PlannedAction::Recreate if self.work.options.recreate => self.makings_anew().await.map(Some),
            PlannedAction::Recreate => Err(self.needs_anew(&changes)),
            _ => Ok(None),
        }
    }
}
