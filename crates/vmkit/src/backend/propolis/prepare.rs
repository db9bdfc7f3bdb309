//! Inspecting the host for a VM, applying its plan, and undoing that.

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
use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::handle::BackendTag;
use crate::image::{ImageFormat, inspect_for};
use crate::spec::{DataDisk, Mib, VmSpec};
use crate::steps::step;

/// The size of a disk's sectors in bytes; the size of a disk is a multiple of it.
const SECTOR_BYTES: u64 = 512;

/// Returns the size of the root disk's image; 0 if it is on the host of a server elsewhere.
///
/// # Errors
/// `InvalidInput` on `image` if it does not exist, or is not a raw disk.
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
            said.trim().parse().map_err(|_| refused("not the snapshot of a volume"))
        }
    }
}

/// Returns whether a path is on the host of a server elsewhere.
///
/// A server at a loopback address is usually on this host, but the address may be the end of a
/// tunnel: a path that does not exist here is regarded as one of the other host.
pub(super) fn is_there(path: &Path, options: &PropolisOptions) -> bool {
    options.address.is_some_and(|address| !address.ip().is_loopback() || !path.exists())
}

/// Checks the existing data disks; for a server elsewhere, only those that are on this host.
///
/// # Errors
/// `InvalidInput` on `image` if one does not exist, or is not a raw disk.
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

/// Why `prepare` failed, and whether everything before was undone.
pub(super) struct NotMade {
    pub(super) error: Error,
    pub(super) is_undone: bool,
}

/// Applies the steps of a claim. On an error everything but the claim is undone.
///
/// # Errors
/// `Host` with what a program printed.
pub(super) async fn make(
    host: &HostPrograms,
    claim: &OwnerClaim,
    hold: &OperationLock,
) -> Result<(), NotMade> {
    for (index, one) in claim.steps.iter().enumerate() {
        let Err(StepFailure { error, touched }) = carry_out(host, one, hold).await else { continue };
        if touched == StepTrace::Unknown {
            // The claim lists what the program may still create.
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

/// Why a step failed.
struct StepFailure {
    error: Error,
    touched: StepTrace,
}

/// Whether a failed step has left something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StepTrace {
    No,
    Perhaps,
    /// Its program still runs.
    Unknown,
}

async fn carry_out(host: &HostPrograms, one: &HostStep, hold: &OperationLock) -> Result<(), StepFailure> {
    let touched = |error| StepFailure { error, touched: StepTrace::Perhaps };
    match one {
        HostStep::Command { run, .. } => {
            // A missing program has created nothing, and could not undo it.
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
/// `Host` with what a program printed.
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

/// Changes what was created for a VM as its plan says: another network, a larger disk.
///
/// What is added is in the claim before it is created, so that `destroy` finds it; what is removed
/// stays in the claim until it is gone. An interrupted change is done again from its start.
///
/// # Errors
/// `Host` with what a program printed, `Io`.
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
            // A changed plan has no other steps.
            HostStep::Copy { size: None, .. } | HostStep::Blank { .. } => {}
        }
    }
    let done = OwnerClaim { steps: shape.steps.clone(), pending: Vec::new(), ..begun };
    files::write_synced(&layout.claim(), &done)
}

/// Grows a disk that is a file; one that is already larger stays as it is.
fn grow(path: &Path, size: Mib) -> Result<()> {
    step("start: grow a disk").map_err(Error::io("grow", path))?;
    let grown = OpenOptions::new().write(true).open(path).and_then(|file| match file.metadata()?.len() {
        bytes if bytes < size.bytes() => file.set_len(size.bytes()),
        _ => Ok(()),
    });
    grown.map_err(Error::io("grow", path))
}

/// Undoes steps in reverse order. A step that is already undone is success, and one that can't be
/// undone does not prevent the others.
///
/// # Errors
/// The first.
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

/// Removes a VM that a killed server left in the kernel.
///
/// # Errors
/// `Host` with what the program printed.
pub(super) async fn destroy_kernel_vm(host: &HostPrograms, entry: &Path, hold: &OperationLock) -> Result<()> {
    let Some(name) = entry.file_name().filter(|_| entry.exists()) else { return Ok(()) };
    let run = vec!["bhyvectl".to_owned(), "--destroy".to_owned(), format!("--vm={}", name.to_string_lossy())];
    match host.change(&run, hold).await? {
        ProgramEnd::Failed(_) if !entry.exists() => Ok(()),
        done => done.well(&run).map(drop),
    }
}

/// Copies a raw image on a thread, which holds the operation's lock until it is done, even if the
/// caller is gone.
async fn copy(image: &Path, path: &Path, size: Option<Mib>, hold: &OperationLock) -> Result<()> {
    step("prepare: copy").map_err(Error::io("create", path))?;
    let lock = hold.as_input().map_err(Error::io("create", path))?;
    let (from, to) = (image.to_owned(), path.to_owned());
    let copied: io::Result<()> = blocking(move || {
        let _lock = lock;
        let mut source = File::open(&from)?;
        let mut target = create(&to)?;
        let bytes = io::copy(&mut source, &mut target)?.next_multiple_of(SECTOR_BYTES);
        target.set_len(size.map_or(bytes, |size| size.bytes().max(bytes)))
    })
    .await?;
    copied.map_err(Error::io("copy to", path))
}

fn blank(path: &Path, size: Mib) -> Result<()> {
    step("prepare: create a disk").map_err(Error::io("create", path))?;
    create(path).and_then(|file| file.set_len(size.bytes())).map_err(Error::io("create", path))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Removes the files of a VM, but nothing that the host's programs created.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn remove_files(spec: &VmSpec, layout: &PropolisLayout) -> Result<()> {
    files::remove_all(layout, spec.data_disks().len())
}

/// Removes the files of a failed `prepare`, but for the claim if something could not be undone.
pub(super) fn give_up(spec: &VmSpec, layout: &PropolisLayout) {
    if let Err(error) = remove_files(spec, layout) {
        tracing::warn!(work = %layout.work.display(), %error, "could not undo a failed prepare; destroy will");
    }
}

/// Removes the directory of a VM that was never created, if it is empty.
pub(super) fn remove_unclaimed(layout: &PropolisLayout) {
    // The directory belongs to another process, or the next operation removes it.
    let _ = std::fs::remove_dir(&layout.work);
}
