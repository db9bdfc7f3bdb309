//! A record as bytes, in the shape of the newest version.
//!
//! Pure. A record of a backend that is not registered here loads like any other.

use std::path::Path;

use serde::Deserialize;
use uuid::Uuid;

use super::record::VmRecord;
use super::v1;
use crate::error::{Error, Result};
use crate::spec::VmName;

impl VmRecord {
    /// The version that this vmkit writes, and the newest that it reads.
    pub const VERSION: u32 = v1::VERSION;

    /// Returns the record's bytes.
    ///
    /// # Errors
    /// `InvalidInput` when the spec has a path that is not UTF-8.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes =
            serde_json::to_vec_pretty(&v1::StoredRecord::store(self.clone())).map_err(|error| {
                Error::invalid("spec", self.handle.name(), "it can't be recorded").with_source(error)
            })?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads a record from its bytes; `path` is where they came from.
    ///
    /// # Errors
    /// `Record` with the path, and what is wrong: empty, truncated, foreign, or of a newer version.
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Self> {
        match serde_json::from_slice::<v1::StoredRecord>(bytes) {
            Ok(record) if record.version == Self::VERSION => {
                record.load().map_err(|error| Error::record(path, FOREIGN).with_source(error))
            }
            Ok(record) => Err(Error::record(path, unsupported(record.version.into()))),
            Err(error) => Err(explain(path, bytes, error)),
        }
    }

    /// Returns which VM these bytes are the record of, if they are a record of this version; the
    /// rest is not looked at.
    pub(super) fn whose(bytes: &[u8]) -> Option<(Uuid, VmName)> {
        let whose =
            serde_json::from_slice::<RecordOwner>(bytes).ok().filter(|whose| whose.version == Self::VERSION);
        whose.map(|whose| (whose.handle.id, whose.handle.spec.name))
    }

    /// Returns whether these bytes say that they are a record of a version that this vmkit does not
    /// read.
    pub(super) fn is_newer(bytes: &[u8]) -> bool {
        serde_json::from_slice::<RecordHead>(bytes).is_ok_and(|head| head.version > u64::from(Self::VERSION))
    }
}

/// The part of a record that says whose it is.
#[derive(Deserialize)]
struct RecordOwner {
    version: u32,
    handle: WhoseHandle,
}

#[derive(Deserialize)]
struct WhoseHandle {
    id: Uuid,
    spec: WhoseSpec,
}

#[derive(Deserialize)]
struct WhoseSpec {
    name: VmName,
}

/// The part of the shape that every version keeps.
#[derive(Deserialize)]
struct RecordHead {
    version: u64,
}

/// Says what is wrong with bytes that are no record of this version.
fn explain(path: &Path, bytes: &[u8], error: serde_json::Error) -> Error {
    let problem = match serde_json::from_slice::<RecordHead>(bytes) {
        _ if bytes.is_empty() => "the record is empty".to_owned(),
        Ok(head) if head.version != u64::from(VmRecord::VERSION) => unsupported(head.version),
        _ if error.is_eof() => format!("the record is truncated after {} bytes", bytes.len()),
        _ => return Error::record(path, FOREIGN).with_source(error),
    };
    Error::record(path, problem)
}

/// What is wrong with a file that has something else in it.
const FOREIGN: &str = "this is not a record of a VM";

fn unsupported(found: u64) -> String {
    let supported = VmRecord::VERSION;
    format!("the record has version {found}, and this vmkit reads version {supported}")
}

#[cfg(test)]
mod tests {
    use super::super::record::Intent;
    use super::*;
    use crate::handle::{BackendTag, VmHandle};
    use crate::lifecycle::Operation;
    use crate::spec::{Boot, Kernel, VmName, VmSpec};
    use proptest::prelude::*;
    use uuid::Uuid;

    fn record() -> VmRecord {
        let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: "quiet".into() };
        let spec = VmSpec::builder(VmName::new("web").unwrap()).boot(Boot::Kernel(kernel)).build().unwrap();
        let tag = BackendTag::custom("somebody-elses").unwrap();
        let intent = Intent { operation: Operation::Start, since: 1_700_000_000, pid: 42, snapshot: None };
        VmRecord::intending(VmHandle::preparing(Uuid::from_u128(7), tag, spec), intent)
    }

    fn problem(bytes: &[u8]) -> String {
        VmRecord::decode(Path::new("/vms/web/vm.json"), bytes).unwrap_err().chain().to_string()
    }

    #[test]
    fn a_record_of_an_unknown_backend_survives_its_bytes() {
        let bytes = record().encode().unwrap();
        assert_eq!(VmRecord::decode(Path::new("x"), &bytes).unwrap(), record());
        assert_eq!(VmRecord::whose(&bytes), Some((record().handle.id, record().handle.name().clone())));
    }

    #[test]
    fn a_future_version_is_named_with_the_supported_one() {
        let whole = String::from_utf8(record().encode().unwrap()).unwrap();
        let same_shape = whole.replace("\"version\": 1,", "\"version\": 2,");
        for text in [r#"{"version": 2, "machine": []}"#, &same_shape] {
            let expected = "/vms/web/vm.json: the record has version 2, and this vmkit reads version 1";
            assert_eq!(problem(text.as_bytes()), expected);
        }
    }

    #[test]
    fn empty_truncated_and_foreign_bytes_are_distinguished() {
        let bytes = record().encode().unwrap();
        assert!(problem(b"").ends_with("the record is empty"));
        assert!(problem(&bytes[..60]).ends_with("truncated after 60 bytes"));
        assert!(problem(b"\x7fELF").contains("not a record of a VM"));
        assert!(problem(b"{\"version\": 1}").contains("missing field `handle`"));
    }

    proptest! {
        #[test]
        fn reading_any_bytes_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = VmRecord::decode(Path::new("x"), &bytes);
        }

        #[test]
        fn reading_a_damaged_record_never_panics(
            damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            kept in any::<prop::sample::Index>(),
        ) {
            let mut bytes = record().encode().unwrap();
            for (place, byte) in damage {
                let place = place.index(bytes.len());
                bytes[place] = byte;
            }
            bytes.truncate(kept.index(bytes.len()) + 1);
            let _ = VmRecord::decode(Path::new("x"), &bytes);
        }
    }
}
