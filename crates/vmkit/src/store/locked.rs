//! A VM's directory while its lock is held: records are written and removed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::files::{
    MADE, OWN, SINCE, UNFINISHED, decode, read_bytes, remove_directory, remove_entry, remove_file, stranger,
};
use super::home::{self, Home};
use super::lock::FileLock;
use super::ownership::denied;
use super::read::read;
use super::record::VmRecord;
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::spec::{SnapshotName, VmName};
use crate::steps::step;

/// The directory of one VM, locked until this is dropped.
#[derive(Debug)]
pub(crate) struct LockedVm {
    pub(super) name: VmName,
    pub(super) dir: PathBuf,
    pub(super) home: Home,
    pub(super) _lock: FileLock,
}

impl LockedVm {
    /// Returns the VM's directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the directory of the VM's small files.
    #[cfg(feature = "images")]
    pub(crate) fn kept(&self) -> PathBuf {
        self.dir.join(home::KEPT)
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

    /// Writes and syncs what a VM is when a snapshot of it is taken.
    pub(crate) fn write_snapshot(&self, name: &SnapshotName, record: &VmRecord) -> Result<()> {
        let kept = self.dir.join(home::KEPT);
        step("create a directory")
            .and_then(|()| DirBuilder::new().recursive(true).mode(0o700).create(&kept))
            .map_err(Error::io("create", &kept))?;
        let file = snapshot_file(name);
        self.replace((&file, &format!("{file}.new")), record, true)
    }

    /// Reads what a VM was when a snapshot of it was taken.
    pub(crate) fn snapshot(&self, name: &SnapshotName) -> Result<Option<VmRecord>> {
        let path = self.dir.join(snapshot_file(name));
        read_bytes(&path)?.map(|bytes| decode(&self.home, &path, &bytes)).transpose()
    }

    /// Returns the bytes of a record that another home can read.
    ///
    /// # Errors
    /// `InvalidInput` for a spec that can't be recorded.
    #[cfg(feature = "images")]
    pub(crate) fn encode(&self, record: &VmRecord) -> Result<Vec<u8>> {
        self.home.paths_to_write().portable(record.clone()).encode()
    }

    /// Removes what a VM was when a snapshot of it was taken.
    pub(crate) fn remove_snapshot(&self, name: &SnapshotName) -> Result<()> {
        let file = snapshot_file(name);
        remove_file(&self.dir.join(format!("{file}.new")))?;
        remove_file(&self.dir.join(file))
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

    /// Returns the record of the VM of another name that lies here, as one of this directory: what
    /// is done to it is done here.
    pub(crate) fn misplaced_record(&self) -> Result<Option<VmRecord>> {
        let path = self.dir.join(MADE);
        let Some(bytes) = read_bytes(&path)? else { return Ok(None) };
        let mut made = decode(&self.home, &path, &bytes)?;
        made.handle.spec = made.handle.spec.with_name(self.name.clone());
        Ok(Some(made))
    }

    /// Removes the symbolic link that this directory is, and nothing behind it.
    pub(crate) fn remove_link(self) -> Result<()> {
        step("remove a link")
            .and_then(|()| fs::remove_file(&self.dir))
            .map_err(Error::io("remove", &self.dir))
    }
}

/// Returns where the record of a VM is that a snapshot was taken of, in the VM's directory.
fn snapshot_file(name: &SnapshotName) -> String {
    format!("{}/snapshot-{name}.json", home::KEPT)
}
