//! Directories of VMs that were copied, renamed or linked by hand within a home: the record in one
//! is of a VM of another name.
//!
//! Such a directory can't be used, since a VM lies in the directory of its name. It can be removed,
//! and that touches nothing of the VM that its record names.

use std::fs;
use std::path::Path;

use super::{LockedVm, MADE, decode, is_link, read_bytes};
use crate::error::{Error, Result};
use crate::spec::VmName;
use crate::steps::step;
use crate::store::{Home, VmRecord};

/// What a directory is whose record names another VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Misplacement {
    /// A symbolic link to the directory of that VM.
    Link,
    /// A copy of the directory of that VM, which is there as well.
    Copy,
    /// The directory of that VM under another name.
    Renamed,
    /// The directory of that VM under another name; another VM has its name by now.
    Replaced,
}

impl Misplacement {
    /// Finds what the directory of this name is, whose record is `made`.
    fn of(home: &Home, name: &VmName, made: &VmRecord) -> Self {
        if is_link(&home.vm(name)) {
            return Self::Link;
        }
        let named = home.vm(made.handle.name());
        if matches!(fs::symlink_metadata(&named), Err(error) if error.kind() == std::io::ErrorKind::NotFound)
        {
            return Self::Renamed;
        }
        let theirs = read_bytes(&named.join(MADE)).ok().flatten();
        match theirs.and_then(|bytes| VmRecord::whose(&bytes)) {
            Some((id, _)) if id == made.handle.id => Self::Copy,
            _ => Self::Replaced,
        }
    }

    /// Says what the directory is, and how it is mended where it can be.
    pub(crate) fn problem(self, dir: &Path, vm: &VmName) -> String {
        match self {
            Self::Link => format!("this is a symbolic link to the directory of the VM `{vm}`"),
            Self::Copy => format!(
                "this is a copy of the directory of the VM `{vm}`, with the identity of that VM, and can't be used as another"
            ),
            Self::Renamed => format!(
                "this is the directory of the VM `{vm}` under another name: `mv {} {}` gives it its name back",
                quoted(dir),
                quoted(&dir.with_file_name(vm.as_str()))
            ),
            Self::Replaced => format!(
                "this is the directory of a VM `{vm}` under another name, and another VM is called `{vm}` by now"
            ),
        }
    }
}

/// Returns the error for a directory whose record is of a VM of another name.
pub(super) fn misplaced(home: &Home, name: &VmName, made: &VmRecord) -> Error {
    Error::Misplaced {
        path: home.vm(name),
        vm: made.handle.name().clone(),
        how: Misplacement::of(home, name, made),
    }
}

impl LockedVm {
    /// Returns the record of the VM of another name that lies here, as one of this directory: what
    /// is done to it is done here.
    pub(crate) fn misplaced_record(&self) -> Result<Option<VmRecord>> {
        let path = self.dir.join(MADE);
        let Some(bytes) = read_bytes(&path)? else { return Ok(None) };
        let mut made = decode(&self.home, &path, &bytes)?;
        made.handle.spec = made.handle.spec.with_name(self.name.clone());
        Ok(Some(made))
    }

    /// Removes the symbolic link that this directory is, and nothing behind it.
    pub(crate) fn remove_link(self) -> Result<()> {
        step("remove a link")
            .and_then(|()| fs::remove_file(&self.dir))
            .map_err(Error::io("remove", &self.dir))
    }
}

/// Quotes a path for a shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', r"'\''"))
}
