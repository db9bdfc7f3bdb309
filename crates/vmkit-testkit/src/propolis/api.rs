//! The HTTP API: what a request means, and which status and words an answer has.
//!
//! Versions, request ids, limits, bodies of errors and upgrades are the framework's, which is the
//! real server's too.
//!
//! Source: propolis-server's `server` module for the words; its published description for paths and
//! shapes.

use std::sync::Arc;

use dropshot::{
    ApiDescription, ClientErrorStatusCode, HttpError, HttpResponseCreated, HttpResponseOk,
    HttpResponseUpdatedNoContent, Path, Query, RequestContext, TypedBody, WebsocketChannelResult,
    WebsocketConnection, channel, endpoint,
};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::history::{DEFAULT_BYTES, HistoryOffset};
use super::machine::{EnsureError, PropolisMachine};
use super::spec;
use super::wire::*;

type ApiContext = RequestContext<Arc<PropolisMachine>>;

/// Returns all that the server serves.
pub(super) fn api() -> ApiDescription<Arc<PropolisMachine>> {
    let mut api = ApiDescription::new();
    register(&mut api).expect("no two endpoints are the same");
    api
}

fn register(
    api: &mut ApiDescription<Arc<PropolisMachine>>,
) -> Result<(), dropshot::ApiDescriptionRegisterError> {
    api.register(instance_ensure_v1)?;
    api.register(instance_ensure_v2)?;
    api.register(instance_ensure)?;
    api.register(instance_get)?;
    api.register(instance_spec_get_v1)?;
    api.register(instance_spec_get_v2)?;
    api.register(instance_spec_get)?;
    api.register(instance_state_put)?;
    api.register(instance_state_monitor)?;
    api.register(instance_serial)?;
    api.register(instance_serial_history_get)?;
    api.register(instance_vnc)?;
    api.register(instance_migrate_start)?;
    api.register(instance_migrate_status)?;
    api.register(instance_issue_nmi)?;
    api.register(instance_issue_crucible_snapshot_request)?;
    api.register(disk_volume_status_v1)?;
    api.register(disk_volume_status)?;
    api.register(instance_issue_crucible_vcr_request)
}

fn no_instance() -> HttpError {
    let text = "Server not initialized (no instance)".to_owned();
    HttpError::for_client_error(Some("NoInstance".to_owned()), ClientErrorStatusCode::FAILED_DEPENDENCY, text)
}

async fn ensure(
    context: &ApiContext,
    request: InstanceEnsureRequest,
) -> Result<HttpResponseCreated<InstanceEnsureResponse>, HttpError> {
    if let InstanceInitializationMethod::Spec { spec } = &request.init {
        spec::check(spec).map_err(|problem| {
            let text = format!("failed to generate internal instance spec: {problem}");
            HttpError::for_bad_request(None, text)
        })?;
        if spec.board.cpuid.is_none() {
            context.context().ask_host().await.map_err(|error| {
                let problem = format!(
                    "failed to read default CPUID settings from the host: I/O error from bhyve API: {error}"
                );
                let text = format!("failed to generate internal instance spec: {problem}");
                HttpError::for_bad_request(None, text)
            })?;
        }
    }
    match context.context().ensure(request).await {
        Ok(migrate) => Ok(HttpResponseCreated(InstanceEnsureResponse { migrate })),
        Err(EnsureError::Taken) => Err(HttpError::for_client_error(
            Some("AlreadyInitialized".to_owned()),
            ClientErrorStatusCode::CONFLICT,
            "instance already initialized".to_owned(),
        )),
        Err(EnsureError::Failed(text)) => {
            Err(HttpError::for_internal_error(format!("VM initialization failed: {text}")))
        }
        Err(EnsureError::Dropped) => {
            let text = "state driver unexpectedly dropped result channel".to_owned();
            Err(HttpError::for_internal_error(text))
        }
    }
}

#[endpoint { method = PUT, path = "/instance", operation_id = "instance_ensure", versions = "1.0.0".."2.0.0" }]
async fn instance_ensure_v1(
    context: ApiContext,
    request: TypedBody<InstanceEnsureRequestV1>,
) -> Result<HttpResponseCreated<InstanceEnsureResponse>, HttpError> {
    ensure(&context, request.into_inner().into()).await
}

#[endpoint { method = PUT, path = "/instance", operation_id = "instance_ensure", versions = "2.0.0".."3.0.0" }]
async fn instance_ensure_v2(
    context: ApiContext,
    request: TypedBody<InstanceEnsureRequestV2>,
) -> Result<HttpResponseCreated<InstanceEnsureResponse>, HttpError> {
    ensure(&context, request.into_inner().into()).await
}

#[endpoint { method = PUT, path = "/instance", versions = "3.0.0".. }]
async fn instance_ensure(
    context: ApiContext,
    request: TypedBody<InstanceEnsureRequest>,
) -> Result<HttpResponseCreated<InstanceEnsureResponse>, HttpError> {
    ensure(&context, request.into_inner()).await
}

#[endpoint { method = GET, path = "/instance" }]
async fn instance_get(context: ApiContext) -> Result<HttpResponseOk<InstanceGetResponse>, HttpError> {
    let InstanceSpecGetResponse { properties, state, .. } =
        context.context().get().await.ok_or_else(no_instance)?;
    Ok(HttpResponseOk(InstanceGetResponse { instance: Instance { properties, state } }))
}

async fn old_spec<S: TryFrom<InstanceSpec, Error = &'static str>>(
    context: &ApiContext,
) -> Result<OldSpecGetResponse<S>, HttpError> {
    let response = context.context().get().await.ok_or_else(no_instance)?;
    response.try_into().map_err(|component| {
        let text = format!("the spec has a component that this API version does not know: {component}");
        HttpError::for_internal_error(text)
    })
}

#[endpoint { method = GET, path = "/instance/spec", operation_id = "instance_spec_get", versions = "1.0.0".."2.0.0" }]
async fn instance_spec_get_v1(
    context: ApiContext,
) -> Result<HttpResponseOk<OldSpecGetResponse<VersionedInstanceSpec>>, HttpError> {
    old_spec(&context).await.map(HttpResponseOk)
}

#[endpoint { method = GET, path = "/instance/spec", operation_id = "instance_spec_get", versions = "2.0.0".."3.0.0" }]
async fn instance_spec_get_v2(
    context: ApiContext,
) -> Result<HttpResponseOk<OldSpecGetResponse<InstanceSpecV2>>, HttpError> {
    old_spec(&context).await.map(HttpResponseOk)
}

#[endpoint { method = GET, path = "/instance/spec", versions = "3.0.0".. }]
async fn instance_spec_get(
    context: ApiContext,
) -> Result<HttpResponseOk<InstanceSpecGetResponse>, HttpError> {
    context.context().get().await.map(HttpResponseOk).ok_or_else(no_instance)
}

#[endpoint { method = PUT, path = "/instance/state" }]
async fn instance_state_put(
    context: ApiContext,
    request: TypedBody<InstanceStateRequested>,
) -> Result<HttpResponseUpdatedNoContent, HttpError> {
    let queued = context.context().request(request.into_inner()).ok_or_else(no_instance)?;
    queued.map(|()| HttpResponseUpdatedNoContent()).map_err(|denied| {
        // The reason stands where a code should: so it does in the real server.
        let reason = format!("instance state change not allowed: {}", denied.text());
        HttpError::for_client_error_with_status(Some(reason), ClientErrorStatusCode::FORBIDDEN)
    })
}

#[endpoint { method = GET, path = "/instance/state-monitor" }]
async fn instance_state_monitor(
    context: ApiContext,
    request: TypedBody<InstanceStateMonitorRequest>,
) -> Result<HttpResponseOk<InstanceStateMonitorResponse>, HttpError> {
    let wanted = request.into_inner().r#gen;
    let mut states = context.context().states().ok_or_else(no_instance)?;
    let state = states.wait_for(|state| state.r#gen >= wanted).await.map(|state| state.clone());
    state.map(HttpResponseOk).map_err(|_| {
        let text = format!("No instance present; will never reach generation {wanted}");
        HttpError::for_client_error(Some("NoInstance".to_owned()), ClientErrorStatusCode::GONE, text)
    })
}

#[endpoint { method = GET, path = "/instance/serial/history" }]
async fn instance_serial_history_get(
    context: ApiContext,
    query: Query<InstanceSerialConsoleHistoryRequest>,
) -> Result<HttpResponseOk<InstanceSerialConsoleHistoryResponse>, HttpError> {
    let serial = context.context().serial().ok_or_else(no_instance)?;
    let query = query.into_inner();
    let offset = HistoryOffset::of(query.from_start, query.most_recent).ok_or_else(|| {
        let text = "Exactly one of 'from_start' or 'most_recent' must be specified.".to_owned();
        HttpError::for_bad_request(None, text)
    })?;
    let max_bytes =
        query.max_bytes.map_or(DEFAULT_BYTES, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    let (data, last_byte_offset) =
        serial.read(offset, max_bytes).map_err(|lost| HttpError::for_bad_request(None, lost))?;
    Ok(HttpResponseOk(InstanceSerialConsoleHistoryResponse { data, last_byte_offset }))
}

#[channel { protocol = WEBSOCKETS, path = "/instance/serial" }]
async fn instance_serial(
    context: ApiContext,
    query: Query<InstanceSerialConsoleStreamRequest>,
    connection: WebsocketConnection,
) -> WebsocketChannelResult {
    // By now 101 has been said: without a VM, all that is left is to hang up.
    let serial = context.context().serial().ok_or("no active VM")?;
    let query = query.into_inner();
    let socket = WebSocketStream::from_raw_socket(connection.into_inner(), Role::Server, None).await;
    Ok(serial.attach(socket, HistoryOffset::of(query.from_start, query.most_recent)).await?)
}

/// No description has it. A picture there is none.
#[channel { protocol = WEBSOCKETS, path = "/instance/vnc", unpublished = true }]
async fn instance_vnc(context: ApiContext, _connection: WebsocketConnection) -> WebsocketChannelResult {
    context.context().serial().ok_or("no active VM")?;
    Err("this server is a fake and has no picture".into())
}

#[channel { protocol = WEBSOCKETS, path = "/instance/migrate/{migration_id}/start" }]
async fn instance_migrate_start(
    _context: ApiContext,
    path: Path<MigrationPath>,
    _connection: WebsocketConnection,
) -> WebsocketChannelResult {
    let MigrationPath { migration_id } = path.into_inner();
    Err(format!("this server is a fake and lets no VM go: migration {migration_id}").into())
}

#[endpoint { method = GET, path = "/instance/migration-status" }]
async fn instance_migrate_status(
    context: ApiContext,
) -> Result<HttpResponseOk<InstanceMigrateStatusResponse>, HttpError> {
    let states = context.context().states().ok_or_else(no_instance)?;
    let migration = states.borrow().migration.clone();
    Ok(HttpResponseOk(migration))
}

#[endpoint { method = POST, path = "/instance/nmi" }]
async fn instance_issue_nmi(context: ApiContext) -> Result<HttpResponseOk<()>, HttpError> {
    context.context().serial().map(|_| HttpResponseOk(())).ok_or_else(no_instance)
}

/// Returns that a disk is not one of Crucible's, as none is here.
fn no_disk<T>(context: &ApiContext, reason: String) -> Result<T, HttpError> {
    context.context().serial().ok_or_else(no_instance)?;
    Err(HttpError::for_not_found(Some(reason.clone()), reason))
}

fn no_backend<T>(context: &ApiContext, id: &str) -> Result<T, HttpError> {
    no_disk(context, format!("No crucible backend for id {id}"))
}

#[endpoint { method = POST, path = "/instance/disk/{id}/snapshot/{snapshot_id}" }]
async fn instance_issue_crucible_snapshot_request(
    context: ApiContext,
    path: Path<SnapshotPath>,
) -> Result<HttpResponseOk<()>, HttpError> {
    no_disk(&context, format!("no disk with id {}!", path.into_inner().id))
}

#[endpoint { method = GET, path = "/instance/disk/{id}/status", operation_id = "disk_volume_status", versions = "1.0.0".."5.0.0" }]
async fn disk_volume_status_v1(
    context: ApiContext,
    path: Path<DiskPath>,
) -> Result<HttpResponseOk<OldVolumeStatus>, HttpError> {
    no_backend(&context, &path.into_inner().id)
}

#[endpoint { method = GET, path = "/instance/disk/{id}/status", versions = "5.0.0".. }]
async fn disk_volume_status(
    context: ApiContext,
    path: Path<DiskPath>,
) -> Result<HttpResponseOk<VolumeStatus>, HttpError> {
    no_backend(&context, &path.into_inner().id)
}

#[endpoint { method = PUT, path = "/instance/disk/{id}/vcr" }]
async fn instance_issue_crucible_vcr_request(
    context: ApiContext,
    path: Path<DiskPath>,
    _request: TypedBody<InstanceVCRReplace>,
) -> Result<HttpResponseOk<ReplaceResult>, HttpError> {
    no_backend(&context, &path.into_inner().id)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::super::description;
    use super::api;

    /// Takes away what people read, the one-membered `allOf` that only makes room for it, and the
    /// order of alternatives.
    fn bare(value: &Value) -> Value {
        match value {
            Value::Array(items) => {
                let mut items: Vec<Value> = items.iter().map(bare).collect();
                items.sort_by_key(Value::to_string);
                Value::Array(items)
            }
            Value::Object(map) => {
                let prose = |key: &str, value: &Value| {
                    value.is_string() && matches!(key, "description" | "summary" | "contact")
                };
                let kept = map.iter().filter(|(key, value)| !prose(key, value));
                let kept: serde_json::Map<String, Value> =
                    kept.map(|(key, value)| (key.clone(), bare(value))).collect();
                match kept.get("allOf").and_then(Value::as_array).map(Vec::as_slice) {
                    Some([only]) if kept.len() == 1 => only.clone(),
                    _ => Value::Object(kept),
                }
            }
            other => other.clone(),
        }
    }

    fn generated() -> Value {
        let version = "5.0.0".parse().expect("it is a version");
        api().openapi("Oxide Propolis Server API", version).json().expect("it can be described")
    }

    #[test]
    fn the_endpoints_are_the_published_ones() {
        let (ours, published) = (bare(&generated()["paths"]), bare(&description()["paths"]));
        for (path, operations) in published.as_object().expect("paths") {
            assert_eq!(&ours[path], operations, "{path}");
        }
        assert_eq!(ours, published);
    }

    /// Crucible's volumes are left out: no answer of the fake has one.
    #[test]
    fn the_shapes_of_what_goes_over_the_wire_are_the_published_ones() {
        let schemas = |description: &Value| -> BTreeMap<String, Value> {
            let ours = |name: &str| {
                !name.starts_with("Volume") && !name.starts_with("Downstairs") && name != "UpstairsInfoStatus"
            };
            let schemas = description["components"]["schemas"].as_object().expect("schemas");
            schemas
                .iter()
                .filter(|(name, _)| ours(name))
                .map(|(name, schema)| (name.clone(), bare(schema)))
                .collect()
        };
        let (ours, published) = (schemas(&generated()), schemas(description()));
        for (name, schema) in &published {
            assert_eq!(ours.get(name), Some(schema), "{name}");
        }
        assert_eq!(ours.keys().collect::<Vec<_>>(), published.keys().collect::<Vec<_>>());
    }
}
