//! `vmkit info`.

use clap::Args;
use vmkit::VmState;
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
        let (vm, saved_bytes) = context.block_on(async {
            let vm = manager.info(&self.name).await?;
            let saved_bytes = match vm.state {
                VmState::Saved => manager.saved_bytes(&self.name).await?,
                _ => None,
            };
            Ok((vm, saved_bytes))
        })?;
        let saved_mib = saved_bytes.map(|bytes| bytes.div_ceil(1 << 20));
        match self.json {
            true => output::json(&json::VmView::of(&vm).with_saved_mib(saved_mib)),
            false => output::text(human::details(&vm, saved_mib)),
        }
    }
}
