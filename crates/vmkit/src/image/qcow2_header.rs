//! Parses the header of an untrusted qcow2 image.
//!
//! Pure: bytes in, facts or the reason for a refusal out. It refuses what QEMU refuses, so that the
//! user learns of it when the VM is created and not when it starts.
//!
//! Source: QEMU's `docs/interop/qcow2.txt` and the limits in `block/qcow2.h`.

/// The first four bytes of every qcow2 image.
pub(super) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// The largest cluster, 2 MiB: the header and its extensions are within this many bytes.
pub(super) const MAX_CLUSTER_BYTES: u64 = 1 << 21;

const V2_HEADER_BYTES: u32 = 72;
pub(super) const V3_HEADER_BYTES: u32 = 104;
/// The longest name of a backing file.
pub(super) const MAX_BACKING_NAME_BYTES: u32 = 1023;
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;

const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = (1 << 5) - 1;

/// The fields of a qcow2 header, checked against each other and against the length of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Qcow2Header {
    /// 2 or 3.
    pub(super) version: u32,
    /// The size of the disk that the guest sees.
    pub(super) virtual_size_bytes: u64,
    /// The base-2 logarithm of the cluster's size in bytes, 9 to 21.
    pub(super) cluster_bits: u32,
    /// Where the L1 table begins.
    pub(super) l1_offset: u64,
    /// How many entries of 8 bytes the L1 table has.
    pub(super) l1_entries: u32,
    /// The backing image.
    pub(super) backing: Option<BackingName>,
    /// Whether the guest's data is in another file.
    pub(super) external_data_file: bool,
    /// Whether the guest's data is encrypted.
    pub(super) encrypted: bool,
    /// Whether the image is marked as corrupt.
    pub(super) marked_corrupt: bool,
    /// Whether an entry of an L2 table has 16 bytes, not 8.
    pub(super) extended_l2: bool,
    /// The compression of its compressed clusters, if it has any.
    pub(super) compression: ClusterCompression,
}

/// The compression of clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClusterCompression {
    Deflate,
    Zstandard,
}

/// The backing image as named in the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BackingName {
    /// The name, which may be a relative path, a protocol with a colon, or anything.
    pub(super) name: Vec<u8>,
    /// The format, if the image names it.
    pub(super) format: Option<String>,
}

impl Qcow2Header {
    /// Returns the size of a cluster in bytes.
    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns how many bytes of the disk one entry of the L1 table covers.
    fn bytes_per_l1_entry(&self) -> u64 {
        let l2_entry_bytes = if self.extended_l2 { 16 } else { 8 };
        self.cluster_bytes() * (self.cluster_bytes() / l2_entry_bytes)
    }
}

/// Reads the header from the first bytes of a file of `file_bytes`.
///
/// Takes the first [`MAX_CLUSTER_BYTES`] of the file, or all of a shorter one.
///
/// # Errors
/// What is wrong with the image, for a person to read.
pub(super) fn parse(bytes: &[u8], file_bytes: u64) -> Result<Qcow2Header, String> {
    let fields = HeaderFields(bytes);
    if bytes.get(..4) != Some(&MAGIC) {
        return Err("it does not start with the header of a qcow2 image".to_owned());
    }
    let version = fields.u32(4)?;
    let (header_bytes, incompatible) = match version {
        2 => (V2_HEADER_BYTES, 0),
        3 => (fields.u32(100)?, fields.u64(72)?),
        1 => return Err("it is a qcow image of version 1, which is too old".to_owned()),
        other => return Err(format!("its qcow2 version is {other} (expected 2 or 3)")),
    };
    let unknown = incompatible & !INCOMPATIBLE_KNOWN;
    if unknown != 0 {
        return Err(format!("it needs unknown features (incompatible_features {unknown:#x})"));
    }
    let cluster_bits = fields.u32(20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(format!("its cluster_bits is {cluster_bits} (expected 9 to 21)"));
    }
    let least = if version == 2 { V2_HEADER_BYTES } else { V3_HEADER_BYTES };
    if header_bytes < least || u64::from(header_bytes) > 1 << cluster_bits {
        return Err(format!("its header_length is {header_bytes} (expected {least} to one cluster)"));
    }
    // Without the bit the field may be missing.
    let compression = match incompatible & INCOMPATIBLE_COMPRESSION {
        0 => ClusterCompression::Deflate,
        _ => match fields.bytes(104, 105)? {
            [1] => ClusterCompression::Zstandard,
            other => return Err(format!("its compression_type is {} (expected 1)", other[0])),
        },
    };
    let header = Qcow2Header {
        version,
        virtual_size_bytes: fields.u64(24)?,
        cluster_bits,
        l1_offset: fields.u64(40)?,
        l1_entries: fields.u32(36)?,
        backing: backing(&fields, header_bytes, cluster_bits)?,
        external_data_file: incompatible & INCOMPATIBLE_DATA_FILE != 0,
        encrypted: fields.u32(32)? != 0,
        marked_corrupt: incompatible & INCOMPATIBLE_CORRUPT != 0,
        extended_l2: incompatible & INCOMPATIBLE_EXTENDED_L2 != 0,
        compression,
    };
    if version == 3 {
        let order = fields.u32(96)?;
        if order > 6 {
            return Err(format!("its refcount_order is {order} (expected 0 to 6)"));
        }
    }
    check_refcount_table(&header, fields.u64(48)?, fields.u32(56)?, file_bytes)?;
    check_l1_table(&header, file_bytes)?;
    Ok(header)
}

/// Reads the backing file's name and, from the header's extensions, its format.
fn backing(
    fields: &HeaderFields<'_>,
    header_bytes: u32,
    cluster_bits: u32,
) -> Result<Option<BackingName>, String> {
    let (offset, length) = (fields.u64(8)?, fields.u32(16)?);
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > MAX_BACKING_NAME_BYTES {
        let most = MAX_BACKING_NAME_BYTES;
        return Err(format!("its backing file's name has {length} bytes (expected at most {most})"));
    }
    let end = offset.checked_add(length.into()).filter(|&end| end <= 1 << cluster_bits);
    let end = end.ok_or("its backing file's name is outside the first cluster")?;
    let name = fields.bytes(offset, end)?.to_vec();
    let mut at = u64::from(header_bytes);
    let mut format = None;
    while at + 8 <= offset {
        let (kind, length) = (fields.u32(at)?, u64::from(fields.u32(at + 4)?));
        if kind == EXTENSION_END {
            break;
        }
        let data = at + 8;
        if data + length > offset {
            return Err(format!("its header extension {kind:#010x} has {length} bytes and does not fit"));
        }
        if kind == EXTENSION_BACKING_FORMAT {
            format = Some(String::from_utf8_lossy(fields.bytes(data, data + length)?).into_owned());
        }
        at = data + length.next_multiple_of(8);
    }
    Ok(Some(BackingName { name, format }))
}

fn check_refcount_table(
    header: &Qcow2Header,
    offset: u64,
    clusters: u32,
    file_bytes: u64,
) -> Result<(), String> {
    let bytes = u64::from(clusters) * header.cluster_bytes();
    if bytes == 0 || bytes > MAX_REFCOUNT_TABLE_BYTES {
        let most = MAX_REFCOUNT_TABLE_BYTES;
        return Err(format!("its refcount table has {bytes} bytes (expected 1 to {most})"));
    }
    check_table(header, "refcount table", offset, bytes, file_bytes)
}

fn check_l1_table(header: &Qcow2Header, file_bytes: u64) -> Result<(), String> {
    let bytes = u64::from(header.l1_entries) * 8;
    if bytes > MAX_L1_BYTES {
        return Err(format!("its L1 table has {bytes} bytes (expected at most {MAX_L1_BYTES})"));
    }
    let needed = header.virtual_size_bytes.div_ceil(header.bytes_per_l1_entry());
    if u64::from(header.l1_entries) < needed {
        let (size, found) = (header.virtual_size_bytes, header.l1_entries);
        return Err(format!("its L1 table has {found} entries, and a disk of {size} bytes needs {needed}"));
    }
    if bytes == 0 {
        return Ok(());
    }
    check_table(header, "L1 table", header.l1_offset, bytes, file_bytes)
}

fn check_table(
    header: &Qcow2Header,
    what: &str,
    offset: u64,
    bytes: u64,
    file_bytes: u64,
) -> Result<(), String> {
    if offset == 0 || !offset.is_multiple_of(header.cluster_bytes()) {
        return Err(format!("its {what} starts at byte {offset}, which is not the start of a cluster"));
    }
    match offset.checked_add(bytes) {
        Some(end) if end <= file_bytes => Ok(()),
        _ => Err(format!(
            "it is truncated: its {what} is at bytes {offset} to {}, and the file has {file_bytes}",
            offset.saturating_add(bytes)
        )),
    }
}

/// Finds the L2 table with the highest offset among those in the L1 table.
///
/// # Errors
/// The first table that extends beyond the end of a file of `file_bytes`.
pub(super) fn furthest_l2_table(
    l1_table: &[u8],
    header: &Qcow2Header,
    file_bytes: u64,
) -> Result<Option<u64>, String> {
    let mut furthest = None;
    for entry in l1_table.chunks_exact(8) {
        let offset = be_u64(entry) & OFFSET_MASK;
        if offset == 0 {
            continue;
        }
        check_table(header, "L2 table", offset, header.cluster_bytes(), file_bytes)?;
        furthest = furthest.max(Some(offset));
    }
    Ok(furthest)
}

/// Checks that everything an L2 table refers to begins within a file of `file_bytes`.
///
/// Tables with extended entries pass unread: whether their clusters hold data is recorded
/// elsewhere.
///
/// # Errors
/// The first reference that does not.
pub(super) fn check_l2_table(l2_table: &[u8], header: &Qcow2Header, file_bytes: u64) -> Result<(), String> {
    if header.extended_l2 {
        return Ok(());
    }
    for entry in l2_table.chunks_exact(8) {
        let entry = be_u64(entry);
        let offset = if entry & COMPRESSED != 0 {
            packed_place(entry, header.cluster_bits).0
        } else if entry & ALL_ZEROES != 0 {
            continue;
        } else {
            entry & OFFSET_MASK
        };
        if offset >= file_bytes {
            return Err(format!("it is truncated: data is at byte {offset}, and the file has {file_bytes}"));
        }
    }
    Ok(())
}

/// Bits 9 to 55 of an entry of an L1 or L2 table: where the cluster begins.
pub(super) const OFFSET_MASK: u64 = 0x00FF_FFFF_FFFF_FE00;
/// The bit of an L2 entry whose cluster is compressed, so that its offset is packed otherwise.
pub(super) const COMPRESSED: u64 = 1 << 62;
/// The bit of an L2 entry whose cluster reads as zeroes, wherever it points.
pub(super) const ALL_ZEROES: u64 = 1;

/// Returns the offset of the bytes of a compressed cluster, and how many there are at most.
pub(super) fn packed_place(entry: u64, cluster_bits: u32) -> (u64, u64) {
    let shift = 62 - (cluster_bits - 8);
    let offset = entry & ((1 << shift) - 1);
    let sectors = (entry >> shift & ((1 << (cluster_bits - 8)) - 1)) + 1;
    (offset, sectors * 512 - offset % 512)
}

pub(super) fn be_u64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("the caller cut eight bytes"))
}

/// The bytes of the header, read big-endian and never past their end.
struct HeaderFields<'a>(&'a [u8]);

impl HeaderFields<'_> {
    fn bytes(&self, from: u64, to: u64) -> Result<&[u8], String> {
        let range = usize::try_from(from).ok().zip(usize::try_from(to).ok());
        let found = range.and_then(|(from, to)| self.0.get(from..to));
        found.ok_or_else(|| format!("it is truncated: it ends before byte {to} of its header"))
    }

    fn u32(&self, at: u64) -> Result<u32, String> {
        let bytes = self.bytes(at, at + 4)?;
        Ok(u32::from_be_bytes(bytes.try_into().expect("the range has four bytes")))
    }

    fn u64(&self, at: u64) -> Result<u64, String> {
        Ok(be_u64(self.bytes(at, at + 8)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE_BYTES: u64 = 4 * 65536;

    /// Builds a valid version 3 header of a 1 GiB disk, for the tests to damage.
    fn sound() -> Vec<u8> {
        let mut bytes = vec![0; 65536];
        put(&mut bytes, 0, &MAGIC);
        put(&mut bytes, 4, &3u32.to_be_bytes());
        put(&mut bytes, 20, &16u32.to_be_bytes());
        put(&mut bytes, 24, &(1u64 << 30).to_be_bytes());
        put(&mut bytes, 36, &2u32.to_be_bytes());
        put(&mut bytes, 40, &(3u64 * 65536).to_be_bytes());
        put(&mut bytes, 48, &65536u64.to_be_bytes());
        put(&mut bytes, 56, &1u32.to_be_bytes());
        put(&mut bytes, 96, &4u32.to_be_bytes());
        put(&mut bytes, 100, &104u32.to_be_bytes());
        bytes
    }

    fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
        bytes[at..at + value.len()].copy_from_slice(value);
    }

    #[test]
    fn a_sound_header_is_read() {
        let header = parse(&sound(), FILE_BYTES).unwrap();
        assert_eq!((header.version, header.virtual_size_bytes), (3, 1 << 30));
        assert_eq!((header.cluster_bytes(), header.l1_entries), (65536, 2));
        assert_eq!(header.backing, None);
        assert!(!header.encrypted && !header.external_data_file && !header.marked_corrupt);
    }

    #[test]
    fn the_backing_file_and_its_format_are_read() {
        let mut bytes = sound();
        put(&mut bytes, 104, &0x6803_F857u32.to_be_bytes());
        put(&mut bytes, 108, &3u32.to_be_bytes());
        put(&mut bytes, 120, &EXTENSION_BACKING_FORMAT.to_be_bytes());
        put(&mut bytes, 124, &3u32.to_be_bytes());
        put(&mut bytes, 128, b"raw");
        put(&mut bytes, 144, b"nbd:x");
        put(&mut bytes, 8, &144u64.to_be_bytes());
        put(&mut bytes, 16, &5u32.to_be_bytes());
        let backing = parse(&bytes, FILE_BYTES).unwrap().backing.unwrap();
        assert_eq!((backing.name.as_slice(), backing.format.as_deref()), (&b"nbd:x"[..], Some("raw")));
    }

    #[test]
    fn every_absurd_value_is_refused_with_what_is_wrong() {
        let four = |value: u32| value.to_be_bytes().to_vec();
        let eight = |value: u64| value.to_be_bytes().to_vec();
        for (at, value, reason) in [
            (0, b"QFI".to_vec(), ""),
            (0, four(7), "does not start with"),
            (4, four(1), "version 1"),
            (4, four(9), "version is 9"),
            (20, four(8), "cluster_bits is 8"),
            (20, four(63), "cluster_bits is 63"),
            (24, eight(u64::MAX), "needs"),
            (36, four(u32::MAX), "at most 33554432"),
            (36, four(1), "needs 2"),
            (40, eight(65537), "not the start of a cluster"),
            (40, eight(0), "not the start of a cluster"),
            (40, eight(!0xFFFF), "truncated"),
            (48, eight(65536 * 4), "truncated"),
            (56, four(0), "refcount table has 0"),
            (56, four(u32::MAX), "refcount table has"),
            (72, eight(1 << 40), "incompatible_features 0x10000000000"),
            (96, four(7), "refcount_order is 7"),
            (100, four(100), "header_length is 100"),
            (100, four(1 << 30), "header_length is 1073741824"),
            (8, eight(u64::MAX), "backing"),
        ] {
            let mut bytes = sound();
            put(&mut bytes, 16, &4u32.to_be_bytes());
            put(&mut bytes, at, &value);
            match parse(&bytes, FILE_BYTES) {
                Ok(_) => assert_eq!(reason, "", "accepted {value:?} at {at}"),
                Err(problem) => assert!(!reason.is_empty() && problem.contains(reason), "{problem}"),
            }
        }
        let mut bytes = sound();
        put(&mut bytes, 8, &200u64.to_be_bytes());
        put(&mut bytes, 16, &1024u32.to_be_bytes());
        assert!(parse(&bytes, FILE_BYTES).unwrap_err().contains("1024 bytes (expected at most 1023"));
    }

    #[test]
    fn a_header_that_is_cut_off_is_refused_at_every_length() {
        for length in 0..104 {
            let problem = parse(&sound()[..length], length as u64).unwrap_err();
            assert!(
                problem.contains("truncated") || problem.contains("does not start"),
                "{length}: {problem}"
            );
        }
    }

    #[test]
    fn references_behind_the_end_of_the_file_are_found() {
        let header = parse(&sound(), FILE_BYTES).unwrap();
        let l1 = [0, 65536u64 | 1 << 63].map(u64::to_be_bytes).concat();
        assert_eq!(furthest_l2_table(&l1, &header, FILE_BYTES), Ok(Some(65536)));
        assert!(furthest_l2_table(&l1, &header, 65536).unwrap_err().contains("truncated"));
        for (entry, sound) in [
            (0, true),
            (3 * 65536, true),
            (4 * 65536, false),
            ((4 * 65536) | ALL_ZEROES, true),
            (COMPRESSED | 1000, true),
            (COMPRESSED | (4 * 65536 + 1), false),
        ] {
            let l2 = u64::to_be_bytes(entry);
            assert_eq!(check_l2_table(&l2, &header, FILE_BYTES).is_ok(), sound, "{entry:#x}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), file_bytes: u64) {
            let _ = parse(&bytes, file_bytes);
        }

        #[test]
        fn no_spoilt_header_makes_it_panic(
            spoilt in prop::collection::vec((0usize..200, any::<u64>()), 1..6),
            file_bytes: u64,
        ) {
            let mut bytes = sound();
            for (at, value) in spoilt {
                put(&mut bytes, at, &value.to_be_bytes());
            }
            put(&mut bytes, 0, &MAGIC);
            if let Ok(header) = parse(&bytes, file_bytes) {
                prop_assert!(u64::from(header.l1_entries) * 8 <= MAX_L1_BYTES);
                prop_assert!((9..=21).contains(&header.cluster_bits));
                let _ = furthest_l2_table(&bytes, &header, file_bytes);
                let _ = check_l2_table(&bytes, &header, file_bytes);
            }
        }
    }
}
