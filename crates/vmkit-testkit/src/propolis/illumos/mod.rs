//! Stand-ins for the tools of an illumos host, and what they keep.
//!
//! The program `vmkit-fake-illumos` is all of them, by the name that it is called as.

mod state;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

pub use state::{Dataset, Kind, Link, LinkClass, State};

/// The variable that names the directory in which the stand-ins keep their state.
pub const DIR: &str = "VMKIT_FAKE_ILLUMOS";

/// The variable that names what stands for `/dev/vmm`, where that is not in the stand-ins' directory.
pub const VMM: &str = "VMKIT_FAKE_VMM";

/// A host that is a directory.
#[derive(Debug, Clone)]
pub struct Illumos {
    dir: PathBuf,
}

impl Illumos {
    /// Answers the host whose directory is `dir`.
    pub fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Answers what stands for `/dev`.
    pub fn dev(&self) -> PathBuf {
        self.dir.join("dev")
    }

    /// Answers what stands for `/dev/vmm`.
    pub fn vmm(&self) -> PathBuf {
        self.dev().join("vmm")
    }

    /// Takes the lock under which the state is read and written.
    fn lock(&self) -> io::Result<File> {
        std::fs::create_dir_all(&self.dir)?;
        let file = OpenOptions::new().create(true).append(true).open(self.dir.join("lock"))?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    }
}

/// Answers the names of a directory's entries in order; one that is not there has none.
pub(super) fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
