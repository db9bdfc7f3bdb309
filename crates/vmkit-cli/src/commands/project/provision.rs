//! `vmkit provision`.

use clap::Args;
use vmkit::project::ProvisionPolicy;

use super::telling::{ProjectRequest, printer, tell};
use super::{ProjectArgs, done_or_interrupted, engine};
use crate::context::CommandContext;
use crate::failure::Failure;

/// Run the copies and steps that are due in running machines, as `vmkit up` would.
#[derive(Debug, Args)]
pub(crate) struct ProvisionArgs {
    #[command(flatten)]
    which: ProjectArgs,
    /// Run only this step. May be repeated.
    #[arg(long = "step", value_name = "STEP")]
    steps: Vec<String>,
    /// Also run what is done already.
    #[arg(long)]
    force: bool,
    /// Print what was done as a JSON object.
    #[arg(long)]
    json: bool,
}

impl ProvisionArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let what = ProvisionPolicy { steps: self.steps, force: self.force };
        let options = self.which.options();
        let provision = engine.provision(&project, &what, &options, printer(&project));
        let report = done_or_interrupted(context, "provision", provision)?;
        tell(&project, report, ProjectRequest::Provisioning, self.json)
    }
}
