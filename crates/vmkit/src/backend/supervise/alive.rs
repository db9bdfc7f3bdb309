//! The lock that is held while anything of a VM runs, or is about to: by the process that creates,
//! starts or removes it, then by the keeper and the hypervisor, which inherit it. The kernel
//! releases it when the last of them is gone, for whatever reason.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::time::Instant;

use super::SupervisionPaths;
use super::process;
use crate::error::{Error, Result};
use crate::flock::{LockMode, LockWait, is_at};
use crate::steps::step;
use crate::store::denied;

/// The pause before the running process is looked for again while another process holds the lock: a
/// start that has a process holds the lock until that ends.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A file of the backends that hold the lock `alive` while a VM runs.
const OWNER: &str = "owner";
/// Files of a backend whose VMs may run elsewhere, and so without a lock on this host.
const REMOTE: [&str; 3] = ["operation", "server.json", "propolis.json"];

/// Takes the lock if it is free; `None` if something runs or is about to.
///
/// # Errors
/// `Io` if the work directory does not exist, or is not writable.
pub(crate) fn try_take(place: &SupervisionPaths) -> Result<Option<OwnedFd>> {
    loop {
        let file = open(place)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) if is_at(&file, &place.alive)? => return Ok(Some(file.into())),
            // The VM was removed, and another one created, between opening and locking the file.
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(Error::io("lock", &place.alive)(errno.into())),
        }
    }
}

/// Takes the lock in the directory of a VM whose record can't be read, whatever its backend; `None`
/// for a VM that may run without the lock of this directory.
///
/// # Errors
/// `Busy` if something runs.
pub(crate) fn try_take_unread(dir: &Path) -> Result<Option<OwnedFd>> {
    let is_here = dir.join(OWNER).exists() && !REMOTE.iter().any(|name| dir.join(name).exists());
    if !is_here {
        return Ok(None);
    }
    let place = SupervisionPaths {
        alive: dir.join("alive"),
        run_file: dir.join("qemu.json"),
        run_dir: dir.to_owned(),
        program: "the hypervisor",
        killer: None,
    };
    match try_take(&place)? {
        Some(lock) => Ok(Some(lock)),
        None => {
            let what = format!("{}, which is held while the VM runs,", place.alive.display());
            Err(Error::Busy { what, holder: None })
        }
    }
}

/// Takes the lock to start the VM; `None` if the VM runs already, started by another process.
///
/// # Errors
/// `Busy` if neither is the case by the deadline.
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) async fn take_unless_live(place: &SupervisionPaths, deadline: Instant) -> Result<Option<OwnedFd>> {
    if let Some(lock) = try_take(place)? {
        return Ok(Some(lock));
    }
    let mut waiting = AliveWaiter::begin(place)?;
    loop {
        if let Some(lock) = waiting.for_a_moment(place).await? {
            return Ok(Some(lock));
        }
        if matches!(process::look(place).await?, process::ProcessState::Live(_)) {
            return Ok(None);
        }
        held_at(deadline, place)?;
    }
}

/// Ends what runs, and returns the lock: nothing runs until it is dropped.
///
/// # Errors
/// `Busy` if the lock is still held at the deadline, `TimedOut` if a process survives SIGKILL.
pub(crate) async fn take_and_silence(place: &SupervisionPaths, deadline: Instant) -> Result<OwnedFd> {
    process::kill(place).await?;
    if let Some(lock) = try_take(place)? {
        return Ok(lock);
    }
    let mut waiting = AliveWaiter::begin(place)?;
    loop {
        if let Some(lock) = waiting.for_a_moment(place).await? {
            return Ok(lock);
        }
        process::kill(place).await?;
        held_at(deadline, place)?;
    }
}

fn held_at(deadline: Instant, place: &SupervisionPaths) -> Result<()> {
    if Instant::now() < deadline {
        return Ok(());
    }
    let what = match process::runs_out_of_sight(place) {
        true => format!(
            "the VM's process is in another PID namespace, such as a container's: \
             end it from there; {}",
            place.alive.display()
        ),
        false => format!("{}, which is held while the VM is being started or ended,", place.alive.display()),
    };
    Err(Error::Busy { what, holder: None })
}

/// A pending request for the lock.
struct AliveWaiter(LockWait);

impl AliveWaiter {
    fn begin(place: &SupervisionPaths) -> Result<Self> {
        LockWait::begin(open(place)?, LockMode::Alone, &place.alive).map(Self)
    }

    async fn for_a_moment(&mut self, place: &SupervisionPaths) -> Result<Option<OwnedFd>> {
        let waited = self.0.until(Instant::now() + LOOK_AGAIN).await;
        match waited.map_err(Error::io("lock", &place.alive))? {
            Some(lock) if is_at(&lock, &place.alive)? => Ok(Some(lock.into())),
            Some(_) => {
                *self = Self::begin(place)?;
                Ok(None)
            }
            None => Ok(None),
        }
    }
}

fn open(place: &SupervisionPaths) -> Result<File> {
    let path = &place.alive;
    step("alive: lock").map_err(Error::io("lock", path))?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(path).map_err(denied("open", path))
}
