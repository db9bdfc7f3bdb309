//! `vmkit info`.

use clap::Args;
use vmkit::spec::VmName;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{human, json, output};

/// Show a VM: its configuration, and its present state.
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// The VM.
    pub(super) name: VmName,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

impl InfoArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        let vm = context.block_on(async { Ok(manager.info(&self.name).await?) })?;
        match self.json {
            true => output::json(&json::VmView::of(&vm)),
            false => output::text(human::details(&vm)),
        }
    }
}
