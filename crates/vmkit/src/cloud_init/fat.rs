//! The FAT volume that carries the seed into a guest of Propolis, which has no CD-ROM.

use std::io::{self, Cursor, Write};

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};

use crate::cloud_init::Seed;

/// The label by which cloud-init finds the volume.
const LABEL: [u8; 11] = *b"cidata     ";
const SECTOR_BYTES: usize = 512;
/// What the file system needs beside the files: boot sector, two tables, 512 entries of the root
/// directory.
///
/// Source: the recipe that Oxide's Nexus has for the same volume: 37 sectors, never fewer than 42
/// in all.
const OVERHEAD_SECTORS: usize = 37;
const LEAST_SECTORS: usize = 42;
/// The most clusters of one sector that a table of FAT12 counts.
const MOST_CLUSTERS: usize = 4084;

/// Builds a FAT12 volume `cidata` with the seed's documents; its length is a multiple of 512 bytes.
///
/// # Errors
/// `InvalidInput` of the system's kind where the documents are more than such a volume holds, about
/// 2 MB.
pub(crate) fn volume(seed: &Seed) -> io::Result<Vec<u8>> {
    let files = [
        ("meta-data", &seed.meta_data),
        ("user-data", &seed.user_data),
        ("network-config", &seed.network_config),
    ];
    let file_sectors: usize = files.iter().map(|(_, text)| text.len().div_ceil(SECTOR_BYTES)).sum();
    if file_sectors > MOST_CLUSTERS {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    // Three bytes of a table describe two clusters, and there are two tables; one sector of each is
    // in the overhead.
    let table_sectors = (file_sectors * 3 / 2).div_ceil(SECTOR_BYTES);
    let sectors = (file_sectors + OVERHEAD_SECTORS + 2 * table_sectors).max(LEAST_SECTORS);
    let mut volume = Cursor::new(vec![0; sectors * SECTOR_BYTES]);
    let count = u32::try_from(sectors).expect("a volume of FAT12 has a few thousand sectors");
    let options = FormatVolumeOptions::new()
        .bytes_per_sector(512)
        .bytes_per_cluster(512)
        .fat_type(FatType::Fat12)
        .total_sectors(count)
        .sectors_per_track(u16::try_from(sectors).expect("a volume of FAT12 has a few thousand sectors"))
        .volume_label(LABEL);
    fatfs::format_volume(&mut volume, options)?;
    {
        let system = FileSystem::new(&mut volume, FsOptions::new())?;
        let root = system.root_dir();
        for (name, text) in files {
            // An empty network-config would tell cloud-init that there is no network.
            if name == "network-config" && text.is_empty() {
                continue;
            }
            root.create_file(name)?.write_all(text.as_bytes())?;
        }
    }
    Ok(volume.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn seed(user_data: &str) -> Seed {
        Seed {
            user_data: user_data.to_owned(),
            meta_data: "instance-id: a\n".to_owned(),
            network_config: "version: 2\n".to_owned(),
        }
    }

    #[test]
    fn the_documents_are_read_back_by_exact_name_from_a_volume_named_cidata() {
        for user_data in ["", "#!\n", &"#!ü\n".repeat(200_000)] {
            let seed = seed(user_data);
            let bytes = volume(&seed).unwrap();
            assert_eq!(bytes.len() % SECTOR_BYTES, 0);
            let system = FileSystem::new(Cursor::new(bytes), FsOptions::new()).unwrap();
            assert_eq!(system.fat_type(), FatType::Fat12);
            assert_eq!(system.volume_label(), "cidata");
            assert_eq!(system.read_volume_label_from_root_dir().unwrap().as_deref(), Some("cidata"));
            for (name, text) in [
                ("meta-data", &seed.meta_data),
                ("user-data", &seed.user_data),
                ("network-config", &seed.network_config),
            ] {
                let mut found = String::new();
                system.root_dir().open_file(name).unwrap().read_to_string(&mut found).unwrap();
                assert_eq!(&found, text, "{name}");
            }
        }
    }

    #[test]
    fn a_small_seed_has_the_smallest_volume() {
        assert_eq!(volume(&seed("#!\n")).unwrap().len(), 21_504);
    }

    #[test]
    fn what_such_a_volume_can_not_hold_is_refused() {
        assert!(volume(&seed(&"x".repeat(3 << 20))).is_err());
    }
}
