//! The lock that is held while anything of a VM runs, or is about to: by whoever makes, starts or removes it, then by the
//! keeper and QEMU, which inherit it. The kernel frees it when the last of them is gone, however that came.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use super::layout::Layout;
use super::process::{self, Found};
use crate::error::{Error, Result};
use crate::steps::step;

/// How long the lock is waited for before what runs is looked at again: a start that has come as far as a process shows
/// itself there, and holds the lock from then on.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Takes the lock if it is free; `None` where something runs or is about to.
///
/// # Errors
/// `Io` where the work directory is not there, or not writable.
pub(super) fn try_take(layout: &Layout) -> Result<Option<OwnedFd>> {
    let file = open(layout)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file.into())),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(Error::io("lock", layout.alive_lock())(errno.into())),
    }
}

/// Tells whether anybody holds the lock, without taking it for longer than the question lasts.
pub(super) fn is_held(layout: &Layout) -> Result<bool> {
    let path = layout.alive_lock();
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(Error::io("lock", path)(errno.into())),
    }
}

/// Takes the lock to start the VM; `None` where it turns out to be running already, by somebody else's start.
///
/// # Errors
/// `Busy` where neither comes true by the deadline.
pub(super) async fn take_unless_live(layout: &Layout, deadline: Instant) -> Result<Option<OwnedFd>> {
    if let Some(lock) = try_take(layout)? {
        return Ok(Some(lock));
    }
    let mut waiting = Waiting::begin(layout)?;
    loop {
        if let Some(lock) = waiting.for_a_moment(layout).await? {
            return Ok(Some(lock));
        }
        if matches!(process::look(layout).await?, Found::Live(_)) {
            return Ok(None);
        }
        held_at(deadline, layout)?;
    }
}

/// Ends whatever runs, and answers the lock, so that nothing runs until it is dropped.
///
/// # Errors
/// `Busy` where the lock does not become free by the deadline, `TimedOut` where a process survives SIGKILL.
pub(super) async fn take_and_silence(layout: &Layout, deadline: Instant) -> Result<OwnedFd> {
    process::kill(layout).await?;
    if let Some(lock) = try_take(layout)? {
        return Ok(lock);
    }
    let mut waiting = Waiting::begin(layout)?;
    loop {
        if let Some(lock) = waiting.for_a_moment(layout).await? {
            return Ok(lock);
        }
        process::kill(layout).await?;
        held_at(deadline, layout)?;
    }
}

fn held_at(deadline: Instant, layout: &Layout) -> Result<()> {
    if Instant::now() < deadline {
        return Ok(());
    }
    let what =
        format!("{}, which tells that the VM is being started or ended,", layout.alive_lock().display());
    Err(Error::Busy { what, holder: None })
}

/// A thread that waits in the kernel for the lock. One that is given up ends when it gets the lock, and drops it.
struct Waiting(oneshot::Receiver<io::Result<OwnedFd>>);

impl Waiting {
    fn begin(layout: &Layout) -> Result<Self> {
        let file = open(layout)?;
        let (taken, answer) = oneshot::channel();
        // A thread of its own: a runtime that ends would wait for one of its blocking threads.
        std::thread::spawn(move || {
            let locked = rustix::fs::flock(&file, FlockOperation::LockExclusive);
            let _ = taken.send(locked.map(|()| OwnedFd::from(file)).map_err(io::Error::from));
        });
        Ok(Self(answer))
    }

    async fn for_a_moment(&mut self, layout: &Layout) -> Result<Option<OwnedFd>> {
        let failed = || Error::io("lock", layout.alive_lock());
        match timeout(LOOK_AGAIN, &mut self.0).await {
            Ok(Ok(lock)) => lock.map(Some).map_err(failed()),
            Ok(Err(gone)) => Err(failed()(io::Error::other(gone))),
            Err(_) => Ok(None),
        }
    }
}

fn open(layout: &Layout) -> Result<File> {
    let path = layout.alive_lock();
    step("alive: lock").map_err(Error::io("lock", &path))?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options.open(&path).map_err(Error::io("open", &path))
}
