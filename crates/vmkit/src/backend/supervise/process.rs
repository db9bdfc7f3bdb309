//! What really runs for a VM: from the run file to a process that is certainly ours, and its end.
//!
//! ```text
//!  run file        keeper   process  →  Found
//!  none                                 Nothing
//!  keeper only     alive    -           Starting    (it is about to start the hypervisor, or just has)
//!  keeper only     dead     ?           Live if some process holds the lock's descriptor, else Ended(None)
//!  both, no end    any      alive       Live
//!  both, no end    alive    dead        wait for the keeper to write the end, look again
//!  both, no end    dead     dead        Ended(None): nobody is left who knows how
//!  an end                   dead        Ended(Some)
//!  another boot's                       Rebooted
//!  both, no end    any      alive, and without the lock of this directory:  Copied
//!  nothing that lives, but the runtime directory is there and the lock is held:  Launching
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

use super::alive;
use super::runfile::{self, ProcessEnd, ProcessRun};
use super::{ALIVE_DESCRIPTOR, SupervisionPaths};
use crate::error::{Error, ErrorKind, Result};
use crate::host::inherited::child_problem;
use crate::host::process::{ProcessFd, ProcessId, boot_id};

/// How long a keeper may take to write down an end: it has nothing else to do.
const KEEPER_GRACE: Duration = Duration::from_secs(2);
/// How long a program may take that kills another one.
const KILLER_LIMIT: Duration = Duration::from_secs(5);

/// What was found to run.
#[derive(Debug)]
pub(crate) enum ProcessState {
    /// It has never been started.
    Nothing,
    /// Somebody holds the lock to start it, or has just told a keeper to.
    Launching,
    /// A keeper is about to start it.
    Starting(ProcessFd),
    /// The hypervisor runs.
    Live(ProcessFd),
    /// The last run is over; how, where somebody wrote it down.
    Ended(Option<ProcessEnd>),
    /// The host has been rebooted since.
    Rebooted,
    /// The record, or by a hard link the lock, is that of another directory, whose run it is:
    /// nothing runs here.
    Copied,
}

/// Looks what runs for a VM.
///
/// # Errors
/// `Io` where the system does not tell.
pub(crate) async fn look(place: &SupervisionPaths) -> Result<ProcessState> {
    let recorded = recorded(place).await?;
    let lives = matches!(recorded, ProcessState::Live(_) | ProcessState::Starting(_));
    // A VM at rest has no runtime directory, so the lock is asked only where a start is under way
    // or was cut off.
    if !lives && place.run_dir.exists() && alive::is_held(place)? {
        leave_taken(place).await?;
        // The run file may have come while we looked elsewhere.
        let recorded = self::recorded(place).await?;
        if matches!(recorded, ProcessState::Live(_) | ProcessState::Starting(_)) || !alive::is_held(place)? {
            return Ok(recorded);
        }
        // Or it was lost, and the hypervisor runs on: then it is the one that has the lock.
        return Ok(match orphan(place)? {
            Some(process) => ProcessState::Live(process),
            None if linked_holder(place)?.is_some() => ProcessState::Copied,
            None => ProcessState::Launching,
        });
    }
    Ok(recorded)
}

/// Waits for a keeper that has written down the end of its run: it has the lock still while it
/// removes the sockets.
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
    let run = match runfile::read(&place.run_file) {
        Ok(Some(run)) => run,
        Ok(None) => return Ok(ProcessState::Nothing),
        // What can't be read tells nothing, and stops nobody from ending what runs; the next start
        // writes it anew.
        Err(error) if error.kind() == ErrorKind::Record => {
            warn_of_lost(&place.run_file, &error);
            return Ok(ProcessState::Ended(None));
        }
        Err(error) => return Err(error),
    };
    if run.ended.is_some() {
        return Ok(ProcessState::Ended(run.ended));
    }
    if let Some(process) = open(run.hypervisor)? {
        return Ok(if is_of(place, &process)? { ProcessState::Live(process) } else { ProcessState::Copied });
    }
    if let Some(keeper) = open(run.keeper)? {
        if !is_of(place, &keeper)? {
            // It may just have written the end, and let go of the lock.
            let ended = runfile::read(&place.run_file)?.and_then(|run| run.ended);
            return Ok(ended.map_or(ProcessState::Copied, |ended| ProcessState::Ended(Some(ended))));
        }
        if run.hypervisor.is_none() {
            return Ok(ProcessState::Starting(keeper));
        }
        keeper.wait(Instant::now() + KEEPER_GRACE).await?;
        return Ok(ProcessState::Ended(runfile::read(&place.run_file)?.and_then(|run| run.ended)));
    }
    // The keeper may have written the end, and gone, between our reading and our asking.
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

/// Returns whether a process that a record names holds the lock of this very directory: a home that
/// was copied has the records of the original's runs, and its processes are not to be touched from
/// the copy.
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
    // Of the hypervisor it is known under which number it has the lock.
    if has_lock(&open.join(ALIVE_DESCRIPTOR.to_string())) {
        return Ok(true);
    }
    let mut is_empty = true;
    let entries = match fs::read_dir(&open) {
        Ok(entries) => entries,
        // It runs as another user, or has just ended. Then the lock itself tells whether anything
        // runs here.
        Err(_) => return alive::is_held(place),
    };
    for entry in entries.flatten() {
        is_empty = false;
        if has_lock(&entry.path()) {
            return Ok(true);
        }
    }
    // One that is ending has closed everything already.
    if is_empty { alive::is_held(place) } else { Ok(false) }
}

/// Returns whether an open file was the lock of this directory until another file took its place, as
/// when a backup is restored over the home of a VM that runs.
///
/// Source: proc_pid_fd(5): the name of a removed file ends with ` (deleted)`.
fn was_replaced(link: &Path, alive: &Path) -> bool {
    let (Ok(open), Some(name)) = (fs::read_link(link), alive.file_name()) else { return false };
    let Some(work) = alive.parent().and_then(|work| work.canonicalize().ok()) else { return false };
    let removed = open.as_os_str().as_encoded_bytes().strip_suffix(b" (deleted)");
    removed.is_some_and(|open| open == work.join(name).as_os_str().as_encoded_bytes())
}

/// Returns whether an open file is the lock; where somebody has removed that, whether the file has
/// no name any more.
fn is_lock(file: &fs::Metadata, lock: Option<(u64, u64)>) -> bool {
    match lock {
        Some(lock) => (file.dev(), file.ino()) == lock,
        None => file.is_file() && file.nlink() == 0 && file.len() == 0,
    }
}

/// Returns whether an open file that is the lock was opened in this directory. A directory that was
/// copied by hard links (`cp -al`) has the very same file, and each is the lock of its own VM.
fn is_opened_here(link: &Path, file: &fs::Metadata, alive: &Path) -> bool {
    if file.nlink() < 2 {
        return true;
    }
    let directory = |path: &Path| {
        let found = fs::metadata(path.parent()?).ok()?;
        Some((found.dev(), found.ino()))
    };
    let theirs = fs::read_link(link).ok().and_then(|open| directory(&open));
    // From another mount namespace the name of the file says nothing.
    theirs.is_none() || theirs == directory(alive)
}

fn rebooted_since(run: &ProcessRun) -> Result<bool> {
    let now = boot_id()?;
    Ok(run.keeper.iter().chain(&run.hypervisor).any(|process| process.boot_id != now))
}

/// Finds a hypervisor whose keeper was killed before it could write down whom it had started: it
/// has inherited the lock's file under the number that only vmkit gives it. Who has opened the file
/// itself, and happened upon that number, is another.
pub(crate) fn orphan(place: &SupervisionPaths) -> Result<Option<ProcessFd>> {
    let keeper = runfile::read(&place.run_file).ok().flatten().and_then(|run| run.keeper);
    for holder in holders(place)?.into_iter().filter(|holder| holder.is_here) {
        let process = ProcessId::of(holder.pid)?;
        // The keeper has a copy for as long as it takes to start the hypervisor.
        if process != keeper
            && let Some(process) = open(process)?
        {
            return Ok(Some(process));
        }
    }
    Ok(None)
}

/// Finds a process that holds the lock for another directory: this one is a copy of that by hard
/// links, or the other way round. Returns its number and that directory.
pub(crate) fn linked_holder(place: &SupervisionPaths) -> Result<Option<(u32, PathBuf)>> {
    let linked = holders(place)?.into_iter().find(|holder| !holder.is_here);
    Ok(linked.and_then(|holder| Some((holder.pid, holder.lock.parent()?.to_owned()))))
}

/// A process that has inherited the lock.
struct Holder {
    pid: u32,
    /// The lock, as it was named when it was opened.
    lock: PathBuf,
    /// Whether it was opened in this directory, and not in one that has the same file.
    is_here: bool,
}

fn holders(place: &SupervisionPaths) -> Result<Vec<Holder>> {
    let path = &place.alive;
    // By the file, not by its name: a home may be reached through a symbolic link.
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

/// Returns whether a process, by its directory in `/proc`, would hand the lock's descriptor on as
/// it was handed it: whatever opens a file for itself marks it to be closed at an exec.
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

/// Returns yes: elsewhere the flags of another process's descriptors are not asked for.
#[cfg(not(target_os = "linux"))]
fn is_inherited(_process: &Path) -> bool {
    true
}

/// Tells of a lock that is held whether a process holds it that can't be seen from here: the record
/// says that it has been started, in this boot, and nothing of an end.
pub(crate) fn runs_out_of_sight(place: &SupervisionPaths) -> bool {
    let Ok(Some(run)) = runfile::read(&place.run_file) else { return false };
    let is_gone = |process| open(process).is_ok_and(|process| process.is_none());
    run.ended.is_none()
        && run.hypervisor.is_some()
        && is_gone(run.hypervisor)
        && is_gone(run.keeper)
        && rebooted_since(&run).is_ok_and(|rebooted| !rebooted)
}

/// Waits until the keeper has written down the end of the run, so that whoever looks next sees it
/// settled.
pub(crate) async fn settled(place: &SupervisionPaths) -> Result<()> {
    if let Ok(Some(run)) = runfile::read(&place.run_file)
        && let Some(keeper) = open(run.keeper)?
    {
        keeper.wait(Instant::now() + KEEPER_GRACE).await?;
    }
    Ok(())
}

/// Kills whatever runs for a VM and waits until it is gone.
///
/// # Errors
/// `TimedOut` where a process survives SIGKILL (it hangs in the kernel).
pub(crate) async fn kill(place: &SupervisionPaths) -> Result<()> {
    let mut found = look(place).await?;
    if let ProcessState::Starting(keeper) = &found {
        // First the keeper, so that it starts nothing more; then what it may have started.
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

/// Kills a process, with more privileges than this user's where it takes them, and returns whether
/// it has ended.
async fn end_by_force(place: &SupervisionPaths, process: &ProcessFd, grace: Duration) -> Result<bool> {
    match (end(process, Signal::KILL, grace).await, &place.killer) {
        // Such a program knows numbers only: this is the one place where one is signalled, and
        // whose it is was just asked.
        (Err(error), Some(killer)) if error.kind() == ErrorKind::Host => {
            if process.id().open()?.is_some() {
                kill_by(killer, process.id().pid).await?;
            }
            process.wait(Instant::now() + grace).await
        }
        (ended, _) => ended,
    }
}

/// Has a program kill the process of this number.
///
/// # Errors
/// `Host` where it can't.
pub(crate) async fn kill_by(killer: &[String], pid: u32) -> Result<()> {
    let (program, arguments) = killer.split_first().expect("a killer has a program");
    crate::steps::step("process: kill by a program").map_err(Error::io("run", program))?;
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).arg(pid.to_string()).env_clear().stdin(Stdio::null());
    let failed = |problem: String| Error::host(killer.join(" "), problem);
    let output = timeout(KILLER_LIMIT, command.kill_on_drop(true).output()).await;
    let output = output.map_err(|_| failed("it does not end".to_owned()))?;
    let output = output.map_err(|error| failed(format!("it can't be run: {}", child_problem(&error))))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// Signals a process and waits for its end; answers whether it has ended.
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

    /// A place whose lock is held, and which tells of a start or of an end.
    fn place(dir: &Path) -> (SupervisionPaths, OwnedFd) {
        let place = SupervisionPaths {
            alive: dir.join("alive"),
            run_file: dir.join("run.json"),
            run_dir: dir.join("run"),
            program: "QEMU",
            killer: None,
        };
        fs::create_dir(&place.run_dir).unwrap();
        let lock = alive::try_take(&place).unwrap().unwrap();
        (place, lock)
    }

    #[tokio::test]
    async fn a_keeper_that_has_written_the_end_and_still_has_the_lock_is_no_start() {
        let dir = tempfile::tempdir().unwrap();
        let (place, lock) = place(dir.path());
        // Stands in for a keeper that is slow to remove its sockets: it has the lock as its
        // standard input.
        let mut keeper = Command::new("sleep").arg("0.3").stdin(Stdio::from(lock)).spawn().unwrap();
        let ended = Some(ProcessEnd { code: Some(0), signal: None });
        let run = ProcessRun { keeper: ProcessId::of(keeper.id()).unwrap(), ended, ..ProcessRun::default() };
        fs::write(&place.run_file, serde_json::to_vec(&run).unwrap()).unwrap();
        assert!(alive::is_held(&place).unwrap());
        let found = look(&place).await.unwrap();
        assert!(matches!(found, ProcessState::Ended(Some(ProcessEnd { code: Some(0), .. }))), "{found:?}");
        keeper.wait().unwrap();
    }

    #[test]
    fn whoever_has_opened_the_lock_under_the_same_number_is_no_hypervisor() {
        let dir = tempfile::tempdir().unwrap();
        let (place, lock) = place(dir.path());
        let own = rustix::io::fcntl_dupfd_cloexec(&lock, ALIVE_DESCRIPTOR).unwrap();
        assert!(orphan(&place).unwrap().is_none(), "it would be killed");
        // As an inherited one is.
        rustix::io::fcntl_setfd(&own, rustix::io::FdFlags::empty()).unwrap();
        let found = orphan(&place).unwrap().map(|process| process.id().pid);
        assert_eq!(found, Some(std::process::id()), "the number is taken: {own:?}");
    }

    #[tokio::test]
    async fn a_lock_that_somebody_holds_for_a_start_is_one() {
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
        assert!(matches!(look(&place).await.unwrap(), ProcessState::Ended(Some(_))));
    }

    #[tokio::test]
    async fn a_program_kills_the_process_of_a_number_or_says_why_not() {
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
