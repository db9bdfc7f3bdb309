//! Exports of VMs: the files in a VM's directory that another host needs.
//!
//! Left out is what only one run has: logs, sockets, locks, the record of the process; and the
//! owner's mark, which the import writes.

use std::fs;
use std::path::{Path, PathBuf};

use super::layers::{self, OwnDisk};
use super::layout::QemuLayout;
use super::saved::SavedGuest;
use super::snapshot_files::{self, SnapshotRecord};
use super::{QemuHypervisor, elsewhere, import, renewal, save, snapshot};
use crate::abilities::{Export, ExportedFile, ExportedVm, FileContent, ImportedVm, MemoryMode};
use crate::backend::supervise::alive;
use crate::error::{Error, PartProblem, Result};
use crate::handle::VmHandle;
use crate::lifecycle::{Operation, VmState};
use crate::spec::{Boot, Firmware, VmSpec};
use crate::store::{denied, refuse_other_user};

impl Export for QemuHypervisor {
    async fn export(&self, vm: &VmHandle, memory: MemoryMode) -> Result<ExportedVm> {
        let layout = self.details(vm)?.layout;
        refuse_other_user(&layout.work)?;
        let state = self.allowed(vm, Operation::Export).await?;
        layers::refuse_foreign_disks(&vm.spec, "an export can't have a disk that is not the VM's own")?;
        if state == VmState::Saved && memory != MemoryMode::DisksOnly && renewal::is_due(&layout) {
            let why = "its guest still has the identity of the one that it is a copy of: start it first";
            return Err(Error::invalid("vm", vm.name(), why));
        }
        if state == VmState::Saved {
            // Of a save that was interrupted after its record, the process may be there.
            save::end(&layout).await?;
        }
        let busy = || Error::Busy { what: format!("VM `{}`", vm.name()), holder: None };
        let alive = alive::try_take(&layout.place())?.ok_or_else(busy)?;
        elsewhere::check_owner(vm, &layout, Operation::Export)?;
        elsewhere::refuse_linked(vm, &layout)?;
        let disks = layers::own_disks(&vm.spec, &layout);
        layers::settle(&disks)?;
        let mut needs = Vec::new();
        let state = match (state, memory) {
            (VmState::Saved, MemoryMode::DisksOnly) => VmState::Stopped,
            (state, _) => state,
        };
        let mut files = files_of(&vm.spec, &layout, &disks)?;
        if state == VmState::Saved {
            let guest = SavedGuest::read(&layout)?.ok_or_else(busy)?;
            guest.check_disks(&vm.spec, &layout)?;
            guest.check_whole(&layout.memory_file()).await?;
            needs.push(guest.needs());
            files.push(file("memory", layout.memory_file()));
            files.push(file("saved.json", layout.saved_file()));
        }
        for record in snapshot_files::records(&layout)? {
            if let Some(guest) = record.memory.as_ref().filter(|_| memory != MemoryMode::DisksOnly) {
                guest.check_whole(&layout.snapshot_memory(&record.name)).await?;
                needs.push(guest.needs());
            }
            files.extend(files_of_snapshot(&vm.spec, &layout, &disks, record, memory)?);
        }
        needs.sort();
        needs.dedup();
        let mut exported = ExportedVm::new(vm.clone().in_state(state)).held_by(alive);
        (exported.files, exported.needs) = (files, needs);
        Ok(exported)
    }

    async fn prepare_import(&self, vm: &VmHandle, names: &[String]) -> Result<PathBuf> {
        let layout = self.layout(&vm.spec, vm.id)?;
        import::prepare(vm, &layout, names)?;
        Ok(layout.work)
    }

    async fn finish_import(&self, vm: &VmHandle) -> Result<ImportedVm> {
        let details = self.details(vm)?;
        let layout = details.layout.clone();
        let imported = import::finish(vm, details).await?;
        let mut finished = ImportedVm::new(Self::handle(&imported, imported.state.clone(), &layout, None));
        if let Some(guest) = SavedGuest::read(&layout)? {
            let checked = match self.facts(&vm.spec).await {
                Ok(facts) => guest.check(&vm.spec, &layout, &facts),
                Err(error) => Err(error),
            };
            finished.problems.extend(checked.err());
        }
        Ok(finished)
    }
}

fn file(name: impl Into<String>, path: PathBuf) -> ExportedFile {
    ExportedFile { name: name.into(), content: FileContent::Path(path) }
}

/// Returns the files of a VM's disks, with their layers, and what `prepare` created beside them.
fn files_of(spec: &VmSpec, layout: &QemuLayout, disks: &[OwnDisk]) -> Result<Vec<ExportedFile>> {
    let mut paths = Vec::new();
    for disk in disks {
        let mut layers: Vec<PathBuf> = disk.layers()?.iter().map(|id| disk.layer(id)).collect();
        layers.sort();
        paths.push(disk.path.clone());
        paths.append(&mut layers);
    }
    if matches!(spec.boot(), Boot::Firmware(Firmware::Uefi)) {
        paths.push(layout.efi_vars());
    }
    if layout.seed().exists() {
        paths.push(layout.seed());
    }
    paths.iter().map(|path| Ok(file(name_of(path)?, path.clone()))).collect()
}

fn name_of(path: &Path) -> Result<String> {
    let is_there = fs::metadata(path).map_err(denied("examine", path))?.is_file();
    match path.file_name().and_then(|name| name.to_str()).filter(|_| is_there) {
        Some(name) => Ok(name.to_owned()),
        None => Err(Error::VmPart { path: path.to_owned(), problem: PartProblem::NotAFile }),
    }
}

/// Returns the files of a snapshot beside its layers.
fn files_of_snapshot(
    spec: &VmSpec,
    layout: &QemuLayout,
    disks: &[OwnDisk],
    record: SnapshotRecord,
    memory: MemoryMode,
) -> Result<Vec<ExportedFile>> {
    snapshot::check_parts(layout, disks, &record)?;
    let name = record.name.clone();
    let path = |end: &str| format!("snapshots/{name}.{end}");
    let mut files = Vec::new();
    match (&record.memory, memory) {
        (Some(_), MemoryMode::DisksOnly) => {
            let bytes = record.without_memory().encode();
            files.push(ExportedFile { name: path("json"), content: FileContent::Bytes(bytes) });
        }
        (kept, _) => {
            files.push(file(path("json"), layout.snapshot_file(&name)));
            files.extend(kept.iter().map(|_| file(path("memory"), layout.snapshot_memory(&name))));
        }
    }
    if matches!(spec.boot(), Boot::Firmware(Firmware::Uefi)) {
        files.push(file(path("efivars"), layout.snapshot_vars(&name)));
    }
    Ok(files)
}
