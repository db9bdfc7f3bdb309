//! `vmkit down`.

use clap::Args;

use super::telling::{ProjectRequest, printer, tell};
use super::{ProjectArgs, done_or_interrupted, engine};
use crate::commands::StopTimeout;
use crate::context::CommandContext;
use crate::failure::Failure;

/// Shut down the machines of a file, each before those that it depends on.
///
/// Without a name this includes machines that the file no longer has. Each machine that was stopped
/// or removed is reported on standard error.
#[derive(Debug, Args)]
pub(crate) struct DownArgs {
    #[command(flatten)]
    which: ProjectArgs,
    /// Remove their VMs as well; their disks are lost.
    #[arg(long)]
    rm: bool,
    #[command(flatten)]
    patience: StopTimeout,
    /// Print what was done as a JSON object.
    #[arg(long)]
    json: bool,
}

impl DownArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let mut options = self.which.options();
        options.stop_timeout = self.patience.timeout;
        let down = engine.down(&project, self.rm, &options, printer(&project));
        let report = done_or_interrupted(context, "down", down)?;
        let asked = if self.rm { ProjectRequest::Removal } else { ProjectRequest::Down };
        tell(&project, report, asked, self.json)
    }
}
