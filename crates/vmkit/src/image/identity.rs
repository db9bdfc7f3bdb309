//! What an image was when a VM was made on it, so that a change is noticed before the VM starts:
//! [`ImageIdentity`].
//!
//! Edge: reads files. A VM's disk holds only the difference to its image, so another image below it
//! is a broken file system. The identity survives what changes no byte: a move, `cp -a`, `touch`.
//! It has no path, device or inode number for that reason. An image that was neither written to nor
//! moved is known by its times alone; else its content decides.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::input_file::InputFile;

/// The most data that is read for a checksum, in bytes: some 40 ms of reading from the page cache.
/// Holes are not data. A larger image is known by its length and time alone.
const MOST_DATA_BYTES: u64 = 128 << 20;
const BLOCK_BYTES: usize = 64 << 10;
static ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// What tells an image from one that was changed or put in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ImageIdentity {
    /// The length of the file.
    bytes: u64,
    /// When its content was written last, in nanoseconds since 1970.
    modified_ns: i64,
    /// When anything about the file changed last. No program can set it, so one that is the same
    /// means the same file.
    changed_ns: i64,
    /// The checksum of its content; none for an image with more data than is read for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checksum: Option<u32>,
}

/// How an image differs from what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImageChange {
    /// It has another length.
    Length { before: u64, now: u64 },
    /// Its bytes are others.
    Content,
    /// It was written, or copied, since, and is too large to be compared.
    Time { before_ns: i64 },
}

impl ImageIdentity {
    /// Reads what an image is now. Blocks while its content is read.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for what is no regular file that may be read; `Io` where reading
    /// fails.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let InputFile { file, .. } = InputFile::open("image", path)?;
        let read = || {
            // Before the content: a write in between is found at the next comparison.
            let metadata = file.metadata()?;
            let checksum = if is_named_by_content(path) { None } else { checksum(&file, &metadata)? };
            Ok(Self { checksum, ..Self::of_times(&metadata) })
        };
        read().map_err(Error::io("read", path))
    }

    fn of_times(metadata: &Metadata) -> Self {
        let ns = |seconds: i64, ns: i64| seconds.saturating_mul(1_000_000_000).saturating_add(ns);
        Self {
            bytes: metadata.len(),
            modified_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            changed_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
            checksum: None,
        }
    }

    /// Compares with the image as it is now, and returns what to note from now on. Blocks while the
    /// content is read, which happens only where the file was touched since.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub(crate) fn compared(&self, path: &Path) -> Result<std::result::Result<Self, ImageChange>> {
        let InputFile { file, .. } = InputFile::open("image", path)?;
        let metadata = file.metadata().map_err(Error::io("examine", path))?;
        let now = Self { checksum: self.checksum, ..Self::of_times(&metadata) };
        if now.bytes != self.bytes {
            return Ok(Err(ImageChange::Length { before: self.bytes, now: now.bytes }));
        }
        if now == *self {
            return Ok(Ok(now));
        }
        let is_same = match self.checksum {
            Some(before) => checksum(&file, &metadata).map(|found| Some(found == Some(before))),
            None if now.modified_ns == self.modified_ns => Ok(Some(true)),
            None => has_named_content(file, path),
        };
        Ok(match is_same.map_err(Error::io("read", path))? {
            Some(true) => Ok(now),
            Some(false) => Err(ImageChange::Content),
            None => Err(ImageChange::Time { before_ns: self.modified_ns }),
        })
    }
}

impl ImageChange {
    /// Says what changed of the image of this VM, and what to do.
    pub(crate) fn refusal(self, vm: &str, path: &Path) -> String {
        let remedy = format!(
            "the disk of `{vm}` holds only the difference to the original image: restore that, or recreate \
             the VM"
        );
        match self {
            ImageChange::Length { before, now } => format!(
                "the image was changed since the VM `{vm}` was created on it, from {before} bytes to \
                 {now}; {remedy}"
            ),
            ImageChange::Content => format!(
                "the image was changed since the VM `{vm}` was created on it: the size is the same, the \
                 content is not; {remedy}"
            ),
            ImageChange::Time { before_ns } => {
                let (seconds, ns) =
                    (before_ns.div_euclid(1_000_000_000), before_ns.rem_euclid(1_000_000_000));
                let word = path.display().to_string().replace('\'', r"'\''");
                format!(
                    "the image was written, or copied, since the VM `{vm}` was created on it; {remedy}; if \
                     no byte of it \
                     changed, `touch -d @{seconds}.{ns:09} '{word}'` sets its time back"
                )
            }
        }
    }
}

/// Reports whether a file is an image of the store, whose directory is named by what the file
/// hashes to: no checksum is needed.
#[cfg(feature = "images")]
fn is_named_by_content(path: &Path) -> bool {
    named_content(path).is_some()
}

#[cfg(not(feature = "images"))]
fn is_named_by_content(_: &Path) -> bool {
    false
}

#[cfg(feature = "images")]
fn named_content(path: &Path) -> Option<super::digest::Digest> {
    super::kept::id_of_dir(path.parent()?.file_name()?.to_str()?)
}

/// Reads a file whole that its directory names by its content, and returns whether it has that;
/// `None` for any other file.
#[cfg(feature = "images")]
fn has_named_content(mut file: File, path: &Path) -> io::Result<Option<bool>> {
    use super::digest::{DigestAlgorithm, Hasher};
    let Some(digest) = named_content(path) else { return Ok(None) };
    let mut hasher = Hasher::new(DigestAlgorithm::Sha256);
    let mut block = vec![0; 16 * BLOCK_BYTES];
    loop {
        match std::io::Read::read(&mut file, &mut block)? {
            0 => return Ok(Some(hasher.finish() == digest)),
            count => hasher.update(&block[..count]),
        }
    }
}

#[cfg(not(feature = "images"))]
fn has_named_content(_: File, _: &Path) -> io::Result<Option<bool>> {
    Ok(None)
}

/// Reads a file whole and returns its checksum; none where there is more data than is read for one.
///
/// Blocks of zeros are left out, so that a copy with other holes has the same one.
fn checksum(file: &File, metadata: &Metadata) -> io::Result<Option<u32>> {
    let bytes = metadata.len();
    // Blocks are counted in 512 bytes, whatever the file system's own are.
    if bytes.min(metadata.blocks().saturating_mul(512)) > MOST_DATA_BYTES {
        return Ok(None);
    }
    let mut hasher = crc32fast::Hasher::new();
    let mut block = vec![0; BLOCK_BYTES];
    let (mut at, mut data_bytes) = (0, 0);
    while at < bytes {
        // A file system that knows of no holes has data everywhere.
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => at = data - data % BLOCK_BYTES as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => {}
        }
        let read = read_block(file, &mut block, at)?;
        if read == 0 {
            break;
        }
        data_bytes += read as u64;
        if data_bytes > MOST_DATA_BYTES {
            return Ok(None);
        }
        if block[..read] != ZEROS[..read] {
            hasher.update(&at.to_le_bytes());
            hasher.update(&block[..read]);
        }
        at += BLOCK_BYTES as u64;
    }
    Ok(Some(hasher.finalize()))
}

/// Reads a whole block, or what there is before the end of the file.
fn read_block(file: &File, block: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < block.len() {
        match file.read_at(&mut block[read..], at + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::{Duration, SystemTime};

    fn write_at(path: &Path, bytes: &[u8], at: u64) {
        File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
    }

    fn set_modified(path: &Path, time: SystemTime) {
        File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    }

    fn image(path: &Path) -> ImageIdentity {
        fs::write(path, [7; 200_000]).unwrap();
        File::options().write(true).open(path).unwrap().set_len(9 << 20).unwrap();
        write_at(path, b"end", (9 << 20) - 3);
        ImageIdentity::of(path).unwrap()
    }

    #[test]
    fn an_image_that_was_touched_moved_or_copied_is_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let [path, moved, copied] = ["image", "moved", "copied"].map(|name| dir.path().join(name));
        let noted = image(&path);
        assert_eq!(noted.compared(&path).unwrap(), Ok(noted.clone()));
        set_modified(&path, SystemTime::UNIX_EPOCH + Duration::from_secs(1));
        let touched = noted.compared(&path).unwrap().unwrap();
        assert_ne!(touched, noted, "the times are noted again");
        fs::rename(&path, &moved).unwrap();
        noted.compared(&moved).unwrap().unwrap();
        // With other holes, as a copy may have.
        fs::write(&copied, fs::read(&moved).unwrap()).unwrap();
        noted.compared(&copied).unwrap().unwrap();
    }

    #[test]
    fn one_byte_a_length_and_another_file_are_changes_whatever_the_times_say() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let noted = image(&path);
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        write_at(&path, b"x", 5 << 20);
        set_modified(&path, modified);
        assert_eq!(noted.compared(&path).unwrap(), Err(ImageChange::Content));
        File::options().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
        let change = noted.compared(&path).unwrap().unwrap_err();
        assert_eq!(change, ImageChange::Length { before: 9 << 20, now: 4 << 20 });
        let text = change.refusal("web", &path);
        assert!(text.contains("`web`") && text.contains("9437184") && text.contains("4194304"), "{text}");
    }

    #[test]
    fn an_image_too_large_to_be_read_is_identified_by_its_time_and_the_remedy_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("it's an image");
        let noted = ImageIdentity { checksum: None, ..image(&path) };
        let touched = SystemTime::UNIX_EPOCH + Duration::new(77, 5);
        set_modified(&path, touched);
        let change = noted.compared(&path).unwrap().unwrap_err();
        let text = change.refusal("web", &path);
        let command = text.split('`').find(|part| part.starts_with("touch ")).unwrap_or_default();
        let ran = std::process::Command::new("sh").args(["-c", command]).status().unwrap();
        assert!(ran.success(), "{command}");
        noted.compared(&path).unwrap().unwrap();
    }
}
