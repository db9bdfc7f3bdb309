//! The ISO 9660 volume that carries the seed into the guest.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{self, Cursor, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hadris_iso::read::PathSeparator;
use hadris_iso::write::options::{CreationFeatures, IsoFormatOptions};
use hadris_iso::write::{File as IsoFile, InputFiles, IsoCreationError, IsoImageWriter};

use crate::cloud_init::Seed;
use crate::error::{Error, Result};
use crate::steps::step;

/// The label by which cloud-init finds the volume. It takes capitals as well, and FreeBSD's
/// nuageinit does not.
///
/// Source: cloud-init's documentation, "NoCloud"; FreeBSD, `libexec/nuageinit` and
/// `libexec/rc/rc.d/nuageinit`.
const VOLUME_LABEL: &str = "cidata";

/// Writes the seed to `path` as an ISO 9660 volume with Rock Ridge and Joliet names.
///
/// The file is the caller's alone (0600). It comes into being whole, by a rename from `path` with
/// `.unfinished` behind it, and replaces a seed that is there. It is not synced, since it can be
/// written again from the spec. Only one caller at a time may write one path: the holder of the
/// VM's lock.
///
/// # Errors
/// `Host` or `Io` where it can't be written; then `path` is as it was.
pub fn write_seed(seed: &Seed, path: &Path) -> Result<()> {
    let unfinished = unfinished(path);
    let written = write(seed, &unfinished, path);
    if written.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    written.map_err(Error::io("write", path))
}

/// Returns the name under which the file is written until it is whole.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".unfinished");
    name.into()
}

fn write(seed: &Seed, unfinished: &Path, path: &Path) -> io::Result<()> {
    let bytes = volume(seed)?;
    step("seed: create")?;
    // One that an interrupted call left, which may be a link to anywhere, is not written through.
    match fs::remove_file(unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(unfinished)?;
    step("seed: write")?;
    file.write_all(&bytes)?;
    step("seed: rename")?;
    fs::rename(unfinished, path)
}

/// Builds the volume in memory, where it is at most a few MiB.
fn volume(seed: &Seed) -> io::Result<Vec<u8>> {
    let file = |name: &str, contents: &str| IsoFile::File {
        name: Arc::new(name.to_owned()),
        contents: contents.as_bytes().to_vec(),
    };
    let files = InputFiles {
        path_separator: PathSeparator::ForwardSlash,
        files: vec![
            file("user-data", &seed.user_data),
            file("meta-data", &seed.meta_data),
            file("network-config", &seed.network_config),
        ],
    };
    let options = IsoFormatOptions {
        volume_name: VOLUME_LABEL.to_owned(),
        system_id: None,
        volume_set_id: None,
        publisher_id: None,
        preparer_id: None,
        application_id: None,
        sector_size: 2048,
        features: CreationFeatures::extensions(),
        path_separator: PathSeparator::ForwardSlash,
        strict_charset: false,
    };
    let volume = IsoImageWriter::create(Cursor::new(Vec::new()), files, options)
        .map_err(|IsoCreationError::Io(error)| io::Error::other(error))?;
    Ok(volume.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    fn seed(user_data: &str) -> Seed {
        Seed {
            user_data: user_data.to_owned(),
            meta_data: "instance-id: a\n".to_owned(),
            network_config: "version: 2\n".to_owned(),
        }
    }

    /// Runs `isoinfo`, an independent reader; returns nothing, and says so, if this host has none.
    fn isoinfo(arguments: &[&str], image: &Path) -> Option<String> {
        match Command::new("isoinfo").args(arguments).arg("-i").arg(image).output() {
            Ok(output) => {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                Some(String::from_utf8(output.stdout).unwrap())
            }
            Err(error) => {
                println!("SKIP: isoinfo can't be run: {error}");
                None
            }
        }
    }

    #[test]
    fn another_reader_finds_the_documents_by_exact_name_in_both_trees() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.iso");
        for user_data in ["", "#cloud-config\n{}\n", &"#!ü\n".repeat(200_000)] {
            let seed = seed(user_data);
            write_seed(&seed, &path).unwrap();
            let Some(described) = isoinfo(&["-d"], &path) else { return };
            assert!(described.contains("Volume id: cidata"), "{described}");
            assert!(
                described.contains("Rock Ridge signatures") && described.contains("Joliet"),
                "{described}"
            );
            for tree in ["-R", "-J"] {
                let names = isoinfo(&[tree, "-f"], &path).unwrap();
                let mut names: Vec<&str> = names.lines().collect();
                names.sort_unstable();
                assert_eq!(names, ["/meta-data", "/network-config", "/user-data"], "{tree}");
                for (name, content) in [
                    ("/user-data", &seed.user_data),
                    ("/meta-data", &seed.meta_data),
                    ("/network-config", &seed.network_config),
                ] {
                    assert_eq!(&isoinfo(&[tree, "-x", name], &path).unwrap(), content, "{tree} {name}");
                }
            }
        }
    }

    #[test]
    fn the_volume_has_its_label_where_the_kernel_looks() {
        let volume = volume(&seed("#!")).unwrap();
        assert_eq!(&volume[32769..32774], b"CD001");
        assert_eq!(&volume[32808..32840], format!("{VOLUME_LABEL:<32}").as_bytes());
        assert_eq!(volume.len() % 2048, 0);
        let blocks = u32::from_le_bytes(volume[32848..32852].try_into().unwrap());
        assert_eq!(u64::from(blocks) * 2048, volume.len() as u64);
    }

    #[test]
    fn the_system_that_boots_finds_the_volume_by_its_label() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.iso");
        write_seed(&seed("#!"), &path).unwrap();
        let blkid =
            Command::new("/usr/sbin/blkid").args(["-p", "-o", "value", "-s", "LABEL"]).arg(&path).output();
        match blkid {
            Ok(found) => assert_eq!(String::from_utf8_lossy(&found.stdout), "cidata\n", "{found:?}"),
            Err(error) => println!("SKIP: blkid can't be run: {error}"),
        }
    }

    #[test]
    fn only_its_owner_may_read_the_seed_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.iso");
        fs::write(unfinished(&path), "from an interrupted call").unwrap();
        write_seed(&seed("#!1"), &path).unwrap();
        write_seed(&seed("#!2"), &path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_at_any_step_leaves_the_seed_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.iso");
        write_seed(&seed("#!old"), &path).unwrap();
        let before = fs::read(&path).unwrap();
        for failing in ["seed: create", "seed: write", "seed: rename"] {
            crate::set_step_hook(Some(Box::new(move |name| {
                if name == failing { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
            })));
            let error = write_seed(&seed("#!new"), &path).unwrap_err();
            crate::set_step_hook(None);
            assert_eq!(error.kind(), crate::ErrorKind::Host, "{error}");
            assert_eq!(fs::read(&path).unwrap(), before);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "left behind after {failing}");
        }
    }
}
