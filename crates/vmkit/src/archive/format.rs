//! What an export says of itself before anything else: [`ExportHeader`].
//!
//! Pure. It is read from a file that is not trusted: [`ExportHeader::decode`] returns only one
//! whose names are safe below a directory, and whose lengths can be added up.

use std::collections::BTreeSet;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::handle::BackendTag;
use crate::image::{Digest, DigestAlgorithm, ImageFormat};
use crate::spec::VmName;

/// The version of the format that this vmkit writes, and the newest that it reads.
const VERSION: u32 = 1;
/// The first entry.
pub(super) const HEADER: &str = "vmkit-export.json";
/// The last entry.
pub(super) const SUMS: &str = "SHA256SUMS";
/// The record of the VM.
pub(crate) const RECORD: &str = "vm.json";
/// The start of the names of a VM's small files.
pub(crate) const KEPT: &str = "kept/";
/// The start of the names of its backend's files.
pub(crate) const FILES: &str = "files/";
/// Limits above what any export has.
pub(super) const MOST_HEADER_BYTES: u64 = 4 << 20;
pub(crate) const MOST_RECORD_BYTES: u64 = 4 << 20;
const MOST_FILES: usize = 10_000;
/// The longest name in a tar header without extensions, in bytes.
const MOST_NAME_BYTES: usize = 100;

/// The first entry of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExportHeader {
    version: u32,
    /// The version of the vmkit that wrote it.
    pub(crate) vmkit: String,
    pub(crate) name: VmName,
    pub(crate) id: Uuid,
    pub(crate) backend: BackendTag,
    pub(crate) state: String,
    /// The base image of the root disk.
    pub(crate) image: Option<ExportedImage>,
    /// What the host needs where the guest is to continue.
    pub(crate) needs: Vec<String>,
    /// What follows, in order, but for the checksums.
    pub(crate) files: Vec<ListedFile>,
}

/// The base image in an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExportedImage {
    pub(crate) digest: Digest,
    pub(crate) format: ImageFormat,
}

/// A file in an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ListedFile {
    pub(crate) name: String,
    /// Its length.
    pub(crate) bytes: u64,
    /// Its length without its holes.
    pub(crate) stored_bytes: u64,
}

impl ExportHeader {
    /// Creates the header of a VM's export, without files.
    pub(crate) fn new(name: VmName, id: Uuid, backend: BackendTag, state: String) -> Self {
        Self {
            version: VERSION,
            vmkit: env!("CARGO_PKG_VERSION").to_owned(),
            name,
            id,
            backend,
            state,
            image: None,
            needs: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Returns its bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("it has only text, numbers and lists");
        bytes.push(b'\n');
        bytes
    }

    /// Reads a header from its bytes.
    ///
    /// # Errors
    /// `InvalidInput` on `file`, of the name `shown`.
    pub(crate) fn decode(shown: &Path, bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u64,
        }
        let refused = |why: &str| Error::invalid("file", shown.display(), why);
        let unread = |error| refused(&format!("its {HEADER} can't be read")).with_source(error);
        let found: Versioned = serde_json::from_slice(bytes).map_err(unread)?;
        if found.version > u64::from(VERSION) {
            let newer = found.version;
            let why = format!("it was exported by a newer vmkit (format {newer}; this one knows {VERSION})");
            return Err(refused(&why));
        }
        let header: Self = serde_json::from_slice(bytes).map_err(unread)?;
        header.check().map_err(|why| refused(&why))?;
        Ok(header)
    }

    fn check(&self) -> std::result::Result<(), String> {
        if self.files.len() > MOST_FILES {
            return Err(format!("it has {} files (expected at most {MOST_FILES})", self.files.len()));
        }
        if self.files.first().is_none_or(|first| first.name != RECORD) {
            return Err(format!("its first file is not {RECORD}"));
        }
        let mut seen = BTreeSet::new();
        for file in &self.files {
            if !is_name(&file.name) {
                return Err(format!("it has a file {:?}, which is no name of a VM's file", file.name));
            }
            // `a` and `A` are one file on some file systems.
            if !seen.insert(file.name.to_ascii_lowercase()) {
                return Err(format!("it has the file {} twice", file.name));
            }
            if file.stored_bytes > file.bytes {
                let (stored, bytes) = (file.stored_bytes, file.bytes);
                return Err(format!("its file {} has {stored} bytes of data in {bytes}", file.name));
            }
        }
        let named = self.image.as_ref().map(image_entry);
        let (last, others) = self.files.split_last().map_or((None, &[][..]), |(last, all)| (Some(last), all));
        let is_image = |file: &ListedFile| file.name.starts_with("image/");
        let found = last.filter(|last| is_image(last)).map(|last| last.name.clone());
        if found != named || others.iter().any(is_image) {
            return Err(format!("its {HEADER} does not fit to its base image"));
        }
        if self.image.as_ref().is_some_and(|image| image.digest.algorithm() != DigestAlgorithm::Sha256) {
            return Err("the checksum of its base image is no SHA-256".to_owned());
        }
        self.stored_bytes().map(drop).ok_or_else(|| "its files have more than 2^64 bytes".to_owned())
    }

    /// Returns how many bytes the data of all files has; `None` beyond all bounds.
    pub(crate) fn stored_bytes(&self) -> Option<u64> {
        self.files.iter().try_fold(0_u64, |sum, file| sum.checked_add(file.stored_bytes))
    }
}

/// Returns the name of the entry with a base image.
pub(crate) fn image_entry(image: &ExportedImage) -> String {
    format!("image/disk.{}", image.format.as_str())
}

/// Returns whether a name is one of an entry between the header and the checksums.
fn is_name(name: &str) -> bool {
    let below = |name: &str, most: usize| {
        let parts: Vec<&str> = name.split('/').collect();
        parts.len() <= most && parts.iter().all(|part| is_part(part))
    };
    let is_known = name == RECORD
        || name.strip_prefix(KEPT).is_some_and(|name| below(name, 1))
        || name.strip_prefix(FILES).is_some_and(|name| below(name, 2))
        || name.strip_prefix("image/").is_some_and(|name| below(name, 1));
    is_known && name.len() <= MOST_NAME_BYTES
}

/// Returns whether a text can be the name of a file that vmkit finished writing.
pub(crate) fn is_part(part: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    part.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && part.bytes().all(is_plain)
        && ![".new", ".unfinished"].iter().any(|end| part.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(name: &str) -> ListedFile {
        ListedFile { name: name.to_owned(), bytes: 10, stored_bytes: 10 }
    }

    fn header(files: &[&str]) -> ExportHeader {
        let name = VmName::new("web").unwrap();
        let mut header = ExportHeader::new(name, Uuid::from_u128(7), BackendTag::Qemu, "stopped".to_owned());
        header.files = files.iter().map(|name| file(name)).collect();
        header
    }

    fn decoded(bytes: &[u8]) -> Result<ExportHeader> {
        ExportHeader::decode(Path::new("/x"), bytes)
    }

    fn problem(header: &ExportHeader) -> String {
        decoded(&header.encode()).unwrap_err().to_string()
    }

    #[test]
    fn a_header_survives_its_bytes() {
        let mut whole = header(&[RECORD, "kept/login-key", "files/root.qcow2", "files/snapshots/a.json"]);
        assert_eq!(decoded(&whole.encode()).unwrap(), whole);
        let digest = Digest::of_hex(&"ab".repeat(32)).unwrap();
        whole.image = Some(ExportedImage { digest, format: ImageFormat::Raw });
        assert!(problem(&whole).contains("does not fit to its base image"));
        whole.files.push(file("image/disk.raw"));
        assert_eq!(decoded(&whole.encode()).unwrap(), whole);
        whole.files.push(file("files/late"));
        assert!(problem(&whole).contains("does not fit to its base image"));
    }

    #[test]
    fn names_that_lead_elsewhere_or_are_there_twice_are_refused() {
        for name in [
            "/etc/passwd",
            "files/../x",
            "files/..",
            "files/.",
            "files/",
            "files//x",
            "files/a/b/c",
            "kept/a/b",
            "files/.hidden",
            "files/a\\b",
            "files/a\0b",
            "other/x",
            "kept/x.new",
            "files/ümlaut",
            "SHA256SUMS",
            "vmkit-export.json",
        ] {
            let problem = problem(&header(&[RECORD, name]));
            assert!(problem.contains("no name of a VM's file"), "{name}: {problem}");
        }
        assert!(problem(&header(&[RECORD, "files/a", "files/A"])).contains("twice"));
        assert!(problem(&header(&["files/a"])).contains("first file is not vm.json"));
    }

    #[test]
    fn lengths_that_can_not_be_are_refused() {
        let mut lie = header(&[RECORD, "files/a", "files/b"]);
        lie.files[1].stored_bytes = 11;
        assert!(problem(&lie).contains("11 bytes of data in 10"));
        for file in &mut lie.files[1..] {
            (file.bytes, file.stored_bytes) = (u64::MAX, u64::MAX - 1);
        }
        assert!(problem(&lie).contains("more than 2^64"));
    }

    #[test]
    fn a_newer_format_is_named_with_ours() {
        let text = String::from_utf8(header(&[RECORD]).encode()).unwrap();
        let newer = text.replace("\"version\": 1", "\"version\": 2");
        let problem = decoded(newer.as_bytes()).unwrap_err().to_string();
        let why = "file: \"/x\": it was exported by a newer vmkit (format 2; this one knows 1)";
        assert_eq!(problem, why);
    }

    proptest! {
        #[test]
        fn reading_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decoded(&bytes);
        }

        #[test]
        fn a_name_that_is_accepted_stays_below_its_directory(name in "[a-z./]{0,20}|files/[ -~]{0,12}") {
            if is_name(&name) {
                let plain = |part: std::path::Component<'_>| matches!(part, std::path::Component::Normal(_));
                prop_assert!(std::path::Path::new(&name).components().all(plain));
            }
        }
    }
}
