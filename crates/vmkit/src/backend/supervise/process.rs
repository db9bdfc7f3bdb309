//! Finding the process that runs for a VM, from its run file and its lock, and ending it.
//!
//! ```text
//!  run file        keeper   process  →  ProcessState
//!  none                                 Nothing
//!  keeper only     alive    -           Starting    (it is about to start the hypervisor, or just has)
//!  keeper only     dead     ?           Live if some process holds the lock's descriptor, else Ended(None)
//!  both, no end    any      alive       Live
//!  both, no end    alive    dead        wait for the keeper to record the end, look again
//!  both, no end    dead     dead        Ended(None): how it ended is unknown
//!  an end                   dead        Ended(Some)
//!  another boot's                       Rebooted
//!  both, no end    any      alive, and without the lock of this directory:  Copied
//!  no live process, but the runtime directory exists and the lock is held:  Launching
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, timeout};

use super::files;
use super::runfile::{self, ProcessEnd, ProcessRun};
use super::{ALIVE_DESCRIPTOR, SupervisionPaths};
use crate::error::{Error, ErrorKind, Result};
use crate::host::inherited::child_problem;
use crate::host::process::{ProcessFd, ProcessId, boot_id};

/// How long a keeper may take to record an end: it has nothing else to do.
const KEEPER_GRACE: Duration = Duration::from_secs(2);
/// The timeout of a program that kills another one.
const KILLER_LIMIT: Duration = Duration::from_secs(5);

/// What runs for a VM.
#[derive(Debug)]
pub(crate) enum ProcessState {
    /// The VM was never started.
    Nothing,
    /// Another process holds the lock to start the VM, or has just started a keeper.
    Launching,
    /// A keeper is about to start it.
    Starting(ProcessFd),
    /// The hypervisor runs.
    Live(ProcessFd),
    /// The last run is over; `None` if its end was not recorded.
    Ended(Option<ProcessEnd>),
    /// The host has been rebooted since.
    Rebooted,
    /// The record, or by a hard link the lock, belongs to another directory, whose run it is:
    /// nothing runs here.
    Copied,
}

/// Finds out what runs for a VM.
///
/// # Errors
/// `Io` if the system can't report it.
pub(crate) async fn look(place: &SupervisionPaths) -> Result<ProcessState> {
    let recorded = recorded(place).await?;
    let lives = matches!(recorded, ProcessState::Live(_) | ProcessState::Starting(_));
    // A VM that does not run has no runtime directory, so the lock only needs a check if a start is
    // in progress or was interrupted.
    if !lives && place.run_dir.exists() && files::is_held(place)? {
        leave_taken(place).await?;
        // The run file may have been written since it was read.
        let recorded = self::recorded(place).await?;
        if matches!(recorded, ProcessState::Live(_) | ProcessState::Starting(_)) || !files::is_held(place)? {
            return Ok(recorded);
        }
        // The run file may be lost while the hypervisor runs: it is the process that has the lock.
        return Ok(match orphan(place)? {
            Some(process) => ProcessState::Live(process),
            None if linked_holder(place)?.is_some() => ProcessState::Copied,
            None => ProcessState::Launching,
        });
    }
    Ok(recorded)
}

/// Waits for a keeper that has recorded the end of its run: it still has the lock while it removes
/// the sockets.
async fn leave_taken(place: &SupervisionPaths) -> Result<()> {
    if let Ok(Some(run)) = runfile::read(&place.run_file)
        && run.ended.is_some()
        && let Some(keeper) = open(run.keeper)?
    {
        keeper.wait(Instant::now() + KEEPER_GRACE).await?;
    }
    Ok(())
}

async fn recorded(place: &SupervisionPaths) -> Result<ProcessState> {
    let run = match runfile::read_or_loss(&place.run_file)? {
        Ok(Some(run)) => run,
        Ok(None) => return Ok(ProcessState::Nothing),
        // An unreadable record is ignored, and does not prevent ending what runs; the next start
        // writes a new one.
        Err(error) => {
            warn_of_lost(&place.run_file, &error);
            return Ok(ProcessState::Ended(None));
        }
    };
    if run.ended.is_some() {
        return Ok(ProcessState::Ended(run.ended));
    }
    if let Some(process) = open(run.hypervisor)? {
        return Ok(if is_of(place, &process)? { ProcessState::Live(process) } else { ProcessState::Copied });
    }
    if let Some(keeper) = open(run.keeper)? {
        if !is_of(place, &keeper)? {
            // The keeper may just have recorded the end, and released the lock.
            let ended = runfile::read(&place.run_file)?.and_then(|run| run.ended);
            return Ok(ended.map_or(ProcessState::Copied, |ended| ProcessState::Ended(Some(ended))));
        }
        if run.hypervisor.is_none() {
            return Ok(ProcessState::Starting(keeper));
        }
        keeper.wait(Instant::now() + KEEPER_GRACE).await?;
        return Ok(ProcessState::Ended(runfile::read(&place.run_file)?.and_then(|run| run.ended)));
    }
    // The keeper may have recorded the end, and exited, after the record was read.
    let again = runfile::read(&place.run_file)?;
    if again.as_ref() != Some(&run) {
        return Ok(ProcessState::Ended(again.and_then(|run| run.ended)));
    }
    if rebooted_since(&run)? {
        return Ok(ProcessState::Rebooted);
    }
    if run.hypervisor.is_none()
        && let Some(process) = orphan(place)?
    {
        return Ok(ProcessState::Live(process));
    }
    Ok(ProcessState::Ended(None))
}

/// Warns of a record that can't be read, once for each in this process: the state of a VM is
/// determined several times in one operation.
fn warn_of_lost(record: &Path, error: &Error) {
    static WARNED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    if WARNED.lock().unwrap_or_else(PoisonError::into_inner).insert(record.to_owned()) {
        tracing::warn!(%error, "the record of a VM's last run is lost");
    }
}

fn open(process: Option<ProcessId>) -> Result<Option<ProcessFd>> {
    match process {
        Some(process) => process.open(),
        None => Ok(None),
    }
}

/// Returns whether a recorded process holds the lock of this directory. A copied home has the
/// records of the original's runs, and must not touch the original's processes.
fn is_of(place: &SupervisionPaths, process: &ProcessFd) -> Result<bool> {
    let lock = match fs::metadata(&place.alive) {
        Ok(lock) => Some((lock.dev(), lock.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::io("examine", &place.alive)(error)),
    };
    let open = Path::new("/proc").join(process.id().pid.to_string()).join("fd");
    let has_lock = |link: &Path| {
        let is_ours = |file: fs::Metadata| is_lock(&file, lock) && is_opened_here(link, &file, &place.alive);
        fs::metadata(link).is_ok_and(is_ours) || was_replaced(link, &place.alive)
    };
    // A hypervisor has the lock under a known number.
    if has_lock(&open.join(ALIVE_DESCRIPTOR.to_string())) {
        return Ok(true);
    }
    let mut is_empty = true;
    let entries = match fs::read_dir(&open) {
        Ok(entries) => entries,
        // The process belongs to another user, or has just ended. Then the lock itself shows
        // whether anything runs here.
        Err(_) => return files::is_held(place),
    };
    for entry in entries.flatten() {
        is_empty = false;
        if has_lock(&entry.path()) {
            return Ok(true);
        }
    }
    // A process that is ending has already closed everything.
    if is_empty { files::is_held(place) } else { Ok(false) }
}

/// Returns whether an open file was the lock of this directory until another file replaced it, for
/// example when a backup is restored over the home of a VM that runs.
///
/// Source: proc_pid_fd(5): the name of a removed file ends with ` (deleted)`.
fn was_replaced(link: &Path, alive: &Path) -> bool {
    let (Ok(open), Some(name)) = (fs::read_link(link), alive.file_name()) else { return false };
    let Some(work) = alive.parent().and_then(|work| work.canonicalize().ok()) else { return false };
    let removed = open.as_os_str().as_encoded_bytes().strip_suffix(b" (deleted)");
    removed.is_some_and(|open| open == work.join(name).as_os_str().as_encoded_bytes())
}

/// Returns whether an open file is the lock or, if the lock was removed, whether the file has no
/// name any more.
fn is_lock(file: &fs::Metadata, lock: Option<(u64, u64)>) -> bool {
    match lock {
        Some(lock) => (file.dev(), file.ino()) == lock,
        None => file.is_file() && file.nlink() == 0 && file.len() == 0,
    }
}

/// Returns whether an open file that is the lock was opened in this directory. In a directory that
/// was copied by hard links (`cp -al`) it is the same file, and yet each is the lock of its own VM.
fn is_opened_here(link: &Path, file: &fs::Metadata, alive: &Path) -> bool {
    if file.nlink() < 2 {
        return true;
    }
    let directory = |path: &Path| {
        let found = fs::metadata(path.parent()?).ok()?;
        Some((found.dev(), found.ino()))
    };
    let theirs = fs::read_link(link).ok().and_then(|open| directory(&open));
    // A name from another mount namespace says nothing.
    theirs.is_none() || theirs == directory(alive)
}

fn rebooted_since(run: &ProcessRun) -> Result<bool> {
    let now = boot_id()?;
    Ok(run.keeper.iter().chain(&run.hypervisor).any(|process| process.boot_id != now))
}

/// Finds a hypervisor whose keeper was killed before it could record the process: it has inherited
/// the lock under the number that only vmkit uses. A process that has opened the file itself under
/// this number is not one.
pub(crate) fn orphan(place: &SupervisionPaths) -> Result<Option<ProcessFd>> {
    let keeper = runfile::read(&place.run_file).ok().flatten().and_then(|run| run.keeper);
    for holder in holders(place)?.into_iter().filter(|holder| holder.is_here) {
        let process = ProcessId::of(holder.pid)?;
        // The keeper has a copy while it starts the hypervisor.
        if process != keeper
            && let Some(process) = open(process)?
        {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

/// Finds a process that holds the lock for another directory, of which this one is a copy by hard
/// links, or the other way round. Returns its PID and that directory.
pub(crate) fn linked_holder(place: &SupervisionPaths) -> Result<Option<(u32, PathBuf)>> {
    let linked = holders(place)?.into_iter().find(|holder| !holder.is_here);
    Ok(linked.and_then(|holder| Some((holder.pid, holder.lock.parent()?.to_owned()))))
}

/// A process that has inherited the lock.
struct Holder {
    pid: u32,
    /// The lock's path when it was opened.
    lock: PathBuf,
    /// Whether it was opened in this directory, not in another one with the same file.
    is_here: bool,
}

fn holders(place: &SupervisionPaths) -> Result<Vec<Holder>> {
    let path = &place.alive;
    // Compares the file, not its name: the path of a home may have a symbolic link.
    let lock = match fs::metadata(path) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("examine", path)(error)),
    };
    let entries = fs::read_dir("/proc").map_err(Error::io("read", "/proc"))?;
    let mut holders = Vec::new();
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let held = entry.path().join("fd").join(ALIVE_DESCRIPTOR.to_string());
        if let Ok(file) = fs::metadata(&held)
            && (file.dev(), file.ino()) == (lock.dev(), lock.ino())
            && is_inherited(&entry.path())
        {
            let is_here = is_opened_here(&held, &file, path);
            holders.push(Holder { pid, lock: fs::read_link(&held).unwrap_or_default(), is_here });
        }
    }
    Ok(holders)
}

/// Returns whether a process, by its directory in `/proc`, has inherited the lock's descriptor: if
/// it had opened the file itself, the descriptor would have the flag close-on-exec.
///
/// Source: proc_pid_fdinfo(5): the flags are octal.
#[cfg(target_os = "linux")]
fn is_inherited(process: &Path) -> bool {
    let info = fs::read_to_string(process.join("fdinfo").join(ALIVE_DESCRIPTOR.to_string()));
    let flags = info.ok().and_then(|info| {
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        u32::from_str_radix(flags.trim(), 8).ok()
    });
    flags.is_some_and(|flags| flags & rustix::fs::OFlags::CLOEXEC.bits() == 0)
}

/// Returns true: other systems don't show the flags of another process's descriptors.
#[cfg(not(target_os = "linux"))]
fn is_inherited(_process: &Path) -> bool {
    true
}

/// Returns, for a lock that is held, whether the holder is a process that is not visible from here:
/// the record has a start in this boot, and no end.
pub(crate) fn runs_out_of_sight(place: &SupervisionPaths) -> bool {
    let Ok(Some(run)) = runfile::read(&place.run_file) else { return false };
    let is_gone = |process| open(process).is_ok_and(|process| process.is_none());
    run.ended.is_none()
        && run.hypervisor.is_some()
        && is_gone(run.hypervisor)
        && is_gone(run.keeper)
        && rebooted_since(&run).is_ok_and(|rebooted| !rebooted)
}

/// Waits until the keeper has recorded the end of the run, so that the next look finds it.
pub(crate) async fn settled(place: &SupervisionPaths) -> Result<()> {
    if let Ok(Some(run)) = runfile::read(&place.run_file)
        && let Some(keeper) = open(run.keeper)?
    {
        keeper.wait(Instant::now() + KEEPER_GRACE).await?;
    }
    Ok(())
}

/// Kills what runs for a VM and waits until it has ended.
///
/// # Errors
/// `TimedOut` if a process survives SIGKILL (it hangs in the kernel).
pub(crate) async fn kill(place: &SupervisionPaths) -> Result<()> {
    let mut found = look(place).await?;
    if let ProcessState::Starting(keeper) = &found {
        // The keeper first, so that it starts nothing more; then what it may have started.
        end_by_force(place, keeper, KEEPER_GRACE).await?;
        found = match orphan(place)? {
            Some(process) => ProcessState::Live(process),
            None => ProcessState::Ended(None),
        };
    }
    if let ProcessState::Live(process) = &found {
        const GRACE: Duration = Duration::from_secs(5);
        if !end_by_force(place, process, GRACE).await? {
            return Err(Error::timed_out(
                format!("{} (process {}) to end after SIGKILL", place.program, process.id().pid),
                GRACE,
            ));
        }
        settled(place).await?;
    }
    Ok(())
}

/// Kills a process, with more privileges than this user's if necessary; returns whether it has
/// ended.
async fn end_by_force(place: &SupervisionPaths, process: &ProcessFd, grace: Duration) -> Result<bool> {
    match (end(process, Signal::KILL, grace).await, &place.killer) {
        // Such a program only takes a PID: this is the only place that signals one, and its owner
        // was just checked.
        (Err(error), Some(killer)) if error.kind() == ErrorKind::Host => {
            if process.id().open()?.is_some() {
                kill_by(killer, process.id().pid).await?;
            }
            process.wait(Instant::now() + grace).await
        }
        (ended, _) => ended,
    }
}

/// Runs a program that kills the process with this PID.
///
/// # Errors
/// `Host` if it fails.
pub(crate) async fn kill_by(killer: &[String], pid: u32) -> Result<()> {
    let (program, arguments) = killer.split_first().expect("a killer has a program");
    crate::steps::step("process: kill by a program").map_err(Error::io("run", program))?;
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).arg(pid.to_string()).env_clear().stdin(Stdio::null());
    let failed = |problem: String| Error::host(killer.join(" "), problem);
    let output = timeout(KILLER_LIMIT, command.kill_on_drop(true).output()).await;
    let output = output.map_err(|_| failed("the program does not end".to_owned()))?;
    let output =
        output.map_err(|error| failed(format!("cannot run the program: {}", child_problem(&error))))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// Signals a process and waits for its end; returns whether it has ended.
pub(crate) async fn end(process: &ProcessFd, signal: Signal, grace: Duration) -> Result<bool> {
    crate::steps::step("process: signal").map_err(Error::io("signal", "/proc"))?;
    process.signal(signal)?;
    process.wait(Instant::now() + grace).await
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::process::Command;

    use super::*;
    use crate::backend::supervise::runfile::ProcessRun;

    /// Returns the files of a VM in a directory, with the lock held and a runtime directory.
    fn place(dir: &Path) -> (SupervisionPaths, OwnedFd) {
        let place = SupervisionPaths {
            alive: dir.join("alive"),
            run_file: dir.join("run.json"),
            run_dir: dir.join("run"),
            program: "QEMU",
            killer: None,
        };
        fs::create_dir(&place.run_dir).unwrap();
        let lock = crate::backend::supervise::alive::try_take(&place).unwrap().unwrap();
        (place, lock)
    }

    #[tokio::test]
    async fn a_keeper_that_recorded_the_end_and_still_has_the_lock_is_not_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let (place, lock) = place(dir.path());
        // Instead of a keeper that is slow to remove its sockets: the lock is its standard input.
        let mut keeper = Command::new("sleep").arg("0.3").stdin(Stdio::from(lock)).spawn().unwrap();
        let ended = Some(ProcessEnd { code: Some(0), signal: None });
        let run = ProcessRun { keeper: ProcessId::of(keeper.id()).unwrap(), ended, ..ProcessRun::default() };
        fs::write(&place.run_file, serde_json::to_vec(&run).unwrap()).unwrap();
        assert!(files::is_held(&place).unwrap());
        let found = look(&place).await.unwrap();
        assert!(matches!(found, ProcessState::Ended(Some(ProcessEnd { code: Some(0), .. }))), "{found:?}");
        keeper.wait().unwrap();
    }

    #[test]
    fn a_process_that_opened_the_lock_itself_is_not_a_hypervisor() {
        let dir = tempfile::tempdir().unwrap();
        let (place, lock) = place(dir.path());
        let own = rustix::io::fcntl_dupfd_cloexec(&lock, ALIVE_DESCRIPTOR).unwrap();
        assert!(orphan(&place).unwrap().is_none(), "it would be killed");
        // As with an inherited one.
        rustix::io::fcntl_setfd(&own, rustix::io::FdFlags::empty()).unwrap();
        let found = orphan(&place).unwrap().map(|process| process.id().pid);
        assert_eq!(found, Some(std::process::id()), "the number is taken: {own:?}");
    }

    #[tokio::test]
    async fn a_held_lock_with_a_runtime_directory_is_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let (place, lock) = place(dir.path());
        let ended = Some(ProcessEnd { code: Some(0), signal: None });
        fs::write(
            &place.run_file,
            serde_json::to_vec(&ProcessRun { ended, ..ProcessRun::default() }).unwrap(),
        )
        .unwrap();
        assert!(matches!(look(&place).await.unwrap(), ProcessState::Launching));
        drop(lock);
        // A child of another test has a copy of the lock between fork and exec, and nothing tells
        // when it has not any more.
        let limit = Instant::now() + Duration::from_secs(30);
        while matches!(look(&place).await.unwrap(), ProcessState::Launching) && Instant::now() < limit {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(matches!(look(&place).await.unwrap(), ProcessState::Ended(Some(_))));
    }

    #[tokio::test]
    async fn a_program_kills_a_process_by_its_pid_or_reports_why_not() {
        let mut child = Command::new("sleep").arg("300").spawn().unwrap();
        let held = ProcessId::of(child.id()).unwrap().unwrap().open().unwrap().unwrap();
        let killer = ["/bin/kill", "-9"].map(str::to_owned);
        kill_by(&killer, child.id()).await.unwrap();
        assert!(held.wait(Instant::now() + Duration::from_secs(60)).await.unwrap());
        child.wait().unwrap();
        let error = kill_by(&["/bin/false".to_owned()], 1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Host, "{error}");
    }
}
