//! Local images as they are on disk: the record beside a disk, and the record of a name.
//!
//! Pure.
//!
//! ```text
//! <images>/sha256-HEX/disk.qcow2   or disk.raw: the disk, 0444; HEX is its checksum
//! <images>/sha256-HEX/image.json   its record; written last: without it there is no image
//! <images>/sha256-HEX/damaged      marks a damaged disk, which the next pull or import replaces
//! <images>/sha256-HEX/lock         shared while a VM is created from it, exclusive for removal
//! <images>/names/NAME@ARCH.json    the image of a name, its source, how it was verified
//! <images>/names/lock              held while one of them is written
//! <images>/downloads/KEY/          a download in progress, or interrupted
//! ```

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::{Digest, DigestAlgorithm};
use super::facts::ImageFacts;
use crate::error::{Error, Result};
use crate::image_format::ImageFormat;
use crate::spec::{Arch, Firmware, UserName};

/// The version of both formats that this vmkit writes, and the newest that it reads.
const VERSION: u32 = 1;

/// A local image, with all its names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalImage {
    /// The checksum of its disk: its id.
    pub id: Digest,
    /// The format and size of the disk.
    pub facts: ImageFacts,
    /// The architecture of the guest, if the disk shows it.
    pub arch: Option<Arch>,
    /// When it was first stored, in seconds since 1970 (UTC).
    pub kept_at: u64,
    /// Its names; an image that was replaced by a newer one may have none.
    pub names: Vec<LocalName>,
}

/// A name of a local image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalName {
    version: u32,
    /// The name: of the catalogue, of an import, or an address.
    pub name: String,
    /// The architecture that was requested.
    pub arch: Arch,
    /// The image of that name.
    pub image: Digest,
    /// The source: an address or a path.
    pub source: String,
    /// When it was fetched or imported, in seconds since 1970 (UTC).
    pub since: u64,
    /// The checksum of the bytes as they were received, compressed or not.
    pub download: Digest,
    /// How it was verified.
    pub verified: Verification,
    /// The user that cloud-init in the image creates, if known.
    pub user: Option<UserName>,
    /// The firmware that the image boots with, if known.
    pub firmware: Option<Firmware>,
}

/// How an image was verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Verification {
    /// By the publisher's signature.
    Signature {
        /// The fingerprint of the key.
        fingerprint: String,
    },
    /// By a checksum beside it; no better than the connection to that server.
    Checksum {
        /// The address of the checksum.
        from: String,
    },
    /// By a checksum in the catalogue, in a registry's manifest or in the request.
    Digest,
    /// Not verified: no checksum was known.
    Nothing,
}

/// The record beside a disk.
#[derive(Debug, Serialize, Deserialize)]
struct ImageRecord {
    version: u32,
    format: ImageFormat,
    virtual_size_bytes: u64,
    file_bytes: u64,
    arch: Option<Arch>,
    kept_at: u64,
}

/// The parts of a new name.
#[derive(Debug, Clone)]
pub(super) struct NewName {
    pub(super) name: String,
    pub(super) arch: Arch,
    pub(super) source: String,
    pub(super) verified: Verification,
    pub(super) user: Option<UserName>,
    pub(super) firmware: Option<Firmware>,
}

impl NewName {
    /// Returns the name as it is stored.
    pub(super) fn of(self, image: Digest, download: Digest, since: u64) -> LocalName {
        let Self { name, arch, source, verified, user, firmware } = self;
        LocalName { version: VERSION, name, arch, image, source, since, download, verified, user, firmware }
    }
}

impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verification::Signature { fingerprint } => write!(f, "signature by {fingerprint}"),
            Verification::Checksum { from } => write!(f, "checksum of {from}"),
            Verification::Digest => f.write_str("checksum"),
            Verification::Nothing => f.write_str("not verified"),
        }
    }
}

impl LocalName {
    /// Returns its bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a name from the bytes of its file.
    ///
    /// # Errors
    /// `Record` with the file and what is wrong with it.
    pub(super) fn decode(path: &Path, bytes: &[u8]) -> Result<Self> {
        decode(path, bytes, |name: &Self| name.version)
    }

    /// Returns the name of its file.
    pub(super) fn file_name(&self) -> String {
        file_name(&self.name, self.arch)
    }
}

impl LocalImage {
    /// Returns the bytes of the record beside its disk.
    pub(super) fn encode(&self) -> Vec<u8> {
        encode(&ImageRecord {
            version: VERSION,
            format: self.facts.format,
            virtual_size_bytes: self.facts.virtual_size_bytes,
            file_bytes: self.facts.file_bytes,
            arch: self.arch,
            kept_at: self.kept_at,
        })
    }

    /// Reads an image from the bytes of the record in its directory, without its names.
    ///
    /// # Errors
    /// `Record` with the file and what is wrong with it.
    pub(super) fn decode(id: Digest, dir: &Path, bytes: &[u8]) -> Result<Self> {
        let record = decode(&dir.join(RECORD), bytes, |record: &ImageRecord| record.version)?;
        let facts = ImageFacts {
            path: dir.join(disk_name(record.format)),
            format: record.format,
            virtual_size_bytes: record.virtual_size_bytes,
            file_bytes: record.file_bytes,
        };
        Ok(Self { id, facts, arch: record.arch, kept_at: record.kept_at, names: Vec::new() })
    }
}

/// The empty file that marks a damaged disk.
pub(super) const DAMAGED: &str = "damaged";
/// The file with the record of a local image.
pub(super) const RECORD: &str = "image.json";

/// Returns the path of the disk in an image's directory.
pub(super) fn disk_name(format: ImageFormat) -> PathBuf {
    Path::new("disk").with_extension(format.as_str())
}

/// Returns the directory of an image.
pub(super) fn dir_name(id: &Digest) -> String {
    format!("{}-{}", id.algorithm(), id.hex())
}

/// Returns the image of a directory; `None` if the directory is not an image's.
pub(super) fn id_of_dir(name: &str) -> Option<Digest> {
    let id = name.split_once('-').and_then(|(kind, hex)| Digest::new(kind, hex))?;
    (id.algorithm() == DigestAlgorithm::Sha256 && dir_name(&id) == name).then_some(id)
}

/// Returns the file of a name: special characters are escaped as `%XX`, and a name that is too long
/// for a file is hashed.
pub(super) fn file_name(name: &str, arch: Arch) -> String {
    use super::digest::Hasher;
    const MOST_BYTES: usize = 200;

    let mut escaped = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b':' => {
                escaped.push(char::from(byte))
            }
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    if escaped.len() > MOST_BYTES || escaped.starts_with('.') {
        escaped = format!("%{}", Hasher::digest(DigestAlgorithm::Sha256, name.as_bytes()).hex());
    }
    format!("{escaped}@{}.json", arch.as_str())
}

fn encode(record: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(record).expect("it has only text, numbers and lists");
    bytes.push(b'\n');
    bytes
}

fn decode<T: for<'a> Deserialize<'a>>(path: &Path, bytes: &[u8], version: fn(&T) -> u32) -> Result<T> {
    #[derive(Deserialize)]
    struct ImageRecordHead {
        version: u32,
    }
    let refused = |problem: &str| Error::record(path, problem);
    match serde_json::from_slice::<T>(bytes) {
        Ok(record) if version(&record) == VERSION => Ok(record),
        parsed => match (serde_json::from_slice::<ImageRecordHead>(bytes), parsed) {
            (Ok(head), _) if head.version != VERSION => Err(refused(&format!(
                "the record has version {}, and this vmkit reads version {VERSION}",
                head.version
            ))),
            (_, Err(error)) => Err(refused("this is not a record of an image").with_source(error)),
            (_, Ok(_)) => Err(refused("this is not a record of an image")),
        },
    }
}

/// Returns whether a record was read and is none, so that what replaces or removes it loses
/// nothing; a record of a newer version is one.
pub(super) fn is_spoilt(error: &Error) -> bool {
    match error {
        Error::Record { source, .. } => source.is_some(),
        Error::Io { source, .. } => {
            matches!(source.kind(), io::ErrorKind::InvalidData | io::ErrorKind::IsADirectory)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_become_files_that_stay_apart() {
        assert_eq!(file_name("debian:12", Arch::X86_64), "debian:12@x86_64.json");
        assert_eq!(file_name("https://h/a b", Arch::Aarch64), "https:%2F%2Fh%2Fa%20b@aarch64.json");
        let long = |end: char| file_name(&format!("https://h/{}{end}", "x".repeat(300)), Arch::X86_64);
        assert!(long('a').len() < 255 && long('a') != long('b'));
    }

    #[test]
    fn a_record_of_another_version_is_named_with_ours() {
        let error = LocalName::decode(Path::new("/n"), br#"{"version": 2}"#).unwrap_err().to_string();
        assert_eq!(error, "/n: the record has version 2, and this vmkit reads version 1");
        let error = LocalName::decode(Path::new("/n"), b"{").unwrap_err().to_string();
        assert!(error.starts_with("/n: this is not a record"), "{error}");
    }

    proptest! {
        #[test]
        fn a_file_name_is_always_one_component(name in ".{0,300}") {
            let file = file_name(&name, Arch::X86_64);
            prop_assert!(file.len() < 255 && !file.contains('/') && !file.starts_with('.'));
        }

        #[test]
        fn reading_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = LocalName::decode(Path::new("/n"), &bytes);
        }
    }
}
