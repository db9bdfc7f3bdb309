//! `vmkit restart`.

use clap::Args;

use crate::commands::{Patience, Targets};
use crate::context::Context;
use crate::failure::Failure;

/// Stops VMs as `stop` does, and boots them again.
#[derive(Debug, Args)]
pub(crate) struct Restart {
    #[command(flatten)]
    targets: Targets,
    #[command(flatten)]
    patience: Patience,
}

impl Restart {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let timeout = self.patience.timeout;
        self.targets.operate(context, "restarting", move |manager, name| async move {
            manager.restart(&name, timeout).await
        })
    }
}
