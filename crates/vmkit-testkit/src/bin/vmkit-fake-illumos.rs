//! The tools of an illumos host, for tests: `zfs`, `dladm`, `bhyvectl` and `pfexec`, by the name
//! that it is called as.
//!
//! What they keep, and what of them is real, stands in [`vmkit_testkit::propolis::illumos`]. Their
//! host is the directory named by `VMKIT_FAKE_ILLUMOS`, else the one in whose `bin` they were
//! found.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use vmkit_testkit::propolis::illumos::{DIR, Illumos};

fn main() -> ExitCode {
    let mut args = env::args_os();
    let program = PathBuf::from(args.next().unwrap_or_default());
    let tool = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if tool == "pfexec" {
        return pfexec(args.collect());
    }
    let path = env::var_os("PATH");
    let host = env::var_os(DIR).map(|dir| Illumos::at(dir.into()));
    let Some(host) = host.or_else(|| Illumos::of_program(&program, path.as_deref())) else {
        return complain(&format!("{tool}: neither {DIR} nor its own place tells its host"));
    };
    let args: Vec<String> = args.map(|arg| arg.to_string_lossy().into_owned()).collect();
    match host.call(&tool, &args) {
        Ok(Some(said)) => {
            // Without a receiver the message is not missed.
            let _ = io::stdout().write_all(said.stdout.as_bytes());
            let _ = io::stderr().write_all(said.stderr.as_bytes());
            ExitCode::from(said.code)
        }
        Ok(None) => loop {
            std::thread::park();
        },
        Err(error) => complain(&format!("{tool}: {}: {error}", host.dir().display())),
    }
}

/// Becomes the program that was to be run with more rights, which it does not need here.
fn pfexec(args: Vec<OsString>) -> ExitCode {
    let Some((program, args)) = args.split_first() else { return complain("usage: pfexec cmd [arg...]") };
    let error = Command::new(program).args(args).exec();
    complain(&format!("pfexec: {}: {error}", program.to_string_lossy()))
}

fn complain(text: &str) -> ExitCode {
    let _ = writeln!(io::stderr(), "{text}");
    ExitCode::FAILURE
}
