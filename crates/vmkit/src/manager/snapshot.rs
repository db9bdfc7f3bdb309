//! Snapshots of VMs.
//!
//! The backend keeps a VM's disks and memory. The record keeps what the VM was configured to be,
//! and a restore returns that, too: a guest continues on the hardware that it was saved on.

use std::num::NonZeroUsize;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::warn;

use super::{PATIENCE, VmManager, intent, write_outcome};
use crate::abilities::{DynSnapshots, MemoryMode, Snapshot};
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::{Operation, VmState};
use crate::span::{operation, within};
use crate::spec::{SnapshotName, VmName};
use crate::store::{Intent, LockedVm, VmRecord};

/// The start of the names of snapshots that are taken on a schedule.
const AUTOMATIC: &str = "auto-";

/// When a snapshot is due that is taken on a schedule, and how many are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SnapshotSchedule {
    /// Not before the newest one of the schedule has this age.
    pub if_older_than: Option<Duration>,
    /// The number that is kept; older ones of the schedule are removed.
    pub keep: Option<NonZeroUsize>,
}

/// What a schedule has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AutomaticSnapshots {
    /// The snapshot that was taken, if one was due.
    pub created: Option<Snapshot>,
    /// Those that were removed.
    pub removed: Vec<SnapshotName>,
}

impl<H: Backend + 'static> VmManager<H> {
    /// Takes a snapshot of a VM: of its disks, and of its memory if it lives and `memory` says so.
    ///
    /// # Errors
    /// `NotFound` without the VM; `AlreadyExists`; `Busy`; `Unsupported` by a backend without
    /// [`Snapshots`](crate::abilities::Snapshots); those of
    /// [`Snapshots::create_snapshot`](crate::abilities::Snapshots::create_snapshot).
    pub async fn create_snapshot(
        &self,
        vm: &VmName,
        snapshot: &SnapshotName,
        memory: MemoryMode,
    ) -> Result<Snapshot> {
        let create = async {
            let (locked, vm) = self.take_for_snapshot(vm).await?;
            self.take_snapshot(&locked, &vm, snapshot, memory).await
        };
        within(operation!("create_snapshot", vm = vm), create).await
    }

    /// Takes a snapshot on a schedule, named `auto-1`, `auto-2` and so on, if one is due, and
    /// removes the oldest of these beyond the number that is kept. Other snapshots are not touched.
    ///
    /// # Errors
    /// Those of [`create_snapshot`](Self::create_snapshot) and
    /// [`remove_snapshot`](Self::remove_snapshot).
    pub async fn create_automatic_snapshot(
        &self,
        vm: &VmName,
        memory: MemoryMode,
        schedule: SnapshotSchedule,
    ) -> Result<AutomaticSnapshots> {
        let create = async {
            let (locked, vm) = self.take_for_snapshot(vm).await?;
            let backend = self.snapshots_of(&vm)?;
            let number = |name: &SnapshotName| name.as_str().strip_prefix(AUTOMATIC)?.parse::<u64>().ok();
            let all = backend.snapshots(&vm).await?;
            let mut automatic: Vec<_> =
                all.into_iter().filter_map(|it| Some((number(&it.name)?, it))).collect();
            automatic.sort_by_key(|(number, _)| *number);
            let newest = automatic.last().map(|(number, newest)| (*number, newest.created));
            let is_due = |limit: Duration| {
                // A clock that was set back makes it due.
                newest.is_none_or(|(_, at)| {
                    SystemTime::now().duration_since(at).map_or(true, |age| age >= limit)
                })
            };
            if !schedule.if_older_than.is_none_or(is_due) {
                return Ok(AutomaticSnapshots { created: None, removed: Vec::new() });
            }
            let next = newest.map_or(1, |(number, _)| number.saturating_add(1));
            let name = SnapshotName::new(format!("{AUTOMATIC}{next}"))?;
            let created = self.take_snapshot(&locked, &vm, &name, memory).await?;
            let keep = schedule.keep.map_or(usize::MAX, NonZeroUsize::get);
            let mut removed = Vec::new();
            for (_, old) in automatic.iter().take((automatic.len() + 1).saturating_sub(keep)) {
                backend.remove_snapshot(&vm, &old.name).await?;
                locked.remove_snapshot(&old.name)?;
                removed.push(old.name.clone());
            }
            Ok(AutomaticSnapshots { created: Some(created), removed })
        };
        within(operation!("create_snapshot", vm = vm), create).await
    }

    /// Returns the snapshots of a VM, the oldest first.
    ///
    /// # Errors
    /// `NotFound` without the VM; `Unsupported`; those of
    /// [`Snapshots::snapshots`](crate::abilities::Snapshots::snapshots).
    pub async fn snapshots(&self, vm: &VmName) -> Result<Vec<Snapshot>> {
        let vm = self.store.read(vm)?.handle;
        self.snapshots_of(&vm)?.snapshots(&vm).await
    }

    /// Returns a VM to a snapshot: its guest is ended by force, and what its disks and its memory
    /// have become since is discarded. It is `Saved` then, or `Stopped` without memory; its
    /// configuration, but for its labels, is that of the snapshot.
    ///
    /// Interrupted, it is completed by the next operation on the VM.
    ///
    /// # Errors
    /// `NotFound` without the VM or the snapshot; `Busy`; `Unsupported`; those of
    /// [`Snapshots::restore_snapshot`](crate::abilities::Snapshots::restore_snapshot).
    pub async fn restore_snapshot(&self, vm: &VmName, snapshot: &SnapshotName) -> Result<VmHandle> {
        let restore = async {
            let (locked, record) = self.take(vm, Instant::now() + PATIENCE).await?;
            let now = self.settle(record, Operation::Restore).await?;
            let before = self.state(&now).await?;
            let backend = self.snapshots_of(&now)?;
            if !backend.snapshots(&now).await?.iter().any(|it| it.name == *snapshot) {
                return Err(Error::not_found(Subject::Snapshot, snapshot));
            }
            let then = match locked.snapshot(snapshot)? {
                Some(record) => record.handle,
                // It was taken without a manager.
                None => now.clone(),
            };
            let then = VmHandle {
                spec: then.spec.with_labels(now.spec.labels().clone()),
                next_spec: None,
                run: None,
                console_log: now.console_log.clone(),
                console_since: now.console_since,
                hypervisor_log: now.hypervisor_log.clone(),
                state: now.state.clone(),
                ..then
            };
            let intent = Intent { snapshot: Some(snapshot.clone()), ..intent(Operation::Restore) };
            locked.write_since(&VmRecord::intending(then.clone(), intent))?;
            match self.restore_by_backend(&locked, &then, snapshot).await {
                Err(error) => {
                    match self.state(&now).await {
                        // Half restored, it is failed as it was not before: the intent stays, to
                        // complete it.
                        Ok(state) if state == before || !matches!(state, VmState::Failed { .. }) => {
                            write_outcome(&locked, &now.in_state(state));
                        }
                        Ok(_) => {}
                        Err(unknown) => {
                            warn!(%vm, error = %unknown, "unknown state after the failed restore");
                        }
                    }
                    Err(error)
                }
                Ok(restored) => Ok(restored),
            }
        };
        within(operation!("restore_snapshot", vm = vm), restore).await
    }

    /// Removes a snapshot of a VM; the VM and its other snapshots stay what they are.
    ///
    /// # Errors
    /// `NotFound` without the VM or the snapshot; `Busy`; `Unsupported`; those of
    /// [`Snapshots::remove_snapshot`](crate::abilities::Snapshots::remove_snapshot).
    pub async fn remove_snapshot(&self, vm: &VmName, snapshot: &SnapshotName) -> Result<()> {
        let remove = async {
            let (locked, vm) = self.take_for_snapshot(vm).await?;
            self.snapshots_of(&vm)?.remove_snapshot(&vm, snapshot).await?;
            locked.remove_snapshot(snapshot)
        };
        within(operation!("remove_snapshot", vm = vm), remove).await
    }

    /// Completes a restore that was interrupted: its disks may be the snapshot's in part.
    ///
    /// # Errors
    /// Those of [`restore_snapshot`](Self::restore_snapshot).
    pub(super) async fn finish_restore(&self, locked: &LockedVm, record: VmRecord) -> Result<VmRecord> {
        let Some(Intent { operation: Operation::Restore, snapshot: Some(snapshot), .. }) = &record.intent
        else {
            return Ok(record);
        };
        let vm = self.restore_by_backend(locked, &record.handle, snapshot).await?;
        Ok(VmRecord::settled(vm))
    }

    async fn take_for_snapshot(&self, name: &VmName) -> Result<(LockedVm, VmHandle)> {
        let (locked, record) = self.take(name, Instant::now() + PATIENCE).await?;
        let record = self.finish_restore(&locked, record).await?;
        let vm = self.settle(record.clone(), Operation::Snapshot).await?;
        if vm != record.handle {
            write_outcome(&locked, &vm);
        }
        Ok((locked, vm))
    }

    async fn take_snapshot(
        &self,
        locked: &LockedVm,
        vm: &VmHandle,
        snapshot: &SnapshotName,
        memory: MemoryMode,
    ) -> Result<Snapshot> {
        let backend = self.snapshots_of(vm)?;
        if backend.snapshots(vm).await?.iter().any(|it| it.name == *snapshot) {
            return Err(Error::already_exists(Subject::Snapshot, snapshot));
        }
        locked.write_snapshot(snapshot, &VmRecord::settled(VmHandle { run: None, ..vm.clone() }))?;
        let created = backend.create_snapshot(vm, snapshot, memory).await;
        if created.is_err()
            && let Err(error) = locked.remove_snapshot(snapshot)
        {
            warn!(vm = %vm.name(), %error, "cannot remove the record of a snapshot that was not taken");
        }
        created
    }

    async fn restore_by_backend(
        &self,
        locked: &LockedVm,
        vm: &VmHandle,
        snapshot: &SnapshotName,
    ) -> Result<VmHandle> {
        let restored = self.snapshots_of(vm)?.restore_snapshot(vm, snapshot).await?;
        if let Err(error) = locked.write_wanted(&VmRecord::settled(restored.clone())) {
            // The intent stays: the next operation restores it again before anything has changed.
            warn!(vm = %vm.name(), %error, "the VM is restored, but that can't be recorded");
        }
        Ok(restored)
    }

    pub(super) fn snapshots_of(&self, vm: &VmHandle) -> Result<DynSnapshots<'_>> {
        self.abilities_of(vm)
            .snapshots()
            .ok_or_else(|| Error::Unsupported { backend: vm.backend.clone(), what: "snapshots".to_owned() })
    }
}
