//! `vmkit schema`.

use clap::Args;

use crate::failure::Failure;
use crate::output;

/// Print the JSON Schema of vmkit.toml, for editors.
///
/// An editor that supports the schema completes a vmkit.toml and marks its errors. The first line
/// of the file refers to the schema: #:schema PATH.
#[derive(Debug, Args)]
pub(crate) struct SchemaArgs {}

impl SchemaArgs {
    pub(crate) fn run(self) -> Result<(), Failure> {
        output::text(crate::schema())
    }
}
