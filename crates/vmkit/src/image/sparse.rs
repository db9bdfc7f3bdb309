//! A file that is written from the beginning to the end and has holes for long runs of zeros.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The largest run of zeros that is written out: the size of a qcow2 cluster, and no file system's blocks are larger.
const HOLE_BYTES: usize = 64 << 10;

/// A file that grows, holes among it.
#[derive(Debug)]
pub(super) struct SparseFile {
    file: File,
    /// How much of it is written, holes at its end among it.
    end: u64,
}

impl SparseFile {
    /// Begins at the beginning of a file; what lies behind what is written must be nothing.
    pub(super) fn new(file: File) -> Self {
        Self { file, end: 0 }
    }

    /// Answers how much of it is written.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Takes what an earlier writer left as written, and reads it.
    pub(super) fn reread(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, self.end)?;
        self.end += buffer.len() as u64;
        Ok(())
    }

    /// Writes what comes next.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // The pieces end where the file's blocks end, or a hole would be no hole.
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
    pub(super) fn skip(&mut self, bytes: u64) {
        self.end += bytes;
    }

    fn write(&self, bytes: &[u8], offset: usize) -> io::Result<()> {
        self.file.write_all_at(bytes, self.end + offset as u64)
    }

    /// Gives the file its length, which a hole at its end does not.
    pub(super) fn finish(self) -> io::Result<File> {
        self.file.set_len(self.end)?;
        Ok(self.file)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // In words, which the compiler makes vectors of; most bytes that are not zero end it at once.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}
