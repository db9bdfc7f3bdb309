//! Reads the file of an exported VM, which is not trusted.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::blocks::{BLOCK_BYTES, EntryHead, HeadParser};
use super::extents::{COPY_BYTES, hash_zeros};
use super::format::{ExportHeader, HEADER, ListedFile, MOST_HEADER_BYTES, SUMS};
use super::writer::{padding, sum_line};
use crate::error::{Error, Result};
use crate::image::{Digest, DigestAlgorithm, Hasher, SparseFile};

/// What files begin with that something else than `vmkit export` has compressed.
const COMPRESSED: [&[u8]; 4] = [b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh"];

/// An archive that is being read, in its order. Whatever is wrong with it is `InvalidInput` on
/// `file`.
pub(crate) struct ArchiveReader<R> {
    input: R,
    /// Its name in errors.
    shown: PathBuf,
    /// How many bytes were read.
    at: u64,
    /// What its checksums have to be.
    sums: String,
}

impl<R: Read> ArchiveReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// `InvalidInput` on `file`; `Io`.
    pub(crate) fn open(input: R, shown: &Path) -> Result<(Self, ExportHeader)> {
        let mut reader = Self { input, shown: shown.to_owned(), at: 0, sums: String::new() };
        let mut first = [0; BLOCK_BYTES];
        let foreign = "this is not an export of a VM (expected a file of `vmkit export`)";
        reader.read(&mut first)?;
        if COMPRESSED.iter().any(|magic| first.starts_with(magic)) {
            return Err(reader.refused("this file is compressed: decompress it first"));
        }
        let head = match HeadParser::begin(&first) {
            Ok(parser) if !parser.is_extended() => parser.finish(),
            Ok(_) => Err(foreign.to_owned()),
            Err(_) => return Err(reader.refused(foreign)),
        };
        let head = head.ok().filter(|head| head.name == HEADER && head.stored_bytes() == head.bytes);
        let Some(head) = head else { return Err(reader.refused(foreign)) };
        let bytes = reader.content(&head, MOST_HEADER_BYTES)?;
        let header = ExportHeader::decode(shown, &bytes)?;
        Ok((reader, header))
    }

    /// Reads the next file, which the header lists as a small one.
    ///
    /// # Errors
    /// `InvalidInput` on `file`; `Io`.
    pub(crate) fn bytes(&mut self, listed: &ListedFile, most: u64) -> Result<Vec<u8>> {
        let head = self.head_of(listed)?;
        if head.stored_bytes() != head.bytes {
            return Err(self.refused(&format!("its file {} has holes", listed.name)));
        }
        self.content(&head, most)
    }

    /// Reads the next file, which the header lists, into an empty one at `path`, with holes for its
    /// zeros, or nowhere; returns its checksum. `copied` is called with each number of bytes, and
    /// ends it by an error.
    ///
    /// # Errors
    /// `InvalidInput` on `file`; `Io` and `Host`, on `path` if that can't be written.
    pub(crate) fn file(
        &mut self,
        listed: &ListedFile,
        to: Option<(File, &Path)>,
        mut copied: impl FnMut(u64) -> Result<()>,
    ) -> Result<(Digest, Option<File>)> {
        let head = self.head_of(listed)?;
        let mut hasher = Hasher::new(DigestAlgorithm::Sha256);
        let path = to.as_ref().map_or_else(PathBuf::new, |(_, path)| path.to_path_buf());
        let mut to = to.map(|(file, _)| SparseFile::new(file));
        let (mut block, mut at) = (vec![0; COPY_BYTES], 0);
        for (offset, length) in &head.pieces {
            hash_zeros(&mut hasher, offset - at);
            if let Some(to) = &mut to {
                to.skip(offset - at);
            }
            at = *offset;
            let end = offset + length;
            while at < end {
                let most = usize::try_from(end - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
                let data = &mut block[..most];
                self.read(data)?;
                hasher.update(data);
                if let Some(to) = &mut to {
                    to.append(data).map_err(Error::io("write", &path))?;
                }
                at += most as u64;
                copied(most as u64)?;
            }
        }
        hash_zeros(&mut hasher, head.bytes - at);
        if let Some(to) = &mut to {
            to.skip(head.bytes - at);
        }
        let file = to.map(|to| to.finish().map_err(Error::io("write", &path))).transpose()?;
        self.skip_padding(head.stored_bytes())?;
        let digest = hasher.finish();
        self.sums.push_str(&sum_line(&listed.name, &digest));
        Ok((digest, file))
    }

    /// Compares the checksums, and reads to the end.
    ///
    /// # Errors
    /// `InvalidInput` on `file`; `Io`.
    pub(crate) fn finish(mut self) -> Result<()> {
        let head = self.head()?;
        if head.name != SUMS || head.stored_bytes() != head.bytes {
            return Err(self.refused(&format!("it has {:?} instead of its checksums", head.name)));
        }
        let expected = std::mem::take(&mut self.sums);
        // Longer than the right ones is wrong, however long.
        let most = expected.len() as u64;
        if head.bytes != most {
            return Err(self.refused("its checksums are not those of its files: it is damaged"));
        }
        let found = self.content(&head, most)?;
        for (line, expected) in found.split_inclusive(|byte| *byte == b'\n').zip(expected.lines()) {
            if line.strip_suffix(b"\n") != Some(expected.as_bytes()) {
                let name = expected.split_once("  ").map_or(expected, |(_, name)| name);
                let why = format!("its file {name} has another checksum than the export says: it is damaged");
                return Err(self.refused(&why));
            }
        }
        let mut end = [0; 2 * BLOCK_BYTES];
        self.read(&mut end)?;
        let mut more = [0];
        let is_end = end.iter().all(|byte| *byte == 0);
        match self.input.read(&mut more).map_err(Error::io("read", &self.shown))? {
            0 if is_end => Ok(()),
            _ => Err(self.refused("something follows its checksums: it is damaged")),
        }
    }

    fn head_of(&mut self, listed: &ListedFile) -> Result<EntryHead> {
        let head = self.head()?;
        if head.name != listed.name {
            let why = format!("it has the file {:?} where {} is announced", head.name, listed.name);
            return Err(self.refused(&why));
        }
        if (head.bytes, head.stored_bytes()) != (listed.bytes, listed.stored_bytes) {
            let why = format!(
                "its file {} has {} bytes, {} of them data, and {} and {} are announced",
                head.name,
                head.bytes,
                head.stored_bytes(),
                listed.bytes,
                listed.stored_bytes
            );
            return Err(self.refused(&why));
        }
        Ok(head)
    }

    fn head(&mut self) -> Result<EntryHead> {
        let mut block = [0; BLOCK_BYTES];
        self.read(&mut block)?;
        let mut parser = HeadParser::begin(&block).map_err(|why| self.damaged(&why))?;
        while parser.is_extended() {
            self.read(&mut block)?;
            parser.extend(&block).map_err(|why| self.damaged(&why))?;
        }
        parser.finish().map_err(|why| self.damaged(&why))
    }

    /// Reads the content of a small file without holes.
    fn content(&mut self, head: &EntryHead, most: u64) -> Result<Vec<u8>> {
        if head.bytes > most {
            let why = format!("its {} has {} bytes (expected at most {most})", head.name, head.bytes);
            return Err(self.refused(&why));
        }
        let mut bytes = vec![0; usize::try_from(head.bytes).expect("the limits are small")];
        self.read(&mut bytes)?;
        self.skip_padding(head.bytes)?;
        let digest = Hasher::digest(DigestAlgorithm::Sha256, &bytes);
        self.sums.push_str(&sum_line(&head.name, &digest));
        Ok(bytes)
    }

    fn skip_padding(&mut self, bytes: u64) -> Result<()> {
        let mut zeros = [0; BLOCK_BYTES];
        let zeros = &mut zeros[..padding(bytes)];
        self.read(zeros)?;
        match zeros.iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(self.damaged("a file is followed by something else")),
        }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match self.input.read(&mut bytes[done..]) {
                Ok(0) if self.at == 0 => return Err(self.refused("the file is empty")),
                Ok(0) => {
                    let why = format!("it is truncated: it ends after {} bytes", self.at);
                    return Err(self.refused(&why));
                }
                Ok(read) => {
                    done += read;
                    self.at += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("read", &self.shown)(error)),
            }
        }
        Ok(())
    }

    fn damaged(&self, why: &str) -> Error {
        self.refused(&format!("{why}, before byte {}: it is damaged", self.at))
    }

    fn refused(&self, why: &str) -> Error {
        Error::invalid("file", self.shown.display(), why)
    }
}
