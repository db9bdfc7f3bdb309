//! The JSON Schema of the format, for editors to complete and check a file by.
//!
//! Pure.

use schemars::generate::SchemaSettings;
use serde_json::Value;

use super::raw::File;

/// Answers the JSON Schema (2020-12) of a `vmkit.toml`.
///
/// It is made from the types that read the file. What it can't express is what does not go together, such as two machines
/// that want one port of the host.
pub fn schema() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = generator.into_root_schema_for::<File>();
    schema.insert("title".to_owned(), "vmkit.toml".into());
    schema.to_value()
}
