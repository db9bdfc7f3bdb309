//! Writes the disk of an image as a raw file: [`convert`].
//!
//! Edge: files. The file is written beside its destination under another name until it is complete
//! and synced; a writer that is killed leaves that file, and the next conversion to the same
//! destination takes it over. A block device is written in place.
//!
//! ```text
//! image ─▶ Disk ─▶ FILE.unfinished, sparse ─▶ sync ─▶ FILE
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use rustix::fs::OFlags;
use tokio::sync::watch;

use super::disk::{DiskExtent, GuestDisk};
use super::facts::ImageFacts;
use super::progress::{PullProgress, PullStage};
use super::sparse::SparseFile;
use crate::blocking::blocking;
use crate::error::{Error, Result, Subject};
pub use crate::output_file::OverwritePolicy;
use crate::output_file::{FileReaders, OutputFile};
use crate::steps::step;

/// How many bytes are read at a time.
const BLOCK_BYTES: usize = 1 << 20;

/// Writes the disk of an image as a raw file, with holes for its zeros, and returns the disk's size
/// in bytes.
///
/// The file gets the name `to` when it is complete and synced; until then its name ends with
/// `.unfinished`. A block device that is large enough is written in place, zeros too; the bytes
/// after the disk's end stay.
///
/// # Cancel safety
/// A dropped future ends the conversion and removes the unfinished file. After a kill that file
/// stays, until the next conversion to the same destination.
///
/// # Errors
/// `InvalidInput` on `file` for a directory, the image itself, a device that is too small or no
/// block device; `AlreadyExists`; `Busy` while another process writes there; `Host` on a full disk,
/// otherwise `Io`.
pub async fn convert(
    image: &ImageFacts,
    to: &Path,
    existing: OverwritePolicy,
    progress: &watch::Sender<PullProgress>,
) -> Result<u64> {
    let to_place = place(image, to, existing)?;
    let failed = || Error::io("write", to);
    let (mut target, unfinished) = if fs::metadata(&to_place).is_ok_and(|at| at.file_type().is_block_device())
    {
        (ConvertTarget::Device(device(image, to)?), None)
    } else {
        let unfinished = OutputFile::begin(&to_place, to, FileReaders::AsUsual)?;
        let file = unfinished.file().try_clone().map_err(failed())?;
        (ConvertTarget::File(SparseFile::new(file)), Some(unfinished))
    };
    let asker = Arc::new(());
    let work = DiskCopy {
        image: image.clone(),
        to: to.to_owned(),
        progress: progress.clone(),
        asker: Arc::downgrade(&asker),
    };
    // Passed to the thread and back, so that it is removed only when nothing writes to it any more.
    let copied = blocking(move || {
        let copied = work.copy(&mut target).and_then(|size| {
            work.progress.send_modify(|progress| progress.stage = PullStage::Finishing);
            target.finish().map_err(Error::io("write", &work.to))?;
            Ok(size)
        });
        (copied, unfinished)
    });
    let (copied, unfinished) = copied.await?;
    drop(asker);
    let size = copied?;
    if let Some(unfinished) = unfinished {
        unfinished.name(&to_place, existing).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::already_exists(Subject::File, to.display()),
            _ => failed()(error),
        })?;
    }
    Ok(size)
}

/// Checks the destination, and returns it with symbolic links resolved.
fn place(image: &ImageFacts, to: &Path, existing: OverwritePolicy) -> Result<PathBuf> {
    let refused = |why: &str| Error::invalid("file", to.display(), why);
    let Some(name) = to.file_name() else { return Err(refused("this is not a file name")) };
    if existing == OverwritePolicy::Stays && fs::symlink_metadata(to).is_ok() {
        return Err(Error::already_exists(Subject::File, to.display()));
    }
    match to.canonicalize() {
        Ok(found) if found == image.path => Err(refused("this is the image itself")),
        Ok(found) => {
            let kind = found.metadata().map_err(Error::io("examine", to))?.file_type();
            match () {
                () if kind.is_file() || kind.is_block_device() => Ok(found),
                () if kind.is_dir() => Err(refused("this is a directory: pass a file in it")),
                () if kind.is_char_device() => {
                    Err(refused("this is a character device: pass a file, or a block device"))
                }
                () => Err(refused("this is a pipe or a socket: pass a file, or a block device")),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
            match parent.unwrap_or(Path::new(".")).canonicalize() {
                Ok(parent) => Ok(parent.join(name)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(refused("there is no such directory"))
                }
                Err(error) => Err(Error::io("examine", to)(error)),
            }
        }
        Err(error) => Err(Error::io("examine", to)(error)),
    }
}

/// Opens a block device that the disk fits on.
fn device(image: &ImageFacts, to: &Path) -> Result<File> {
    let open = || {
        step("image: write to a device")?;
        // Refused by Linux while it is mounted, or while another process has opened it like this.
        let flags = OFlags::EXCL.bits().cast_signed();
        let mut device = OpenOptions::new().read(true).write(true).custom_flags(flags).open(to)?;
        let room = device.seek(SeekFrom::End(0))?;
        Ok((device, room))
    };
    let (device, room) = open().map_err(Error::io("write", to))?;
    let needed = image.virtual_size_bytes;
    if room < needed {
        let why = format!("this device has {room} bytes, and the disk needs {needed}");
        return Err(Error::invalid("file", to.display(), why));
    }
    Ok(device)
}

/// A copy in progress.
struct DiskCopy {
    image: ImageFacts,
    to: PathBuf,
    progress: watch::Sender<PullProgress>,
    /// Dropped when the caller no longer waits for the result.
    asker: Weak<()>,
}

/// The destination.
enum ConvertTarget {
    File(SparseFile),
    /// A device has no holes: zeros have to be written.
    Device(File),
}

impl DiskCopy {
    /// Copies the whole disk.
    fn copy(&self, target: &mut ConvertTarget) -> Result<u64> {
        let failed_to_read = || Error::io("read", &self.image.path);
        let mut disk = GuestDisk::open(&self.image).map_err(failed_to_read())?;
        let (size, mut offset) = (disk.size(), 0);
        let mut buffer = vec![0; BLOCK_BYTES];
        while offset < size {
            if self.asker.strong_count() == 0 {
                return Err(Error::io("write", &self.to)(io::ErrorKind::Interrupted.into()));
            }
            let piece = disk.piece(offset, &mut buffer).map_err(failed_to_read())?;
            let written = match piece {
                DiskExtent::Zeros(count) => target.zeros(offset, count).map(|()| count),
                DiskExtent::Read(count) => target.write(offset, &buffer[..count]).map(|()| count as u64),
            };
            offset += written.map_err(Error::io("write", &self.to))?;
            let (stage, total_bytes) = (PullStage::Converting, Some(size));
            self.progress.send_replace(PullProgress { stage, done_bytes: offset, total_bytes });
        }
        Ok(size)
    }
}

impl ConvertTarget {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self {
            ConvertTarget::File(file) => file.append(bytes),
            ConvertTarget::Device(device) => device.write_all_at(bytes, offset),
        }
    }

    /// Sets the final length, and syncs.
    fn finish(self) -> io::Result<()> {
        match self {
            ConvertTarget::File(file) => file.finish()?.sync_all(),
            ConvertTarget::Device(device) => device.sync_all(),
        }
    }

    fn zeros(&mut self, mut offset: u64, mut count: u64) -> io::Result<()> {
        let device = match self {
            ConvertTarget::File(file) => {
                file.skip(count);
                return Ok(());
            }
            ConvertTarget::Device(device) => device,
        };
        let zeros = vec![0; BLOCK_BYTES];
        while count > 0 {
            let most = usize::try_from(count).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
            device.write_all_at(&zeros[..most], offset)?;
            offset += most as u64;
            count -= most as u64;
        }
        Ok(())
    }
}
