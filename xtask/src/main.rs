//! Tasks of the workspace: `cargo xtask …`.
//!
//! Each task is a module with a `run`. What a task reads goes to standard output only if it is
//! data; progress goes to standard error. The exit code is 0, 1 for a task that failed, 2 for a
//! machine or a command line that must change first.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command of developers talks to its terminal"
)]

mod bench;
mod check;
mod demo;
mod demo_propolis;
mod error;
mod generate;
mod guest;
mod host;
mod programs;
mod setup;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tasks of the vmkit workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what this machine lacks: QEMU, firmware, and what builds the guests.
    Setup,
    /// Builds the guests that tests boot, unless they are cached, and prints where they are.
    Guest(guest::Arguments),
    /// Sets up, then plays the whole life of a VM with Debian in it and shows how long each part
    /// took.
    Demo {
        /// Plays it in Propolis, at the test kit's fake server, and sets up nothing.
        #[arg(long)]
        propolis: bool,
    },
    /// Sets up, checks and tests everything; the last line counts what passed, failed and was
    /// skipped.
    Test,
    /// Sets up, then measures vmkit against the same work done by hand.
    Bench(bench::Arguments),
    /// Writes the manual pages.
    Man(generate::Arguments),
    /// Writes the completions for every shell.
    Completions(generate::Arguments),
    /// Writes docs/cli.md.
    Reference,
    /// Writes docs/vmkit.schema.json, the JSON Schema of vmkit.toml.
    Schema,
    /// Checks the rules of the house that the compiler does not.
    Tidy,
}

fn main() -> ExitCode {
    // This program is the keeper of the demo's VM, too.
    vmkit::run_if_keeper();
    let result = match Arguments::parse().task {
        Task::Setup => setup::run(),
        Task::Guest(arguments) => guest::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Man(arguments) => generate::manual(&arguments),
        Task::Completions(arguments) => generate::completions(&arguments),
        Task::Reference => generate::reference(),
        Task::Schema => generate::schema(),
        Task::Demo { propolis: false } => demo::run(),
        Task::Demo { propolis: true } => demo_propolis::run(),
        Task::Test => check::run(),
        Task::Tidy => tidy::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::from(error.exit_code)
        }
    }
}
