//! The blocks of a tar archive before a file: its name, its length, and where its holes are.
//!
//! Pure. Files without holes are plain entries, the others entries of GNU tar's old sparse format,
//! which GNU tar, bsdtar and the crate `tar` read.
//!
//! Source: "Storing Sparse Files" and "Basic Tar Format" in the manual of GNU tar.

use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

/// The size of a block in bytes.
pub(super) const BLOCK_BYTES: usize = 512;
/// The most pieces that are read of one file.
pub(super) const MOST_PIECES: usize = 1 << 20;

/// A piece of a file with data: its offset and its length.
pub(super) type DataPiece = (u64, u64);

/// What an archive says of a file before its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EntryHead {
    pub(super) name: String,
    /// The length of the file.
    pub(super) bytes: u64,
    /// Its data, in order, with holes in between.
    pub(super) pieces: Vec<DataPiece>,
}

impl EntryHead {
    /// Returns how many bytes of data there are.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.pieces.iter().map(|(_, length)| length).sum()
    }

    /// Returns its blocks.
    pub(super) fn encode(&self, mtime: u64) -> Vec<u8> {
        let mut header = Header::new_gnu();
        header.set_path(&self.name).expect("the names of entries fit");
        header.set_mode(0o600);
        header.set_mtime(mtime);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(self.stored_bytes());
        header.set_entry_type(EntryType::Regular);
        let mut pieces = self.pieces.clone();
        let is_plain = self.stored_bytes() == self.bytes;
        if !is_plain && pieces.last().is_none_or(|(offset, length)| offset + length < self.bytes) {
            // Where the hole at the end ends.
            pieces.push((self.bytes, 0));
        }
        let mut rest = &pieces[..];
        if !is_plain {
            header.set_entry_type(EntryType::GNUSparse);
            let gnu = header.as_gnu_mut().expect("it was created as one");
            gnu.set_real_size(self.bytes);
            rest = fill(&mut gnu.sparse, rest);
            gnu.set_is_extended(!rest.is_empty());
        }
        header.set_cksum();
        let mut blocks = header.as_bytes().to_vec();
        while !is_plain && !rest.is_empty() {
            let mut more = GnuExtSparseHeader::new();
            rest = fill(more.sparse_mut(), rest);
            more.set_is_extended(!rest.is_empty());
            blocks.extend(more.as_bytes());
        }
        blocks
    }
}

/// Writes as many pieces as there is room for, and returns the others.
fn fill<'a>(slots: &mut [GnuSparseHeader], pieces: &'a [DataPiece]) -> &'a [DataPiece] {
    let (first, rest) = pieces.split_at(pieces.len().min(slots.len()));
    for (slot, (offset, length)) in slots.iter_mut().zip(first) {
        slot.set_offset(*offset);
        slot.set_length(*length);
    }
    rest
}

/// The head of an entry, as its blocks are read.
#[derive(Debug)]
pub(super) struct HeadParser {
    head: EntryHead,
    stored_bytes: u64,
    is_extended: bool,
}

impl HeadParser {
    /// Reads the first block.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn begin(block: &[u8; BLOCK_BYTES]) -> Result<Self, String> {
        let header = Header::from_byte_slice(block);
        let damaged = |_| "an entry's header is damaged".to_owned();
        let mut right = header.clone();
        right.set_cksum();
        if right.as_bytes() != block {
            return Err("the checksum of an entry's header is wrong".to_owned());
        }
        let gnu = header.as_gnu().ok_or("an entry's header is not GNU tar's")?;
        let name = String::from_utf8(header.path_bytes().into_owned())
            .map_err(|_| "the name of an entry is not UTF-8".to_owned())?;
        let stored_bytes = header.entry_size().map_err(damaged)?;
        let head = |bytes, pieces| EntryHead { name: name.clone(), bytes, pieces };
        match header.entry_type() {
            EntryType::Regular => {
                let pieces = if stored_bytes == 0 { Vec::new() } else { vec![(0, stored_bytes)] };
                Ok(Self { head: head(stored_bytes, pieces), stored_bytes, is_extended: false })
            }
            EntryType::GNUSparse => {
                let mut parser = Self {
                    head: head(gnu.real_size().map_err(damaged)?, Vec::new()),
                    stored_bytes,
                    is_extended: gnu.is_extended(),
                };
                parser.take(&gnu.sparse)?;
                Ok(parser)
            }
            _ => Err(format!("its entry {name:?} is a link, a directory or a device")),
        }
    }

    /// Returns whether another block of the head follows.
    pub(super) fn is_extended(&self) -> bool {
        self.is_extended
    }

    /// Reads another block of the head.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn extend(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<(), String> {
        let mut more = GnuExtSparseHeader::new();
        more.as_mut_bytes().copy_from_slice(block);
        if more.isextended[0] > 1 || more.padding.iter().any(|byte| *byte != 0) {
            return Err("a list of holes is damaged".to_owned());
        }
        self.is_extended = more.is_extended();
        self.take(more.sparse())
    }

    fn take(&mut self, slots: &[GnuSparseHeader]) -> Result<(), String> {
        let wrong = || format!("the holes of {:?} do not fit to its length", self.head.name);
        let mut end = self.head.pieces.last().map_or(0, |(offset, length)| offset + length);
        let mut is_over = false;
        for slot in slots {
            let is_blank = |field: &[u8]| field.iter().all(|byte| *byte == 0);
            if is_blank(&slot.offset) && is_blank(&slot.numbytes) {
                is_over = true;
                continue;
            }
            let (Ok(offset), Ok(length)) = (slot.offset(), slot.length()) else { return Err(wrong()) };
            let to = offset.checked_add(length).filter(|to| *to <= self.head.bytes).ok_or_else(wrong)?;
            if is_over || offset < end || self.head.pieces.len() >= MOST_PIECES {
                return Err(wrong());
            }
            self.head.pieces.push((offset, length));
            end = to;
        }
        match is_over && self.is_extended {
            true => Err(wrong()),
            false => Ok(()),
        }
    }

    /// Returns the head, once all of its blocks are read.
    ///
    /// # Errors
    /// What does not fit together.
    pub(super) fn finish(mut self) -> Result<EntryHead, String> {
        self.head.pieces.retain(|(_, length)| *length > 0);
        match self.head.stored_bytes() == self.stored_bytes {
            true => Ok(self.head),
            false => Err(format!("the holes of {:?} do not fit to its length", self.head.name)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(blocks: &[u8]) -> Result<EntryHead, String> {
        let (blocks, rest) = blocks.as_chunks::<BLOCK_BYTES>();
        assert!(rest.is_empty());
        let mut parser = HeadParser::begin(&blocks[0])?;
        let mut more = blocks[1..].iter();
        while parser.is_extended() {
            parser.extend(more.next().ok_or("no block follows")?)?;
        }
        assert_eq!(more.len(), 0);
        parser.finish()
    }

    fn head(bytes: u64, pieces: &[DataPiece]) -> EntryHead {
        EntryHead { name: "files/root.qcow2".to_owned(), bytes, pieces: pieces.to_vec() }
    }

    #[test]
    fn heads_survive_their_blocks() {
        let many: Vec<DataPiece> = (0..100).map(|index| (index * 1000, 10)).collect();
        for (bytes, pieces) in [
            (0, &[][..]),
            (512, &[(0, 512)]),
            (1 << 40, &[]),
            (1 << 40, &[(0, 512), (1 << 39, 1 << 38)]),
            (100, &[(90, 10)]),
            (100_000, &many),
            (99_010, &many),
        ] {
            let head = head(bytes, pieces);
            assert_eq!(parsed(&head.encode(1_700_000_000)).unwrap(), head);
        }
    }

    #[test]
    fn pieces_that_overlap_or_lie_outside_are_refused() {
        for pieces in [&[(0, 10), (5, 10)][..], &[(50, 10), (0, 10)], &[(95, 10)]] {
            let problem = parsed(&head(100, pieces).encode(0)).unwrap_err();
            assert!(problem.contains("do not fit"), "{pieces:?}: {problem}");
        }
    }

    #[test]
    fn links_directories_and_extensions_are_refused() {
        for kind in [
            EntryType::Symlink,
            EntryType::Link,
            EntryType::Directory,
            EntryType::Block,
            EntryType::Fifo,
            EntryType::XHeader,
            EntryType::GNULongName,
        ] {
            let mut header = Header::new_gnu();
            header.set_path("files/root.qcow2").unwrap();
            header.set_entry_type(kind);
            header.set_size(0);
            header.set_cksum();
            assert!(parsed(header.as_bytes()).unwrap_err().contains("is a link, a directory or a device"));
        }
    }

    proptest! {
        #[test]
        fn reading_any_blocks_never_panics(
            damage in proptest::collection::vec((0..1024_usize, any::<u8>()), 0..40),
        ) {
            let many: Vec<DataPiece> = (0..20).map(|index| (index * 1000, 10)).collect();
            let mut blocks = head(1 << 40, &many).encode(0);
            for (at, byte) in damage {
                blocks[at] = byte;
            }
            if let Ok(block) = <&[u8; BLOCK_BYTES]>::try_from(&blocks[..BLOCK_BYTES])
                && let Ok(mut parser) = HeadParser::begin(block)
            {
                let more = blocks[BLOCK_BYTES..].try_into().unwrap();
                let _ = parser.extend(more);
                let _ = parser.finish();
            }
        }
    }
}
