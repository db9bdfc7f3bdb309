//! The files that a VM needs at each start, looked at again: QEMU's own words for a missing one are
//! a command line long.
//!
//! Edge: examines files, and reads an image that was touched since the VM was made on it.

use std::fs;
use std::path::Path;

use rustix::fs::{Access, access};
use rustix::io::Errno;
use serde::Deserialize;

use super::QemuDetails;
use super::facts::ImageMedia;
use super::layout::QemuLayout;
use crate::backend::supervise::files::is_gone;
use crate::blocking::blocking;
use crate::disk_files::{check_apart, check_paths};
use crate::error::{Error, PartProblem, Result};
use crate::handle::VmHandle;
use crate::image::{ImageFormat, ImageIdentity, check_disc, has_qcow2_header, inspect_for};
use crate::input_file::InputFile;
use crate::kernel_file::{check_initrd, check_kernel};
use crate::spec::{Boot, DataDisk, Firmware, RootDisk, VmSpec};
use crate::store::denied;

/// Checks the files of a VM that is about to start, and returns the identity of its image to note
/// from now on.
///
/// A VM without a noted identity, made by an earlier version, starts as long as its image is there.
///
/// # Errors
/// `InvalidInput` with the field and the path of a file that is gone or can't be read, of an image
/// that was changed, and of a disk that the VM has twice.
pub(super) async fn check_files(
    spec: &VmSpec,
    media: &ImageMedia,
    noted: Option<&ImageIdentity>,
) -> Result<Option<ImageIdentity>> {
    if let Boot::Kernel(kernel) = spec.boot() {
        check_kernel(&kernel.path, spec.machine().arch())?;
        kernel.initrd.as_deref().map_or(Ok(()), check_initrd)?;
    }
    for (index, disk) in spec.data_disks().iter().enumerate() {
        if let DataDisk::Existing { path, readonly } = disk {
            InputFile::data_disk(path, *readonly)?;
            check_data_disk(path, media.data_formats.get(index).copied().flatten())?;
        }
    }
    spec.cdrom().map_or(Ok(()), check_disc)?;
    check_paths(spec)?;
    check_apart(spec)?;
    check_base(spec, noted).await
}

/// Refuses a file of the VM's directory that this user may not use, for QEMU and the keeper do not
/// say whose it is; and a disk, or firmware variables, that are not what `prepare` created.
///
/// # Errors
/// `OtherUser` with the way out; `VmPart`; `Host`; `Io`.
pub(super) fn check_own_files(spec: &VmSpec, layout: &QemuLayout) -> Result<()> {
    for path in layout.run_inputs(spec.data_disks().len()) {
        // What is not there is made, or refused below.
        if access(&path, Access::READ_OK | Access::WRITE_OK) == Err(Errno::ACCESS) {
            return Err(denied("open", path)(Errno::ACCESS.into()));
        }
    }
    check_parts(spec, layout)
}

fn check_parts(spec: &VmSpec, layout: &QemuLayout) -> Result<()> {
    if matches!(spec.boot(), Boot::Firmware(Firmware::Uefi)) {
        check_part(&layout.efi_vars())?;
    }
    let root = spec.disk().map(|_| layout.root_disk());
    let data = spec.data_disks().iter().enumerate();
    let fresh = data.filter(|(_, disk)| matches!(disk, DataDisk::Fresh { .. }));
    for disk in root.into_iter().chain(fresh.map(|(index, _)| layout.data_disk(index))) {
        check_part(&disk)?;
        if !has_qcow2_header(&disk).map_err(denied("read", &disk))? {
            return Err(Error::VmPart { path: disk, problem: PartProblem::NotQcow2 });
        }
    }
    Ok(())
}

fn check_part(path: &Path) -> Result<()> {
    let problem = match fs::metadata(path) {
        Ok(found) if !found.is_file() => PartProblem::NotAFile,
        Ok(found) if found.len() == 0 => PartProblem::Empty,
        Ok(_) => return Ok(()),
        Err(error) if is_gone(&error) => PartProblem::Missing,
        Err(error) => return Err(denied("examine", path)(error)),
    };
    Err(Error::VmPart { path: path.to_owned(), problem })
}

/// Refuses a data disk that is no qcow2 any more. What a raw one holds is the guest's, so its bytes
/// do not count.
fn check_data_disk(path: &Path, format: Option<ImageFormat>) -> Result<()> {
    if format != Some(ImageFormat::Qcow2) || inspect_for("data_disks", path)?.format == ImageFormat::Qcow2 {
        return Ok(());
    }
    let why = "the VM was created with a qcow2 image here, and the file is no longer one: restore it";
    Err(Error::invalid("data_disks", path.display(), why))
}

async fn check_base(spec: &VmSpec, noted: Option<&ImageIdentity>) -> Result<Option<ImageIdentity>> {
    let Some(image) = spec.disk().and_then(RootDisk::base) else { return Ok(None) };
    let vm = spec.name();
    let Some(noted) = noted else {
        return InputFile::open("image", image).map(|_| None).map_err(|error| needed(vm.as_str(), error));
    };
    let (path, noted) = (image.to_owned(), noted.clone());
    // A whole image may have to be read.
    let compared = blocking(move || noted.compared(&path)).await?;
    match compared.map_err(|error| needed(vm.as_str(), error))? {
        Ok(now) => Ok(Some(now)),
        Err(change) => Err(Error::invalid("image", image.display(), change.refusal(vm.as_str(), image))),
    }
}

/// Says of an image that can't be opened that a VM's disk needs it.
fn needed(vm: &str, error: Error) -> Error {
    match error {
        Error::Invalid { field, value, expected, problem, source } => {
            let remedy = format!(
                "the disk of the VM `{vm}` holds only the difference to this image: restore it, or \
                 recreate the VM"
            );
            Error::Invalid { field, value, expected: format!("{expected}; {remedy}"), problem, source }
        }
        error => error,
    }
}

/// Reads the identity of the image that a VM is made on.
///
/// # Errors
/// As [`ImageIdentity::of`].
pub(super) async fn identity_of_base(spec: &VmSpec) -> Result<Option<ImageIdentity>> {
    let Some(image) = spec.disk().and_then(RootDisk::base) else { return Ok(None) };
    let path = image.to_owned();
    blocking(move || ImageIdentity::of(&path)).await?.map(Some)
}

/// Checks the files of a VM that is about to be stopped in order to start again, as its next start
/// will.
///
/// # Errors
/// As [`check_own_files`] and [`check_files`].
pub(crate) async fn check_restart(vm: &VmHandle, layout: &QemuLayout) -> Result<()> {
    // Details that can't be read are the start's to report.
    let Ok(details) = QemuDetails::deserialize(&vm.details.data) else { return Ok(()) };
    let spec = vm.next_spec.as_deref().unwrap_or(&vm.spec);
    check_own_files(spec, layout)?;
    check_files(spec, &details.media, details.base.as_ref()).await.map(drop)
}
