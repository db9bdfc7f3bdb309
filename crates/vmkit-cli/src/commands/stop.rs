//! `vmkit stop`.

use clap::Args;
use vmkit::VmState;

use crate::commands::{StopTimeout, TargetArgs};
use crate::context::CommandContext;
use crate::failure::Failure;

/// Shut VMs down: ask the guest to power off, and kill the VM after the timeout.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    targets: TargetArgs,
    #[command(flatten)]
    patience: StopTimeout,
}

impl StopArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let timeout = self.patience.timeout;
        self.targets.operate(context, "stopping", VmState::is_live, move |manager, name| async move {
            manager.stop(&name, timeout).await
        })
    }
}
