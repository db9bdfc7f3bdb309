//! What a disc image is, an installer's ISO for one: whether it is a disc at all, and what it boots
//! by.
//!
//! Edge: reads the beginning of a file.
//!
//! Source: ECMA-119 (ISO 9660), 8; ECMA-167 (UDF), 2/9; the El Torito Bootable CD-ROM Format
//! Specification 1.0, and the UEFI Specification, 13.3.2.1.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Error, Result};
use crate::input_file::InputFile;
use crate::spec::Firmware;

const SECTOR_BYTES: usize = 2048;
/// Where the descriptors of a volume begin, and how many there are at the most that are looked at.
const DESCRIPTORS: u64 = 16;
const MOST_DESCRIPTORS: u64 = 32;
/// The marks of descriptors: of ISO 9660, and of the beginning of those of UDF.
const MARKS: [&[u8]; 2] = [b"CD001", b"BEA01"];
const BOOT_RECORD: &[u8] = b"\0CD001\x01EL TORITO SPECIFICATION";
/// Where a boot record has the sector of the boot catalog.
const CATALOG_AT: usize = 0x47;
const ENTRY_BYTES: usize = 32;
/// The platform of a boot catalog, and of its sections, that UEFI starts.
const PLATFORM_EFI: u8 = 0xef;

/// Opens the image of a disc for a CD-ROM drive.
///
/// # Errors
/// `InvalidInput` on `cdrom` for what is no regular file that may be read, or has neither an ISO
/// 9660 nor a UDF file system.
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) fn check_disc(path: &Path) -> Result<()> {
    let InputFile { file, .. } = InputFile::open("cdrom", path)?;
    if is_disc(&file).map_err(Error::io("read", path))? {
        return Ok(());
    }
    let why = "this is not a disc image (expected an ISO 9660 or UDF file system, as an installer's .iso has): a disk belongs in `image` or `data_disks`";
    Err(Error::invalid("cdrom", path.display(), why))
}

/// Returns the firmware that a disc needs: UEFI for one that boots by nothing else. `None` for all
/// else.
///
/// # Errors
/// `InvalidInput` on `cdrom` for what is no regular file that may be read; `Io`.
pub fn firmware_of_disc(path: &Path) -> Result<Option<Firmware>> {
    let InputFile { file, .. } = InputFile::open("cdrom", path)?;
    let catalog = catalog(&file).map_err(Error::io("read", path))?;
    let platforms = catalog.map(|catalog| platforms(&catalog)).unwrap_or_default();
    let only_efi = !platforms.is_empty() && platforms.iter().all(|platform| *platform == PLATFORM_EFI);
    Ok(only_efi.then_some(Firmware::Uefi))
}

/// Refuses a disc as the image of a root disk. `shown` is what the image is called in the error.
///
/// # Errors
/// `InvalidInput` on `image`.
#[cfg(any(feature = "images", all(target_os = "linux", feature = "qemu")))]
pub(crate) fn refuse_disc(file: &Path, shown: &str) -> Result<()> {
    let opened = File::open(file).and_then(|file| is_disc(&file)).map_err(Error::io("read", file))?;
    if !opened {
        return Ok(());
    }
    Err(Error::invalid("image", shown, DISC_AS_IMAGE).with_problem(crate::error::ValueProblem::DiscImage))
}

#[cfg(any(feature = "images", all(target_os = "linux", feature = "qemu")))]
/// What to do with a disc that was named as an image.
const DISC_AS_IMAGE: &str = "this is a disc image (ISO 9660 or UDF), such as an installer's .iso, not a disk: pass it as `cdrom`, with an empty disk of the size in `disk`";

/// Reports whether a file has the descriptors of a disc's file system.
#[cfg(any(feature = "images", all(target_os = "linux", feature = "qemu")))]
fn is_disc(file: &File) -> io::Result<bool> {
    let descriptor = sector(file, DESCRIPTORS)?;
    Ok(descriptor.get(1..6).is_some_and(|mark| MARKS.contains(&mark)))
}

/// Reads the boot catalog of a disc; `None` without one.
fn catalog(file: &File) -> io::Result<Option<Vec<u8>>> {
    for number in DESCRIPTORS..DESCRIPTORS + MOST_DESCRIPTORS {
        let descriptor = sector(file, number)?;
        if descriptor.get(1..6) != Some(MARKS[0]) {
            return Ok(None);
        }
        if descriptor.starts_with(BOOT_RECORD)
            && let Some(at) = descriptor.get(CATALOG_AT..CATALOG_AT + 4)
        {
            let at = u32::from_le_bytes(at.try_into().expect("these are 4 bytes"));
            return sector(file, at.into()).map(Some);
        }
    }
    Ok(None)
}

/// Returns the platforms of the entries in a boot catalog that can be booted.
fn platforms(catalog: &[u8]) -> Vec<u8> {
    let mut entries = catalog.chunks_exact(ENTRY_BYTES);
    // The validation entry says for which platform the first one is.
    let (Some(validation), Some(first)) = (entries.next(), entries.next()) else { return Vec::new() };
    let mut found = Vec::new();
    if validation[0] == 1 && first[0] == 0x88 {
        found.push(validation[1]);
    }
    let mut platform = None;
    for entry in entries {
        match (entry[0], platform) {
            (0x90 | 0x91, _) => platform = Some(entry[1]),
            (0x88, Some(platform)) => found.push(platform),
            (0x00, None) => break,
            _ => {}
        }
    }
    found
}

/// Reads a sector; of one behind the end of the file nothing.
fn sector(file: &File, number: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; SECTOR_BYTES];
    let at = number.saturating_mul(SECTOR_BYTES as u64);
    match file.read_exact_at(&mut bytes, at) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes a disc with a boot catalog of these entries.
    fn disc(path: &Path, entries: &[[u8; 2]]) {
        let mut bytes = vec![0; 21 * SECTOR_BYTES];
        let mut put = |at: usize, what: &[u8]| bytes[at..at + what.len()].copy_from_slice(what);
        put(16 * SECTOR_BYTES, b"\x01CD001\x01");
        put(17 * SECTOR_BYTES, BOOT_RECORD);
        put(17 * SECTOR_BYTES + CATALOG_AT, &[19, 0, 0, 0]);
        put(18 * SECTOR_BYTES, b"\xffCD001\x01");
        for (index, entry) in entries.iter().enumerate() {
            put(19 * SECTOR_BYTES + index * ENTRY_BYTES, entry);
        }
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_disc_is_known_by_its_descriptor_and_is_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.iso");
        disc(&path, &[]);
        check_disc(&path).unwrap();
        let text = refuse_disc(&path, "x.iso").unwrap_err().to_string();
        assert!(text.starts_with("image: \"x.iso\": ") && text.contains("`cdrom`"), "{text}");
        for other in [vec![0; 40_000], b"short".to_vec()] {
            std::fs::write(&path, other).unwrap();
            refuse_disc(&path, "x.iso").unwrap();
            assert!(check_disc(&path).unwrap_err().to_string().starts_with("cdrom: "));
        }
        assert!(check_disc(dir.path()).unwrap_err().to_string().contains("a directory"));
    }

    #[test]
    fn a_disc_that_only_uefi_boots_needs_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.iso");
        let (bios, efi, boots) = ([1, 0], [1, PLATFORM_EFI], [0x88, 0]);
        let section = [0x91, PLATFORM_EFI];
        for (entries, needed) in [
            (&[][..], None),
            (&[bios, boots], None),
            (&[bios, boots, section, boots], None),
            (&[efi, boots], Some(Firmware::Uefi)),
            (&[bios, [0, 0], section, boots], Some(Firmware::Uefi)),
        ] {
            disc(&path, entries);
            assert_eq!(firmware_of_disc(&path).unwrap(), needed, "{entries:?}");
        }
    }

    proptest! {
        #[test]
        fn any_catalog_is_read_without_panic(catalog in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = platforms(&catalog);
        }
    }
}
