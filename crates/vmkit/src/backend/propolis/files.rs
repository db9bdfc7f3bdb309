//! What a VM has in its directory: whose it is and what was made for it, where its server listens, what was asked.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::layout::Layout;
use super::options::Options;
use super::plan::HostStep;
use crate::backend::supervise::files::{is_gone, remove_dir, remove_file};
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
    /// What is being made for a VM that was changed since, and may be there or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) pending: Vec<HostStep>,
    /// How large the image was.
    pub(super) image_bytes: u64,
}

impl Claim {
    /// Tells whether the root disk is a copy that was made here.
    pub(super) fn has_copy(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, HostStep::Copy { .. }))
    }
}

/// Says where the server of the last run listens, and which run that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ServerFile {
    pub(super) address: SocketAddr,
    /// Another one for each run.
    pub(super) run: Uuid,
    /// Whether the server was told to run the guest; else it may have been asked to make the VM, and no more.
    pub(super) is_begun: bool,
}

impl ServerFile {
    /// Begins a run at this server.
    pub(super) fn of_new_run(address: SocketAddr) -> Self {
        Self { address, run: Uuid::new_v4(), is_begun: false }
    }
}

/// Answers whose the directory is; `None` where nobody has claimed it, or was killed while it did.
///
/// # Errors
/// `Io` where it can't be read.
pub(super) fn claim(layout: &Layout) -> Result<Option<Claim>> {
    read(&layout.claim())
}

/// Answers where the server of the last run listens, if one was asked for anything.
///
/// # Errors
/// `Io` where it can't be read.
pub(super) fn server(layout: &Layout) -> Result<Option<ServerFile>> {
    read(&layout.server_file())
}

/// Tells whether something of the last run may still be at its server, for all that this host knows.
///
/// # Errors
/// `Io` where it can't be read.
pub(super) fn may_run(layout: &Layout) -> Result<bool> {
    Ok(server(layout)?.is_some_and(|server| !has_ended(layout, &server)))
}

/// Tells whether somebody has seen this run end.
pub(super) fn has_ended(layout: &Layout, server: &ServerFile) -> bool {
    // What can't be read tells nothing.
    read(&layout.ended_mark()).is_ok_and(|ended: Option<Uuid>| ended == Some(server.run))
}

/// Remembers that this run was seen to end: its server forgets that, with the next VM or with its process.
pub(super) fn remember_end(layout: &Layout, server: &ServerFile) {
    if has_ended(layout, server) {
        return;
    }
    if let Err(error) = write(&layout.ended_mark(), &server.run) {
        tracing::debug!(%error, "that the run has ended can't be kept");
    }
}

/// Writes one of these files, whole or not at all.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn write(path: &Path, content: &impl Serialize) -> Result<()> {
    replace(path, content, false).map_err(Error::io("write", path))
}

/// Writes one of these files so that it outlives a power cut: what it tells of does.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn write_synced(path: &Path, content: &impl Serialize) -> Result<()> {
    replace(path, content, true).map_err(Error::io("write", path))
}

fn replace(path: &Path, content: &impl Serialize, synced: bool) -> io::Result<()> {
    let bytes = serde_json::to_vec(content).expect("plain data of UTF-8 paths");
    let temporary = unfinished(path);
    step("write a file")?;
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&bytes)?;
    if synced {
        step("sync a file")?;
        file.sync_all()?;
    }
    step("rename a file")?;
    fs::rename(&temporary, path)?;
    if let Some(dir) = path.parent().filter(|_| synced) {
        step("sync a directory")?;
        File::open(dir)?.sync_all()?;
        File::open(dir.parent().unwrap_or(dir))?.sync_all()?;
    }
    Ok(())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes)) {
        Ok(_) => {}
        Err(error) if is_gone(&error) => return Ok(None),
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

/// Removes all that this backend may have made in a VM's directory, and the directory when nothing else is in it.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn remove_all(layout: &Layout, data_disks: usize) -> Result<()> {
    let mut files = layout.files(data_disks);
    // The claim and the locks: they go when the server's directory has gone.
    let last = files.split_off(files.len() - 3);
    files.iter().try_for_each(|file| remove_file(file))?;
    remove_whole(&layout.server_dir())?;
    last.iter().try_for_each(|file| remove_file(file))?;
    remove_dir(&layout.work)
}

/// Removes a directory of this VM's server with all that this has left there, such as a core dump.
fn remove_whole(path: &Path) -> Result<()> {
    step("remove a directory").map_err(Error::io("remove", path))?;
    match fs::remove_dir_all(path) {
        Err(error) if !is_gone(&error) => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
