//! Snapshots of VMs that have neither disks nor memory: their tree.

use std::time::SystemTime;

use super::NoopHypervisor;
use crate::abilities::{MemoryMode, Snapshot, SnapshotKind, Snapshots};
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::lifecycle::{Operation, VmState, next};
use crate::spec::SnapshotName;

impl Snapshots for NoopHypervisor {
    async fn create_snapshot(
        &self,
        vm: &VmHandle,
        name: &SnapshotName,
        memory: MemoryMode,
    ) -> Result<Snapshot> {
        let mut books = self.books();
        books.take_failure(Operation::Snapshot)?;
        let state = books.find(vm)?.state.clone();
        let kind = match (next(&state, Operation::Snapshot)?.is_live(), memory) {
            (false, _) => SnapshotKind::Stopped,
            (true, MemoryMode::Include | MemoryMode::ForClones) => SnapshotKind::Memory,
            (true, MemoryMode::DisksOnly) => SnapshotKind::CrashConsistent,
        };
        let snapshots = books.snapshots.entry(vm.id).or_default();
        if snapshots.iter().any(|there| there.name == *name) {
            return Err(Error::already_exists(Subject::Snapshot, name));
        }
        let mut taken = Snapshot::new(name.clone(), kind, SystemTime::now());
        taken.parent = snapshots.iter().find(|there| there.is_current).map(|there| there.name.clone());
        taken.is_current = true;
        snapshots.iter_mut().for_each(|there| there.is_current = false);
        snapshots.push(taken.clone());
        Ok(taken)
    }

    async fn snapshots(&self, vm: &VmHandle) -> Result<Vec<Snapshot>> {
        Ok(self.books().snapshots.get(&vm.id).cloned().unwrap_or_default())
    }

    async fn restore_snapshot(&self, vm: &VmHandle, name: &SnapshotName) -> Result<VmHandle> {
        let mut books = self.books();
        books.take_failure(Operation::Restore)?;
        let stopped = next(&books.find(vm)?.state, Operation::Restore)?;
        let snapshots = books.snapshots.entry(vm.id).or_default();
        let there = snapshots.iter().find(|there| there.name == *name);
        let kind = there.ok_or_else(|| Error::not_found(Subject::Snapshot, name))?.kind;
        snapshots.iter_mut().for_each(|there| there.is_current = there.name == *name);
        let found = books.find(vm)?;
        found.end(if kind == SnapshotKind::Memory { VmState::Saved } else { stopped });
        Ok(self.handle(vm, found))
    }

    async fn remove_snapshot(&self, vm: &VmHandle, name: &SnapshotName) -> Result<()> {
        let mut books = self.books();
        books.find(vm)?;
        let snapshots = books.snapshots.entry(vm.id).or_default();
        let at = snapshots.iter().position(|there| there.name == *name);
        let removed = snapshots.remove(at.ok_or_else(|| Error::not_found(Subject::Snapshot, name))?);
        for there in snapshots.iter_mut() {
            if there.parent.as_ref() == Some(name) {
                there.parent.clone_from(&removed.parent);
            }
            there.is_current |= removed.is_current && Some(&there.name) == removed.parent.as_ref();
        }
        Ok(())
    }
}
