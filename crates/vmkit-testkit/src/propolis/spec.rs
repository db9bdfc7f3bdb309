//! What is wrong with an instance spec, in the server's words.
//!
//! Pure: it looks at the spec alone. What the host says to it comes later, in
//! [`host`](super::host).
//!
//! Source: the spec builder of propolis-server. Like it, this does not see that `com1` is missing.

use std::collections::{BTreeMap, BTreeSet};

use super::wire::{BootSettings, Component, Cpuid, InstanceSpec, PciPath, SpecKey};

/// Checks a spec as the server does before it makes anything.
///
/// # Errors
/// Returns the text that follows "failed to generate internal instance spec: ".
pub(super) fn check(spec: &InstanceSpec) -> Result<(), String> {
    if let Some(cpuid) = &spec.board.cpuid {
        check_cpuid(cpuid)?;
    }
    let mut seen = SeenComponents { backends: backends(spec), ..SeenComponents::default() };
    for (key, component) in &spec.components {
        seen.device(key, component)?;
    }
    if let Some(settings) = seen.boot {
        for entry in &settings.order {
            if !seen.disks.contains(&entry.id) {
                return Err(format!("boot option {} is not an attached device", entry.id));
            }
        }
    }
    match seen.backends.keys().next() {
        Some(unused) => Err(format!("backend {unused} not used by any device")),
        None => Ok(()),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ComponentKind {
    Storage,
    Network,
    /// For ports of the emulated switch only.
    Dlpi,
}

fn backends(spec: &InstanceSpec) -> BTreeMap<&SpecKey, ComponentKind> {
    let kind = |component: &Component| match component {
        Component::FileStorageBackend(_)
        | Component::BlobStorageBackend(_)
        | Component::CrucibleStorageBackend(_) => Some(ComponentKind::Storage),
        Component::VirtioNetworkBackend(_) => Some(ComponentKind::Network),
        Component::DlpiNetworkBackend(_) => Some(ComponentKind::Dlpi),
        _ => None,
    };
    spec.components.iter().filter_map(|(key, component)| Some((key, kind(component)?))).collect()
}

/// What was seen so far; of the backends, those that no device has taken.
#[derive(Default)]
struct SeenComponents<'a> {
    backends: BTreeMap<&'a SpecKey, ComponentKind>,
    disks: BTreeSet<&'a SpecKey>,
    pci: BTreeSet<PciPath>,
    ports: BTreeSet<super::wire::SerialPortNumber>,
    pvpanic: bool,
    socket: bool,
    boot: Option<&'a BootSettings>,
}

impl<'a> SeenComponents<'a> {
    fn device(&mut self, key: &'a SpecKey, component: &'a Component) -> Result<(), String> {
        match component {
            Component::VirtioDisk(disk) => self.disk(key, &disk.backend_id, disk.pci_path),
            Component::NvmeDisk(disk) => self.disk(key, &disk.backend_id, disk.pci_path),
            Component::VirtioNic(nic) => {
                self.take_backend(key, &nic.backend_id, ComponentKind::Network)?;
                self.take_slot(nic.pci_path)
            }
            Component::SerialPort(port) => match self.ports.insert(port.num) {
                true => Ok(()),
                false => Err(format!("serial port {:?} is already specified", port.num)),
            },
            Component::PciPciBridge(bridge) => self.take_slot(bridge.pci_path),
            Component::QemuPvpanic(_) => match std::mem::replace(&mut self.pvpanic, true) {
                false => Ok(()),
                true => Err("pvpanic device already specified".to_owned()),
            },
            Component::VirtioSocket(socket) => {
                if std::mem::replace(&mut self.socket, true) {
                    return Err("vsock device already specified".to_owned());
                }
                self.take_slot(socket.pci_path)
            }
            // Of several the last one counts, as in the real server, whose source knows a refusal
            // that it never gives.
            Component::BootSettings(settings) => {
                self.boot = Some(settings);
                Ok(())
            }
            Component::SoftNpuPciPort(_)
            | Component::SoftNpuPort(_)
            | Component::SoftNpuP9(_)
            | Component::P9fs(_) => Err(compiled_out(key, "falcon")),
            Component::MigrationFailureInjector(_) => Err(compiled_out(key, "failure-injection")),
            Component::CrucibleStorageBackend(_)
            | Component::FileStorageBackend(_)
            | Component::BlobStorageBackend(_)
            | Component::VirtioNetworkBackend(_)
            | Component::DlpiNetworkBackend(_) => Ok(()),
        }
    }

    fn disk(&mut self, key: &'a SpecKey, backend: &SpecKey, slot: PciPath) -> Result<(), String> {
        self.take_backend(key, backend, ComponentKind::Storage)?;
        self.take_slot(slot)?;
        self.disks.insert(key);
        Ok(())
    }

    fn take_backend(
        &mut self,
        device: &SpecKey,
        backend: &SpecKey,
        kind: ComponentKind,
    ) -> Result<(), String> {
        if device == backend {
            return Err(format!("device {device} has the same name as its backend"));
        }
        let what = if kind == ComponentKind::Storage { "storage" } else { "network" };
        match self.backends.get(backend) {
            Some(found) if *found == kind => {
                self.backends.remove(backend);
                Ok(())
            }
            _ => Err(format!("{what} backend {backend} not found for device {device}")),
        }
    }

    fn take_slot(&mut self, path: PciPath) -> Result<(), String> {
        match self.pci.insert(path) {
            true => Ok(()),
            false => Err(format!("a PCI device is already attached at {path:?}")),
        }
    }
}

fn compiled_out(key: &SpecKey, feature: &str) -> String {
    format!("support for component {key} compiled out via {feature}")
}

fn check_cpuid(cpuid: &Cpuid) -> Result<(), String> {
    let problem = |what: String| Err(format!("instance spec's CPUID entries are invalid: {what}"));
    let mut seen = BTreeSet::new();
    for entry in &cpuid.entries {
        if !matches!(entry.leaf, 0..=0xFFFF | 0x8000_0000..=0x8000_FFFF) {
            return problem(format!("leaf {:#x} not in standard or extended range", entry.leaf));
        }
        if !seen.insert((entry.leaf, entry.subleaf)) {
            return problem(format!("duplicate leaf and subleaf ({:x}, {:?})", entry.leaf, entry.subleaf));
        }
    }
    Ok(())
}
