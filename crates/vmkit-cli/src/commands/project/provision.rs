//! `vmkit provision`.

use clap::Args;
use vmkit::project::Provision as What;

use super::telling::{Asked, printer, tell};
use super::{Which, done_or_interrupted, engine};
use crate::context::Context;
use crate::failure::Failure;

/// Run the copies and steps that are due in running machines, as `vmkit up` would.
#[derive(Debug, Args)]
pub(crate) struct Provision {
    #[command(flatten)]
    which: Which,
    /// Run only this step. May be repeated.
    #[arg(long = "step", value_name = "STEP")]
    steps: Vec<String>,
    /// Run what was done already, too.
    #[arg(long)]
    force: bool,
    /// Print what was done as a JSON object.
    #[arg(long)]
    json: bool,
}

impl Provision {
    pub(crate) fn run(self, context: &Context) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let what = What { steps: self.steps, force: self.force };
        let options = self.which.options();
        let provision = engine.provision(&project, &what, &options, printer(&project));
        let report = done_or_interrupted(context, "provision", provision)?;
        tell(&project, report, Asked::Provisioning, self.json)
    }
}
