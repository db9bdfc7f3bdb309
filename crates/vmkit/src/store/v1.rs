//! Version 1 of the stored form of a VM: the shape of `vm.json` and `run.json`.
//!
//! Pure. The format is these types and nothing else. Each stands beside the public type that it
//! stores, so that a public type can change without a byte of a record changing:
//!
//! - A field that is renamed there keeps its name here, by `serde(rename)`.
//! - One that is added is optional here, with `skip_serializing_if`: older records are read, and
//!   records without it keep their bytes.
//! - Anything else is a version 2, in a file of its own, which this one is converted to.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::num::NonZeroU16;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::record;
use crate::error::Result;
use crate::handle::{self, BackendTag};
use crate::lifecycle;
use crate::log_position::LogPosition;
use crate::spec::{
    self, BackendOptions, BridgeName, Labels, LinkName, Mib, SnapshotName, UserName, VmName, VmSpec,
};

/// The version of this form.
pub(super) const VERSION: u32 = 1;

/// A value of the stored form.
trait StoredForm: Sized {
    /// The type that it stands for in the program.
    type Public;

    fn store(public: Self::Public) -> Self;

    /// # Errors
    /// `InvalidInput` for a spec that no VM can have.
    fn load(self) -> Result<Self::Public>;
}

/// Defines types of the stored form, each with its conversions from and to the public type. What
/// that gains or renames does not compile until it is decided here how it is stored.
macro_rules! stored {
    () => {};
    ($(#[$meta:meta])* struct $name:ident = $public:path {
        $($(#[$on:meta])* $field:ident: $type:ty),* $(,)?
    } $($rest:tt)*) => {
        #[derive(Serialize, Deserialize)]
        $(#[$meta])*
        struct $name {
            $($(#[$on])* $field: $type,)*
        }

        impl StoredForm for $name {
            type Public = $public;

            fn store(public: $public) -> Self {
                type Public = $public;
                let Public { $($field),* } = public;
                Self { $($field: StoredForm::store($field)),* }
            }

            fn load(self) -> Result<$public> {
                type Public = $public;
                Ok(Public { $($field: StoredForm::load(self.$field)?),* })
            }
        }

        stored! { $($rest)* }
    };
    ($(#[$meta:meta])* enum $name:ident = $public:path {
        $($variant:ident $(($inner:ident: $of:ty))? $({ $($field:ident: $type:ty),* })?),* $(,)?
    } $($rest:tt)*) => {
        #[derive(Serialize, Deserialize)]
        $(#[$meta])*
        enum $name {
            $($variant $(($of))? $({ $($field: $type),* })?,)*
        }

        impl StoredForm for $name {
            type Public = $public;

            fn store(public: $public) -> Self {
                type Public = $public;
                match public {
                    $(Public::$variant $(($inner))? $({ $($field),* })? => Self::$variant
                        $((StoredForm::store($inner)))? $({ $($field: StoredForm::store($field)),* })?,)*
                }
            }

            fn load(self) -> Result<$public> {
                type Public = $public;
                Ok(match self {
                    $(Self::$variant $(($inner))? $({ $($field),* })? => Public::$variant
                        $((StoredForm::load($inner)?))? $({ $($field: StoredForm::load($field)?),* })?,)*
                })
            }
        }

        stored! { $($rest)* }
    };
}

/// Names types that are stored as they are: numbers, and what is one word or text of its own.
macro_rules! stored_as_is {
    ($($type:ty),* $(,)?) => {$(
        impl StoredForm for $type {
            type Public = Self;

            fn store(public: Self) -> Self {
                public
            }

            fn load(self) -> Result<Self> {
                Ok(self)
            }
        }
    )*};
}

stored_as_is! {
    bool, u32, u64, NonZeroU16, Ipv4Addr, SocketAddrV4, String, PathBuf, Uuid, serde_json::Value,
    VmName, SnapshotName, UserName, BridgeName, LinkName, Mib, Labels, BackendOptions, BackendTag, LogPosition,
}

impl<S: StoredForm> StoredForm for Option<S> {
    type Public = Option<S::Public>;

    fn store(public: Self::Public) -> Self {
        public.map(S::store)
    }

    fn load(self) -> Result<Self::Public> {
        self.map(S::load).transpose()
    }
}

impl<S: StoredForm> StoredForm for Vec<S> {
    type Public = Vec<S::Public>;

    fn store(public: Self::Public) -> Self {
        public.into_iter().map(S::store).collect()
    }

    fn load(self) -> Result<Self::Public> {
        self.into_iter().map(S::load).collect()
    }
}

impl<S: StoredForm> StoredForm for Box<S> {
    type Public = Box<S::Public>;

    fn store(public: Self::Public) -> Self {
        Box::new(S::store(*public))
    }

    fn load(self) -> Result<Self::Public> {
        (*self).load().map(Box::new)
    }
}

/// A record, `vm.json` or `run.json`.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredRecord {
    pub(super) version: u32,
    handle: Handle,
    intent: Option<Intent>,
}

impl StoredRecord {
    pub(super) fn store(record: record::VmRecord) -> Self {
        let record::VmRecord { handle, intent } = record;
        Self { version: VERSION, handle: StoredForm::store(handle), intent: StoredForm::store(intent) }
    }

    /// Returns the record in the program's own types.
    ///
    /// # Errors
    /// `InvalidInput` for a spec that no VM can have.
    pub(super) fn load(self) -> Result<record::VmRecord> {
        Ok(record::VmRecord { handle: self.handle.load()?, intent: self.intent.load()? })
    }
}

/// A spec; what is loaded is checked as a whole.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct StoredSpec(SpecFields);

impl StoredForm for StoredSpec {
    type Public = VmSpec;

    fn store(public: VmSpec) -> Self {
        Self(StoredForm::store(spec::VmSpecBuilder::from(public)))
    }

    fn load(self) -> Result<VmSpec> {
        self.0.load()?.build_recorded()
    }
}

stored! {
    struct Intent = record::Intent {
        operation: Operation,
        since: u64,
        pid: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        snapshot: Option<SnapshotName>,
    }

    #[serde(rename_all = "lowercase")]
    enum Operation = lifecycle::Operation {
        Prepare, Start, Stop, Suspend, Resume, Save, Snapshot, Restore, Export, Clone, Destroy
    }

    struct Handle = handle::VmHandle {
        id: Uuid,
        backend: BackendTag,
        spec: StoredSpec,
        #[serde(skip_serializing_if = "Option::is_none")]
        next_spec: Option<Box<StoredSpec>>,
        #[serde(flatten)]
        state: State,
        run: Option<RunInfo>,
        console_log: Option<PathBuf>,
        #[serde(skip_serializing_if = "Option::is_none")]
        console_since: Option<LogPosition>,
        hypervisor_log: Option<PathBuf>,
        details: BackendDetails,
    }

    struct BackendDetails = handle::BackendDetails { version: u32, data: serde_json::Value }

    #[serde(rename_all = "lowercase", tag = "state")]
    enum State = lifecycle::VmState {
        Preparing,
        Prepared,
        Running,
        Suspended,
        Saved,
        Stopped,
        Failed { cause: FailureCause },
        Destroyed,
    }

    struct FailureCause = lifecycle::FailureCause { kind: FailureKind, detail: String }

    #[serde(rename_all = "kebab-case")]
    enum FailureKind = lifecycle::FailureKind {
        HypervisorExited,
        HypervisorKilled,
        GuestPanic,
        InternalError,
        DiskError,
        Vanished,
        Interrupted,
        Other,
    }

    struct RunInfo = handle::RunInfo {
        pid: Option<u32>,
        accel: Option<Accel>,
        console: ConsoleEndpoint,
        agent: Option<PathBuf>,
        monitor: Option<PathBuf>,
        vnc: Option<VncAddress>,
        forwards: Vec<ActiveForward>,
    }

    #[serde(rename_all = "kebab-case")]
    enum ConsoleEndpoint = handle::ConsoleEndpoint {
        UnixSocket(path: PathBuf),
        WebSocket(url: String),
        None,
    }

    #[serde(rename_all = "kebab-case")]
    enum VncAddress = handle::VncAddress {
        Unix(path: PathBuf),
        Tcp { addr: SocketAddrV4, password_file: PathBuf },
    }

    struct ActiveForward = handle::ActiveForward {
        protocol: Protocol,
        host: SocketAddrV4,
        guest_port: NonZeroU16,
    }

    #[serde(deny_unknown_fields)]
    struct SpecFields = spec::VmSpecBuilder {
        name: VmName,
        id: Option<Uuid>,
        backend: Option<BackendTag>,
        cpus: u32,
        memory: Mib,
        machine: MachineType,
        boot: Option<Boot>,
        accel: Accel,
        disk: Option<RootDisk>,
        data_disks: Vec<DataDisk>,
        #[serde(skip_serializing_if = "Option::is_none")]
        cdrom: Option<PathBuf>,
        network: NetworkConfig,
        cloud_init: Option<CloudInitConfig>,
        vnc: Vnc,
        console_log: Mib,
        run_as: Option<UserName>,
        #[serde(default, skip_serializing_if = "Labels::is_empty")]
        labels: Labels,
        #[serde(default, skip_serializing_if = "BackendOptions::is_empty")]
        backend_options: BackendOptions,
    }

    #[serde(rename_all = "lowercase")]
    enum MachineType = spec::MachineType { Q35, Microvm, Virt }

    #[serde(rename_all = "lowercase")]
    enum Boot = spec::Boot { Firmware(firmware: Firmware), Kernel(kernel: Kernel) }

    #[serde(rename_all = "lowercase")]
    enum Firmware = spec::Firmware { Bios, Uefi }

    struct Kernel = spec::Kernel { path: PathBuf, initrd: Option<PathBuf>, cmdline: String }

    #[serde(rename_all = "lowercase")]
    enum Accel = spec::Accel { Auto, Kvm, Tcg }

    struct RootDisk = spec::RootDisk { image: PathBuf, size: Option<Mib> }

    #[serde(rename_all = "lowercase")]
    enum DataDisk = spec::DataDisk {
        Fresh { size: Mib },
        Existing { path: PathBuf, readonly: bool },
    }

    #[serde(rename_all = "lowercase")]
    enum NetworkConfig = spec::NetworkConfig {
        User(user: UserNetwork),
        Tap { bridge: BridgeName },
        Vnic { link: LinkName },
        None,
    }

    struct UserNetwork = spec::UserNetwork { forwards: Vec<PortForward>, restrict: bool }

    struct PortForward = spec::PortForward {
        protocol: Protocol,
        host_addr: Ipv4Addr,
        host_port: Option<NonZeroU16>,
        guest_port: NonZeroU16,
    }

    #[serde(rename_all = "lowercase")]
    enum Protocol = spec::Protocol { Tcp, Udp }

    #[serde(rename_all = "lowercase")]
    enum Vnc = spec::Vnc { Unix, Loopback, Off }

    #[serde(deny_unknown_fields)]
    struct CloudInitConfig = spec::CloudInitConfig {
        hostname: Option<String>,
        user_data: UserData,
        network_config: Option<String>,
        run: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        access: Option<GuestAccess>,
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        revoked_keys: Vec<String>,
    }

    #[serde(deny_unknown_fields)]
    struct GuestAccess = spec::GuestAccess {
        user: String,
        login_key: SshKeyPair,
        host_key: SshKeyPair,
    }

    #[serde(rename_all = "lowercase")]
    enum UserData = spec::UserData { Typed(typed: CloudConfig), Raw(text: String) }

    #[serde(deny_unknown_fields)]
    struct CloudConfig = spec::CloudConfig {
        users: Vec<GuestUser>,
        packages: Vec<String>,
        files: Vec<GuestFile>,
        commands: Vec<Vec<String>>,
        ssh_host_key: Option<SshKeyPair>,
    }

    #[serde(deny_unknown_fields)]
    struct GuestUser = spec::GuestUser {
        name: String,
        ssh_keys: Vec<String>,
        sudo: bool,
        shell: Option<String>,
    }

    #[serde(deny_unknown_fields)]
    struct GuestFile = spec::GuestFile {
        path: PathBuf,
        content: String,
        mode: u32,
        owner: Option<String>,
    }

    #[serde(deny_unknown_fields)]
    struct SshKeyPair = spec::SshKeyPair { private: String, public: String }
}
