//! `vmkit plan`.

use clap::Args;
use vmkit::project::{PlannedAction, PlannedMachine, ProjectPlan};
use vmkit::spec::TakesEffect;

use super::telling::{warn_of_left_out, warn_of_lost};
use super::{ProjectArgs, engine};
use crate::context::CommandContext;
use crate::failure::{ErrorSubject, Failure};
use crate::{json_project, output};

/// Show what `vmkit up` would do, and change nothing.
///
/// For each change the plan says whether it takes effect at once, at the next start, or only if the
/// machine is recreated.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    which: ProjectArgs,
    /// Print the plan as a JSON object.
    #[arg(long)]
    json: bool,
}

impl PlanArgs {
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        let (project, engine) = (self.which.project()?, engine(context)?);
        let options = self.which.options();
        let plan = context.block_on_threads(async { Ok(engine.plan(&project, &options).await?) })?;
        let told = match self.json {
            true => output::json(&json_project::PlanView::of(&plan)),
            false => output::text(output::printable(text(&plan))),
        };
        warn_of_lost(&plan.lost);
        for machine in &plan.machines {
            for step in &machine.steps {
                step.left_out.iter().for_each(|path| warn_of_left_out(&machine.machine, &step.name, path));
            }
        }
        let failed = plan.machines.into_iter().filter_map(|machine| {
            let of = Box::new(ErrorSubject { called: machine.machine, vm: machine.vm, has_log: true });
            machine.action.err().map(|error| Failure::Library { of: Some(of), error })
        });
        Failure::of(failed.collect()).and(told)
    }
}

fn text(plan: &ProjectPlan) -> String {
    let width = plan.machines.iter().map(|machine| machine.machine.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for machine in &plan.machines {
        text.push_str(&format!("{:width$}  {}\n", machine.machine, headline(machine)));
        let starts = matches!(machine.action, Ok(PlannedAction::Start));
        let mut below = |line: String| text.push_str(&format!("{:width$}    {line}\n", ""));
        for change in &machine.changes {
            let (from, to) = (shown(&change.from), shown(&change.to));
            let applies = match change.applies {
                TakesEffect::NextStart if starts => "with this start".to_owned(),
                applies => applies.to_string(),
            };
            below(format!("{}: {from} -> {to}, {applies}", change.field));
        }
        for field in &machine.pending {
            below(match starts {
                true => format!("{field}: changed, with this start"),
                false => format!("{field}: changed, at the next start: `vmkit reload`"),
            });
        }
        for step in &machine.steps {
            below(format!("run `{}`: {}", step.name, step.why));
        }
    }
    for left in &plan.left {
        let state = left.state.as_ref().map_or("unknown", |state| state.name());
        text.push_str(&format!(
            "{:width$}  no longer in the file, and its VM `{}` is {state}: `vmkit up --prune` removes it\n",
            left.machine, left.vm
        ));
    }
    text
}

fn headline(machine: &PlannedMachine) -> &'static str {
    match &machine.action {
        Ok(PlannedAction::Make) => "create and start",
        Ok(PlannedAction::Recreate) => "recreate, with --recreate only: its disks are lost",
        Ok(PlannedAction::Start) => "start",
        Ok(PlannedAction::Resume) => "resume",
        Ok(_) if machine.is_unchanged() => "unchanged",
        Ok(_) if machine.changes.is_empty() => "provision",
        Ok(_) => "change",
        Err(_) => "unknown",
    }
}

fn shown(value: &str) -> &str {
    if value.is_empty() { "nothing" } else { value }
}
