//! The formats of disk images: [`ImageFormat`].
//!
//! Pure: plain data.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A format of disk images that vmkit uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ImageFormat {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's own format, version 2 or 3.
    Qcow2,
}

impl ImageFormat {
    /// Returns the name that QEMU gives it: `raw` or `qcow2`.
    pub fn as_str(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
