//! How the machines of a project are.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::inside::Inside;
use super::kept::Kept;
use super::look::{Found, found};
use super::plan::pending;
use super::provision::{asks_guest, elsewhere};
use super::provisioned::StepEnd;
use super::task::{Digests, Task, Unreadable, tasks, to_do};
use super::{Guests, Options, PlannedStep, ProjectManager, chosen};
use crate::error::Result;
use crate::handle::VmHandle;
use crate::hypervisor::Hypervisor;
use crate::lifecycle::VmState;
use crate::manager::Listed;
use crate::spec::VmName;
use crate::vmfile::{MachinePlan, Project};

/// How many guests are asked at the same time whether they are ready. Each takes a watch of the system's, and a user has 128 of
/// them as a rule.
const ASKED_AT_ONCE: usize = 32;

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
    /// `patience` bounds how long a guest is asked whether it is ready; they are asked at the same time, up to a bound.
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
        let turns = Arc::new(Semaphore::new(ASKED_AT_ONCE));
        let digests = Digests::default();
        let mut asked = Vec::new();
        for machine in machines {
            let place = listed.iter().position(|listed| listed.name == machine.vm);
            let listed = place.map(|place| listed.swap_remove(place));
            let (engine, project, machine) = (self.clone(), project.clone(), machine.clone());
            let (turns, digests) = (Arc::clone(&turns), digests.clone());
            asked.push(tokio::spawn(async move {
                let _turn = turns.acquire().await;
                engine.status_of(&project, &machine, listed, digests, patience).await
            }));
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
        digests: Digests,
        patience: Duration,
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
        let tasks = tasks(machine);
        status.provisioning = elsewhere(move || provisioning(tasks, &kept, &digests)).await.ok();
        status.pending = pending(&vm);
        if vm.state == VmState::Running {
            status.address = self.manager().guest_ip(&machine.vm).await.ok();
            status.ready = Some(self.is_ready(machine, Instant::now() + patience).await);
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
            if !machine.is_entered() {
                return self.listens(machine, deadline).await;
            }
            let guest = self.shared.guests.enter(&machine.vm, deadline).await?;
            let inside = Inside::new(guest, &machine.name);
            if ready.cloud_init {
                inside.cloud_init(deadline).await?;
            }
            inside.answers(ready, deadline).await
        };
        matches!(timeout_at(deadline, asked).await, Ok(Ok(())))
    }
}

fn provisioning(tasks: Vec<Task>, kept: &Kept, digests: &Digests) -> Result<Provisioning> {
    let provisioned = kept.provisioned()?;
    let mut found = Provisioning::default();
    for task in &tasks {
        match provisioned.get(&task.key).map(|record| &record.end) {
            Some(StepEnd::Done) => found.done.push(task.name.clone()),
            Some(StepEnd::Failed(how)) => found.failed = Some((task.name.clone(), how.clone())),
            Some(StepEnd::Begun) | None => {}
        }
    }
    let to_do = to_do(tasks, &provisioned, false, digests).map_err(Unreadable::into_error)?;
    found.to_do = to_do.into_iter().map(|step| PlannedStep { name: step.task.name, why: step.why }).collect();
    Ok(found)
}
