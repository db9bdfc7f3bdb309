//! The command line as a whole: the options that every command has, and the command.

use std::path::PathBuf;

use clap::Parser;

use crate::commands::Command;
use crate::context::CommandContext;
use crate::failure::{EXIT_CODES, Failure};

/// Run virtual machines: create, start, stop and remove them, and show their state.
#[derive(Debug, Parser)]
#[command(name = "vmkit", version, after_help = EXIT_CODES, max_term_width = 100)]
#[command(arg_required_else_help = true, infer_subcommands = false)]
pub(crate) struct CommandLine {
    /// Keep everything below this directory [else: VMKIT_HOME, else the XDG directories]
    #[arg(long, global = true, value_name = "DIR")]
    home: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

impl CommandLine {
    /// Returns the command's environment.
    pub(crate) fn context(&self) -> CommandContext {
        CommandContext::new(self.home.clone())
    }

    /// Runs the command.
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        self.command.run(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_description_of_the_arguments_is_sound() {
        CommandLine::command().debug_assert();
    }
}
