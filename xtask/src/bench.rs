//! `cargo xtask bench`: builds what is measured, optimised, and measures it; see
//! `docs/performance.md`.

use std::env;
use std::ffi::OsString;
use std::process::Command;

use crate::error::{Error, Result};
use crate::guest::{Guest, ensure_built};
use crate::{programs, setup};

/// What `cargo xtask bench` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Prints the figures as JSON on standard output, and the tables on standard error.
    #[arg(long)]
    json: bool,
    /// How often each side of a pair is measured.
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Measures only the figures whose names begin like this.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
}

/// Sets up, builds and measures.
///
/// # Errors
///
/// What setting up or building failed with, or a measurement; a target that is missed is none.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::run()?;
    ensure_built(Guest::Tiny, false)?;
    programs::run(cargo().args(["build", "--quiet", "--release", "--package", "vmkit-cli"]))?;
    let mut bench = cargo();
    bench.args(["run", "--quiet", "--release", "--package", "vmkit-bench", "--"]);
    bench.arg("--runs").arg(arguments.runs.to_string());
    if let Some(only) = &arguments.only {
        bench.arg("--only").arg(only);
    }
    if arguments.json {
        bench.arg("--json");
    }
    let status = bench.status().map_err(|error| Error::failed(format!("cannot start cargo: {error}")))?;
    // What went wrong stands on the terminal already.
    if status.success() { Ok(()) } else { Err(Error::failed(format!("the bench ended with {status}"))) }
}

fn cargo() -> Command {
    Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}
