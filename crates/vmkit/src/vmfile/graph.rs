//! What depends on what: that every machine is there, and that nothing goes in a circle.
//!
//! Pure.

use super::project::MachineConfig;
use super::read::{listed, meant};
use crate::error::VmfileProblem;

/// Returns what is wrong with the machines' `depends_on`.
pub(super) fn problems(machines: &[MachineConfig]) -> Vec<VmfileProblem> {
    let mut problems = Vec::new();
    for machine in machines {
        for (index, name) in machine.depends_on.iter().enumerate() {
            if !machines.iter().any(|other| other.name == *name) {
                let shown: String = name.chars().take(60).collect();
                let message = format!(
                    "`{}` depends on `{}`, and there is no such machine",
                    machine.name,
                    shown.escape_debug()
                );
                let problem =
                    VmfileProblem::new(message).at(machine.place(&format!("depends_on[{index}]")), "");
                problems.push(problem.help(which_machine(name, machines)));
            }
        }
    }
    if problems.is_empty() {
        problems.extend(circle(machines));
    }
    problems
}

/// Returns a hint for a machine's name that does not exist.
pub(super) fn which_machine(name: &str, machines: &[MachineConfig]) -> String {
    let names: Vec<&str> = machines.iter().map(|machine| machine.name.as_str()).collect();
    match meant(name, &names) {
        Some(meant) => format!("did you mean `{meant}`?"),
        None => format!("the machines are {}", listed(&names)),
    }
}

/// How far the search has come with a machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum VisitMark {
    New,
    /// On the way that is being followed.
    Open,
    /// Leads into no circle.
    Done,
}

/// Returns the first circle, with every machine on it.
fn circle(machines: &[MachineConfig]) -> Option<VmfileProblem> {
    let index_of = |name: &String| machines.iter().position(|machine| machine.name == *name);
    let below: Vec<Vec<usize>> =
        machines.iter().map(|machine| machine.depends_on.iter().filter_map(index_of).collect()).collect();
    let mut marks = vec![VisitMark::New; machines.len()];
    for start in 0..machines.len() {
        // The way from `start`, each with how many of its dependencies were followed; a long way
        // must not exhaust the stack.
        let mut way: Vec<(usize, usize)> = Vec::new();
        if marks[start] == VisitMark::New {
            marks[start] = VisitMark::Open;
            way.push((start, 0));
        }
        while let Some((machine, followed)) = way.last_mut() {
            let Some(&next) = below[*machine].get(*followed) else {
                marks[*machine] = VisitMark::Done;
                way.pop();
                continue;
            };
            *followed += 1;
            match marks[next] {
                VisitMark::Done => {}
                VisitMark::New => {
                    marks[next] = VisitMark::Open;
                    way.push((next, 0));
                }
                VisitMark::Open => {
                    let from = way.iter().position(|(machine, _)| *machine == next).unwrap_or_default();
                    return Some(told(machines, &way[from..]));
                }
            }
        }
    }
    None
}

fn told(machines: &[MachineConfig], circle: &[(usize, usize)]) -> VmfileProblem {
    let name = |index: usize| machines[index].name.as_str();
    let mut names: Vec<&str> = circle.iter().map(|(machine, _)| name(*machine)).collect();
    names.extend(names.first().copied());
    let place = |(machine, followed): &(usize, usize)| {
        let nth = followed.saturating_sub(1);
        machines[*machine].place(&format!("depends_on[{nth}]"))
    };
    let problem =
        VmfileProblem::new(format!("the machines depend on each other in a cycle: {}", names.join(" → ")));
    let problem = problem.at(place(&circle[0]), "").help("take one of them out of `depends_on`");
    circle[1..].iter().fold(problem, |problem, step| problem.also(place(step), ""))
}
