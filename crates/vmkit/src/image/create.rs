//! Creates the qcow2 files of a VM: overlays over an image, and empty disks.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use imago::file::File as ImagoFile;
use imago::format::PreallocateMode;
use imago::qcow2::{Qcow2, Qcow2CreateBuilder};
use imago::{FormatAccess, FormatCreateBuilder};

use super::qcow2_header::MAX_BACKING_NAME_BYTES;
use super::{ImageFacts, backing};
use crate::error::{Error, Result, Subject};
use crate::spec::Mib;
use crate::steps::step;

/// The largest disk that can be created, 2 PiB: the range of an L1 table of 32 MiB, QEMU's limit,
/// with clusters of 64 KiB.
pub const MAX_DISK_BYTES: u64 = 1 << 51;
/// The position of the disk's size in a qcow2 header. Source: QEMU, `docs/interop/qcow2.txt`.
const SIZE_PLACE: u64 = 24;

/// Creates a qcow2 overlay over `base` at `overlay`, and returns the size of its disk in bytes.
///
/// `size` is the size that the guest sees, at least the image's, which is the default. The backing
/// file is recorded by absolute path and with its format, so QEMU never guesses. The file is
/// accessible to the caller only (0600) and is not synced: until the guest writes to it, it can be
/// created again.
///
/// # Errors
/// `InvalidInput` on `disk` for a size below the image's or above [`MAX_DISK_BYTES`], on `image` if
/// qcow2 can't store its path (1023 bytes of UTF-8); `AlreadyExists` if `overlay` exists, which is
/// not changed; `Host` or `Io` if it can't be written, and then it is removed.
pub fn create_overlay(base: &ImageFacts, overlay: &Path, size: Option<Mib>) -> Result<u64> {
    let backing = std::path::absolute(&base.path).map_err(Error::io("resolve", &base.path))?;
    create_overlay_over(base, &backing, overlay, size)
}

/// Creates the overlay of a VM, as [`create_overlay`] does, but records an image in the VM's home
/// relative to the overlay, so that both can be moved or copied together.
///
/// # Errors
/// Those of [`create_overlay`].
pub(crate) fn create_overlay_at_home(base: &ImageFacts, overlay: &Path, size: Option<Mib>) -> Result<u64> {
    match backing::name_at_home(overlay, &base.path) {
        Some(name) => create_overlay_over(base, &name, overlay, size),
        None => create_overlay(base, overlay, size),
    }
}

fn create_overlay_over(base: &ImageFacts, backing: &Path, overlay: &Path, size: Option<Mib>) -> Result<u64> {
    let disk_bytes = base.disk_bytes(size)?;
    let refused = |why: String| Error::invalid("image", base.path.display(), why);
    let backing = backing.to_str().ok_or_else(|| {
        refused("the path is not UTF-8, and the overlay has to record it: rename the image".to_owned())
    })?;
    if backing.len() > MAX_BACKING_NAME_BYTES as usize {
        return Err(refused(format!(
            "the path has {} bytes, and a qcow2 overlay can record {MAX_BACKING_NAME_BYTES}: move the image",
            backing.len()
        )));
    }
    let (backing, format) = (backing.to_owned(), base.format.as_str().to_owned());
    create(overlay, disk_bytes, |image| image.backing(backing, format))?;
    Ok(disk_bytes)
}

/// Creates at `overlay` a qcow2 overlay of the size of the qcow2 file `disk`, over the file `layer`
/// of the same directory, which will be that disk under its new name. Syncs it.
///
/// # Errors
/// Those of [`create_overlay`].
pub(crate) fn create_overlay_of_layer(disk: &Path, layer: &str, overlay: &Path) -> Result<()> {
    let mut size = [0; 8];
    let read = File::open(disk).and_then(|file| file.read_exact_at(&mut size, SIZE_PLACE));
    read.map_err(Error::io("read", disk))?;
    let layer = layer.to_owned();
    create(overlay, u64::from_be_bytes(size), |image| image.backing(layer, "qcow2".to_owned()))?;
    step("image: sync").and_then(|()| File::open(overlay)?.sync_all()).map_err(Error::io("sync", overlay))
}

/// Creates an empty qcow2 disk at `path`, of mode 0600.
///
/// # Errors
/// `InvalidInput` on `disk` for a size above [`MAX_DISK_BYTES`]; otherwise as [`create_overlay`].
pub fn create_blank(path: &Path, size: Mib) -> Result<()> {
    create(path, size.bytes(), |image| image)
}

/// Grows the disk of a qcow2 file that no process has open, overlay or not, to `size`; a disk of
/// that size is not changed.
///
/// # Errors
/// `InvalidInput` on `disk` for a size below the disk's, or above [`MAX_DISK_BYTES`]; `Host` or
/// `Io` if the file can't be read or written.
pub fn grow_disk(path: &Path, size: Mib) -> Result<()> {
    check_bound(size.bytes())?;
    // After an interruption here the disk has its old size: the size in the header is written last.
    let grow = || -> io::Result<Result<()>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        // The backing file is not opened: nothing of it is needed.
        let disk = FormatAccess::new(Qcow2::<ImagoFile>::open_image(ImagoFile::try_from(file)?, true)?);
        let bytes = disk.size();
        if size.bytes() < bytes {
            let least = Mib::holding(bytes);
            let expected =
                format!("the disk has {bytes} bytes already, and can't shrink: use at least {least}");
            return Ok(Err(Error::invalid("disk", size, expected)));
        }
        if size.bytes() > bytes {
            step("image: grow")?;
            disk.resize_grow(size.bytes(), PreallocateMode::None)?;
            disk.flush()?;
        }
        Ok(Ok(()))
    };
    grow().map_err(Error::io("grow", path))?
}

fn check_bound(disk_bytes: u64) -> Result<()> {
    if disk_bytes <= MAX_DISK_BYTES {
        return Ok(());
    }
    let bound = format!("a disk has at most {}", Mib::holding(MAX_DISK_BYTES));
    Err(Error::invalid("disk", format!("{disk_bytes} bytes"), bound))
}

type OverlayBuilder = Qcow2CreateBuilder<ImagoFile, FormatAccess<ImagoFile>>;

fn create(
    path: &Path,
    disk_bytes: u64,
    options: impl FnOnce(OverlayBuilder) -> OverlayBuilder,
) -> Result<()> {
    check_bound(disk_bytes)?;
    let new = || {
        step("image: create")?;
        OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
    };
    let file = new().map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::already_exists(Subject::Disk, path.display()),
        _ => Error::io("create", path)(source),
    })?;
    let write = || {
        step("image: write")?;
        options(OverlayBuilder::new(ImagoFile::try_from(file)?).size(disk_bytes)).create()
    };
    write().map_err(|source| {
        // Created a moment ago by this call; if even this fails, `destroy` removes the directory.
        let _ = fs::remove_file(path);
        Error::io("write", path)(source)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::image::tests::{qemu_img, qemu_img_info};
    use crate::image::{ImageFormat, inspect};
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::PermissionsExt;

    const MIB: u64 = 1 << 20;

    fn raw_image(path: &Path, file_bytes: u64) -> ImageFacts {
        fs::File::create(path).unwrap().set_len(file_bytes).unwrap();
        inspect(path).unwrap()
    }

    #[test]
    fn a_disk_grows_and_never_shrinks() {
        let dir = tempfile::tempdir().unwrap();
        let base = raw_image(&dir.path().join("base"), 4 * MIB);
        let overlay = dir.path().join("overlay");
        let name = overlay.to_str().unwrap();
        let mib = |mib| Mib::new(mib).unwrap();
        create_overlay(&base, &overlay, None).unwrap();
        // Beyond 32 TiB the L1 table is moved; the steps before it fit in place.
        for size in [4, 5, 512, 10 * 1024, 10 * 1024, 2 << 20, 64 << 20] {
            grow_disk(&overlay, mib(size)).unwrap();
            if !qemu_img(&["check", "-q", "-f", "qcow2", name]) {
                return;
            }
            let info = qemu_img_info(name);
            assert_eq!(info["virtual-size"], size * MIB);
            assert_eq!(info["backing-filename"], base.path.to_str().unwrap());
        }
        let error = grow_disk(&overlay, mib(5)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("can't shrink"), "{error}");
        assert_eq!(qemu_img_info(name)["virtual-size"], (64 << 20) * MIB);
    }

    #[test]
    fn overlays_of_every_size_satisfy_qemu_img() {
        let dir = tempfile::tempdir().unwrap();
        let base = raw_image(&dir.path().join("base"), MIB);
        let overlay = dir.path().join("overlay");
        let name = overlay.to_str().unwrap();
        for mib in [1, 2, 3, 511, 512, 513, 10 * 1024, 2 << 20, 64 << 20] {
            let size = Mib::new(mib).unwrap();
            assert_eq!(create_overlay(&base, &overlay, Some(size)).unwrap(), size.bytes());
            assert_eq!(fs::metadata(&overlay).unwrap().permissions().mode() & 0o777, 0o600);
            if !qemu_img(&["check", "-q", "-f", "qcow2", name]) {
                return;
            }
            let info = qemu_img_info(name);
            assert_eq!(info["virtual-size"], size.bytes());
            assert_eq!(info["backing-filename"], base.path.to_str().unwrap());
            assert_eq!(info["backing-filename-format"], "raw");
            fs::remove_file(&overlay).unwrap();
        }
    }

    #[test]
    fn an_overlay_takes_the_size_of_its_image_in_whole_sectors() {
        let dir = tempfile::tempdir().unwrap();
        for (file_bytes, disk_bytes) in [(1, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)] {
            let base = raw_image(&dir.path().join("base"), file_bytes);
            let overlay = dir.path().join(format!("over-{file_bytes}"));
            assert_eq!(create_overlay(&base, &overlay, None).unwrap(), disk_bytes);
            let name = overlay.to_str().unwrap();
            if !qemu_img(&["check", "-q", "-f", "qcow2", name]) {
                return;
            }
            assert_eq!(qemu_img_info(name)["virtual-size"], disk_bytes);
        }
    }

    #[test]
    fn an_overlay_over_qcow2_shows_what_the_image_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let (raw, image) = (path("raw"), path("image"));
        fs::write(&raw, [7; 70_000]).unwrap();
        if !qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &raw, &image]) {
            return;
        }
        let overlay = path("overlay");
        create_overlay(&inspect(Path::new(&image)).unwrap(), Path::new(&overlay), None).unwrap();
        assert_eq!(qemu_img_info(&overlay)["backing-filename-format"], "qcow2");
        assert!(qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2", &raw, &overlay]));
    }

    #[test]
    fn odd_names_of_images_are_recorded_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a,b", "a b", "nbd:localhost:1", "json:{}", "ümläut", "100%", "-f", "x\ny"] {
            let base = raw_image(&dir.path().join(name), MIB);
            let overlay = dir.path().join("overlay");
            create_overlay(&base, &overlay, None).unwrap();
            let text = overlay.to_str().unwrap();
            if !qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "qcow2", text, text]) {
                return;
            }
            assert_eq!(qemu_img_info(text)["full-backing-filename"], base.path.to_str().unwrap());
            fs::remove_file(&overlay).unwrap();
        }
    }

    #[test]
    fn names_that_qcow2_can_not_hold_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let overlay = dir.path().join("overlay");
        let facts = |path: &Path| ImageFacts {
            path: path.to_owned(),
            format: ImageFormat::Raw,
            virtual_size_bytes: MIB,
            file_bytes: MIB,
        };
        for (path, reason) in [
            (OsStr::from_bytes(b"/images/\xff"), "not UTF-8"),
            (OsStr::new(&format!("/{}", "x/".repeat(600))), "and a qcow2 overlay can record 1023"),
        ] {
            let error = create_overlay(&facts(Path::new(path)), &overlay, None).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(reason), "{error}");
            assert!(!overlay.exists());
        }
    }

    #[test]
    fn a_disk_smaller_than_its_image_is_refused_with_both_sizes() {
        let dir = tempfile::tempdir().unwrap();
        let base = raw_image(&dir.path().join("base"), 2 * MIB + 1);
        let overlay = dir.path().join("overlay");
        let error = create_overlay(&base, &overlay, Some(Mib::new(2).unwrap())).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        for part in ["disk: \"2MiB\"", "2097664 bytes", "this is 2097152", "at least 3MiB"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!overlay.exists());
    }

    #[test]
    fn a_disk_beyond_the_format_is_refused_with_the_bound() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let error = create_blank(&disk, Mib::MAX).unwrap_err().to_string();
        assert!(error.starts_with("disk: ") && error.contains("at most 2097152GiB"), "{error}");
        assert!(!disk.exists());
    }

    #[test]
    fn a_blank_disk_is_empty_and_sound() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        create_blank(&disk, Mib::new(1 << 20).unwrap()).unwrap();
        assert!(fs::metadata(&disk).unwrap().len() < MIB);
        let facts = inspect(&disk).unwrap();
        assert_eq!((facts.format, facts.virtual_size_bytes), (ImageFormat::Qcow2, 1 << 40));
        qemu_img(&["check", "-q", "-f", "qcow2", disk.to_str().unwrap()]);
    }

    #[test]
    fn what_is_there_already_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        fs::write(&disk, "precious").unwrap();
        let error = create_blank(&disk, Mib::new(1).unwrap()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&disk).unwrap(), b"precious");
    }

    #[test]
    fn a_failure_at_any_step_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        for failing in ["image: create", "image: write"] {
            crate::set_step_hook(Some(Box::new(move |name| {
                if name == failing { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
            })));
            let error = create_blank(&disk, Mib::new(1).unwrap()).unwrap_err();
            crate::set_step_hook(None);
            assert_eq!(error.kind(), ErrorKind::Host, "{error}");
            assert!(!disk.exists(), "left behind after {failing}");
        }
    }
}
