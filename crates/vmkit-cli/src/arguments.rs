//! What can be typed: the options of all commands, and how their values are read.
//!
//! A value is parsed into the library's own type where it is read, so nothing unchecked goes any
//! further.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use vmkit::Error;
use vmkit::spec::Mib;

use crate::commands::Command;
use crate::context::CommandContext;
use crate::failure::{EXIT_CODES, Failure};

/// Run virtual machines: create, start, stop and remove them, and show what they do.
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
    /// Returns what the command works with.
    pub(crate) fn context(&self) -> CommandContext {
        CommandContext::new(self.home.clone())
    }

    /// Does what was typed.
    pub(crate) fn run(self, context: &CommandContext) -> Result<(), Failure> {
        self.command.run(context)
    }
}

/// Reads a size for the field that it is of.
pub(crate) fn size(field: &'static str, text: &str) -> Result<Mib, Error> {
    text.parse().map_err(|error| match error {
        Error::Invalid { value, expected, .. } => Error::invalid(field, value, expected),
        error => error,
    })
}

/// Reads a number of seconds, with a fraction or without.
pub(crate) fn seconds(text: &str) -> Result<Duration, Error> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.ok_or_else(|| {
        let value: String = text.chars().take(40).collect();
        Error::invalid("timeout", value, "a timeout is a number of seconds, 0 or more, such as 30 or 0.5")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_description_of_the_arguments_is_sound() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn timeouts_are_read_with_fractions_and_bounds() {
        assert_eq!(seconds("0").unwrap(), Duration::ZERO);
        assert_eq!(seconds("0.25").unwrap(), Duration::from_millis(250));
        for text in ["-1", "", "soon", "nan", "inf", "1e300"] {
            let error = seconds(text).unwrap_err().to_string();
            assert!(error.starts_with("timeout: "), "{text}: {error}");
        }
    }

    #[test]
    fn a_bad_size_is_named_by_its_field() {
        let error = size("memory", "4 GB?").unwrap_err().to_string();
        assert!(error.starts_with("memory: \"4 GB?\": unknown unit"), "{error}");
    }
}
