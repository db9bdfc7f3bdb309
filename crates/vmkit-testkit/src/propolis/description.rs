//! The published description of the API, and checks of requests and replies against it.
//!
//! The description is data of Propolis, kept unchanged below `data/propolis/`, for API version
//! 5.0.0. The fake's replies and vmkit's requests are both checked against it, so that they can't
//! agree on a mistake.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

const TEXT: &str = include_str!("../../data/propolis/propolis-server-5.0.0.openapi.json");

static DESCRIPTION: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(TEXT).expect("the description is JSON"));

/// Returns the description as it was published.
pub fn description() -> &'static Value {
    &DESCRIPTION
}

/// Checks that the body of a `PUT /instance` fits the published description.
///
/// # Errors
/// Says what does not fit, and where.
pub fn check_ensure_request(body: &Value) -> Result<(), String> {
    check(&json!({ "$ref": "#/components/schemas/InstanceEnsureRequest" }), body)
}

/// Checks that a reply fits the published description: that the request may have this status, and
/// that the body has the shape that goes with it.
///
/// `path` is the description's, with parameters in braces. A `body` of `None` is an empty one.
///
/// # Errors
/// Says what does not fit, and where.
pub fn check_answer(method: &str, path: &str, status: u16, body: Option<&Value>) -> Result<(), String> {
    let responses = description()
        .pointer(&format!("/paths/{}/{}/responses", escaped(path), method.to_lowercase()))
        .ok_or_else(|| format!("{method} {path} is not in the description"))?;
    let family = format!("{}XX", status / 100);
    let response = responses
        .get(status.to_string())
        .or_else(|| responses.get(&family))
        .ok_or_else(|| format!("{method} {path} does not answer {status}"))?;
    let response = match response.get("$ref").and_then(Value::as_str) {
        Some(reference) => description()
            .pointer(reference.trim_start_matches('#'))
            .ok_or_else(|| format!("{reference} is not in the description"))?,
        None => response,
    };
    match (response.pointer("/content/application~1json/schema"), body) {
        (None, None) => Ok(()),
        (Some(schema), Some(body)) => check(schema, body),
        (None, Some(body)) => Err(format!("{method} {path} answers {status} without a body, not {body}")),
        (Some(_), None) => Err(format!("{method} {path} answers {status} with a body")),
    }
}

fn escaped(path: &str) -> String {
    path.replace('~', "~0").replace('/', "~1")
}

fn check(schema: &Value, instance: &Value) -> Result<(), String> {
    let mut root = json_schema(schema);
    root["components"] = json_schema(&description()["components"]);
    let validator = jsonschema::options()
        .should_validate_formats(true)
        .build(&root)
        .map_err(|error| format!("the description can't be used: {error}"))?;
    let problems: Vec<String> = validator
        .iter_errors(instance)
        .map(|error| format!("at `{}`: {error}", error.instance_path()))
        .collect();
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

/// Converts a schema of OpenAPI 3.0 to one of JSON Schema, which has no `nullable` and no sizes of
/// integers.
fn json_schema(schema: &Value) -> Value {
    match schema {
        Value::Array(items) => items.iter().map(json_schema).collect(),
        Value::Object(map) => {
            let mut map: Map<String, Value> =
                map.iter().map(|(key, value)| (key.clone(), json_schema(value))).collect();
            let largest = match map.get("format").and_then(Value::as_str) {
                Some("uint8") => Some(u64::from(u8::MAX)),
                Some("uint32") => Some(u64::from(u32::MAX)),
                Some("uint64" | "uint") => Some(u64::MAX),
                _ => None,
            };
            if let Some(largest) = largest {
                map.insert("maximum".to_owned(), largest.into());
            }
            // An empty body is published as a string that can only be null.
            if map.get("enum") == Some(&json!([null])) {
                map.remove("type");
            }
            match map.remove("nullable") {
                Some(Value::Bool(true)) => json!({ "anyOf": [map, { "type": "null" }] }),
                _ => Value::Object(map),
            }
        }
        other => other.clone(),
    }
}
