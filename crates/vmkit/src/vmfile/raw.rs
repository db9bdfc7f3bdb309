//! What can be written in a `vmkit.toml`, table by table. The docs here are those of the JSON
//! Schema.
//!
//! Pure.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

use super::forms::{
    CommandForm, FileMode, FormatVersion, GuestPath, HostPath, ImageForm, LineText, ShellText, TimeLimit,
};
use super::problem::VmfileProblem;
use super::project::RunPolicy;
use super::read::{BoundedInt, FromValue, TableReader, ValueNode, described, table};
use crate::handle::BackendTag;
use crate::spec::{
    Accel, DataDisk, Firmware, MachineType, Mib, NetworkConfig, PortForward, UserName, VmSpec, Vnc,
};

/// How many CPUs a machine has.
pub(super) type CpuCount = BoundedInt<1, { VmSpec::MAX_CPUS }>;
/// A TCP port.
pub(super) type TcpPort = BoundedInt<1, 65535>;

table! {
    /// Machines for vmkit to make and to run: `vmkit up` in this file's folder.
    struct RawFile = "the file" {
        /// The version of this format: 1.
        version: FormatVersion = required,
        /// What the machines are, together.
        project: RawProject,
        /// What a machine is where it does not say otherwise. Tables are joined key by key; all
        /// else is replaced.
        defaults: RawMachine,
        /// The machines, each by its name: [machine.web].
        machine: BTreeMap<String, RawMachine>,
    }
}

table! {
    /// What the machines are, together.
    struct RawProject = "a table" {
        /// The project's name: a-z, 0-9 and -. The VM of a machine is called PROJECT-MACHINE.
        /// Default: the folder's name.
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
        /// an empty one. Default: the image's.
        disk: Mib,
        /// Further disks: a size for a new one, or the path of an image, with :ro behind it to be
        /// read only.
        data_disks: Vec<DataDisk>,
        /// The image of a disc for a CD-ROM drive, as an installer's .iso is. Only read; booted
        /// where the disks have nothing to boot.
        cdrom: HostPath,
        /// How the guest is connected: user, tap:BRIDGE, vnic:LINK or none. Default: user.
        network: NetworkConfig,
        /// Whether the guest is kept from everything but its forwards; with the network user.
        /// Default: false.
        restrict: bool,
        /// Ports of the host that lead into the guest, as [[ADDR:]HOST:]GUEST[/udp]; with the
        /// network user. Port 22 of the guest is always forwarded.
        forwards: Vec<PortForward>,
        /// The machine that the guest sees; virt is the one for aarch64. Default: q35.
        machine: MachineType,
        /// The firmware. Default: what the image needs, else bios, on virt uefi.
        firmware: Firmware,
        /// A kernel to boot directly.
        kernel: HostPath,
        /// The initial ramdisk of that kernel.
        initrd: HostPath,
        /// The command line of that kernel.
        cmdline: String,
        /// What runs the guest's code; auto is KVM where it really works, else TCG. Default: auto.
        accel: Accel,
        /// Where the screen is shown: on a Unix socket, on a port of loopback with a password, or
        /// nowhere. Default: unix.
        vnc: Vnc,
        /// How much of the serial console's output is kept. Default: 4 MiB.
        console_log: Mib,
        /// The backend that runs the machine. Default: the host's own.
        backend: BackendTag,
        /// Options that only the backend knows.
        backend_options: BTreeMap<String, String>,
        /// The host's user that the hypervisor runs as; only root can ask for that.
        run_as: UserName,
        /// What cloud-init in the guest is told at its first boot.
        cloud_init: RawCloudInit,
        /// Files and folders of the host to copy into the guest, before the provision steps, again
        /// whenever they change.
        files: Vec<RawCopy>,
        /// What is done in the guest once it can be entered, in order.
        provision: Vec<RawStep>,
        /// The machines that have to be ready and provisioned before this one is started.
        depends_on: Vec<String>,
        /// When the machine counts as ready.
        ready: RawReady,
        /// Labels for your own use: keys of a-z, 0-9, ., _ and -.
        labels: BTreeMap<String, String>,
    }
}

table! {
    /// What cloud-init is told: typed, or as a document of your own.
    struct RawCloudInit = "cloud_init" {
        /// The guest's host name. Default: the machine's name.
        hostname: String,
        /// Users to make; the image's own user stays.
        users: Vec<RawUser>,
        /// Packages to install.
        packages: Vec<String>,
        /// Files to write.
        files: Vec<RawGuestFile>,
        /// Commands of the first boot: a text for the shell, or a list of a program and its
        /// arguments.
        commands: Vec<CommandForm>,
        /// User-data of your own, as it is; instead of the keys above, but for hostname.
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
        /// Public keys that may log in, a line each.
        ssh_keys: Vec<String>,
        /// Whether the user may become root without a password. Default: false.
        sudo: bool,
        /// The login shell. Default: the one that the guest gives a new user.
        shell: GuestPath,
    }
}

table! {
    /// A file that cloud-init writes.
    struct RawGuestFile = "a file of cloud_init" {
        /// Where, in the guest.
        path: GuestPath = required,
        /// What is in it.
        content: String = required,
        /// Its permission bits. Default: 0644.
        mode: FileMode,
        /// Whose it is: USER or USER:GROUP. Default: root.
        owner: String,
    }
}

table! {
    /// A copy of a file or a folder of the host.
    struct RawCopy = "a copy" {
        /// The file or folder of the host, relative to this file.
        from: HostPath = required,
        /// Where it is put in the guest. A folder becomes this folder.
        to: GuestPath = required,
        /// The permission bits of its files. Default: as on the host.
        mode: FileMode,
        /// Whose it is: USER or USER:GROUP. Default: root.
        owner: LineText,
    }
}

table! {
    /// A provision step: it has one of shell, script and copy.
    struct RawStep = "a step" {
        /// Its name, which no other step of the machine has.
        name: LineText = required,
        /// A text for /bin/sh -e in the guest.
        shell: ShellText,
        /// A file of the host that is run in the guest: by what its #! names, else by /bin/sh -e.
        script: HostPath,
        /// A file or folder of the host to copy.
        copy: RawCopy,
        /// When it is run: once; always, at every `up`; or when changed since. Default: once; for a
        /// copy, changed.
        run: RunPolicy,
        /// The guest's user that it runs as. Default: root.
        user: UserName,
        /// Its environment.
        env: BTreeMap<String, String>,
        /// The folder of the guest that it runs in. Default: the user's home.
        dir: GuestPath,
        /// How long it may take. Default: 10 minutes.
        timeout: TimeLimit,
    }
}

table! {
    /// When a machine counts as ready: once all of this is true.
    struct RawReady = "ready" {
        /// Its SSH server lets vmkit in. Default: true for a machine with an image and a network.
        ssh: bool,
        /// cloud-init has finished without an error. Default: as ssh.
        cloud_init: bool,
        /// These TCP ports of the guest answer.
        tcp: Vec<TcpPort>,
        /// This command succeeds in the guest: a text for /bin/sh, run as root until it does.
        command: ShellText,
        /// How long all of it may take. Default: 10 minutes.
        timeout: TimeLimit,
    }
}
