//! What a VM is made of, as it is typed for `create` and `launch`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use vmkit::spec::{
    Accel, BackendOptions, Boot, CloudConfig, CloudInitConfig, DataDisk, Firmware, GuestAccess, GuestUser,
    Kernel, MachineType, Mib, NetworkConfig, PortForward, RootDisk, UserData, UserName, UserNetwork, VmName,
    VmSpec, VmSpecBuilder, Vnc,
};

use vmkit::image::ImageRef;
use vmkit::{BackendTag, Error};

use crate::places::{absolute, input};
use crate::values::value;
use crate::{images, public_keys};

/// What a VM is made of, besides its name and its image.
#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    /// Set the number of virtual CPUs, 1 to 255.
    #[arg(long, value_name = "N", default_value = "1", value_parser = cpus, allow_negative_numbers = true)]
    cpus: u32,
    /// Set the guest's memory.
    #[arg(long, value_name = "SIZE", default_value = "512MiB", value_parser = |text: &str| value::<Mib>("memory", text))]
    memory: Mib,
    /// Set the size of the root disk, at least the image's [default: the image's]. Without an
    /// image and with --cdrom, makes an empty one.
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| value::<Mib>("disk", text))]
    disk: Option<Mib>,
    /// Add a disk: a new one of this size, or an image as it is. May be repeated.
    ///
    /// What begins with a digit and has no slash is a size. After :ro the guest may only read.
    #[arg(long = "data-disk", value_name = "SIZE|PATH[:ro]", value_parser = data_disk)]
    data_disks: Vec<DataDisk>,
    /// Put this image of a disc, such as an installer's .iso, into a CD-ROM drive: read-only, and
    /// booted where the disks have nothing to boot.
    #[arg(long, value_name = "FILE")]
    cdrom: Option<PathBuf>,
    /// Boot this kernel directly.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Give the kernel this initial ramdisk.
    #[arg(long, value_name = "PATH", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Give the kernel this command line.
    #[arg(long, value_name = "STRING", requires = "kernel", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Choose the machine type; virt is the one for aarch64 guests.
    #[arg(long, value_enum, default_value_t = MachineName::Q35)]
    machine: MachineName,
    /// Choose the firmware [default: bios, on virt uefi].
    #[arg(long, value_enum, conflicts_with = "kernel")]
    firmware: Option<FirmwareName>,
    /// Choose what runs the guest's code; auto is KVM where it really works, else TCG.
    #[arg(long, value_enum, default_value_t = AccelName::Auto)]
    accel: AccelName,
    /// Show the screen on a Unix socket, on a port of loopback with a password, or nowhere.
    #[arg(long, value_enum, default_value_t = VncName::Unix)]
    vnc: VncName,
    /// Run the hypervisor as this user of the host; only root can ask for that.
    #[arg(long, value_name = "USER")]
    run_as: Option<UserName>,
    /// Choose what runs the VM: qemu or propolis [default: qemu, on illumos propolis].
    #[arg(long, value_name = "NAME")]
    backend: Option<BackendTag>,
    /// Set an option that only the VM's backend understands. May be repeated.
    #[arg(long = "backend-option", value_name = "KEY=VALUE", value_parser = backend_option)]
    backend_options: Vec<(String, String)>,
    // Last, since what follows a heading stands below it.
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    guest: CloudInitArgs,
}

/// How the guest is connected.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    /// Connect the guest: user, tap:BRIDGE, vnic:LINK (illumos) or none.
    #[arg(long, value_name = "user|tap:BRIDGE|vnic:LINK|none", default_value = "user")]
    network: NetworkConfig,
    /// Forward a port of the host into the guest, with user networking. May be repeated.
    ///
    /// Without HOST the host's port is chosen at each start. ADDR is 127.0.0.1 unless given. Port
    /// 22 of the guest is always forwarded.
    #[arg(long = "forward", value_name = "[[ADDR:]HOST:]GUEST[/udp]")]
    forwards: Vec<PortForward>,
    /// Keep the guest from everything but its forwards, with user networking.
    #[arg(long)]
    restrict: bool,
}

/// What cloud-init in the guest is told.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cloud-init")]
struct CloudInitArgs {
    /// Hand this user-data to cloud-init in the guest, as it is; - for standard input.
    #[arg(long, value_name = "FILE")]
    cloud_init: Option<PathBuf>,
    /// Let cloud-init create a user that the public keys in this file may log in as; - for standard
    /// input.
    #[arg(long, value_name = "FILE", conflicts_with = "cloud_init")]
    ssh_key: Option<PathBuf>,
    /// Let cloud-init create this user, who may become root, and log in as this user [default:
    /// with --ssh-key vmkit].
    #[arg(long, value_name = "USER")]
    user: Option<UserName>,
    /// Set the guest's host name by cloud-init [default: the VM's name].
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
}

/// Mirrors an enumeration of the library, so that clap lists and completes its values.
macro_rules! names {
    ($name:ident => $of:ident: $($variant:ident),*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
        pub(crate) enum $name {
            $($variant),*
        }
        impl From<$name> for $of {
            fn from(name: $name) -> $of {
                match name {
                    $($name::$variant => $of::$variant),*
                }
            }
        }
    };
}

names!(MachineName => MachineType: Q35, Microvm, Virt);
names!(FirmwareName => Firmware: Bios, Uefi);
names!(AccelName => Accel: Auto, Kvm, Tcg);
names!(VncName => Vnc: Unix, Loopback, Off);

impl SpecArgs {
    /// Returns the spec of a VM with this name and a root disk over this image.
    pub(crate) fn spec(&self, name: VmName, image: Option<&ImageRef>) -> Result<VmSpecBuilder, Error> {
        let mut options = BackendOptions::default();
        for (key, value) in &self.backend_options {
            options.set(key, value)?;
        }
        let mut spec = VmSpec::builder(name)
            .cpus(self.cpus)
            .memory(self.memory)
            .machine(self.machine.into())
            .accel(self.accel.into())
            .data_disks(self.data_disks.clone())
            .network(self.network.config()?)
            .vnc(self.vnc.into())
            .backend_options(options);
        match (image, self.disk) {
            (Some(image), size) => spec = spec.disk(images::from_here(image.clone())?.root_disk(size)),
            (None, Some(size)) if self.cdrom.is_some() => spec = spec.disk(RootDisk::empty(size)),
            (None, Some(size)) => {
                let why = "a root disk is made of an image, by --image, or empty for what --cdrom installs; --data-disk adds another";
                return Err(Error::invalid("disk", size, why));
            }
            (None, None) => {}
        }
        if let Some(user) = &self.run_as {
            spec = spec.run_as(user.clone());
        }
        if let Some(backend) = &self.backend {
            spec = spec.backend(backend.clone());
        }
        if let Some(disc) = &self.cdrom {
            spec = spec.cdrom(absolute("cdrom", disc)?);
        }
        if let Some(boot) = self.boot()? {
            spec = spec.boot(boot);
        }
        Ok(match self.guest.config()? {
            Some(config) => spec.cloud_init(config),
            None => spec,
        })
    }

    /// Returns what to boot, if it is named.
    fn boot(&self) -> Result<Option<Boot>, Error> {
        let Some(kernel) = &self.kernel else {
            return Ok(self.firmware.map(|firmware| Boot::Firmware(firmware.into())));
        };
        Ok(Some(Boot::Kernel(Kernel {
            path: absolute("kernel", kernel)?,
            initrd: self.initrd.as_ref().map(|initrd| absolute("initrd", initrd)).transpose()?,
            cmdline: self.cmdline.clone().unwrap_or_default(),
        })))
    }
}

impl NetworkArgs {
    fn config(&self) -> Result<NetworkConfig, Error> {
        if let NetworkConfig::User(_) = self.network {
            let network = UserNetwork::with_ssh(self.forwards.clone());
            return Ok(NetworkConfig::User(UserNetwork { restrict: self.restrict, ..network }));
        }
        if let Some(forward) = self.forwards.first() {
            return Err(Error::invalid("forward", forward, "only user networking forwards ports"));
        }
        if self.restrict {
            return Err(Error::invalid("restrict", true, "only user networking can restrict the guest"));
        }
        Ok(self.network.clone())
    }
}

impl CloudInitArgs {
    fn config(&self) -> Result<Option<CloudInitConfig>, Error> {
        let mut config = match (&self.cloud_init, &self.ssh_key) {
            (Some(file), _) => vmkit::cloud_init::read_user_data(&input("cloud-init", file)?)?,
            (None, Some(file)) => CloudInitConfig {
                user_data: UserData::Typed(CloudConfig {
                    users: vec![GuestUser {
                        name: self.user.as_ref().map_or(GuestAccess::USER.to_owned(), ToString::to_string),
                        ssh_keys: public_keys::read(file)?,
                        sudo: true,
                        shell: None,
                    }],
                    ..CloudConfig::default()
                }),
                ..CloudInitConfig::default()
            },
            (None, None) if self.hostname.is_none() && self.user.is_none() => return Ok(None),
            (None, None) => CloudInitConfig::default(),
        };
        if let Some(user) = &self.user {
            config.access = Some(GuestAccess::of_user(user.as_str(), &config)?);
        }
        Ok(Some(CloudInitConfig { hostname: self.hostname.clone(), ..config }))
    }
}

pub(super) fn cpus(text: &str) -> Result<u32, Error> {
    text.parse().map_err(|_| {
        let value: String = text.chars().take(40).collect();
        Error::invalid("cpus", value, format!("a VM has 1 to {} CPUs", VmSpec::MAX_CPUS))
    })
}

fn backend_option(text: &str) -> Result<(String, String), Error> {
    let option = text.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
    option.ok_or_else(|| Error::invalid("backend-option", text, "write KEY=VALUE"))
}

fn data_disk(text: &str) -> Result<DataDisk, Error> {
    Ok(match value("data-disk", text)? {
        DataDisk::Existing { path, readonly } => {
            DataDisk::Existing { path: absolute("data-disk", &path)?, readonly }
        }
        disk => disk,
    })
}
