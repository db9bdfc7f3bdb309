//! Prints the work on a project: each stage as it starts, and at the end a line or two for each
//! machine.
//!
//! All of it goes to standard error, in whole lines, and is the same with and without a terminal,
//! so that a log has the progress, too.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use vmkit::Error;
use vmkit::image::PullProgress;
use vmkit::project::{
    EventKind, EventListener, MachineAction, MachineOutcome, MachineReport, OrphanedVm, ProjectReport,
};
use vmkit::spec::VmName;
use vmkit::vmfile::Project;

use crate::failure::{ErrorSubject, Failure};
use crate::launching::MISSING_IN_MACHINE;
use crate::{json_project, output, progress};

/// The request, which decides what is reported at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProjectRequest {
    /// Machines run as the file describes them: `up`, `reload`.
    Up,
    /// Machines are stopped.
    Down,
    /// Machines are removed.
    Removal,
    /// Machines are provisioned.
    Provisioning,
}

impl ProjectRequest {
    /// Returns the result for a machine that needed no change.
    fn nothing(self) -> &'static str {
        match self {
            ProjectRequest::Up => "unchanged",
            ProjectRequest::Down => "was stopped already",
            ProjectRequest::Removal => "did not exist",
            ProjectRequest::Provisioning => "no step was due",
        }
    }
}

/// Returns a listener that prints the events of a project.
pub(super) fn printer(project: &Project) -> EventListener {
    let width = project.machines.iter().map(|machine| machine.name.chars().count()).max().unwrap_or(0);
    let image = |machine: &vmkit::vmfile::MachineConfig| Some((machine.name.clone(), machine.image.clone()?));
    let images: BTreeMap<String, String> = project.machines.iter().filter_map(image).collect();
    let vm = |machine: &vmkit::vmfile::MachineConfig| (machine.name.clone(), machine.vm.clone());
    let vms: BTreeMap<String, VmName> = project.machines.iter().map(vm).collect();
    let project = project.name.clone();
    let pulls = Mutex::new(BTreeMap::new());
    Arc::new(move |event| {
        let machine = event.machine.unwrap_or_default();
        let stage = match event.what {
            EventKind::Queued { holder } => {
                let by = holder.map_or_else(String::new, |pid| format!(" by process {pid}"));
                return output::line(format_args!(
                    "waiting for the project `{project}`, which is in use{by} …"
                ));
            }
            EventKind::Lost(lost) => return warn_of_lost(&lost),
            EventKind::Output { line, .. } => {
                return output::line(format_args!("{machine:width$} | {line}"));
            }
            EventKind::LeftOut { step, path } => return warn_of_left_out(&machine, &step, &path),
            EventKind::Notice(text) => {
                let vm = vms.get(&machine).map_or("", VmName::as_str);
                return output::warning(format_args!("{machine}: {text}: {MISSING_IN_MACHINE} {vm}`"));
            }
            EventKind::Step { name, why } => {
                return output::line(format_args!("{machine:width$} > {name} ({why})"));
            }
            EventKind::Image => {
                format!("image {}", images.get(&machine).map_or("", String::as_str))
            }
            EventKind::Pulling(now) => {
                let mut pulls = pulls.lock().unwrap_or_else(PoisonError::into_inner);
                let told = pulls.entry(machine.clone()).or_insert(0);
                let Some(tenths) = tenths(now).filter(|tenths| tenths > told) else { return };
                *told = tenths;
                format!("{tenths}0% of {} fetched", progress::bytes(now.total_bytes.unwrap_or_default()))
            }
            EventKind::Making => "creating the VM".to_owned(),
            EventKind::Removing => "removing the VM".to_owned(),
            EventKind::Starting => "booting".to_owned(),
            EventKind::Resuming => "resuming".to_owned(),
            EventKind::Stopping => "stopping".to_owned(),
            EventKind::Awaiting(what) => format!("waiting for {what}"),
            EventKind::Ready { after } => format!("ready in {}", progress::seconds(after)),
            _ => return,
        };
        output::line(format_args!("{machine:width$} : {stage}"));
    })
}

/// Warns of VMs whose file no longer exists, a line for each file.
pub(super) fn warn_of_lost(lost: &[OrphanedVm]) {
    let mut files: BTreeMap<_, Vec<&str>> = BTreeMap::new();
    for lost in lost {
        files.entry(&lost.file).or_default().push(lost.vm.as_str());
    }
    for (file, vms) in files {
        let are = if vms.len() == 1 { "is a VM" } else { "are VMs" };
        output::warning(format_args!(
            "`{}` {are} of {}, which no longer exists: move it back, or `vmkit rm {}`",
            vms.join("`, `"),
            file.display(),
            vms.join(" ")
        ));
    }
}

/// Warns of something that a copy left out.
pub(super) fn warn_of_left_out(machine: &str, step: &str, path: &Path) {
    output::warning(format_args!(
        "{machine}: `{step}` skips {}: it is neither a file, a directory nor a link",
        path.display()
    ));
}

/// Returns how many tenths of an image have been fetched. A line is printed for each: parallel
/// downloads leave no room for progress bars.
fn tenths(now: PullProgress) -> Option<u64> {
    let total = now.total_bytes.filter(|total| *total > 0)?;
    Some(now.done_bytes.min(total).saturating_mul(10) / total)
}

/// Prints the result, and returns an error if a machine failed.
pub(super) fn tell(
    project: &Project,
    report: ProjectReport,
    asked: ProjectRequest,
    json: bool,
) -> Result<(), Failure> {
    let told = match json {
        true => output::json(&json_project::OutcomeView::of(project, &report)),
        false => {
            report.machines.iter().for_each(|machine| tell_machine(project, machine, asked));
            Ok(())
        }
    };
    let failed = report.machines.into_iter().filter_map(|machine| match machine.end {
        MachineOutcome::Failed(error) => {
            let of = Box::new(ErrorSubject { called: machine.machine, vm: machine.vm, has_log: true });
            Some(Failure::Library { of: Some(of), error })
        }
        _ => None,
    });
    // A failure is the exit code even if standard output is closed.
    Failure::of(failed.collect()).and(told)
}

fn tell_machine(project: &Project, report: &MachineReport, asked: ProjectRequest) {
    if let MachineOutcome::Skipped(because) = &report.end {
        let machine = &report.machine;
        output::warning(format_args!("{machine} was not changed, since it depends on {because}"));
    }
    lines(project, report, asked).into_iter().for_each(output::line);
}

/// Returns the lines about a machine at the end: what was done, how to log in, and what still has
/// to happen.
fn lines(project: &Project, report: &MachineReport, asked: ProjectRequest) -> Vec<String> {
    let name = &report.machine;
    let is_waiting = |done: &&MachineAction| matches!(done, MachineAction::Recorded(_));
    let done: Vec<String> =
        report.done.iter().filter(|done| !is_waiting(done)).map(ToString::to_string).collect();
    let done = match (done.is_empty(), report.done.is_empty()) {
        (false, _) => done.join(", "),
        (true, false) => "left running".to_owned(),
        (true, true) => asked.nothing().to_owned(),
    };
    let way_in = way_in(project, report).filter(|_| asked == ProjectRequest::Up);
    let mut lines = match (&report.end, way_in) {
        (MachineOutcome::Fine, Some(way_in)) => vec![format!("{name}: {done}; {way_in}")],
        (MachineOutcome::Fine, None) => vec![format!("{name}: {done}")],
        // The guest is reachable, which helps to find out why the step failed.
        (MachineOutcome::Failed(Error::Step { .. }), Some(way_in)) => {
            let done = if report.done.is_empty() { String::new() } else { format!("{done}, and then ") };
            vec![format!("{name}: {done}a step failed; {way_in}")]
        }
        (MachineOutcome::Failed(_), _) if !report.done.is_empty() => {
            vec![format!("{name}: {done}, and then it failed")]
        }
        _ => Vec::new(),
    };
    if !report.pending.is_empty() {
        let fields = report.pending.join(", ");
        lines.push(format!("{name}: {fields}: at the next start; `vmkit reload {name}` does it now"));
    }
    lines
}

/// Returns a sentence on how to log in to a machine's guest.
fn way_in(project: &Project, report: &MachineReport) -> Option<String> {
    let (machine, vm) = (project.machine(&report.machine)?, &report.vm);
    Some(match machine.has_way_in() {
        true => format!("`vmkit shell {vm}` opens a shell"),
        false => format!("`vmkit console {vm}` attaches to it"),
    })
}
