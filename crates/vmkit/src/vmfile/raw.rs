//! The keys of a `vmkit.toml`, table by table. The docs here are those of the JSON Schema.
//!
//! Pure.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use super::forms::{
    CommandForm, FileMode, FormatVersion, GuestPath, HostPath, ImageForm, LineText, ShellText, TimeLimit,
};
use super::project::RunPolicy;
use super::read::{BoundedInt, FromValue, TableReader, ValueNode, described, table};
use crate::error::VmfileProblem;
use crate::handle::BackendTag;
use crate::spec::{
    Accel, DataDisk, Firmware, MachineType, Mib, NetworkConfig, PortForward, UserName, VmSpec, Vnc,
};

/// The number of a machine's CPUs.
pub(super) type CpuCount = BoundedInt<1, { VmSpec::MAX_CPUS }>;
/// A TCP port.
pub(super) type TcpPort = BoundedInt<1, 65535>;

table! {
    /// Machines that vmkit creates and runs: `vmkit up` in this file's directory.
    struct RawFile = "the file" {
        /// The version of this format: 1.
        version: FormatVersion = required,
        /// Settings of all machines together.
        project: RawProject,
        /// The settings of every machine that does not set them itself. Tables are merged key by
        /// key; everything else is replaced.
        defaults: RawMachine,
        /// The machines, each by its name: [machine.web].
        machine: BTreeMap<String, RawMachine>,
    }
}

table! {
    /// Settings of all machines together.
    struct RawProject = "a table" {
        /// The project's name: a-z, 0-9 and -. The VM of a machine is called PROJECT-MACHINE.
        /// Default: the directory's name.
        name: String,
    }
}

table! {
    /// A machine.
    struct RawMachine = "a machine" {
        /// The image of the root disk: a name such as debian:12, a path, or an address. It is never
        /// written to.
        image: ImageForm,
        /// The number of virtual CPUs, 1 to 255. Default: 1.
        cpus: CpuCount,
        /// The guest's memory: "2GiB", "512MiB" or a number of MiB. Default: 512 MiB.
        memory: Mib,
        /// The size of the root disk, at least the image's; with a cdrom and without an image, of
        /// an empty disk. Default: the image's.
        disk: Mib,
        /// Data disks: a size for a new one, or the path of an image, with :ro after it for a
        /// read-only disk.
        data_disks: Vec<DataDisk>,
        /// A disc image for a CD-ROM drive, such as an installer's .iso. Read-only; booted if no
        /// disk is bootable.
        cdrom: HostPath,
        /// How the guest is connected: user, tap:BRIDGE, vnic:LINK or none. Default: user.
        network: NetworkConfig,
        /// Whether the guest is restricted to its forwards; with the network user. Default: false.
        restrict: bool,
        /// Ports of the host that are forwarded to the guest, as [[ADDR:]HOST:]GUEST[/udp]; with
        /// the network user. Port 22 of the guest is always forwarded.
        forwards: Vec<PortForward>,
        /// The machine type; virt is for aarch64 guests. Default: q35.
        machine: MachineType,
        /// The firmware. Default: what the image needs, else bios, on virt uefi.
        firmware: Firmware,
        /// A kernel to boot directly.
        kernel: HostPath,
        /// The initial ramdisk of that kernel.
        initrd: HostPath,
        /// The command line of that kernel.
        cmdline: String,
        /// How the guest's code is executed; auto is KVM if it works, else TCG. Default: auto.
        accel: Accel,
        /// Where VNC is served: on a Unix socket, on a port of loopback with a password, or not at
        /// all. Default: unix.
        vnc: Vnc,
        /// The size of the serial console's log. Default: 4 MiB.
        console_log: Mib,
        /// The backend that runs the machine. Default: the host's own.
        backend: BackendTag,
        /// Options of the backend.
        backend_options: BTreeMap<String, String>,
        /// The host's user that the hypervisor runs as; only root can set that.
        run_as: UserName,
        /// The configuration of cloud-init for the guest's first boot.
        cloud_init: RawCloudInit,
        /// Files and directories of the host to copy into the guest, before the provision steps,
        /// again whenever they change.
        files: Vec<RawCopy>,
        /// The steps that are run in the guest once a login works, in order.
        provision: Vec<RawStep>,
        /// The machines that have to be ready and provisioned before this one is started.
        depends_on: Vec<String>,
        /// When the machine is ready.
        ready: RawReady,
        /// Labels for your own use: keys of a-z, 0-9, ., _ and -.
        labels: BTreeMap<String, String>,
    }
}

table! {
    /// The configuration of cloud-init: by keys, or as a document of your own.
    struct RawCloudInit = "cloud_init" {
        /// The guest's host name. Default: the machine's name.
        hostname: String,
        /// Users to create; the image's own user stays.
        users: Vec<RawUser>,
        /// Packages to install.
        packages: Vec<String>,
        /// Files to write.
        files: Vec<RawGuestFile>,
        /// Commands of the first boot: a string for the shell, or a list of a program and its
        /// arguments.
        commands: Vec<CommandForm>,
        /// User-data of your own, unchanged; instead of the keys above, except hostname.
        user_data: String,
        /// A file with user-data of your own.
        user_data_file: HostPath,
        /// A network-config (version 1 or 2) of your own. Default: DHCP on the first device.
        network_config: String,
        /// A file with a network-config of your own.
        network_config_file: HostPath,
    }
}

table! {
    /// A user of the guest.
    struct RawUser = "a user" {
        /// The login name.
        name: UserName = required,
        /// Public keys for the login, a line each.
        ssh_keys: Vec<String>,
        /// Whether the user may become root without a password. Default: false.
        sudo: bool,
        /// The login shell. Default: the guest's default for a new user.
        shell: GuestPath,
    }
}

table! {
    /// A file that cloud-init writes.
    struct RawGuestFile = "a file of cloud_init" {
        /// The path in the guest.
        path: GuestPath = required,
        /// The content.
        content: String = required,
        /// The permission bits. Default: 0644.
        mode: FileMode,
        /// The owner: USER or USER:GROUP. Default: root.
        owner: String,
    }
}

table! {
    /// A copy of a file or a directory of the host.
    struct RawCopy = "a copy" {
        /// The file or directory of the host, relative to this file.
        from: HostPath = required,
        /// The path in the guest. A directory is merged into an existing one.
        to: GuestPath = required,
        /// The permission bits of its files. Default: as on the host.
        mode: FileMode,
        /// The owner: USER or USER:GROUP. Default: root.
        owner: LineText,
    }
}

table! {
    /// A provision step: it has one of shell, script and copy.
    struct RawStep = "a step" {
        /// The name, unique among the machine's steps.
        name: LineText = required,
        /// A script for /bin/sh -e in the guest.
        shell: ShellText,
        /// A file of the host that is run in the guest: by the interpreter of its #!, else by
        /// /bin/sh -e.
        script: HostPath,
        /// A file or directory of the host to copy.
        copy: RawCopy,
        /// When the step is run: once; always, at every `up`; or changed, after each change.
        /// Default: once; for a copy, changed.
        run: RunPolicy,
        /// The guest's user that runs it. Default: root.
        user: UserName,
        /// The environment variables.
        env: BTreeMap<String, String>,
        /// The working directory in the guest. Default: the user's home.
        dir: GuestPath,
        /// The timeout. Default: 10 minutes.
        timeout: TimeLimit,
    }
}

table! {
    /// When a machine is ready: once all of these conditions hold.
    struct RawReady = "ready" {
        /// A login over SSH works. Default: true for a machine with an image and a network.
        ssh: bool,
        /// cloud-init has finished without an error. Default: as ssh.
        cloud_init: bool,
        /// These TCP ports of the guest accept connections.
        tcp: Vec<TcpPort>,
        /// This command succeeds in the guest: a script for /bin/sh, run repeatedly as root until
        /// it does.
        command: ShellText,
        /// The timeout for all conditions. Default: 10 minutes.
        timeout: TimeLimit,
    }
}
