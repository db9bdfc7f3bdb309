//! The properties of an image: [`ImageFacts`].
//!
//! Pure: data; `inspect.rs` finds it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[cfg(any(feature = "images", all(target_os = "linux", feature = "qemu")))]
use crate::error::{Error, Result};
use crate::image_format::ImageFormat;
#[cfg(any(feature = "images", all(target_os = "linux", feature = "qemu")))]
use crate::spec::Mib;

/// The smallest unit of a disk in bytes; QEMU rounds odd lengths up to it.
pub(super) const SECTOR_BYTES: u64 = 512;

/// The properties of an image, from its content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// The image: absolute, without symbolic links, so it stays the same file when a link is moved.
    pub path: PathBuf,
    /// The format.
    pub format: ImageFormat,
    /// The size of the disk as the guest sees it, a multiple of 512.
    pub virtual_size_bytes: u64,
    /// The length of the file.
    pub file_bytes: u64,
}

impl ImageFacts {
    /// Returns the size of a disk over this image, in bytes: the wanted size, else the image's.
    ///
    /// # Errors
    /// `InvalidInput` on `disk` for a size below the image's.
    #[cfg(any(feature = "images", all(target_os = "linux", feature = "qemu")))]
    pub(crate) fn disk_bytes(&self, size: Option<Mib>) -> Result<u64> {
        let image_bytes = self.virtual_size_bytes.next_multiple_of(SECTOR_BYTES);
        match size {
            Some(size) if size.bytes() < image_bytes => {
                let least = Mib::holding(image_bytes);
                let (image, bytes) = (self.path.display(), size.bytes());
                let why = format!(
                    "the image {image} is a disk of {image_bytes} bytes, this is {bytes}: use at least \
                     {least}, or omit the size"
                );
                Err(Error::invalid("disk", size, why))
            }
            Some(size) => Ok(size.bytes()),
            None => Ok(image_bytes),
        }
    }
}
