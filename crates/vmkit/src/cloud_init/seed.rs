//! The seed as the backends want it, and what they are told where this library was built without
//! it.

use uuid::Uuid;

use crate::error::Result;
use crate::network::MacAddr;
use crate::spec::{CloudInitConfig, VmName};

/// Whose seed it is.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(
    not(feature = "cloud-init"),
    expect(dead_code, reason = "who can't write it needs no more than the name")
)]
pub(crate) struct SeedOf<'a> {
    pub(crate) config: &'a CloudInitConfig,
    pub(crate) name: &'a VmName,
    pub(crate) id: Uuid,
    /// The guest's network card; `None` if it is not known.
    pub(crate) mac: Option<MacAddr>,
}

#[cfg(feature = "cloud-init")]
impl SeedOf<'_> {
    /// Returns the volume that Propolis shows the guest.
    ///
    /// # Errors
    /// `InvalidInput` for what can't be said in YAML, or has no room.
    #[cfg(feature = "propolis")]
    pub(crate) fn fat_volume(self) -> Result<Vec<u8>> {
        super::fat::volume(&self.rendered()?).map_err(|_| {
            crate::error::Error::invalid("cloud_init", "its documents", "together they have at most 2 MB")
        })
    }

    /// Returns the documents.
    ///
    /// # Errors
    /// `InvalidInput` for what can't be said in YAML.
    pub(crate) fn rendered(self) -> Result<super::Seed> {
        super::render(self.config, self.name, self.id, self.mac)
    }
}

#[cfg(not(feature = "cloud-init"))]
impl SeedOf<'_> {
    #[cfg(all(target_os = "linux", feature = "qemu"))]
    pub(crate) fn rendered(self) -> Result<super::Seed> {
        Err(self.left_out())
    }

    #[cfg(feature = "propolis")]
    pub(crate) fn fat_volume(self) -> Result<Vec<u8>> {
        Err(self.left_out())
    }

    fn left_out(self) -> crate::error::Error {
        let why = "this program was built without vmkit's cargo feature `cloud-init`";
        crate::error::Error::invalid("cloud_init", self.name, why)
    }
}

/// Writes nothing: without the feature there is no seed.
#[cfg(all(target_os = "linux", feature = "qemu", not(feature = "cloud-init")))]
pub(crate) fn write_seed(_seed: &super::Seed, _path: &std::path::Path) -> Result<()> {
    Ok(())
}
