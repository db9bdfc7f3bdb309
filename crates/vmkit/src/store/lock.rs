//! A lock in a file, as each VM has one: held by the kernel for a process, so it dies with it.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Result};
use crate::flock::{is_at, wait_in_kernel};
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
/// is there any more to take it, dropping the file frees the lock: what was given up ends with its turn. All that wait for
/// one file do so in one thread, one after the other, so that trying again and again leaves no more than that. It is not
/// one of the runtime's threads, since the runtime would wait for it at its end.
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
    let receiver = queue(file, hold).map_err(Error::io("wait for", path))?;
    match timeout_at(deadline, receiver).await {
        Ok(outcome) => outcome
            .expect("the thread sends before it ends")
            .map_err(|errno| Error::io("lock", path)(errno.into())),
        Err(_) => Err(busy()),
    }
}

/// Somebody who waits for the lock of an open file.
struct Waiter {
    file: File,
    hold: Hold,
    sender: oneshot::Sender<Result<Lock, Errno>>,
}

/// Which file: its device and its number there.
type FileId = (u64, u64);

/// Those who wait behind the one that a thread is waiting for, a queue for each such thread.
static WAITERS: Mutex<BTreeMap<FileId, VecDeque<Waiter>>> = Mutex::new(BTreeMap::new());

fn waiters() -> MutexGuard<'static, BTreeMap<FileId, VecDeque<Waiter>>> {
    WAITERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Queues for the lock of a file, behind a thread that is begun where there is none.
fn queue(file: File, hold: Hold) -> io::Result<oneshot::Receiver<Result<Lock, Errno>>> {
    let found = file.metadata()?;
    let id = (found.dev(), found.ino());
    let (sender, receiver) = oneshot::channel();
    let waiter = Waiter { file, hold, sender };
    let mut waiters = waiters();
    match waiters.get_mut(&id) {
        Some(queue) => queue.push_back(waiter),
        None => {
            thread::Builder::new().name("vmkit-lock".into()).spawn(move || wait_for_all(id, waiter))?;
            waiters.insert(id, VecDeque::new());
        }
    }
    Ok(receiver)
}

/// Waits for the lock for the first one, then for each that has queued meanwhile.
fn wait_for_all(id: FileId, first: Waiter) {
    let mut next = Some(first);
    while let Some(Waiter { file, hold, sender }) = next {
        let outcome = wait_in_kernel(&file, hold.waiting()).map(|()| Lock(file));
        // Who is gone leaves the lock to the next one.
        let _ = sender.send(outcome);
        let mut waiters = waiters();
        next = waiters.get_mut(&id).and_then(|queue| {
            queue.retain(|waiter| !waiter.sender.is_closed());
            queue.pop_front()
        });
        if next.is_none() {
            waiters.remove(&id);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn is_waited_for(path: &Path) -> bool {
        let found = fs::metadata(path).unwrap();
        waiters().contains_key(&(found.dev(), found.ino()))
    }

    #[tokio::test]
    async fn who_gave_up_waits_in_one_thread_and_leaves_the_lock_to_the_next() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let held = acquire(&path, Hold::Alone, late()).await.unwrap().unwrap();
        let busy = |error: Error| assert!(matches!(error, Error::Busy { holder: Some(_), .. }), "{error:?}");
        busy(acquire(&path, Hold::Alone, Instant::now()).await.unwrap_err());
        assert!(!is_waited_for(&path), "who does not wait needs no thread");
        for _ in 0..5 {
            busy(acquire(&path, Hold::Alone, soon()).await.unwrap_err());
        }
        let found = fs::metadata(&path).unwrap();
        assert_eq!(waiters()[&(found.dev(), found.ino())].len(), 4, "all wait in the first one's thread");
        let waits = path.clone();
        let next = tokio::spawn(async move { acquire(&waits, Hold::Alone, late()).await });
        tokio::task::yield_now().await;
        drop(held);
        let held = next.await.unwrap().unwrap().unwrap();
        assert!(is_held(&path));
        drop(held);
        let again = acquire(&path, Hold::Alone, late()).await.unwrap().unwrap();
        drop(again);
        let deadline = late();
        while is_waited_for(&path) {
            assert!(Instant::now() < deadline, "the thread does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
