//! Imports of VMs: files from elsewhere become a VM's own.
//!
//! Nothing in them is trusted. A name is one that a VM of this spec has; a disk is over a layer
//! beside it or over the base image, whose name is written again, and over nothing else.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::layers::{self, OwnDisk};
use super::layout::QemuLayout;
use super::saved::SavedGuest;
use super::{QemuDetails, disks, parts, snapshot, snapshot_files, stop};
use crate::abilities::SnapshotKind;
use crate::backend::supervise::alive;
use crate::backend::supervise::files::make_private_dir;
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::image::{backing_of_foreign, inspect, set_backing};
use crate::lifecycle::VmState;
use crate::spec::{Boot, Firmware, RootDisk, SnapshotName, VmSpec};
use crate::steps::step;

/// The parts of a snapshot beside its layers, by the ends of their names.
const SNAPSHOT_PARTS: [&str; 3] = ["json", "memory", "efivars"];

/// Checks the names of a VM's files, and claims its directory.
///
/// # Errors
/// `InvalidInput` on `file`; `AlreadyExists`; `Busy`; `Io`.
pub(super) fn prepare(vm: &VmHandle, layout: &QemuLayout, names: &[String]) -> Result<()> {
    check_names(&vm.spec, layout, names)?;
    make_private_dir(&layout.work)?;
    let busy = || Error::Busy { what: format!("the directory of VM `{}`", vm.name()), holder: None };
    let _alive = alive::try_take(&layout.place())?.ok_or_else(busy)?;
    if parts::owner(layout)?.is_some() {
        return Err(Error::already_exists(Subject::Vm, vm.name()));
    }
    let mark = layout.owner_mark();
    let claim = || {
        step("import: claim")?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&mark)?;
        writeln!(file, "{}", vm.id)?;
        file.sync_all()
    };
    claim().map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Error::already_exists(Subject::Vm, vm.name()),
        _ => Error::io("create", &mark)(error),
    })
}

fn check_names(spec: &VmSpec, layout: &QemuLayout, names: &[String]) -> Result<()> {
    let refused = |name: &str, why: &str| Err(Error::invalid("file", name, why));
    let own = layers::own_disks(spec, layout);
    let has_vars = matches!(spec.boot(), Boot::Firmware(Firmware::Uefi));
    let file_name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut required: BTreeSet<String> = own.iter().map(|disk| file_name(&disk.path)).collect();
    required.extend(has_vars.then(|| file_name(&layout.efi_vars())));
    let there: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    if let Some(missing) = required.iter().find(|name| !there.contains(name.as_str())) {
        return refused(missing, "it is missing, and the VM has it");
    }
    for name in names {
        let is_needed_by = match name.as_str() {
            "memory" => Some("saved.json".to_owned()),
            "saved.json" => Some("memory".to_owned()),
            "seed.iso" if spec.cloud_init().is_some() => None,
            name if required.contains(name) => None,
            name if own.iter().any(|disk| disk.id_of(name.as_ref()).is_some()) => None,
            name => match snapshot_part(name) {
                Some((_, "efivars")) if !has_vars => return refused(name, "the VM has no such file"),
                Some((snapshot, _)) => Some(format!("snapshots/{snapshot}.json")),
                None => return refused(name, "the VM has no such file"),
            },
        };
        if let Some(needed) = is_needed_by.filter(|needed| !there.contains(needed.as_str())) {
            return refused(&needed, "it is missing, and another file is nothing without it");
        }
    }
    Ok(())
}

/// Returns the snapshot that a file belongs to, and which part of it the file is.
fn snapshot_part(name: &str) -> Option<(SnapshotName, &str)> {
    let (snapshot, part) = name.strip_prefix("snapshots/")?.rsplit_once('.')?;
    SNAPSHOT_PARTS.contains(&part).then_some(())?;
    Some((SnapshotName::new(snapshot).ok()?, part))
}

/// Creates a VM of the files in its directory, and returns its handle.
///
/// # Errors
/// `InvalidInput` on `file`, with the file's name; `Busy`; `Io`.
pub(super) async fn finish(vm: &VmHandle, mut details: QemuDetails) -> Result<VmHandle> {
    let layout = details.layout.clone();
    let busy = || Error::Busy { what: format!("VM `{}`", vm.name()), holder: None };
    let _alive = alive::try_take(&layout.place())?.ok_or_else(busy)?;
    if parts::owner(&layout)? != Some(vm.id) {
        return Err(Error::record(layout.owner_mark(), "the directory is another VM's"));
    }
    let named = |error| of_file(error, &layout);
    let own = layers::own_disks(&vm.spec, &layout);
    adopt_disks(&vm.spec, &own).map_err(named)?;
    for record in snapshot_files::records(&layout).map_err(named)? {
        snapshot::check_parts(&layout, &own, &record).map_err(named)?;
        if record.memory.is_some() != (record.kind == SnapshotKind::Memory) {
            let problem = format!("a snapshot of the kind {} does not fit to its memory", record.kind);
            return Err(named(Error::record(layout.snapshot_file(&record.name), problem)));
        }
        if let Some(guest) = &record.memory {
            guest.check_whole(&layout.snapshot_memory(&record.name)).await.map_err(named)?;
        }
    }
    let guest = SavedGuest::read(&layout).map_err(named)?;
    if guest.is_some() != (vm.state == VmState::Saved) {
        let problem = format!("its VM is announced as {}, and does not fit to that", vm.state);
        return Err(named(Error::record(layout.saved_file(), problem)));
    }
    if let Some(guest) = guest {
        guest.check_whole(&layout.memory_file()).await.map_err(named)?;
        guest.keep_own_disks(&vm.spec, &layout)?;
    }
    if vm.state == VmState::Stopped {
        stop::mark_asked(&layout);
    }
    details.base = disks::identity_of_base(&vm.spec).await?;
    let mut imported = vm.clone();
    details.keep_in(&mut imported);
    Ok(imported)
}

/// Checks what each disk, and each layer, is over, and writes the name of the base image again.
fn adopt_disks(spec: &VmSpec, own: &[OwnDisk]) -> Result<()> {
    let image = spec.disk().and_then(RootDisk::base).map(inspect).transpose()?;
    for disk in own {
        let layers = disk.layers()?;
        let files = layers.iter().map(|id| disk.layer(id)).chain([disk.path.clone()]);
        for file in files {
            let Some(below) = backing_of_foreign(&file)? else { continue };
            let format = match disk.id_of(below.name.as_os_str()) {
                Some(id) if layers.contains(&id) => "qcow2",
                Some(_) => return Err(Error::record(&file, "the layer below this disk is missing")),
                None => match image.as_ref().filter(|_| disk.device == "root") {
                    Some(image) => {
                        set_backing(&file, &image.path)?;
                        image.format.as_str()
                    }
                    None => {
                        let problem = format!("it is over {:?}, which is not part of the VM", below.name);
                        return Err(Error::record(&file, problem));
                    }
                },
            };
            if below.format != format {
                let problem =
                    format!("it names the format {:?} of what it is over (expected {format})", below.format);
                return Err(Error::record(&file, problem));
            }
        }
        disk.chain()?;
    }
    Ok(())
}

/// Returns an error in the content of a received file as one about the file.
fn of_file(error: Error, layout: &QemuLayout) -> Error {
    match error {
        Error::Record { path, problem, source } => {
            let name = path.strip_prefix(&layout.work).unwrap_or(&path).display().to_string();
            let error = Error::invalid("file", name, problem);
            match source {
                Some(source) => error.with_source(source),
                None => error,
            }
        }
        Error::NotContinued { source } => of_file(*source, layout),
        error => error,
    }
}
