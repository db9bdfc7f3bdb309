//! Brings the machines that a file describes to the described state: [`ProjectManager`].
//!
//! It works over [`VmManager`], which manages each VM by itself, and over [`GuestConnector`], the
//! logins to guests. The file has the wanted state, and the present state is always examined; there
//! is no record of a project as a whole, so none can be wrong after a crash. Another `up` continues
//! with each machine where it was left.
//!
//! ```text
//!           missing ─▶ make ──▶ ┐
//! machine ─▶ changed ─▶ change ▶ ├▶ start ─▶ enter ─▶ provision ─▶ ready ─▶ those that depend on it
//!           right ────────────▶ ┘
//! ```
//!
//! A machine is known by the labels of its VM: the file's absolute path, and its name there. A VM
//! without them is never touched, even if it has the machine's name.

mod archive;
mod diff;
mod down;
mod end_mark;
mod event;
mod guests;
mod inside;
mod job;
mod kept;
mod look;
mod lost;
mod order;
mod paths;
mod plan;
mod ports;
mod privilege;
mod provision;
mod provisioned;
mod reload;
mod script;
mod script_text;
mod ssh_guests;
mod status;
mod task;
mod up;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

pub use diff::PlannedAction;
pub use event::{
    EventKind, EventListener, MachineAction, MachineOutcome, MachineReport, OrphanedVm, ProjectEvent,
    ProjectReport,
};
pub use guests::{ConnectedGuest, GuestConnector, GuestInput, GuestNotice, GuestOutput};
pub use plan::{PlannedMachine, PlannedStep, ProjectPlan, RemovedMachine};
pub use provisioned::StepReason;
pub use ssh_guests::{SshGuest, SshGuests};
pub use status::{MachineStatus, NotReady, ProvisioningStatus};

use crate::error::{Error, Result, Subject};
use crate::hypervisor::Backend;
use crate::image::ImageStore;
use crate::manager::VmManager;
use crate::store::create_private;
use crate::store::lock::{FileLock, LockMode, acquire};
use crate::vmfile::{MachineConfig, Project};

/// Manages the machines of projects, over any hypervisor and any kind of login to its guests.
///
/// # Concurrency
/// One operation at a time changes the machines of a project; another one waits for the first, up
/// to its [`patience`](ProjectOptions::patience). Operations that only read do not wait.
///
/// # Cancel safety
/// A dropped future, like a killed process, leaves each machine where it was. The same call
/// continues from there: an interrupted step is run again.
#[derive(Debug)]
pub struct ProjectManager<H, G> {
    shared: Arc<ManagerState<H, G>>,
}

#[derive(Debug)]
struct ManagerState<H, G> {
    manager: VmManager<H>,
    guests: G,
    images: ImageStore,
}

impl<H, G> Clone for ProjectManager<H, G> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

/// The options of an operation on a project.
#[derive(Debug, Clone)]
pub struct ProjectOptions {
    /// The machines, by their names in the file; empty for all.
    pub machines: Vec<String>,
    /// Recreates machines whose changes require it. Their disks are lost.
    pub recreate: bool,
    /// Removes the VMs of machines that the file no longer has.
    pub prune: bool,
    /// How many machines are worked on in parallel.
    pub at_once: usize,
    /// The timeout of a guest's shutdown.
    pub stop_timeout: Duration,
    /// How long to wait for another operation on the same project.
    pub patience: Duration,
}

impl Default for ProjectOptions {
    fn default() -> Self {
        Self {
            machines: Vec::new(),
            recreate: false,
            prune: false,
            at_once: 8,
            stop_timeout: Duration::from_secs(30),
            patience: Duration::from_secs(600),
        }
    }
}

/// The options of [`ProjectManager::provision`].
#[derive(Debug, Clone, Default)]
pub struct ProvisionPolicy {
    /// The steps, by their names; empty for all.
    pub steps: Vec<String>,
    /// Runs them even if they are done.
    pub force: bool,
}

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Creates a manager of projects whose VMs are in `manager`'s home. Reads and writes nothing.
    pub fn new(manager: VmManager<H>, guests: G, images: ImageStore) -> Self {
        Self { shared: Arc::new(ManagerState { manager, guests, images }) }
    }

    /// Returns the manager of the VMs.
    pub fn manager(&self) -> &VmManager<H> {
        &self.shared.manager
    }

    /// Waits until no other operation changes the machines of the project.
    async fn lock(
        &self,
        project: &Project,
        options: &ProjectOptions,
        listener: &EventListener,
    ) -> Result<FileLock> {
        let dir = self.manager().home().projects();
        self.manager().home().refuse_other_user(dir)?;
        create_private(dir)?;
        let path = dir.join(format!("{}.lock", project.name));
        let now = Instant::now();
        let at_once = match acquire(&path, LockMode::Alone, now).await {
            Err(Error::Busy { holder, .. }) => {
                listener(ProjectEvent { machine: None, what: EventKind::Queued { holder } });
                acquire(&path, LockMode::Alone, now + options.patience).await
            }
            at_once => at_once,
        };
        let lock = at_once.map_err(|error| match error {
            Error::Busy { holder, .. } => {
                Error::Busy { what: format!("the project `{}`", project.name), holder }
            }
            error => error,
        });
        lock?.ok_or_else(|| Error::io("create", &path)(std::io::ErrorKind::NotFound.into()))
    }
}

/// Returns the named machines, in the order of the file; all of them without a name.
///
/// # Errors
/// `NotFound` for a name that no machine has.
fn chosen<'a>(project: &'a Project, names: &[String]) -> Result<Vec<&'a MachineConfig>> {
    if let Some(name) = names.iter().find(|name| project.machine(name).is_none()) {
        return Err(unknown(Subject::Machine, name, project.machines.iter().map(|machine| &machine.name)));
    }
    let is_chosen = |machine: &&MachineConfig| names.is_empty() || names.contains(&machine.name);
    Ok(project.machines.iter().filter(is_chosen).collect())
}

/// Returns the error for an unknown name, with a suggestion from the known ones.
fn unknown<'a>(what: Subject, name: &str, known: impl Iterator<Item = &'a String>) -> Error {
    let mut names: Vec<String> = Vec::new();
    for known in known {
        if !names.contains(known) {
            names.push(known.clone());
        }
    }
    let distance = |known: &&String| strsim::damerau_levenshtein(name, known);
    // A short name may have one wrong letter, a longer one a third.
    let is_near = |known: &&String| distance(known) <= known.chars().count().max(3) / 3;
    let meant = names.iter().min_by_key(distance).filter(is_near).cloned();
    Error::Unknown { what, name: name.to_owned(), known: names, meant }
}

/// Returns the machines and all their dependencies, transitively.
fn with_dependencies<'a>(project: &'a Project, machines: Vec<&'a MachineConfig>) -> Vec<&'a MachineConfig> {
    let mut names: Vec<&str> = machines.iter().map(|machine| machine.name.as_str()).collect();
    let mut looked = 0;
    while let Some(machine) = names.get(looked).and_then(|name| project.machine(name)) {
        for name in &machine.depends_on {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        looked += 1;
    }
    project.machines.iter().filter(|machine| names.contains(&machine.name.as_str())).collect()
}

/// Returns, for each of the machines, the indices of its dependencies among them.
fn dependencies(machines: &[&MachineConfig]) -> Vec<Vec<usize>> {
    let place = |name: &String| machines.iter().position(|machine| machine.name == *name);
    machines.iter().map(|machine| machine.depends_on.iter().filter_map(place).collect()).collect()
}

/// Reverses the edges of a graph.
fn reversed(after: &[Vec<usize>]) -> Vec<Vec<usize>> {
    let mut reversed = vec![Vec::new(); after.len()];
    for (place, before) in after.iter().enumerate() {
        for other in before {
            reversed[*other].push(place);
        }
    }
    reversed
}
