//! The storage of VMs: a directory for each, and no common file.
//!
//! Edge: files and locks. It reads and writes records; the manager interprets them.
//!
//! ```text
//! <vms>/NAME/vm.json    the VM as it was made, with what it was told to be since; synced to the disk
//! <vms>/NAME/run.json   the VM as it is now, with what is being done to it; synced only where what it shall be changes
//! <vms>/NAME/owner.lock held by the process that a VM is to go with
//! <vms>/NAME/lock       held while somebody works on the VM; has that process's PID
//! <vms>/NAME/…          what its backend keeps
//! ```
//!
//! Events of a VM matter as long as the host runs, and the page cache lives as long: a killed
//! process loses nothing of `run.json`. A power cut may, but it has ended the guest as well; the VM
//! then has the state of `vm.json`, and the backend examines what runs anyway. So no start, stop,
//! suspend or resume waits for a disk sync, which would take longer than the operation. A user's
//! changes of the configuration are rare, and both files are synced before they take effect.

mod bytes;
mod changes;
mod home;
pub(crate) mod lock;
mod misplaced;
mod owner;
mod ownership;
mod portable;
mod record;
#[cfg(feature = "ssh")]
mod turn;
mod v1;
#[cfg(test)]
mod v1_tests;

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tokio::time::Instant;

pub use crate::misplacement::Misplacement;
pub(crate) use changes::RecordChanges;
pub use home::Home;
#[cfg(any(feature = "images", feature = "ssh"))]
pub(crate) use home::create_private;
pub use owner::EphemeralGuard;
pub(crate) use owner::OwnerState;
pub use ownership::ForeignFiles;
pub(crate) use ownership::{denied, keep_owner, refuse_other_user};
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use portable::stored_image;
pub use record::{Intent, VmRecord};
#[cfg(feature = "ssh")]
pub(crate) use turn::{TurnFor, VmTurn};

use self::misplaced::misplaced;
use self::owner::{OWNER, UNFINISHED_OWNER};
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::spec::VmName;
use crate::steps::step;

const MADE: &str = "vm.json";
const SINCE: &str = "run.json";
const LOCK: &str = "lock";
/// The store's own files in a VM's directory, in the order of their removal.
const OWN: [&str; 4] = [OWNER, MADE, SINCE, LOCK];
/// The temporary names of files that are being written. One is enough: only the holder of the lock
/// writes.
const UNFINISHED: [(&str, &str); 3] =
    [(MADE, "vm.json.new"), (SINCE, "run.json.new"), (OWNER, UNFINISHED_OWNER)];

/// The largest size of a record: a larger file is refused without reading it.
const MOST_RECORD_BYTES: u64 = 4 << 20;

/// The records of all VMs of one home.
#[derive(Debug, Clone)]
pub(crate) struct RecordStore {
    home: Home,
}

/// The directory of one VM, locked until this is dropped.
#[derive(Debug)]
pub(crate) struct LockedVm {
    name: VmName,
    dir: PathBuf,
    home: Home,
    _lock: lock::FileLock,
}

impl RecordStore {
    pub(crate) fn new(home: Home) -> Self {
        Self { home }
    }

    pub(crate) fn home(&self) -> &Home {
        &self.home
    }

    /// Returns the names of all directories that may be a VM's, sorted.
    pub(crate) fn names(&self) -> Result<Vec<VmName>> {
        let vms = self.home.vms();
        let entries = match fs::read_dir(vms) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(denied("read", vms)(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("read", vms))?;
            if let Some(name) = entry.file_name().to_str().and_then(|name| VmName::new(name).ok()) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Reads a VM's record without its lock.
    ///
    /// # Errors
    /// `NotFound` without a VM of that name, `Record` for a record that can't be used.
    pub(crate) fn read(&self, name: &VmName) -> Result<VmRecord> {
        read(&self.home, name)?.ok_or_else(|| missing(name))
    }

    /// Reads a VM's record without its lock, and returns whether its operation was interrupted: no
    /// process is running it.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub(crate) fn read_now(&self, name: &VmName) -> Result<(VmRecord, bool)> {
        let record = self.read(name)?;
        if record.intent.is_none() || lock::is_held(&self.home.vm(name).join(LOCK)) {
            return Ok((record, false));
        }
        // The operation may have ended since the record was read.
        let now = self.read(name)?;
        let is_cut_off = now == record;
        Ok((now, is_cut_off))
    }

    /// Returns when a VM's record was last written: at the end of the last operation on it.
    #[cfg(feature = "ssh")]
    pub(crate) fn changed_at(&self, name: &VmName) -> Option<std::time::SystemTime> {
        fs::metadata(self.home.vm(name).join(SINCE)).and_then(|found| found.modified()).ok()
    }

    /// Returns whether the VM still has this record, and no operation on it is running.
    pub(crate) fn is_left_alone(&self, record: &VmRecord) -> bool {
        let name = record.handle.name();
        let is_same = || self.read(name).is_ok_and(|now| now == *record);
        // Read again after the lock was checked: its holder may have removed the VM before that.
        is_same() && !lock::is_held(&self.home.vm(name).join(LOCK)) && is_same()
    }

    /// Starts to watch a VM's record.
    pub(crate) fn changes(&self, name: &VmName) -> Result<RecordChanges> {
        RecordChanges::of(&self.home.vm(name))
    }

    /// Locks an existing VM.
    ///
    /// # Errors
    /// `NotFound` without a VM of that name, `Busy` after the deadline.
    pub(crate) async fn lock(&self, name: &VmName, deadline: Instant) -> Result<LockedVm> {
        let dir = self.home.vm(name);
        self.home.refuse_other_user(&dir)?;
        match acquire(name, &dir, deadline).await? {
            Some(lock) => Ok(self.locked(name, dir, lock)),
            None => Err(missing(name)),
        }
    }

    /// Locks a name for a new VM; the directory is created if needed.
    ///
    /// # Errors
    /// `Busy` after the deadline; `Host` if the home can't be written; `Record` if the name belongs
    /// to something other than a directory.
    pub(crate) async fn lock_new(&self, name: &VmName, deadline: Instant) -> Result<LockedVm> {
        self.home.create()?;
        let dir = self.home.vm(name);
        loop {
            let made =
                step("create the VM's directory").and_then(|()| DirBuilder::new().mode(0o700).create(&dir));
            let is_new = match made {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    check_directory(&dir)?;
                    false
                }
                Err(error) => return Err(denied("create", &dir)(error)),
            };
            self.home.refuse_other_user(&dir)?;
            match acquire(name, &dir, deadline).await {
                Ok(Some(lock)) => return Ok(self.locked(name, dir, lock)),
                // The removal of a VM of this name has removed the directory; each attempt waits
                // for such a holder.
                Ok(None) if Instant::now() < deadline => tokio::task::yield_now().await,
                Ok(None) => return Err(Error::Busy { what: format!("VM `{name}`"), holder: None }),
                Err(error) => {
                    if is_new {
                        let _ = fs::remove_dir(&dir);
                    }
                    return Err(error);
                }
            }
        }
    }
}

impl RecordStore {
    fn locked(&self, name: &VmName, dir: PathBuf, lock: lock::FileLock) -> LockedVm {
        LockedVm { name: name.clone(), dir, home: self.home.clone(), _lock: lock }
    }
}

impl LockedVm {
    /// Returns the VM's directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads the record, after removing files that a killed process left half-written.
    pub(crate) fn record(&self) -> Result<Option<VmRecord>> {
        for (_, unfinished) in UNFINISHED {
            remove_file(&self.dir.join(unfinished))?;
        }
        read(&self.home, &self.name)
    }

    /// Returns the VM's last state if the record of its creation is damaged: enough to end what
    /// runs.
    pub(crate) fn last_known(&self) -> Option<VmRecord> {
        let made = read_bytes(&self.dir.join(MADE)).ok()??;
        // A record of another home, or of a newer vmkit, is not damaged.
        if VmRecord::whose(&made).is_some() || VmRecord::is_newer(&made) {
            return None;
        }
        let path = self.dir.join(SINCE);
        let bytes = read_bytes(&path).ok()??;
        decode(&self.home, &path, &bytes).ok().filter(|record| *record.handle.name() == self.name)
    }

    /// Returns the first entry of the directory that is not the store's, if any.
    pub(crate) fn stranger(&self) -> Result<Option<PathBuf>> {
        stranger(&self.dir)
    }

    /// Writes and syncs the record of a VM that is being created, so that it survives a power cut.
    pub(crate) fn write_made(&self, record: &VmRecord) -> Result<()> {
        self.replace(UNFINISHED[0], record, true)
    }

    /// Writes and syncs the record of a changed VM, so that the change survives a power cut.
    ///
    /// The record of its creation is written first: if that fails, nothing is changed. It is
    /// replaced atomically, so the older one exists until then. The record of its present state is
    /// synced as well, or an older one would hide the change after a power cut.
    pub(crate) fn write_wanted(&self, record: &VmRecord) -> Result<()> {
        let path = self.dir.join(MADE);
        let made = read_bytes(&path)?.and_then(|bytes| decode(&self.home, &path, &bytes).ok());
        let mut made = made.unwrap_or_else(|| VmRecord {
            intent: None,
            handle: VmHandle { run: None, ..record.handle.clone() },
        });
        made.handle.spec = record.handle.spec.clone();
        made.handle.next_spec.clone_from(&record.handle.next_spec);
        self.write_made(&made)?;
        self.replace(UNFINISHED[1], record, true)
    }

    /// Writes the record of an existing VM, so that it survives the end of this process.
    pub(crate) fn write_since(&self, record: &VmRecord) -> Result<()> {
        self.replace(UNFINISHED[1], record, false)
    }

    fn replace(&self, (name, unfinished): (&str, &str), record: &VmRecord, synced: bool) -> Result<()> {
        let (path, unfinished) = (self.dir.join(name), self.dir.join(unfinished));
        let bytes = self.home.paths_to_write().portable(record.clone()).encode()?;
        let written = self.replace_bytes(&path, &unfinished, &bytes, synced);
        if written.is_err() {
            let _ = fs::remove_file(&unfinished);
        }
        written.map_err(denied("write", path))
    }

    fn replace_bytes(&self, path: &Path, unfinished: &Path, bytes: &[u8], synced: bool) -> io::Result<()> {
        step("write the record")?;
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(unfinished)?;
        file.write_all(bytes)?;
        if synced {
            step("sync the record")?;
            file.sync_all()?;
        }
        step("rename the record")?;
        fs::rename(unfinished, path)?;
        if synced {
            step("sync the VM's directory")?;
            File::open(&self.dir)?.sync_all()?;
            File::open(self.dir.parent().unwrap_or(&self.dir))?.sync_all()?;
        }
        Ok(())
    }

    /// Removes the remains of a VM, so that a new one starts with nothing: its record, the record
    /// of changes, and its small files.
    pub(crate) fn clear(&self) -> Result<()> {
        for record in [MADE, SINCE] {
            remove_file(&self.dir.join(record))?;
        }
        let kept = self.dir.join(home::KEPT);
        if !kept.exists() {
            return Ok(());
        }
        step("remove what was kept")
            .and_then(|()| fs::remove_dir_all(&kept))
            .map_err(Error::io("remove", kept))
    }

    /// Removes the directory and its contents: the record last, so that until then the VM can be
    /// found.
    ///
    /// Missing files are no error.
    pub(crate) fn remove(self) -> Result<()> {
        let entries = fs::read_dir(&self.dir).map_err(Error::io("read", &self.dir))?;
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &self.dir))?;
            if !OWN.iter().any(|own| entry.file_name() == *own) {
                remove_entry(&entry.path())?;
            }
        }
        for own in OWN {
            remove_entry(&self.dir.join(own))?;
        }
        let removed = step("remove the VM's directory").and_then(|()| remove_directory(&self.dir));
        match removed {
            // Another process has started to create a VM of the same name since the lock file was
            // removed.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(Error::io("remove", &self.dir)),
        }
    }
}

/// Refuses anything but a directory in the place of a VM's, such as a link to a disk that is not
/// mounted.
fn check_directory(dir: &Path) -> Result<()> {
    if dir.is_dir() || !fs::symlink_metadata(dir).is_ok_and(|found| !found.is_dir()) {
        return Ok(());
    }
    let problem = "a VM is to be kept here, and this is neither a directory nor leads to one".to_owned();
    Err(Error::record(dir, problem))
}

/// Waits for a VM's lock; the error names the VM instead of the file.
async fn acquire(name: &VmName, dir: &Path, deadline: Instant) -> Result<Option<lock::FileLock>> {
    lock::acquire(&dir.join(LOCK), lock::LockMode::Alone, deadline).await.map_err(|error| match error {
        Error::Busy { holder, .. } => Error::Busy { what: format!("VM `{name}`"), holder },
        error => error,
    })
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())
}

/// Removes an empty directory; if it was moved elsewhere behind a symbolic link, both.
fn remove_directory(dir: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(dir)?.is_symlink() {
        return fs::remove_dir(dir);
    }
    let moved = fs::canonicalize(dir);
    fs::remove_file(dir)?;
    moved.and_then(fs::remove_dir)
}

/// Reads a VM's record: its present state, else the state of its creation and later changes;
/// returns `None` without a record.
fn read(home: &Home, name: &VmName) -> Result<Option<VmRecord>> {
    let dir = home.vm(name);
    let path = dir.join(MADE);
    let Some(bytes) = read_bytes(&path)? else { return Ok(None) };
    let since = read_bytes(&dir.join(SINCE))?;
    // If the newer record is valid, the older one only has to be of the same VM.
    if let Some(since) = &since
        && let Some((id, of)) = VmRecord::whose(&bytes)
        && of == *name
    {
        let path = dir.join(SINCE);
        match decode(home, &path, since) {
            Ok(since) if since.handle.id == id && since.handle.name() == name => return Ok(Some(since)),
            Err(error) if VmRecord::is_newer(since) => return Err(error),
            // Truncated by a power cut, or another VM's: the record of the creation is still valid.
            _ => {}
        }
    }
    let made = decode(home, &path, &bytes)?;
    if made.handle.name() != name {
        return Err(misplaced(home, name, &made));
    }
    Ok(Some(made))
}

/// Parses a record, and replaces the names of this home's paths.
fn decode(home: &Home, path: &Path, bytes: &[u8]) -> Result<VmRecord> {
    let record = VmRecord::decode(path, bytes)?;
    Ok(home.paths().found(record, |path| path.exists()))
}

/// Reads a file of the store; a named pipe, or a file larger than any record, is refused without
/// blocking.
fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    let refused = |problem: String| Error::record(path, problem);
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).expect("the flag is a small number");
    let file = match OpenOptions::new().read(true).custom_flags(nonblocking).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && is_link(path) => {
            return Err(refused("this is a symbolic link that leads nowhere".to_owned()));
        }
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(denied("open", path)(error)),
    };
    let mut bytes = Vec::with_capacity(4096);
    match file.take(MOST_RECORD_BYTES + 1).read_to_end(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
            return Err(refused("this is not a record of a VM: it is a directory".to_owned()));
        }
        read => read.map_err(Error::io("read", path))?,
    };
    if u64::try_from(bytes.len()).is_ok_and(|found| found > MOST_RECORD_BYTES) {
        return Err(refused(format!(
            "this is not a record of a VM: it has more than {MOST_RECORD_BYTES} bytes"
        )));
    }
    Ok(Some(bytes))
}

/// Returns the first entry of a VM's directory that is not the store's. The small files beside a VM
/// are removed with it, even if they were written during the removal.
pub(crate) fn stranger(dir: &Path) -> Result<Option<PathBuf>> {
    let own = |name: &OsStr| {
        name == home::KEPT
            || OWN.iter().any(|own| name == *own)
            || UNFINISHED.iter().any(|(_, own)| name == *own)
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(Error::io("read", dir)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(Error::io("read", dir))?;
        if !own(&entry.file_name()) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

/// Removes a file, or a directory with its contents; symbolic links are not followed.
fn remove_entry(path: &Path) -> Result<()> {
    if !fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        return remove_file(path);
    }
    step("remove a directory").and_then(|()| fs::remove_dir_all(path)).map_err(Error::io("remove", path))
}

fn remove_file(path: &Path) -> Result<()> {
    let is_there = fs::symlink_metadata(path).is_ok();
    if !is_there {
        return Ok(());
    }
    match step("remove a file").and_then(|()| fs::remove_file(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io("remove", path)),
    }
}

fn missing(name: &VmName) -> Error {
    Error::not_found(Subject::Vm, name)
}
