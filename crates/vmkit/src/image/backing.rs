//! The backing file that an overlay records, and homes that were moved or copied.
//!
//! Edge. The path of an image in the VM's home is recorded relative to the overlay,
//! `../../images/…`, so that both can be moved together. Overlays of vmkit 0.1 have the full path:
//! in a moved home that file does not exist, in a copied one it is the original's. The path is then
//! corrected before the disk is used; a path that the disk's owner has set stays.
//!
//! Source: QEMU's `docs/interop/qcow2.txt`: the name's offset and length are at bytes 8 to 19, the
//! name is within the first cluster.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};

use super::qcow2_header::{MAGIC, MAX_BACKING_NAME_BYTES, MAX_CLUSTER_BYTES, Qcow2Header, parse};
use crate::error::{Error, Result};
use crate::steps::step;
use crate::store::stored_image;

/// The position of the name's offset, which is followed by its length.
const PLACE: u64 = 8;

/// Returns the path that the overlay of a VM at `HOME/vms/NAME` records for an image of the same
/// home; `None` for another image.
pub(super) fn name_at_home(overlay: &Path, image: &Path) -> Option<PathBuf> {
    let home = home_of(overlay)?;
    let image = image.canonicalize().ok()?;
    image.strip_prefix(home).ok().map(|below| Path::new("../..").join(below))
}

/// Returns the home of a VM's disk, derived from the disk's path.
fn home_of(overlay: &Path) -> Option<PathBuf> {
    let work = overlay.parent()?.canonicalize().ok()?;
    // A home at the root of the file system would contain every image.
    work.parent()?.parent().filter(|home| home.parent().is_some()).map(Path::to_owned)
}

/// The file that an overlay is over, as it records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) name: PathBuf,
    pub(crate) format: String,
}

/// Returns what an overlay of vmkit's is over; `None` for a disk over nothing.
///
/// # Errors
/// `Io` if the overlay can't be read; `Record` if it is damaged, or does not say the format.
pub(crate) fn backing(overlay: &Path) -> Result<Option<Backing>> {
    let header = header(overlay)?;
    let Some(found) = header.backing else { return Ok(None) };
    let format = found
        .format
        .ok_or_else(|| Error::record(overlay, "this disk does not say the format of the file below it"))?;
    let name = PathBuf::from(std::ffi::OsStr::from_bytes(&found.name));
    Ok(Some(Backing { name, format }))
}

/// Returns what a disk from elsewhere is over, as [`backing`] does. It may name any file there.
///
/// # Errors
/// As [`backing`]; `Record` for one whose data is in another file, is encrypted, or is marked as
/// damaged.
pub(crate) fn backing_of_foreign(disk: &Path) -> Result<Option<Backing>> {
    let header = header(disk)?;
    let refused = |problem: &str| Err(Error::record(disk, problem));
    match () {
        () if header.external_data_file => refused("the data of this disk is in another file"),
        () if header.encrypted => refused("this disk is encrypted"),
        () if header.marked_corrupt => refused("this disk is marked as damaged"),
        () => backing(disk),
    }
}

fn header(overlay: &Path) -> Result<Qcow2Header> {
    let read = || -> io::Result<(Vec<u8>, u64)> {
        let file = File::open(overlay)?;
        let bytes = file.metadata()?.len();
        let mut head = vec![0; usize::try_from(bytes.min(MAX_CLUSTER_BYTES)).map_err(io::Error::other)?];
        file.read_exact_at(&mut head, 0)?;
        Ok((head, bytes))
    };
    let (head, bytes) = read().map_err(Error::io("read", overlay))?;
    parse(&head, bytes).map_err(|why| Error::record(overlay, format!("this disk is damaged: {why}")))
}

/// Returns the name of the backing file that an overlay records; `None` for a file without one, or
/// that is not there.
///
/// # Errors
/// `Io` if the overlay can't be read.
pub(crate) fn backing_name(overlay: &Path) -> Result<Option<PathBuf>> {
    let found = recorded(overlay).map_err(Error::io("read", overlay))?;
    Ok(found.map(|(_, name)| name))
}

/// Returns whether [`settle_backing`] would change nothing.
///
/// # Errors
/// `Io` if the overlay can't be read.
pub(crate) fn is_backing_settled(overlay: &Path, image: &Path) -> Result<bool> {
    former_name(overlay, image).map(|former| former.is_none())
}

/// Corrects the backing file of an overlay that no process has open, if that is the image `image`
/// under its path in another home. Other files than overlays, and overlays whose owner has chosen
/// another image, are not changed.
///
/// # Errors
/// `Io` and `Host` if the overlay can't be read or written; `InvalidInput` on `image` for a path
/// that does not fit.
pub(crate) fn settle_backing(overlay: &Path, image: &Path) -> Result<()> {
    let Some((offset, name, image)) = former_name(overlay, image)? else { return Ok(()) };
    tracing::info!(overlay = %overlay.display(), from = %name.display(), to = %image.display(), "the image was moved");
    put_name(overlay, offset, &image)
}

/// Puts an overlay that no process has open over an image; it has the name of another one.
///
/// # Errors
/// As [`settle_backing`]; `Record` for a file that is over nothing.
pub(crate) fn set_backing(overlay: &Path, image: &Path) -> Result<()> {
    match recorded(overlay).map_err(Error::io("read", overlay))? {
        Some((offset, _)) => put_name(overlay, offset, image),
        None => Err(Error::record(overlay, "this disk is over no image")),
    }
}

fn put_name(overlay: &Path, offset: u64, image: &Path) -> Result<()> {
    let now = name_at_home(overlay, image).unwrap_or_else(|| image.to_owned());
    let (bytes, end) = (now.as_os_str().as_bytes(), offset + now.as_os_str().len() as u64);
    if bytes.len() > MAX_BACKING_NAME_BYTES as usize
        || end > cluster_bytes(overlay).map_err(Error::io("read", overlay))?
    {
        let why = format!(
            "the path has {} bytes, which is more than the overlay can record: move the image",
            bytes.len()
        );
        return Err(Error::invalid("image", image.display(), why));
    }
    rename(overlay, offset, bytes).map_err(Error::io("write", overlay))
}

/// Finds the path that an image had in another home; returns its position in the overlay, the path,
/// and the image's present path, or `None` if the overlay has no such path.
fn former_name(overlay: &Path, image: &Path) -> Result<Option<(u64, PathBuf, PathBuf)>> {
    let Some((offset, name)) = recorded(overlay).map_err(Error::io("read", overlay))? else {
        return Ok(None);
    };
    let Some(dir) = overlay.parent().and_then(|dir| dir.canonicalize().ok()) else { return Ok(None) };
    let named = dir.join(&name);
    let Ok(image) = image.canonicalize() else { return Ok(None) };
    let is_former = !is_same(&named, &image) && is_former_name(overlay, &name, &named, &image);
    Ok(is_former.then_some((offset, name, image)))
}

/// Returns whether a path to another file, or to none, is this image's path from before the home
/// was moved or copied.
fn is_former_name(overlay: &Path, name: &Path, named: &Path, image: &Path) -> bool {
    // The first component could be a protocol of QEMU's.
    let is_path = name.is_absolute() || name.starts_with("..");
    if let Some(stored) = stored_image(image) {
        return is_path && stored_image(name) == Some(stored);
    }
    let below = match home_of(overlay).and_then(|home| image.strip_prefix(home).ok().map(Path::to_owned)) {
        Some(below) => below,
        // The path is that of the image in its former home.
        None => name.components().filter(|part| *part != Component::ParentDir).collect(),
    };
    let is_other_home = || {
        let above = below.components().count();
        let vm = overlay.parent().and_then(Path::file_name).unwrap_or_default();
        named.ancestors().nth(above).is_some_and(|home| home.join("vms").join(vm).is_dir())
    };
    is_path && name.ends_with(&below) && image.ends_with(&below) && (!named.exists() || is_other_home())
}

fn is_same(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    id(one).is_some_and(|one| id(other) == Some(one))
}

/// Reads the position of the backing file's name, and the name; `None` without one.
fn recorded(overlay: &Path) -> io::Result<Option<(u64, PathBuf)>> {
    let file = match File::open(overlay) {
        // The user of the disk reports a missing file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut head = [0; 20];
    if file.read_exact_at(&mut head, 0).is_err() || head[..4] != MAGIC {
        return Ok(None);
    }
    let offset = u64::from_be_bytes(head[8..16].try_into().expect("these are 8 bytes"));
    let length = u32::from_be_bytes(head[16..].try_into().expect("these are 4 bytes")) as usize;
    if offset < head.len() as u64
        || offset > MAX_CLUSTER_BYTES
        || length == 0
        || length > MAX_BACKING_NAME_BYTES as usize
    {
        return Ok(None);
    }
    let mut name = vec![0; length];
    file.read_exact_at(&mut name, offset)?;
    Ok(Some((offset, PathBuf::from(std::ffi::OsStr::from_bytes(&name)))))
}

fn cluster_bytes(overlay: &Path) -> io::Result<u64> {
    let mut bits = [0; 4];
    File::open(overlay)?.read_exact_at(&mut bits, 20)?;
    Ok(1_u64.checked_shl(u32::from_be_bytes(bits)).unwrap_or(0).min(MAX_CLUSTER_BYTES))
}

/// Replaces the name at `offset`, in one write from the length to the end of the name, so that a
/// kill can't leave only one of them.
fn rename(overlay: &Path, offset: u64, name: &[u8]) -> io::Result<()> {
    step("image: name the backing file")?;
    let file = OpenOptions::new().read(true).write(true).open(overlay)?;
    let mut bytes = vec![0; usize::try_from(offset - PLACE).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, PLACE)?;
    let length = u32::try_from(name.len()).map_err(io::Error::other)?;
    bytes[8..12].copy_from_slice(&length.to_be_bytes());
    bytes.extend(name);
    file.write_all_at(&bytes, PLACE)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::create::{create_overlay, create_overlay_at_home};
    use crate::image::inspect;
    use crate::image::tests::{qemu_img, qemu_img_info};

    const STORED: &str =
        "images/sha256-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef/disk.raw";

    /// A home with an image at `below`, and the overlay of a VM.
    fn home(root: &Path, below: &str) -> (PathBuf, PathBuf) {
        let (image, work) = (root.join(below), root.join("vms/web"));
        fs::create_dir_all(image.parent().unwrap()).unwrap();
        fs::create_dir_all(&work).unwrap();
        fs::write(&image, vec![7; 1 << 20]).unwrap();
        (image, work.join("root.qcow2"))
    }

    fn backing(overlay: &Path) -> PathBuf {
        recorded(overlay).unwrap().unwrap().1
    }

    #[test]
    fn an_image_of_the_home_is_named_from_the_overlay_and_any_other_in_full() {
        let dir = tempfile::tempdir().unwrap();
        let (image, overlay) = home(dir.path(), STORED);
        create_overlay_at_home(&inspect(&image).unwrap(), &overlay, None).unwrap();
        assert_eq!(backing(&overlay), Path::new("../..").join(STORED));
        let moved = dir.path().with_extension("moved");
        fs::rename(dir.path(), &moved).unwrap();
        let name = moved.join("vms/web/root.qcow2");
        if qemu_img(&["check", "-q", "-f", "qcow2", name.to_str().unwrap()]) {
            assert_eq!(qemu_img_info(name.to_str().unwrap())["backing-filename-format"], "raw");
        }
        fs::rename(&moved, dir.path()).unwrap();
        let other = tempfile::NamedTempFile::new().unwrap();
        other.as_file().set_len(512).unwrap();
        fs::remove_file(&overlay).unwrap();
        create_overlay_at_home(&inspect(other.path()).unwrap(), &overlay, None).unwrap();
        assert_eq!(backing(&overlay), other.path().canonicalize().unwrap());
    }

    #[test]
    fn the_name_of_an_image_that_was_moved_or_copied_with_its_home_is_corrected() {
        for below in [STORED, "base.raw"] {
            let dir = tempfile::tempdir().unwrap();
            let (old, new) = (dir.path().join("old"), dir.path().join("a-new-home-with-a-longer-name"));
            let (image, overlay) = home(&old, below);
            create_overlay(&inspect(&image).unwrap(), &overlay, None).unwrap();
            let (there, copied) = home(&new, below);
            fs::copy(&overlay, &copied).unwrap();
            settle_backing(&copied, &there).unwrap();
            assert_eq!(
                backing(&copied),
                Path::new("../..").join(below),
                "a copy of a home that is still there"
            );
            settle_backing(&overlay, &image).unwrap();
            assert_eq!(backing(&overlay), image.canonicalize().unwrap(), "nothing is wrong with this one");
            fs::copy(&overlay, &copied).unwrap();
            fs::remove_dir_all(&old).unwrap();
            settle_backing(&copied, &there).unwrap();
            let name = copied.to_str().unwrap();
            assert_eq!(backing(&copied), Path::new("../..").join(below), "the home was moved");
            if qemu_img(&["check", "-q", "-f", "qcow2", name]) {
                assert!(qemu_img(&[
                    "compare",
                    "-q",
                    "-f",
                    "qcow2",
                    "-F",
                    "raw",
                    name,
                    there.to_str().unwrap()
                ]));
            }
        }
    }

    #[test]
    fn an_overlay_that_its_owner_has_put_over_another_image_stays_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (image, overlay) = home(&dir.path().join("home"), "base.raw");
        let own = dir.path().join("base.raw");
        fs::write(&own, vec![1; 1 << 20]).unwrap();
        create_overlay(&inspect(&own).unwrap(), &overlay, None).unwrap();
        settle_backing(&overlay, &image).unwrap();
        assert_eq!(backing(&overlay), own.canonicalize().unwrap());
        settle_backing(&dir.path().join("none"), &image).unwrap();
        settle_backing(&image, &own).unwrap();
    }
}
