//! Disks: the root disk over an image, and further disks.
//!
//! Pure.

use std::path::{Path, PathBuf};

use crate::spec::Mib;

/// The root disk: the VM's own, over an image that is never written to. In QEMU a qcow2 overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDisk {
    /// The base image on the host, raw or qcow2; which, is found by looking. For Propolis raw, or
    /// `zfs:DATASET@SNAPSHOT` to clone a volume's snapshot.
    ///
    /// The empty path stands for no image: the disk is empty, and has a size. See
    /// [`RootDisk::empty`].
    pub image: PathBuf,
    /// The size the guest sees; the image's own where none is given. Never smaller than the image.
    pub size: Option<Mib>,
}

impl RootDisk {
    /// Returns an empty disk, for what is on a CD-ROM to be installed on.
    pub fn empty(size: Mib) -> Self {
        Self { image: PathBuf::new(), size: Some(size) }
    }

    /// Returns the image that it is made on; `None` for an empty disk.
    pub fn base(&self) -> Option<&Path> {
        Some(self.image.as_path()).filter(|image| !image.as_os_str().is_empty())
    }
}

/// A data disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataDisk {
    /// A new empty disk, made by `prepare` and removed by `destroy`.
    Fresh {
        /// Its size.
        size: Mib,
    },
    /// An existing image that stays the user's: attached as it is, never removed.
    Existing {
        /// The image on the host, raw or qcow2.
        path: PathBuf,
        /// Whether the guest may only read it.
        readonly: bool,
    },
}
