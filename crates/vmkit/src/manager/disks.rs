//! Disks of a VM that belong to another one, found in the records of all VMs.
//!
//! An image below VMs' disks is never written to, and what is written to is below no disk. Which VM
//! has a disk that may be written by several, one at a time, is for its start to find out.

use std::fs;
use std::path::Path;

use super::VmManager;
use crate::disk_files::{DiskFile, DiskUse, FileId, check_apart, disk_files};
use crate::error::{Error, Result};
use crate::hypervisor::Backend;
use crate::spec::{VmName, VmSpec};

impl<H: Backend + 'static> VmManager<H> {
    /// Refuses disks of a spec that can't be together: with each other, with what other VMs have,
    /// or with the local images.
    ///
    /// Only of a backend whose VMs open files of this host. Records that can't be read are left
    /// out.
    ///
    /// # Errors
    /// `InvalidInput` with the field, the path, and the VM or the image that has the file; `Io`
    /// where the home can't be read.
    pub(super) fn check_disks(&self, spec: &VmSpec) -> Result<()> {
        if !self.abilities_for(spec).capabilities().local_files {
            return Ok(());
        }
        check_apart(spec)?;
        let wanted: Vec<DiskFile> = disk_files(spec)
            .into_iter()
            .filter(|file| matches!(file.used, DiskUse::Base | DiskUse::Written))
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        self.refuse_images(&wanted)?;
        for name in self.store.names()? {
            self.refuse_own_disks(&wanted, &name)?;
            if name == *spec.name() {
                continue;
            }
            let Ok(record) = self.store.read(&name) else { continue };
            for other in [Some(&record.handle.spec), record.handle.next_spec.as_deref()].into_iter().flatten()
            {
                refuse_of_other(&wanted, &name, &disk_files(other))?;
            }
        }
        wanted.iter().filter(|file| file.used == DiskUse::Written).try_for_each(refuse_of_another_home)
    }

    /// Refuses to have a local image written to.
    fn refuse_images(&self, wanted: &[DiskFile]) -> Result<()> {
        let written = wanted.iter().filter(|file| file.used == DiskUse::Written);
        for file in written {
            for image in files_below(self.home().images()).filter(|path| path.is_dir()) {
                if let Some((path, _)) = files_of(&image).find(|(_, id)| *id == file.id) {
                    let why = format!(
                        "this is a local image{}, which VMs are created from and nothing writes to: add \
                         `:ro` to make it read-only, or copy it",
                        named(&path, &file.path)
                    );
                    return Err(Error::invalid(file.used.field(), file.path.display(), why));
                }
            }
        }
        Ok(())
    }

    /// Refuses a file from the directory of a VM: it is written to, and removed with that VM.
    fn refuse_own_disks(&self, wanted: &[DiskFile], name: &VmName) -> Result<()> {
        for (path, id) in files_of(&self.home().vm(name)) {
            if let Some(file) = wanted.iter().find(|file| file.id == id) {
                let why = format!(
                    "this is a file of the VM `{name}`{}, which writes to it and is removed with it: copy it while the VM is \
                     stopped (`qemu-img convert -O qcow2`), or name another",
                    named(&path, &file.path)
                );
                return Err(Error::invalid(file.used.field(), file.path.display(), why));
            }
        }
        Ok(())
    }
}

/// Refuses to write to what the files beside it show to be an image, or a VM's file, of another
/// home.
fn refuse_of_another_home(file: &DiskFile) -> Result<()> {
    let Some(dir) = file.path.canonicalize().ok().and_then(|path| path.parent().map(Path::to_owned)) else {
        return Ok(());
    };
    let is_there = |name: &str| dir.join(name).is_file();
    let is_image = is_there("image.json")
        && dir.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("sha256-"));
    let why = match (is_image, is_there("vm.json") && is_there("owner")) {
        (true, _) => "a local image of a home, which VMs are created from and nothing writes to: copy it",
        (_, true) => "a file of a VM, which writes to it and is removed with it: copy it",
        (false, false) => return Ok(()),
    };
    Err(Error::invalid(file.used.field(), file.path.display(), why))
}

/// Refuses an image that another VM writes to, and a disk to write to that is another VM's image.
fn refuse_of_other(wanted: &[DiskFile], name: &VmName, other: &[DiskFile]) -> Result<()> {
    for file in wanted {
        let is_in_the_way = |theirs: &&DiskFile| {
            theirs.id == file.id
                && matches!(
                    (file.used, theirs.used),
                    (DiskUse::Base, DiskUse::Written) | (DiskUse::Written, DiskUse::Base | DiskUse::Disc)
                )
        };
        let Some(theirs) = other.iter().find(is_in_the_way) else { continue };
        let spelling = named(&theirs.path, &file.path);
        let why = match theirs.used {
            DiskUse::Written => format!(
                "the VM `{name}` has this file as a data disk{spelling} and writes to it, so it can't be a \
                 backing file: copy it first"
            ),
            DiskUse::Disc => format!(
                "the VM `{name}` has this file in its CD-ROM drive{spelling}, so nothing may write to it: \
                 add `:ro` to make it read-only"
            ),
            DiskUse::Base | DiskUse::Read => format!(
                "the disk of the VM `{name}` has this image as its backing file{spelling}, so nothing may \
                 write to it: add `:ro` to make it read-only, or copy it"
            ),
        };
        return Err(Error::invalid(file.used.field(), file.path.display(), why));
    }
    Ok(())
}

/// Returns the other path of a file in brackets, where it has one.
fn named(path: &Path, as_given: &Path) -> String {
    if path == as_given { String::new() } else { format!(" ({})", path.display()) }
}

fn files_below(dir: &Path) -> impl Iterator<Item = std::path::PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Returns the regular files of a directory.
fn files_of(dir: &Path) -> impl Iterator<Item = (std::path::PathBuf, FileId)> {
    files_below(dir).filter_map(|path| {
        let metadata = path.symlink_metadata().ok().filter(fs::Metadata::is_file)?;
        let id = FileId::of_metadata(&metadata);
        Some((path, id))
    })
}
