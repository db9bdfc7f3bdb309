//! The shape that `vmkit snapshot … --json` prints; promised as those of `json` are.

use std::time::SystemTime;

use serde::Serialize;
use vmkit::abilities::{Snapshot, SnapshotKind};

/// A snapshot of a VM.
#[derive(Serialize)]
pub(crate) struct SnapshotView<'a> {
    name: &'a str,
    parent: Option<&'a str>,
    /// Whether the VM's disks continue from it.
    current: bool,
    /// In seconds since 1970.
    created_at: u64,
    kind: SnapshotKind,
    /// The space of its own files on the host's disk.
    disk_bytes: u64,
}

impl<'a> SnapshotView<'a> {
    pub(crate) fn of(it: &'a Snapshot) -> Self {
        Self {
            name: it.name.as_str(),
            parent: it.parent.as_ref().map(|parent| parent.as_str()),
            current: it.is_current,
            created_at: it.created.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            kind: it.kind,
            disk_bytes: it.bytes,
        }
    }
}
