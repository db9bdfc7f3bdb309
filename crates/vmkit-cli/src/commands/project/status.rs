//! `vmkit status`.

use std::time::Duration;

use clap::Args;
use vmkit::VmState;
use vmkit::project::MachineStatus;

use super::telling::warn_of_lost;
use super::{ProjectArgs, engine};
use crate::context::CommandContext;
use crate::failure::{ErrorSubject, Failure};
use crate::output::TextTable;
use crate::values::seconds;
use crate::{human, json_project, output};

/// Show the machines of a file, and for each that is not ready, what is missing.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    which: ProjectArgs,
    /// How long to wait for each guest's readiness.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    #[arg(allow_negative_numbers = true)]
    timeout: Duration,
    /// Print an array with an object for each machine.
    #[arg(long)]
    json: bool,
}

impl StatusArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let options = self.which.options();
        let (statuses, lost) = context.block_on(async {
            let statuses = engine.status(&project, &options, self.timeout).await?;
            Ok((statuses, engine.lost(&project, &options).await?))
        })?;
        let told = match self.json {
            true => output::json(&json_project::statuses(&statuses)),
            false => output::text(table(&statuses)),
        };
        warn_of_lost(&lost);
        let failed = statuses.into_iter().filter_map(|status| {
            let of = Box::new(ErrorSubject { called: status.machine, vm: status.vm, has_log: true });
            status.handle.err().map(|error| Failure::Library { of: Some(of), error })
        });
        Failure::of(failed.collect()).and(told)
    }
}

fn table(statuses: &[MachineStatus]) -> TextTable {
    let mut table = TextTable::new(&["MACHINE", "STATE", "READY", "PROVISIONED", "ADDRESS", "PORTS", "NOTE"]);
    let none = || "-".to_owned();
    for status in statuses {
        let vm = status.handle.as_ref().ok().and_then(Option::as_ref);
        let state = match (&status.handle, vm) {
            (Err(_), _) => "unknown",
            (Ok(_), None) => "missing",
            (Ok(_), Some(vm)) => vm.state.name(),
        };
        let ready = match (&status.unready, status.ready) {
            (Some(lack), _) => format!("no: {}", lack.probe),
            (None, Some(_)) => "yes".to_owned(),
            (None, None) => none(),
        };
        let ports = vm.map(human::ports).filter(|ports| !ports.is_empty());
        table.row([
            status.machine.clone(),
            state.to_owned(),
            ready,
            provisioned(status).unwrap_or_else(none),
            status.address.clone().unwrap_or_else(none),
            ports.map_or_else(none, |ports| ports.join(" ")),
            note(status),
        ]);
    }
    table
}

fn provisioned(status: &MachineStatus) -> Option<String> {
    let provisioning = status.provisioning.as_ref()?;
    let is_done = |name: &String| provisioning.done.contains(name);
    let left = provisioning.to_do.iter().filter(|step| !is_done(&step.name)).count();
    let all = provisioning.done.len() + left;
    (all > 0).then(|| format!("{}/{all}", provisioning.done.len()))
}

fn note(status: &MachineStatus) -> String {
    let failed = status.provisioning.as_ref().and_then(|provisioning| provisioning.failed.as_ref());
    let mut notes = Vec::new();
    if let Ok(Some(vm)) = &status.handle
        && let VmState::Failed { cause } = &vm.state
    {
        notes.push(cause.detail.lines().next().unwrap_or_default().to_owned());
    }
    notes.extend(status.unready.as_ref().map(|lack| lack.how.clone()));
    notes.extend(failed.map(|(step, how)| format!("`{step}` failed: {how}")));
    if !status.pending.is_empty() {
        let fields = status.pending.join(", ");
        notes.push(format!("{fields}: at the next start, or by `vmkit reload {}`", status.machine));
    }
    notes.join("; ")
}
