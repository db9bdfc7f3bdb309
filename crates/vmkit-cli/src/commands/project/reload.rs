//! `vmkit reload`.

use clap::Args;

use super::telling::{ProjectRequest, printer, tell};
use super::{ProjectArgs, done_or_interrupted, engine};
use crate::commands::StopTimeout;
use crate::context::CommandContext;
use crate::failure::Failure;

/// Shut down the machines of a file and bring them up again, so that all changes in the file take
/// effect.
///
/// A machine that would have to be recreated stays running.
#[derive(Debug, Args)]
pub(crate) struct ReloadArgs {
    #[command(flatten)]
    which: ProjectArgs,
    /// Recreate machines if a change requires it; their disks are lost
    #[arg(long)]
    recreate: bool,
    #[command(flatten)]
    patience: StopTimeout,
    /// Print what was done as a JSON object.
    #[arg(long)]
    json: bool,
}

impl ReloadArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let mut options = self.which.options();
        options.recreate = self.recreate;
        options.stop_timeout = self.patience.timeout;
        let reload = engine.reload(&project, &options, printer(&project));
        // After an interruption, `up` starts what is down; another `reload` would stop the rest
        // again.
        let report = done_or_interrupted(context, "up", reload)?;
        tell(&project, report, ProjectRequest::Up, self.json)
    }
}
