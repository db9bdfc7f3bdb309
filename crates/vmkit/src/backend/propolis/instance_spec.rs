//! The wire types of a Propolis server: the spec of a VM, and the replies.
//!
//! Pure. Only what vmkit says is here; what it reads names only the fields that it uses. A field
//! that is null and one that is absent mean the same.
//!
//! Source: the API description of propolis-server 5.0.0.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The body of `PUT /instance`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceEnsureRequest {
    /// Who the VM is.
    pub properties: InstanceProperties,
    /// How it comes to be.
    pub init: InitializationMethod,
}

/// Who a VM is, for the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceProperties {
    /// The name of the kernel's VM.
    pub id: Uuid,
    /// Only echoed.
    pub name: String,
    /// Only echoed.
    pub description: String,
    /// Only for metrics.
    pub metadata: InstanceMetadata,
}

/// Where a VM stands in Oxide's world, of which only metrics make use.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct InstanceMetadata {
    /// Nil here.
    pub silo_id: Uuid,
    /// Nil here.
    pub project_id: Uuid,
    /// Nil here.
    pub sled_id: Uuid,
    /// Empty here.
    pub sled_serial: String,
    /// 0 here.
    pub sled_revision: u32,
    /// Empty here.
    pub sled_model: String,
}

/// How a VM comes to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "value")]
pub enum InitializationMethod {
    /// From its spec.
    Spec {
        /// The spec.
        spec: InstanceSpec,
    },
}

/// A VM's board and all that is on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// CPUs and memory.
    pub board: Board,
    /// Devices and what is behind them, by key.
    pub components: BTreeMap<String, Component>,
    /// What the guest's firmware tells of the machine; known from API version 2 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smbios: Option<Smbios>,
}

/// CPUs, memory, chipset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Board {
    /// How many CPUs.
    pub cpus: u8,
    /// The memory in MiB.
    pub memory_mb: u64,
    /// The chipset.
    pub chipset: Chipset,
}

/// The chipset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "value", rename_all = "snake_case")]
pub enum Chipset {
    /// The only one.
    I440Fx {
        /// Whether PCI Express configuration space is there.
        enable_pcie: bool,
    },
}

/// What the firmware tells of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Smbios {
    /// Who made it.
    pub manufacturer: String,
    /// What it is.
    pub product_name: String,
    /// Which one it is.
    pub serial_number: String,
    /// Its version.
    pub version: u64,
}

/// A device, or what is behind one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", content = "component", rename_all = "snake_case")]
pub enum Component {
    /// A disk.
    VirtioDisk {
        /// The key of what is behind it.
        backend_id: String,
        /// Its slot.
        pci_path: PciPath,
    },
    /// A network card.
    VirtioNic {
        /// The key of what is behind it.
        backend_id: String,
        /// Only for metrics; nil here.
        interface_id: Uuid,
        /// Its slot.
        pci_path: PciPath,
    },
    /// A serial port.
    SerialPort {
        /// Which one: `com1`, without which the server panics.
        num: String,
    },
    /// The device by which a guest tells of its panic.
    QemuPvpanic {
        /// Whether it is there.
        enable_isa: bool,
    },
    /// What the firmware tries to boot from.
    BootSettings {
        /// The disks, the first one first.
        order: Vec<BootOrderEntry>,
    },
    /// A file or a volume behind a disk, raw.
    FileStorageBackend {
        /// Where it is on the server's host.
        path: PathBuf,
        /// Whether the guest may only read it.
        readonly: bool,
        /// The size of a block in bytes.
        block_size: u32,
    },
    /// Bytes behind a disk.
    BlobStorageBackend(Blob),
    /// A VNIC behind a network card.
    VirtioNetworkBackend {
        /// Its name on the server's host.
        vnic_name: String,
    },
}

/// Bytes that are the contents of a disk.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// The bytes, in base64 with padding.
    pub base64: String,
    /// Whether the guest may only read them.
    pub readonly: bool,
}

impl fmt::Debug for Blob {
    /// Shows the length only: the seed may hold a private key, which has no place in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob").field("base64_bytes", &self.base64.len()).finish_non_exhaustive()
    }
}

/// A slot of the PCI bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciPath {
    /// The bus.
    pub bus: u8,
    /// The device, 0 to 31.
    pub device: u8,
    /// The function, 0 to 7.
    pub function: u8,
}

/// One disk to boot from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootOrderEntry {
    /// The disk's key.
    pub id: String,
}

/// Where the server says that its VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum InstanceState {
    Creating,
    Starting,
    Running,
    Stopping,
    Stopped,
    Rebooting,
    Migrating,
    Repairing,
    Failed,
    Destroyed,
    /// A state of a later version: the VM is there.
    #[serde(other)]
    Unknown,
}

/// What a VM can be told to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum RequestedState {
    Run,
    Stop,
}

/// The answer of `GET /instance`.
#[derive(Debug, Deserialize)]
pub(crate) struct InstanceAnswer {
    pub(crate) instance: InstanceReply,
}

#[derive(Debug, Deserialize)]
pub(crate) struct InstanceReply {
    pub(crate) properties: InstanceIdentity,
    pub(crate) state: InstanceState,
}

#[derive(Debug, Deserialize)]
pub(crate) struct InstanceIdentity {
    pub(crate) id: Uuid,
}

/// The body of `GET /instance/state-monitor`.
#[derive(Debug, Serialize)]
pub(crate) struct MonitorQuestion {
    pub(crate) r#gen: u64,
}

/// The answer to it.
#[derive(Debug, Deserialize)]
pub(crate) struct StateMonitorReply {
    pub(crate) r#gen: u64,
    pub(crate) state: InstanceState,
}

/// The answer of `GET /instance/serial/history`.
#[derive(Debug, Deserialize)]
pub(crate) struct SerialHistory {
    pub(crate) data: Vec<u8>,
    pub(crate) last_byte_offset: u64,
}

/// The body of every error.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ErrorBody {
    #[serde(default)]
    pub(crate) request_id: String,
    #[serde(default)]
    pub(crate) error_code: Option<String>,
    pub(crate) message: String,
}
