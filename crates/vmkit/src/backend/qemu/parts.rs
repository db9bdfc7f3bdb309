//! What lies in a VM's directory: the mark of the VM that it belongs to, and the parts that
//! `prepare` has created.

use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;

use uuid::Uuid;

use super::layers::{self, OwnDisk};
use super::layout::QemuLayout;
use crate::backend::supervise::files::is_gone;
use crate::error::Result;
use crate::input_file::open_regular;
use crate::spec::{Boot, DataDisk, Firmware, VmSpec};
use crate::store::denied;

/// A limit above the size of an owner's mark: an id and a newline.
const MARK_BYTES: usize = 64;

/// Returns the owner of a directory; `None` if it has no valid mark, for example after a crash.
///
/// # Errors
/// `Io` if the mark can't be read.
pub(super) fn owner(layout: &QemuLayout) -> Result<Option<Uuid>> {
    let mark = layout.owner_mark();
    let mut text = [0; MARK_BYTES];
    match open_regular(&mark).and_then(|mut file| file.read(&mut text)) {
        Ok(read) => Ok(std::str::from_utf8(&text[..read]).ok().and_then(|text| text.trim().parse().ok())),
        Err(error) if is_gone(&error) || error.kind() == io::ErrorKind::InvalidData => Ok(None),
        Err(error) => Err(denied("read", &mark)(error)),
    }
}

/// Returns a file of `prepare` that is missing: without it the VM can only be removed. The seed can
/// be written again.
pub(super) fn missing_part(spec: &VmSpec, layout: &QemuLayout) -> Option<PathBuf> {
    let root = spec.disk().map(|_| layout.root_disk());
    let vars = matches!(spec.boot(), Boot::Firmware(Firmware::Uefi)).then(|| layout.efi_vars());
    let fresh =
        spec.data_disks().iter().enumerate().filter(|(_, disk)| matches!(disk, DataDisk::Fresh { .. }));
    let fresh = fresh.map(|(index, _)| layout.data_disk(index));
    let gone = |part: &PathBuf| matches!(fs::symlink_metadata(part), Err(error) if is_gone(&error));
    let missing = root.into_iter().chain(vars).chain(fresh).find(gone);
    missing.or_else(|| layers::own_disks(spec, layout).iter().find_map(missing_layer))
}

/// Returns the layer that a disk is over and that is missing.
fn missing_layer(disk: &OwnDisk) -> Option<PathBuf> {
    // The start reports a disk that can't be read.
    let lowest = disk.chain().ok()?.pop()?;
    let layer = disk.layer(&lowest);
    (!layer.exists()).then_some(layer)
}
