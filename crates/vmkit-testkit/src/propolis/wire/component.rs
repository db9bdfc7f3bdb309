//! The components of an instance spec, devices and backends.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroUsize;

use schemars::JsonSchema;
use schemars::r#gen::SchemaGenerator;
use schemars::schema::{InstanceType, Metadata, Schema, SchemaObject, SubschemaValidation};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// A component's key: a UUID where it looks like one, else a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SpecKey {
    Uuid(Uuid),
    Name(String),
}

impl From<String> for SpecKey {
    fn from(text: String) -> Self {
        text.parse().map_or(Self::Name(text), Self::Uuid)
    }
}

impl fmt::Display for SpecKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uuid(uuid) => uuid.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl Serialize for SpecKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SpecKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

impl JsonSchema for SpecKey {
    fn schema_name() -> String {
        "SpecKey".to_owned()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let text = |title: &str, format: Option<&str>| {
            let inner = SchemaObject {
                instance_type: Some(InstanceType::String.into()),
                format: format.map(str::to_owned),
                ..SchemaObject::default()
            };
            Schema::Object(SchemaObject {
                metadata: Some(Box::new(Metadata { title: Some(title.to_owned()), ..Metadata::default() })),
                subschemas: Some(Box::new(SubschemaValidation {
                    all_of: Some(vec![inner.into()]),
                    ..SubschemaValidation::default()
                })),
                ..SchemaObject::default()
            })
        };
        Schema::Object(SchemaObject {
            subschemas: Some(Box::new(SubschemaValidation {
                one_of: Some(vec![text("uuid", Some("uuid")), text("name", None)]),
                ..SubschemaValidation::default()
            })),
            ..SchemaObject::default()
        })
    }
}

/// Where a device sits on the PCI buses: device 0 to 31, function 0 to 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
pub(crate) struct PciPath {
    pub(crate) bus: u8,
    pub(crate) device: u8,
    pub(crate) function: u8,
}

impl<'de> Deserialize<'de> for PciPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct UncheckedSpec {
            bus: u8,
            device: u8,
            function: u8,
        }
        let UncheckedSpec { bus, device, function } = UncheckedSpec::deserialize(deserializer)?;
        if device > 31 {
            return Err(D::Error::custom(format_args!("PCI device {device} outside range of 0-31")));
        }
        if function > 7 {
            return Err(D::Error::custom(format_args!("PCI function {function} outside range of 0-7")));
        }
        Ok(Self { bus, device, function })
    }
}

/// Defines types that go over the wire as JSON objects, which name all of their fields and take no
/// others.
macro_rules! objects {
    ($($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub(crate) struct $name { $($(#[$field_meta])* pub(crate) $field: $type),* }
    )*};
}

objects! {
    VirtioDisk { backend_id: SpecKey, pci_path: PciPath }
    NvmeDisk { backend_id: SpecKey, pci_path: PciPath, serial_number: [u8; 20] }
    VirtioNic { backend_id: SpecKey, interface_id: Uuid, pci_path: PciPath }
    SerialPort { num: SerialPortNumber }
    PciPciBridge { downstream_bus: u8, pci_path: PciPath }
    QemuPvpanic { enable_isa: bool }
    BootSettings { order: Vec<BootOrderEntry> }
    VirtioSocket { guest_cid: u64, pci_path: PciPath }
    SoftNpuPciPort { pci_path: PciPath }
    SoftNpuPort { backend_id: SpecKey, link_name: String }
    SoftNpuP9 { pci_path: PciPath }
    P9fs { chunk_size: u32, pci_path: PciPath, source: String, target: String }
    MigrationFailureInjector { fail_exports: u32, fail_imports: u32 }
    CrucibleStorageBackend { readonly: bool, request_json: String }
    FileStorageBackend {
        block_size: u32,
        path: String,
        readonly: bool,
        workers: Option<NonZeroUsize>,
    }
    BlobStorageBackend { base64: String, readonly: bool }
    VirtioNetworkBackend { vnic_name: String }
    DlpiNetworkBackend { vnic_name: String }
}

/// A port of the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SerialPortNumber {
    Com1,
    Com2,
    Com3,
    Com4,
}

/// A disk that the firmware shall try.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct BootOrderEntry {
    pub(crate) id: SpecKey,
}

/// Defines the components that API versions know, each with a conversion from the first one.
macro_rules! components {
    ($first:ident, $last:ident, [$($common:ident),* $(,)?], [$($new:ident),*]) => {
        /// The components before version 3.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, tag = "type", content = "component", rename_all = "snake_case")]
        pub(crate) enum $first { $($common($common)),* }

        /// The components since version 3.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, tag = "type", content = "component", rename_all = "snake_case")]
        pub(crate) enum $last { $($common($common),)* $($new($new)),* }

        impl From<$first> for $last {
            fn from(component: $first) -> Self {
                match component { $($first::$common(component) => Self::$common(component)),* }
            }
        }

        impl TryFrom<$last> for $first {
            type Error = &'static str;

            fn try_from(component: $last) -> Result<Self, Self::Error> {
                match component {
                    $($last::$common(component) => Ok(Self::$common(component)),)*
                    $($last::$new(_) => Err(stringify!($new)),)*
                }
            }
        }
    };
}

components!(
    ComponentV0,
    Component,
    [
        VirtioDisk,
        NvmeDisk,
        VirtioNic,
        SerialPort,
        PciPciBridge,
        QemuPvpanic,
        BootSettings,
        SoftNpuPciPort,
        SoftNpuPort,
        SoftNpuP9,
        P9fs,
        MigrationFailureInjector,
        CrucibleStorageBackend,
        FileStorageBackend,
        BlobStorageBackend,
        VirtioNetworkBackend,
        DlpiNetworkBackend,
    ],
    [VirtioSocket]
);

/// The mainboard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Board {
    pub(crate) cpus: u8,
    pub(crate) memory_mb: u64,
    pub(crate) chipset: Chipset,
    #[serde(default, skip_serializing_if = "GuestHypervisorInterface::is_default")]
    pub(crate) guest_hv_interface: GuestHypervisorInterface,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cpuid: Option<Cpuid>,
}

/// The chipset, of which there is one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, tag = "type", content = "value", rename_all = "snake_case")]
pub(crate) enum Chipset {
    #[serde(rename = "i440_fx")]
    I440Fx(I440Fx),
}

/// What the guest sees of its hypervisor.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, tag = "type", content = "value", rename_all = "snake_case")]
pub(crate) enum GuestHypervisorInterface {
    #[default]
    Bhyve,
    HyperV {
        features: std::collections::BTreeSet<HyperVFeatureFlag>,
    },
}

impl GuestHypervisorInterface {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// An enlightenment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub(crate) enum HyperVFeatureFlag {
    ReferenceTsc,
}

objects! {
    I440Fx { enable_pcie: bool }
    Cpuid { entries: Vec<CpuidEntry>, vendor: CpuidVendor }
    CpuidEntry {
        leaf: u32,
        subleaf: Option<u32>,
        eax: u32,
        ebx: u32,
        ecx: u32,
        edx: u32,
    }
    SmbiosType1Input { manufacturer: String, product_name: String, serial_number: String, version: u64 }
}

/// Whose CPU the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum CpuidVendor {
    Amd,
    Intel,
}

/// A VM in all its parts.
///
/// Since version 2 unknown keys are ignored here, as the real server does it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub(crate) struct InstanceSpec {
    pub(crate) board: Board,
    pub(crate) components: BTreeMap<SpecKey, Component>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) smbios: Option<SmbiosType1Input>,
}
