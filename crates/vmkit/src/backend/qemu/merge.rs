//! Merging layers that no snapshot needs any more into the disks and layers over them.
//!
//! What is copied is what the layer has and the one over it does not; then that is over the next
//! one below, and the layer is removed. Interrupted anywhere, each disk has the same content. QEMU
//! merges into the disks that it has open, and `qemu-img` into all others.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::layers::{self, LayerId, OwnDisk};
use super::layout::QemuLayout;
use super::qmp::client::QmpClient;
use super::snapshot_files;
use crate::backend::supervise::files::remove_file;
use crate::backend::supervise::unfinished;
use crate::blocking::blocking;
use crate::error::{Error, Result};
use crate::host::inherited::child_problem;
use crate::image::{Backing, backing};
use crate::steps::step;

/// The program that merges layers which QEMU does not have open.
pub(super) const PROGRAM: &str = "qemu-img";
/// What a merge needs without data.
const LIMIT: Duration = Duration::from_secs(60);
/// The slowest disk that is waited for, in bytes per second.
const SLOWEST: u64 = 10 << 20;

/// How many layers a disk may have below it before those are merged, too, that other VMs have as
/// well: merged, their data is there twice.
pub(super) const SHARED_LAYERS: usize = 16;

/// What merges layers.
pub(super) struct Merger<'a> {
    /// Where `qemu-img` is, if the host has it.
    pub(super) program: Option<PathBuf>,
    /// The monitor of the QEMU that has the disks open, if one has.
    pub(super) live: Option<&'a mut QmpClient>,
}

impl Merger<'_> {
    /// Removes the layers that no snapshot has, and no other VM. One that a running QEMU can't
    /// merge stays until the VM does not run.
    ///
    /// # Errors
    /// `Host` without `qemu-img`, or if that fails; `Io`; those of the monitor. What was merged so
    /// far is.
    pub(super) async fn collect(&mut self, layout: &QemuLayout, disks: &[OwnDisk]) -> Result<()> {
        let records = snapshot_files::records(layout)?;
        let used: BTreeSet<LayerId> = records.into_iter().map(|record| record.layer).collect();
        for disk in disks {
            let keeps_shared = disk.chain()?.len() < SHARED_LAYERS;
            for id in disk.layers()?.iter().filter(|id| !used.contains(id)) {
                if keeps_shared && disk.is_shared(id)? {
                    continue;
                }
                self.merge(disk, id).await?;
            }
        }
        Ok(())
    }

    async fn merge(&mut self, disk: &OwnDisk, id: &LayerId) -> Result<()> {
        let layer = disk.layer(id);
        let below = backing(&layer)?;
        let files: Vec<Option<LayerId>> =
            std::iter::once(None).chain(disk.chain()?.into_iter().map(Some)).collect();
        for over in disk.over(id)? {
            let file = over.as_ref().map_or_else(|| disk.path.clone(), |id| disk.layer(id));
            let place = files.iter().position(|file| *file == over);
            match (&mut self.live, place) {
                // QEMU would write to it.
                (Some(_), Some(_)) if over.as_ref().map_or(Ok(false), |over| disk.is_shared(over))? => {
                    tracing::info!(path = %file.display(), "another VM has this layer, too: it is merged when the VM does not run");
                    return Ok(());
                }
                (Some(qmp), Some(place)) => {
                    let deadline = deadline(layers::space(&layer));
                    let top = qmp.node_of(&disk.device, deadline).await?;
                    let nodes = qmp.chain_of(&top, deadline).await?;
                    // The files and the nodes differ after an interrupted snapshot, and QEMU can't
                    // open the disk of its command line again once that name is another file's.
                    let is_open_by_name = place == 0 || nodes.get(place) != Some(&disk.device);
                    let expected = files.len() + usize::from(has_image(disk, &files)?);
                    if nodes.len() != expected || !is_open_by_name {
                        tracing::info!(path = %layer.display(), "this layer is merged when the VM does not run");
                        return Ok(());
                    }
                    let base = below
                        .as_ref()
                        .and_then(|below| Some((nodes.get(place + 2)?.as_str(), below.name.to_str()?)));
                    step("snapshot: merge a layer").map_err(Error::io("write", &file))?;
                    qmp.stream(&nodes[place], base, deadline).await?;
                    qmp.forget_node(&nodes[place + 1], deadline).await;
                }
                _ => self.rebase(&file, below.as_ref(), layers::space(&layer)).await?,
            }
        }
        disk.remove_layer(id)
    }

    /// Merges the layer below a file that no process has open into that file.
    async fn rebase(&self, file: &Path, below: Option<&Backing>, bytes: u64) -> Result<()> {
        // Another VM may have this layer, too.
        if fs::metadata(file).map_err(Error::io("examine", file))?.nlink() == 1 {
            return self.rebase_in_place(file, below, bytes).await;
        }
        let target = unfinished(file);
        copy(file, &target).await?;
        if let Err(error) = self.rebase_in_place(&target, below, bytes).await {
            remove_file(&target)?;
            return Err(error);
        }
        step("snapshot: replace a layer")
            .and_then(|()| fs::rename(&target, file))
            .map_err(Error::io("rename", file))
    }

    /// Replaces a disk that is empty, over layers that another VM has, too, by a copy of these over
    /// their image alone.
    ///
    /// # Errors
    /// As [`collect`](Self::collect); then the disk is as it was.
    pub(super) async fn detach(&self, disk: &OwnDisk) -> Result<()> {
        let chain = disk.chain()?;
        let (Some(top), Some(lowest)) = (chain.first(), chain.last()) else { return Ok(()) };
        let target = unfinished(&disk.path);
        copy(&disk.layer(top), &target).await?;
        if top != lowest {
            let image = backing(&disk.layer(lowest))?;
            let bytes = chain.iter().map(|id| layers::space(&disk.layer(id))).sum();
            self.rebase_in_place(&target, image.as_ref(), bytes).await?;
        }
        let (file, path) = (target.clone(), disk.path.clone());
        step("clone: sync a disk").map_err(Error::io("sync", &path))?;
        blocking(move || File::open(file)?.sync_all()).await?.map_err(Error::io("sync", &path))?;
        step("clone: replace a disk")
            .and_then(|()| fs::rename(&target, &path))
            .map_err(Error::io("rename", &path))?;
        chain.iter().try_for_each(|id| disk.remove_layer(id))
    }

    async fn rebase_in_place(&self, file: &Path, below: Option<&Backing>, bytes: u64) -> Result<()> {
        let program = self.program.as_ref().ok_or_else(missing)?;
        step("snapshot: merge a layer").map_err(Error::io("write", file))?;
        let mut command = tokio::process::Command::new(program);
        command.args(["rebase", "-q", "-f", "qcow2"]);
        match below {
            Some(below) => command.arg("-F").arg(&below.format).arg("-b").arg(&below.name),
            None => command.args(["-b", ""]),
        };
        command.arg(file).env_clear().stdin(Stdio::null()).kill_on_drop(true);
        let failed = |problem: String| {
            Error::host(PROGRAM, format!("cannot merge layers of {}: {problem}", file.display()))
        };
        let output = timeout_at(deadline(bytes), command.output()).await;
        let output = output.map_err(|_| Error::timed_out("qemu-img to merge layers of a disk", LIMIT))?;
        let output = output.map_err(|error| failed(child_problem(&error)))?;
        match output.status.success() {
            true => Ok(()),
            false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
        }
    }
}

/// Copies a layer.
async fn copy(from: &Path, to: &Path) -> Result<()> {
    step("snapshot: copy a layer").map_err(Error::io("copy", from))?;
    let (layer, target) = (from.to_owned(), to.to_owned());
    blocking(move || fs::copy(layer, target)).await?.map(drop).map_err(Error::io("copy", from))
}

/// Returns whether the lowest layer of a disk is over an image.
fn has_image(disk: &OwnDisk, files: &[Option<LayerId>]) -> Result<bool> {
    let lowest = files.last().and_then(Option::as_ref);
    let lowest = lowest.map_or_else(|| disk.path.clone(), |id| disk.layer(id));
    Ok(backing(&lowest)?.is_some())
}

/// Returns the error for a host without the program.
pub(super) fn missing() -> Error {
    Error::host(
        PROGRAM,
        "the program is not installed, and only it merges the disks of a VM that does not run: install qemu-utils",
    )
}

fn deadline(bytes: u64) -> Instant {
    Instant::now() + LIMIT + Duration::from_secs(bytes / SLOWEST)
}
