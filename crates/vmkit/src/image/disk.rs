//! Reads a disk as the guest sees it, from a raw file or a qcow2 image: [`GuestDisk`].
//!
//! Edge: reads files, and writes none. A qcow2 is one that [`inspect`](super::inspect()) has
//! accepted: whole, without a backing file, not encrypted. Only what is asked for is read: one L2
//! table and one unpacked cluster are cached.
//!
//! ```text
//! offset in the disk ─▶ L1 table ─▶ L2 table ─▶ unallocated, or zeros
//!                                          ├─▶ a cluster in the file, or subclusters of it
//!                                          └─▶ a compressed cluster
//! ```
//!
//! Source: QEMU's `docs/interop/qcow2.txt`.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::facts::ImageFacts;
use super::qcow2_header::{
    self, ALL_ZEROES, COMPRESSED, ClusterCompression, MAX_CLUSTER_BYTES, OFFSET_MASK, Qcow2Header, be_u64,
};
use crate::image_format::ImageFormat;

/// How many subclusters a cluster with an extended entry has, each with a bit of its own.
const SUBCLUSTERS: u64 = 32;

/// A disk as the guest sees it.
#[derive(Debug)]
pub(super) struct GuestDisk {
    file: File,
    file_bytes: u64,
    size: u64,
    qcow2: Option<Qcow2Tables>,
}

/// What is at an offset of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DiskExtent {
    /// This many bytes are zeros, and perhaps more after them.
    Zeros(u64),
    /// This many bytes were read.
    Read(usize),
}

/// The tables of a qcow2 image.
#[derive(Debug)]
struct Qcow2Tables {
    header: Qcow2Header,
    l1: Vec<u8>,
    /// The L2 table that was read last, and its index.
    l2: Option<(u64, Vec<u8>)>,
    /// The compressed cluster that was read last, and its index.
    unpacked: Option<(u64, Vec<u8>)>,
}

/// What an L2 table says of the part of a cluster that begins at an offset.
enum ClusterEntry {
    Zeros,
    At(u64),
    Packed(u64),
}

impl GuestDisk {
    /// Opens a disk for reading.
    ///
    /// # Errors
    /// If it can't be read, or has changed since it was inspected.
    pub(super) fn open(facts: &ImageFacts) -> io::Result<Self> {
        let file = File::open(&facts.path)?;
        let file_bytes = file.metadata()?.len();
        let mut disk = Self { file, file_bytes, size: facts.virtual_size_bytes, qcow2: None };
        if facts.format == ImageFormat::Qcow2 {
            let head = disk.bytes(0, MAX_CLUSTER_BYTES.min(file_bytes))?;
            let header = qcow2_header::parse(&head, file_bytes).map_err(damaged)?;
            if header.backing.is_some() || header.external_data_file || header.encrypted {
                return Err(damaged("it needs more than its own file"));
            }
            let l1 = disk.bytes(header.l1_offset, u64::from(header.l1_entries) * 8)?;
            disk.qcow2 = Some(Qcow2Tables { header, l1, l2: None, unpacked: None });
        }
        Ok(disk)
    }

    /// Returns its size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Reads this many bytes, or fewer at the end of the disk.
    pub(super) fn read(&mut self, offset: u64, most_bytes: u64) -> io::Result<Vec<u8>> {
        let bytes = most_bytes.min(self.size.saturating_sub(offset));
        let mut buffer = vec![0; usize::try_from(bytes).unwrap_or(0)];
        let mut at = 0;
        while at < buffer.len() {
            at += match self.piece(offset + at as u64, &mut buffer[at..])? {
                DiskExtent::Zeros(count) => {
                    usize::try_from(count).unwrap_or(usize::MAX).min(buffer.len() - at)
                }
                DiskExtent::Read(count) => count,
            };
        }
        Ok(buffer)
    }

    /// Reads what is at an offset into the beginning of the buffer; nothing only after the end of
    /// the disk.
    pub(super) fn piece(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<DiskExtent> {
        let left = self.size.saturating_sub(offset);
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..most];
        let piece = match &mut self.qcow2 {
            None => raw_piece(&self.file, offset, buffer)?,
            Some(image) => image.piece(&self.file, self.file_bytes, offset, buffer)?,
        };
        Ok(match piece {
            DiskExtent::Zeros(bytes) => DiskExtent::Zeros(bytes.min(left)),
            read => read,
        })
    }

    fn bytes(&self, offset: u64, bytes: u64) -> io::Result<Vec<u8>> {
        bytes_of(&self.file, offset, bytes)
    }
}

/// Reads a piece of a raw file, with zeros after its end: a disk has whole sectors.
fn raw_piece(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<DiskExtent> {
    let data = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) => data,
        // Nothing but holes from here on.
        Err(Errno::NXIO) => return Ok(DiskExtent::Zeros(u64::MAX)),
        // A file system without SEEK_HOLE.
        Err(Errno::INVAL | Errno::NOTSUP) => offset,
        Err(errno) => return Err(errno.into()),
    };
    if data > offset {
        return Ok(DiskExtent::Zeros(data - offset));
    }
    read_or_zeros(file, offset, buffer)?;
    Ok(DiskExtent::Read(buffer.len()))
}

impl Qcow2Tables {
    fn piece(
        &mut self,
        file: &File,
        file_bytes: u64,
        offset: u64,
        buffer: &mut [u8],
    ) -> io::Result<DiskExtent> {
        let cluster_bytes = self.header.cluster_bytes();
        let entry_bytes: u64 = if self.header.extended_l2 { 16 } else { 8 };
        let per_table = cluster_bytes / entry_bytes;
        let number = offset / cluster_bytes;
        let table = number / per_table;
        let l1_at = usize::try_from(table * 8).unwrap_or(usize::MAX);
        let l1_entry = self.l1.get(l1_at..).and_then(|rest| rest.get(..8));
        let l2_offset = be_u64(l1_entry.ok_or_else(|| damaged("its L1 table is too short"))?) & OFFSET_MASK;
        if l2_offset == 0 {
            return Ok(DiskExtent::Zeros((table + 1) * per_table * cluster_bytes - offset));
        }
        if self.l2.as_ref().is_none_or(|(number, _)| *number != table) {
            self.l2 = Some((table, bytes_of(file, l2_offset, cluster_bytes)?));
        }
        let Some((_, l2)) = &self.l2 else { unreachable!("it was read a moment ago") };
        let at = usize::try_from(number % per_table * entry_bytes).expect("it lies in one cluster");
        let (place, part_bytes) = self.header.place(&l2[at..], offset)?;
        // A subcluster is contiguous; the next one may be elsewhere.
        let within = offset % part_bytes;
        let rest = usize::try_from(part_bytes - within).expect("a cluster has 2 MiB at most");
        let most = rest.min(buffer.len());
        let buffer = &mut buffer[..most];
        match place {
            ClusterEntry::Zeros => return Ok(DiskExtent::Zeros(part_bytes - within)),
            ClusterEntry::At(start) if start >= file_bytes => {
                return Err(damaged("it is truncated: data is after its end"));
            }
            ClusterEntry::At(start) => read_or_zeros(file, start + within, buffer)?,
            ClusterEntry::Packed(entry) => {
                if self.unpacked.as_ref().is_none_or(|(last, _)| *last != number) {
                    self.unpacked = Some((number, self.header.unpack(file, entry)?));
                }
                let Some((_, cluster)) = &self.unpacked else { unreachable!("it was unpacked a moment ago") };
                let within = usize::try_from(within).expect("a cluster has 2 MiB at most");
                buffer.copy_from_slice(&cluster[within..within + most]);
            }
        }
        Ok(DiskExtent::Read(most))
    }
}

impl Qcow2Header {
    /// Reads the entry of an L2 table: where the data at `offset` is, and how much of it is
    /// contiguous.
    fn place(&self, entry: &[u8], offset: u64) -> io::Result<(ClusterEntry, u64)> {
        let cluster_bytes = self.cluster_bytes();
        let first = be_u64(&entry[..8]);
        if first & COMPRESSED != 0 {
            return Ok((ClusterEntry::Packed(first), cluster_bytes));
        }
        let start = first & OFFSET_MASK;
        if !start.is_multiple_of(cluster_bytes) {
            return Err(damaged("an entry of an L2 table does not name the start of a cluster"));
        }
        if !self.extended_l2 {
            let is_zero = start == 0 || first & ALL_ZEROES != 0;
            return Ok((if is_zero { ClusterEntry::Zeros } else { ClusterEntry::At(start) }, cluster_bytes));
        }
        // The low half says which subclusters are allocated, the high half which read as zeros.
        let bits = be_u64(&entry[8..16]);
        let part_bytes = cluster_bytes / SUBCLUSTERS;
        let part = offset % cluster_bytes / part_bytes;
        let is_there = bits >> part & 1 == 1 && bits >> (part + SUBCLUSTERS) & 1 == 0 && start != 0;
        let place = if is_there { ClusterEntry::At(start + part * part_bytes) } else { ClusterEntry::Zeros };
        Ok((place, part_bytes))
    }

    /// Reads a compressed cluster and unpacks it.
    fn unpack(&self, file: &File, entry: u64) -> io::Result<Vec<u8>> {
        let (offset, most_bytes) = qcow2_header::packed_place(entry, self.cluster_bits);
        // The length is in sectors, so the bytes of another cluster may follow, or the end of the
        // file.
        let mut packed = vec![0; usize::try_from(most_bytes).expect("a cluster has 2 MiB at most")];
        let count = read_up_to(file, offset, &mut packed)?;
        packed.truncate(count);
        let mut cluster =
            vec![0; usize::try_from(self.cluster_bytes()).expect("a cluster has 2 MiB at most")];
        let unpacked = match self.compression {
            ClusterCompression::Deflate => {
                flate2::bufread::DeflateDecoder::new(&packed[..]).read_exact(&mut cluster)
            }
            ClusterCompression::Zstandard => zstd::stream::read::Decoder::with_buffer(&packed[..])
                .and_then(|decoder| decoder.single_frame().read_exact(&mut cluster)),
        };
        unpacked.map_err(|error| damaged(format!("the compressed cluster at byte {offset}: {error}")))?;
        Ok(cluster)
    }
}

fn bytes_of(file: &File, offset: u64, bytes: u64) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    file.read_exact_at(&mut buffer, offset)?;
    Ok(buffer)
}

fn read_or_zeros(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let count = read_up_to(file, offset, buffer)?;
    buffer[count..].fill(0);
    Ok(())
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut at = 0;
    while at < buffer.len() {
        match file.read_at(&mut buffer[at..], offset + at as u64) {
            Ok(0) => break,
            Ok(count) => at += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(at)
}

fn damaged(why: impl AsRef<str>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the qcow2 image is damaged: {}", why.as_ref()))
}
