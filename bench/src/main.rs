//! Measures vmkit against the same work done by hand, in one run on one machine.
//!
//! Each figure is a pair: vmkit's time, and the time of the same work without vmkit. The two sides
//! alternate, and so does which goes first, so that a slowdown of the machine affects both.
//! `docs/performance.md` describes each pair.
//!
//! `cargo xtask bench` builds the optimised programs and runs this.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command of developers talks to its terminal"
)]

mod by_hand;
mod figures;
mod guests;
mod launch;
mod operations;
mod program;
mod pull;
mod saving;
#[allow(clippy::unwrap_used, reason = "it is the tests' own, which may panic")]
#[path = "../../crates/vmkit/tests/it/sshd.rs"]
mod sshd;

use std::process::ExitCode;

use clap::Parser;

use figures::Figure;
use guests::Bench;
use program::Program;

/// The result of a measurement; its error is only printed.
type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Arguments {
    /// Prints the figures as JSON on standard output.
    #[arg(long)]
    json: bool,
    /// How often each side of a pair is measured.
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Measures only the figures whose names start with this.
    #[arg(long, default_value = "")]
    only: String,
}

fn main() -> ExitCode {
    // This program is the keeper of its own VMs, like every program that embeds vmkit.
    vmkit::run_if_keeper();
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("bench: because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let bench = Bench::new()?;
    let mut program = Program::new(bench.dir())?;
    let mut figures: Vec<Figure> = Vec::new();
    let mut measure = |name: &'static str, pair: &mut dyn FnMut() -> Result<Figure>| -> Result<()> {
        if name.starts_with(&arguments.only) {
            eprintln!("bench: {name}");
            figures.push(pair()?);
        }
        Ok(())
    };
    let runs = arguments.runs;
    // Before the others: a child starts with its parent's peak memory, and this process grows.
    measure("version", &mut || program.version(runs))?;
    measure("pull", &mut || pull::pull(&mut program, bench.dir(), runs))?;
    if arguments.only.is_empty() {
        eprintln!("bench: the memory of each verb");
        program.every_verb()?;
    }
    measure("start", &mut || operations::start(&bench, runs))?;
    measure("stop_idle", &mut || operations::stop_idle(&bench, runs))?;
    measure("suspend", &mut || operations::suspend(&bench, runs))?;
    measure("resume", &mut || operations::resume(&bench, runs))?;
    measure("save", &mut || saving::save(&bench, runs))?;
    measure("restore", &mut || saving::restore(&bench, runs))?;
    measure("prepare", &mut || operations::prepare(&bench, runs))?;
    measure("ls_500_stopped", &mut || program.ls_500_stopped(runs))?;
    measure("launch", &mut || launch::launch(&mut program, bench.dir(), runs))?;
    measure("prompt", &mut || launch::prompt(bench.dir(), runs))?;
    measure("ls_20_running", &mut || program.ls_20_running(runs))?;

    figures.sort_by_key(|figure| figures::NAMES.iter().position(|name| *name == figure.name));
    let table = format!("{}\n{}", figures::table(&figures), program.memory_table());
    if arguments.json {
        eprint!("{table}");
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        print!("{table}");
    }
    Ok(())
}
