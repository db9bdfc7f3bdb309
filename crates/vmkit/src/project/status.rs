//! How the machines of a project are.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::diff::pending;
use super::inside::GuestShell;
use super::kept::MachineFiles;
use super::look::{MachineVm, found};
use super::provision::asks_guest;
use super::provisioned::StepEnd;
use super::task::{DigestCache, GuestTask, UnreadableSource, tasks, to_do};
use super::{GuestConnector, PlannedStep, ProjectManager, ProjectOptions, chosen};
use crate::blocking::blocking;
use crate::deadline::later;
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::VmState;
use crate::manager::VmEntry;
use crate::spec::VmName;
use crate::vmfile::{MachineConfig, Project};

/// How many guests are asked at the same time whether they are ready. Each takes a watch of the
/// system's, and a user has 128 of them as a rule.
const ASKED_AT_ONCE: usize = 32;

/// How much earlier than its asker a question gives up, at the most.
const LAST_WORD: Duration = Duration::from_millis(250);

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
    /// Which of it is not true, the first that was asked; `None` where all of it is, or it does not
    /// run.
    pub unready: Option<NotReady>,
    /// How far its provisioning came; `None` where there is no VM, or its files can't be read.
    pub provisioning: Option<ProvisioningStatus>,
    /// The fields that were changed while it ran, and count from its next start on.
    pub pending: Vec<String>,
}

/// What a machine lacks to be ready.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NotReady {
    /// What was asked, as the file's `ready` has it: `ssh`, `cloud_init`, `tcp 80` or `command`.
    pub probe: String,
    /// How that ended.
    pub how: String,
}

/// How far the provisioning of a machine came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProvisioningStatus {
    /// The copies and steps that are done.
    pub done: Vec<String>,
    /// Those that the next `up` would run; one that is run every time is among them although it is
    /// done.
    pub to_do: Vec<PlannedStep>,
    /// The one that failed last, and how.
    pub failed: Option<(String, String)>,
}

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Returns how the machines are that were chosen, in the order of the file. Changes nothing.
    ///
    /// `patience` bounds how long a guest is asked whether it is ready; they are asked at the same
    /// time, up to a bound.
    ///
    /// # Errors
    /// `NotFound` for a name that no machine has; `Io` where the home can't be read.
    pub async fn status(
        &self,
        project: &Project,
        options: &ProjectOptions,
        patience: Duration,
    ) -> Result<Vec<MachineStatus>> {
        let machines = chosen(project, &options.machines)?;
        let mut listed = self.manager().list().await?;
        let turns = Arc::new(Semaphore::new(ASKED_AT_ONCE));
        let digests = DigestCache::default();
        // They end with this call.
        let mut asked = JoinSet::new();
        for (index, machine) in machines.into_iter().enumerate() {
            let place = listed.iter().position(|listed| listed.name == machine.vm);
            let listed = place.map(|place| listed.swap_remove(place));
            let (engine, project, machine) = (self.clone(), project.clone(), machine.clone());
            let (turns, digests) = (Arc::clone(&turns), digests.clone());
            asked.spawn(async move {
                let _turn = turns.acquire().await;
                (index, engine.status_of(&project, &machine, listed, digests, patience).await)
            });
        }
        let mut statuses = asked.join_all().await;
        statuses.sort_by_key(|(index, _)| *index);
        Ok(statuses.into_iter().map(|(_, status)| status).collect())
    }

    async fn status_of(
        &self,
        project: &Project,
        machine: &MachineConfig,
        listed: Option<VmEntry>,
        digests: DigestCache,
        patience: Duration,
    ) -> MachineStatus {
        let mut status = MachineStatus {
            machine: machine.name.clone(),
            vm: machine.vm.clone(),
            handle: Ok(None),
            address: None,
            ready: None,
            unready: None,
            provisioning: None,
            pending: Vec::new(),
        };
        let vm = match listed.map_or(Ok(MachineVm::Nothing), |listed| found(project, machine, listed)) {
            Ok(MachineVm::Vm { vm, .. }) => vm,
            Ok(MachineVm::Nothing) => return status,
            Err(error) => {
                status.handle = Err(error);
                return status;
            }
        };
        let kept = MachineFiles::of(self.manager().home(), &machine.vm);
        let tasks = tasks(machine);
        let looked = blocking(move || provisioning(tasks, &kept, &digests)).await;
        status.provisioning = looked.flatten().ok();
        status.pending = pending(&vm);
        if vm.state == VmState::Running {
            status.address = self.manager().guest_ip(&machine.vm).await.ok();
            status.unready = self.ready(machine, patience).await.err();
            status.ready = Some(status.unready.is_none());
        }
        status.handle = Ok(Some(*vm));
        status
    }

    /// Asks whether a machine that runs is ready, as far as that can be found out in this time.
    ///
    /// # Errors
    /// With the first of what the file's `ready` asks for that is not true.
    async fn ready(&self, machine: &MachineConfig, patience: Duration) -> Result<(), NotReady> {
        let mut probe = "ssh".to_owned();
        let end = later(patience);
        // What is asked has a little less time, to say itself what it has waited for.
        let asked = self.probe(machine, &mut probe, end - (patience / 10).min(LAST_WORD));
        let how = match timeout_at(end, asked).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => said(error, patience),
            Err(_) => format!("no reply within {:.1} s", patience.as_secs_f64()),
        };
        Err(NotReady { probe, how })
    }

    /// Asks for one thing after the other, and notes in `probe` for which.
    async fn probe(&self, machine: &MachineConfig, probe: &mut String, deadline: Instant) -> Result<()> {
        let ready = &machine.ready;
        if !asks_guest(ready) {
            return Ok(());
        }
        if !machine.is_entered() {
            for port in &ready.tcp {
                *probe = format!("tcp {port}");
                self.listens(machine, &[*port], deadline).await?;
            }
            return Ok(());
        }
        // What is odd is in the result.
        let guest = self.shared.guests.enter(&machine.vm, deadline, &mut |_| ()).await?;
        let inside = GuestShell::new(guest, &machine.name);
        if ready.cloud_init {
            *probe = "cloud_init".to_owned();
            inside.cloud_init(deadline).await?;
        }
        for port in &ready.tcp {
            *probe = format!("tcp {port}");
            inside.listens(*port, deadline).await?;
        }
        if let Some(text) = &ready.command {
            *probe = "command".to_owned();
            inside.succeeds_at(text, deadline).await?;
        }
        Ok(())
    }
}

/// Returns an error on one line, without the console's. What was asked before it took its part of
/// the time.
fn said(error: Error, after: Duration) -> String {
    let error = match error {
        Error::TimedOut { awaited, .. } => Error::timed_out(awaited, after),
        error => error,
    };
    let causes = std::iter::successors(std::error::Error::source(&error), |cause| cause.source());
    let text = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
    text.lines().next().unwrap_or_default().to_owned()
}

fn provisioning(
    tasks: Vec<GuestTask>,
    kept: &MachineFiles,
    digests: &DigestCache,
) -> Result<ProvisioningStatus> {
    let provisioned = kept.provisioned()?;
    let mut found = ProvisioningStatus::default();
    for task in &tasks {
        match provisioned.get(&task.key).map(|record| &record.end) {
            Some(StepEnd::Done) => found.done.push(task.name.clone()),
            Some(StepEnd::Failed(how) | StepEnd::CutOff(how)) => {
                found.failed = Some((task.name.clone(), how.clone()));
            }
            Some(StepEnd::Begun) | None => {}
        }
    }
    let to_do = to_do(tasks, &provisioned, false, digests).map_err(UnreadableSource::into_error)?;
    found.to_do = to_do.into_iter().map(PlannedStep::of).collect();
    Ok(found)
}
