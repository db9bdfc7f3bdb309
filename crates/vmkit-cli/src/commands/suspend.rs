//! `vmkit suspend`.

use clap::Args;
use vmkit::VmState;

use crate::commands::TargetArgs;
use crate::context::CommandContext;
use crate::failure::Failure;

/// Pause the vCPUs of VMs; the guests keep their memory.
#[derive(Debug, Args)]
pub(crate) struct SuspendArgs {
    #[command(flatten)]
    targets: TargetArgs,
}

impl SuspendArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        self.targets.operate(
            context,
            "suspending",
            |state| *state == VmState::Running,
            |manager, name| async move { manager.suspend(&name).await },
        )
    }
}
