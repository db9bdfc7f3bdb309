//! The shapes that the commands for files of machines print with `--json`. They are promised:
//! `docs/json.md` describes them.

use std::path::Path;

use serde::Serialize;
use vmkit::project::{
    MachineAction, MachineOutcome, MachineReport, MachineStatus, OrphanedVm, PlannedMachine, PlannedStep,
    ProjectPlan, ProjectReport, RemovedMachine, StepReason,
};
use vmkit::spec::SpecChange;
use vmkit::vmfile::Project;

use crate::json::{ErrorView, ForwardView, forwards};

/// What was done: `up`, `down`, `reload`, `provision`.
#[derive(Serialize)]
pub(crate) struct OutcomeView<'a> {
    project: &'a str,
    file: &'a Path,
    machines: Vec<MachineView<'a>>,
    lost: Vec<LostVm<'a>>,
}

#[derive(Serialize)]
struct MachineView<'a> {
    machine: &'a str,
    vm: &'a str,
    /// `done`, `unchanged`, `failed` or `skipped`.
    outcome: &'static str,
    done: Vec<ActionView<'a>>,
    pending: &'a [String],
    anew: &'a [String],
    skipped_for: Option<&'a str>,
    error: Option<ErrorView>,
}

#[derive(Serialize)]
struct ActionView<'a> {
    what: &'static str,
    fields: &'a [String],
    step: Option<&'a str>,
}

impl<'a> OutcomeView<'a> {
    pub(crate) fn of(project: &'a Project, report: &'a ProjectReport) -> Self {
        let machines = report.machines.iter().map(MachineView::of).collect();
        Self { project: &project.name, file: &project.file, machines, lost: lost(&report.lost) }
    }
}

impl<'a> MachineView<'a> {
    fn of(report: &'a MachineReport) -> Self {
        let outcome = match &report.end {
            MachineOutcome::Fine if report.done.is_empty() => "unchanged",
            MachineOutcome::Fine => "done",
            MachineOutcome::Skipped(_) => "skipped",
            _ => "failed",
        };
        Self {
            machine: &report.machine,
            vm: report.vm.as_str(),
            outcome,
            done: report.done.iter().map(ActionView::of).collect(),
            pending: &report.pending,
            anew: &report.anew,
            skipped_for: match &report.end {
                MachineOutcome::Skipped(because) => Some(because),
                _ => None,
            },
            error: match &report.end {
                MachineOutcome::Failed(error) => Some(ErrorView::of(error)),
                _ => None,
            },
        }
    }
}

impl<'a> ActionView<'a> {
    fn of(done: &'a MachineAction) -> Self {
        let bare = |what| ActionView { what, fields: &[], step: None };
        match done {
            MachineAction::Made => bare("made"),
            MachineAction::Removed => bare("removed"),
            MachineAction::Started => bare("started"),
            MachineAction::Resumed => bare("resumed"),
            MachineAction::Stopped => bare("stopped"),
            MachineAction::Changed(fields) => ActionView { fields, ..bare("changed") },
            MachineAction::Recorded(fields) => ActionView { fields, ..bare("recorded") },
            MachineAction::Ran(step) => ActionView { step: Some(step), ..bare("ran") },
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

fn lost(lost: &[OrphanedVm]) -> Vec<LostVm<'_>> {
    lost.iter()
        .map(|lost| LostVm { machine: &lost.machine, vm: lost.vm.as_str(), file: &lost.file })
        .collect()
}

/// What `up` would do: `plan`.
#[derive(Serialize)]
pub(crate) struct PlanView<'a> {
    project: &'a str,
    file: &'a Path,
    machines: Vec<PlannedView<'a>>,
    left: Vec<OrphanView<'a>>,
    lost: Vec<LostVm<'a>>,
}

#[derive(Serialize)]
struct PlannedView<'a> {
    machine: &'a str,
    vm: &'a str,
    state: Option<&'static str>,
    action: Option<&'static str>,
    changes: &'a [SpecChange],
    pending: &'a [String],
    steps: Vec<StepView<'a>>,
    error: Option<ErrorView>,
}

#[derive(Serialize)]
struct StepView<'a> {
    name: &'a str,
    why: &'a StepReason,
    left_out: Vec<String>,
}

#[derive(Serialize)]
struct OrphanView<'a> {
    machine: &'a str,
    vm: &'a str,
    state: Option<&'static str>,
}

impl<'a> PlanView<'a> {
    pub(crate) fn of(plan: &'a ProjectPlan) -> Self {
        Self {
            project: &plan.project,
            file: &plan.file,
            machines: plan.machines.iter().map(PlannedView::of).collect(),
            left: plan.left.iter().map(OrphanView::of).collect(),
            lost: lost(&plan.lost),
        }
    }
}

impl<'a> PlannedView<'a> {
    fn of(planned: &'a PlannedMachine) -> Self {
        Self {
            machine: &planned.machine,
            vm: planned.vm.as_str(),
            state: planned.state.as_ref().map(|state| state.name()),
            action: planned.action.as_ref().ok().map(|action| action.as_str()),
            changes: &planned.changes,
            pending: &planned.pending,
            steps: steps(&planned.steps),
            error: planned.action.as_ref().err().map(ErrorView::of),
        }
    }
}

impl<'a> OrphanView<'a> {
    fn of(left: &'a RemovedMachine) -> Self {
        let state = left.state.as_ref().map(|state| state.name());
        Self { machine: &left.machine, vm: left.vm.as_str(), state }
    }
}

fn steps(steps: &[PlannedStep]) -> Vec<StepView<'_>> {
    let left_out = |step: &PlannedStep| -> Vec<_> {
        step.left_out.iter().map(|path| path.to_string_lossy().into_owned()).collect()
    };
    steps.iter().map(|step| StepView { name: &step.name, why: &step.why, left_out: left_out(step) }).collect()
}

/// How a machine is: `status`.
#[derive(Serialize)]
pub(crate) struct StatusView<'a> {
    machine: &'a str,
    vm: &'a str,
    /// `null` where there is no VM.
    state: Option<&'static str>,
    address: Option<&'a str>,
    forwards: Vec<ForwardView>,
    ready: Option<bool>,
    unready: Option<NotReadyView<'a>>,
    provisioning: Option<ProvisioningView<'a>>,
    pending: &'a [String],
    error: Option<ErrorView>,
}

#[derive(Serialize)]
struct NotReadyView<'a> {
    probe: &'a str,
    how: &'a str,
}

#[derive(Serialize)]
struct ProvisioningView<'a> {
    done: &'a [String],
    to_do: Vec<StepView<'a>>,
    failed: Option<FailedView<'a>>,
}

#[derive(Serialize)]
struct FailedView<'a> {
    step: &'a str,
    how: &'a str,
}

/// Returns how the machines are.
pub(crate) fn statuses(statuses: &[MachineStatus]) -> Vec<StatusView<'_>> {
    statuses.iter().map(StatusView::of).collect()
}

impl<'a> StatusView<'a> {
    fn of(status: &'a MachineStatus) -> Self {
        let vm = status.handle.as_ref().ok().and_then(Option::as_ref);
        let provisioning = status.provisioning.as_ref().map(|provisioning| ProvisioningView {
            done: &provisioning.done,
            to_do: steps(&provisioning.to_do),
            failed: provisioning.failed.as_ref().map(|(step, how)| FailedView { step, how }),
        });
        Self {
            machine: &status.machine,
            vm: status.vm.as_str(),
            state: vm.map(|vm| vm.state.name()),
            address: status.address.as_deref(),
            forwards: vm.map(forwards).unwrap_or_default(),
            ready: status.ready,
            unready: status.unready.as_ref().map(|lack| NotReadyView { probe: &lack.probe, how: &lack.how }),
            provisioning,
            pending: &status.pending,
            error: status.handle.as_ref().err().map(ErrorView::of),
        }
    }
}
