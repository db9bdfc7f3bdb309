//! Devices and what lies behind them: `-device`, `-blockdev`, `-object`.
//!
//! Pure.

use std::path::Path;

use super::{PropertyList, QemuArgs};
use crate::image::ImageFormat;
use crate::network::MacAddr;
use crate::spec::MachineType;

/// `-blockdev`: a node of the block graph over one file.
pub(crate) struct Blockdev<'a> {
    pub(crate) node: &'a str,
    pub(crate) format: ImageFormat,
    pub(crate) path: &'a Path,
    pub(crate) readonly: bool,
}

impl Blockdev<'_> {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        let driver = match self.format {
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Raw => "raw",
        };
        let mut props = PropertyList::first("driver", driver).with("node-name", self.node);
        // A guest's TRIM gives the space back to the host; the file below has to be told as well.
        props = if self.readonly {
            props.with("read-only", "on")
        } else {
            props.with("discard", "unmap").with("file.discard", "unmap")
        };
        args.props("-blockdev", props.with("file.driver", "file").with("file.filename", self.path));
    }
}

/// `-object rng-builtin`: QEMU's own random numbers, behind the guest's.
pub(crate) struct Rng;

impl Rng {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        args.props("-object", PropertyList::new("rng-builtin").with("id", "rng0"));
    }
}

/// `-device`.
pub(crate) enum DeviceSwitch<'a> {
    Disk {
        node: &'a str,
        bootindex: Option<u32>,
    },
    /// The CD-ROM drive: the PC's own SATA controller has it, elsewhere a SCSI bus.
    Disc {
        node: &'a str,
        bootindex: Option<u32>,
    },
    /// The bus of a CD-ROM drive where the machine has none of its own.
    ScsiBus,
    Net {
        mac: MacAddr,
    },
    Rng,
    /// The bus of the virtio serial ports.
    SerialBus,
    /// The guest agent's port.
    AgentPort,
    Panic,
    Screen,
    /// A number that is new in each process: a guest that continues notices it.
    GenerationId,
    Balloon,
    /// A PCIe slot for a device that is added while the guest runs.
    RootPort {
        index: u8,
    },
}

impl DeviceSwitch<'_> {
    /// Adds the device as this machine has it: on PCI, or on microvm's virtio-mmio and ISA.
    pub(crate) fn add_to(&self, machine: MachineType, args: &mut QemuArgs) {
        let virtio = |kind: &str| match machine {
            MachineType::Microvm => PropertyList::new(format!("virtio-{kind}-device")),
            MachineType::Q35 | MachineType::Virt => PropertyList::new(format!("virtio-{kind}-pci")),
        };
        let props = match self {
            DeviceSwitch::Disk { node, bootindex } => virtio("blk")
                .with("drive", node)
                .with("id", format!("{node}-dev"))
                .with("serial", node)
                .with_some("bootindex", bootindex.map(|index| index.to_string())),
            DeviceSwitch::Disc { node, bootindex } => match machine {
                MachineType::Virt => PropertyList::new("scsi-cd").with("bus", "scsi0.0"),
                MachineType::Q35 | MachineType::Microvm => PropertyList::new("ide-cd").with("bus", "ide.0"),
            }
            .with("drive", node)
            .with("id", format!("{node}-dev"))
            .with_some("bootindex", bootindex.map(|index| index.to_string())),
            DeviceSwitch::ScsiBus => virtio("scsi").with("id", "scsi0"),
            DeviceSwitch::Net { mac } => {
                let nic =
                    virtio("net").with("netdev", "net0").with("id", "net0-dev").with("mac", mac.to_string());
                match machine {
                    MachineType::Microvm => nic,
                    // Nothing boots over the network, so no ROM for it.
                    MachineType::Q35 | MachineType::Virt => nic.with("romfile", ""),
                }
            }
            DeviceSwitch::Rng => virtio("rng").with("rng", "rng0"),
            DeviceSwitch::SerialBus => virtio("serial").with("id", "ports"),
            DeviceSwitch::AgentPort => PropertyList::new("virtserialport")
                .with("chardev", "agent")
                .with("name", "org.qemu.guest_agent.0"),
            DeviceSwitch::Panic => PropertyList::new(match machine {
                MachineType::Virt => "pvpanic-pci",
                MachineType::Q35 | MachineType::Microvm => "pvpanic",
            }),
            DeviceSwitch::Screen => PropertyList::new(match machine {
                MachineType::Virt => "virtio-gpu-pci",
                MachineType::Q35 | MachineType::Microvm => "VGA",
            }),
            DeviceSwitch::GenerationId => {
                PropertyList::new("vmgenid").with("guid", "auto").with("id", "generation")
            }
            // A guest that is short of memory takes it back, and ends no program.
            DeviceSwitch::Balloon => virtio("balloon").with("id", "balloon0").with("deflate-on-oom", "on"),
            // All in one slot, far from those that the other devices get one after the other.
            DeviceSwitch::RootPort { index } => {
                let number = (index + 1).to_string();
                PropertyList::new("pcie-root-port")
                    .with("id", format!("rp{index}"))
                    .with("addr", format!("1e.{index}"))
                    .with_some("multifunction", (*index == 0).then_some("on"))
                    .with("chassis", &number)
                    .with("slot", &number)
            }
        };
        args.props("-device", props);
    }
}
