//! Devices and what lies behind them: `-device`, `-blockdev`, `-object`.
//!
//! Pure.

use std::path::Path;

use super::{Args, Props};
use crate::image::ImageFormat;
use crate::network::MacAddr;
use crate::spec::Machine;

/// `-blockdev`: a node of the block graph over one file.
pub(crate) struct Blockdev<'a> {
    pub(crate) node: &'a str,
    pub(crate) format: ImageFormat,
    pub(crate) path: &'a Path,
    pub(crate) readonly: bool,
}

impl Blockdev<'_> {
    pub(crate) fn add_to(&self, args: &mut Args) {
        let driver = match self.format {
            ImageFormat::Qcow2 => "qcow2",
            ImageFormat::Raw => "raw",
        };
        let mut props = Props::first("driver", driver).with("node-name", self.node);
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
    pub(crate) fn add_to(&self, args: &mut Args) {
        args.props("-object", Props::new("rng-builtin").with("id", "rng0"));
    }
}

/// `-device`.
pub(crate) enum Device<'a> {
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
}

impl Device<'_> {
    /// Adds the device as this machine has it: on PCI, or on microvm's virtio-mmio and ISA.
    pub(crate) fn add_to(&self, machine: Machine, args: &mut Args) {
        let virtio = |kind: &str| match machine {
            Machine::Microvm => Props::new(format!("virtio-{kind}-device")),
            Machine::Q35 | Machine::Virt => Props::new(format!("virtio-{kind}-pci")),
        };
        let props = match self {
            Device::Disk { node, bootindex } => virtio("blk")
                .with("drive", node)
                .with("id", format!("{node}-dev"))
                .with("serial", node)
                .with_some("bootindex", bootindex.map(|index| index.to_string())),
            Device::Disc { node, bootindex } => match machine {
                Machine::Virt => Props::new("scsi-cd").with("bus", "scsi0.0"),
                Machine::Q35 | Machine::Microvm => Props::new("ide-cd").with("bus", "ide.0"),
            }
            .with("drive", node)
            .with("id", format!("{node}-dev"))
            .with_some("bootindex", bootindex.map(|index| index.to_string())),
            Device::ScsiBus => virtio("scsi").with("id", "scsi0"),
            Device::Net { mac } => {
                let nic =
                    virtio("net").with("netdev", "net0").with("id", "net0-dev").with("mac", mac.to_string());
                match machine {
                    Machine::Microvm => nic,
                    // Nothing boots over the network, so no ROM for it.
                    Machine::Q35 | Machine::Virt => nic.with("romfile", ""),
                }
            }
            Device::Rng => virtio("rng").with("rng", "rng0"),
            Device::SerialBus => virtio("serial").with("id", "ports"),
            Device::AgentPort => {
                Props::new("virtserialport").with("chardev", "agent").with("name", "org.qemu.guest_agent.0")
            }
            Device::Panic => Props::new(match machine {
                Machine::Virt => "pvpanic-pci",
                Machine::Q35 | Machine::Microvm => "pvpanic",
            }),
            Device::Screen => Props::new(match machine {
                Machine::Virt => "virtio-gpu-pci",
                Machine::Q35 | Machine::Microvm => "VGA",
            }),
        };
        args.props("-device", props);
    }
}
