//! What happens while a project is worked on, as it happens, and what came of it in the end.
//!
//! Pure: data.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::provisioned::StepReason;
use crate::error::Error;
use crate::image::PullProgress;
use crate::spec::VmName;

/// Something that happens.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ProjectEvent {
    /// The machine that it happens on, by its name in the file; `None` where it is about the
    /// project as a whole.
    pub machine: Option<String>,
    /// What happens.
    pub what: EventKind,
}

/// What can happen.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum EventKind {
    /// Another process changes the machines of the project, and is waited for.
    Queued {
        /// The process that does, where it is known.
        holder: Option<u32>,
    },
    /// VMs are there whose file is no longer there, and a machine has to be made: it may be one of
    /// them.
    Lost(Vec<OrphanedVm>),
    /// Its image is looked for, and fetched where it is missing.
    Image,
    /// Its image is being fetched, and has come so far.
    Pulling(PullProgress),
    /// Its VM is being made.
    Making,
    /// Its VM is being removed.
    Removing,
    /// It is being started.
    Starting,
    /// It was suspended, and is being resumed.
    Resuming,
    /// It is being stopped.
    Stopping,
    /// It is awaited; this says what for.
    Awaiting(String),
    /// Its guest is up and not as it has to be: this is odd about it. The work goes on.
    Notice(String),
    /// It is as the file says, and ready, this long after the work on it began.
    Ready {
        /// How long that took.
        after: Duration,
    },
    /// A step is begun.
    Step {
        /// The step.
        name: String,
        /// Why it is run.
        why: StepReason,
    },
    /// A copy of a folder leaves this out: a socket, a named pipe or a device.
    LeftOut {
        /// The copy.
        step: String,
        /// What is left out.
        path: PathBuf,
    },
    /// A step printed a line.
    Output {
        /// The step.
        step: String,
        /// What it printed, without the end of the line.
        line: String,
    },
}

/// Takes events as they come; it is called from where the work is done, and should not take long.
pub type EventListener = Arc<dyn Fn(ProjectEvent) + Send + Sync>;

/// What came of the work on a project, a machine each in the order of the file.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct ProjectReport {
    /// The machines.
    pub machines: Vec<MachineReport>,
    /// The VMs that this project has probably left behind, where a machine had no VM.
    pub lost: Vec<OrphanedVm>,
}

/// What came of the work on one machine.
#[derive(Debug)]
#[non_exhaustive]
pub struct MachineReport {
    /// Its name in the file.
    pub machine: String,
    /// The name of its VM.
    pub vm: VmName,
    /// What was done to it, in order; nothing where it was right already.
    pub done: Vec<MachineAction>,
    /// The fields that the file changed, by now or earlier, and that count from its next start on.
    pub pending: Vec<String>,
    /// The fields that the file changed, and that count only once it is recreated.
    pub anew: Vec<String>,
    /// How that ended.
    pub end: MachineOutcome,
}

/// How the work on a machine ended.
#[derive(Debug)]
#[non_exhaustive]
pub enum MachineOutcome {
    /// All of it was done, or there was nothing to do.
    Fine,
    /// Something failed, and what would have come next on this machine was not tried.
    Failed(Error),
    /// Nothing was tried, since it depends on this machine, which failed or was skipped itself.
    Skipped(String),
}

/// Something that was done to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MachineAction {
    /// Its VM was made.
    Made,
    /// Its VM was removed.
    Removed,
    /// It was started.
    Started,
    /// It was resumed.
    Resumed,
    /// It was stopped.
    Stopped,
    /// These fields of it were changed, and that counts already.
    Changed(Vec<String>),
    /// These fields of it were changed, and that counts from its next start on.
    Recorded(Vec<String>),
    /// This step was run.
    Ran(String),
}

impl MachineReport {
    /// Creates the report of a machine on which nothing was done.
    pub(super) fn new(machine: &str, vm: &VmName, end: MachineOutcome) -> Self {
        let [pending, anew] = [Vec::new(), Vec::new()];
        Self { machine: machine.to_owned(), vm: vm.clone(), done: Vec::new(), pending, anew, end }
    }
}

impl ProjectReport {
    /// Returns whether everything was right already.
    pub fn is_unchanged(&self) -> bool {
        self.machines
            .iter()
            .all(|machine| machine.done.is_empty() && matches!(machine.end, MachineOutcome::Fine))
    }

    /// Returns whether all of it was done.
    pub fn is_fine(&self) -> bool {
        self.machines.iter().all(|machine| matches!(machine.end, MachineOutcome::Fine))
    }
}

impl fmt::Display for MachineAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MachineAction::Made => f.write_str("made"),
            MachineAction::Removed => f.write_str("removed"),
            MachineAction::Started => f.write_str("started"),
            MachineAction::Resumed => f.write_str("resumed"),
            MachineAction::Stopped => f.write_str("stopped"),
            MachineAction::Changed(fields) => write!(f, "changed {}", fields.join(", ")),
            MachineAction::Recorded(fields) => {
                write!(f, "changed {} from the next start on", fields.join(", "))
            }
            MachineAction::Ran(step) => write!(f, "ran `{step}`"),
        }
    }
}

/// The VM of a machine whose file is no longer there, and was probably the same project's.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OrphanedVm {
    /// The name that the machine had.
    pub machine: String,
    /// The name of its VM.
    pub vm: VmName,
    /// Where its file was.
    pub file: PathBuf,
}
