//! Snapshots of VMs: taken of one that does not run, restored and removed. Those of running guests
//! are taken in `snapshot_live.rs`.
//!
//! ```text
//!  the disks become layers ─▶ overlays are the disks ─▶ snapshots/NAME.json        create
//!            the disks have the same content ◀┴▶ … and the snapshot is there
//!  restoring ─▶ overlays over the layers ─▶ saved.json, if it has memory ─▶ no restoring   restore
//! ```

use std::fs;
use std::path::PathBuf;

use tokio::time::Instant;

use super::layers::{self, LayerId, OwnDisk};
use super::layout::QemuLayout;
use super::merge::{self, Merger};
use super::qmp::client::QmpClient;
use super::snapshot_files::{self, SnapshotLock, SnapshotRecord};
use super::{PAUSE_LIMIT, QemuHypervisor, elsewhere, prepare, recovery, saved, snapshot_live, status, stop};
use crate::abilities::{MemoryMode, Snapshot, SnapshotKind, Snapshots};
use crate::backend::supervise::alive;
use crate::backend::supervise::files::remove_file;
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::host::find_program;
use crate::hypervisor::Hypervisor;
use crate::lifecycle::{InvalidTransition, Operation, VmState};
use crate::spec::{Boot, Firmware, SnapshotName};
use crate::steps::step;
use crate::store::refuse_other_user;

impl Snapshots for QemuHypervisor {
    async fn create_snapshot(
        &self,
        vm: &VmHandle,
        name: &SnapshotName,
        memory: MemoryMode,
    ) -> Result<Snapshot> {
        let layout = self.details(vm)?.layout;
        refuse_other_user(&layout.work)?;
        let state = self.allowed(vm, Operation::Snapshot).await?;
        layers::refuse_foreign_disks(&vm.spec, "a snapshot can't have a disk that is not the VM's own")?;
        let disks = layers::own_disks(&vm.spec, &layout);
        let _lock = SnapshotLock::take(&layout, vm.name())?;
        let is_there = fs::symlink_metadata(layout.snapshot_file(name)).is_ok();
        if is_there {
            return Err(Error::already_exists(Subject::Snapshot, name));
        }
        let record = match state.is_live() {
            true => snapshot_live::take(vm, &layout, &disks, name, memory, &state).await?,
            false => self.take_at_rest(vm, &layout, &disks, name).await?,
        };
        let mut shown = record.shown(&layout, &disks);
        if let Some(found) = snapshot_files::tree(&layout, &disks)?.into_iter().find(|it| it.name == *name) {
            shown = found;
        }
        Ok(shown)
    }

    async fn snapshots(&self, vm: &VmHandle) -> Result<Vec<Snapshot>> {
        let layout = self.details(vm)?.layout;
        snapshot_files::tree(&layout, &layers::own_disks(&vm.spec, &layout))
    }

    async fn restore_snapshot(&self, vm: &VmHandle, name: &SnapshotName) -> Result<VmHandle> {
        let layout = self.details(vm)?.layout;
        refuse_other_user(&layout.work)?;
        let record = SnapshotRecord::read(&layout, name)?;
        // After an interrupted restore the VM is failed, and another one is legal.
        self.allowed(vm, Operation::Restore).await?;
        let disks = layers::own_disks(&vm.spec, &layout);
        check_parts(&layout, &disks, &record)?;
        let _lock = SnapshotLock::take(&layout, vm.name())?;
        elsewhere::refuse_linked(vm, &layout)?;
        let limit = Instant::now() + self.0.start_limit;
        stop::mark_asked(&layout);
        let alive = alive::take_and_silence(&layout.place(), limit).await?;
        elsewhere::check_owner(vm, &layout, Operation::Restore)?;
        elsewhere::refuse_twin(vm, &layout)?;
        self.remove_sockets(vm)?;
        layers::settle(&disks)?;
        let to = put(vm, &layout, &disks, &record)?;
        let mut merger = Merger { program: self.qemu_img(), live: None };
        // What the disks were over may have been theirs alone.
        if let Err(error) = merger.collect(&layout, &disks).await {
            tracing::warn!(vm = %vm.name(), %error, "cannot remove layers that nothing needs; the next removal of a snapshot will");
        }
        drop(alive);
        self.paused().remove(&vm.id);
        let mut restored = vm.clone();
        let mut details = self.details(vm)?;
        // The seed on disk may be a later one.
        details.seed_run = u32::MAX;
        details.keep_in(&mut restored);
        Ok(Self::handle(&restored, to, &layout, None))
    }

    async fn remove_snapshot(&self, vm: &VmHandle, name: &SnapshotName) -> Result<()> {
        let layout = self.details(vm)?.layout;
        refuse_other_user(&layout.work)?;
        let state = self.state(vm).await?;
        if matches!(state, VmState::Preparing | VmState::Destroyed) {
            return Err(InvalidTransition { state, operation: Operation::Restore }.into());
        }
        let disks = layers::own_disks(&vm.spec, &layout);
        let _lock = SnapshotLock::take(&layout, vm.name())?;
        let program = self.qemu_img();
        match alive::try_take(&layout.place())? {
            Some(_alive) => {
                layers::settle(&disks)?;
                if program.is_none() && !disks.is_empty() {
                    SnapshotRecord::read(&layout, name)?;
                    return Err(merge::missing());
                }
                snapshot_files::remove(&layout, name)?;
                Merger { program, live: None }.collect(&layout, &disks).await
            }
            None => {
                let limit = Instant::now() + PAUSE_LIMIT;
                let mut qmp = QmpClient::connect(&status::monitor(&layout), limit).await?;
                recovery::recover(&layout, &disks, &mut qmp, limit).await?;
                snapshot_files::remove(&layout, name)?;
                Merger { program, live: Some(&mut qmp) }.collect(&layout, &disks).await
            }
        }
    }
}

impl QemuHypervisor {
    pub(super) fn qemu_img(&self) -> Option<PathBuf> {
        find_program(merge::PROGRAM, &self.0.search_path)
    }

    async fn take_at_rest(
        &self,
        vm: &VmHandle,
        layout: &QemuLayout,
        disks: &[OwnDisk],
        name: &SnapshotName,
    ) -> Result<SnapshotRecord> {
        let busy = || Error::Busy { what: format!("VM `{}`", vm.name()), holder: None };
        let _alive = alive::try_take(&layout.place())?.ok_or_else(busy)?;
        elsewhere::check_owner(vm, layout, Operation::Snapshot)?;
        elsewhere::refuse_linked(vm, layout)?;
        layers::settle(disks)?;
        layers::refuse_depth(disks)?;
        let id = LayerId::new();
        layers::freeze(disks, &id)?;
        let record = SnapshotRecord::new(name.clone(), id.clone(), SnapshotKind::Stopped, None);
        let kept = async {
            snapshot_files::keep_vars(&vm.spec, layout, name)?;
            snapshot_files::keep(layout, disks, &record).await
        };
        match kept.await {
            Ok(()) => Ok(record),
            Err(error) => {
                layers::undo_freeze(disks, &id);
                Err(error)
            }
        }
    }
}

/// Checks that everything of a snapshot is there, before anything is discarded for it.
pub(super) fn check_parts(layout: &QemuLayout, disks: &[OwnDisk], record: &SnapshotRecord) -> Result<()> {
    let instead = "restore it from a backup, or remove the snapshot";
    for disk in disks {
        let layer = disk.layer(&record.layer);
        if !layer.exists() {
            let problem = format!("the disk of the snapshot `{}` is missing: {instead}", record.name);
            return Err(Error::record(layer, problem));
        }
    }
    let memory = layout.snapshot_memory(&record.name);
    record.memory.as_ref().map_or(Ok(()), |guest| guest.check_length(&memory))
}

/// Replaces what the VM is by the snapshot, and returns its state then. Nothing runs.
fn put(vm: &VmHandle, layout: &QemuLayout, disks: &[OwnDisk], record: &SnapshotRecord) -> Result<VmState> {
    let mark = layout.restore_mark();
    layers::put_over(disks, &record.layer, || {
        step("restore: mark the VM")
            .and_then(|()| fs::write(&mark, format!("{}\n", record.name)))
            .map_err(Error::io("write", &mark))?;
        if saved::is_saved(layout) {
            saved::discard(layout)?;
        }
        saved::remove_leftovers(layout)
    })?;
    if let Boot::Firmware(Firmware::Uefi) = vm.spec.boot() {
        snapshot_files::copy(&layout.snapshot_vars(&record.name), &layout.efi_vars())?;
    }
    let to = match record.memory.clone() {
        Some(guest) => {
            if record.parked {
                let parked = layout.parked_mark();
                fs::write(&parked, "").map_err(Error::io("write", &parked))?;
            }
            guest.put(&vm.spec, layout, &layout.snapshot_memory(&record.name))?;
            VmState::Saved
        }
        None => VmState::Stopped,
    };
    prepare::sync_dir(&layout.work)?;
    remove_file(&mark)?;
    Ok(to)
}
