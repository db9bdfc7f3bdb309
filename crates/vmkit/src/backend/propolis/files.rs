//! What a VM has in its directory: whose it is and what was made for it, where its server listens,
//! what was asked.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use super::layout::PropolisLayout;
use super::options::PropolisOptions;
use super::plan::HostStep;
use crate::backend::supervise::files::{is_gone, remove_dir, remove_file};
use crate::backend::supervise::unfinished;
use crate::error::{Error, Result};
use crate::steps::step;

/// More than a claim has: an id, some paths and commands.
const MOST_BYTES: u64 = 1 << 20;

/// Says whose a directory is, and what was made on the host for that VM, or may have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OwnerClaim {
    pub(super) id: Uuid,
    /// What the VM asked for when it was made: what the backend's defaults were then stays true for
    /// it.
    pub(super) options: PropolisOptions,
    /// What was made, in order.
    pub(super) steps: Vec<HostStep>,
    /// What is being made for a VM that was changed since, and may be there or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) pending: Vec<HostStep>,
    /// How large the image was.
    pub(super) image_bytes: u64,
    /// Where the directory lies, absolute; a claim that names another one came here by a move or a
    /// copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) work: Option<PathBuf>,
    /// Whether the VM's removal was begun: some of what was made may be gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) is_going: bool,
}

impl OwnerClaim {
    /// Returns whether the root disk is a copy that was made here.
    pub(super) fn has_copy(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, HostStep::Copy { .. }))
    }

    /// Returns the same with all files of the VM where this layout has them: they lie in its
    /// directory, wherever that is now.
    fn at(mut self, layout: &PropolisLayout) -> Self {
        for step in self.steps.iter_mut().chain(&mut self.pending) {
            if let HostStep::Copy { path, .. } | HostStep::Blank { path, .. } = step
                && let Some(name) = path.file_name()
            {
                *path = layout.work.join(name);
            }
        }
        self
    }

    /// Returns the directory of the VM of which the one in this directory is a copy, where there is
    /// such a VM on this host; `recorded` is where the VM's record says that it was made.
    ///
    /// Two directories of one VM share what lies outside of them: its volumes, its VNIC, its name
    /// in the kernel and at a server. These are the original's, and not to be touched from the
    /// copy.
    ///
    /// # Errors
    /// `Io` where the system does not tell what lies there.
    pub(super) fn original(
        &self,
        layout: &PropolisLayout,
        recorded: Option<PathBuf>,
    ) -> Result<Option<PathBuf>> {
        let Some(work) = self.work.clone().or(recorded) else { return Ok(None) };
        if is_one_directory(&work, &layout.work) {
            return Ok(None);
        }
        let there = claim(&PropolisLayout { work: work.clone() })?;
        Ok(there.is_some_and(|there| there.id == self.id).then_some(work))
    }
}

/// Returns whether two paths lead to one directory, as through a link or another mount.
fn is_one_directory(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino())).ok();
    one == other || identity(one).is_some_and(|one| identity(other) == Some(one))
}

/// Says where the server of the last run listens, and which run that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ServerFile {
    pub(super) address: SocketAddr,
    /// Another one for each run.
    pub(super) run: Uuid,
    /// Whether the server was told to run the guest; else it may have been asked to make the VM,
    /// and no more.
    pub(super) is_begun: bool,
}

/// How long a server may take from being asked for a VM until it says that there is one: it asks
/// its host for CPUID first.
const ASKING_LIMIT: Duration = Duration::from_secs(6);
/// The same of one that listens at an IPv6 address, which asks a DNS for Nexus besides.
const ASKING_LIMIT_V6: Duration = Duration::from_secs(30);

impl ServerFile {
    /// Begins a run at this server.
    pub(super) fn of_new_run(address: SocketAddr) -> Self {
        Self { address, run: Uuid::new_v4(), is_begun: false }
    }
}

/// Returns whose the directory is; `None` where nobody has claimed it, or was killed while it did.
///
/// # Errors
/// `Io` where it can't be read.
pub(super) fn claim(layout: &PropolisLayout) -> Result<Option<OwnerClaim>> {
    read(&layout.claim()).map(|claim: Option<OwnerClaim>| claim.map(|claim| claim.at(layout)))
}

/// Returns where the server of the last run listens, if one was asked for anything.
///
/// # Errors
/// `Io` where it can't be read.
pub(super) fn server(layout: &PropolisLayout) -> Result<Option<ServerFile>> {
    read(&layout.server_file())
}

/// Returns until when a server may yet show the VM of this run, which a start was cut off in asking
/// for; `None` where that is over, or the VM was seen.
pub(super) fn watched_until(layout: &PropolisLayout, server: &ServerFile) -> Option<Instant> {
    if server.is_begun || has_ended(layout, server) {
        return None;
    }
    let limit = if server.address.is_ipv4() { ASKING_LIMIT } else { ASKING_LIMIT_V6 };
    // Written right before the server is asked. Where the clock was set back since, it counts as
    // written now.
    let written = fs::metadata(layout.server_file()).and_then(|file| file.modified()).ok()?;
    let passed = SystemTime::now().duration_since(written).unwrap_or_default();
    limit.checked_sub(passed).map(|rest| Instant::now() + rest)
}

/// Returns whether somebody has seen this run end.
pub(super) fn has_ended(layout: &PropolisLayout, server: &ServerFile) -> bool {
    // What can't be read tells nothing.
    read(&layout.ended_mark()).is_ok_and(|ended: Option<Uuid>| ended == Some(server.run))
}

/// Remembers that this run was seen to end: its server forgets that, with the next VM or with its
/// process.
pub(super) fn remember_end(layout: &PropolisLayout, server: &ServerFile) {
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
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Error::record(path, "not what vmkit writes there").with_source(error))
}

/// Creates a file that says something by being there.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn mark(path: &Path) -> Result<()> {
    step("mark").map_err(Error::io("create", path))?;
    let mut options = OpenOptions::new();
    let made = options.write(true).create(true).truncate(false).mode(0o600).open(path);
    made.map(drop).map_err(Error::io("create", path))
}

/// Removes all that this backend may have made in a VM's directory, and the directory when nothing
/// else is in it.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn remove_all(layout: &PropolisLayout, data_disks: usize) -> Result<()> {
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
