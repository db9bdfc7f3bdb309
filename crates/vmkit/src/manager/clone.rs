//! Creating VMs as copies of others.

use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::warn;
use uuid::Uuid;

#[cfg(all(feature = "ssh", feature = "images"))]
use super::ephemeral;
use super::{PATIENCE, VmManager, write_outcome};
#[cfg(all(feature = "ssh", feature = "images"))]
use crate::abilities::SnapshotKind;
use crate::abilities::{CloneMode, CloneRequest, DynClones, IdentityPolicy, MemoryMode};
use crate::error::{Error, LiveResource, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::{Operation, VmState};
use crate::span::{operation, within};
use crate::spec::{SnapshotName, VmName, VmSource, VmSpec};
use crate::store::{EphemeralGuard, LockedVm};

/// The start of the name of a snapshot that forks of a running guest continue from.
const FORK_POINT: &str = "fork-";
const FORK_POINT_DIGITS: usize = 12;
/// How many forks start at a time.
const STARTS_AT_ONCE: usize = 8;

/// How long a VM is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lifetime {
    /// Until it is removed.
    Lasting,
    /// As long as its owner lives.
    #[cfg(all(feature = "ssh", feature = "images"))]
    Ephemeral,
}

impl<H: Backend + 'static> VmManager<H> {
    /// Creates a VM with the disks of another one that does not run, or of one of its snapshots,
    /// and returns it in `Prepared`.
    ///
    /// It has the configuration of its source, but for: its name and identity; its login, whose
    /// keys are new, while cloud-init removes those of the source from it; forwards, which get free
    /// ports of the host; and vmkit's own labels. Where the guest has cloud-init, that runs as on a
    /// new machine.
    ///
    /// # Errors
    /// `NotFound` without the source or the snapshot; `AlreadyExists` for the new name; `Busy`;
    /// `Unsupported` by a backend without [`Clones`](crate::abilities::Clones); those of
    /// [`Clones::create_clone`](crate::abilities::Clones::create_clone).
    pub async fn clone_vm(&self, source: &VmSource, name: &VmName, mode: CloneMode) -> Result<VmHandle> {
        let clone = self.clone_owned(source, name, mode, Lifetime::Lasting);
        within(operation!("clone", vm = source.vm.as_str()), clone).await.map(|(vm, _)| vm)
    }

    async fn clone_owned(
        &self,
        source: &VmSource,
        name: &VmName,
        mode: CloneMode,
        lifetime: Lifetime,
    ) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let (locked, vm) = self.take_source(&source.vm).await?;
        let from = self.source_then(&locked, vm, source.snapshot.as_ref()).await?;
        let request = CloneRequest {
            snapshot: source.snapshot.clone(),
            mode,
            memory: MemoryMode::DisksOnly,
            ..CloneRequest::new(spec_of_clone(&from.spec, name, lifetime)?)
        };
        self.create_clone(&from, &request).await
    }

    /// Creates a copy of a VM: one that continues at its start, if the source has memory to
    /// continue from, and one that boots otherwise.
    ///
    /// # Errors
    /// As [`clone_vm`](Self::clone_vm) and [`fork`](Self::fork).
    #[cfg(all(feature = "ssh", feature = "images"))]
    pub(crate) async fn copy(
        &self,
        source: &VmSource,
        name: &VmName,
        identity: IdentityPolicy,
        lifetime: Lifetime,
    ) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let has_memory = match &source.snapshot {
            Some(snapshot) => {
                let all = self.snapshots(&source.vm).await?;
                let found = all.iter().find(|it| it.name == *snapshot);
                found.ok_or_else(|| Error::not_found(Subject::Snapshot, snapshot))?.kind
                    == SnapshotKind::Memory
            }
            None => self.info(&source.vm).await?.state.is_live(),
        };
        if !has_memory {
            return self.clone_owned(source, name, CloneMode::Linked, lifetime).await;
        }
        let mut forks = self.create_forks(source, std::slice::from_ref(name), identity, lifetime).await?;
        Ok(forks.remove(0))
    }

    /// Creates VMs that continue as copies of a guest that runs, or from a snapshot of one with its
    /// memory, and starts them. Each has an identity of its own before its programs run; see
    /// [`Clones`](crate::abilities::Clones). They have the configuration that
    /// [`clone_vm`](Self::clone_vm) gives.
    ///
    /// All of them are created, or none.
    ///
    /// # Errors
    /// As [`clone_vm`](Self::clone_vm); `InvalidState` for a source that does not run; those of
    /// [`start`](Self::start); `Host` and `Protocol` for a guest that can't be given an identity,
    /// `InvalidInput` for a snapshot that was not taken for that, unless `identity` allows it.
    pub async fn fork(
        &self,
        source: &VmSource,
        names: &[VmName],
        identity: IdentityPolicy,
    ) -> Result<Vec<VmHandle>> {
        let fork = async {
            let created = self.create_forks(source, names, identity, Lifetime::Lasting).await?;
            let started = self.start_all(names).await;
            if started.is_err() {
                self.remove_all(created).await;
            }
            started
        };
        within(operation!("fork", vm = source.vm.as_str()), fork).await
    }

    async fn create_forks(
        &self,
        source: &VmSource,
        names: &[VmName],
        identity: IdentityPolicy,
        lifetime: Lifetime,
    ) -> Result<Vec<(VmHandle, Option<EphemeralGuard>)>> {
        let (locked, vm) = self.take_source(&source.vm).await?;
        self.remove_fork_points(&locked, &vm).await?;
        for name in names {
            self.check_free(name).await?;
        }
        let (from, point) = match &source.snapshot {
            Some(snapshot) => (self.source_then(&locked, vm.clone(), Some(snapshot)).await?, None),
            None => (vm.clone(), Some(self.create_fork_point(&vm, identity).await?)),
        };
        let mut created = Vec::new();
        let forked = async {
            for name in names {
                let request = CloneRequest {
                    snapshot: source.snapshot.as_ref().or(point.as_ref()).cloned(),
                    memory: MemoryMode::ForClones,
                    identity,
                    ..CloneRequest::new(spec_of_clone(&from.spec, name, lifetime)?)
                };
                let fork = self.create_clone(&from, &request).await?;
                let has_memory = fork.0.state == VmState::Saved;
                created.push(fork);
                if !has_memory {
                    let why = "it has no memory to continue from: clone it";
                    return Err(Error::invalid("snapshot", source, why));
                }
            }
            Ok(())
        };
        let forked = forked.await;
        if let Some(point) = &point
            && let Err(error) = self.snapshots_of(&vm)?.remove_snapshot(&vm, point).await
        {
            warn!(vm = %vm.name(), %error, "cannot remove the snapshot of a fork; the next fork will");
        }
        match forked {
            Ok(()) => Ok(created),
            Err(error) => {
                self.remove_all(created).await;
                Err(error)
            }
        }
    }

    /// Takes the snapshot that forks of a running guest continue from.
    async fn create_fork_point(&self, vm: &VmHandle, identity: IdentityPolicy) -> Result<SnapshotName> {
        let state = self.state(vm).await?;
        if !state.is_live() {
            return Err(Error::NotLive { what: LiveResource::Memory, state });
        }
        let id = Uuid::new_v4().simple().to_string();
        let name = SnapshotName::new(format!("{FORK_POINT}{}", &id[..FORK_POINT_DIGITS]))?;
        let memory = match identity {
            IdentityPolicy::Unique => MemoryMode::ForClones,
            IdentityPolicy::MayShare => MemoryMode::Include,
        };
        self.snapshots_of(vm)?.create_snapshot(vm, &name, memory).await?;
        Ok(name)
    }

    /// Removes the snapshots of forks that were interrupted: the lock is held, so none goes on.
    async fn remove_fork_points(&self, locked: &LockedVm, vm: &VmHandle) -> Result<()> {
        let Some(backend) = self.abilities_of(vm).snapshots() else { return Ok(()) };
        let is_point = |name: &str| {
            let id = name.strip_prefix(FORK_POINT);
            id.is_some_and(|id| id.len() == FORK_POINT_DIGITS && id.chars().all(|c| c.is_ascii_hexdigit()))
        };
        for point in backend.snapshots(vm).await?.iter().filter(|it| is_point(it.name.as_str())) {
            // A snapshot of that name with a record is its user's.
            if locked.snapshot(&point.name)?.is_none() {
                backend.remove_snapshot(vm, &point.name).await?;
            }
        }
        Ok(())
    }

    /// Starts VMs side by side, and returns them in the same order.
    async fn start_all(&self, names: &[VmName]) -> Result<Vec<VmHandle>> {
        let mut starting = JoinSet::new();
        let (mut started, mut failed) = (vec![None; names.len()], None);
        let mut left = names.iter().cloned().enumerate();
        loop {
            while starting.len() < STARTS_AT_ONCE
                && failed.is_none()
                && let Some((index, name)) = left.next()
            {
                let manager = self.clone();
                starting.spawn(async move { (index, manager.start(&name).await) });
            }
            match starting.join_next().await {
                None => break,
                Some(Ok((index, Ok(vm)))) => started[index] = Some(vm),
                Some(Ok((_, Err(error)))) => failed = failed.or(Some(error)),
                Some(Err(panic)) => std::panic::resume_unwind(panic.into_panic()),
            }
        }
        match failed {
            Some(error) => Err(error),
            None => Ok(started.into_iter().flatten().collect()),
        }
    }

    async fn remove_all(&self, vms: Vec<(VmHandle, Option<EphemeralGuard>)>) {
        for (vm, _) in vms {
            if let Err(error) = self.remove(vm.name(), true).await {
                warn!(vm = %vm.name(), %error, "cannot remove a fork that could not be created with the others");
            }
        }
    }

    /// Locks the VM that another one is to be a copy of.
    async fn take_source(&self, name: &VmName) -> Result<(LockedVm, VmHandle)> {
        let (locked, record) = self.take(name, Instant::now() + PATIENCE).await?;
        let record = self.finish_restore(&locked, record).await?;
        let vm = self.settle(record.clone(), Operation::Clone).await?;
        if vm != record.handle {
            write_outcome(&locked, &vm);
        }
        self.clones_of(&vm)?;
        Ok((locked, vm))
    }

    /// Returns the source as it was when the snapshot was taken, or as it will start next.
    async fn source_then(
        &self,
        locked: &LockedVm,
        source: VmHandle,
        snapshot: Option<&SnapshotName>,
    ) -> Result<VmHandle> {
        let Some(snapshot) = snapshot else { return Ok(source.with_next_spec()) };
        let backend = self.snapshots_of(&source)?;
        if !backend.snapshots(&source).await?.iter().any(|it| it.name == *snapshot) {
            return Err(Error::not_found(Subject::Snapshot, snapshot));
        }
        // Without a record it was taken without a manager.
        Ok(locked.snapshot(snapshot)?.map_or(source, |record| record.handle))
    }

    async fn create_clone(
        &self,
        source: &VmHandle,
        request: &CloneRequest,
    ) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let backend = self.clones_of(source)?;
        let create = async |spec: &VmSpec| {
            backend.create_clone(source, &CloneRequest { spec: spec.clone(), ..request.clone() }).await
        };
        self.create_by(request.spec.clone(), create).await
    }

    fn clones_of(&self, vm: &VmHandle) -> Result<DynClones<'_>> {
        self.abilities_of(vm)
            .clones()
            .ok_or_else(|| Error::Unsupported { backend: vm.backend.clone(), what: "clones".to_owned() })
    }
}

/// Returns the spec of a copy of a VM with this one.
fn spec_of_clone(source: &VmSpec, name: &VmName, lifetime: Lifetime) -> Result<VmSpec> {
    let spec = source.clone().for_clone(name.clone(), Uuid::new_v4());
    #[cfg(feature = "ssh")]
    let spec = spec.with_new_access()?;
    match lifetime {
        Lifetime::Lasting => Ok(spec),
        #[cfg(all(feature = "ssh", feature = "images"))]
        Lifetime::Ephemeral => ephemeral::marked(spec),
    }
}
