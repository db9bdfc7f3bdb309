//! The command `vmkit`: arguments, output and exit codes over the library, and no logic of its own.
//!
//! There is a file for each command below `commands`. Only `output` prints. This is a library so
//! that the manual pages, the completions and the reference are made from the same [`command`] that
//! reads the arguments.

mod arguments;
mod commands;
mod console;
mod context;
mod diagnostic;
mod failure;
mod follow;
mod human;
mod human_image;
mod human_list;
mod human_snapshot;
mod images;
mod json;
mod json_image;
mod json_project;
mod json_snapshot;
mod launching;
mod machine_hint;
mod output;
mod places;
mod progress;
mod project_file;
mod propolis;
mod public_keys;
mod reference;
mod remote;
mod several;
mod threads;
mod values;
mod warnings;

use std::error::Error as _;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};

use crate::arguments::CommandLine;
use crate::commands::doctor;
use crate::context::CommandContext;
use crate::failure::{DOCTOR, Failure};

pub use crate::reference::{reference, schema};

/// Returns the description of all arguments.
pub fn command() -> clap::Command {
    CommandLine::command()
}

/// Runs the command with these arguments, the program's own name first, and exit with its exit
/// code.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    warnings::print_from_now_on();
    let mut context = None;
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    // To parse the arguments alone takes some of it.
    let outcome = threads::check_stack().map_err(Failure::from);
    match outcome.and_then(|()| follow_arguments(&arguments, &mut context)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tell(&failure, context.as_ref());
            ExitCode::from(failure.exit_code())
        }
    }
}

fn follow_arguments(arguments: &[OsString], context: &mut Option<CommandContext>) -> Result<(), Failure> {
    match CommandLine::try_parse_from(arguments) {
        Ok(arguments) => {
            let context = context.insert(arguments.context());
            arguments.run(context)
        }
        Err(error) if !error.use_stderr() => output::help(&error),
        Err(error) if error.kind() == ErrorKind::InvalidUtf8 => Err(no_text(arguments)),
        Err(error) => Err(refused(error)),
    }
}

/// Prints what went wrong, and what may be done about it.
fn tell(failure: &Failure, context: Option<&CommandContext>) {
    let mut report = failure.report();
    if let (Some(error), Some(context)) = (failure.of_host(), context)
        && doctor::finds_cause(context, error)
    {
        report.hints.push(DOCTOR.to_owned());
    }
    report.hints.splice(0..0, machine_hint::of(failure.missing_vms()));
    output::failure(&report);
}

/// Returns what other programs' words for a command are called here.
fn own_word(word: &str) -> Option<&'static str> {
    Some(match word {
        "run" => "vmkit launch IMAGE",
        "kill" | "poweroff" => "vmkit stop --timeout 0 NAME",
        "halt" | "shutdown" => "vmkit stop NAME",
        "boot" => "vmkit start NAME",
        "destroy" | "purge" | "undefine" => "vmkit rm NAME",
        "pause" => "vmkit suspend NAME",
        "unpause" => "vmkit resume NAME",
        "reboot" => "vmkit restart NAME",
        "show" | "inspect" | "describe" => "vmkit info NAME",
        "pull" => "vmkit image pull IMAGE",
        "images" => "vmkit image ls",
        "copy" | "scp" => "vmkit cp FROM TO",
        _ => return None,
    })
}

/// Returns the failure that names the argument that has to be text and is not.
fn no_text(arguments: &[OsString]) -> Failure {
    let argument = arguments.iter().skip(1).find(|argument| argument.to_str().is_none());
    let argument = argument.map(|argument| argument.to_string_lossy()).unwrap_or_default();
    vmkit::Error::invalid("argument", argument, "the argument is not UTF-8 (expected UTF-8)").into()
}

/// Returns what the library says about a value, and what clap says about everything else.
fn refused(error: clap::Error) -> Failure {
    match error.source().and_then(|source| source.downcast_ref::<vmkit::Error>()) {
        Some(vmkit::Error::Invalid { field, value, expected, problem, .. }) => {
            vmkit::Error::invalid(field.clone(), value, expected).with_problem(*problem).into()
        }
        _ => {
            let word = match error.get(ContextKind::InvalidSubcommand) {
                Some(ContextValue::String(word)) => own_word(word),
                _ => None,
            };
            let failure = Failure::Usage(error);
            match word {
                Some(word) => {
                    let hint = format!("in vmkit this is `{word}`");
                    Failure::Hinted { failure: Box::new(failure), hint }
                }
                None => failure,
            }
        }
    }
}
