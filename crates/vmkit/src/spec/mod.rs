//! The wanted state of a VM: [`VmSpec`] and its parts, one file each.
//!
//! Pure. A spec is always valid once built; facts of the host (does the image exist?) are checked
//! when it is planned.

mod beginning;
mod blueprint;
mod boot;
mod changes;
#[cfg(feature = "cloud-init")]
pub(crate) mod claims;
mod cloud_init;
mod disk;
mod labels;
mod name;
mod network;
mod options;
mod patch;
#[cfg(feature = "cloud-init")]
mod raw_parts;
mod size;
mod source;
pub(crate) mod yaml;
#[cfg(feature = "cloud-init")]
mod yaml_tree;

use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

pub use blueprint::{Blueprint, HostInputs};
pub use boot::{Accel, Arch, Boot, Firmware, Kernel, MachineType};
pub use changes::{SpecChange, TakesEffect, changes};
pub(crate) use cloud_init::check_user_data;
#[cfg(any(feature = "ssh", all(test, feature = "cloud-init")))]
pub(crate) use cloud_init::free_login;
pub use cloud_init::{CloudConfig, CloudInitConfig, GuestAccess, GuestFile, GuestUser, SshKeyPair, UserData};
#[cfg(feature = "vmfile")]
pub(crate) use cloud_init::{check_joinable, check_network_config};
pub use disk::{DataDisk, RootDisk};
pub use labels::Labels;
pub use name::{BridgeName, LinkName, SnapshotName, UserName, VmName};
pub use network::{NetworkConfig, PortForward, Protocol, UserNetwork};
pub use options::BackendOptions;
pub use patch::{CdromPatch, FieldConflict, SpecPatch};
pub use size::Mib;
pub use source::VmSource;

use crate::backend_tag::BackendTag;
use crate::error::{Error, Result, ValueProblem};

/// The wanted configuration of a VM. Created by [`VmSpec::builder`], and valid from then on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSpec(VmSpecBuilder);

/// Collects the configuration of a VM; [`build`](VmSpecBuilder::build) checks it as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct VmSpecBuilder {
    pub(crate) name: VmName,
    pub(crate) id: Option<Uuid>,
    pub(crate) backend: Option<BackendTag>,
    pub(crate) cpus: u32,
    pub(crate) memory: Mib,
    pub(crate) machine: MachineType,
    /// Always set in a [`VmSpec`].
    pub(crate) boot: Option<Boot>,
    pub(crate) accel: Accel,
    pub(crate) disk: Option<RootDisk>,
    pub(crate) data_disks: Vec<DataDisk>,
    pub(crate) cdrom: Option<PathBuf>,
    pub(crate) network: NetworkConfig,
    pub(crate) cloud_init: Option<CloudInitConfig>,
    pub(crate) vnc: Vnc,
    pub(crate) console_log: Mib,
    pub(crate) run_as: Option<UserName>,
    pub(crate) labels: Labels,
    pub(crate) backend_options: BackendOptions,
}

/// Where VNC is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Vnc {
    /// On a Unix socket in the VM's runtime directory.
    #[default]
    Unix,
    /// On a TCP port of loopback that QEMU chooses, with a password that is created at each start.
    Loopback,
    /// Not at all.
    Off,
}

impl VmSpec {
    /// The most CPUs a VM may have.
    pub const MAX_CPUS: u32 = 255;
    /// The most data disks a VM may have.
    pub const MAX_DATA_DISKS: usize = 16;
    /// The longest kernel command line in bytes (`COMMAND_LINE_SIZE` of Linux on x86).
    pub const MAX_CMDLINE_BYTES: usize = 2048;

    /// Starts a spec: 1 CPU, 512 MiB, `q35`, the machine's usual firmware, `accel = auto`, user
    /// network with SSH forwarded.
    pub fn builder(name: VmName) -> VmSpecBuilder {
        VmSpecBuilder {
            name,
            id: None,
            backend: None,
            cpus: 1,
            memory: Mib::new(512).expect("512 MiB is a size"),
            machine: MachineType::default(),
            boot: None,
            accel: Accel::default(),
            disk: None,
            data_disks: Vec::new(),
            cdrom: None,
            network: NetworkConfig::default(),
            cloud_init: None,
            vnc: Vnc::default(),
            console_log: Mib::new(4).expect("4 MiB is a size"),
            run_as: None,
            labels: Labels::default(),
            backend_options: BackendOptions::default(),
        }
    }

    /// Returns the name.
    pub fn name(&self) -> &VmName {
        &self.0.name
    }

    /// Returns the identity, if it has one already; `prepare` assigns one otherwise.
    pub fn id(&self) -> Option<Uuid> {
        self.0.id
    }

    /// Returns the same spec with this identity.
    #[must_use]
    pub fn with_id(mut self, id: Uuid) -> Self {
        self.0.id = Some(id);
        self
    }

    /// Returns the backend that runs it, if one was chosen.
    pub fn backend(&self) -> Option<&BackendTag> {
        self.0.backend.as_ref()
    }

    /// Returns the number of virtual CPUs.
    pub fn cpus(&self) -> u32 {
        self.0.cpus
    }

    /// Returns the guest's memory.
    pub fn memory(&self) -> Mib {
        self.0.memory
    }

    /// Returns the machine type.
    pub fn machine(&self) -> MachineType {
        self.0.machine
    }

    /// Returns what the guest boots.
    pub fn boot(&self) -> &Boot {
        self.0.boot.as_ref().expect("`build` has set it")
    }

    /// Returns how the guest's code is executed.
    pub fn accel(&self) -> Accel {
        self.0.accel
    }

    /// Returns the root disk, if there is one.
    pub fn disk(&self) -> Option<&RootDisk> {
        self.0.disk.as_ref()
    }

    /// Returns the data disks.
    pub fn data_disks(&self) -> &[DataDisk] {
        &self.0.data_disks
    }

    /// Returns the disc image in the CD-ROM drive, if the VM has one.
    pub fn cdrom(&self) -> Option<&Path> {
        self.0.cdrom.as_deref()
    }

    /// Returns the network.
    pub fn network(&self) -> &NetworkConfig {
        &self.0.network
    }

    /// Returns the configuration of cloud-init, if there is one.
    pub fn cloud_init(&self) -> Option<&CloudInitConfig> {
        self.0.cloud_init.as_ref()
    }

    /// Returns the same spec, with cloud-init to run again at the next start; without cloud-init,
    /// the spec is unchanged.
    #[must_use]
    pub fn with_cloud_init_again(mut self) -> Self {
        if let Some(config) = &mut self.0.cloud_init {
            config.run = config.run.wrapping_add(1);
        }
        self
    }

    /// Returns the same spec under another name.
    pub(crate) fn with_name(mut self, name: VmName) -> Self {
        self.0.name = name;
        self
    }

    /// Returns the same spec with this forward; unchanged if it has it already.
    ///
    /// # Errors
    /// `InvalidInput` if the network is not the user one, or another forward has the same port of
    /// the host.
    pub fn with_forward(mut self, forward: PortForward) -> Result<Self> {
        let NetworkConfig::User(user) = &mut self.0.network else {
            return Err(Error::invalid("forward", forward, "only user networking forwards ports"));
        };
        if !user.forwards.contains(&forward) {
            user.forwards.push(forward);
        }
        self.0.build()
    }

    /// Returns the same spec without this forward.
    #[must_use]
    pub fn without_forward(mut self, forward: &PortForward) -> Self {
        if let NetworkConfig::User(user) = &mut self.0.network {
            user.forwards.retain(|other| other != forward);
        }
        self
    }

    /// Returns the same spec for the VM of another one: with its name, its identity and its number
    /// of cloud-init runs.
    pub(crate) fn in_place_of(mut self, recorded: &VmSpec) -> Self {
        self.0.name = recorded.0.name.clone();
        self.0.id = recorded.0.id;
        if let (Some(config), Some(recorded)) = (&mut self.0.cloud_init, &recorded.0.cloud_init) {
            config.run = recorded.run;
        }
        self
    }

    /// Returns the same spec with these labels.
    pub(crate) fn with_labels(mut self, labels: Labels) -> Self {
        self.0.labels = labels;
        self
    }

    /// Returns the same spec for a new VM that is a copy: with another name and identity, free
    /// ports of the host instead of fixed ones, and no labels of vmkit's.
    pub(crate) fn for_clone(mut self, name: VmName, id: Uuid) -> Self {
        self.0.name = name;
        self.0.id = Some(id);
        self.0.labels = std::mem::take(&mut self.0.labels).for_clone();
        if let NetworkConfig::User(user) = &mut self.0.network {
            user.forwards.iter_mut().for_each(|forward| forward.host_port = None);
        }
        if let Some(config) = &mut self.0.cloud_init {
            config.hostname = None;
        }
        self
    }

    /// Returns the same spec with another login of vmkit's; that of before is not accepted any
    /// more. Without a login, the spec is unchanged.
    #[cfg(feature = "ssh")]
    pub(crate) fn with_new_access(mut self) -> Result<Self> {
        if let Some(config) = &mut self.0.cloud_init
            && let Some(former) = config.access.take()
        {
            config.access = Some(GuestAccess::of_user(former.user, config)?);
            config.revoked_keys.push(former.login_key.public);
        }
        Ok(self)
    }

    /// Returns where VNC is served.
    pub fn vnc(&self) -> Vnc {
        self.0.vnc
    }

    /// Returns the largest size of the serial console's log.
    pub fn console_log(&self) -> Mib {
        self.0.console_log
    }

    /// Returns the host's user that the hypervisor runs as, if vmkit is root.
    pub fn run_as(&self) -> Option<&UserName> {
        self.0.run_as.as_ref()
    }

    /// Returns the user's labels.
    pub fn labels(&self) -> &Labels {
        &self.0.labels
    }

    /// Returns the same spec with one more label.
    ///
    /// # Errors
    /// Those of [`Labels::set`].
    pub fn with_label(mut self, key: &str, value: &str) -> Result<Self> {
        self.0.labels.set(key, value)?;
        Ok(self)
    }

    /// Returns the name of the image that its root disk was created from, as the creator gave it,
    /// such as `debian:12`, if it was recorded.
    ///
    /// `launch`, files of machines and the command record it. [`disk`](Self::disk) has the image's
    /// path.
    pub fn image_name(&self) -> Option<&str> {
        self.0.labels.get(Labels::IMAGE)
    }

    /// Returns the same spec with the name of the root disk's image recorded; a name that is no
    /// valid label is left out.
    #[must_use]
    pub fn with_image_name(mut self, name: &str) -> Self {
        let mut labels = self.0.labels.clone();
        if labels.set(Labels::IMAGE, name).is_ok() {
            self.0.labels = labels;
        }
        self
    }

    /// Returns the same spec with its root disk over an image at another place; one without a base
    /// image is not changed.
    #[cfg(feature = "images")]
    pub(crate) fn with_base_image(mut self, image: &Path) -> Self {
        if let Some(disk) = self.0.disk.as_mut().filter(|disk| disk.base().is_some()) {
            image.clone_into(&mut disk.image);
        }
        self
    }

    /// Returns the files of the host that the VM uses, but for its base image.
    #[cfg(feature = "images")]
    pub(crate) fn host_files(&self) -> Vec<PathBuf> {
        let base = self.disk().map(|disk| disk.image.clone());
        let mut files = Vec::new();
        let mut spec = self.clone();
        spec.for_each_path(&mut |path| files.push(path.clone()));
        if base.is_some() {
            files.remove(0);
        }
        files
    }

    /// Returns the options of its backend.
    pub fn backend_options(&self) -> &BackendOptions {
        &self.0.backend_options
    }

    /// Calls `visit` with each path of the host that the VM uses.
    pub(crate) fn for_each_path(&mut self, visit: &mut dyn FnMut(&mut PathBuf)) {
        if let Some(disk) = &mut self.0.disk {
            visit(&mut disk.image);
        }
        for disk in &mut self.0.data_disks {
            if let DataDisk::Existing { path, .. } = disk {
                visit(path);
            }
        }
        self.0.cdrom.iter_mut().for_each(&mut *visit);
        if let Some(Boot::Kernel(kernel)) = &mut self.0.boot {
            visit(&mut kernel.path);
            kernel.initrd.iter_mut().for_each(visit);
        }
    }
}

/// Implements one setter for each field, which takes the field's type.
macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty),* $(,)?) => {$(
        $(#[$doc])*
        pub fn $name(mut self, $name: $type) -> Self {
            self.$name = $name.into();
            self
        }
    )*};
}

impl VmSpecBuilder {
    setters! {
        /// Sets the name.
        name: VmName,
        /// Sets the identity, so that the caller of `prepare` can find the VM again.
        id: Uuid,
        /// Sets the backend that runs it.
        backend: BackendTag,
        /// Sets the number of virtual CPUs, 1 to 255.
        cpus: u32,
        /// Sets the guest's memory.
        memory: Mib,
        /// Sets the machine type.
        machine: MachineType,
        /// Sets what the guest boots. The default is the machine's usual firmware.
        boot: Boot,
        /// Sets how the guest's code is executed.
        accel: Accel,
        /// Sets the root disk.
        disk: RootDisk,
        /// Sets the data disks.
        data_disks: Vec<DataDisk>,
        /// Sets the disc image in a CD-ROM drive: read-only, and booted if no disk before it is
        /// bootable.
        cdrom: PathBuf,
        /// Sets the network.
        network: NetworkConfig,
        /// Sets the configuration of cloud-init.
        cloud_init: CloudInitConfig,
        /// Sets where VNC is served.
        vnc: Vnc,
        /// Sets the size of the serial console's log.
        console_log: Mib,
        /// Sets the host's user that the hypervisor runs as.
        run_as: UserName,
        /// Sets the user's labels.
        labels: Labels,
        /// Sets the options of its backend.
        backend_options: BackendOptions,
    }

    /// Removes the CD-ROM drive.
    pub fn without_cdrom(mut self) -> Self {
        self.cdrom = None;
        self
    }

    /// Checks the configuration and returns the spec.
    ///
    /// # Errors
    /// `InvalidInput` with the field, the value and the expected one.
    pub fn build(self) -> Result<VmSpec> {
        let spec = self.build_recorded()?;
        spec.0.check_disks()?;
        spec.cloud_init().map_or(Ok(()), CloudInitConfig::check_documents)?;
        Ok(spec)
    }

    /// Checks the configuration except for the contents of raw documents of cloud-init, and for
    /// disks that are listed twice: a VM created with them exists, and its start reports the error.
    pub(crate) fn build_recorded(mut self) -> Result<VmSpec> {
        if !(1..=VmSpec::MAX_CPUS).contains(&self.cpus) {
            let bound = format!("a VM has 1 to {} CPUs", VmSpec::MAX_CPUS);
            return Err(Error::invalid("cpus", self.cpus, bound));
        }
        if self.data_disks.len() > VmSpec::MAX_DATA_DISKS {
            let bound = format!("a VM has at most {} data disks", VmSpec::MAX_DATA_DISKS);
            return Err(Error::invalid("data_disks", self.data_disks.len(), bound));
        }
        let usual = Boot::Firmware(self.machine.usual_firmware());
        let boot = self.boot.get_or_insert(usual).clone();
        self.check_boot(&boot)?;
        self.check_cdrom()?;
        self.check_forwards()?;
        self.cloud_init.as_ref().map_or(Ok(()), CloudInitConfig::check_fields)?;
        Ok(VmSpec(self))
    }

    fn check_boot(&self, boot: &Boot) -> Result<()> {
        match (boot, self.machine) {
            (Boot::Kernel(kernel), _) if kernel.cmdline.len() > VmSpec::MAX_CMDLINE_BYTES => {
                let (most, found) = (VmSpec::MAX_CMDLINE_BYTES, kernel.cmdline.len());
                let bound = format!("a kernel's command line has at most {most} bytes, this has {found}");
                let shown: String = kernel.cmdline.chars().take(40).collect();
                Err(Error::invalid("cmdline", format!("{shown}…"), bound))
            }
            (Boot::Kernel(_), _) => Ok(()),
            (Boot::Firmware(_), MachineType::Microvm) => Err(Error::invalid(
                "machine",
                "microvm",
                "this machine type boots a kernel directly: pass a kernel, or use q35",
            )),
            (Boot::Firmware(Firmware::Bios), MachineType::Virt) => Err(Error::invalid(
                "firmware",
                "bios",
                "the virt machine type has none: use uefi, or pass a kernel",
            )),
            (Boot::Firmware(_), _) if self.has_nothing_to_boot() => {
                let error = Error::invalid("image", "", "nothing to boot from: pass an image, or a kernel");
                Err(error.with_problem(ValueProblem::NothingToBoot))
            }
            (Boot::Firmware(_), _) => Ok(()),
        }
    }

    /// Refuses a path that is used by two disks, of which one is written to. Links and other
    /// spellings are checked on the host.
    fn check_disks(&self) -> Result<()> {
        let existing = |disk: &DataDisk| match disk {
            DataDisk::Existing { path, readonly } => Some((path.clone(), *readonly)),
            DataDisk::Fresh { .. } => None,
        };
        let disks: Vec<_> = self.data_disks.iter().filter_map(existing).collect();
        for (index, (path, readonly)) in disks.iter().enumerate() {
            if self.disk.as_ref().is_some_and(|disk| disk.image == *path && !readonly) {
                let why = "this is the image of the same VM, which is never written to: use another disk, or add `:ro` to make it read-only";
                return Err(Error::invalid("data_disks", path.display(), why));
            }
            if self.cdrom.as_ref() == Some(path) && !readonly {
                let why = "the same VM has this file in its CD-ROM drive, and would write to it: add `:ro`, or use another disk";
                return Err(Error::invalid("data_disks", path.display(), why));
            }
            let is_same =
                |(other, other_readonly): &&(_, bool)| other == path && !(*readonly && *other_readonly);
            if disks[..index].iter().any(|other| is_same(&other)) {
                let why =
                    "the same VM has this disk already, and one of the two writes to it: add each disk once";
                return Err(Error::invalid("data_disks", path.display(), why));
            }
        }
        Ok(())
    }

    fn has_nothing_to_boot(&self) -> bool {
        // An empty disk has a system after the installation, and then needs no disc any more.
        self.disk.is_none() && self.data_disks.is_empty() && self.cdrom.is_none()
    }

    fn check_cdrom(&self) -> Result<()> {
        if let Some(disk) = self.disk.as_ref().filter(|disk| disk.base().is_none() && disk.size.is_none()) {
            return Err(Error::invalid(
                "disk",
                disk.image.display(),
                "an empty disk needs a size, such as 20GiB",
            ));
        }
        match (&self.cdrom, self.machine) {
            (Some(path), MachineType::Microvm) => {
                let why = "the microvm machine type has no CD-ROM drive: use q35, or add the file to data_disks with `:ro`";
                Err(Error::invalid("cdrom", path.display(), why))
            }
            _ => Ok(()),
        }
    }

    fn check_forwards(&self) -> Result<()> {
        let NetworkConfig::User(user) = &self.network else {
            return Ok(());
        };
        let named = |f: &PortForward| f.host_port.map(|port| (f.protocol, f.host_addr, port));
        for (index, forward) in user.forwards.iter().enumerate() {
            let taken = |other: &PortForward| {
                other == forward || (named(other).is_some() && named(other) == named(forward))
            };
            if let Some(other) = user.forwards[..index].iter().find(|other| taken(other)) {
                let why = match other == forward {
                    true => "this forward is named twice".to_owned(),
                    false => format!("the forward `{other}` has the same port of the host"),
                };
                return Err(Error::invalid("forward", forward, why));
            }
        }
        Ok(())
    }
}

impl From<VmSpec> for VmSpecBuilder {
    fn from(spec: VmSpec) -> Self {
        spec.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn builder() -> VmSpecBuilder {
        VmSpec::builder(VmName::new("web").unwrap())
            .disk(RootDisk { image: "/images/debian.qcow2".into(), size: None })
    }

    fn refusal(builder: VmSpecBuilder) -> String {
        builder.build().unwrap_err().to_string()
    }

    #[test]
    fn cpus_out_of_range_are_refused() {
        assert_eq!(refusal(builder().cpus(0)), "cpus: \"0\": a VM has 1 to 255 CPUs");
        assert_eq!(refusal(builder().cpus(10_000)), "cpus: \"10000\": a VM has 1 to 255 CPUs");
    }

    #[test]
    fn a_vm_without_image_and_kernel_is_refused() {
        let bare = VmSpec::builder(VmName::new("web").unwrap());
        assert!(refusal(bare).contains("pass an image, or a kernel"));
    }

    #[test]
    fn one_host_port_twice_is_refused() {
        let refused = |forwards: [&str; 2]| {
            let forwards = forwards.map(|text| text.parse().unwrap());
            refusal(builder().network(NetworkConfig::User(UserNetwork::with_ssh(forwards.into()))))
        };
        assert!(
            refused(["8080:80", "8080:81"]).contains("the forward `8080:80` has the same port of the host")
        );
        assert!(refused(["80", "80"]).contains("named twice"));
    }

    #[test]
    fn one_path_is_two_disks_only_where_nothing_writes_to_it() {
        let disks = |disks: &[(&str, bool)]| {
            let disk = |(path, readonly): &(&str, bool)| DataDisk::Existing {
                path: (*path).into(),
                readonly: *readonly,
            };
            builder().data_disks(disks.iter().map(disk).collect())
        };
        for named in [[("/d", false), ("/d", false)], [("/d", true), ("/./d", false)]] {
            let text = refusal(disks(&named));
            assert!(text.starts_with("data_disks: \"") && text.contains("has this disk already"), "{text}");
        }
        let text = refusal(disks(&[("/images//debian.qcow2", false)]));
        assert!(text.contains("the image of the same VM"), "{text}");
        disks(&[("/d", true), ("/d", true), ("/images/debian.qcow2", true), ("/e", false)]).build().unwrap();
        // An existing VM with them must not be lost.
        disks(&[("/d", false), ("/d", false)]).build_recorded().unwrap();
    }
}
