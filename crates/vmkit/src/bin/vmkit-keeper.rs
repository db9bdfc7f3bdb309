//! The keeper of a VM as a program of its own, for programs that embed vmkit and can't be started
//! again themselves.

fn main() -> std::process::ExitCode {
    vmkit::run_if_keeper();
    std::process::ExitCode::from(2)
}
