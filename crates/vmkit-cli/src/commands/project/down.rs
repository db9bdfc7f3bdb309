//! `vmkit down`.

use clap::Args;

use super::{Which, done_or_interrupted, engine, printer, tell};
use crate::commands::Patience;
use crate::context::Context;
use crate::failure::Failure;

/// Shuts down the machines of a file, those first that depend on others.
///
/// Without a name it does so to machines that the file no longer has, too.
#[derive(Debug, Args)]
pub(crate) struct Down {
    #[command(flatten)]
    which: Which,
    /// Removes their VMs as well; their disks are lost.
    #[arg(long)]
    rm: bool,
    #[command(flatten)]
    patience: Patience,
    /// Prints what was done as a JSON object.
    #[arg(long)]
    json: bool,
}

impl Down {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let mut options = self.which.options();
        options.stop_timeout = self.patience.timeout;
        let down = engine.down(&project, self.rm, &options, printer(&project));
        let report = done_or_interrupted(context, "down", down)?;
        tell(&project, report, self.json)
    }
}
