//! `vmkit schema`.

use clap::Args;

use crate::failure::Failure;
use crate::output;

/// Print the JSON Schema of vmkit.toml, for editors.
///
/// An editor that knows the schema completes a vmkit.toml and marks what is wrong in it. Its first
/// line names the schema:
/// #:schema PATH.
#[derive(Debug, Args)]
pub(crate) struct SchemaArgs {}

impl SchemaArgs {
    pub(crate) fn run(self) -> Result<(), Failure> {
        output::text(crate::schema())
    }
}
