//! `cargo xtask test`: everything that must hold before something is pushed, in the order in which
//! it fails soonest.
//!
//! The last line is `N passed, N failed, N skipped`. A test that can't run on this machine says
//! `SKIP:` and why; those lines are counted and shown again at the end.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::error::{Error, Result};
use crate::guest::{self, Guest};
use crate::{setup, tidy};

/// What embedders build who need only a part of the library.
const PARTS: [&str; 7] = ["", "qemu", "cloud-init", "propolis", "ssh", "images", "vmfile"];

/// Runs it all, and ends at the first step that fails.
pub(crate) fn run() -> Result<()> {
    let began = Instant::now();
    setup::run()?;
    step("format", cargo(&["fmt", "--all", "--check"]))?;
    step("clippy", cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))?;
    for features in PARTS {
        let part = ["clippy", "-p", "vmkit", "--locked", "--no-default-features", "--features", features];
        step(
            &format!("clippy of vmkit with {features:?}"),
            cargo(&[&part[..], &["--", "-D", "warnings"]].concat()),
        )?;
    }
    announce("tidy");
    tidy::run()?;
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--locked"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    step("documentation", doc)?;
    announce("guests");
    for one in [Guest::Tiny, Guest::Debian] {
        guest::ensure_built(one, false)?;
    }
    // The programs too: tests start the command, the keeper and the faulty QEMU from where cargo
    // puts them.
    step("build", cargo(&["build", "--workspace", "--all-targets", "--locked"]))?;
    announce("tests");
    let count = tests(cargo(&["test", "--workspace", "--locked", "--no-fail-fast", "--", "--show-output"]))?;
    for skip in &count.skips {
        println!("{skip}");
    }
    println!("all of it took {} s", began.elapsed().as_secs());
    println!("{} passed, {} failed, {} skipped", count.passed, count.failed, count.skips.len());
    if count.failed > 0 || !count.clean {
        return Err(Error::failed("tests failed"));
    }
    Ok(())
}

fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).stdin(Stdio::null());
    command
}

fn announce(name: &str) {
    println!("== {name}");
}

fn step(name: &str, mut command: Command) -> Result<()> {
    announce(name);
    let status =
        command.status().map_err(|error| Error::failed(format!("{name}: cannot start cargo: {error}")))?;
    if status.success() { Ok(()) } else { Err(Error::failed(format!("{name}: {status}"))) }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
    skips: Vec<String>,
    clean: bool,
}

impl Count {
    /// Reads one line of what `cargo test` prints.
    fn read(&mut self, line: &str) {
        if let Some(skip) = line.trim_start().strip_prefix("SKIP:") {
            self.skips.push(format!("SKIP:{skip}"));
        }
        let Some(result) = line.strip_prefix("test result: ") else {
            return;
        };
        let number = |word: &str| {
            let before = result.split(word).next()?;
            before.trim_end().rsplit([' ', '.']).next()?.parse::<u64>().ok()
        };
        self.passed += number(" passed").unwrap_or_default();
        self.failed += number(" failed").unwrap_or_default();
        if let Some(ignored) = number(" ignored").filter(|ignored| *ignored > 0) {
            self.skips.push(format!("SKIP: {ignored} ignored tests"));
        }
    }
}

/// Runs the tests, showing and reading what they print.
fn tests(mut command: Command) -> Result<Count> {
    let failed = |error: std::io::Error| Error::failed(format!("tests: {error}"));
    // One stream, in order: tests say SKIP on standard error.
    let (reader, writer) = std::io::pipe().map_err(failed)?;
    command.stdout(writer.try_clone().map_err(failed)?).stderr(writer);
    let mut child = command.spawn().map_err(failed)?;
    drop(command);
    let mut count = Count::default();
    let mut in_successes = false;
    for line in BufReader::new(reader).split(b'\n') {
        let line = line.map_err(failed)?;
        let line = String::from_utf8_lossy(&line);
        count.read(&line);
        // What tests that passed have printed is read for its SKIPs and not shown: it is thousands
        // of lines.
        in_successes = match line.as_ref() {
            "successes:" => true,
            "failures:" => false,
            other => in_successes && !other.starts_with("test result: "),
        };
        if !in_successes {
            println!("{line}");
        }
    }
    count.clean = child.wait().map_err(failed)?.success();
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::Count;

    #[test]
    fn results_and_skips_are_counted() {
        let mut count = Count::default();
        for line in [
            "running 3 tests",
            "SKIP: no bridge here",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
        ] {
            count.read(line);
        }
        assert_eq!((count.passed, count.failed), (15, 2));
        assert_eq!(count.skips, ["SKIP: no bridge here", "SKIP: 1 ignored tests"]);
    }
}
