//! A job: the work of one operation on one machine, and its results.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::event::{
    EventKind, EventListener, MachineAction, MachineOutcome, MachineReport, ProjectEvent, ProjectReport,
};
use super::kept::MachineFiles;
use super::order::{JobEnd, in_order};
use super::task::DigestCache;
use super::{GuestConnector, ProjectManager, ProjectOptions, dependencies};
use crate::error::Result;
use crate::hypervisor::Backend;
use crate::vmfile::{MachineConfig, Project};

/// The shared state of the jobs of one operation.
#[derive(Clone)]
pub(super) struct RunContext {
    pub(super) project: Arc<Project>,
    pub(super) options: Arc<ProjectOptions>,
    pub(super) listener: EventListener,
    pub(super) digests: DigestCache,
    /// The machines whose forwards were removed before the first job.
    pub(super) freed: Arc<BTreeSet<String>>,
}

/// The work on one machine, and its results.
pub(super) struct MachineJob<H, G> {
    pub(super) engine: ProjectManager<H, G>,
    pub(super) work: RunContext,
    pub(super) machine: MachineConfig,
    pub(super) done: Vec<MachineAction>,
    /// The changed fields that take effect at the next start.
    pub(super) pending: Vec<String>,
    /// The changed fields that take effect when the machine is recreated.
    pub(super) anew: Vec<String>,
}

impl RunContext {
    pub(super) fn new(project: &Project, options: &ProjectOptions, listener: EventListener) -> Self {
        Self {
            project: Arc::new(project.clone()),
            options: Arc::new(options.clone()),
            listener,
            digests: DigestCache::default(),
            freed: Arc::default(),
        }
    }
}

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Runs a job for each of the machines, after those of its dependencies.
    pub(super) async fn in_turn<F>(
        &self,
        work: &RunContext,
        machines: Vec<&MachineConfig>,
        what: impl Fn(MachineJob<H, G>) -> F,
    ) -> ProjectReport
    where
        F: Future<Output = MachineReport> + Send + 'static,
    {
        let begin = |place: usize| what(MachineJob::new(self, work, machines[place]));
        let is_fine = |report: &MachineReport| matches!(report.end, MachineOutcome::Fine);
        let ended = in_order(&dependencies(&machines), work.options.at_once, is_fine, begin).await;
        let reports = ended.into_iter().zip(&machines).map(|(ended, machine)| match ended {
            JobEnd::Done(report) => report,
            JobEnd::Skipped { because } => {
                let end = MachineOutcome::Skipped(machines[because].name.clone());
                MachineReport::new(&machine.name, &machine.vm, end)
            }
        });
        ProjectReport { machines: reports.collect(), ..ProjectReport::default() }
    }
}

impl<H: Backend + 'static, G: GuestConnector> MachineJob<H, G> {
    pub(super) fn new(engine: &ProjectManager<H, G>, work: &RunContext, machine: &MachineConfig) -> Self {
        let [pending, anew] = [Vec::new(), Vec::new()];
        let (engine, work, machine) = (engine.clone(), work.clone(), machine.clone());
        Self { engine, work, machine, done: Vec::new(), pending, anew }
    }

    pub(super) fn tell(&self, what: EventKind) {
        (self.work.listener)(ProjectEvent { machine: Some(self.machine.name.clone()), what });
    }

    /// Ends the job; an error about a value in the file points to it.
    pub(super) fn report(self, end: Result<()>) -> MachineReport {
        let end = end.map_err(|error| self.work.project.blamed(&self.machine, error));
        let end = end.map_or_else(MachineOutcome::Failed, |()| MachineOutcome::Fine);
        MachineReport {
            done: self.done,
            pending: self.pending,
            anew: self.anew,
            ..MachineReport::new(&self.machine.name, &self.machine.vm, end)
        }
    }

    pub(super) fn kept(&self) -> MachineFiles {
        MachineFiles::of(self.engine.manager().home(), &self.machine.vm)
    }
}
