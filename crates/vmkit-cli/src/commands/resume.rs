//! `vmkit resume`.

use clap::Args;
use vmkit::VmState;

use crate::commands::Targets;
use crate::context::Context;
use crate::failure::Failure;

/// Resume the vCPUs of suspended VMs, and set the guests' clocks.
#[derive(Debug, Args)]
pub(crate) struct Resume {
    #[command(flatten)]
    targets: Targets,
}

impl Resume {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        self.targets.operate(
            context,
            "resuming",
            |state| *state == VmState::Suspended,
            |manager, name| async move { manager.resume(&name).await },
        )
    }
}
