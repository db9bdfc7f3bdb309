//! Stand-ins for the tools of an illumos host, and what they keep.
//!
//! The program `vmkit-fake-illumos` is all of them, by the name that it is called as.

mod bhyvectl;
mod call;
mod dispatch;
mod dladm;
mod fake;
mod state;
mod zfs;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

pub use call::{CallFault, ToolOutput};
pub use fake::FakeIllumos;
pub use state::{Dataset, DatasetKind, IllumosState, Link, LinkClass};

/// The variable that names the directory in which the stand-ins keep their state.
pub const DIR: &str = "VMKIT_FAKE_ILLUMOS";

/// What stands for a firmware: pages of nothing, as many as servers may want.
pub(super) const BOOTROM: [u8; 8192] = [0; 8192];

/// The variable that names what stands for `/dev/vmm`, where that is not in the stand-ins'
/// directory.
pub const VMM: &str = "VMKIT_FAKE_VMM";

/// A host that is a directory.
#[derive(Debug, Clone)]
pub struct Illumos {
    dir: PathBuf,
}

impl Illumos {
    /// Returns the host whose directory is `dir`.
    pub fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Returns the host on which a program was found that was called as `program`, a path or a name
    /// in `path`.
    ///
    /// A host's programs are links in its directory `bin`.
    pub fn of_program(program: &Path, path: Option<&std::ffi::OsStr>) -> Option<Self> {
        let found = if program.components().count() > 1 {
            program.to_owned()
        } else {
            std::env::split_paths(path?).map(|dir| dir.join(program)).find(|path| path.exists())?
        };
        let dir = found.parent()?.parent()?;
        dir.join("state.json").exists().then(|| Self::at(dir.to_owned()))
    }

    /// Returns the directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns what stands for `/dev`.
    pub fn dev(&self) -> PathBuf {
        self.dir.join("dev")
    }

    /// Returns what stands for `/dev/vmm`.
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

/// Returns the names of a directory's entries in order; one that is not there has none.
pub(super) fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
