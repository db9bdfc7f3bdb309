//! The JSON Schema of the format, for editors to complete and check a file by.
//!
//! Pure.

use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::raw::File;

/// Answers the JSON Schema (2020-12) of a `vmkit.toml`.
///
/// It is made from the types that read the file. What it can't express is what does not go together, such as two machines
/// that want one port of the host.
pub fn schema() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = generator.into_root_schema_for::<File>().to_value();
    schema["title"] = json!("vmkit.toml");
    // What the types leave to whoever puts the machines together, and a schema can say.
    schema["required"] = json!(["version", "machine"]);
    schema["properties"]["machine"]["minProperties"] = json!(1);
    schema["properties"]["machine"]["propertyNames"] = json!({ "pattern": NAME });
    schema["$defs"]["Project"]["properties"]["name"]["pattern"] = json!(NAME);
    let one_of = ["shell", "script", "copy"].map(|action| json!({ "required": [action] }));
    schema["$defs"]["Step"]["oneOf"] = json!(one_of);
    schema
}

/// What names a VM; so do a project and a machine, joined.
const NAME: &str = "^[a-z0-9][a-z0-9-]{0,62}$";
