//! Interrupts each step of an operation: by a kill of the process, or by an error of the system.
//!
//! A step is an effect that outlives the process; vmkit announces each of them beforehand, and so
//! may a backend under test, with [`step`]. The loops here know nothing about VMs: they choose
//! where to interrupt and how often, and the test says what must be true afterwards.
//!
//! A killed process can't be the test's own. So a test that is to be killed is an ordinary test,
//! which passes when it is not killed; [`kill_at_every_step`] runs it again, alone and in a process
//! of its own, with the number of the fatal step in the environment.

use std::cell::{Cell, RefCell};
use std::env;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::rc::Rc;

use rustix::process::{Signal, getpid, kill_process};

const DIR: &str = "VMKIT_CRASH_DIR";
const SCENARIO: &str = "VMKIT_CRASH_SCENARIO";
const AT: &str = "VMKIT_CRASH_AT";
/// What a process that lived to its end says before the number of its steps.
const STEPS: &str = "steps: ";
/// The number of a step that no operation takes.
const NEVER: u64 = u64::MAX;

type FaultHook = Rc<RefCell<dyn FnMut(&'static str) -> io::Result<()>>>;

thread_local! {
    static HOOK: RefCell<Option<FaultHook>> = const { RefCell::new(None) };
}

/// Announces an effect of a backend under test.
///
/// # Errors
/// The error that the running loop injects here.
pub fn step(name: &'static str) -> io::Result<()> {
    let hook = HOOK.with_borrow(Clone::clone);
    hook.map_or(Ok(()), |hook| (hook.borrow_mut())(name))
}

fn set_hook(hook: impl FnMut(&'static str) -> io::Result<()> + 'static) {
    HOOK.set(Some(Rc::new(RefCell::new(hook))));
    vmkit::set_step_hook(Some(Box::new(step)));
}

fn clear_hook() {
    vmkit::set_step_hook(None);
    HOOK.set(None);
}

/// The task of a test that runs in a process of its own.
#[derive(Debug)]
pub struct CrashTask {
    /// The directory to work in.
    pub dir: PathBuf,
    /// The scenario to run, a name that only the test interprets.
    pub scenario: String,
    at: u64,
    taken: Rc<Cell<u64>>,
}

impl Drop for CrashTask {
    fn drop(&mut self) {
        // The parent reads it.
        let _ = writeln!(io::stderr(), "{STEPS}{}", self.taken.get());
    }
}

/// Returns the task of this process, or `None` in an ordinary test run.
pub fn task() -> Option<CrashTask> {
    let dir = env::var_os(DIR)?.into();
    let at = env::var(AT).ok()?.parse().ok()?;
    Some(CrashTask { dir, scenario: env::var(SCENARIO).ok()?, at, taken: Rc::default() })
}

impl CrashTask {
    /// Arranges for the kernel to kill this process before its step `at`, counted from now on in
    /// this thread.
    pub fn arm(&self) {
        let (counted, at) = (Rc::clone(&self.taken), self.at);
        set_hook(move |name| {
            let taken = counted.get() + 1;
            counted.set(taken);
            if taken == at {
                // The parent shows it when the check fails.
                let _ = writeln!(io::stderr(), "killed before step {taken}, `{name}`");
                let _ = kill_process(getpid(), Signal::KILL);
            }
            Ok(())
        });
    }
}

/// Starts `test` of this test executable in a process of its own, to be killed before step `at`; 0:
/// never.
///
/// # Errors
/// `Io` if it can't be started.
pub fn spawn(test: &str, scenario: &str, dir: &Path, at: u64) -> io::Result<Child> {
    Command::new(env::current_exe()?)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(DIR, dir)
        .env(SCENARIO, scenario)
        .env(AT, at.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

/// Runs `test` with `scenario` repeatedly, killed before its first step, its second, and so on,
/// until it completes. Returns the number of steps.
///
/// `prepare` fills an empty directory before each run; `check` examines what the process left, and
/// gets a description of where it was killed. The last run was not killed.
///
/// # Panics
/// If a run is neither killed as planned nor passes, or takes no step at all.
pub fn kill_at_every_step(
    test: &str,
    scenario: &str,
    mut prepare: impl FnMut(&Path),
    mut check: impl FnMut(&Path, &str),
) -> u64 {
    for at in 1.. {
        if let Some(steps) = kill_at(at, test, scenario, &mut prepare, &mut check) {
            return steps;
        }
    }
    unreachable!("an operation has an end");
}

/// Runs `test` with `scenario` to its end, and then once for each of `kills`, killed before a step
/// that `sample` chooses. `prepare` and `check` are as for [`kill_at_every_step`].
///
/// # Panics
/// If a run is neither killed as planned nor passes, or takes no step at all.
pub fn kill_at_some_steps(
    sample: &mut StepSample,
    kills: usize,
    test: &str,
    scenario: &str,
    mut prepare: impl FnMut(&Path),
    mut check: impl FnMut(&Path, &str),
) {
    let steps = kill_at(NEVER, test, scenario, &mut prepare, &mut check).expect("nothing kills it");
    for _ in 0..kills {
        let at = sample.next(steps);
        let lived = kill_at(at, test, scenario, &mut prepare, &mut check);
        assert_eq!(lived, None, "`{scenario}` took fewer than {at} steps of {steps}");
    }
}

/// Runs `test` once, killed before step `at`; returns the number of its steps if it lived to its
/// end.
fn kill_at(
    at: u64,
    test: &str,
    scenario: &str,
    prepare: &mut impl FnMut(&Path),
    check: &mut impl FnMut(&Path, &str),
) -> Option<u64> {
    let temp = tempfile::tempdir().expect("a test has a directory for temporary files");
    prepare(temp.path());
    let child = spawn(test, scenario, temp.path(), at).expect("a test can run its own executable");
    let output = child.wait_with_output().expect("a child can be waited for");
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.signal() == Some(Signal::KILL.as_raw()) {
        let place = said.lines().rev().find(|line| line.starts_with("killed before")).unwrap_or("killed");
        check(temp.path(), &format!("{scenario}, {place}"));
        return None;
    }
    assert_passed(&output);
    let steps = said.lines().rev().find_map(|line| line.strip_prefix(STEPS)?.parse().ok());
    let steps = steps.unwrap_or(0);
    assert!(steps > 0, "`{scenario}` took no step, so nothing was tried");
    // The check also removes what a completed run left running.
    check(temp.path(), &format!("{scenario}, lived to its end"));
    Some(steps)
}

/// Steps, and what follows them, that a seed chooses. The seed is printed, and `VMKIT_TEST_SEED`
/// repeats it.
#[derive(Debug)]
pub struct StepSample(u64);

impl StepSample {
    /// Starts with a new seed, or with that of the environment.
    ///
    /// # Panics
    /// If the environment's is no number.
    pub fn new() -> Self {
        let seed = match env::var("VMKIT_TEST_SEED") {
            Ok(seed) => seed.parse().expect("VMKIT_TEST_SEED is a whole number"),
            Err(_) => RandomState::new().hash_one(0),
        };
        // It may be printed to a reader that is gone.
        let _ = writeln!(io::stderr(), "to repeat it: VMKIT_TEST_SEED={seed}");
        Self(seed)
    }

    /// Returns one or the other, for a step that can be followed in two ways.
    pub fn either(&mut self) -> bool {
        self.next(2) == 1
    }

    /// Returns a number from 1 to `most`: the next step of SplitMix64.
    fn next(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % most + 1
    }
}

impl Default for StepSample {
    fn default() -> Self {
        Self::new()
    }
}

/// Checks that a process started by [`spawn`] ran its test, and that it passed.
///
/// # Panics
/// If it did not.
pub fn assert_passed(output: &Output) {
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    // A misspelt name runs no test, and that passes.
    let ran = stdout.contains("1 passed");
    assert!(output.status.success() && ran, "{}\n{stdout}\n{stderr}", output.status);
}

/// How long a fault lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultDuration {
    /// One step fails, the next ones succeed.
    Once,
    /// Every step from there on fails, as on a full disk.
    FromThenOn,
}

/// A fault in this thread's steps, until it is dropped.
#[derive(Debug)]
pub struct StepFault {
    name: Rc<Cell<Option<&'static str>>>,
}

impl StepFault {
    /// Injects a fault at step `at` of this thread, the first being 1.
    pub fn at(at: u64, lasting: FaultDuration, kind: io::ErrorKind) -> Self {
        let name = Rc::new(Cell::new(None));
        let (mut taken, seen) = (0, Rc::clone(&name));
        set_hook(move |step| {
            taken += 1;
            let fails = if lasting == FaultDuration::Once { taken == at } else { taken >= at };
            if !fails {
                return Ok(());
            }
            if seen.get().is_none() {
                seen.set(Some(step));
            }
            Err(kind.into())
        });
        Self { name }
    }

    /// Returns the first step that failed, or `None` if there were fewer steps.
    pub fn failed(&self) -> Option<&'static str> {
        self.name.get()
    }
}

impl Drop for StepFault {
    fn drop(&mut self) {
        clear_hook();
    }
}
