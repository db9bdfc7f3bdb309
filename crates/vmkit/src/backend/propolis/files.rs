//! What a VM has in its directory: whose it is and what was made for it, where its server listens, what was asked.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::layout::Layout;
use super::options::Options;
use super::plan::HostStep;
use crate::backend::supervise::unfinished;
use crate::error::{Error, Result};
use crate::steps::step;

/// More than a claim has: an id, some paths and commands.
const MOST_BYTES: u64 = 1 << 20;

/// Says whose a directory is, and what was made on the host for that VM, or may have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Claim {
    pub(super) id: Uuid,
    /// What the VM asked for when it was made: what the backend's defaults were then stays true for it.
    pub(super) options: Options,
    /// What was made, in order.
    pub(super) steps: Vec<HostStep>,
    /// How large the image was.
    pub(super) image_bytes: u64,
}

/// Says where the server of the last run listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ServerFile {
    pub(super) address: SocketAddr,
}

/// Answers whose the directory is; `None` where nobody has claimed it, or was killed while it did.
///
/// # Errors
/// `Io` where it can't be read.
pub(super) fn claim(layout: &Layout) -> Result<Option<Claim>> {
    read(&layout.claim())
}

/// Answers where the server of the last run listens, if its guest was about to run.
///
/// # Errors
/// `Io` where it can't be read.
pub(super) fn server(layout: &Layout) -> Result<Option<ServerFile>> {
    read(&layout.server_file())
}

/// Writes one of these files, whole or not at all.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn write(path: &Path, content: &impl Serialize) -> Result<()> {
    let bytes = serde_json::to_vec(content).expect("plain data of UTF-8 paths");
    let temporary = unfinished(path);
    step("write a file").map_err(Error::io("write", path))?;
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options.open(&temporary).and_then(|mut file| file.write_all(&bytes));
    written.map_err(Error::io("write", path))?;
    step("rename a file").map_err(Error::io("write", path))?;
    fs::rename(&temporary, path).map_err(Error::io("write", path))
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes)) {
        Ok(_) => {}
        Err(error) if gone(&error) => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    }
    serde_json::from_slice(&bytes).map(Some).map_err(|error| Error::Record {
        path: path.to_owned(),
        problem: format!("not what vmkit writes there: {error}"),
    })
}

/// Makes a file that says something by being there.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn mark(path: &Path) -> Result<()> {
    step("mark").map_err(Error::io("create", path))?;
    let mut options = OpenOptions::new();
    let made = options.write(true).create(true).truncate(false).mode(0o600).open(path);
    made.map(drop).map_err(Error::io("create", path))
}

/// Removes a file; that it is gone already is success.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn remove(path: &Path) -> Result<()> {
    step("remove a file").map_err(Error::io("remove", path))?;
    match fs::remove_file(path) {
        Err(error) if !gone(&error) => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes a directory of this user alone, with its parents.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn make_dir(path: &Path) -> Result<()> {
    step("make a directory").map_err(Error::io("create", path))?;
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::io("create", path))
}

/// Removes all that this backend may have made in a VM's directory, and the directory when nothing else is in it.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn remove_all(layout: &Layout, data_disks: usize) -> Result<()> {
    let mut files = layout.files(data_disks);
    // The claim and the locks: they go when the server's directory has gone.
    let last = files.split_off(files.len() - 3);
    files.iter().try_for_each(|file| remove(file))?;
    remove_dir(&layout.server_dir())?;
    last.iter().try_for_each(|file| remove(file))?;
    remove_dir(&layout.work)
}

/// Removes a directory; one that somebody else's files lie in stays.
fn remove_dir(path: &Path) -> Result<()> {
    step("remove a directory").map_err(Error::io("remove", path))?;
    match fs::remove_dir(path) {
        Err(error) if !gone(&error) && error.kind() != io::ErrorKind::DirectoryNotEmpty => {
            Err(Error::io("remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}
