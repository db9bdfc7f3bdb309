//! `vmkit suspend`.

use clap::Args;
use vmkit::VmState;

use crate::commands::TargetArgs;
use crate::context::CommandContext;
use crate::failure::Failure;

/// Pause the vCPUs of VMs; the guests keep their memory, or have it on disk.
#[derive(Debug, Args)]
pub(crate) struct SuspendArgs {
    #[command(flatten)]
    targets: TargetArgs,
    /// Write the guests' memory to disk and end their processes; `start` continues them
    #[arg(long)]
    to_disk: bool,
}

impl SuspendArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        if self.to_disk {
            return self.targets.operate(context, "saving", VmState::is_live, |manager, name| async move {
                manager.save(&name).await
            });
        }
        self.targets.operate(
            context,
            "suspending",
            |state| *state == VmState::Running,
            |manager, name| async move { manager.suspend(&name).await },
        )
    }
}
