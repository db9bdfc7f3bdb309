//! Directories of VMs that were copied, renamed or linked by hand within a home: the record in one
//! is of a VM of another name.
//!
//! Such a directory can't be used, since a VM lies in the directory of its name. It can be removed,
//! and that touches nothing of the VM that its record names.

use std::fs;

use super::files::{MADE, is_link, read_bytes};
use crate::error::Error;
use crate::misplacement::Misplacement;
use crate::spec::VmName;
use crate::store::{Home, VmRecord};

/// Returns the error for a directory whose record is of a VM of another name.
pub(super) fn misplaced(home: &Home, name: &VmName, made: &VmRecord) -> Error {
    Error::Misplaced {
        path: home.vm(name),
        vm: made.handle.name().clone(),
        how: misplacement(home, name, made),
    }
}

/// Finds what the directory of this name is, whose record is `made`.
fn misplacement(home: &Home, name: &VmName, made: &VmRecord) -> Misplacement {
    if is_link(&home.vm(name)) {
        return Misplacement::Link;
    }
    let named = home.vm(made.handle.name());
    if matches!(fs::symlink_metadata(&named), Err(error) if error.kind() == std::io::ErrorKind::NotFound) {
        return Misplacement::Renamed;
    }
    let theirs = read_bytes(&named.join(MADE)).ok().flatten();
    match theirs.and_then(|bytes| VmRecord::whose(&bytes)) {
        Some((id, _)) if id == made.handle.id => Misplacement::Copy,
        _ => Misplacement::Replaced,
    }
}
