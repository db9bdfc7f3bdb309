//! The disks of a VM and the layers below them: what a disk was when a snapshot was taken.
//!
//! ```text
//!  root.qcow2 ─▶ root-7c01….qcow2 ─▶ root-91ab….qcow2 ─▶ the image
//!   the VM writes      snapshot b            snapshot a
//!                          ▲
//!                          └── root-e4d2….qcow2 (snapshot c, taken after a return to b)
//! ```
//!
//! A layer is never written to. Each file names the one below it in its header, by its name in the
//! same directory, and nothing else says what is below what: so at any moment a chain that can be
//! opened is a disk of the VM. To freeze a disk is to give its file a second name, that of the
//! layer, and to put an empty overlay over that in its place: wherever that is interrupted, the
//! content of the disk is the same. Since a layer never changes, another VM may have it, too, by a
//! hard link.
//!
//! A running QEMU opens a file again by the name that it knows, so that must stay the name of this
//! file: QEMU gets the overlay by a name of its own, and only then it becomes the disk.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::layout::QemuLayout;
use crate::backend::supervise::files::{is_gone, remove_file};
use crate::backend::supervise::unfinished;
use crate::error::{Error, Result};
use crate::image::{backing_name, create_overlay_of_layer};
use crate::spec::{DataDisk, VmSpec};
use crate::steps::step;

/// How many layers a disk has at most below it. QEMU opens each at a start, and a read of what no
/// layer has goes through all of them.
const MAX_LAYERS: usize = 64;

/// The name of the layers that were made together, one for each disk of a VM: 12 hexadecimal
/// digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct LayerId(String);

impl LayerId {
    const DIGITS: usize = 12;

    pub(super) fn new() -> Self {
        Self(Uuid::new_v4().simple().to_string()[..Self::DIGITS].to_owned())
    }

    fn parse(text: &str) -> Option<Self> {
        let is_digit = |c: char| matches!(c, '0'..='9' | 'a'..='f');
        (text.len() == Self::DIGITS && text.chars().all(is_digit)).then(|| Self(text.to_owned()))
    }

    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for LayerId {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is no name of a layer"))
    }
}

impl From<LayerId> for String {
    fn from(id: LayerId) -> Self {
        id.0
    }
}

/// A disk that belongs to a VM, which writes to it.
#[derive(Debug, Clone)]
pub(super) struct OwnDisk {
    /// Its device in QEMU has this id, with `-dev` behind it.
    pub(super) device: String,
    /// Its file.
    pub(super) path: PathBuf,
}

/// Returns the disks of a VM in its own directory.
pub(super) fn own_disks(spec: &VmSpec, layout: &QemuLayout) -> Vec<OwnDisk> {
    let root = spec.disk().map(|_| OwnDisk { device: "root".to_owned(), path: layout.root_disk() });
    let data = spec.data_disks().iter().enumerate();
    let data = data.filter(|(_, disk)| matches!(disk, DataDisk::Fresh { .. }));
    let data =
        data.map(|(index, _)| OwnDisk { device: format!("data{index}"), path: layout.data_disk(index) });
    root.into_iter().chain(data).collect()
}

/// Refuses disks that are not the VM's own, and that it writes to, for this reason.
///
/// # Errors
/// `InvalidInput` on `data_disks`.
pub(super) fn refuse_foreign_disks(spec: &VmSpec, why: &str) -> Result<()> {
    let foreign = spec.data_disks().iter().find_map(|disk| match disk {
        DataDisk::Existing { path, readonly: false } => Some(path),
        _ => None,
    });
    foreign.map_or(Ok(()), |path| {
        let why = format!("{why}: attach it read-only, or not at all");
        Err(Error::invalid("data_disks", path.display(), why))
    })
}

impl OwnDisk {
    fn stem(&self) -> &str {
        self.path.file_stem().and_then(OsStr::to_str).unwrap_or_default()
    }

    fn layer_name(&self, id: &LayerId) -> String {
        format!("{}-{}.qcow2", self.stem(), id.as_str())
    }

    /// Returns the file of a layer of this disk.
    pub(super) fn layer(&self, id: &LayerId) -> PathBuf {
        self.path.with_file_name(self.layer_name(id))
    }

    /// Returns which layer of this disk a file is, by its name.
    pub(super) fn id_of(&self, name: &OsStr) -> Option<LayerId> {
        let rest = name.to_str()?.strip_prefix(self.stem())?.strip_prefix('-')?;
        LayerId::parse(rest.strip_suffix(".qcow2")?)
    }

    /// Returns the layer directly below the disk, or below a layer of it; `None` at the end of the
    /// chain, which is at the image, if there is one.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn below(&self, layer: Option<&LayerId>) -> Result<Option<LayerId>> {
        let file = layer.map_or_else(|| self.path.clone(), |id| self.layer(id));
        // A name with a directory is that of an image.
        Ok(backing_name(&file)?.and_then(|name| self.id_of(name.as_os_str())))
    }

    /// Returns the layers below the disk, from the top.
    ///
    /// # Errors
    /// `Io`; `Record` for a chain without an end.
    pub(super) fn chain(&self) -> Result<Vec<LayerId>> {
        let mut chain = Vec::new();
        while let Some(id) = self.below(chain.last())? {
            if chain.len() > 4 * MAX_LAYERS || chain.contains(&id) {
                let problem = "the disk is over itself: restore it from a backup";
                return Err(Error::record(&self.path, problem));
            }
            chain.push(id);
        }
        Ok(chain)
    }

    /// Returns all layers of the disk that are there.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn layers(&self) -> Result<Vec<LayerId>> {
        let found = names(self.path.parent().unwrap_or(&self.path))?;
        Ok(found.iter().filter_map(|name| self.id_of(name)).collect())
    }

    /// Returns the disk as `None` and the layers as `Some` that are directly over a layer.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn over(&self, id: &LayerId) -> Result<Vec<Option<LayerId>>> {
        let mut over = Vec::new();
        for file in std::iter::once(None).chain(self.layers()?.into_iter().map(Some)) {
            if self.below(file.as_ref())?.as_ref() == Some(id) {
                over.push(file);
            }
        }
        Ok(over)
    }

    /// Returns the name by which a running QEMU opens the overlay over a layer. It keeps that name
    /// for the file as long as it runs, and opens it again by it.
    pub(super) fn live(&self, id: &LayerId) -> PathBuf {
        self.path.with_file_name(format!("{}-{}.live", self.stem(), id.as_str()))
    }

    /// Returns the names by which a running QEMU may have opened files of the disk.
    fn live_names(&self) -> Result<Vec<PathBuf>> {
        let dir = self.path.parent().unwrap_or(&self.path);
        let is_live = |name: &&OsString| {
            let name = name.to_str().and_then(|name| name.strip_prefix(self.stem())?.strip_prefix('-'));
            name.is_some_and(|rest| rest.strip_suffix(".live").is_some_and(|id| LayerId::parse(id).is_some()))
        };
        Ok(names(dir)?.iter().filter(is_live).map(|name| dir.join(name)).collect())
    }

    /// Returns whether another VM has a layer, too.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn is_shared(&self, id: &LayerId) -> Result<bool> {
        let layer = self.layer(id);
        let links = fs::metadata(&layer).map_err(Error::io("examine", &layer))?.nlink();
        let own = 1 + self.live_names()?.iter().filter(|live| is_same(live, &layer)).count();
        Ok(links > own as u64)
    }

    /// Removes a layer that nothing is over, by all of its names.
    ///
    /// # Errors
    /// `Io`.
    pub(super) fn remove_layer(&self, id: &LayerId) -> Result<()> {
        let layer = self.layer(id);
        for live in self.live_names()?.iter().filter(|live| is_same(live, &layer)) {
            remove_file(live)?;
        }
        remove_file(&layer)
    }

    /// Creates an empty overlay at `overlay`, over a layer; it has the size of the disk `like`.
    fn create_overlay(&self, id: &LayerId, like: &Path, overlay: &Path) -> Result<()> {
        remove_file(overlay)?;
        create_overlay_of_layer(like, &self.layer_name(id), overlay)
    }

    /// Gives the disk's file the name of a layer, too.
    fn name_layer(&self, id: &LayerId) -> Result<()> {
        let layer = self.layer(id);
        step("snapshot: name the layer")
            .and_then(|()| fs::hard_link(&self.path, &layer))
            .map_err(Error::io("link", &layer))
    }

    /// Puts the prepared overlay in the place of the disk.
    fn put_overlay(&self) -> Result<()> {
        step("snapshot: put the overlay in its place")
            .and_then(|()| fs::rename(unfinished(&self.path), &self.path))
            .map_err(Error::io("rename", &self.path))
    }

    /// Puts the overlay that QEMU has opened in the place of the disk.
    fn put_live(&self, id: &LayerId) -> Result<()> {
        let (live, overlay) = (self.live(id), unfinished(&self.path));
        remove_file(&overlay)?;
        if is_same(&live, &self.path) {
            return Ok(());
        }
        step("snapshot: name the overlay")
            .and_then(|()| fs::hard_link(&live, &overlay))
            .map_err(Error::io("link", &live))?;
        self.put_overlay()
    }

    /// Returns the layer that the disk's file itself is: it was named, and no overlay is in the
    /// place of the disk yet.
    fn is_layer(&self) -> Result<Option<LayerId>> {
        let now = match fs::metadata(&self.path) {
            Err(error) if is_gone(&error) => return Ok(None),
            found => found.map_err(Error::io("examine", &self.path))?,
        };
        if now.nlink() < 2 {
            return Ok(None);
        }
        Ok(self.layers()?.into_iter().find(|id| is_same(&self.layer(id), &self.path)))
    }
}

/// Returns whether two names are those of one file.
fn is_same(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    id(one).is_some_and(|one| id(other) == Some(one))
}

/// Gives a file of another VM a second name in this VM's directory.
///
/// # Errors
/// `Io`; `Host` if the two are on different file systems.
pub(super) fn link(source: &Path, path: &Path) -> Result<()> {
    step("clone: link a layer").and_then(|()| fs::hard_link(source, path)).map_err(|error| {
        match error.kind() {
            io::ErrorKind::CrossesDevices => {
                let problem = format!("{} is on another one", source.display());
                Error::host("one file system for both VMs", problem)
            }
            _ => Error::io("link", path)(error),
        }
    })
}

/// Creates a disk over a layer in the same directory. Syncs it.
///
/// # Errors
/// `Io`, `Host`, `AlreadyExists`.
pub(super) fn create_over(layer: &Path, disk: &Path) -> Result<()> {
    let name = layer.file_name().and_then(OsStr::to_str).unwrap_or_default();
    create_overlay_of_layer(layer, name, disk)
}

/// Returns the layer that the disks of a VM that does not run have the content of: nothing was
/// written to them since they were put over it.
///
/// # Errors
/// `Io`, `Host`.
pub(super) fn unchanged_since(disks: &[OwnDisk]) -> Result<Option<LayerId>> {
    let Some(first) = disks.first() else { return Ok(None) };
    let Some(id) = first.below(None)? else { return Ok(None) };
    for disk in disks {
        if disk.below(None)?.as_ref() != Some(&id) {
            return Ok(None);
        }
        // The first write allocates a cluster at the end of the file.
        let empty = unfinished(&disk.path);
        disk.create_overlay(&id, &disk.path, &empty)?;
        let bytes = |path: &Path| fs::metadata(path).map(|it| it.len()).map_err(Error::io("examine", path));
        let is_empty = bytes(&empty)? == bytes(&disk.path)?;
        remove_file(&empty)?;
        if !is_empty {
            return Ok(None);
        }
    }
    Ok(Some(id))
}

/// Turns the disks of a VM that does not run into layers, and puts empty overlays in their places.
///
/// # Errors
/// `Io`, `Host`; then the disks are as they were, or [`settle`] makes them so.
pub(super) fn freeze(disks: &[OwnDisk], id: &LayerId) -> Result<()> {
    let frozen = disks
        .iter()
        .try_for_each(|disk| disk.create_overlay(id, &disk.path, &unfinished(&disk.path)))
        .and_then(|()| {
            disks.iter().try_for_each(|disk| disk.name_layer(id).and_then(|()| disk.put_overlay()))
        });
    if frozen.is_err() {
        undo_freeze(disks, id);
    }
    frozen
}

/// Takes layers back to be the disks; the overlays over them have never been used.
pub(super) fn undo_freeze(disks: &[OwnDisk], id: &LayerId) {
    for disk in disks {
        let layer = disk.layer(id);
        let undone = match fs::symlink_metadata(&layer) {
            Err(error) if is_gone(&error) => Ok(()),
            // A rename of one name of a file to another of the same file does nothing.
            _ if is_same(&layer, &disk.path) => remove_file(&layer),
            _ => step("snapshot: take the layer back")
                .and_then(|()| fs::rename(&layer, &disk.path))
                .map_err(Error::io("rename", &layer)),
        };
        let undone = undone.and_then(|()| remove_file(&unfinished(&disk.path)));
        if let Err(error) = undone {
            tracing::warn!(path = %layer.display(), %error, "the disk stays over a layer without a snapshot");
        }
    }
}

/// Creates what QEMU needs to freeze the disks of a running guest: the overlays by the names of
/// [`OwnDisk::live`], and the names of the layers.
///
/// # Errors
/// `Io`, `Host`; then nothing of it is there, or [`settle`] removes it.
pub(super) fn prepare_live(disks: &[OwnDisk], id: &LayerId) -> Result<()> {
    let prepared = disks
        .iter()
        .try_for_each(|disk| disk.create_overlay(id, &disk.path, &disk.live(id)))
        .and_then(|()| disks.iter().try_for_each(|disk| disk.name_layer(id)));
    if prepared.is_err() {
        undo_live(disks, id);
    }
    prepared
}

/// Removes what [`prepare_live`] has created; QEMU does not use it.
pub(super) fn undo_live(disks: &[OwnDisk], id: &LayerId) {
    for disk in disks {
        let undone = remove_file(&disk.layer(id)).and_then(|()| remove_file(&disk.live(id)));
        if let Err(error) = undone {
            tracing::warn!(path = %disk.path.display(), %error, "cannot undo a snapshot; the next operation will");
        }
    }
}

/// Puts the overlays that QEMU writes to now in the places of the disks.
///
/// # Errors
/// `Io`; [`settle`] tries again.
pub(super) fn adopt_live(disks: &[OwnDisk], id: &LayerId) -> Result<()> {
    disks.iter().try_for_each(|disk| disk.put_live(id))
}

/// Returns the layer that disks were about to become when a process was killed.
///
/// # Errors
/// `Io`.
pub(super) fn interrupted(disks: &[OwnDisk]) -> Result<Option<LayerId>> {
    for disk in disks {
        if let Some(id) = disk.is_layer()? {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// Completes or undoes what a killed process left of the disks of a VM that does not run.
///
/// # Errors
/// `Io`.
pub(super) fn settle(disks: &[OwnDisk]) -> Result<()> {
    for disk in disks {
        if let Some(id) = disk.is_layer()? {
            // QEMU may have written to the overlay that it had opened; otherwise that is empty.
            match disk.live(&id).exists() {
                true => disk.put_live(&id)?,
                false => remove_file(&disk.layer(&id))?,
            }
        }
        for live in disk.live_names()? {
            remove_file(&live)?;
        }
    }
    Ok(())
}

/// Puts the disks over layers that are there: what was in the disks is discarded. `begun` is called
/// when everything is prepared.
///
/// # Errors
/// `Io`, `Host`; if `begun` was called, some disks may be put and others not.
pub(super) fn put_over(disks: &[OwnDisk], id: &LayerId, begun: impl FnOnce() -> Result<()>) -> Result<()> {
    let prepared =
        disks.iter().try_for_each(|disk| disk.create_overlay(id, &disk.layer(id), &unfinished(&disk.path)));
    if let Err(error) = prepared.and_then(|()| begun()) {
        for disk in disks {
            let _ = remove_file(&unfinished(&disk.path));
        }
        return Err(error);
    }
    disks.iter().try_for_each(OwnDisk::put_overlay)
}

/// Returns the most layers that one of the disks is over.
///
/// # Errors
/// As [`OwnDisk::chain`].
pub(super) fn deepest(disks: &[OwnDisk]) -> Result<usize> {
    let chains = disks.iter().map(OwnDisk::chain).collect::<Result<Vec<_>>>()?;
    Ok(chains.iter().map(Vec::len).max().unwrap_or(0))
}

/// Refuses a snapshot more than a disk may have below it.
///
/// # Errors
/// `InvalidInput` on `snapshot`.
pub(super) fn refuse_depth(disks: &[OwnDisk]) -> Result<()> {
    let deepest = deepest(disks)?;
    if deepest < MAX_LAYERS {
        return Ok(());
    }
    let why =
        format!("a disk is over at most {MAX_LAYERS} snapshots: remove one that is not needed any more");
    Err(Error::invalid("snapshot", format!("{} below this one", deepest), why))
}

/// Syncs the layers and the directory that they are in. Blocks.
///
/// # Errors
/// `Io`.
pub(super) fn sync(disks: &[OwnDisk], id: &LayerId) -> io::Result<()> {
    for disk in disks {
        File::open(disk.layer(id))?.sync_all()?;
    }
    disks.first().and_then(|disk| disk.path.parent()).map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

/// Returns the root disk and all layers of it: any of them may be over the image.
///
/// # Errors
/// `Io`.
pub(super) fn root_files(layout: &QemuLayout) -> Result<Vec<PathBuf>> {
    let disk = OwnDisk { device: "root".to_owned(), path: layout.root_disk() };
    let layers = disk.layers()?;
    Ok(std::iter::once(disk.path.clone()).chain(layers.iter().map(|id| disk.layer(id))).collect())
}

/// Returns the space that a file takes on the disk, in bytes; none for one that is not there.
pub(super) fn space(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.blocks() * 512)
}

/// Returns the files of all layers and unfinished overlays in a VM's directory, whatever its spec
/// says now.
///
/// # Errors
/// `Io`.
pub(super) fn files(layout: &QemuLayout) -> Result<Vec<PathBuf>> {
    let is_layer = |name: &OsStr| {
        let Some(name) = name.to_str().filter(|name| name.starts_with("root") || name.starts_with("data-"))
        else {
            return false;
        };
        let (whole, is_whole) = match name.strip_suffix(".unfinished") {
            Some(whole) => (whole, false),
            None => (name, true),
        };
        let Some(stem) = whole.strip_suffix(".qcow2").or_else(|| whole.strip_suffix(".live")) else {
            return false;
        };
        !is_whole || stem.rsplit_once('-').is_some_and(|(_, id)| LayerId::parse(id).is_some())
    };
    Ok(names(&layout.work)?.iter().filter(|name| is_layer(name)).map(|name| layout.work.join(name)).collect())
}

/// Returns the names in a directory; none if it is not there.
pub(super) fn names(dir: &Path) -> Result<Vec<OsString>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        entries => entries.map_err(Error::io("read", dir))?,
    };
    entries.map(|entry| entry.map(|entry| entry.file_name()).map_err(Error::io("read", dir))).collect()
}
