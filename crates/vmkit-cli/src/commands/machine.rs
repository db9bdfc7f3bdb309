//! The options of `create`, `launch` and `set` that describe a VM.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use vmkit::spec::{
    Accel, BackendOptions, CdromPatch, CloudConfig, CloudInitConfig, DataDisk, Firmware, GuestAccess,
    GuestUser, MachineType, Mib, NetworkConfig, PortForward, SpecPatch, UserData, UserName, VmName, VmSpec,
    VmSpecBuilder, Vnc,
};

use vmkit::image::ImageRef;
use vmkit::{BackendTag, Error};

use crate::places::{absolute, input};
use crate::values::value;
use crate::{images, public_keys};

/// The fields of a spec that `create`, `launch` and `set` share.
#[derive(Debug, Default, PartialEq, Args)]
pub(crate) struct SpecFields {
    /// Set the number of virtual CPUs, 1 to 255 [a new VM: 1].
    #[arg(long, value_name = "N", value_parser = cpus, allow_negative_numbers = true)]
    cpus: Option<u32>,
    /// Set the guest's memory [a new VM: 512MiB].
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| value::<Mib>("memory", text))]
    memory: Option<Mib>,
    /// Set the size of the root disk, at least the image's; a disk can only grow [a new VM: the
    /// image's]. Without an image and with --cdrom, a new VM gets an empty disk of this size.
    #[arg(long, value_name = "SIZE", value_parser = |text: &str| value::<Mib>("disk", text))]
    disk: Option<Mib>,
    /// Insert this disc image, such as an installer's .iso, into a CD-ROM drive: read-only, and
    /// booted if no disk is bootable.
    #[arg(long, value_name = "FILE")]
    cdrom: Option<PathBuf>,
    /// Boot this kernel directly.
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Set the initial ramdisk of the kernel.
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// Set the command line of the kernel.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Set the machine type; virt is for aarch64 guests [a new VM: q35].
    #[arg(long, value_enum)]
    machine: Option<MachineName>,
    /// Set the firmware to boot with [a new VM: bios, on virt uefi].
    #[arg(long, value_enum, conflicts_with_all = ["kernel", "initrd", "cmdline"])]
    firmware: Option<FirmwareName>,
    /// Set how the guest's code is executed; auto is KVM if it works, else TCG [a new VM: auto].
    #[arg(long, value_enum)]
    accel: Option<AccelName>,
    /// Serve VNC on a Unix socket, on a port of loopback with a password, or not at all [a new VM:
    /// unix].
    #[arg(long, value_enum)]
    vnc: Option<VncName>,
    /// Run the hypervisor as this user of the host; only root can do that.
    #[arg(long, value_name = "USER")]
    run_as: Option<UserName>,
}

impl SpecFields {
    /// Returns the options as a patch, with paths relative to the current directory.
    pub(super) fn patch(&self) -> Result<SpecPatch, Error> {
        let path =
            |field, path: &Option<PathBuf>| path.as_ref().map(|path| absolute(field, path)).transpose();
        let mut patch = SpecPatch::default();
        patch.cpus = self.cpus;
        patch.memory = self.memory;
        patch.disk = self.disk;
        patch.cdrom = path("cdrom", &self.cdrom)?.map(CdromPatch::Insert);
        patch.kernel = path("kernel", &self.kernel)?;
        patch.initrd = path("initrd", &self.initrd)?;
        patch.cmdline.clone_from(&self.cmdline);
        patch.machine = self.machine.map(Into::into);
        patch.firmware = self.firmware.map(Into::into);
        patch.accel = self.accel.map(Into::into);
        patch.vnc = self.vnc.map(Into::into);
        patch.run_as.clone_from(&self.run_as);
        Ok(patch)
    }
}

/// The options of `create` and `launch`, besides the VM's name and its image.
#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    #[command(flatten)]
    fields: SpecFields,
    /// Add a disk: a new one of this size, or an existing image. May be repeated.
    ///
    /// A value that starts with a digit and has no slash is a size. With :ro the disk is read-only.
    #[arg(long = "data-disk", value_name = "SIZE|PATH[:ro]", value_parser = data_disk)]
    data_disks: Vec<DataDisk>,
    /// Set the hypervisor: qemu or propolis [default: qemu, on illumos propolis].
    #[arg(long, value_name = "NAME")]
    backend: Option<BackendTag>,
    /// Set an option of the VM's backend. May be repeated.
    #[arg(long = "backend-option", value_name = "KEY=VALUE", value_parser = backend_option)]
    backend_options: Vec<(String, String)>,
    // Last, since options after a heading are listed below it.
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    guest: CloudInitArgs,
}

/// How the guest is connected.
#[derive(Debug, Args)]
#[command(next_help_heading = "Network")]
struct NetworkArgs {
    /// Set how the guest is connected: user, tap:BRIDGE, vnic:LINK (illumos) or none.
    #[arg(long, value_name = "user|tap:BRIDGE|vnic:LINK|none", default_value = "user")]
    network: NetworkConfig,
    /// Forward a port of the host into the guest, with user networking. May be repeated.
    ///
    /// Without HOST the host's port is chosen at each start. ADDR defaults to 127.0.0.1. Port 22 of
    /// the guest is always forwarded.
    #[arg(long = "forward", value_name = "[[ADDR:]HOST:]GUEST[/udp]")]
    forwards: Vec<PortForward>,
    /// Restrict the guest to its forwards, with user networking.
    #[arg(long)]
    restrict: bool,
}

/// The configuration of cloud-init.
#[derive(Debug, Args)]
#[command(next_help_heading = "Cloud-init")]
struct CloudInitArgs {
    /// Pass this user-data to cloud-init in the guest, unchanged; - for standard input.
    #[arg(long, value_name = "FILE")]
    cloud_init: Option<PathBuf>,
    /// Let cloud-init create a user who can log in with the public keys in this file; - for
    /// standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "cloud_init")]
    ssh_key: Option<PathBuf>,
    /// Let cloud-init create this user, with sudo, and log in as this user [default: with --ssh-key
    /// vmkit].
    #[arg(long, value_name = "USER")]
    user: Option<UserName>,
    /// Set the guest's host name with cloud-init [default: the VM's name].
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
        let mut patch = self.fields.patch()?;
        patch.image = image
            .map(|image| Ok::<_, Error>(images::from_here(image.clone())?.root_disk(None).image))
            .transpose()?;
        patch.data_disks = Some(self.data_disks.clone());
        patch.network = Some(self.network.network.clone());
        patch.forwards = Some(self.network.forwards.clone());
        patch.restrict = Some(self.network.restrict);
        patch.backend.clone_from(&self.backend);
        patch.backend_options = Some(options);
        patch.cloud_init = self.guest.config()?;
        patch.apply(VmSpec::builder(name))
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
