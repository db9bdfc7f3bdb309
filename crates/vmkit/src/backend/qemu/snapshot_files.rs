//! What lies on disk of a VM's snapshots: a record for each, its memory, and layers of the disks.
//!
//! The record is written last and removed first: a snapshot is there exactly as long as it. Layers
//! without a record are what an interrupted operation left, or a removal that could not merge them;
//! the disks are right with them, and the next removal of a snapshot tries again.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::layers::{self, LayerId, OwnDisk};
use super::layout::QemuLayout;
use super::saved::SavedGuest;
use crate::abilities::{Snapshot, SnapshotKind};
use crate::backend::supervise::files::{is_gone, make_private_dir, remove_dir, remove_file};
use crate::backend::supervise::unfinished;
use crate::blocking::blocking;
use crate::error::{Error, Result, Subject};
use crate::flock::{FileLock, LockMode};
use crate::input_file::open_regular;
use crate::spec::{Boot, Firmware, SnapshotName, VmName, VmSpec};
use crate::steps::step;
use crate::store::denied;

/// The version of the record's format.
const VERSION: u32 = 1;
/// A limit above the record's size, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// The record of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SnapshotRecord {
    version: u32,
    pub(super) name: SnapshotName,
    pub(super) layer: LayerId,
    /// When it was taken, in milliseconds since 1970.
    pub(super) created_ms: u64,
    pub(super) kind: SnapshotKind,
    /// What fits to its memory, if it has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) memory: Option<SavedGuest>,
    /// Whether the guest's programs stood still.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) parked: bool,
}

impl SnapshotRecord {
    /// Creates the record of a snapshot that is taken now.
    pub(super) fn new(
        name: SnapshotName,
        layer: LayerId,
        kind: SnapshotKind,
        memory: Option<SavedGuest>,
    ) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let created_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        Self { version: VERSION, name, layer, created_ms, kind, memory, parked: false }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// `NotFound`; `Record` for one that is damaged, or of a newer version; `Io`.
    pub(super) fn read(layout: &QemuLayout, name: &SnapshotName) -> Result<Self> {
        let path = layout.snapshot_file(name);
        let file = match open_regular(&path) {
            Err(error) if is_gone(&error) => return Err(Error::not_found(Subject::Snapshot, name)),
            file => file.map_err(denied("read", &path))?,
        };
        let mut text = Vec::new();
        file.take(MOST_BYTES).read_to_end(&mut text).map_err(Error::io("read", &path))?;
        let damaged = |error| {
            Error::record(&path, "the record of a snapshot can't be read: restore it from a backup")
                .with_source(error)
        };
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(damaged)?;
        if let Some(version) = value["version"].as_u64().filter(|found| *found > u64::from(VERSION)) {
            let problem =
                format!("the snapshot is of a newer vmkit (format {version}; this one knows {VERSION})");
            return Err(Error::record(&path, problem));
        }
        let record: Self = serde_json::from_value(value).map_err(damaged)?;
        match record.name == *name {
            true => Ok(record),
            false => Err(Error::record(&path, format!("this is the record of `{}`", record.name))),
        }
    }

    /// Returns the same as one of the disks alone: its guest boots as after a power cut.
    pub(super) fn without_memory(self) -> Self {
        Self { kind: SnapshotKind::CrashConsistent, memory: None, ..self }
    }

    /// Returns its bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("it has only text, numbers and lists")
    }

    /// Writes the record: from now on the snapshot is there, also after a power cut.
    ///
    /// # Errors
    /// `Io`; then it is not.
    pub(super) fn write(&self, layout: &QemuLayout) -> Result<()> {
        let path = layout.snapshot_file(&self.name);
        let written = replace(&path, &self.encode());
        if written.is_err() {
            // Renamed, but not certainly so after a power cut.
            let _ = fs::remove_file(&path);
        }
        written.map_err(Error::io("write", &path))
    }

    /// Returns the snapshot as the library shows it.
    pub(super) fn shown(&self, layout: &QemuLayout, disks: &[OwnDisk]) -> Snapshot {
        let created = SystemTime::UNIX_EPOCH + Duration::from_millis(self.created_ms);
        let mut shown = Snapshot::new(self.name.clone(), self.kind, created);
        let own = [layout.snapshot_memory(&self.name), layout.snapshot_vars(&self.name)];
        let layers = disks.iter().map(|disk| disk.layer(&self.layer));
        shown.bytes = own.into_iter().chain(layers).map(|path| layers::space(&path)).sum();
        shown
    }
}

/// Reads all records of a VM, the oldest first.
///
/// # Errors
/// As [`SnapshotRecord::read`].
pub(super) fn records(layout: &QemuLayout) -> Result<Vec<SnapshotRecord>> {
    let mut records = Vec::new();
    for file in layers::names(&layout.snapshots_dir())? {
        let name = file.to_str().and_then(|file| file.strip_suffix(".json"));
        if let Some(name) = name.and_then(|name| SnapshotName::new(name).ok()) {
            records.push(SnapshotRecord::read(layout, &name)?);
        }
    }
    records.sort_by(|one, other| (one.created_ms, &one.name).cmp(&(other.created_ms, &other.name)));
    Ok(records)
}

/// Returns the snapshots of a VM, each with the one below it; the chains of the first disk say
/// what that is.
///
/// # Errors
/// As [`records`].
pub(super) fn tree(layout: &QemuLayout, disks: &[OwnDisk]) -> Result<Vec<Snapshot>> {
    let records = records(layout)?;
    let nearest = |from: Option<&LayerId>| -> Result<Option<SnapshotName>> {
        let Some(disk) = disks.first() else { return Ok(None) };
        let mut at = disk.below(from)?;
        while let Some(id) = at {
            if let Some(record) = records.iter().find(|record| record.layer == id) {
                return Ok(Some(record.name.clone()));
            }
            at = disk.below(Some(&id))?;
        }
        Ok(None)
    };
    let current = nearest(None)?;
    let shown = records.iter().map(|record| {
        let mut shown = record.shown(layout, disks);
        shown.parent = nearest(Some(&record.layer))?;
        shown.is_current = current.as_ref() == Some(&record.name);
        Ok(shown)
    });
    shown.collect()
}

/// Removes the record of a snapshot and what is its alone but its layers, the record first.
///
/// # Errors
/// `NotFound`; `Io`.
pub(super) fn remove(layout: &QemuLayout, name: &SnapshotName) -> Result<()> {
    let record = layout.snapshot_file(name);
    if fs::symlink_metadata(&record).is_err_and(|error| is_gone(&error)) {
        return Err(Error::not_found(Subject::Snapshot, name));
    }
    remove_file(&record)?;
    let dir = layout.snapshots_dir();
    step("snapshot: sync the directory")
        .and_then(|()| File::open(&dir)?.sync_all())
        .map_err(Error::io("sync", &dir))?;
    remove_file(&layout.snapshot_memory(name))?;
    remove_file(&layout.snapshot_vars(name))
}

/// Removes what lies in the directory of snapshots without a record.
///
/// # Errors
/// `Io`.
pub(super) fn remove_leftovers(layout: &QemuLayout) -> Result<()> {
    let dir = layout.snapshots_dir();
    let names = layers::names(&dir)?;
    let stem = |name: &std::ffi::OsStr| name.to_str()?.split_once('.').map(|(stem, _)| stem.to_owned());
    let is_record = |name: &&std::ffi::OsString| name.to_str().is_some_and(|name| name.ends_with(".json"));
    let there: BTreeSet<_> = names.iter().filter(is_record).filter_map(|name| stem(name)).collect();
    for name in names.iter().filter(|name| stem(name).is_none_or(|stem| !there.contains(&stem))) {
        remove_file(&dir.join(name))?;
    }
    Ok(())
}

/// Removes everything of a VM's snapshots.
///
/// # Errors
/// `Io`.
pub(super) fn remove_all(layout: &QemuLayout) -> Result<()> {
    for file in layers::files(layout)? {
        remove_file(&file)?;
    }
    let dir = layout.snapshots_dir();
    for name in layers::names(&dir)? {
        remove_file(&dir.join(name))?;
    }
    remove_dir(&dir)
}

/// Held by the one process that works on a VM's snapshots.
#[derive(Debug)]
pub(super) struct SnapshotLock {
    _lock: FileLock,
}

impl SnapshotLock {
    /// Creates the directory of snapshots, locks it, and removes what an interrupted operation left
    /// in it.
    ///
    /// # Errors
    /// `Busy`; `Io`.
    pub(super) fn take(layout: &QemuLayout, vm: &VmName) -> Result<Self> {
        let dir = layout.snapshots_dir();
        make_private_dir(&dir)?;
        let file = File::open(&dir).map_err(denied("open", &dir))?;
        let lock = FileLock::try_take(file, LockMode::Alone).map_err(Error::io("lock", &dir))?;
        let lock =
            lock.map_err(|_| Error::Busy { what: format!("the snapshots of VM `{vm}`"), holder: None })?;
        remove_leftovers(layout)?;
        Ok(Self { _lock: lock })
    }
}

/// Syncs what a snapshot has and writes its record: from then on it is there.
///
/// # Errors
/// `Io`; then it is not.
pub(super) async fn keep(layout: &QemuLayout, disks: &[OwnDisk], record: &SnapshotRecord) -> Result<()> {
    step("snapshot: sync the layers").map_err(Error::io("sync", &layout.work))?;
    let (own, id) = (disks.to_vec(), record.layer.clone());
    let synced = blocking(move || layers::sync(&own, &id)).await?;
    synced.map_err(Error::io("sync", &layout.work))?;
    record.write(layout)
}

/// Keeps the firmware's variables of a VM that has some.
///
/// # Errors
/// `Io`.
pub(super) fn keep_vars(spec: &VmSpec, layout: &QemuLayout, name: &SnapshotName) -> Result<()> {
    match spec.boot() {
        Boot::Firmware(Firmware::Uefi) => copy(&layout.efi_vars(), &layout.snapshot_vars(name)),
        Boot::Firmware(Firmware::Bios) | Boot::Kernel(_) => Ok(()),
    }
}

/// Copies a small file of this user alone, and syncs it.
///
/// # Errors
/// `Io`.
pub(super) fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).map_err(Error::io("read", from))?;
    replace(to, &bytes).map_err(Error::io("write", to))
}

/// Replaces a small file of this user alone, and syncs it.
///
/// # Errors
/// Those of the file system.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = unfinished(path);
    step("snapshot: write a file")?;
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    step("snapshot: rename a file")?;
    fs::rename(&temporary, path)?;
    step("snapshot: sync the directory")?;
    File::open(path.parent().unwrap_or(path))?.sync_all()
}
