//! The shapes that the commands for files of machines print with `--json`. They are promised:
//! `docs/json.md` describes them.

use std::path::Path;

use serde::Serialize;
use vmkit::project::{
    Done, End, Leftover, Lost, MachineReport, MachineStatus, PlannedMachine, PlannedStep, ProjectPlan,
    Report, Why,
};
use vmkit::spec::Change;
use vmkit::vmfile::Project;

use crate::json::{Forward, Problem, forwards};

/// What was done: `up`, `down`, `reload`, `provision`.
#[derive(Serialize)]
pub(crate) struct Outcome<'a> {
    project: &'a str,
    file: &'a Path,
    machines: Vec<Machine<'a>>,
    lost: Vec<LostVm<'a>>,
}

#[derive(Serialize)]
struct Machine<'a> {
    machine: &'a str,
    vm: &'a str,
    /// `done`, `unchanged`, `failed` or `skipped`.
    outcome: &'static str,
    done: Vec<Deed<'a>>,
    pending: &'a [String],
    anew: &'a [String],
    skipped_for: Option<&'a str>,
    error: Option<Problem>,
}

#[derive(Serialize)]
struct Deed<'a> {
    what: &'static str,
    fields: &'a [String],
    step: Option<&'a str>,
}

impl<'a> Outcome<'a> {
    pub(crate) fn of(project: &'a Project, report: &'a Report) -> Self {
        let machines = report.machines.iter().map(Machine::of).collect();
        Self { project: &project.name, file: &project.file, machines, lost: lost(&report.lost) }
    }
}

impl<'a> Machine<'a> {
    fn of(report: &'a MachineReport) -> Self {
        let outcome = match &report.end {
            End::Fine if report.done.is_empty() => "unchanged",
            End::Fine => "done",
            End::Skipped(_) => "skipped",
            _ => "failed",
        };
        Self {
            machine: &report.machine,
            vm: report.vm.as_str(),
            outcome,
            done: report.done.iter().map(Deed::of).collect(),
            pending: &report.pending,
            anew: &report.anew,
            skipped_for: match &report.end {
                End::Skipped(because) => Some(because),
                _ => None,
            },
            error: match &report.end {
                End::Failed(error) => Some(Problem::of(error)),
                _ => None,
            },
        }
    }
}

impl<'a> Deed<'a> {
    fn of(done: &'a Done) -> Self {
        let bare = |what| Deed { what, fields: &[], step: None };
        match done {
            Done::Made => bare("made"),
            Done::Removed => bare("removed"),
            Done::Started => bare("started"),
            Done::Resumed => bare("resumed"),
            Done::Stopped => bare("stopped"),
            Done::Changed(fields) => Deed { fields, ..bare("changed") },
            Done::Recorded(fields) => Deed { fields, ..bare("recorded") },
            Done::Ran(step) => Deed { step: Some(step), ..bare("ran") },
            _ => bare("other"),
        }
    }
}

/// The VM of a machine whose file is no longer there.
#[derive(Serialize)]
struct LostVm<'a> {
    machine: &'a str,
    vm: &'a str,
    file: &'a Path,
}

fn lost(lost: &[Lost]) -> Vec<LostVm<'_>> {
    lost.iter()
        .map(|lost| LostVm { machine: &lost.machine, vm: lost.vm.as_str(), file: &lost.file })
        .collect()
}

/// What `up` would do: `plan`.
#[derive(Serialize)]
pub(crate) struct Plan<'a> {
    project: &'a str,
    file: &'a Path,
    machines: Vec<Planned<'a>>,
    left: Vec<Left<'a>>,
    lost: Vec<LostVm<'a>>,
}

#[derive(Serialize)]
struct Planned<'a> {
    machine: &'a str,
    vm: &'a str,
    state: Option<&'static str>,
    action: Option<&'static str>,
    changes: &'a [Change],
    pending: &'a [String],
    steps: Vec<Step<'a>>,
    error: Option<Problem>,
}

#[derive(Serialize)]
struct Step<'a> {
    name: &'a str,
    why: &'a Why,
    left_out: Vec<String>,
}

#[derive(Serialize)]
struct Left<'a> {
    machine: &'a str,
    vm: &'a str,
    state: Option<&'static str>,
}

impl<'a> Plan<'a> {
    pub(crate) fn of(plan: &'a ProjectPlan) -> Self {
        Self {
            project: &plan.project,
            file: &plan.file,
            machines: plan.machines.iter().map(Planned::of).collect(),
            left: plan.left.iter().map(Left::of).collect(),
            lost: lost(&plan.lost),
        }
    }
}

impl<'a> Planned<'a> {
    fn of(planned: &'a PlannedMachine) -> Self {
        Self {
            machine: &planned.machine,
            vm: planned.vm.as_str(),
            state: planned.state.as_ref().map(|state| state.name()),
            action: planned.action.as_ref().ok().map(|action| action.as_str()),
            changes: &planned.changes,
            pending: &planned.pending,
            steps: steps(&planned.steps),
            error: planned.action.as_ref().err().map(Problem::of),
        }
    }
}

impl<'a> Left<'a> {
    fn of(left: &'a Leftover) -> Self {
        let state = left.state.as_ref().map(|state| state.name());
        Self { machine: &left.machine, vm: left.vm.as_str(), state }
    }
}

fn steps(steps: &[PlannedStep]) -> Vec<Step<'_>> {
    let left_out = |step: &PlannedStep| -> Vec<_> {
        step.left_out.iter().map(|path| path.to_string_lossy().into_owned()).collect()
    };
    steps.iter().map(|step| Step { name: &step.name, why: &step.why, left_out: left_out(step) }).collect()
}

/// How a machine is: `status`.
#[derive(Serialize)]
pub(crate) struct Status<'a> {
    machine: &'a str,
    vm: &'a str,
    /// `null` where there is no VM.
    state: Option<&'static str>,
    address: Option<&'a str>,
    forwards: Vec<Forward>,
    ready: Option<bool>,
    unready: Option<Lack<'a>>,
    provisioning: Option<Provisioning<'a>>,
    pending: &'a [String],
    error: Option<Problem>,
}

#[derive(Serialize)]
struct Lack<'a> {
    probe: &'a str,
    how: &'a str,
}

#[derive(Serialize)]
struct Provisioning<'a> {
    done: &'a [String],
    to_do: Vec<Step<'a>>,
    failed: Option<Failed<'a>>,
}

#[derive(Serialize)]
struct Failed<'a> {
    step: &'a str,
    how: &'a str,
}

/// Returns how the machines are.
pub(crate) fn statuses(statuses: &[MachineStatus]) -> Vec<Status<'_>> {
    statuses.iter().map(Status::of).collect()
}

impl<'a> Status<'a> {
    fn of(status: &'a MachineStatus) -> Self {
        let vm = status.handle.as_ref().ok().and_then(Option::as_ref);
        let provisioning = status.provisioning.as_ref().map(|provisioning| Provisioning {
            done: &provisioning.done,
            to_do: steps(&provisioning.to_do),
            failed: provisioning.failed.as_ref().map(|(step, how)| Failed { step, how }),
        });
        Self {
            machine: &status.machine,
            vm: status.vm.as_str(),
            state: vm.map(|vm| vm.state.name()),
            address: status.address.as_deref(),
            forwards: vm.map(forwards).unwrap_or_default(),
            ready: status.ready,
            unready: status.unready.as_ref().map(|lack| Lack { probe: &lack.probe, how: &lack.how }),
            provisioning,
            pending: &status.pending,
            error: status.handle.as_ref().err().map(Problem::of),
        }
    }
}
