//! A lock in a file, as each VM has one: held by the kernel for a process, so it dies with it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::thread;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Result};
use crate::steps::step;

/// A lock, held until this is dropped.
#[derive(Debug)]
pub(crate) struct Lock(File);

/// Whether others may hold the lock at the same time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hold {
    /// Nobody else may.
    Alone,
    /// Those may who hold it so themselves.
    #[cfg_attr(not(feature = "images"), expect(dead_code, reason = "only images are held by several"))]
    Shared,
}

impl Hold {
    fn at_once(self) -> FlockOperation {
        match self {
            Hold::Alone => FlockOperation::NonBlockingLockExclusive,
            Hold::Shared => FlockOperation::NonBlockingLockShared,
        }
    }

    fn waiting(self) -> FlockOperation {
        match self {
            Hold::Alone => FlockOperation::LockExclusive,
            Hold::Shared => FlockOperation::LockShared,
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread is just spawning has the file, too, until it execs.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Opens the lock file, made if need be, and waits for the lock. `None`: the directory it lies in is not there.
///
/// The file may have been removed with its VM while this waited; then the lock of the new file counts.
///
/// # Errors
/// `Busy` with the holder's PID once the deadline has passed.
pub(crate) async fn acquire(path: &Path, hold: Hold, deadline: Instant) -> Result<Option<Lock>> {
    loop {
        let Some(file) = open(path)? else { return Ok(None) };
        let mut lock = locked(file, path, hold, deadline).await?;
        if is_at(&lock.0, path)? {
            if matches!(hold, Hold::Alone) {
                // A PID that can't be written is missing in somebody's message and nowhere else.
                let _ = sign(&mut lock.0);
            }
            return Ok(Some(lock));
        }
    }
}

/// Tells whether somebody works on the VM right now. Changes nothing, and lets go of the lock at once.
pub(super) fn is_held(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => {
            drop(Lock(file));
            false
        }
        Err(errno) => errno == Errno::WOULDBLOCK,
    }
}

fn open(path: &Path) -> Result<Option<File>> {
    if let Ok(file) = OpenOptions::new().read(true).write(true).open(path) {
        return Ok(Some(file));
    }
    let opened = step("create the lock").and_then(|()| {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
    });
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // A lock needs no writing, and what runs in a home that has become read-only must be stopped all the same.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => match File::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(_) => Err(Error::io("create", path)(error)),
        },
        Err(error) => Err(Error::io("create", path)(error)),
    }
}

/// Waits for the lock of an open file.
///
/// `flock` has no deadline and no descriptor to poll, so a thread waits in it and hands over the locked file. When nobody
/// is there any more to take it, dropping the file frees the lock: a thread that was given up ends with its turn. It is
/// not one of the runtime's threads, since the runtime would wait for it at its end.
async fn locked(file: File, path: &Path, hold: Hold, deadline: Instant) -> Result<Lock> {
    match flock(&file, hold.at_once()) {
        Ok(()) => return Ok(Lock(file)),
        Err(Errno::WOULDBLOCK) => {}
        Err(errno) => return Err(Error::io("lock", path)(errno.into())),
    }
    let busy = || Error::Busy { what: path.display().to_string(), holder: holder(path) };
    if deadline <= Instant::now() {
        return Err(busy());
    }
    let (sender, receiver) = oneshot::channel();
    let wait = move || {
        let outcome = loop {
            match flock(&file, hold.waiting()) {
                Err(Errno::INTR) => {}
                outcome => break outcome.map(|()| Lock(file)),
            }
        };
        let _ = sender.send(outcome);
    };
    thread::Builder::new().name("vmkit-lock".into()).spawn(wait).map_err(Error::io("wait for", path))?;
    match timeout_at(deadline, receiver).await {
        Ok(outcome) => outcome
            .expect("the thread sends before it ends")
            .map_err(|errno| Error::io("lock", path)(errno.into())),
        Err(_) => Err(busy()),
    }
}

/// Tells whether this open file is the one that the path names.
fn is_at(file: &File, path: &Path) -> Result<bool> {
    let held = file.metadata().map_err(Error::io("look at", path))?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("look at", path)(error)),
    }
}

/// Writes this process's PID into the lock, for whoever has to say who holds it.
fn sign(file: &mut File) -> io::Result<()> {
    step("sign the lock")?;
    file.set_len(0)?;
    write!(file, "{}", std::process::id())
}

fn holder(path: &Path) -> Option<u32> {
    let mut text = String::new();
    File::open(path).ok()?.take(16).read_to_string(&mut text).ok()?;
    text.parse().ok()
}
