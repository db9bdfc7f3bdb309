//! `down`: stops machines, and removes them on request, each before those that it depends on.

use super::event::{
    EventKind, EventListener, MachineAction, MachineOutcome, MachineReport, ProjectEvent, ProjectReport,
};
use super::job::{MachineJob, RunContext};
use super::look::MachineVm;
use super::order::{JobEnd, in_order};
use super::plan::{RemovedMachine, leftovers};
use super::{GuestConnector, ProjectManager, ProjectOptions, chosen, dependencies, reversed, unknown};
use crate::error::{ErrorKind, Result, Subject};
use crate::hypervisor::Backend;
use crate::vmfile::{MachineConfig, Project};

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Shuts down the chosen machines in the reverse order of their dependencies; removes their VMs
    /// with `remove`.
    ///
    /// Without a choice this includes the VMs of machines that the file no longer has. The failure
    /// of one machine does not keep the others from being stopped.
    ///
    /// # Errors
    /// `NotFound` for the name of a machine that does not and did not exist; `Busy`; those of the
    /// home. The failure of a machine is in the report.
    pub async fn down(
        &self,
        project: &Project,
        remove: bool,
        options: &ProjectOptions,
        listener: EventListener,
    ) -> Result<ProjectReport> {
        let gone = |name: &&String| project.machine(name).is_none();
        let former: Vec<String> = options.machines.iter().filter(gone).cloned().collect();
        let named: Vec<String> = options.machines.iter().filter(|name| !gone(name)).cloned().collect();
        let all = options.machines.is_empty();
        let machines = if all || !named.is_empty() { chosen(project, &named)? } else { Vec::new() };
        let _lock = self.lock(project, options, &listener).await?;
        let left = leftovers(project, &self.manager().list().await?);
        if let Some(name) = former.iter().find(|name| left.iter().all(|left| left.machine != **name)) {
            let known = project.machines.iter().map(|machine| &machine.name);
            return Err(unknown(Subject::Machine, name, known.chain(left.iter().map(|left| &left.machine))));
        }
        let work = RunContext::new(project, options, listener);
        let lost = self.tell_lost(&work, &machines).await;
        let mut report = ProjectReport { lost, ..self.take_down(&work, machines, remove).await };
        for leftover in left.iter().filter(|left| all || former.contains(&left.machine)) {
            report.machines.push(self.take_down_leftover(&work, leftover, remove).await);
        }
        Ok(report)
    }

    /// Stops these machines, with the project's lock held.
    pub(super) async fn take_down(
        &self,
        work: &RunContext,
        machines: Vec<&MachineConfig>,
        remove: bool,
    ) -> ProjectReport {
        let after = reversed(&dependencies(&machines));
        let begin = |place: usize| {
            let mut turn = MachineJob::new(self, work, machines[place]);
            async move {
                let end = turn.down(remove).await;
                turn.report(end)
            }
        };
        let ended = in_order(&after, work.options.at_once, |_| true, begin).await;
        let reports = ended.into_iter().map(|ended| match ended {
            JobEnd::Done(report) => report,
            JobEnd::Skipped { .. } => unreachable!("nothing that fails skips another here"),
        });
        ProjectReport { machines: reports.collect(), ..ProjectReport::default() }
    }

    /// Removes the VMs of machines that the file no longer has.
    pub(super) async fn remove_leftovers(&self, work: &RunContext) -> Result<Vec<MachineReport>> {
        let mut reports = Vec::new();
        for leftover in leftovers(&work.project, &self.manager().list().await?) {
            reports.push(self.take_down_leftover(work, &leftover, true).await);
        }
        Ok(reports)
    }

    async fn take_down_leftover(
        &self,
        work: &RunContext,
        leftover: &RemovedMachine,
        remove: bool,
    ) -> MachineReport {
        let mut done = Vec::new();
        let tell = |what| (work.listener)(ProjectEvent { machine: Some(leftover.machine.clone()), what });
        let steps = async {
            if leftover.state.as_ref().is_some_and(|state| state.has_memory()) {
                tell(EventKind::Stopping);
                self.manager().stop(&leftover.vm, work.options.stop_timeout).await?;
                done.push(MachineAction::Stopped);
            }
            if remove {
                tell(EventKind::Removing);
                self.manager().remove(&leftover.vm, true).await?;
                done.push(MachineAction::Removed);
            }
            Ok(())
        };
        let end = steps.await.map_or_else(MachineOutcome::Failed, |()| MachineOutcome::Fine);
        MachineReport { done, ..MachineReport::new(&leftover.machine, &leftover.vm, end) }
    }
}

impl<H: Backend + 'static, G: GuestConnector> MachineJob<H, G> {
    async fn down(&mut self, remove: bool) -> Result<()> {
        let manager = self.engine.manager().clone();
        let vm = match self.engine.look(&self.work.project, &self.machine).await {
            Ok(MachineVm::Vm { vm, .. }) => vm,
            // A VM whose creation or removal was interrupted is removed as any other.
            Ok(MachineVm::Nothing) if remove => {
                match manager.remove(&self.machine.vm, true).await {
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                    removed => removed?,
                }
                self.done.push(MachineAction::Removed);
                return Ok(());
            }
            Ok(MachineVm::Nothing) => return Ok(()),
            // A foreign VM is left alone; the caller expects the machine to be down and gets an
            // error, in particular if the VM is this project's own from before the file was moved.
            Err(error) => return Err(error),
        };
        if remove {
            return self.remove(&vm).await;
        }
        if vm.state.has_memory() {
            self.tell(EventKind::Stopping);
            manager.stop(&self.machine.vm, self.work.options.stop_timeout).await?;
            self.done.push(MachineAction::Stopped);
        }
        Ok(())
    }
}
