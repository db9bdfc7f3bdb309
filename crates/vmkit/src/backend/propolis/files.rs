//! The files of a VM: who owns the directory and what was created for it, where its server listens,
//! which changes were requested.

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

/// A limit well above the size of a claim: an id, some paths and commands.
const MOST_BYTES: u64 = 1 << 20;

/// The owner of a directory, and what was created on the host for that VM, or may have been.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OwnerClaim {
    pub(super) id: Uuid,
    /// The options of the VM when it was created: later changes of the backend's defaults don't
    /// affect it.
    pub(super) options: PropolisOptions,
    /// What was created, in order.
    pub(super) steps: Vec<HostStep>,
    /// What a change of the VM is creating, which may exist or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) pending: Vec<HostStep>,
    /// The size of the image.
    pub(super) image_bytes: u64,
    /// The directory's absolute path; if a claim names another one, it was moved or copied here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) work: Option<PathBuf>,
    /// Whether the VM's removal has started: some of what was created may be gone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) is_going: bool,
}

impl OwnerClaim {
    /// Returns whether the root disk is a copy in this directory.
    pub(super) fn has_copy(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, HostStep::Copy { .. }))
    }

    /// Returns the claim with the paths of all files in this layout's directory, wherever that is
    /// now.
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

    /// Returns the directory of the original VM if this directory is a copy of it and the original
    /// is on this host; `recorded` is the directory according to the VM's record.
    ///
    /// Both directories share what is outside of them: the VM's volumes, its VNIC, its name in the
    /// kernel and at a server. These belong to the original, and the copy must not touch them.
    ///
    /// # Errors
    /// `Io` if the system can't say what is there.
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

/// Returns whether two paths lead to the same directory, for example through a link or another
/// mount.
fn is_one_directory(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|found| (found.dev(), found.ino())).ok();
    one == other || identity(one).is_some_and(|one| identity(other) == Some(one))
}

/// Where the server of the last run listens, and which run that was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ServerFile {
    pub(super) address: SocketAddr,
    /// A new id for each run.
    pub(super) run: Uuid,
    /// Whether the server was asked to run the guest; if not, it may have been asked to create the
    /// VM.
    pub(super) is_begun: bool,
}

/// How long a server may take from the request for a VM until it reports one: it asks its host for
/// CPUID first.
const ASKING_LIMIT: Duration = Duration::from_secs(6);
/// The same for a server at an IPv6 address, which also asks a DNS for Nexus.
const ASKING_LIMIT_V6: Duration = Duration::from_secs(30);

impl ServerFile {
    /// Creates the file of a new run at this server.
    pub(super) fn of_new_run(address: SocketAddr) -> Self {
        Self { address, run: Uuid::new_v4(), is_begun: false }
    }
}

/// Returns the owner of the directory; `None` if the directory has no claim, or the process that
/// wrote it was killed.
///
/// # Errors
/// `Io` if the claim can't be read.
pub(super) fn claim(layout: &PropolisLayout) -> Result<Option<OwnerClaim>> {
    read(&layout.claim()).map(|claim: Option<OwnerClaim>| claim.map(|claim| claim.at(layout)))
}

/// Returns where the server of the last run listens, if a server was asked for anything.
///
/// # Errors
/// `Io` if the file can't be read.
pub(super) fn server(layout: &PropolisLayout) -> Result<Option<ServerFile>> {
    read(&layout.server_file())
}

/// Returns until when a server may still show the VM of an interrupted start; `None` if that time
/// is over, or the VM was seen.
pub(super) fn watched_until(layout: &PropolisLayout, server: &ServerFile) -> Option<Instant> {
    if server.is_begun || has_ended(layout, server) {
        return None;
    }
    let limit = if server.address.is_ipv4() { ASKING_LIMIT } else { ASKING_LIMIT_V6 };
    // The file was written right before the request. If the clock was set back since then, it is
    // regarded as written now.
    let written = fs::metadata(layout.server_file()).and_then(|file| file.modified()).ok()?;
    let passed = SystemTime::now().duration_since(written).unwrap_or_default();
    limit.checked_sub(passed).map(|rest| Instant::now() + rest)
}

/// Returns whether this run was seen to have ended.
pub(super) fn has_ended(layout: &PropolisLayout, server: &ServerFile) -> bool {
    // A file that can't be read says nothing.
    read(&layout.ended_mark()).is_ok_and(|ended: Option<Uuid>| ended == Some(server.run))
}

/// Records that this run has ended: its server forgets that with the next VM, or with its process.
pub(super) fn remember_end(layout: &PropolisLayout, server: &ServerFile) {
    if has_ended(layout, server) {
        return;
    }
    if let Err(error) = write(&layout.ended_mark(), &server.run) {
        tracing::debug!(%error, "cannot record that the run has ended");
    }
}

/// Writes one of these files atomically.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn write(path: &Path, content: &impl Serialize) -> Result<()> {
    replace(path, content, false).map_err(Error::io("write", path))
}

/// Writes one of these files so that it survives a power cut, as the things that it lists do.
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

/// Creates an empty file, whose presence is the information.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn mark(path: &Path) -> Result<()> {
    step("mark").map_err(Error::io("create", path))?;
    let mut options = OpenOptions::new();
    let made = options.write(true).create(true).truncate(false).mode(0o600).open(path);
    made.map(drop).map_err(Error::io("create", path))
}

/// Removes all that this backend may have created in a VM's directory, and the directory if it is
/// empty then.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn remove_all(layout: &PropolisLayout, data_disks: usize) -> Result<()> {
    let mut files = layout.files(data_disks);
    // The claim and the locks go after the server's directory.
    let last = files.split_off(files.len() - 3);
    files.iter().try_for_each(|file| remove_file(file))?;
    remove_whole(&layout.server_dir())?;
    last.iter().try_for_each(|file| remove_file(file))?;
    remove_dir(&layout.work)
}

/// Removes a directory of the server with everything in it, such as a core dump.
fn remove_whole(path: &Path) -> Result<()> {
    step("remove a directory").map_err(Error::io("remove", path))?;
    match fs::remove_dir_all(path) {
        Err(error) if !is_gone(&error) => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
