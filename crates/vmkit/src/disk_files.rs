//! The files of the host that a VM's disks are: whether they may be together in one VM.
//!
//! Edge: examines files. Files are compared by device and inode, so that links and other spellings
//! of a path make no difference. A file that is not there is for the caller who opens it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
#[cfg(all(target_os = "linux", feature = "qemu"))]
use crate::input_file::InputFile;
#[cfg(all(target_os = "linux", feature = "qemu"))]
use crate::spec::Boot;
use crate::spec::{DataDisk, RootDisk, VmSpec};

/// What tells a file from all others on this host at one time: its device and its inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileId(u64, u64);

impl FileId {
    /// Returns the identity of a regular file, links followed; `None` for what is no such file.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let metadata = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
        Some(Self::of_metadata(&metadata))
    }

    pub(crate) fn of_metadata(metadata: &std::fs::Metadata) -> Self {
        Self(metadata.dev(), metadata.ino())
    }
}

/// What a VM has a file for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DiskUse {
    /// The image below its root disk.
    Base,
    /// A data disk that the guest writes to.
    Written,
    /// A data disk that the guest only reads.
    Read,
    /// The disc in the CD-ROM drive.
    Disc,
}

impl DiskUse {
    /// Returns the field of the spec.
    pub(crate) fn field(self) -> &'static str {
        match self {
            DiskUse::Base => "image",
            DiskUse::Written | DiskUse::Read => "data_disks",
            DiskUse::Disc => "cdrom",
        }
    }
}

/// A file that is a disk of a VM.
#[derive(Debug, Clone)]
pub(crate) struct DiskFile {
    pub(crate) path: PathBuf,
    pub(crate) id: FileId,
    pub(crate) used: DiskUse,
}

/// Returns the files of a spec's disks that are there, the image first.
pub(crate) fn disk_files(spec: &VmSpec) -> Vec<DiskFile> {
    let mut named: Vec<(&Path, DiskUse)> = Vec::new();
    named.extend(spec.disk().and_then(RootDisk::base).map(|image| (image, DiskUse::Base)));
    for disk in spec.data_disks() {
        if let DataDisk::Existing { path, readonly } = disk {
            named.push((path, if *readonly { DiskUse::Read } else { DiskUse::Written }));
        }
    }
    named.extend(spec.cdrom().map(|path| (path, DiskUse::Disc)));
    let found = |(path, used): (&Path, DiskUse)| {
        Some(DiskFile { path: path.to_owned(), id: FileId::of(path)?, used })
    };
    named.into_iter().filter_map(found).collect()
}

/// Refuses paths that lead to a VM's files only as long as the process that names them.
///
/// # Errors
/// `InvalidInput` on the field, with the path that the file has.
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) fn check_paths(spec: &VmSpec) -> Result<()> {
    disk_files(spec).iter().try_for_each(|file| InputFile::check_lasts(file.used.field(), &file.path))?;
    if let Boot::Kernel(kernel) = spec.boot() {
        InputFile::check_lasts("kernel", &kernel.path)?;
        kernel.initrd.as_deref().map_or(Ok(()), |initrd| InputFile::check_lasts("initrd", initrd))?;
    }
    Ok(())
}

/// Refuses a file that a VM would write to and has a second time, as its image or as another disk.
///
/// # Errors
/// `InvalidInput` on the field of the later one, with its path.
pub(crate) fn check_apart(spec: &VmSpec) -> Result<()> {
    let files = disk_files(spec);
    for (index, second) in files.iter().enumerate() {
        let is_written =
            |first: &DiskFile| [first.used, second.used].contains(&DiskUse::Written) && first.id == second.id;
        if let Some(first) = files[..index].iter().find(|first| is_written(first)) {
            return Err(twice(&first.path, first.used, &second.path, second.used));
        }
    }
    Ok(())
}

/// Returns the error for one file that is two disks of one VM, of which one is written to.
fn twice(first: &Path, first_use: DiskUse, second: &Path, second_use: DiskUse) -> Error {
    let named = if first == second { String::new() } else { format!(" ({})", first.display()) };
    let why = match first_use {
        DiskUse::Base => format!(
            "this is the image of the same VM{named}, which is never written to: use another disk, or add \
             `:ro` to make it read-only"
        ),
        DiskUse::Written | DiskUse::Read | DiskUse::Disc => {
            format!(
                "the same VM has this disk already{named}, and one of the two writes to it: add each disk \
                 once"
            )
        }
    };
    Error::invalid(second_use.field(), second.display(), why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::VmName;

    fn refusal(image: &Path, disks: &[(&Path, bool)]) -> Option<String> {
        let disk = |(path, readonly): &(&Path, bool)| DataDisk::Existing {
            path: path.to_path_buf(),
            readonly: *readonly,
        };
        let spec = VmSpec::builder(VmName::new("web").unwrap())
            .disk(RootDisk { image: image.to_owned(), size: None })
            .data_disks(disks.iter().map(disk).collect())
            .build()
            .unwrap();
        check_apart(&spec).err().map(|error| error.to_string())
    }

    #[test]
    fn one_file_is_two_disks_only_where_nothing_writes_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let [image, disk, hard, soft] = ["image", "disk", "hard", "soft"].map(|name| dir.path().join(name));
        std::fs::write(&image, "i").unwrap();
        std::fs::write(&disk, "d").unwrap();
        std::fs::hard_link(&disk, &hard).unwrap();
        std::os::unix::fs::symlink(&image, &soft).unwrap();
        assert_eq!(refusal(&image, &[(&disk, false)]), None);
        assert_eq!(refusal(&image, &[(&disk, true), (&hard, true), (&soft, true)]), None);
        for disks in [[(&*disk, false), (&*hard, true)], [(&*disk, true), (&*hard, false)]] {
            let text = refusal(&image, &disks).unwrap();
            assert!(text.starts_with(&format!("data_disks: {hard:?}")), "{text}");
            assert!(text.contains("already") && text.contains(disk.to_str().unwrap()), "{text}");
        }
        let text = refusal(&image, &[(&soft, false)]).unwrap();
        assert!(
            text.starts_with(&format!("data_disks: {soft:?}")) && text.contains("the image of the same VM")
        );
    }
}
