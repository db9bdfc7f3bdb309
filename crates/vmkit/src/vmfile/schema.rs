//! The JSON Schema of the format, for editors to complete and check a file by.
//!
//! Pure.

use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::raw::RawFile;

/// Returns the JSON Schema (2020-12) of a `vmkit.toml`.
///
/// It is made from the types that read the file. What it can't express is what does not go
/// together, such as two machines that want one port of the host. Its `$id` is relative: it is the
/// name of the file that it lies in, wherever that is.
pub fn schema() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = generator.into_root_schema_for::<RawFile>().to_value();
    schema["$id"] = json!("vmkit.schema.json");
    schema["title"] = json!("vmkit.toml");
    // What the types leave open, and a schema can say.
    schema["required"] = json!(["version", "machine"]);
    schema["properties"]["machine"]["minProperties"] = json!(1);
    schema["properties"]["machine"]["propertyNames"] = json!({ "pattern": NAME });
    schema["$defs"]["Project"]["properties"]["name"]["pattern"] = json!(NAME);
    let machine = &mut schema["$defs"]["Machine"]["properties"];
    machine["labels"]["propertyNames"] = json!({ "pattern": LABEL, "not": { "pattern": r"^vmkit\." } });
    machine["labels"]["additionalProperties"]["pattern"] = json!(ONE_LINE);
    let env = &mut schema["$defs"]["Step"]["properties"]["env"];
    env["propertyNames"] = json!({ "pattern": "^[A-Za-z_][A-Za-z0-9_]*$" });
    env["additionalProperties"]["pattern"] = json!(r"^[^\u0000]*$");
    schema["properties"]["defaults"]["properties"] = json!({ "depends_on": false });
    let one_of = ["shell", "script", "copy"].map(|action| json!({ "required": [action] }));
    schema["$defs"]["Step"]["oneOf"] = json!(one_of);
    schema
}

/// What names a label.
const LABEL: &str = "^[a-z0-9][a-z0-9._-]{0,62}$";
/// What has no control characters.
const ONE_LINE: &str = r"^[^\u0000-\u001f\u007f-\u009f]*$";
/// What names a VM; so do a project and a machine, joined.
const NAME: &str = "^[a-z0-9][a-z0-9-]{0,62}$";
