//! What lies on disk of a saved guest: its memory, and the record of what fits to it.
//!
//! The record `saved.json` exists exactly while the memory is valid. It is written when the memory
//! is complete, before the process ends, and removed before the guest runs again. So nothing that
//! was started since has run the guest, and whatever still lives may be killed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::devices::DeviceVersion;
use super::facts::QemuFacts;
use super::layout::QemuLayout;
use super::switch::Accelerator;
use crate::backend::supervise::files::{is_gone, remove_file};
use crate::backend::supervise::unfinished;
use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::flock::{FileLock, LockMode};
use crate::input_file::open_regular;
use crate::room::check_room;
use crate::spec::{DataDisk, VmName, VmSpec};
use crate::steps::step;
use crate::store::denied;

/// The version of the record's format.
const VERSION: u32 = 1;
/// A limit above the record's size, in bytes.
const MOST_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: usize = 256 << 10;

/// The record of a saved guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedGuest {
    version: u32,
    /// The version of its devices. One of a newer vmkit may be unknown.
    command_line: u32,
    /// The QEMU that saved it.
    qemu: (u32, u32),
    /// Its machine, with the version.
    pub(super) machine: String,
    accel: Accelerator,
    /// The host's CPU, if the guest has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cpu: Option<String>,
    /// The length of the memory's file.
    pub(super) bytes: u64,
    checksum: u32,
    /// When it was saved, in milliseconds since 1970.
    saved_ms: u64,
    disks: Vec<DiskStamp>,
}

/// A disk as it was when the guest was saved: its memory knows what is on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DiskStamp {
    disk: String,
    bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl DiskStamp {
    /// Returns whether this is a disk by the path that its user named.
    fn is_users(&self) -> bool {
        self.disk.starts_with('/')
    }
}

/// What QEMU was when it saved a guest.
#[derive(Debug)]
pub(super) struct SavedBy {
    pub(super) version: (u32, u32),
    pub(super) machine: String,
    pub(super) accel: Accelerator,
    pub(super) devices: DeviceVersion,
}

/// Returns the room that a saved guest takes on disk, in bytes: pages of zeros take none.
///
/// # Errors
/// `Io`; `Host`.
pub(super) fn room(layout: &QemuLayout) -> Result<Option<u64>> {
    let path = layout.memory_file();
    match fs::metadata(&path) {
        // In blocks of 512 bytes, whatever those of the file system are. Source: stat(3type).
        Ok(found) => Ok(is_saved(layout).then_some(found.blocks() * 512)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(denied("examine", &path)(error)),
    }
}

/// Returns whether a guest is saved.
pub(super) fn is_saved(layout: &QemuLayout) -> bool {
    fs::symlink_metadata(layout.saved_file()).is_ok()
}

impl SavedGuest {
    /// Reads the record; `None` if no guest is saved.
    ///
    /// # Errors
    /// `NotContinued`, for the reason that it is damaged or of a newer version; `Io`.
    pub(super) fn read(layout: &QemuLayout) -> Result<Option<Self>> {
        let path = layout.saved_file();
        let mut text = Vec::new();
        let file = match open_regular(&path) {
            Err(error) if is_gone(&error) => return Ok(None),
            file => file.map_err(denied("read", &path))?,
        };
        io::Read::read_to_end(&mut io::Read::take(file, MOST_BYTES), &mut text)
            .map_err(Error::io("read", &path))?;
        let damaged = |error| {
            let unread = Error::record(&path, "the record of a saved guest can't be read");
            not_continued(unread.with_source(error))
        };
        let value: serde_json::Value = serde_json::from_slice(&text).map_err(damaged)?;
        match value["version"].as_u64() {
            Some(version) if version > u64::from(VERSION) => {
                let problem = format!(
                    "the guest was saved by a newer vmkit (format {version}; this one knows {VERSION})"
                );
                Err(not_continued(Error::record(&path, problem)))
            }
            _ => serde_json::from_value(value).map(Some).map_err(damaged),
        }
    }

    /// Records that the guest's memory is complete. From now on the guest is saved, also after a
    /// power cut.
    ///
    /// # Errors
    /// `Io`; then it is not.
    pub(super) async fn keep(spec: &VmSpec, layout: &QemuLayout, by: SavedBy, memory: File) -> Result<()> {
        let saved = Self::of(spec, layout, by, memory).await?;
        let path = layout.memory_file();
        step("save: rename the memory")
            .and_then(|()| fs::rename(unfinished(&path), &path))
            .map_err(Error::io("rename", &path))?;
        saved.write(layout)
    }

    /// Syncs the memory of a guest that was saved now, and returns its record.
    ///
    /// # Errors
    /// `Io`.
    pub(super) async fn of(spec: &VmSpec, layout: &QemuLayout, by: SavedBy, memory: File) -> Result<Self> {
        let path = unfinished(&layout.memory_file());
        step("save: sync the memory").map_err(Error::io("sync", &path))?;
        let synced = blocking(move || {
            memory.sync_all()?;
            Ok((memory.metadata()?.len(), checksum(&memory)?))
        });
        let (bytes, checksum) = synced.await?.map_err(Error::io("sync", &path))?;
        let cpu = (by.accel == Accelerator::Kvm).then(host_cpu).flatten();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            version: VERSION,
            command_line: by.devices.number(),
            qemu: by.version,
            machine: by.machine,
            accel: by.accel,
            cpu,
            bytes,
            checksum,
            saved_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            disks: stamps(spec, layout)?,
        })
    }

    /// Puts the guest of a snapshot, with its memory in the file `memory`, in the place of the
    /// saved one. Its own disks are as they were when it was saved; those of the user have to be.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn put(self, spec: &VmSpec, layout: &QemuLayout, memory: &Path) -> Result<()> {
        let saved = self.with_own_disks(spec, layout)?;
        let path = layout.memory_file();
        step("restore: link the memory")
            .and_then(|()| fs::hard_link(memory, &path))
            .map_err(Error::io("link", &path))?;
        saved.write(layout)
    }

    /// Notes the VM's own disks as they are now: the same bytes were received with the memory.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn keep_own_disks(self, spec: &VmSpec, layout: &QemuLayout) -> Result<()> {
        self.with_own_disks(spec, layout)?.write(layout)
    }

    fn with_own_disks(mut self, spec: &VmSpec, layout: &QemuLayout) -> Result<Self> {
        let own = stamps(spec, layout)?.into_iter().filter(|stamp| !stamp.is_users());
        self.disks = own.chain(self.disks.into_iter().filter(DiskStamp::is_users)).collect();
        Ok(self)
    }

    /// Notes the disks as they are now: vmkit itself has changed one.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn keep_disks(mut self, spec: &VmSpec, layout: &QemuLayout) -> Result<()> {
        self.disks = stamps(spec, layout)?;
        self.write(layout)
    }

    fn write(&self, layout: &QemuLayout) -> Result<()> {
        let path = layout.saved_file();
        let temporary = unfinished(&path);
        let write = || {
            step("save: write the record")?;
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            step("save: rename the record")?;
            fs::rename(&temporary, &path)?;
            step("save: sync the directory")?;
            File::open(&layout.work)?.sync_all()
        };
        write().map_err(Error::io("write", &path))
    }

    /// Returns the devices that the guest was saved with.
    ///
    /// # Errors
    /// `Host` for those of a newer vmkit.
    pub(super) fn devices(&self, name: &VmName) -> Result<DeviceVersion> {
        DeviceVersion::try_from(self.command_line).map_err(|unknown| {
            let problem = format!("{unknown}, and the guest of `{name}` was saved with them");
            Error::host("a newer vmkit", problem)
        })
    }

    /// Returns for how long the guest has not run.
    pub(super) fn age(&self) -> Option<Duration> {
        let saved = SystemTime::UNIX_EPOCH + Duration::from_millis(self.saved_ms);
        saved.elapsed().ok()
    }

    /// Refuses what the guest can't be loaded into, or with, before anything is started; reads none
    /// of the memory.
    ///
    /// # Errors
    /// `NotContinued`, for the reason `InvalidInput` on `saved`, with what was expected; `Record`
    /// for a memory file that is gone or truncated; `Host` for another QEMU, accelerator or CPU.
    pub(super) fn check(&self, spec: &VmSpec, layout: &QemuLayout, facts: &QemuFacts) -> Result<()> {
        self.compare(spec, layout, facts).map_err(not_continued)
    }

    fn compare(&self, spec: &VmSpec, layout: &QemuLayout, facts: &QemuFacts) -> Result<()> {
        let other = |needed: String, found: String| {
            let problem = format!("{found}, and the guest of `{}` was saved there", spec.name());
            Err(Error::host(needed, problem))
        };
        self.devices(spec.name())?;
        let ((major, minor), (now_major, now_minor)) = (self.qemu, facts.version);
        let newer = self.or_newer();
        if self.qemu > facts.version || (newer.is_empty() && self.qemu != facts.version) {
            return other(format!("QEMU {major}.{minor}{newer}"), format!("this is {now_major}.{now_minor}"));
        }
        if self.accel != facts.accel {
            let found = format!("the VM would run by {}", facts.accel.as_str());
            return other(format!("the accelerator {}", self.accel.as_str()), found);
        }
        if let Some(cpu) = self.cpu.as_ref().filter(|cpu| host_cpu().is_none_or(|now| now != **cpu)) {
            let now = host_cpu().unwrap_or_else(|| "unknown".to_owned());
            return other(format!("the CPU {cpu}"), format!("this is {now}"));
        }
        self.check_length(&layout.memory_file())?;
        self.check_disks(spec, layout)
    }

    /// Refuses a memory file that is gone or truncated.
    ///
    /// # Errors
    /// `Record`; `Io`.
    pub(super) fn check_length(&self, memory: &Path) -> Result<()> {
        let bytes = match fs::metadata(memory) {
            Ok(found) => found.len(),
            Err(error) if is_gone(&error) => {
                return Err(Error::record(memory, "the memory of the saved guest is missing"));
            }
            Err(error) => return Err(denied("read", memory)(error)),
        };
        if bytes != self.bytes {
            let problem = format!("{bytes} bytes, and the guest was saved with {}", self.bytes);
            return Err(Error::record(memory, problem));
        }
        Ok(())
    }

    /// Refuses disks that were changed since.
    ///
    /// # Errors
    /// `InvalidInput` on `saved`; `Io`.
    pub(super) fn check_disks(&self, spec: &VmSpec, layout: &QemuLayout) -> Result<()> {
        let now = stamps(spec, layout)?;
        for stamp in &self.disks {
            if !now.contains(stamp) {
                let changed = format!(
                    "this disk was changed after the guest of `{}` was saved, whose memory does not fit to it any \
                     more: put it back as it was",
                    spec.name()
                );
                return Err(Error::invalid("saved", &stamp.disk, changed));
            }
        }
        Ok(())
    }

    /// Reads memory that is to be copied, and refuses one that is not as it was written.
    ///
    /// # Errors
    /// `Record`; `Io`.
    pub(super) async fn check_whole(&self, memory: &Path) -> Result<()> {
        self.check_length(memory)?;
        let (guest, path) = (self.clone(), memory.to_owned());
        let checked = blocking(move || {
            let memory = open_regular(&path).map_err(denied("read", &path))?;
            guest.check_memory(&path, &memory)
        });
        match checked.await? {
            // Nothing is to be continued here.
            Err(Error::NotContinued { source }) => Err(*source),
            checked => checked,
        }
    }

    /// Returns what a host has to have where the guest continues.
    pub(super) fn needs(&self) -> String {
        let (major, minor) = self.qemu;
        let cpu = self.cpu.as_ref().map_or_else(String::new, |cpu| format!(", CPU {cpu}"));
        format!(
            "QEMU {major}.{minor}{}, machine {}, accelerator {}{cpu}",
            self.or_newer(),
            self.machine,
            self.accel.as_str()
        )
    }

    /// Returns whether newer versions of QEMU have the machine, too, as words.
    fn or_newer(&self) -> &'static str {
        let is_versioned = self.machine.ends_with(|last: char| last.is_ascii_digit());
        if is_versioned { " or newer" } else { "" }
    }

    /// Reads the memory, and refuses one that is not as it was written. Blocks.
    ///
    /// # Errors
    /// `NotContinued`; `Io`.
    pub(super) fn check_memory(&self, path: &Path, memory: &File) -> Result<()> {
        match checksum(memory).map_err(Error::io("read", path))? == self.checksum {
            true => Ok(()),
            false => Err(not_continued(Error::record(path, "the memory of the saved guest is damaged"))),
        }
    }
}

fn not_continued(why: Error) -> Error {
    Error::NotContinued { source: Box::new(why) }
}

/// A saved guest that only this process starts.
#[derive(Debug)]
pub(super) struct ClaimedGuest {
    pub(super) guest: SavedGuest,
    _lock: FileLock,
}

impl ClaimedGuest {
    /// Claims the saved guest, until this is dropped.
    ///
    /// # Errors
    /// `Busy` while another process starts it, or has started it; those of [`SavedGuest::read`].
    pub(super) fn claim(layout: &QemuLayout, name: &VmName) -> Result<Self> {
        let path = layout.saved_file();
        let busy = || Error::Busy { what: format!("VM `{name}`"), holder: None };
        let file = match open_regular(&path) {
            Err(error) if is_gone(&error) => return Err(busy()),
            file => file.map_err(denied("read", &path))?,
        };
        let lock = FileLock::try_take(file, LockMode::Alone).map_err(Error::io("lock", &path))?;
        let lock = lock.map_err(|_| busy())?;
        // Read with the lock held: the process that had it may have removed the record.
        let guest = SavedGuest::read(layout)?.ok_or_else(busy)?;
        Ok(Self { guest, _lock: lock })
    }
}

/// Creates the file for a guest's memory, of this user alone.
///
/// # Errors
/// `Io`; `Host` if the disk has too little room for `bytes`.
pub(super) fn create_memory(layout: &QemuLayout, name: &VmName, bytes: u64) -> Result<File> {
    let path = unfinished(&layout.memory_file());
    check_room(&layout.work, bytes, |mib| format!("the memory of `{name}` may need {mib} MiB"))?;
    step("save: create the memory").map_err(Error::io("create", &path))?;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path);
    file.map_err(Error::io("create", &path))
}

/// Discards a saved guest: from then on it is not, also after a power cut.
///
/// # Errors
/// `Io`; then it is still saved.
pub(super) fn discard(layout: &QemuLayout) -> Result<()> {
    remove_file(&layout.saved_file())?;
    step("save: sync the directory")
        .and_then(|()| File::open(&layout.work)?.sync_all())
        .map_err(Error::io("sync", &layout.work))
}

/// Removes what an interrupted save or an ended run left; the caller knows that no guest is saved.
///
/// # Errors
/// `Io`.
pub(super) fn remove_leftovers(layout: &QemuLayout) -> Result<()> {
    for path in leftovers(layout) {
        if fs::symlink_metadata(&path).is_ok() {
            remove_file(&path)?;
        }
    }
    Ok(())
}

/// Returns whether a save was begun in this run and has not ended.
pub(super) fn was_begun(layout: &QemuLayout) -> bool {
    !is_saved(layout) && leftovers(layout).iter().any(|path| path.exists())
}

fn leftovers(layout: &QemuLayout) -> [PathBuf; 3] {
    let memory = layout.memory_file();
    [unfinished(&memory), memory, unfinished(&layout.saved_file())]
}

fn stamps(spec: &VmSpec, layout: &QemuLayout) -> Result<Vec<DiskStamp>> {
    let root = spec.disk().map(|_| ("root".to_owned(), layout.root_disk()));
    let data = spec.data_disks().iter().enumerate().map(|(index, disk)| match disk {
        DataDisk::Fresh { .. } => (format!("data{index}"), layout.data_disk(index)),
        DataDisk::Existing { path, .. } => (path.display().to_string(), path.clone()),
    });
    let stamp = |(disk, path): (String, PathBuf)| {
        let found = fs::metadata(&path).map_err(denied("examine", &path))?;
        Ok(DiskStamp { disk, bytes: found.len(), modified_s: found.mtime(), modified_ns: found.mtime_nsec() })
    };
    root.into_iter().chain(data).map(stamp).collect()
}

fn checksum(file: &File) -> io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let (mut block, mut at) = (vec![0; BLOCK_BYTES], 0);
    loop {
        match file.read_at(&mut block, at)? {
            0 => return Ok(hasher.finalize()),
            read => {
                hasher.update(&block[..read]);
                at += read as u64;
            }
        }
    }
}

/// Returns the name of the host's CPU. Source: proc_cpuinfo(5).
fn host_cpu() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    line.split_once(':').map(|(_, name)| name.trim().to_owned())
}
