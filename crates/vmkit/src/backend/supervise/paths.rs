//! Where the supervision of one VM's hypervisor keeps its files.
//!
//! Pure: paths and numbers only.

use std::path::{Path, PathBuf};

/// The number that the lock `alive` has in a hypervisor: high, so that it meets no other.
pub(crate) const ALIVE_DESCRIPTOR: i32 = 200;

/// Where the supervision of one VM's hypervisor keeps its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SupervisionPaths {
    /// Locked by the process that runs the VM; the hypervisor itself inherits the lock, so it is
    /// free exactly when nothing runs.
    pub(crate) alive: PathBuf,
    /// The record of the last run, written by the keeper.
    pub(crate) run_file: PathBuf,
    /// Is there from the moment a start begins.
    pub(crate) run_dir: PathBuf,
    /// The hypervisor's name in errors, such as `QEMU`.
    pub(crate) program: &'static str,
    /// What kills a process that runs with more privileges than this user's: a program and its
    /// arguments before the number.
    pub(crate) killer: Option<Vec<String>>,
}

/// Returns where a file lies until it is whole.
pub(crate) fn unfinished(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".unfinished");
    PathBuf::from(name)
}
