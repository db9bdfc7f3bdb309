//! The command line of one VM, in one fixed order.
//!
//! Pure: the same spec on the same host gives the same line. `tests/golden` holds whole lines, and
//! the real QEMU accepts each.

use std::ffi::OsString;

use uuid::Uuid;

use super::devices::DeviceVersion;
use super::facts::{ImageMedia, QemuFacts, descriptor};
use super::layout::QemuLayout;
use super::switch::{
    Blockdev, Chardev, Cpu, DeviceSwitch, DirectKernel, EventChannel, MachineSwitch, Monitor, Netdev,
    PropertyList, QemuArgs, Rng, Sandbox, VncServer,
};
use crate::image::ImageFormat;
use crate::network::MacAddr;
use crate::spec::{Boot, DataDisk, Firmware, MachineType, NetworkConfig, VmSpec, Vnc};

/// The number of the descriptor set whose one member is the console's log.
const CONSOLE_LOG_SET: i32 = 1;

/// Returns QEMU's arguments, without the program. A saved guest continues in the machine that it
/// was saved in.
pub(super) fn argv(
    spec: &VmSpec,
    id: Uuid,
    layout: &QemuLayout,
    facts: &QemuFacts,
    media: &ImageMedia,
    devices: DeviceVersion,
    saved_in: Option<&str>,
) -> Vec<OsString> {
    let mut args = QemuArgs::default();
    identity(spec, id, facts, &mut args);
    machine(spec, layout, facts, saved_in, &mut args);
    channels(&mut args);
    disks(spec, layout, media, &mut args);
    network(spec, id, &mut args);
    screen(spec, layout, &mut args);
    later_devices(spec.machine(), devices, &mut args);
    if saved_in.is_some() {
        // From where, it learns when it has greeted. It does not run before `cont`, whether it ran
        // or was paused when it was saved.
        args.flag("-S");
        args.plain("-incoming", "defer");
    }
    args.into_vec()
}

/// Who it is, and what it may do on the host.
fn identity(spec: &VmSpec, id: Uuid, facts: &QemuFacts, args: &mut QemuArgs) {
    // Only what stands here: no devices of QEMU's own choice, no configuration of the host's.
    args.flag("-nodefaults");
    args.flag("-no-user-config");
    Sandbox { run_as: spec.run_as().is_some() }.add_to(args);
    if let Some(user) = spec.run_as() {
        // 9.1 renamed the switch, 10.1 took the old one away.
        if facts.version >= (9, 1) {
            args.props("-run-with", PropertyList::first("user", user.as_str()));
        } else {
            args.plain("-runas", user.as_str());
        }
    }
    args.props("-name", PropertyList::first("guest", spec.name().as_str()).with("debug-threads", "on"));
    args.plain("-uuid", id.to_string());
}

/// The board, the CPUs, the memory, and what boots.
fn machine(
    spec: &VmSpec,
    layout: &QemuLayout,
    facts: &QemuFacts,
    versioned: Option<&str>,
    args: &mut QemuArgs,
) {
    let machine = spec.machine();
    let firmware = match spec.boot() {
        Boot::Firmware(Firmware::Uefi) => facts.firmware.as_ref(),
        Boot::Firmware(Firmware::Bios) | Boot::Kernel(_) => None,
    };
    if let Some(firmware) = firmware {
        let code = Blockdev { node: "code", format: ImageFormat::Raw, path: &firmware.code, readonly: true };
        let vars = layout.efi_vars();
        let vars = Blockdev { node: "vars", format: ImageFormat::Raw, path: &vars, readonly: false };
        code.add_to(args);
        vars.add_to(args);
    }
    MachineSwitch { machine, versioned, flash: firmware.is_some() }.add_to(args);
    facts.accel.add_to(args);
    Cpu { machine, accel: facts.accel, cpus: spec.cpus(), memory: spec.memory() }.add_to(args);
    if let Boot::Kernel(kernel) = spec.boot() {
        DirectKernel(kernel).add_to(args);
    }
    args.props("-rtc", PropertyList::first("base", "utc"));
    // A guest that panicked stays as it is, to be looked at and told from one that powered off.
    args.props("-action", PropertyList::first("panic", "pause"));
    DeviceSwitch::Panic.add_to(machine, args);
    Rng.add_to(args);
    DeviceSwitch::Rng.add_to(machine, args);
    DeviceSwitch::SerialBus.add_to(machine, args);
}

/// The monitors, the console and the guest agent: sockets that were bound before QEMU began.
fn channels(args: &mut QemuArgs) {
    Chardev { id: "qmp", descriptor: descriptor::QMP, log_set: None }.add_to(args);
    Monitor { chardev: "qmp" }.add_to(args);
    Chardev { id: "monitor", descriptor: descriptor::MONITOR, log_set: None }.add_to(args);
    Monitor { chardev: "monitor" }.add_to(args);
    Chardev { id: "spare", descriptor: descriptor::SPARE, log_set: None }.add_to(args);
    Monitor { chardev: "spare" }.add_to(args);
    EventChannel { id: "events", descriptor: descriptor::EVENTS }.add_to(args);
    Monitor { chardev: "events" }.add_to(args);
    let log = PropertyList::first("fd", descriptor::CONSOLE_LOG.to_string())
        .with("set", CONSOLE_LOG_SET.to_string());
    args.props("-add-fd", log);
    Chardev { id: "console", descriptor: descriptor::CONSOLE, log_set: Some(CONSOLE_LOG_SET) }.add_to(args);
    args.plain("-serial", "chardev:console");
    Chardev { id: "agent", descriptor: descriptor::AGENT, log_set: None }.add_to(args);
    // The port's kind is the same on every machine.
    DeviceSwitch::AgentPort.add_to(MachineType::Q35, args);
}

fn disks(spec: &VmSpec, layout: &QemuLayout, media: &ImageMedia, args: &mut QemuArgs) {
    let machine = spec.machine();
    // A kernel that QEMU loads itself asks no firmware for an order.
    let boots = matches!(spec.boot(), Boot::Firmware(_));
    let mut order = (1..).map(|index| boots.then_some(index));
    let mut add = |node: &str, format, path: &std::path::Path, readonly| {
        Blockdev { node, format, path, readonly }.add_to(args);
        let bootindex = order.next().flatten();
        DeviceSwitch::Disk { node, bootindex }.add_to(machine, args);
    };
    if spec.disk().is_some() {
        add("root", ImageFormat::Qcow2, &layout.root_disk(), false);
    }
    for (index, disk) in spec.data_disks().iter().enumerate() {
        let node = format!("data{index}");
        match disk {
            DataDisk::Fresh { .. } => add(&node, ImageFormat::Qcow2, &layout.data_disk(index), false),
            DataDisk::Existing { path, readonly } => {
                let format = media.data_formats.get(index).copied().flatten().unwrap_or(ImageFormat::Raw);
                add(&node, format, path, *readonly);
            }
        }
    }
    let disc_order = spec.cdrom().and_then(|_| order.next().flatten());
    if let Some(disc) = spec.cdrom() {
        Blockdev { node: "cdrom", format: ImageFormat::Raw, path: disc, readonly: true }.add_to(args);
        if machine == MachineType::Virt {
            DeviceSwitch::ScsiBus.add_to(machine, args);
        }
        DeviceSwitch::Disc { node: "cdrom", bootindex: disc_order }.add_to(machine, args);
    }
    if spec.cloud_init().is_some() {
        let seed = layout.seed();
        Blockdev { node: "seed", format: ImageFormat::Raw, path: &seed, readonly: true }.add_to(args);
        DeviceSwitch::Disk { node: "seed", bootindex: order.next().flatten() }.add_to(machine, args);
    }
}

fn network(spec: &VmSpec, id: Uuid, args: &mut QemuArgs) {
    match spec.network() {
        NetworkConfig::User(user) => Netdev::User(user).add_to(args),
        NetworkConfig::Tap { .. } => Netdev::Tap { descriptor: descriptor::TAP }.add_to(args),
        // Refused before anything is planned.
        NetworkConfig::Vnic { .. } | NetworkConfig::None => return,
    }
    DeviceSwitch::Net { mac: MacAddr::of_vm(id) }.add_to(spec.machine(), args);
}

fn screen(spec: &VmSpec, layout: &QemuLayout, args: &mut QemuArgs) {
    args.plain("-display", "none");
    // microvm has no bus for a screen.
    if spec.machine() == MachineType::Microvm {
        return;
    }
    match spec.vnc() {
        Vnc::Off => return,
        Vnc::Unix => VncServer::Unix(&layout.vnc_socket()).add_to(args),
        Vnc::Loopback => VncServer::Loopback.add_to(args),
    }
    DeviceSwitch::Screen.add_to(spec.machine(), args);
}

/// The devices that later versions have, behind all of the first one: a PCI device gets the next
/// free slot, and the guest names its network by that.
fn later_devices(machine: MachineType, devices: DeviceVersion, args: &mut QemuArgs) {
    if devices.has_generation_id(machine) {
        DeviceSwitch::GenerationId.add_to(machine, args);
    }
    if devices.has_balloon() {
        DeviceSwitch::Balloon.add_to(machine, args);
    }
    for index in 0..devices.root_ports(machine) {
        DeviceSwitch::RootPort { index }.add_to(machine, args);
    }
}
