//! Exports of VMs that have no files: their snapshots travel in the handle.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{NoopHypervisor, NoopVm};
use crate::abilities::{Export, ExportedVm, ImportedVm, MemoryMode, Snapshot, SnapshotKind};
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::lifecycle::{Operation, VmState, next};
use crate::spec::SnapshotName;

/// What an exported handle has of its backend.
#[derive(Default, Serialize, Deserialize)]
struct ExportedSnapshots {
    snapshots: Vec<ExportedSnapshot>,
}

#[derive(Serialize, Deserialize)]
struct ExportedSnapshot {
    name: SnapshotName,
    parent: Option<SnapshotName>,
    is_current: bool,
    kind: SnapshotKind,
    created_ms: u64,
}

impl ExportedSnapshot {
    fn of(taken: &Snapshot, memory: MemoryMode) -> Self {
        let since = taken.created.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self {
            name: taken.name.clone(),
            parent: taken.parent.clone(),
            is_current: taken.is_current,
            kind: match (taken.kind, memory) {
                (SnapshotKind::Memory, MemoryMode::DisksOnly) => SnapshotKind::CrashConsistent,
                (kind, _) => kind,
            },
            created_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        }
    }

    fn imported(self) -> Snapshot {
        let created = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(self.created_ms));
        let created = created.unwrap_or(SystemTime::UNIX_EPOCH);
        let mut taken = Snapshot::new(self.name, self.kind, created);
        (taken.parent, taken.is_current) = (self.parent, self.is_current);
        taken
    }
}

impl Export for NoopHypervisor {
    async fn export(&self, vm: &VmHandle, memory: MemoryMode) -> Result<ExportedVm> {
        let mut books = self.books();
        books.take_failure(Operation::Export)?;
        let state = match (next(&books.find(vm)?.state, Operation::Export)?, memory) {
            (VmState::Saved, MemoryMode::DisksOnly) => VmState::Stopped,
            (state, _) => state,
        };
        let taken = books.snapshots.get(&vm.id).into_iter().flatten();
        let snapshots = taken.map(|taken| ExportedSnapshot::of(taken, memory)).collect();
        let mut exported = vm.clone().in_state(state);
        exported.details.data =
            serde_json::to_value(ExportedSnapshots { snapshots }).expect("these are plain data");
        Ok(ExportedVm::new(exported))
    }

    async fn prepare_import(&self, vm: &VmHandle, names: &[String]) -> Result<PathBuf> {
        if let Some(name) = names.first() {
            return Err(Error::invalid("file", name, "a VM of this backend has no files"));
        }
        let mut books = self.books();
        books.take_failure(Operation::Prepare)?;
        if books.vms.iter().any(|(other, there)| there.name == *vm.name() || *other == vm.id) {
            return Err(Error::already_exists(Subject::Vm, vm.name()));
        }
        Ok(PathBuf::new())
    }

    async fn finish_import(&self, vm: &VmHandle) -> Result<ImportedVm> {
        let damaged = |error| {
            Error::invalid("file", vm.name(), "the snapshots of this VM can't be read").with_source(error)
        };
        let found = match vm.details.data.is_null() {
            true => ExportedSnapshots::default(),
            false => ExportedSnapshots::deserialize(&vm.details.data).map_err(damaged)?,
        };
        let mut books = self.books();
        let state = next(&vm.state, Operation::Export)?;
        let imported = NoopVm { name: vm.name().clone(), state, console: None };
        let mut handle = self.handle(vm, &imported);
        handle.details.data = serde_json::Value::Null;
        books.vms.insert(vm.id, imported);
        let snapshots = found.snapshots.into_iter().map(ExportedSnapshot::imported).collect();
        books.snapshots.insert(vm.id, snapshots);
        Ok(ImportedVm::new(handle))
    }
}
