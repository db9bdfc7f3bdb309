//! A place in a bounded log.
//!
//! Pure: data; `boundedlog` finds the places.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A place in a bounded log: it tells what was written since from what was there before, however
/// often the log is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPosition {
    #[serde(flatten)]
    pub(crate) file: FileMark,
    pub(crate) at_bytes: u64,
}

/// A file, wherever it is moved to. A number that is free again may be another file's, which was
/// born later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileMark {
    pub(crate) inode: u64,
    pub(crate) born_ns: Option<u64>,
}

/// Returns where the older half of a bounded log lies.
pub(crate) fn older_log(log: &Path) -> PathBuf {
    let mut path = log.as_os_str().to_owned();
    path.push(".1");
    path.into()
}
