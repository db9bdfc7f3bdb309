//! `reload`: machines stopped and brought up again, so that everything that the file says counts.

use super::event::{End, Listener, MachineReport, Report};
use super::look::Found;
use super::plan::{PlannedAction, action, changes_of};
use super::up::{Work, needs_anew};
use super::{Guests, Options, ProjectManager, chosen};
use crate::error::Result;
use crate::forwarding::PortForwarding;
use crate::vmfile::{MachinePlan, Project};

impl<H: PortForwarding + 'static, G: Guests> ProjectManager<H, G> {
    /// Shuts down the machines that were chosen and brings them up again, as [`up`](Self::up) does, with what the file
    /// changed.
    ///
    /// A machine that can't be brought up again as the file says is left running. Cut off in between, `up` finishes it.
    ///
    /// # Errors
    /// Those of [`up`](Self::up).
    pub async fn reload(&self, project: &Project, options: &Options, listener: Listener) -> Result<Report> {
        let machines = chosen(project, &options.machines)?;
        let _lock = self.lock(project, options).await?;
        let mut fit = Vec::new();
        let mut refused = Vec::new();
        for machine in machines {
            match self.check(project, machine, options).await {
                Ok(()) => fit.push(machine),
                Err(error) => refused.push(MachineReport {
                    machine: machine.name.clone(),
                    vm: machine.vm.clone(),
                    done: Vec::new(),
                    end: End::Failed(error),
                }),
            }
        }
        let work = Work::new(project, options, listener);
        let stopped = self.take_down(&work, fit.clone(), false).await;
        let is_down = |name: &str| {
            stopped.machines.iter().any(|report| report.machine == name && matches!(report.end, End::Fine))
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

    /// Tells beforehand whether a machine could be brought up again.
    async fn check(&self, project: &Project, machine: &MachinePlan, options: &Options) -> Result<()> {
        let Found::Vm { vm, .. } = self.look(project, machine).await? else { return Ok(()) };
        let changes = changes_of(project, machine, &vm)?;
        match action(&vm.state, &changes) {
            PlannedAction::Recreate if !options.recreate => Err(needs_anew(project, machine, &changes)),
            _ => Ok(()),
        }
    }
}
