//! Instances: what is asked for, what is answered.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::component::{
    CrucibleStorageBackend, InstanceSpec, MigrationFailureInjector, SpecKey, VirtioNetworkBackend,
};

/// Defines types that go over the wire as JSON objects and ignore what they don't know.
macro_rules! objects {
    ($($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        pub(crate) struct $name { $($(#[$field_meta])* pub(crate) $field: $type),* }
    )*};
}

objects! {
    InstanceProperties { id: Uuid, name: String, description: String, metadata: InstanceMetadata }
    InstanceMetadata {
        silo_id: Uuid,
        project_id: Uuid,
        sled_id: Uuid,
        sled_serial: String,
        sled_revision: u32,
        sled_model: String,
    }
    InstanceEnsureRequest { properties: InstanceProperties, init: InstanceInitializationMethod }
    InstanceEnsureResponse { migrate: Option<InstanceMigrateInitiateResponse> }
    InstanceMigrateInitiateResponse { migration_id: Uuid }
    Instance { properties: InstanceProperties, state: InstanceState }
    InstanceGetResponse { instance: Instance }
    InstanceSpecGetResponse { properties: InstanceProperties, state: InstanceState, spec: InstanceSpecStatus }
    InstanceStateMonitorRequest { r#gen: u64 }
    InstanceStateMonitorResponse { r#gen: u64, state: InstanceState, migration: InstanceMigrateStatusResponse }
    InstanceMigrationStatus { id: Uuid, state: MigrationState }
    InstanceMigrateStatusResponse {
        migration_in: Option<InstanceMigrationStatus>,
        migration_out: Option<InstanceMigrationStatus>,
    }
    InstanceSerialConsoleHistoryResponse { data: Vec<u8>, last_byte_offset: u64 }
    InstanceSerialConsoleHistoryRequest {
        from_start: Option<u64>,
        max_bytes: Option<u64>,
        most_recent: Option<u64>,
    }
    InstanceSerialConsoleStreamRequest { from_start: Option<u64>, most_recent: Option<u64> }
    InstanceVCRReplace { vcr_json: String }
    DiskPath { id: String }
    SnapshotPath { id: String, snapshot_id: Uuid }
    MigrationPath { migration_id: Uuid }
}

/// How an instance comes to be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "method", content = "value")]
pub(crate) enum InstanceInitializationMethod {
    Spec {
        spec: InstanceSpec,
    },
    MigrationTarget {
        migration_id: Uuid,
        src_addr: SocketAddr,
        replace_components: BTreeMap<SpecKey, ReplacementComponent>,
    },
}

/// What differs on the host that a VM moves to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, tag = "component", content = "spec")]
pub(crate) enum ReplacementComponent {
    MigrationFailureInjector(MigrationFailureInjector),
    CrucibleStorageBackend(CrucibleStorageBackend),
    VirtioNetworkBackend(VirtioNetworkBackend),
}

/// Whether the spec is known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "value")]
pub(crate) enum InstanceSpecStatus {
    WaitingForMigrationSource,
    Present(InstanceSpec),
}

/// Where an instance is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
}

/// What can be asked of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) enum InstanceStateRequested {
    Run,
    Stop,
    Reboot,
}

/// Where a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub(crate) enum MigrationState {
    Sync,
    RamPush,
    Pause,
    RamPushDirty,
    Device,
    Resume,
    RamPull,
    Server,
    Finish,
    Error,
}

/// What became of a request to replace a Crucible volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ReplaceResult {
    Started,
    StartedAlready,
    CompletedAlready,
    Missing,
    VcrMatches,
}
