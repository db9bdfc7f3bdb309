//! The files and images that machines need, looked for before anything is done: a mistake in the
//! last line of a file shall not be found after an hour of fetching and booting.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Access, access};

use super::diff::{PlannedAction, changes_of, needed};
use super::job::RunContext;
use super::kept::MachineFiles;
use super::look::MachineVm;
use super::provisioned::ProvisionRecord;
use super::task::{DigestCache, UnreadableSource, tasks, to_do};
use super::{GuestConnector, ProjectManager};
use crate::blocking::blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::Backend;
use crate::vmfile::{MachineConfig, Project, VmfileError};

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Looks for all that these machines need of the host to become as the file says: files,
    /// memory, users, and for the names of their images; `restarts` those that run as well. No
    /// server is asked.
    ///
    /// # Errors
    /// `InvalidInput` ([`Error::Vmfile`]) with each that can't be had or is unknown, and where the
    /// file names it. What is wrong with a machine otherwise is left to its turn.
    pub(super) async fn check_paths(
        &self,
        work: &RunContext,
        machines: &[&MachineConfig],
        restarts: bool,
    ) -> Result<()> {
        let mut needs = Vec::new();
        for machine in machines {
            let Ok(found) = self.look(&work.project, machine).await else { continue };
            let action = match found {
                MachineVm::Nothing => PlannedAction::Make,
                MachineVm::Vm { vm, .. } => match changes_of(&work.project, machine, &vm) {
                    Ok(changes) => match needed(&vm.state, &changes) {
                        PlannedAction::Keep | PlannedAction::Resume if restarts => PlannedAction::Start,
                        action => action,
                    },
                    Err(_) => continue,
                },
            };
            let Ok(provisioned) = MachineFiles::of(self.manager().home(), &machine.vm).provisioned() else {
                continue;
            };
            match action {
                // It is refused, and stays as it is.
                PlannedAction::Recreate if !work.options.recreate => {}
                action => {
                    let host = self.check_host(&work.project, machine, action).await;
                    needs.push(((*machine).clone(), action, provisioned, host));
                }
            }
        }
        let (project, digests) = (Arc::clone(&work.project), work.digests.clone());
        let engine = self.clone();
        blocking(move || {
            let errors = needs.into_iter().flat_map(|(machine, action, provisioned, host)| {
                let wrong = engine.wrong_image(&project, &machine, action);
                let missing = missing(&machine, action, &provisioned, &digests);
                wrong.into_iter().chain(errors(&project, &machine, missing, host))
            });
            all_of(&project, errors)
        })
        .await?
    }

    /// Returns what is wrong with the image that a machine would be made of, at its place in the
    /// file: that nothing has this name, or that the file is no image, for two. Whether an image
    /// can be fetched is not asked.
    pub(super) fn wrong_image(
        &self,
        project: &Project,
        machine: &MachineConfig,
        action: PlannedAction,
    ) -> Option<Error> {
        let is_made = matches!(action, PlannedAction::Make | PlannedAction::Recreate);
        let text = machine.image.as_ref().filter(|_| is_made)?;
        // A file that can't be read is told of among the others.
        if text.starts_with('/') && readable(Path::new(text)).is_err() {
            return None;
        }
        let size = machine.blueprint().draft().disk().and_then(|disk| disk.size);
        let checked = self.shared.images.check(&text.parse().ok()?, machine.machine().arch(), size);
        // What can't be read is told by the machine's own turn.
        let error = checked.err().filter(|error| error.kind() == ErrorKind::InvalidInput)?;
        Some(project.blamed(machine, error))
    }

    /// Refuses a machine that this host can never run, where it is to be started.
    ///
    /// # Errors
    /// As [`VmManager::check_host`](crate::VmManager::check_host), pointing into the file.
    pub(super) async fn check_host(
        &self,
        project: &Project,
        machine: &MachineConfig,
        action: PlannedAction,
    ) -> Result<()> {
        match action {
            PlannedAction::Resume | PlannedAction::Keep => Ok(()),
            PlannedAction::Make | PlannedAction::Recreate | PlannedAction::Start => {
                let checked = self.manager().check_host(machine.blueprint().draft()).await;
                checked.map_err(|error| project.blamed(machine, error))
            }
        }
    }
}

/// Returns the files of the host that a machine needs for this, and that can't be read.
pub(super) fn missing(
    machine: &MachineConfig,
    action: PlannedAction,
    provisioned: &ProvisionRecord,
    digests: &DigestCache,
) -> Vec<UnreadableSource> {
    let is_new = matches!(action, PlannedAction::Make | PlannedAction::Recreate);
    let none = ProvisionRecord::default();
    let provisioned = if is_new { &none } else { provisioned };
    let named = machine.host_files().into_iter().filter(|(place, _)| match action {
        PlannedAction::Make | PlannedAction::Recreate => true,
        // The image is the backing file of its disk already.
        PlannedAction::Start => place != "image",
        PlannedAction::Resume | PlannedAction::Keep => false,
    });
    let mut missing: Vec<UnreadableSource> = named
        .filter_map(|(place, path)| match readable(&path) {
            Ok(()) => None,
            Err(error) => Some(UnreadableSource { place, path, error }),
        })
        .collect();
    let tasks = tasks(machine).into_iter();
    missing.extend(tasks.filter_map(|task| to_do(vec![task], provisioned, false, digests).err()));
    missing
}

/// Points at the keys that name missing files; if none is missing, returns what else the host
/// lacks.
pub(super) fn errors(
    project: &Project,
    machine: &MachineConfig,
    missing: Vec<UnreadableSource>,
    host: Result<()>,
) -> Vec<Error> {
    if missing.is_empty() {
        return host.err().into_iter().collect();
    }
    missing.into_iter().map(|unreadable| project.blamed(machine, unreadable.into_error())).collect()
}

/// Creates one error of many that point into one file.
///
/// # Errors
/// That one, or the first that points nowhere.
pub(super) fn all_of(project: &Project, errors: impl Iterator<Item = Error>) -> Result<()> {
    let mut problems = Vec::new();
    let mut seen = BTreeSet::new();
    let mut text = None;
    for error in errors {
        let Error::Vmfile(error) = error else { return Err(error) };
        for problem in error.problems() {
            // What stands in `defaults` is one mistake, however many machines have it.
            if seen.insert((problem.place.as_ref().map(|place| place.span.start), problem.message.clone())) {
                problems.push(problem.clone());
            }
        }
        text.get_or_insert_with(|| Arc::clone(error.text()));
    }
    match text {
        Some(text) => Err(VmfileError::new(&project.file, text, problems).into()),
        None => Ok(()),
    }
}

fn readable(path: &Path) -> io::Result<()> {
    Ok(access(path, Access::READ_OK)?)
}
