//! How the machines of a project are.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::guests::Guest;
use super::kept::Kept;
use super::look::{Found, found};
use super::plan::pending;
use super::provision::{answers, asks_guest};
use super::provisioned::StepEnd;
use super::task::{tasks, to_do};
use super::{Guests, Options, PlannedStep, ProjectManager, chosen};
use crate::error::Result;
use crate::handle::VmHandle;
use crate::hypervisor::Hypervisor;
use crate::lifecycle::VmState;
use crate::manager::Listed;
use crate::spec::VmName;
use crate::vmfile::{MachinePlan, Project};

/// How one machine is.
#[derive(Debug)]
#[non_exhaustive]
pub struct MachineStatus {
    /// Its name in the file.
    pub machine: String,
    /// The name of its VM.
    pub vm: VmName,
    /// Its VM as it is now; `None` where there is none. Why that can't be told otherwise.
    pub handle: Result<Option<VmHandle>>,
    /// Where the host reaches its guest.
    pub address: Option<String>,
    /// Whether all is true now that the file's `ready` asks for; `None` where it does not run.
    pub ready: Option<bool>,
    /// How far its provisioning came; `None` where there is no VM, or its files can't be read.
    pub provisioning: Option<Provisioning>,
    /// The fields that were changed while it ran, and count from its next start on.
    pub pending: Vec<String>,
}

/// How far the provisioning of a machine came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Provisioning {
    /// The copies and steps that are done.
    pub done: Vec<String>,
    /// Those that the next `up` would run; one that is run every time is among them although it is done.
    pub to_do: Vec<PlannedStep>,
    /// The one that failed last, and how.
    pub failed: Option<(String, String)>,
}

impl<H: Hypervisor + 'static, G: Guests> ProjectManager<H, G> {
    /// Answers how the machines are that were chosen, in the order of the file. Changes nothing.
    ///
    /// `patience` bounds how long a guest is asked whether it is ready; all are asked at the same time.
    ///
    /// # Errors
    /// `NotFound` for a name that no machine has; `Io` where the home can't be read.
    pub async fn status(
        &self,
        project: &Project,
        options: &Options,
        patience: Duration,
    ) -> Result<Vec<MachineStatus>> {
        let machines = chosen(project, &options.machines)?;
        let mut listed = self.manager().list().await?;
        let deadline = Instant::now() + patience;
        let mut asked = Vec::new();
        for machine in machines {
            let place = listed.iter().position(|listed| listed.name == machine.vm);
            let listed = place.map(|place| listed.swap_remove(place));
            let (engine, project, machine) = (self.clone(), project.clone(), machine.clone());
            asked.push(tokio::spawn(
                async move { engine.status_of(&project, &machine, listed, deadline).await },
            ));
        }
        let mut statuses = Vec::with_capacity(asked.len());
        for asked in asked {
            statuses.push(asked.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())));
        }
        Ok(statuses)
    }

    async fn status_of(
        &self,
        project: &Project,
        machine: &MachinePlan,
        listed: Option<Listed>,
        deadline: Instant,
    ) -> MachineStatus {
        let mut status = MachineStatus {
            machine: machine.name.clone(),
            vm: machine.vm.clone(),
            handle: Ok(None),
            address: None,
            ready: None,
            provisioning: None,
            pending: Vec::new(),
        };
        let vm = match listed.map_or(Ok(Found::Nothing), |listed| found(project, machine, listed)) {
            Ok(Found::Vm { vm, .. }) => vm,
            Ok(Found::Nothing) => return status,
            Err(error) => {
                status.handle = Err(error);
                return status;
            }
        };
        let kept = Kept::of(self.manager().home(), &machine.vm);
        status.provisioning = provisioning(machine, &kept).ok();
        status.pending = pending(&vm);
        if vm.state == VmState::Running {
            status.address = self.manager().guest_ip(&machine.vm).await.ok();
            status.ready = Some(self.is_ready(machine, deadline).await);
        }
        status.handle = Ok(Some(*vm));
        status
    }

    /// Tells whether a machine that runs is ready, as far as that can be found out until the deadline.
    async fn is_ready(&self, machine: &MachinePlan, deadline: Instant) -> bool {
        let ready = &machine.ready;
        if !asks_guest(ready) {
            return true;
        }
        let asked = async {
            let guest = self.shared.guests.enter(&machine.vm, deadline).await?;
            if ready.cloud_init {
                guest.cloud_init(deadline).await?;
            }
            answers(&guest, ready, deadline).await
        };
        matches!(timeout_at(deadline, asked).await, Ok(Ok(())))
    }
}

fn provisioning(machine: &MachinePlan, kept: &Kept) -> Result<Provisioning> {
    let provisioned = kept.provisioned()?;
    let mut found = Provisioning::default();
    for task in tasks(machine) {
        match provisioned.get(&task.key).map(|record| &record.end) {
            Some(StepEnd::Done) => found.done.push(task.name),
            Some(StepEnd::Failed(how)) => found.failed = Some((task.name, how.clone())),
            Some(StepEnd::Begun) | None => {}
        }
    }
    let to_do = to_do(tasks(machine), &provisioned, false).map_err(|unreadable| unreadable.into_error())?;
    found.to_do = to_do.into_iter().map(|step| PlannedStep { name: step.task.name, why: step.why }).collect();
    Ok(found)
}
