//! A file that is written from beginning to end, with holes for long runs of zeros.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The largest run of zeros that is written out, in bytes: a qcow2 cluster; file systems have
/// smaller blocks.
const HOLE_BYTES: usize = 64 << 10;

/// A growing file with holes.
#[derive(Debug)]
pub(crate) struct SparseFile {
    file: File,
    /// How many bytes are written, including holes at the end.
    end: u64,
}

impl SparseFile {
    /// Starts at the beginning of an empty file.
    pub(crate) fn new(file: File) -> Self {
        Self { file, end: 0 }
    }

    /// Returns how many bytes are written.
    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    /// Continues after what an earlier writer left, and reads that.
    pub(crate) fn reread(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, self.end)?;
        self.end += buffer.len() as u64;
        Ok(())
    }

    /// Writes the next bytes.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // The pieces end at block boundaries, or a hole would not be one.
        let to_boundary = HOLE_BYTES - usize::try_from(self.end % HOLE_BYTES as u64).unwrap_or(0);
        let (first, rest) = bytes.split_at(to_boundary.min(bytes.len()));
        let mut run_start = 0;
        let mut at = 0;
        for piece in std::iter::once(first).chain(rest.chunks(HOLE_BYTES)) {
            if is_zero(piece) {
                self.write(&bytes[run_start..at], run_start)?;
                run_start = at + piece.len();
            }
            at += piece.len();
        }
        self.write(&bytes[run_start..], run_start)?;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// Leaves a hole.
    pub(crate) fn skip(&mut self, bytes: u64) {
        self.end += bytes;
    }

    fn write(&self, bytes: &[u8], offset: usize) -> io::Result<()> {
        self.file.write_all_at(bytes, self.end + offset as u64)
    }

    /// Sets the file's length, which a hole at the end does not.
    pub(crate) fn finish(self) -> io::Result<File> {
        self.file.set_len(self.end)?;
        Ok(self.file)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // In words, which the compiler vectorises; most data ends the loop at once.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}
