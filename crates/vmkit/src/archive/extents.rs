//! Which parts of a file are data and which are holes, and the checksum of both.
//!
//! Edge: reads files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::blocks::{DataPiece, MOST_PIECES};
use crate::image::{Digest, DigestAlgorithm, Hasher};

/// How much is read at a time.
pub(super) const COPY_BYTES: usize = 1 << 20;
/// Holes below this size are written as zeros: each costs a place in a list.
#[cfg(target_os = "linux")]
const LEAST_HOLE_BYTES: u64 = 64 << 10;
static ZEROS: [u8; COPY_BYTES] = [0; COPY_BYTES];

/// The length of a file and its data, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileExtents {
    pub(crate) bytes: u64,
    pub(super) pieces: Vec<DataPiece>,
}

impl FileExtents {
    /// Examines a file.
    ///
    /// # Errors
    /// Those of the system.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { bytes, pieces: pieces(file, bytes)? })
    }

    /// Returns the length without holes.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.pieces.iter().map(|(_, length)| length).sum()
    }

    /// Reads the data piece by piece, and the holes as their lengths.
    ///
    /// # Errors
    /// Those of the system, and of `visit`.
    pub(super) fn read(
        &self,
        file: &File,
        mut visit: impl FnMut(FilePart<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut block, mut at) = (vec![0; COPY_BYTES], 0);
        for (offset, length) in &self.pieces {
            if *offset > at {
                visit(FilePart::Hole(offset - at))?;
            }
            at = *offset;
            let end = offset + length;
            while at < end {
                let most = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
                // A file that became shorter fails here.
                file.read_exact_at(&mut block[..most], at)?;
                visit(FilePart::Data(&block[..most]))?;
                at += most as u64;
            }
        }
        match self.bytes > at {
            true => visit(FilePart::Hole(self.bytes - at)),
            false => Ok(()),
        }
    }
}

/// A part of a file.
pub(super) enum FilePart<'a> {
    Data(&'a [u8]),
    /// A hole of this many bytes.
    Hole(u64),
}

/// Hashes a hole.
pub(super) fn hash_zeros(hasher: &mut Hasher, mut bytes: u64) {
    while bytes > 0 {
        let most = usize::try_from(bytes).unwrap_or(COPY_BYTES).min(COPY_BYTES);
        hasher.update(&ZEROS[..most]);
        bytes -= most as u64;
    }
}

/// Returns the checksum of a file; `read` is called with each number of bytes that was read.
///
/// # Errors
/// Those of the system, and of `read`.
pub(crate) fn hash_of(
    file: &File,
    extents: &FileExtents,
    mut read: impl FnMut(u64) -> io::Result<()>,
) -> io::Result<Digest> {
    let mut hasher = Hasher::new(DigestAlgorithm::Sha256);
    extents.read(file, |part| match part {
        FilePart::Hole(bytes) => {
            hash_zeros(&mut hasher, bytes);
            Ok(())
        }
        FilePart::Data(data) => {
            hasher.update(data);
            read(data.len() as u64)
        }
    })?;
    Ok(hasher.finish())
}

/// Finds the data of a file. Where there are more pieces than an archive takes, small holes count
/// as data.
#[cfg(target_os = "linux")]
fn pieces(file: &File, bytes: u64) -> io::Result<Vec<DataPiece>> {
    let mut least_hole = LEAST_HOLE_BYTES;
    loop {
        if let Some(pieces) = pieces_between(file, bytes, least_hole)? {
            return Ok(pieces);
        }
        least_hole *= 4;
    }
}

/// Source: lseek(2), SEEK_DATA and SEEK_HOLE.
#[cfg(target_os = "linux")]
fn pieces_between(file: &File, bytes: u64, least_hole: u64) -> io::Result<Option<Vec<DataPiece>>> {
    use rustix::fs::{SeekFrom, seek};
    use rustix::io::Errno;
    let mut pieces: Vec<DataPiece> = Vec::new();
    let mut at = 0;
    while at < bytes {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start.min(bytes),
            // A hole to the end.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if start >= bytes {
            break;
        }
        let end = seek(file, SeekFrom::Hole(start))?.min(bytes);
        let is_full = pieces.len() + 2 > MOST_PIECES;
        match pieces.last_mut() {
            Some((offset, length)) if start - (*offset + *length) < least_hole => *length = end - *offset,
            _ if is_full => return Ok(None),
            _ => pieces.push((start, end - start)),
        }
        at = end;
    }
    Ok(Some(pieces))
}

/// Elsewhere holes are read as the zeros that they are.
#[cfg(not(target_os = "linux"))]
fn pieces(_: &File, bytes: u64) -> io::Result<Vec<DataPiece>> {
    debug_assert!(MOST_PIECES > 0);
    Ok(if bytes == 0 { Vec::new() } else { vec![(0, bytes)] })
}
