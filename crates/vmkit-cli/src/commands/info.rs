//! `vmkit info`.

use clap::Args;
use vmkit::spec::VmName;

use crate::context::Context;
use crate::failure::Failure;
use crate::{human, json, output};

/// Shows a VM: what it is, and the state that it has now.
#[derive(Debug, Args)]
pub(crate) struct Info {
    /// Names the VM.
    pub(super) name: VmName,
    /// Prints a JSON object.
    #[arg(long)]
    json: bool,
}

impl Info {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let manager = context.manager()?;
        let vm = context.block_on(async { Ok(manager.info(&self.name).await?) })?;
        match self.json {
            true => output::json(&json::Vm::of(&vm)),
            false => output::text(human::details(&vm)),
        }
    }
}
