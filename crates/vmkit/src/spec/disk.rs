//! Disks: the root disk over an image, and data disks.
//!
//! Pure.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::error::Error;
use crate::spec::Mib;

/// The root disk: the VM's own, over an image that is never written to. With QEMU a qcow2 overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootDisk {
    /// The base image on the host, raw or qcow2, which is detected. For Propolis raw, or
    /// `zfs:DATASET@SNAPSHOT` to clone a volume's snapshot.
    ///
    /// The empty path means no image: the disk is empty, and has a size. See [`RootDisk::empty`].
    pub image: PathBuf,
    /// The size that the guest sees, at least the image's, which is the default.
    pub size: Option<Mib>,
}

impl RootDisk {
    /// The prefix of an image that is a snapshot of a ZFS volume.
    #[cfg(any(feature = "images", feature = "propolis"))]
    pub(crate) const ZFS: &str = "zfs:";

    /// Returns whether this names a snapshot of a ZFS volume, rather than a file.
    #[cfg(feature = "images")]
    pub(crate) fn is_zfs(image: &Path) -> bool {
        image.as_os_str().as_encoded_bytes().starts_with(Self::ZFS.as_bytes())
    }

    /// Returns an empty disk, for an installation from a CD-ROM.
    pub fn empty(size: Mib) -> Self {
        Self { image: PathBuf::new(), size: Some(size) }
    }

    /// Returns its base image; `None` for an empty disk.
    pub fn base(&self) -> Option<&Path> {
        Some(self.image.as_path()).filter(|image| !image.as_os_str().is_empty())
    }
}

/// A data disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataDisk {
    /// A new empty disk, created by `prepare` and removed by `destroy`.
    Fresh {
        /// The size.
        size: Mib,
    },
    /// An existing image of the user's: attached unchanged, never removed.
    Existing {
        /// The image on the host, raw or qcow2.
        path: PathBuf,
        /// Whether the disk is read-only for the guest.
        readonly: bool,
    },
}

impl FromStr for DataDisk {
    type Err = Error;

    /// Parses the size of a new disk, or the path of an image, with `:ro` at its end for a
    /// read-only disk. A value that starts with a digit and has no slash is a size.
    fn from_str(text: &str) -> Result<Self, Error> {
        if text.starts_with(|c: char| c.is_ascii_digit()) && !text.contains('/') {
            return text.parse().map(|size| Self::Fresh { size });
        }
        let (path, readonly) = text.strip_suffix(":ro").map_or((text, false), |path| (path, true));
        if path.is_empty() {
            return Err(Error::invalid("data_disks", text, "write a size, or the path of an image"));
        }
        Ok(Self::Existing { path: path.into(), readonly })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_disk_is_a_size_or_a_path() {
        let size = Mib::new(2048).unwrap();
        assert_eq!("2GiB".parse::<DataDisk>().unwrap(), DataDisk::Fresh { size });
        for (text, path, readonly) in
            [("/d/a,b.raw", "/d/a,b.raw", false), ("/d/1.raw:ro", "/d/1.raw", true), ("./10", "./10", false)]
        {
            assert_eq!(text.parse::<DataDisk>().unwrap(), DataDisk::Existing { path: path.into(), readonly });
        }
        for (text, why) in [("0", "at least 1 MiB"), (":ro", "data_disks: "), ("2GB", "unknown unit")] {
            let error = text.parse::<DataDisk>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
