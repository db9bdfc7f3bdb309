//! Looking at the host for a VM, making what its plan says, and undoing it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::files::{self, OwnerClaim};
use super::hold::OperationLock;
use super::host::{HostPrograms, ProgramEnd};
use super::layout::PropolisLayout;
use super::options::{PropolisOptions, ZfsSnapshot};
use super::plan::{HostStep, StepDiff};
use crate::backend::supervise::files::remove_file;
use crate::error::{Error, Result};
use crate::handle::BackendTag;
use crate::image::{ImageFormat, inspect_for};
use crate::spec::{DataDisk, Mib, VmSpec};
use crate::steps::step;

/// The size of a disk's sectors in bytes; a disk has whole ones.
const SECTOR_BYTES: u64 = 512;

/// Returns the size of the root disk's image; 0 where it lies on the host of a server elsewhere.
///
/// # Errors
/// `InvalidInput` on `image` where it is not there, or is no raw disk.
pub(super) async fn image_bytes(
    spec: &VmSpec,
    options: &PropolisOptions,
    host: &HostPrograms,
) -> Result<u64> {
    let Some(disk) = spec.disk().filter(|disk| !is_there(&disk.image, options)) else { return Ok(0) };
    let Some(snapshot) = ZfsSnapshot::of(&disk.image)? else {
        return raw_bytes("image", &disk.image);
    };
    let refused = |why: &str| Error::invalid("image", disk.image.display(), why);
    let words = ["zfs", "get", "-H", "-p", "-o", "value", "volsize", snapshot.as_str()];
    match host.ask(&words).await? {
        ProgramEnd::Failed(why) => Err(refused(&why)),
        done => {
            let said = done.well(&words.map(str::to_owned))?;
            said.trim().parse().map_err(|_| refused("this is not the snapshot of a volume"))
        }
    }
}

/// Returns whether a path is one of the host on which a server elsewhere runs.
///
/// One at a loopback address runs on this host, as a rule; but it may be the end of a tunnel, so
/// that what is not here counts as there.
pub(super) fn is_there(path: &Path, options: &PropolisOptions) -> bool {
    options.address.is_some_and(|address| !address.ip().is_loopback() || !path.exists())
}

/// Checks the further disks that exist already; of a server elsewhere only those that are here can
/// be looked at.
///
/// # Errors
/// `InvalidInput` on `image` where one is not there, or is no raw disk.
pub(super) fn check_disks(spec: &VmSpec, options: &PropolisOptions) -> Result<()> {
    for disk in spec.data_disks() {
        let DataDisk::Existing { path, .. } = disk else { continue };
        let is_device = path.metadata().is_ok_and(|found| !found.is_file() && !found.is_dir());
        if is_there(path, options) || is_device {
            continue;
        }
        raw_bytes("data-disk", path)?;
    }
    Ok(())
}

fn raw_bytes(field: &'static str, path: &Path) -> Result<u64> {
    let facts = inspect_for(field, path)?;
    if facts.format == ImageFormat::Raw {
        return Ok(facts.virtual_size_bytes);
    }
    Err(Error::WrongFormat {
        field,
        path: path.to_owned(),
        found: facts.format,
        backend: BackendTag::Propolis,
    })
}

/// What could not be made, and whether all that was made before is gone again.
pub(super) struct NotMade {
    pub(super) error: Error,
    pub(super) is_undone: bool,
}

/// Creates what a claim says. On an error all that was made is undone, but for the claim.
///
/// # Errors
/// `Host` with what a program said.
pub(super) async fn make(
    host: &HostPrograms,
    claim: &OwnerClaim,
    hold: &OperationLock,
) -> Result<(), NotMade> {
    for (index, one) in claim.steps.iter().enumerate() {
        let Err(StepFailure { error, touched }) = carry_out(host, one, hold).await else { continue };
        if touched == StepTrace::Unknown {
            // Whatever it makes yet, the claim is what it is found by.
            return Err(NotMade { error, is_undone: false });
        }
        let made = &claim.steps[..index + usize::from(touched == StepTrace::Perhaps)];
        let undone = undo(host, made, hold).await;
        if let Err(undo) = &undone {
            tracing::warn!(%undo, "could not undo a failed prepare; destroy will");
        }
        return Err(NotMade { error, is_undone: undone.is_ok() });
    }
    Ok(())
}

/// Why a step was not done.
struct StepFailure {
    error: Error,
    touched: StepTrace,
}

/// Whether a step that was not done has left something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StepTrace {
    No,
    Perhaps,
    /// It is still at work.
    Unknown,
}

async fn carry_out(host: &HostPrograms, one: &HostStep, hold: &OperationLock) -> Result<(), StepFailure> {
    let touched = |error| StepFailure { error, touched: StepTrace::Perhaps };
    match one {
        HostStep::Command { run, .. } => {
            // A program that is not there has made nothing, and could not undo it.
            host.line(run).map_err(|error| StepFailure { error, touched: StepTrace::No })?;
            let done = host.change(run, hold).await.map_err(touched)?;
            let touched = match &done {
                ProgramEnd::Endless => StepTrace::Unknown,
                done if done.is_there() => StepTrace::No,
                _ => StepTrace::Perhaps,
            };
            done.well(run).map(drop).map_err(|error| StepFailure { error, touched })
        }
        HostStep::Copy { image, path, size } => copy(image, path, *size, hold).await.map_err(touched),
        HostStep::Blank { path, size } => blank(path, *size).map_err(touched),
    }
}

/// Does again what a reboot has undone.
///
/// # Errors
/// `Host` with what a program said.
pub(super) async fn make_again(host: &HostPrograms, shape: &StepDiff, hold: &OperationLock) -> Result<()> {
    for one in &shape.again {
        if let HostStep::Command { run, .. } = one {
            run_unless_there(host, run, hold).await?;
        }
    }
    Ok(())
}

async fn run_unless_there(host: &HostPrograms, run: &[String], hold: &OperationLock) -> Result<()> {
    match host.change(run, hold).await? {
        done if done.is_there() => Ok(()),
        done => done.well(run).map(drop),
    }
}

/// Changes what was made for a VM as its plan says: another network, a larger disk.
///
/// What comes stands in the claim before it is made, so that `destroy` finds it; what goes stands
/// there until it is gone. A reshaping that was cut off is done again from its beginning.
///
/// # Errors
/// `Host` with what a program said, `Io`.
pub(super) async fn reshape(
    host: &HostPrograms,
    layout: &PropolisLayout,
    claim: &OwnerClaim,
    shape: &StepDiff,
    hold: &OperationLock,
) -> Result<()> {
    if shape.is_none() && claim.pending.is_empty() {
        return Ok(());
    }
    let begun = OwnerClaim { pending: shape.pending.clone(), ..claim.clone() };
    files::write_synced(&layout.claim(), &begun)?;
    undo(host, &shape.going, hold).await?;
    for one in &shape.coming {
        match one {
            HostStep::Command { run, .. } => run_unless_there(host, run, hold).await?,
            HostStep::Copy { path, size: Some(size), .. } => grow(path, *size)?,
            // Reshaping has no other.
            HostStep::Copy { size: None, .. } | HostStep::Blank { .. } => {}
        }
    }
    let done = OwnerClaim { steps: shape.steps.clone(), pending: Vec::new(), ..begun };
    files::write_synced(&layout.claim(), &done)
}

/// Grows a disk that is a file; one that is larger already stays.
fn grow(path: &Path, size: Mib) -> Result<()> {
    step("start: grow a disk").map_err(Error::io("grow", path))?;
    let grown = OpenOptions::new().write(true).open(path).and_then(|file| match file.metadata()?.len() {
        bytes if bytes < size.bytes() => file.set_len(size.bytes()),
        _ => Ok(()),
    });
    grown.map_err(Error::io("grow", path))
}

/// Undoes steps, from the last to the first; what is gone already is success. One that can't be
/// undone keeps none of the others from it.
///
/// # Errors
/// The first that came up.
pub(super) async fn undo(host: &HostPrograms, steps: &[HostStep], hold: &OperationLock) -> Result<()> {
    let mut outcome = Ok(());
    for one in steps.iter().rev() {
        let undone = match one {
            HostStep::Command { undo: Some(undo), .. } => take_away(host, undo, hold).await,
            HostStep::Command { undo: None, .. } => Ok(()),
            HostStep::Copy { path, .. } | HostStep::Blank { path, .. } => remove_file(path),
        };
        outcome = outcome.and(undone);
    }
    outcome
}

async fn take_away(host: &HostPrograms, undo: &[String], hold: &OperationLock) -> Result<()> {
    match host.change(undo, hold).await? {
        done if done.is_gone() => Ok(()),
        done => done.well(undo).map(drop),
    }
}

/// Takes away a VM that a killed server left in the kernel.
///
/// # Errors
/// `Host` with what the program said.
pub(super) async fn destroy_kernel_vm(host: &HostPrograms, entry: &Path, hold: &OperationLock) -> Result<()> {
    let Some(name) = entry.file_name().filter(|_| entry.exists()) else { return Ok(()) };
    let run = vec!["bhyvectl".to_owned(), "--destroy".to_owned(), format!("--vm={}", name.to_string_lossy())];
    match host.change(&run, hold).await? {
        ProgramEnd::Failed(_) if !entry.exists() => Ok(()),
        done => done.well(&run).map(drop),
    }
}

/// Copies a raw image on a thread, which holds the operation's lock until it is done, whoever waits
/// for it.
async fn copy(image: &Path, path: &Path, size: Option<Mib>, hold: &OperationLock) -> Result<()> {
    step("prepare: copy").map_err(Error::io("create", path))?;
    let lock = hold.as_input().map_err(Error::io("create", path))?;
    let (from, to) = (image.to_owned(), path.to_owned());
    let copied = tokio::task::spawn_blocking(move || {
        let _lock = lock;
        let mut source = File::open(&from)?;
        let mut target = create(&to)?;
        let bytes = io::copy(&mut source, &mut target)?.next_multiple_of(SECTOR_BYTES);
        target.set_len(size.map_or(bytes, |size| size.bytes().max(bytes)))
    });
    copied.await.map_err(io::Error::other).flatten().map_err(Error::io("copy to", path))
}

fn blank(path: &Path, size: Mib) -> Result<()> {
    step("prepare: make a disk").map_err(Error::io("create", path))?;
    create(path).and_then(|file| file.set_len(size.bytes())).map_err(Error::io("create", path))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Removes everything of a VM but what the host's programs made.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn remove_files(spec: &VmSpec, layout: &PropolisLayout) -> Result<()> {
    files::remove_all(layout, spec.data_disks().len())
}

/// Removes the files of a `prepare` that failed, the claim among them unless something could not be
/// undone.
pub(super) fn give_up(spec: &VmSpec, layout: &PropolisLayout) {
    if let Err(error) = remove_files(spec, layout) {
        tracing::warn!(work = %layout.work.display(), %error, "could not undo a failed prepare; destroy will");
    }
}

/// Removes the directory of a VM that was never begun, if nothing is in it.
pub(super) fn remove_unclaimed(layout: &PropolisLayout) {
    // What lies there is somebody else's, or the next one's to remove.
    let _ = std::fs::remove_dir(&layout.work);
}
