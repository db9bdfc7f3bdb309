//! Tells for which architecture and which firmware a disk was made, as far as the disk tells it.
//!
//! Edge: reads a disk, raw or qcow2. It looks at what a loader looks at: the boot code of the first
//! sector, the types of the partitions, and the name of the loader that UEFI starts from the EFI
//! system partition. A disk that says nothing is for any architecture.
//!
//! Source: the UEFI Specification, "GPT Disk Layout" and "Removable Media Boot Behavior"; the
//! Discoverable Partitions Specification for the types of root partitions.

use std::io;

use super::disk::GuestDisk;
use super::facts::ImageFacts;
use crate::error::{Error, Result};
use crate::spec::{Arch, Firmware};

const SECTOR: u64 = 512;
/// The most partitions that are looked at; a GPT has 128.
const MOST_PARTITIONS: usize = 128;
const ENTRY_BYTES: usize = 128;
/// How far into the EFI system partition its directories are looked for.
const ESP_BYTES: u64 = 4 << 20;
const ESP: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
/// Partitions from which the boot code of a GPT disk goes on: of GRUB, and of FreeBSD.
const BIOS_BOOT: [&str; 2] = ["21686148-6449-6e6f-744e-656564454649", "83bd6b9d-7f41-11dc-be0b-001560b84f0f"];
/// Where the first sector has its boot code, its partitions of 16 bytes, and its mark.
const BOOT_CODE_BYTES: usize = 440;
const MBR_PARTITIONS: std::ops::Range<usize> = 446..510;
const MBR_MARK: &[u8] = b"\x55\xaa";
/// The type of an EFI system partition in the first sector.
const MBR_ESP: u8 = 0xef;

/// Types of partitions that only one architecture has.
const TYPES: &[(&str, Arch)] = &[
    // BIOS boot: what GRUB puts its second stage into on a PC.
    ("21686148-6449-6e6f-744e-656564454649", Arch::X86_64),
    // Root and /usr, as the Discoverable Partitions Specification numbers them.
    ("4f68bce3-e8cd-4db1-96e7-fbcaf984b709", Arch::X86_64),
    ("8484680c-9521-48c6-9c11-b0720656f69e", Arch::X86_64),
    ("b921b045-1df0-41c3-af44-4c6f280d3fae", Arch::Aarch64),
    ("b0e01050-ee5f-4390-949a-9101b17104e9", Arch::Aarch64),
    // FreeBSD's boot code for the BIOS.
    ("83bd6b9d-7f41-11dc-be0b-001560b84f0f", Arch::X86_64),
];

/// The loaders that UEFI starts by itself, as a FAT directory has them.
const LOADERS: &[(&[u8; 11], Arch)] = &[(b"BOOTX64 EFI", Arch::X86_64), (b"BOOTAA64EFI", Arch::Aarch64)];

/// Returns the architecture of a disk; `None` where it tells none, or two.
///
/// # Errors
/// `Io` where the disk can't be read.
pub(super) fn of_disk(facts: &ImageFacts) -> Result<Option<Arch>> {
    let read = || -> io::Result<Option<Arch>> {
        let mut disk = GuestDisk::open(facts)?;
        let mut found = Vec::new();
        for partition in partitions(&mut disk)? {
            match TYPES.iter().find(|(kind, _)| *kind == partition.kind) {
                Some((_, arch)) => found.push(*arch),
                None if partition.kind == ESP => found.extend(loaders(&mut disk, &partition)?),
                None => {}
            }
        }
        found.dedup();
        Ok(match found[..] {
            [arch] => Some(arch),
            _ => None,
        })
    };
    read().map_err(Error::io("read", &facts.path))
}

/// Returns the firmware that a disk needs: UEFI for one with an EFI system partition and nothing
/// that a BIOS could start, neither boot code in its first sector nor a BIOS boot partition. `None`
/// for all else, which boots as the machine usually does.
///
/// # Errors
/// `Io` where the disk can't be read.
pub(super) fn firmware_of_disk(facts: &ImageFacts) -> Result<Option<Firmware>> {
    let read = || -> io::Result<bool> {
        let mut disk = GuestDisk::open(facts)?;
        let first = disk.read(0, SECTOR)?;
        if first.iter().take(BOOT_CODE_BYTES).any(|byte| *byte != 0) {
            return Ok(false);
        }
        let partitions = partitions(&mut disk)?;
        let has = |kind: &str| partitions.iter().any(|partition| partition.kind == kind);
        if has(ESP) {
            return Ok(!BIOS_BOOT.into_iter().any(has));
        }
        let is_esp = |partition: &[u8]| partition[4] == MBR_ESP;
        Ok(first.ends_with(MBR_MARK) && first[MBR_PARTITIONS].chunks_exact(16).any(is_esp))
    };
    let only_uefi = read().map_err(Error::io("read", &facts.path))?;
    Ok(only_uefi.then_some(Firmware::Uefi))
}

struct DiskPartition {
    /// Its type in the usual form of a UUID.
    kind: String,
    offset: u64,
    bytes: u64,
}

/// Returns the partitions of a GPT; a disk without one has none.
fn partitions(disk: &mut GuestDisk) -> io::Result<Vec<DiskPartition>> {
    let header = disk.read(SECTOR, SECTOR)?;
    if !header.starts_with(b"EFI PART") || number(&header, 84, 4) != Some(ENTRY_BYTES as u64) {
        return Ok(Vec::new());
    }
    let (Some(first), Some(count)) = (number(&header, 72, 8), number(&header, 80, 4)) else {
        return Ok(Vec::new());
    };
    let count = usize::try_from(count).unwrap_or(MOST_PARTITIONS).min(MOST_PARTITIONS);
    let Some(offset) = first.checked_mul(SECTOR) else { return Ok(Vec::new()) };
    let table = disk.read(offset, (count * ENTRY_BYTES) as u64)?;
    let partition = |entry: &[u8]| {
        let (first, last) = (number(entry, 32, 8)?, number(entry, 40, 8)?);
        let bytes = last.checked_sub(first)?.checked_add(1)?.checked_mul(SECTOR)?;
        Some(DiskPartition { kind: guid(entry)?, offset: first.checked_mul(SECTOR)?, bytes })
    };
    Ok(table.chunks_exact(ENTRY_BYTES).filter_map(partition).collect())
}

/// Returns the architectures of the loaders in an EFI system partition.
///
/// A directory of a FAT has the names in entries of 32 bytes, and lies near the beginning of a
/// partition as small as these.
fn loaders(disk: &mut GuestDisk, partition: &DiskPartition) -> io::Result<Vec<Arch>> {
    let bytes = disk.read(partition.offset, partition.bytes.min(ESP_BYTES))?;
    let has = |name: &[u8; 11]| bytes.chunks_exact(32).any(|entry| entry.starts_with(name));
    Ok(LOADERS.iter().filter(|(name, _)| has(name)).map(|(_, arch)| *arch).collect())
}

/// Reads a little-endian number of `length` bytes.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + length)?;
    Some(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// Writes a GUID as a UUID: its first three groups are little-endian numbers.
fn guid(bytes: &[u8]) -> Option<String> {
    let fields = uuid::Uuid::from_bytes_le(bytes.get(..16)?.try_into().ok()?);
    Some(fields.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::inspect;
    use crate::image::tests::qemu_img;
    use proptest::prelude::*;
    use std::path::Path;

    /// Writes a raw disk with a GPT of one partition of this type.
    fn disk(path: &Path, kind: &str, loader: Option<&[u8; 11]>) -> ImageFacts {
        let mut bytes = vec![0; 1 << 20];
        bytes[512..520].copy_from_slice(b"EFI PART");
        bytes[512 + 72] = 2;
        bytes[512 + 80] = 4;
        bytes[512 + 84] = 128;
        let kind: uuid::Uuid = kind.parse().unwrap();
        bytes[1024..1040].copy_from_slice(&kind.to_bytes_le());
        bytes[1024 + 32] = 64;
        bytes[1024 + 41] = 4;
        if let Some(loader) = loader {
            bytes[96 * 512..96 * 512 + 11].copy_from_slice(loader);
        }
        std::fs::write(path, bytes).unwrap();
        inspect(path).unwrap()
    }

    #[test]
    fn the_types_of_partitions_and_the_loader_show_the_architecture() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        for (kind, arch) in TYPES {
            assert_eq!(of_disk(&disk(&path, kind, None)).unwrap(), Some(*arch), "{kind}");
        }
        for (loader, arch) in LOADERS {
            assert_eq!(of_disk(&disk(&path, ESP, Some(loader))).unwrap(), Some(*arch));
        }
        assert_eq!(of_disk(&disk(&path, ESP, None)).unwrap(), None);
        std::fs::write(&path, [1; 5000]).unwrap();
        assert_eq!(of_disk(&inspect(&path).unwrap()).unwrap(), None);
    }

    #[test]
    fn a_disk_that_only_uefi_can_start_needs_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let bios_boot = BIOS_BOOT[0];
        // The first partition's type, the second one's, boot code, what is needed.
        for (first, second, code, needed) in [
            (ESP, None, false, Some(Firmware::Uefi)),
            (ESP, Some(TYPES[1].0), false, Some(Firmware::Uefi)),
            (ESP, Some(bios_boot), false, None),
            (ESP, None, true, None),
            (TYPES[1].0, None, false, None),
        ] {
            disk(&path, first, None);
            let mut bytes = std::fs::read(&path).unwrap();
            if let Some(second) = second {
                let second: uuid::Uuid = second.parse().unwrap();
                bytes[1152..1168].copy_from_slice(&second.to_bytes_le());
            }
            if code {
                bytes[..3].copy_from_slice(&[0xeb, 0x63, 0x90]);
            }
            std::fs::write(&path, &bytes).unwrap();
            let found = firmware_of_disk(&inspect(&path).unwrap()).unwrap();
            assert_eq!(found, needed, "{first} {second:?} {code}");
        }
        let mut mbr = vec![0; 4096];
        mbr[510..512].copy_from_slice(MBR_MARK);
        mbr[446 + 16 + 4] = MBR_ESP;
        std::fs::write(&path, &mbr).unwrap();
        assert_eq!(firmware_of_disk(&inspect(&path).unwrap()).unwrap(), Some(Firmware::Uefi));
        mbr[446 + 16 + 4] = 0x83;
        std::fs::write(&path, &mbr).unwrap();
        assert_eq!(firmware_of_disk(&inspect(&path).unwrap()).unwrap(), None);
        std::fs::write(&path, [0; 100]).unwrap();
        assert_eq!(firmware_of_disk(&inspect(&path).unwrap()).unwrap(), None);
    }

    #[test]
    fn a_compressed_qcow2_is_recognised_as_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let (raw, image) = (dir.path().join("raw"), dir.path().join("image"));
        disk(&raw, ESP, Some(b"BOOTAA64EFI"));
        let names = [raw.to_str().unwrap(), image.to_str().unwrap()];
        for options in ["compression_type=zlib", "compression_type=zstd", "extended_l2=on"] {
            let how = ["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options];
            if qemu_img(&[&how[..], &names].concat()) {
                assert_eq!(of_disk(&inspect(&image).unwrap()).unwrap(), Some(Arch::Aarch64), "{options}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_partition_table_is_read_without_panic(table in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let file = tempfile::NamedTempFile::new().unwrap();
            let mut bytes = vec![0; 512];
            bytes.extend_from_slice(b"EFI PART");
            bytes.extend(table);
            std::fs::write(file.path(), bytes).unwrap();
            let _ = of_disk(&inspect(file.path()).unwrap());
            let _ = firmware_of_disk(&inspect(file.path()).unwrap());
        }
    }
}
