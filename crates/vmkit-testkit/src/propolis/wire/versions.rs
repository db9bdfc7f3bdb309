//! The shapes of API versions 1 and 2, where they differ from the latest.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::component::{Board, Component, ComponentV0, InstanceSpec, SmbiosType1Input, SpecKey};
use super::instance::{
    InstanceEnsureRequest, InstanceInitializationMethod, InstanceProperties, InstanceSpecGetResponse,
    InstanceSpecStatus, InstanceState,
};

/// Defines one old version's way to ask for a VM.
macro_rules! ensure_request {
    ($request:ident, $method:ident, $spec:ident) => {
        /// A request to ensure an instance.
        #[derive(Debug, Deserialize, JsonSchema)]
        #[schemars(rename = "InstanceEnsureRequest")]
        pub(crate) struct $request {
            properties: InstanceProperties,
            init: $method,
        }

        /// How the instance comes to be; an old client can't ask the fake to take over a running
        /// one.
        #[derive(Debug, Deserialize, JsonSchema)]
        #[serde(tag = "method", content = "value")]
        #[schemars(rename = "InstanceInitializationMethod")]
        enum $method {
            Spec { spec: $spec },
        }

        impl From<$request> for InstanceEnsureRequest {
            fn from(request: $request) -> Self {
                let $method::Spec { spec } = request.init;
                let init = InstanceInitializationMethod::Spec { spec: spec.into() };
                Self { properties: request.properties, init }
            }
        }
    };
}

ensure_request!(InstanceEnsureRequestV1, InstanceInitializationMethodV1, InstanceSpecV1);
ensure_request!(InstanceEnsureRequestV2, InstanceInitializationMethodV2, InstanceSpecV2);

/// The spec of version 1, which knows no SMBIOS and takes no unknown keys.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "InstanceSpecV0")]
pub(crate) struct InstanceSpecV1 {
    board: Board,
    components: BTreeMap<SpecKey, ComponentV0>,
}

/// The spec of version 2, which knows no sockets.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "InstanceSpec")]
pub(crate) struct InstanceSpecV2 {
    board: Board,
    components: BTreeMap<SpecKey, ComponentV0>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    smbios: Option<SmbiosType1Input>,
}

impl From<InstanceSpecV1> for InstanceSpec {
    fn from(spec: InstanceSpecV1) -> Self {
        Self { board: spec.board, components: newer(spec.components), smbios: None }
    }
}

impl From<InstanceSpecV2> for InstanceSpec {
    fn from(spec: InstanceSpecV2) -> Self {
        Self { board: spec.board, components: newer(spec.components), smbios: spec.smbios }
    }
}

fn newer(components: BTreeMap<SpecKey, ComponentV0>) -> BTreeMap<SpecKey, Component> {
    components.into_iter().map(|(key, component)| (key, component.into())).collect()
}

/// Returns the components as an old version knows them, or the kind of one that it does not know.
fn older(components: BTreeMap<SpecKey, Component>) -> Result<BTreeMap<SpecKey, ComponentV0>, &'static str> {
    components.into_iter().map(|(key, component)| Ok((key, component.try_into()?))).collect()
}

/// The reply of version 1 for a spec: with a version of its own.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "version", content = "spec")]
pub(crate) enum VersionedInstanceSpec {
    V0(InstanceSpecV1),
}

impl TryFrom<InstanceSpec> for VersionedInstanceSpec {
    type Error = &'static str;

    fn try_from(spec: InstanceSpec) -> Result<Self, Self::Error> {
        Ok(Self::V0(InstanceSpecV1 { board: spec.board, components: older(spec.components)? }))
    }
}

impl TryFrom<InstanceSpec> for InstanceSpecV2 {
    type Error = &'static str;

    fn try_from(spec: InstanceSpec) -> Result<Self, Self::Error> {
        Ok(Self { board: spec.board, components: older(spec.components)?, smbios: spec.smbios })
    }
}

/// An old version's answer about an instance and its spec.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "InstanceSpecGetResponse")]
pub(crate) struct OldSpecGetResponse<S> {
    properties: InstanceProperties,
    state: InstanceState,
    spec: OldSpecStatus<S>,
}

/// Whether the spec is known, in an old version's shape.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "type", content = "value")]
#[schemars(rename = "InstanceSpecStatus")]
enum OldSpecStatus<S> {
    WaitingForMigrationSource,
    Present(S),
}

impl<S: TryFrom<InstanceSpec, Error = &'static str>> TryFrom<InstanceSpecGetResponse>
    for OldSpecGetResponse<S>
{
    type Error = &'static str;

    fn try_from(response: InstanceSpecGetResponse) -> Result<Self, Self::Error> {
        let spec = match response.spec {
            InstanceSpecStatus::WaitingForMigrationSource => OldSpecStatus::WaitingForMigrationSource,
            InstanceSpecStatus::Present(spec) => OldSpecStatus::Present(spec.try_into()?),
        };
        Ok(Self { properties: response.properties, state: response.state, spec })
    }
}

/// What versions before 5 answer of a disk.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "VolumeStatus")]
pub(crate) struct OldVolumeStatus {
    pub(crate) active: bool,
}

/// The reply of version 5 for a disk; the fake has no Crucible volume.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct VolumeStatus {
    pub(crate) volume_info: serde_json::Value,
}
