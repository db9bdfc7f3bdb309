//! `vmkit start`.

use clap::Args;

use crate::commands::{TargetArgs, plan};
use crate::context::CommandContext;
use crate::failure::Failure;

/// Boot VMs, or continue saved ones; a running VM stays as it is.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    targets: TargetArgs,
    /// Print what would be done, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Run cloud-init again, as on a new machine; a running VM does so at its next start
    #[arg(long)]
    rerun_cloud_init: bool,
    /// Boot a saved VM without its memory, as after a power cut
    #[arg(long)]
    discard_saved: bool,
}

impl StartArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        if self.dry_run {
            return plan::print_start(context, self.targets);
        }
        let (again, discard) = (self.rerun_cloud_init, self.discard_saved);
        self.targets.operate(
            context,
            "starting",
            |state| !state.is_live(),
            move |manager, name| async move {
                if again {
                    manager.rerun_cloud_init(&name).await?;
                }
                if discard {
                    manager.discard_saved(&name).await?;
                }
                manager.start(&name).await
            },
        )
    }
}
