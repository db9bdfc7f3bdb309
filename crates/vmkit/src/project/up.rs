//! `up`: creates, starts and provisions machines and waits until they are ready, each after its
//! dependencies.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::time::Instant;

use super::diff::{PlannedAction, action, changes_of, pending};
use super::event::{EventKind, EventListener, MachineAction, ProjectReport};
use super::job::{MachineJob, RunContext};
use super::look::MachineVm;
use super::paths::{all_of, errors, missing};
use super::provisioned::ProvisionRecord;
use super::{GuestConnector, ProjectManager, ProjectOptions, chosen, with_dependencies};
use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::image::PullPolicy;
use crate::launch::ResolvedVm;
use crate::lifecycle::VmState;
use crate::span::{about, operation, within};
use crate::spec::{NetworkConfig, PortForward, SpecChange, TakesEffect};
use crate::vmfile::{MachineConfig, Project, VmfileProblem};

impl<H: Backend + 'static, G: GuestConnector> ProjectManager<H, G> {
    /// Brings up the chosen machines and all their dependencies: creates missing ones, starts
    /// stopped ones, applies changes, provisions, waits until each is ready, and leaves unchanged
    /// ones alone.
    ///
    /// If a machine fails, only the machines that depend on it are skipped.
    ///
    /// # Errors
    /// `NotFound` for an unknown machine; `InvalidInput` if the host's files that the machines need
    /// can't be read or an image's name is unknown, before anything is changed; `Busy` if another
    /// operation on the project takes too long; those of the home. The failure of a machine is in
    /// the report.
    pub async fn up(
        &self,
        project: &Project,
        options: &ProjectOptions,
        listener: EventListener,
    ) -> Result<ProjectReport> {
        let machines = with_dependencies(project, chosen(project, &options.machines)?);
        let _lock = self.lock(project, options, &listener).await?;
        let mut work = RunContext::new(project, options, listener);
        self.check_paths(&work, &machines, false).await?;
        // A port of the host that moves from one machine to another is released before it is taken.
        let pruned = if options.prune { self.remove_leftovers(&work).await? } else { Vec::new() };
        work.freed = Arc::new(self.free_ports(&work, &machines).await);
        let mut report = self.bring_up(&work, machines).await;
        report.machines.extend(pruned);
        Ok(report)
    }

    /// Removes the forwards of running machines that are no longer in the file, if another machine
    /// of the file needs their port; returns the machines.
    ///
    /// A failure here is reported by the machine's own job, which tries again.
    async fn free_ports(&self, work: &RunContext, machines: &[&MachineConfig]) -> BTreeSet<String> {
        let mut freed = BTreeSet::new();
        for machine in machines {
            let turn = MachineJob::new(self, work, machine);
            if let Ok(true) = turn.free_ports().await {
                freed.insert(machine.name.clone());
            }
        }
        freed
    }

    /// Brings up these machines, with the project's lock held.
    pub(super) async fn bring_up(&self, work: &RunContext, machines: Vec<&MachineConfig>) -> ProjectReport {
        let lost = self.tell_lost(work, &machines).await;
        let report = self.in_turn(work, machines, |mut turn| async move {
            let end = turn.up().await;
            turn.report(end)
        });
        ProjectReport { lost, ..report.await }
    }
}

impl<H: Backend + 'static, G: GuestConnector> MachineJob<H, G> {
    pub(super) async fn up(&mut self) -> Result<()> {
        let span = operation!("up", vm = &self.machine.vm, machine = &self.machine.name);
        within(span, self.up_in_span()).await
    }

    async fn up_in_span(&mut self) -> Result<()> {
        let began = Instant::now();
        let vm = match self.engine.look(&self.work.project, &self.machine).await? {
            MachineVm::Nothing => self.make(self.makings().await?).await?,
            MachineVm::Vm { mut vm, unsettled } => {
                if unsettled && vm.state == VmState::Running {
                    // The record of its run may be outdated.
                    *vm = self.engine.manager().start(&self.machine.vm).await?;
                }
                self.change(*vm).await?
            }
        };
        about(vm.id);
        self.run(&vm).await?;
        self.fit().await?;
        self.tell(EventKind::Ready { after: began.elapsed() });
        Ok(())
    }

    /// Starts a stopped machine, or resumes a suspended one.
    async fn run(&mut self, vm: &VmHandle) -> Result<()> {
        let (manager, name) = (self.engine.manager(), &self.machine.vm);
        let done = match vm.state {
            VmState::Running => return Ok(()),
            VmState::Suspended | VmState::Saved => {
                self.tell(EventKind::Resuming);
                manager.resume(name).await?;
                MachineAction::Resumed
            }
            _ => {
                self.tell(EventKind::Starting);
                manager.start(name).await?;
                MachineAction::Started
            }
        };
        self.done.push(done);
        Ok(())
    }

    /// Returns everything needed to create the machine's VM; the image is fetched if it is not
    /// local.
    async fn makings(&self) -> Result<ResolvedVm> {
        let (manager, images) = (self.engine.manager(), &self.engine.shared.images);
        let mut on_progress = |now| self.tell(EventKind::Pulling(now));
        let blueprint = self.machine.blueprint();
        let Some(image) = &self.machine.image else {
            return blueprint.resolve(manager, images, PullPolicy::Missing, &mut on_progress).await;
        };
        self.tell(EventKind::Image);
        let resolved = blueprint.resolve(manager, images, PullPolicy::Missing, &mut on_progress).await;
        resolved.map_err(|error| self.without_image(image, error))
    }

    /// Returns everything needed to recreate the machine's VM, before the existing one is removed:
    /// an error that can be found beforehand must not happen when its disks are gone.
    pub(super) async fn makings_anew(&self) -> Result<ResolvedVm> {
        let (machine, digests) = (self.machine.clone(), self.work.digests.clone());
        let action = PlannedAction::Recreate;
        let look = move || missing(&machine, action, &ProvisionRecord::default(), &digests);
        let project = &self.work.project;
        let host = self.engine.check_host(project, &self.machine, action).await;
        all_of(project, errors(project, &self.machine, blocking(look).await?, host).into_iter())?;
        self.makings().await
    }

    async fn make(&mut self, makings: ResolvedVm) -> Result<VmHandle> {
        self.tell(EventKind::Making);
        let vm = self.engine.manager().create(makings.spec).await?;
        self.done.push(MachineAction::Made);
        // From here on the VM keeps the image from being removed.
        drop(makings.image);
        Ok(vm)
    }

    /// Returns the error about the image in the file; other errors stay as they are.
    fn without_image(&self, image: &str, error: Error) -> Error {
        let kind = error.kind();
        let why = error.chain().to_string();
        match error {
            Error::NotFound { .. } => Error::invalid("image", image, why),
            Error::Io { verb, path, source } => {
                Error::invalid("image", image, format!("cannot {verb} {}", path.display()))
                    .with_source(source)
            }
            Error::Fetch { .. } | Error::Untrusted { .. } => {
                let problem = VmfileProblem::new(format!("`image`: {why}"));
                self.work.project.error_at(&self.machine, "image", problem).of_kind(kind).into()
            }
            error => error,
        }
    }

    /// Applies the file's changes to the machine, as far as allowed.
    async fn change(&mut self, vm: VmHandle) -> Result<VmHandle> {
        let changes = changes_of(&self.work.project, &self.machine, &vm)?;
        if action(&vm.state, &changes) == PlannedAction::Recreate {
            if !self.work.options.recreate {
                self.note_pending(&vm);
                return Err(self.needs_anew(&changes));
            }
            let makings = self.makings_anew().await?;
            self.remove(&vm).await?;
            return self.make(makings).await;
        }
        let vm = if changes.is_empty() { vm } else { self.reconfigure(vm).await? };
        self.note_pending(&vm);
        let (later, now): (Vec<&SpecChange>, Vec<&SpecChange>) = changes
            .iter()
            .partition(|change| vm.state.has_memory() && change.applies == TakesEffect::NextStart);
        let [mut now, later] = [now, later]
            .map(|changes| changes.iter().map(|change| change.field.to_owned()).collect::<Vec<_>>());
        if self.work.freed.contains(&self.machine.name) && !now.iter().any(|field| field == "forwards") {
            now.push("forwards".to_owned());
        }
        for (fields, done) in [(now, MachineAction::Changed as fn(_) -> _), (later, MachineAction::Recorded)]
        {
            if !fields.is_empty() {
                self.done.push(done(fields));
            }
        }
        Ok(vm)
    }

    /// Notes the changes to a running VM, from now or earlier, that wait for its next start.
    fn note_pending(&mut self, vm: &VmHandle) {
        if vm.state.has_memory() {
            self.pending = pending(vm);
        }
    }

    /// Notes the changes that need the VM recreated, and returns the error that points to them.
    pub(super) fn needs_anew(&mut self, changes: &[SpecChange]) -> Error {
        let anew = changes.iter().filter(|change| change.applies == TakesEffect::Anew);
        self.anew = anew.map(|change| change.field.to_owned()).collect();
        let told: Vec<String> = self.anew.iter().map(|field| format!("`{field}`")).collect();
        let problem = VmfileProblem::new(format!(
            "{} can't be changed in an existing machine: it has to be recreated",
            told.join(", ")
        ));
        let problem = problem.help("`--recreate` does so, and its disks are lost");
        let key = self.anew.first().map_or("", String::as_str);
        self.work.project.error_at(&self.machine, key, problem).into()
    }

    async fn reconfigure(&self, vm: VmHandle) -> Result<VmHandle> {
        let (manager, name) = (self.engine.manager(), &self.machine.vm);
        let wanted = self.machine.spec_over(&vm.spec)?;
        if vm.state.is_live() {
            // Forwards are removed first, since new ones may use the same port.
            for forward in not_in(vm.spec.network(), wanted.network()) {
                manager.remove_forward(name, &forward).await?;
            }
            for forward in not_in(wanted.network(), vm.spec.network()) {
                manager.add_forward(name, &forward).await?;
            }
        }
        manager.reconfigure(name, wanted).await
    }

    /// Removes the machine's forwards that are no longer in the file, if another machine needs
    /// their port and this one may be changed; returns whether there were any.
    async fn free_ports(&self) -> Result<bool> {
        let MachineVm::Vm { vm, .. } = self.engine.look(&self.work.project, &self.machine).await? else {
            return Ok(false);
        };
        let changes = changes_of(&self.work.project, &self.machine, &vm)?;
        let is_left = action(&vm.state, &changes) == PlannedAction::Recreate && !self.work.options.recreate;
        if is_left || !vm.state.is_live() {
            return Ok(false);
        }
        let mut gone = not_in(vm.spec.network(), self.machine.spec_over(&vm.spec)?.network());
        gone.retain(|forward| self.is_wanted_blocking(forward));
        for forward in &gone {
            self.engine.manager().remove_forward(&self.machine.vm, forward).await?;
        }
        Ok(!gone.is_empty())
    }

    /// Returns whether another machine of the file needs the host port of this forward.
    fn is_wanted_blocking(&self, forward: &PortForward) -> bool {
        let others = self.work.project.machines.iter().filter(|other| other.name != self.machine.name);
        let mut wanted = others.filter_map(|other| match other.network() {
            NetworkConfig::User(user) => Some(&user.forwards),
            _ => None,
        });
        let is_same = |other: &PortForward| {
            other.host_port.is_some()
                && (other.host_port, other.protocol) == (forward.host_port, forward.protocol)
        };
        wanted.any(|forwards| forwards.iter().any(is_same))
    }

    /// Removes the machine's VM, after a chance for the guest to shut down.
    pub(super) async fn remove(&mut self, vm: &VmHandle) -> Result<()> {
        let (manager, name) = (self.engine.manager(), &self.machine.vm);
        if vm.state.is_live() {
            self.tell(EventKind::Stopping);
            manager.stop(name, self.work.options.stop_timeout).await?;
            self.done.push(MachineAction::Stopped);
        }
        let manager = self.engine.manager();
        self.tell(EventKind::Removing);
        manager.remove(name, true).await?;
        self.done.push(MachineAction::Removed);
        Ok(())
    }
}

/// Returns the forwards of one network that the other one does not have.
fn not_in(one: &NetworkConfig, other: &NetworkConfig) -> Vec<PortForward> {
    let (NetworkConfig::User(one), NetworkConfig::User(other)) = (one, other) else { return Vec::new() };
    one.forwards.iter().filter(|forward| !other.forwards.contains(forward)).cloned().collect()
}
