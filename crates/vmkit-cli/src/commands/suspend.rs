//! `vmkit suspend`.

use clap::Args;
use vmkit::VmState;

use crate::commands::Targets;
use crate::context::Context;
use crate::failure::Failure;

/// Pause the vCPUs of VMs; the guests keep their memory.
#[derive(Debug, Args)]
pub(crate) struct Suspend {
    #[command(flatten)]
    targets: Targets,
}

impl Suspend {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        self.targets.operate(
            context,
            "suspending",
            |state| *state == VmState::Running,
            |manager, name| async move { manager.suspend(&name).await },
        )
    }
}
