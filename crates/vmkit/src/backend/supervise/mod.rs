//! What backends have in common that run their hypervisor as a process of this host: starting it so
//! that it outlives vmkit, finding it again without doubt, ending it, and knowing how it ended.
//!
//! ```text
//!  alive     the lock that is free exactly when nothing runs, nor is about to
//!  spawn     starts a keeper, and tells it what to start
//!  keeper    the hypervisor's parent: a process of its own, one thread, no runtime
//!  runfile   the keeper's record of a run
//!  process   what really runs: run file → process that is certainly ours
//!  files     private directories; what is removed, gone already or not
//! ```
//!
//! It knows files, locks and processes, and nothing of what the hypervisor is or says.

pub(crate) mod alive;
pub(crate) mod files;
pub(crate) mod keeper;
pub(crate) mod process;
pub(crate) mod runfile;
pub(crate) mod spawn;

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
    with_suffix(file, ".unfinished")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}
