//! `vmkit reload`.

use clap::Args;

use super::telling::{Asked, printer, tell};
use super::{Which, done_or_interrupted, engine};
use crate::commands::Patience;
use crate::context::Context;
use crate::failure::Failure;

/// Shuts down the machines of a file and brings them up again, so that everything that the file says counts.
///
/// A machine that would have to be made anew is left running.
#[derive(Debug, Args)]
pub(crate) struct Reload {
    #[command(flatten)]
    which: Which,
    /// Makes machines anew where a change needs that; their disks are lost.
    #[arg(long)]
    recreate: bool,
    #[command(flatten)]
    patience: Patience,
    /// Prints what was done as a JSON object.
    #[arg(long)]
    json: bool,
}

impl Reload {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let mut options = self.which.options();
        options.recreate = self.recreate;
        options.stop_timeout = self.patience.timeout;
        let reload = engine.reload(&project, &options, printer(&project));
        // What is down by then comes up again by `up`, and `reload` would stop the rest once more.
        let report = done_or_interrupted(context, "up", reload)?;
        tell(&project, report, Asked::Up, self.json)
    }
}
