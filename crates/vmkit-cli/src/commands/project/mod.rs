//! The commands for the machines that a file describes.

pub(super) mod down;
pub(super) mod plan;
pub(super) mod provision;
pub(super) mod reload;
pub(super) mod status;
pub(super) mod up;

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use vmkit::image::PullProgress;
use vmkit::project::{End, Happening, Listener, MachineReport, Options, ProjectManager, Report, SshGuests};
use vmkit::vmfile::{self, Project};
use vmkit::{Error, RouterHypervisor};

use crate::context::Context;
use crate::failure::{Failure, Whose};
use crate::places::absolute;
use crate::{images, json_project, output, progress};

/// What a file of machines is called where none is named.
const FILE: &str = "vmkit.toml";
/// The exit code of a command that was interrupted, as a shell has it: 128 and the number of SIGINT.
const INTERRUPTED: u8 = 130;

/// The machines that a command is about, and the file that describes them.
#[derive(Debug, Args)]
pub(super) struct Which {
    /// Names the machines as the file does [default: all of them].
    #[arg(value_name = "MACHINE")]
    machines: Vec<String>,
    /// Reads this file [default: vmkit.toml in this folder, or in the nearest one above].
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl Which {
    /// Reads the file.
    fn project(&self) -> Result<Project, Error> {
        let path = match &self.file {
            Some(path) => absolute("file", path)?,
            None => found_above(&env::current_dir().map_err(Error::io("find", "the current directory"))?)?,
        };
        vmfile::load(&path_of_its_own(&path))
    }

    fn options(&self) -> Options {
        let mut options = Options::default();
        options.machines.clone_from(&self.machines);
        options
    }
}

/// Answers the file of machines in a folder, or in the nearest one above it.
fn found_above(folder: &Path) -> Result<PathBuf, Error> {
    let found = folder.ancestors().map(|folder| folder.join(FILE)).find(|path| path.exists());
    found.ok_or_else(|| {
        let expected = "there is none in this folder or above it: write one, or name it with --file";
        Error::invalid("file", FILE, expected)
    })
}

/// Answers the one path that a file has whichever way one came to its folder: machines are known by it.
fn path_of_its_own(path: &Path) -> PathBuf {
    let (folder, name) = (path.parent().map(fs::canonicalize), path.file_name());
    match (folder, name) {
        (Some(Ok(folder)), Some(name)) => folder.join(name),
        _ => path.to_owned(),
    }
}

/// Answers the manager of projects.
fn engine(context: &Context) -> Result<ProjectManager<RouterHypervisor, SshGuests<RouterHypervisor>>, Error> {
    let manager = context.manager()?;
    let images = images::store(manager.home())?;
    Ok(ProjectManager::new(manager.clone(), SshGuests::new(manager), images))
}

/// Does the work to its end, or until somebody presses Ctrl-C: then all stays as it is, and the same command goes on from there.
fn done_or_interrupted<T>(
    context: &Context,
    command: &str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Failure> {
    match context.block_on_until_interrupted(async { Ok(work.await?) })? {
        Some(done) => Ok(done),
        None => {
            output::status(format_args!(
                "interrupted: `vmkit {command}` again goes on from here; what runs in a guest goes on until then"
            ));
            Err(Failure::Exit(INTERRUPTED))
        }
    }
}

/// Answers who prints what happens: the lines of the steps in any case, all else to a person.
fn printer(project: &Project) -> Listener {
    let width = project.machines.iter().map(|machine| machine.name.chars().count()).max().unwrap_or(0);
    let project = project.name.clone();
    let pulls = Mutex::new(BTreeMap::new());
    Arc::new(move |event| {
        let machine = event.machine.unwrap_or_default();
        match event.what {
            Happening::Queued { holder } => {
                let by = holder.map_or_else(String::new, |pid| format!(" by process {pid}"));
                output::status(format_args!("waiting for the project `{project}`, which is in use{by} …"));
            }
            Happening::Output { line, .. } => output::line(format_args!("{machine:width$} | {line}")),
            Happening::Step { name, why } => {
                output::line(format_args!("{machine:width$} > {name} ({why})"));
            }
            Happening::Image => output::progress(format_args!("{machine:width$} : looking for its image …")),
            Happening::Pulling(now) => {
                let mut pulls = pulls.lock().unwrap_or_else(PoisonError::into_inner);
                let told = pulls.entry(machine.clone()).or_insert(0);
                if let Some(tenths) = tenths(now).filter(|tenths| tenths > told) {
                    *told = tenths;
                    let total = progress::bytes(now.total_bytes.unwrap_or_default());
                    output::progress(format_args!("{machine:width$} : {tenths}0% of {total} fetched"));
                }
            }
            Happening::Making => output::progress(format_args!("{machine:width$} : making …")),
            Happening::Removing => output::progress(format_args!("{machine:width$} : removing …")),
            Happening::Starting => output::progress(format_args!("{machine:width$} : starting …")),
            Happening::Stopping => output::progress(format_args!("{machine:width$} : stopping …")),
            Happening::Awaiting(what) => {
                output::progress(format_args!("{machine:width$} : waiting for {what} …"));
            }
            _ => {}
        }
    })
}

/// Answers how many tenths of an image are there. A line is printed for each: machines that fetch side by side leave no room for
/// bars.
fn tenths(now: PullProgress) -> Option<u64> {
    let total = now.total_bytes.filter(|total| *total > 0)?;
    Some(now.done_bytes.min(total).saturating_mul(10) / total)
}

/// Tells what came of it, and fails where something did.
fn tell(project: &Project, report: Report, json: bool) -> Result<(), Failure> {
    let told = match json {
        true => output::json(&json_project::Outcome::of(project, &report)),
        false => {
            report.machines.iter().for_each(tell_machine);
            Ok(())
        }
    };
    let failed = report.machines.into_iter().filter_map(|machine| match machine.end {
        End::Failed(error) => {
            let of = Box::new(Whose { called: machine.machine, vm: machine.vm });
            Some(Failure::Library { of: Some(of), error })
        }
        _ => None,
    });
    // What failed counts even where nobody reads the answer.
    Failure::of(failed.collect()).and(told)
}

fn tell_machine(report: &MachineReport) {
    let machine = &report.machine;
    match &report.end {
        End::Skipped(because) => {
            output::warning(format_args!("{machine} was left as it is, since it depends on {because}"));
        }
        End::Fine if report.done.is_empty() => output::progress(format_args!("{machine}: unchanged")),
        _ if report.done.is_empty() => {}
        _ => {
            let done: Vec<String> = report.done.iter().map(ToString::to_string).collect();
            output::progress(format_args!("{machine}: {}", done.join(", ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_file_above_is_found() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("a/b/c");
        fs::create_dir_all(&deep).unwrap();
        let error = found_above(&deep).unwrap_err().to_string();
        assert!(error.contains("--file"), "{error}");
        fs::write(temp.path().join(FILE), "").unwrap();
        assert_eq!(found_above(&deep).unwrap(), temp.path().join(FILE));
        fs::write(temp.path().join("a/b").join(FILE), "").unwrap();
        assert_eq!(found_above(&deep).unwrap(), temp.path().join("a/b").join(FILE));
    }

    #[test]
    fn a_file_has_one_path_by_whatever_way_one_comes_to_it() {
        let temp = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(temp.path()).unwrap().join("real");
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, temp.path().join("link")).unwrap();
        for way in ["real/vmkit.toml", "link/vmkit.toml", "real/../link/vmkit.toml"] {
            assert_eq!(path_of_its_own(&temp.path().join(way)), real.join(FILE));
        }
    }
}
