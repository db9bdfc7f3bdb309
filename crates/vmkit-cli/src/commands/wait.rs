//! `vmkit wait`.

use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use vmkit::WaitCondition;
use vmkit::spec::VmName;

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::values::seconds;
use crate::{json, output};

/// Wait until a condition holds; a VM that is not started yet is waited for, too.
///
/// `running`: the vCPUs run. `agent`: the guest agent replies. `ssh`: the guest's SSH server sends
/// its banner. `stopped`: no guest runs.
#[derive(Debug, Args)]
pub(crate) struct WaitArgs {
    /// The VM.
    pub(super) name: VmName,
    /// The condition.
    #[arg(value_parser = conditions())]
    condition: WaitCondition,
    /// The timeout.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    #[arg(allow_negative_numbers = true)]
    timeout: Duration,
    /// Print the VM afterwards, as a JSON object.
    #[arg(long)]
    json: bool,
}

impl WaitArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let manager = context.manager()?;
        output::progress(format_args!("{}: waiting until it is `{}` …", self.name, self.condition));
        let vm =
            context.block_on(async { Ok(manager.wait(&self.name, self.condition, self.timeout).await?) })?;
        match self.json {
            true => output::json(&json::VmView::of(&vm)),
            false => Ok(()),
        }
    }
}

fn conditions() -> impl TypedValueParser<Value = WaitCondition> {
    PossibleValuesParser::new(WaitCondition::ALL.iter().map(|condition| condition.as_str()))
        .try_map(|name| name.parse::<WaitCondition>())
}
