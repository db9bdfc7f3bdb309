//! The commands for the machines that a file describes.

pub(super) mod down;
pub(super) mod plan;
pub(super) mod provision;
pub(super) mod reload;
pub(super) mod status;
mod telling;
pub(super) mod up;

use std::path::PathBuf;

use clap::Args;
use vmkit::project::{ProjectManager, ProjectOptions, SshGuests};
use vmkit::vmfile::Project;
use vmkit::{Error, RouterHypervisor};

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::{images, output, project_file};

/// The exit code of an interrupted command, as in a shell: 128 plus the number of SIGINT.
const INTERRUPTED: u8 = 130;

/// The machines that a command is about, and the file that describes them.
#[derive(Debug, Args)]
pub(super) struct ProjectArgs {
    /// The machines, by their names in the file [default: all of them].
    #[arg(value_name = "MACHINE")]
    machines: Vec<String>,
    /// Read this file, - for standard input [default: vmkit.toml in this directory, or in the
    /// nearest one above].
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
}

impl ProjectArgs {
    /// Reads the file.
    fn project(&self) -> Result<Project, Error> {
        project_file::find(self.file.as_deref())?.load()
    }

    fn options(&self) -> ProjectOptions {
        ProjectOptions { machines: self.machines.clone(), ..ProjectOptions::default() }
    }
}

/// Returns the manager of projects.
fn engine(
    context: &CommandContext,
) -> Result<ProjectManager<RouterHypervisor, SshGuests<RouterHypervisor>>, Error> {
    let manager = context.manager()?;
    let images = images::store(manager.home())?;
    Ok(ProjectManager::new(manager.clone(), SshGuests::new(manager), images))
}

/// Runs the work to its end, or until Ctrl-C: then everything stays as it is, and the same command
/// continues from there.
fn done_or_interrupted<T>(
    context: &CommandContext,
    command: &str,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Failure> {
    match context.block_on_until_interrupted(async { Ok(work.await?) })? {
        Some(done) => Ok(done),
        None => {
            output::status(format_args!(
                "interrupted: `vmkit {command}` again continues from here; programs in a guest keep running"
            ));
            Err(Failure::Exit(INTERRUPTED))
        }
    }
}
