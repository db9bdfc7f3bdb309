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
/// Machines come up after those that they depend on, and in parallel otherwise; unchanged machines
/// stay as they are. A change that can't be applied to a running machine takes effect at its next
/// start: `vmkit reload` restarts it. If interrupted, run it again to continue. Each stage is
/// reported on standard error when it starts; at the end, what was done, how to log in, and what
/// waits for the next start.
#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    which: ProjectArgs,
    /// Recreate machines if a change requires it; their disks are lost
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
