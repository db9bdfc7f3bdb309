//! The file of an exported VM: a tar archive that is read and written from beginning to end.
//!
//! ```text
//! vmkit-export.json  what follows: names and lengths, in order       format
//! vm.json            the VM's record
//! kept/…             its small files: the login key, the records of its snapshots
//! files/…            its backend's files; holes are kept, as GNU tar keeps them     extents
//! image/disk.FORMAT  the base image, if there is one
//! SHA256SUMS         the checksums of all before, as `sha256sum -c` reads them
//! ```
//!
//! So what can't be imported is refused after the first bytes, and an archive that was truncated
//! anywhere lacks its end. The reader takes what the writer writes and nothing else: there are no
//! links, no directories and no extensions to be careful with.
//!
//! These modules know nothing of VMs beyond the names.

mod blocks;
mod extents;
mod format;
mod reader;
#[cfg(test)]
mod reader_tests;
mod writer;

pub(crate) use extents::{FileExtents, hash_of};
pub(crate) use format::{
    ExportHeader, ExportedImage, FILES, KEPT, ListedFile, MOST_RECORD_BYTES, RECORD, image_entry, is_part,
};
pub(crate) use reader::ArchiveReader;
pub(crate) use writer::ArchiveWriter;
