//! The store's files in a VM's directory: their names, and how they are read and removed.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::home::{self, Home};
use super::ownership::denied;
use super::record::VmRecord;
use crate::error::{Error, Result};
use crate::steps::step;

/// The record of a VM as it was created and is wanted.
pub(super) const MADE: &str = "vm.json";
/// The record of a VM as it is now.
pub(super) const SINCE: &str = "run.json";
/// The lock of a VM.
pub(super) const LOCK: &str = "lock";
/// The name of that file in the VM's directory.
pub(super) const OWNER: &str = "owner.lock";
/// Its name until it is whole.
pub(super) const UNFINISHED_OWNER: &str = "owner.lock.new";
/// The store's own files in a VM's directory, in the order of their removal.
pub(super) const OWN: [&str; 4] = [OWNER, MADE, SINCE, LOCK];
/// The temporary names of files that are being written. One is enough: only the holder of the lock
/// writes.
pub(super) const UNFINISHED: [(&str, &str); 3] =
    [(MADE, "vm.json.new"), (SINCE, "run.json.new"), (OWNER, UNFINISHED_OWNER)];
/// The largest size of a record: a larger file is refused without reading it.
const MOST_RECORD_BYTES: u64 = 4 << 20;

/// Parses a record, and replaces the names of this home's paths.
pub(super) fn decode(home: &Home, path: &Path, bytes: &[u8]) -> Result<VmRecord> {
    let record = VmRecord::decode(path, bytes)?;
    Ok(home.paths().found(record, |path| path.exists()))
}

/// Reads a file of the store; a named pipe, or a file larger than any record, is refused without
/// blocking.
pub(super) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    let refused = |problem: String| Error::record(path, problem);
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).expect("the flag is a small number");
    let file = match OpenOptions::new().read(true).custom_flags(nonblocking).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound && is_link(path) => {
            return Err(refused("this is a symbolic link without a target".to_owned()));
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

pub(super) fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())
}

/// Refuses anything but a directory in the place of a VM's, such as a link to a disk that is not
/// mounted.
pub(super) fn check_directory(dir: &Path) -> Result<()> {
    if dir.is_dir() || !fs::symlink_metadata(dir).is_ok_and(|found| !found.is_dir()) {
        return Ok(());
    }
    let problem = "this is not a directory (expected the VM's directory, or a link to it)".to_owned();
    Err(Error::record(dir, problem))
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

pub(super) fn remove_file(path: &Path) -> Result<()> {
    let is_there = fs::symlink_metadata(path).is_ok();
    if !is_there {
        return Ok(());
    }
    match step("remove a file").and_then(|()| fs::remove_file(path)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io("remove", path)),
    }
}

/// Removes a file, or a directory with its contents; symbolic links are not followed.
pub(super) fn remove_entry(path: &Path) -> Result<()> {
    if !fs::symlink_metadata(path).is_ok_and(|found| found.is_dir()) {
        return remove_file(path);
    }
    step("remove a directory").and_then(|()| fs::remove_dir_all(path)).map_err(Error::io("remove", path))
}

/// Removes an empty directory; if it was moved elsewhere behind a symbolic link, both.
pub(super) fn remove_directory(dir: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(dir)?.is_symlink() {
        return fs::remove_dir(dir);
    }
    let moved = fs::canonicalize(dir);
    fs::remove_file(dir)?;
    moved.and_then(fs::remove_dir)
}
