//! `cargo xtask test`: everything that must hold before something is pushed, in the order in which
//! it fails soonest.
//!
//! The last line is `N passed, N failed, N skipped`. A test that can't run on this machine says
//! `SKIP:` and why; those lines are counted and shown again at the end.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Instant;

use crate::error::{Error, Result};
use crate::guest::{self, Guest};
use crate::{setup, tidy};

/// What embedders build who need only a part of the library.
const PARTS: [&str; 7] = ["", "qemu", "cloud-init", "propolis", "ssh", "images", "vmfile"];

/// The tests, and how many run at once at least; as many as there are CPUs if those are more.
///
/// Most of the first wait for a deadline or a process, and leave the CPUs idle. Guests are emulated
/// in the second, and two of them at once leave two CPUs idle for some of the time. No target may
/// be missing here: `--all-targets` says nothing of documentation.
const TESTS: [(&[&str], usize); 3] = [
    (&["--lib", "--bins", "--examples", "--test", "it", "--test", "spans"], 8),
    (&["--test", "real"], 3),
    (&["--doc"], 1),
];

/// Runs it all, and ends at the first step that fails.
pub(crate) fn run() -> Result<()> {
    let began = Instant::now();
    setup::run()?;
    // The guests are built beside: that waits for downloads, and mostly uses one CPU.
    thread::scope(|scope| {
        let guests = scope.spawn(build_guests);
        check_and_build()?;
        announce("guests");
        guests.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    announce("tests");
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let mut count = Count::new();
    for (targets, threads) in TESTS {
        let common = ["test", "--workspace", "--locked", "--no-fail-fast"];
        let mut command = cargo(&[&common[..], targets, &["--", "--show-output"]].concat());
        command.env("RUST_TEST_THREADS", threads.max(cpus).to_string());
        tests(command, &mut count)?;
    }
    for skip in &count.skips {
        println!("{skip}");
    }
    println!("all of it took {} s", began.elapsed().as_secs());
    println!("{} passed, {} failed, {} skipped", count.passed, count.failed, count.skips.len());
    if count.failed > 0 || !count.is_clean {
        return Err(Error::failed("tests failed"));
    }
    Ok(())
}

/// Checks the code and compiles all of it.
fn check_and_build() -> Result<()> {
    step("format", cargo(&["fmt", "--all", "--check"]))?;
    announce("tidy");
    tidy::run()?;
    step("clippy", cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))?;
    for features in PARTS {
        let part = ["clippy", "-p", "vmkit", "--locked", "--no-default-features", "--features", features];
        step(
            &format!("clippy of vmkit with {features:?}"),
            cargo(&[&part[..], &["--", "-D", "warnings"]].concat()),
        )?;
    }
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--locked"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    step("documentation", doc)?;
    // The programs too: tests start the command, the keeper and the faulty QEMU from where cargo
    // puts them.
    step("build", cargo(&["build", "--workspace", "--all-targets", "--locked"]))
}

fn build_guests() -> Result<()> {
    for one in [Guest::Tiny, Guest::Debian] {
        guest::ensure_built(one, false)?;
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

#[derive(Debug, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
    skips: Vec<String>,
    /// Whether all test runs have succeeded, also by their exit codes.
    is_clean: bool,
}

impl Count {
    fn new() -> Self {
        Self { passed: 0, failed: 0, skips: Vec::new(), is_clean: true }
    }

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

/// Runs tests, showing and counting what they print.
fn tests(mut command: Command, count: &mut Count) -> Result<()> {
    let failed = |error: std::io::Error| Error::failed(format!("tests: {error}"));
    // One stream, in order: tests say SKIP on standard error.
    let (reader, writer) = std::io::pipe().map_err(failed)?;
    command.stdout(writer.try_clone().map_err(failed)?).stderr(writer);
    let mut child = command.spawn().map_err(failed)?;
    drop(command);
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
    count.is_clean &= child.wait().map_err(failed)?.success();
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    use super::{Count, TESTS, cargo};

    #[test]
    fn every_test_binary_is_run() {
        let crates = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates");
        let mains = std::fs::read_dir(crates).unwrap().flatten().flat_map(|entry| {
            let tests = std::fs::read_dir(entry.path().join("tests")).into_iter().flatten().flatten();
            tests.map(|test| test.path()).filter(|test| test.join("main.rs").exists())
        });
        let there: BTreeSet<String> =
            mains.map(|test| test.file_name().unwrap().to_str().unwrap().to_owned()).collect();
        let run = TESTS.iter().flat_map(|(targets, _)| targets.windows(2));
        let run = run.filter(|pair| pair[0] == "--test").map(|pair| pair[1].to_owned()).collect();
        assert_eq!(there, run);
    }

    /// Returns the features with which each package is compiled for this machine.
    fn features(selection: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
        let mut tree = cargo(&["tree", "--locked", "--offline", "--prefix", "none", "--format", "{p}\t{f}"]);
        let output = tree.args(selection).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let mut found = BTreeMap::<String, BTreeSet<String>>::new();
        for line in String::from_utf8(output.stdout).unwrap().lines() {
            let (package, features) = line.split_once('\t').unwrap_or((line, ""));
            // A part of a macro may be compiled with other features than the same in a program.
            let features = features.trim_end_matches(" (*)");
            found.entry(package.to_owned()).or_default().insert(features.to_owned());
        }
        found
    }

    #[test]
    fn what_this_program_is_built_of_is_not_compiled_once_more_for_the_tests() {
        let tests = features(&["--workspace", "--edges", "all"]);
        let twice: Vec<_> = features(&["--package", "xtask", "--edges", "normal,build"])
            .into_iter()
            .filter(|(package, features)| {
                tests.get(package).is_none_or(|of_tests| !features.is_subset(of_tests))
            })
            .map(|(package, features)| {
                format!("{package} has {features:?}, and for tests {:?}", tests.get(&package))
            })
            .collect();
        assert!(twice.is_empty(), "in xtask/Cargo.toml, features are missing: {twice:#?}");
    }

    #[test]
    fn results_and_skips_are_counted() {
        let mut count = Count::new();
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
