//! `vmkit stop`.

use clap::Args;
use vmkit::VmState;

use crate::commands::{Patience, Targets};
use crate::context::Context;
use crate::failure::Failure;

/// Shut VMs down: ask the guest to power off, and end it by force at the deadline.
#[derive(Debug, Args)]
pub(crate) struct Stop {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    patience: Patience,
}

impl Stop {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let timeout = self.patience.timeout;
        self.targets.operate(context, "stopping", VmState::is_live, move |manager, name| async move {
            manager.stop(&name, timeout).await
        })
    }
}
