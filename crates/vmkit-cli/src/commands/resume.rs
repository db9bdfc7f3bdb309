//! `vmkit resume`.

use clap::Args;
use vmkit::VmState;

use crate::commands::TargetArgs;
use crate::context::CommandContext;
use crate::failure::Failure;

/// Resume suspended and saved VMs, and set the guests' clocks.
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    targets: TargetArgs,
}

impl ResumeArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        self.targets.operate(
            context,
            "resuming",
            |state| matches!(state, VmState::Suspended | VmState::Saved),
            |manager, name| async move { manager.resume(&name).await },
        )
    }
}
