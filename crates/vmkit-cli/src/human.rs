//! How a VM looks to a person: lines, without a promise.

use vmkit::spec::{Boot, DataDisk, Firmware, NetworkConfig, Protocol, SpecChange, changes};
use vmkit::vmfile::MachineConfig;
use vmkit::{BackendTag, ConsoleEndpoint, VmHandle, VmState, VncAddress};

use crate::output::printable;

/// Returns the forwards that are in force, such as `127.0.0.1:40001->22`.
pub(crate) fn ports(vm: &VmHandle) -> Vec<String> {
    let forwards = vm.run.iter().flat_map(|run| &run.forwards);
    forwards
        .map(|forward| {
            let protocol = match forward.protocol {
                Protocol::Tcp => "",
                Protocol::Udp => "/udp",
            };
            format!("{}->{}{protocol}", forward.host, forward.guest_port)
        })
        .collect()
}

/// Returns the forwards that are in force, a line each; of a VM that does not live those that will
/// be.
pub(crate) fn forwards(vm: &VmHandle) -> String {
    match vm.state.is_live() {
        true => ports(vm).join("\n"),
        false => later_ports(vm).join("\n"),
    }
}

/// Returns the forwards that a VM gets when it starts, such as `8080:80, from its next start on`.
fn later_ports(vm: &VmHandle) -> Vec<String> {
    match vm.next_spec.as_deref().unwrap_or(&vm.spec).network() {
        NetworkConfig::User(user) => {
            user.forwards.iter().map(|forward| format!("{forward}, from its next start on")).collect()
        }
        _ => Vec::new(),
    }
}

/// Returns a VM's state and, where there are any, its ports.
pub(crate) fn with_ports(vm: &VmHandle) -> String {
    let ports = ports(vm);
    match ports.is_empty() {
        true => vm.state.to_string(),
        false => format!("{}, {}", vm.state, ports.join(" ")),
    }
}

/// Returns all that is known of a VM, a line each; of a saved one with the room that its memory
/// takes on disk.
pub(crate) fn details(vm: &VmHandle, saved_mib: Option<u64>) -> String {
    let spec = &vm.spec;
    let mut lines = LabelLines::default();
    lines.add("name", vm.name());
    lines.add("state", &vm.state);
    if let VmState::Failed { cause } = &vm.state {
        lines.add("cause", &cause.detail);
    }
    lines.add("id", vm.id);
    lines.add("backend", &vm.backend);
    lines.add("cpus", spec.cpus());
    lines.add("memory", spec.memory());
    if let Some(mib) = saved_mib {
        lines.add("saved memory", format_args!("{mib} MiB on disk"));
    }
    lines.add("machine", spec.machine().as_str());
    let accel = vm.run.as_ref().and_then(|run| run.accel);
    match accel.filter(|accel| *accel != spec.accel()) {
        // It has no choice, whatever its spec says.
        _ if vm.backend == BackendTag::Propolis => lines.add("accel", "bhyve"),
        Some(chosen) => {
            lines.add("accel", format_args!("{}, now {}", spec.accel().as_str(), chosen.as_str()))
        }
        None => lines.add("accel", spec.accel().as_str()),
    }
    match vm.backend {
        BackendTag::Propolis => lines.add("firmware", "uefi"),
        _ => boot(&mut lines, spec.boot()),
    }
    if let Some(image) = spec.image_name() {
        lines.add("image", image);
    }
    if let Some(disk) = spec.disk() {
        let size = disk.size.map_or(String::new(), |size| format!(", {size}"));
        let made_on = disk.base().map_or("empty".to_owned(), |image| image.display().to_string());
        lines.add("disk", format_args!("{made_on}{size}"));
    }
    for disk in spec.data_disks() {
        match disk {
            DataDisk::Fresh { size } => lines.add("data disk", size),
            DataDisk::Existing { path, readonly } => {
                let readonly = if *readonly { ", read-only" } else { "" };
                lines.add("data disk", format_args!("{}{readonly}", path.display()));
            }
            _ => {}
        }
    }
    if let Some(disc) = spec.cdrom() {
        lines.add("cdrom", disc.display());
    }
    network(&mut lines, spec.network());
    // The image was told above.
    for (key, value) in spec.labels().iter().filter(|(key, _)| *key != MachineConfig::IMAGE_LABEL) {
        lines.add("label", format_args!("{key}={value}"));
    }
    for change in vm.next_spec.iter().flat_map(|next| changes(spec, next, false)) {
        lines.add(
            "next start",
            format_args!("{}: {} → {}", change.field, shown(&change.from), shown(&change.to)),
        );
    }
    run(&mut lines, vm);
    lines.0
}

/// Returns what changes about a VM, and when that counts.
pub(crate) fn change(change: &SpecChange) -> String {
    let SpecChange { field, from, to, applies, .. } = change;
    format!("{field}: {} -> {}, {applies}", shown(from), shown(to))
}

/// Returns a value as a person reads it who has to see that there is none.
fn shown(value: &str) -> &str {
    if value.is_empty() { "none" } else { value }
}

fn network(lines: &mut LabelLines, network: &NetworkConfig) {
    match network {
        NetworkConfig::User(user) if user.restrict => lines.add("network", "user, restricted"),
        NetworkConfig::User(_) => lines.add("network", "user"),
        NetworkConfig::Tap { bridge } => lines.add("network", format_args!("bridge {bridge}")),
        NetworkConfig::Vnic { link } => lines.add("network", format_args!("link {link}")),
        _ => lines.add("network", "none"),
    }
}

fn boot(lines: &mut LabelLines, boot: &Boot) {
    match boot {
        Boot::Firmware(Firmware::Bios) => lines.add("firmware", "bios"),
        Boot::Firmware(Firmware::Uefi) => lines.add("firmware", "uefi"),
        Boot::Kernel(kernel) => {
            lines.add("kernel", kernel.path.display());
            if let Some(initrd) = &kernel.initrd {
                lines.add("initrd", initrd.display());
            }
            if !kernel.cmdline.is_empty() {
                lines.add("cmdline", &kernel.cmdline);
            }
        }
        _ => {}
    }
}

fn run(lines: &mut LabelLines, vm: &VmHandle) {
    forwards(vm).lines().for_each(|port| lines.add("port", port));
    if let Some(run) = &vm.run {
        if let Some(pid) = run.pid {
            lines.add("process", pid);
        }
        match &run.console {
            ConsoleEndpoint::UnixSocket(path) => lines.add("console", path.display()),
            ConsoleEndpoint::WebSocket(url) => lines.add("console", url),
            ConsoleEndpoint::None => {}
        }
        for (label, path) in [("agent", &run.agent), ("monitor", &run.monitor)] {
            if let Some(path) = path {
                lines.add(label, path.display());
            }
        }
        match &run.vnc {
            Some(VncAddress::Unix(path)) => lines.add("vnc", path.display()),
            Some(VncAddress::Tcp { addr, password_file }) => {
                lines.add("vnc", format_args!("{addr}, password in {}", password_file.display()));
            }
            _ => {}
        }
    }
    for (label, path) in [("console log", &vm.console_log), ("hypervisor log", &vm.hypervisor_log)] {
        if let Some(path) = path {
            lines.add(label, path.display());
        }
    }
}

/// Labels and values, aligned; the further lines of a value stand below its first.
#[derive(Default)]
pub(crate) struct LabelLines(String);

impl LabelLines {
    /// Returns the lines as they were added.
    pub(crate) fn into_text(self) -> String {
        self.0
    }

    /// Adds a line, or several where the value has them.
    pub(crate) fn add(&mut self, label: &str, value: impl std::fmt::Display) {
        const WIDTH: usize = "hypervisor log:".len() + 1;
        let value = printable(value).replace('\n', &format!("\n{:WIDTH$}", ""));
        let label = format!("{label}:");
        self.0.push_str(&format!("{label:WIDTH$}{value}\n"));
    }
}
