//! Writes the file of an exported VM.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::blocks::{BLOCK_BYTES, EntryHead};
use super::extents::{FileExtents, FilePart, hash_zeros};
use super::format::{ExportHeader, HEADER, SUMS};
use crate::error::{Error, Result};
use crate::image::{Digest, DigestAlgorithm, Hasher};

/// An archive that is being written.
pub(crate) struct ArchiveWriter<W> {
    out: W,
    /// Its name in errors.
    shown: PathBuf,
    mtime: u64,
    sums: String,
    written_bytes: u64,
}

impl<W: Write> ArchiveWriter<W> {
    /// Starts an archive with its header, written at `mtime` in seconds since 1970.
    ///
    /// # Errors
    /// `Io`, `Host`.
    pub(crate) fn begin(out: W, shown: &Path, mtime: u64, header: &ExportHeader) -> Result<Self> {
        let mut writer = Self { out, shown: shown.to_owned(), mtime, sums: String::new(), written_bytes: 0 };
        writer.bytes(HEADER, &header.encode())?;
        Ok(writer)
    }

    /// Writes a file of these bytes.
    ///
    /// # Errors
    /// `Io`, `Host`.
    pub(crate) fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.note(name, &Hasher::digest(DigestAlgorithm::Sha256, bytes));
        self.entry(name, bytes)
    }

    /// Writes a file with its holes, and returns its checksum; `copied` is called with each number
    /// of bytes, and ends it by an error.
    ///
    /// # Errors
    /// `Io` and `Host`, on `path` if it can't be read; those of `copied`.
    pub(crate) fn file(
        &mut self,
        name: &str,
        (file, extents, path): (&File, &FileExtents, &Path),
        mut copied: impl FnMut(u64) -> Result<()>,
    ) -> Result<Digest> {
        let head = EntryHead { name: name.to_owned(), bytes: extents.bytes, pieces: extents.pieces.clone() };
        self.write(&head.encode(self.mtime))?;
        let mut hasher = Hasher::new(DigestAlgorithm::Sha256);
        let mut failed = None;
        let read = extents.read(file, |part| {
            let written = match part {
                FilePart::Hole(bytes) => {
                    hash_zeros(&mut hasher, bytes);
                    Ok(())
                }
                FilePart::Data(data) => {
                    hasher.update(data);
                    self.write(data).and_then(|()| copied(data.len() as u64))
                }
            };
            written.map_err(|error| {
                failed = Some(error);
                io::ErrorKind::Other.into()
            })
        });
        match (failed, read) {
            (Some(error), _) => return Err(error),
            (None, read) => read.map_err(Error::io("read", path))?,
        }
        self.pad(head.stored_bytes())?;
        let digest = hasher.finish();
        self.note(name, &digest);
        Ok(digest)
    }

    /// Writes the checksums and the end, and returns what was written to, and how many bytes.
    ///
    /// # Errors
    /// `Io`, `Host`.
    pub(crate) fn finish(mut self) -> Result<(W, u64)> {
        let sums = std::mem::take(&mut self.sums);
        self.entry(SUMS, sums.as_bytes())?;
        self.write(&[0; 2 * BLOCK_BYTES])?;
        self.out.flush().map_err(Error::io("write", &self.shown))?;
        Ok((self.out, self.written_bytes))
    }

    fn entry(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let length = bytes.len() as u64;
        let pieces = if length == 0 { Vec::new() } else { vec![(0, length)] };
        let head = EntryHead { name: name.to_owned(), bytes: length, pieces };
        self.write(&head.encode(self.mtime))?;
        self.write(bytes)?;
        self.pad(length)
    }

    fn note(&mut self, name: &str, digest: &Digest) {
        self.sums.push_str(&sum_line(name, digest));
    }

    fn pad(&mut self, bytes: u64) -> Result<()> {
        self.write(&[0; BLOCK_BYTES][..padding(bytes)])
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written_bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(Error::io("write", &self.shown))
    }
}

/// Returns a line of the checksums, as `sha256sum` writes it.
pub(super) fn sum_line(name: &str, digest: &Digest) -> String {
    format!("{}  {name}\n", digest.hex())
}

/// Returns how many zeros follow this many bytes.
pub(super) fn padding(bytes: u64) -> usize {
    let over = usize::try_from(bytes % BLOCK_BYTES as u64).unwrap_or(0);
    (BLOCK_BYTES - over) % BLOCK_BYTES
}
