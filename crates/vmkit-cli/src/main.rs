//! The program `vmkit`.

use std::process::ExitCode;

fn main() -> ExitCode {
    // First of all: this program is also the keeper of each VM that it starts.
    vmkit::run_if_keeper();
    vmkit::host::inherited::settle();
    vmkit_cli::run(std::env::args_os())
}
