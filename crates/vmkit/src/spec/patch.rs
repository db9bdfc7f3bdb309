//! What shall be different in a spec: [`SpecPatch`].
//!
//! Pure. `create`, `launch`, `set` and files of machines fill in a patch; which fields go together,
//! and what one of them does to the rest of a spec, stands here alone.

use std::path::PathBuf;

use super::{
    Accel, BackendOptions, Boot, CloudInitConfig, DataDisk, Firmware, Kernel, Labels, MachineType, Mib,
    NetworkConfig, PortForward, RootDisk, UserName, UserNetwork, VmSpec, VmSpecBuilder, Vnc,
};
use crate::backend_tag::BackendTag;
use crate::error::{Error, Result};

/// The fields of a spec that shall be different; a field that is `None` stays as it is.
///
/// Starts empty, from [`SpecPatch::default`]. Applied to [`VmSpec::builder`] it describes a new VM;
/// applied to the spec of a VM that exists, what that VM shall be.
///
/// # Examples
/// ```
/// use vmkit::spec::{Boot, Kernel, SpecPatch, VmName, VmSpec};
/// let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: "quiet".into() };
/// let spec = VmSpec::builder(VmName::new("web")?).boot(Boot::Kernel(kernel)).build()?;
/// let mut patch = SpecPatch::default();
/// patch.cpus = Some(4);
/// patch.cmdline = Some("console=ttyS0".into());
/// let spec = patch.apply_to(spec)?;
/// assert_eq!(spec.cpus(), 4);
/// # Ok::<(), vmkit::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SpecPatch {
    /// The backend that runs the VM.
    pub backend: Option<BackendTag>,
    /// What only that backend understands; replaces all options.
    pub backend_options: Option<BackendOptions>,
    /// The number of virtual CPUs, 1 to 255.
    pub cpus: Option<u32>,
    /// The guest's memory.
    pub memory: Option<Mib>,
    /// The machine type.
    pub machine: Option<MachineType>,
    /// The firmware to boot by; takes the place of a kernel.
    pub firmware: Option<Firmware>,
    /// A kernel to boot directly; takes the place of the firmware.
    pub kernel: Option<PathBuf>,
    /// The kernel's initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: Option<String>,
    /// What runs the guest's code.
    pub accel: Option<Accel>,
    /// The image of the root disk: a path, or in a [`Blueprint`](super::Blueprint) a name.
    pub image: Option<PathBuf>,
    /// The size of the root disk. Without an image, of an empty one that a disc's installer fills.
    pub disk: Option<Mib>,
    /// The data disks; replaces all of them.
    pub data_disks: Option<Vec<DataDisk>>,
    /// The disc in the CD-ROM drive.
    pub cdrom: Option<CdromPatch>,
    /// The network. User networking keeps the forwards that the VM has.
    pub network: Option<NetworkConfig>,
    /// The forwards, with user networking; replaces all of them but adds one to port 22.
    pub forwards: Option<Vec<PortForward>>,
    /// Whether the guest reaches nothing but its forwards, with user networking.
    pub restrict: Option<bool>,
    /// What cloud-init reads.
    pub cloud_init: Option<CloudInitConfig>,
    /// Where the screen is shown.
    pub vnc: Option<Vnc>,
    /// How much of the serial console's output is kept on disk.
    pub console_log: Option<Mib>,
    /// The host's user that the hypervisor runs as.
    pub run_as: Option<UserName>,
    /// The labels; replaces all of them.
    pub labels: Option<Labels>,
}

/// What happens to the CD-ROM drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CdromPatch {
    /// The drive has this image of a disc.
    Insert(PathBuf),
    /// The VM has no drive.
    Remove,
}

/// A field of a [`SpecPatch`] that does not go with another field.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FieldConflict {
    /// The field, as errors name it.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// The field that it does not go with, or that is missing.
    pub other: &'static str,
    /// What is wrong, and what would be right.
    pub problem: &'static str,
}

impl From<FieldConflict> for Error {
    fn from(conflict: FieldConflict) -> Self {
        Error::invalid(conflict.field, conflict.value, conflict.problem)
    }
}

impl SpecPatch {
    /// Returns whether no field is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the spec with the patch applied.
    ///
    /// # Errors
    /// `InvalidInput` for the first of [`conflicts`](Self::conflicts), and as for
    /// [`VmSpecBuilder::build`].
    pub fn apply_to(&self, spec: VmSpec) -> Result<VmSpec> {
        self.apply(spec.into())?.build()
    }

    /// Returns the builder with the patch applied; the whole is checked when it is built.
    ///
    /// # Errors
    /// `InvalidInput` for the first of [`conflicts`](Self::conflicts).
    pub fn apply(&self, base: VmSpecBuilder) -> Result<VmSpecBuilder> {
        match self.conflicts(&base).into_iter().next() {
            Some(conflict) => Err(conflict.into()),
            None => Ok(self.merged(base)),
        }
    }

    /// Returns the builder with the patch applied, and what conflicts left out.
    pub(crate) fn merged(&self, base: VmSpecBuilder) -> VmSpecBuilder {
        // Taken apart in full, so that a new field is not forgotten here.
        let Self {
            backend,
            backend_options,
            cpus,
            memory,
            machine,
            firmware: _,
            kernel: _,
            initrd: _,
            cmdline: _,
            accel,
            image: _,
            disk: _,
            data_disks,
            cdrom,
            network: _,
            forwards: _,
            restrict: _,
            cloud_init,
            vnc,
            console_log,
            run_as,
            labels,
        } = self;
        let (boot, disk, network) =
            (self.boot(base.boot.as_ref()), self.root_disk(&base), self.network(&base.network));
        let mut spec = base;
        spec.cdrom = match cdrom {
            Some(CdromPatch::Insert(disc)) => Some(disc.clone()),
            Some(CdromPatch::Remove) => None,
            None => spec.cdrom,
        };
        spec.boot = boot.or(spec.boot);
        spec.disk = disk.or(spec.disk);
        spec.network = network;
        spec.backend = backend.clone().or(spec.backend);
        spec.cloud_init = cloud_init.clone().or(spec.cloud_init);
        spec.run_as = run_as.clone().or(spec.run_as);
        set(&mut spec.backend_options, backend_options);
        set(&mut spec.cpus, cpus);
        set(&mut spec.memory, memory);
        set(&mut spec.machine, machine);
        set(&mut spec.accel, accel);
        set(&mut spec.data_disks, data_disks);
        set(&mut spec.vnc, vnc);
        set(&mut spec.console_log, console_log);
        set(&mut spec.labels, labels);
        spec
    }

    /// Returns every field of the patch that does not go with another one, or with what the spec
    /// has already.
    pub fn conflicts(&self, base: &VmSpecBuilder) -> Vec<FieldConflict> {
        let mut found = Vec::new();
        let mut note = |field, value: String, other, problem| {
            found.push(FieldConflict { field, value, other, problem });
        };
        let path = |path: &PathBuf| path.display().to_string();
        let of_kernel = [
            ("kernel", self.kernel.as_ref().map(path)),
            ("initrd", self.initrd.as_ref().map(path)),
            ("cmdline", self.cmdline.clone()),
        ];
        let has_kernel = self.kernel.is_some() || matches!(base.boot, Some(Boot::Kernel(_)));
        for (field, value) in of_kernel.into_iter().filter_map(|(field, value)| Some((field, value?))) {
            if self.firmware.is_some() {
                note(field, value, "firmware", "a kernel is loaded without firmware: set one of the two");
            } else if !has_kernel {
                note(field, value, "kernel", "this VM boots no kernel: set one as well");
            }
        }
        let has_disk = self.image.is_some() || base.disk.is_some() || self.has_disc(base);
        if let Some(size) = self.disk.filter(|_| !has_disk) {
            let problem =
                "this VM has no root disk: set its image, or a cdrom whose installer fills an empty disk";
            note("disk", size.to_string(), "image", problem);
        }
        if !matches!(self.network.as_ref().unwrap_or(&base.network), NetworkConfig::User(_)) {
            if let Some(forward) = self.forwards.iter().flatten().next() {
                note("forward", forward.to_string(), "network", "only user networking forwards ports");
            }
            if self.restrict == Some(true) {
                note("restrict", true.to_string(), "network", "only user networking can restrict the guest");
            }
        }
        found
    }

    /// Returns what the VM shall boot, if that changes; of a kernel's three parts, the rest stays.
    fn boot(&self, base: Option<&Boot>) -> Option<Boot> {
        if let Some(firmware) = self.firmware {
            return Some(Boot::Firmware(firmware));
        }
        let base = match base {
            Some(Boot::Kernel(kernel)) => Some(kernel),
            _ => None,
        };
        if self.kernel.is_none() && self.initrd.is_none() && self.cmdline.is_none() {
            return None;
        }
        let cmdline = self.cmdline.clone().or_else(|| base.map(|kernel| kernel.cmdline.clone()));
        Some(Boot::Kernel(Kernel {
            path: self.kernel.clone().or_else(|| base.map(|kernel| kernel.path.clone()))?,
            initrd: self.initrd.clone().or_else(|| base.and_then(|kernel| kernel.initrd.clone())),
            cmdline: cmdline.unwrap_or_default(),
        }))
    }

    /// Returns whether there is a disc in the CD-ROM drive.
    fn has_disc(&self, base: &VmSpecBuilder) -> bool {
        match &self.cdrom {
            Some(cdrom) => *cdrom != CdromPatch::Remove,
            None => base.cdrom.is_some(),
        }
    }

    /// Returns the root disk, if that changes.
    fn root_disk(&self, base: &VmSpecBuilder) -> Option<RootDisk> {
        let size = self.disk.or_else(|| base.disk.as_ref().and_then(|disk| disk.size));
        match (&self.image, &base.disk) {
            (Some(image), _) => Some(RootDisk { image: image.clone(), size }),
            (None, Some(disk)) => Some(RootDisk { size, ..disk.clone() }),
            (None, None) => self.disk.filter(|_| self.has_disc(base)).map(RootDisk::empty),
        }
    }

    /// Returns the network, with the forwards of before where it was user networking already.
    fn network(&self, base: &NetworkConfig) -> NetworkConfig {
        let mut network = match (&self.network, base) {
            (None, base) | (Some(NetworkConfig::User(_)), base @ NetworkConfig::User(_)) => base.clone(),
            (Some(wanted), _) => wanted.clone(),
        };
        if let NetworkConfig::User(user) = &mut network {
            if let Some(forwards) = &self.forwards {
                user.forwards = UserNetwork::with_ssh(forwards.clone()).forwards;
            }
            user.restrict = self.restrict.unwrap_or(user.restrict);
        }
        network
    }
}

/// Puts a value in its place, if there is one.
fn set<T: Clone>(place: &mut T, value: &Option<T>) {
    if let Some(value) = value {
        *place = value.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::VmName;

    fn new() -> VmSpecBuilder {
        VmSpec::builder(VmName::new("web").unwrap())
    }

    fn patch(edit: impl FnOnce(&mut SpecPatch)) -> SpecPatch {
        let mut patch = SpecPatch::default();
        edit(&mut patch);
        patch
    }

    fn refusal(base: VmSpecBuilder, edit: impl FnOnce(&mut SpecPatch)) -> String {
        patch(edit).apply(base).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_patch_changes_nothing() {
        let base = || new().cpus(3).disk(RootDisk { image: "/a".into(), size: None }).cdrom("/b".into());
        assert!(SpecPatch::default().is_empty());
        assert_eq!(SpecPatch::default().apply(base()).unwrap(), base());
    }

    #[test]
    fn a_part_of_a_kernel_leaves_the_others_and_firmware_takes_its_place() {
        let kernel = Kernel { path: "/k".into(), initrd: Some("/i".into()), cmdline: "quiet".to_owned() };
        let base = || new().boot(Boot::Kernel(kernel.clone()));
        let boot = |edit: &dyn Fn(&mut SpecPatch)| patch(edit).apply(base()).unwrap().boot.unwrap();
        let other = boot(&|patch| patch.kernel = Some("/l".into()));
        assert_eq!(other, Boot::Kernel(Kernel { path: "/l".into(), ..kernel.clone() }));
        let other = boot(&|patch| patch.cmdline = Some(String::new()));
        assert_eq!(other, Boot::Kernel(Kernel { cmdline: String::new(), ..kernel.clone() }));
        assert_eq!(boot(&|patch| patch.firmware = Some(Firmware::Bios)), Boot::Firmware(Firmware::Bios));
        let text = refusal(new(), |patch| patch.initrd = Some("/i".into()));
        assert_eq!(text, "initrd: \"/i\": this VM boots no kernel: set one as well");
        let text = refusal(base(), |patch| {
            patch.firmware = Some(Firmware::Uefi);
            patch.cmdline = Some("quiet".to_owned());
        });
        assert!(text.starts_with("cmdline: \"quiet\": a kernel is loaded without firmware"), "{text}");
    }

    #[test]
    fn forwards_stay_with_user_networking_and_need_it() {
        let forward: PortForward = "8080:80".parse().unwrap();
        let with = patch(|patch| patch.forwards = Some(vec![forward.clone()])).apply(new()).unwrap();
        let NetworkConfig::User(user) = &with.network else { panic!("{:?}", with.network) };
        assert_eq!(user.forwards.len(), 2, "{user:?}");
        let stays = patch(|patch| {
            patch.network = Some(NetworkConfig::default());
            patch.restrict = Some(true);
        });
        let NetworkConfig::User(now) = stays.apply(with.clone()).unwrap().network else { panic!() };
        assert_eq!(now, UserNetwork { restrict: true, ..user.clone() });
        let conflicts = patch(|patch| {
            patch.network = Some(NetworkConfig::None);
            patch.forwards = Some(vec![forward]);
            patch.restrict = Some(true);
        })
        .conflicts(&with);
        let fields: Vec<_> = conflicts.iter().map(|conflict| (conflict.field, conflict.other)).collect();
        assert_eq!(fields, [("forward", "network"), ("restrict", "network")]);
    }

    #[test]
    fn a_size_needs_a_root_disk_or_a_disc_that_installs_to_one() {
        let size = Mib::new(2048).unwrap();
        let text = refusal(new(), |patch| patch.disk = Some(size));
        assert!(text.starts_with("disk: \"2GiB\": this VM has no root disk"), "{text}");
        let text = refusal(new().cdrom("/disc".into()), |patch| {
            patch.disk = Some(size);
            patch.cdrom = Some(CdromPatch::Remove);
        });
        assert!(text.starts_with("disk: "), "{text}");
        let empty = patch(|patch| {
            patch.disk = Some(size);
            patch.cdrom = Some(CdromPatch::Insert("/disc".into()));
        });
        assert_eq!(empty.apply(new()).unwrap().disk, Some(RootDisk::empty(size)));
        let base = new().disk(RootDisk { image: "/a".into(), size: None });
        let grown = patch(|patch| patch.disk = Some(size)).apply(base).unwrap();
        assert_eq!(grown.disk, Some(RootDisk { image: "/a".into(), size: Some(size) }));
    }
}
