//! The files of the image store, read, replaced and removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::Mode;

use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::input_file::open_regular;
use crate::steps::step;

/// More than any record has.
const MOST_RECORD_BYTES: u64 = 1 << 20;
/// The end of a record's name while it is being written.
const UNFINISHED: &str = ".new";

/// Moves a disk to its place: synced, for reading only.
pub(super) async fn settle(disk: &Path, place: &Path) -> Result<()> {
    let protect = || {
        let file = File::open(disk)?;
        step("image: protect the disk")?;
        rustix::fs::fchmod(&file, Mode::RUSR | Mode::RGRP | Mode::ROTH)?;
        step("image: sync the disk")?;
        Ok(file)
    };
    let file = protect().map_err(Error::io("keep", place))?;
    // Gigabytes take their time, and others are at work on this thread.
    let synced = blocking(move || file.sync_all()).await?;
    let move_there = || {
        step("image: move the disk to its place")?;
        fs::rename(disk, place)
    };
    synced.and_then(|()| move_there()).map_err(Error::io("keep", place))
}

/// Writes a record in the place of an earlier one, so that there is always a whole one.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    // Two may write at once, and each renames its own.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{}{UNFINISHED}", uuid::Uuid::new_v4().simple()));
    let unfinished = PathBuf::from(unfinished);
    let write = || {
        step("image: write a record")?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        step("image: rename a record")?;
        if let Err(error) = fs::rename(&unfinished, path) {
            if error.kind() != io::ErrorKind::IsADirectory {
                return Err(error);
            }
            // A directory in the record's place is nothing of vmkit's; one with something in it
            // stays.
            fs::remove_dir(path)?;
            fs::rename(&unfinished, path)?;
        }
        File::open(path.parent().unwrap_or(path))?.sync_all()
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&unfinished);
        Error::io("write", path)(error)
    })
}

/// Removes what writers of records have left unfinished in a directory. The caller holds the lock
/// that each writer holds.
pub(super) fn sweep(dir: &Path) -> Result<()> {
    for left in entries(dir)?.into_iter().filter(|file| file.ends_with(UNFINISHED)) {
        remove_file(&dir.join(left))?;
    }
    Ok(())
}

pub(super) fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", path))
}

/// Reads a record; one that is bigger than any is refused.
pub(super) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MOST_RECORD_BYTES).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    Ok(Some(bytes))
}

/// Returns the names in a directory, in order; one that is not there has none.
pub(super) fn entries(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read", dir)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        // What vmkit writes here is plain text; other names are not its own.
        if let Ok(name) = entry.map_err(Error::io("read", dir))?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Removes a file and returns how much room it took; what is gone already took none.
pub(super) fn remove_file(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;

    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(0) };
    let remove = || if metadata.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
    match step("image: remove a file").and_then(|()| remove()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        // A file's blocks are counted in 512 bytes, whatever the file system's own are.
        removed => removed.map(|()| metadata.blocks() * 512).map_err(Error::io("remove", path)),
    }
}

/// Returns the time of records.
pub(super) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
