//! `vmkit up`.

use clap::Args;

use super::telling::{ProjectRequest, printer, tell};
use super::{ProjectArgs, done_or_interrupted, engine};
use crate::commands::StopTimeout;
use crate::context::CommandContext;
use crate::failure::Failure;

/// Bring the machines of a file up: create what is missing, start what is stopped, apply what
/// changed.
///
/// Machines come up after those that they depend on, and side by side otherwise; what is right is
/// left alone. A change that a running machine can't take is kept for its next start:
/// `vmkit reload` does that. Interrupted at any point, it goes on when it is run again. Each stage
/// is told on standard error as it begins; at the end, what was done, the way in, and what waits
/// for the next start.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    which: ProjectArgs,
    /// Recreate machines where a change needs that; their disks are lost
    #[arg(long)]
    recreate: bool,
    /// Remove the VMs of machines that the file no longer has.
    #[arg(long)]
    prune: bool,
    #[command(flatten)]
    patience: StopTimeout,
    /// Print what was done as a JSON object.
    #[arg(long)]
    json: bool,
}

impl UpArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let mut options = self.which.options();
        options.recreate = self.recreate;
        options.prune = self.prune;
        options.stop_timeout = self.patience.timeout;
        let up = engine.up(&project, &options, printer(&project));
        let report = done_or_interrupted(context, "up", up)?;
        tell(&project, report, ProjectRequest::Up, self.json)
    }
}
