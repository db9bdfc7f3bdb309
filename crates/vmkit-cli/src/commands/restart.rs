//! `vmkit restart`.

use clap::Args;
use vmkit::VmState;

use crate::commands::{StopTimeout, TargetArgs, plan};
use crate::context::CommandContext;
use crate::failure::Failure;

/// Stop VMs as `stop` does, and boot them again.
#[derive(Debug, Args)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    patience: StopTimeout,
    /// Print what the start would do, and change nothing.
    #[arg(long)]
    dry_run: bool,
}

impl RestartArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        if self.dry_run {
            return plan::print_start(context, self.targets);
        }
        let timeout = self.patience.timeout;
        self.targets.operate(context, "restarting", VmState::is_live, move |manager, name| async move {
            manager.restart(&name, timeout).await
        })
    }
}
