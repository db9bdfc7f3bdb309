//! Locks in files: what is needed beside `flock` itself.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::blocking;
use crate::error::{Error, Result};

/// Whether other processes may hold the lock at the same time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LockMode {
    /// No other process.
    Alone,
    /// Other holders of a shared lock.
    Shared,
}

impl LockMode {
    /// Returns the operation that does not wait.
    pub(crate) fn at_once(self) -> FlockOperation {
        match self {
            LockMode::Alone => FlockOperation::NonBlockingLockExclusive,
            LockMode::Shared => FlockOperation::NonBlockingLockShared,
        }
    }

    fn waiting(self) -> FlockOperation {
        match self {
            LockMode::Alone => FlockOperation::LockExclusive,
            LockMode::Shared => FlockOperation::LockShared,
        }
    }
}

/// A file that is locked until this is dropped.
#[derive(Debug)]
pub(crate) struct FileLock(File);

impl FileLock {
    /// Takes ownership of a file that is locked already.
    pub(crate) fn of_locked(file: File) -> Self {
        Self(file)
    }

    /// Locks an open file; `None` if another process holds the lock.
    pub(crate) fn try_take(file: File, mode: LockMode) -> io::Result<Result<Self, File>> {
        match flock(&file, mode.at_once()) {
            Ok(()) => Ok(Ok(Self(file))),
            Err(Errno::WOULDBLOCK) => Ok(Err(file)),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Returns the file.
    pub(crate) fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // Closing is not enough: a child that another thread is just spawning also has the file,
        // until it execs.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Returns whether another process holds the lock of an open file.
pub(crate) fn is_locked(file: File) -> io::Result<bool> {
    FileLock::try_take(file, LockMode::Shared).map(|taken| taken.is_err())
}

/// Waits for the lock of an open file.
///
/// `flock` has no timeout and no descriptor to poll, so a thread waits in it and sends the locked
/// file. If the receiver is gone, the lock is released: an abandoned wait ends when it gets the
/// lock. All waits for one file share one thread, one after the other, and an abandoned one is
/// removed when the next one starts, so that repeated attempts accumulate no more than that. It is
/// not a thread of the runtime, since the runtime would wait for it at its end.
#[derive(Debug)]
pub(crate) struct LockWait(oneshot::Receiver<Result<File, Errno>>);

impl LockWait {
    /// Starts to wait for the lock of the file, which messages call `path`.
    ///
    /// # Errors
    /// `Host` if the host can't create another thread; otherwise `Io`.
    pub(crate) fn begin(file: File, hold: LockMode, path: &Path) -> Result<Self> {
        let found = file.metadata().map_err(Error::io("examine", path))?;
        let id = (found.dev(), found.ino());
        let (sender, receiver) = oneshot::channel();
        let waiter = LockWaiter { file, hold, sender };
        let mut waiters = waiters();
        match waiters.get_mut(&id) {
            Some(queue) => {
                queue.retain(|waiter| !waiter.sender.is_closed());
                queue.push_back(waiter);
            }
            None => {
                blocking::spawn("vmkit-lock", move || wait_for_all(id, waiter))?;
                waiters.insert(id, VecDeque::new());
            }
        }
        Ok(Self(receiver))
    }

    /// Returns the locked file, or `None` at the deadline, after which it may be called again.
    ///
    /// # Errors
    /// Those of the kernel.
    pub(crate) async fn until(&mut self, deadline: Instant) -> io::Result<Option<File>> {
        match timeout_at(deadline, &mut self.0).await {
            Ok(Ok(locked)) => Ok(Some(locked?)),
            Ok(Err(gone)) => Err(io::Error::other(gone)),
            Err(_) => Ok(None),
        }
    }
}

/// A task that waits for the lock of an open file.
struct LockWaiter {
    file: File,
    hold: LockMode,
    sender: oneshot::Sender<Result<File, Errno>>,
}

/// The identity of a file: its device and its inode.
type LockedFile = (u64, u64);

/// The tasks that wait behind the one for which a thread is waiting, a queue for each such thread.
static WAITERS: Mutex<BTreeMap<LockedFile, VecDeque<LockWaiter>>> = Mutex::new(BTreeMap::new());

fn waiters() -> MutexGuard<'static, BTreeMap<LockedFile, VecDeque<LockWaiter>>> {
    WAITERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for the lock for the first task, then for each that was queued meanwhile.
fn wait_for_all(id: LockedFile, first: LockWaiter) {
    let mut next = Some(first);
    while let Some(LockWaiter { file, hold, sender }) = next {
        let outcome = wait_in_kernel(&file, hold.waiting()).map(|()| file);
        // An abandoned lock is released for the next task. Closing is not enough: a child that
        // another thread is just spawning also has the file, until it execs.
        if let Err(Ok(file)) = sender.send(outcome) {
            let _ = flock(&file, FlockOperation::Unlock);
        }
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

/// Waits in the kernel for the lock of an open file, and continues after signals.
fn wait_in_kernel(file: &File, operation: FlockOperation) -> Result<(), Errno> {
    loop {
        match flock(file, operation) {
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}

/// Returns whether the path still refers to an open file: the locked file may have been removed,
/// and another one created.
///
/// # Errors
/// `Io`, `Host`.
pub(crate) fn is_at(file: &File, path: &Path) -> Result<bool> {
    let held = file.metadata().map_err(Error::io("look at", path))?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("look at", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn file(path: &Path) -> File {
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    fn after(millis: u64) -> Instant {
        Instant::now() + Duration::from_millis(millis)
    }

    #[tokio::test]
    async fn who_gave_up_waits_in_one_thread_and_leaves_the_lock_to_the_next() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let held = file(&path);
        let held = FileLock::try_take(held, LockMode::Alone).unwrap().unwrap();
        let found = held.file().metadata().unwrap();
        let id = (found.dev(), found.ino());
        for _ in 0..5 {
            let mut waiting = LockWait::begin(file(&path), LockMode::Alone, &path).unwrap();
            assert!(waiting.until(after(20)).await.unwrap().is_none());
        }
        assert_eq!(
            waiters()[&id].len(),
            1,
            "one waits, and of those behind it the last is not forgotten yet"
        );
        let mut next = LockWait::begin(file(&path), LockMode::Alone, &path).unwrap();
        assert_eq!(waiters()[&id].len(), 1, "it is now");
        drop(held);
        let locked = FileLock::of_locked(next.until(after(60_000)).await.unwrap().unwrap());
        assert_eq!(flock(file(&path), LockMode::Alone.at_once()), Err(Errno::WOULDBLOCK));
        drop(locked);
        let deadline = after(60_000);
        while waiters().contains_key(&id) {
            assert!(Instant::now() < deadline, "the thread does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        flock(file(&path), LockMode::Alone.at_once()).unwrap();
    }
    #[test]
    fn a_lock_ends_with_its_holder_though_a_child_of_another_thread_has_the_file_still() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let held = FileLock::try_take(file(&path), LockMode::Alone).unwrap().unwrap();
        let _of_a_child = held.file().try_clone().unwrap();
        assert!(is_locked(file(&path)).unwrap());
        drop(held);
        let asked = file(&path);
        let _of_another = asked.try_clone().unwrap();
        assert!(!is_locked(asked).unwrap());
        FileLock::try_take(file(&path), LockMode::Alone).unwrap().expect("the question is over");
    }
}
