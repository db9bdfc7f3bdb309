//! What a VM is created from, before the host is asked: [`Blueprint`].
//!
//! Pure.

use std::path::PathBuf;

use super::{Boot, Firmware, GuestAccess, RootDisk, VmSpec, VmSpecBuilder};
use crate::error::{Error, Result};

/// A spec that lacks what only the host knows: where the image of its root disk is, which firmware
/// that image needs, and the keys of vmkit's own login.
///
/// ```text
/// VmSpecBuilder ─ new ─▶ Blueprint ─ fill ─▶ VmSpec
/// ```
///
/// The image of the root disk may be a name (`debian:12`) or an address. The firmware is the
/// image's unless the builder names what to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blueprint {
    /// Valid; the image of its root disk is what the caller named.
    draft: VmSpec,
    takes_firmware: bool,
    takes_access: bool,
}

/// What only the host knows of a VM, when it is created.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostInputs {
    /// The path of the image; required if the root disk has one.
    pub image: Option<PathBuf>,
    /// The firmware that the image or the disc needs.
    pub firmware: Option<Firmware>,
    /// How vmkit gets into the guest; without cloud-init it is not used.
    pub access: Option<GuestAccess>,
}

impl Blueprint {
    /// Checks a spec and returns its blueprint.
    ///
    /// # Errors
    /// As for [`VmSpecBuilder::build`].
    pub fn new(spec: VmSpecBuilder) -> Result<Self> {
        let takes_firmware = spec.boot.is_none();
        Ok(Self { draft: spec.build()?, takes_firmware, takes_access: false })
    }

    /// Returns the same blueprint, with a login for vmkit itself unless the spec has one;
    /// cloud-init creates its user.
    #[must_use]
    pub fn with_access(mut self) -> Self {
        self.draft.0.cloud_init.get_or_insert_default();
        self.takes_access = true;
        self
    }

    /// Returns the spec as far as it is known.
    pub fn draft(&self) -> &VmSpec {
        &self.draft
    }

    /// Returns whether keys for vmkit's own login have to be created.
    #[cfg(all(feature = "images", feature = "ssh"))]
    pub(crate) fn lacks_access(&self) -> bool {
        self.takes_access && self.draft.cloud_init().is_some_and(|config| config.access.is_none())
    }

    /// Returns the spec with what the host knows.
    ///
    /// # Errors
    /// `InvalidInput` if the whole is not valid, and on `image` if its path is missing.
    pub fn fill(&self, found: HostInputs) -> Result<VmSpec> {
        let mut spec = VmSpecBuilder::from(self.draft.clone());
        if let Some((disk, name)) = self.draft.disk().and_then(|disk| Some((disk, disk.base()?))) {
            let missing = || Error::invalid("image", name.display(), "it is not local yet: pull it first");
            spec = spec.disk(RootDisk { image: found.image.ok_or_else(missing)?, size: disk.size });
        }
        // A machine whose usual firmware is UEFI has no BIOS.
        if let (true, Some(firmware), Boot::Firmware(Firmware::Bios)) =
            (self.takes_firmware, found.firmware, self.draft.boot())
        {
            spec = spec.boot(Boot::Firmware(firmware));
        }
        if let (Some(access), Some(config)) = (found.access, &mut spec.cloud_init) {
            config.access = Some(access);
        }
        spec.build()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{MachineType, VmName};

    #[test]
    fn the_image_decides_the_firmware_unless_it_is_named_or_the_machine_has_one() {
        let disk = RootDisk { image: "debian:12".into(), size: None };
        let spec = || VmSpec::builder(VmName::new("web").unwrap()).disk(disk.clone());
        let filled = |spec: VmSpecBuilder, firmware| {
            let found = HostInputs { image: Some("/d".into()), firmware: Some(firmware), access: None };
            Blueprint::new(spec).unwrap().fill(found).unwrap().boot().clone()
        };
        let [bios, uefi] = [Firmware::Bios, Firmware::Uefi].map(Boot::Firmware);
        assert_eq!(filled(spec(), Firmware::Uefi), uefi);
        assert_eq!(filled(spec().boot(bios.clone()), Firmware::Uefi), bios);
        assert_eq!(filled(spec().machine(MachineType::Virt), Firmware::Bios), uefi);
        let missing = Blueprint::new(spec()).unwrap().fill(HostInputs::default()).unwrap_err();
        assert!(missing.to_string().starts_with("image: \"debian:12\": "), "{missing}");
    }
}
