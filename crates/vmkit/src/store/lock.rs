//! A lock in a file, such as each VM's: the kernel releases it when the process ends.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tokio::time::Instant;

use crate::error::{Error, Result};
pub(crate) use crate::flock::{FileLock, LockMode};
use crate::flock::{LockWait, is_at, is_locked};
use crate::input_file::open_regular;
use crate::steps::step;
use crate::store::{denied, refuse_other_user};

/// Opens the lock file, which is created if needed, and waits for the lock; returns `None` if its
/// directory does not exist.
///
/// The file may be removed with its VM while this waits; then it waits for the lock of the new
/// file.
///
/// # Errors
/// `Busy` with the holder's PID after the deadline.
pub(crate) async fn acquire(path: &Path, hold: LockMode, deadline: Instant) -> Result<Option<FileLock>> {
    loop {
        let Some(file) = open(path, hold)? else { return Ok(None) };
        let lock = locked(file, path, hold, deadline).await?;
        if is_at(lock.file(), path)? {
            if matches!(hold, LockMode::Alone) {
                // Without the PID only messages about the lock lack it.
                let _ = sign(lock.file());
            }
            return Ok(Some(lock));
        }
    }
}

/// Returns whether another operation on the VM is running. Changes nothing, and releases the lock
/// at once.
pub(super) fn is_held(path: &Path) -> bool {
    let Ok(file) = open_regular(path) else { return false };
    is_locked(file).unwrap_or(false)
}

fn open(path: &Path, hold: LockMode) -> Result<Option<File>> {
    // Root can open every directory, but its files would not belong to the directory's owner.
    if let Err(error) = path.parent().map_or(Ok(()), refuse_other_user) {
        // A reader need not create it.
        return match (hold, File::open(path)) {
            (LockMode::Shared, Ok(file)) => Ok(Some(file)),
            _ => Err(error),
        };
    }
    if let Ok(file) = OpenOptions::new().read(true).write(true).open(path) {
        return Ok(Some(file));
    }
    let opened = step("create the lock").and_then(|()| {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
    });
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // An empty directory in the lock's place is nothing of vmkit's.
        Err(error) if error.kind() == io::ErrorKind::IsADirectory && fs::remove_dir(path).is_ok() => {
            open(path, hold)
        }
        // A lock needs no write access, and VMs in a home that has become read-only must still be
        // stopped.
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => match File::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(_) => Err(Error::io("create", path)(error)),
        },
        Err(error) => Err(denied("open", path)(error)),
    }
}

/// Waits for the lock of an open file.
pub(super) async fn locked(file: File, path: &Path, hold: LockMode, deadline: Instant) -> Result<FileLock> {
    let file = match FileLock::try_take(file, hold).map_err(Error::io("lock", path))? {
        Ok(lock) => return Ok(lock),
        Err(file) => file,
    };
    let busy = || Error::Busy { what: path.display().to_string(), holder: holder(path) };
    if deadline <= Instant::now() {
        return Err(busy());
    }
    let mut waiting = LockWait::begin(file, hold, path)?;
    match waiting.until(deadline).await.map_err(Error::io("lock", path))? {
        Some(file) => Ok(FileLock::of_locked(file)),
        None => Err(busy()),
    }
}

/// Writes this process's PID into the lock file, for messages about its holder.
fn sign(mut file: &File) -> io::Result<()> {
    step("sign the lock")?;
    file.set_len(0)?;
    write!(file, "{}", std::process::id())
}

fn holder(path: &Path) -> Option<u32> {
    let mut text = String::new();
    open_regular(path).ok()?.take(16).read_to_string(&mut text).ok()?;
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[tokio::test]
    async fn a_caller_that_gives_up_gets_the_holder_and_leaves_the_lock_to_the_next() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("lock");
        let held = acquire(&path, LockMode::Alone, late()).await.unwrap().unwrap();
        for soon in [Duration::ZERO, Duration::from_millis(20)] {
            let error = acquire(&path, LockMode::Alone, Instant::now() + soon).await.unwrap_err();
            let here = std::process::id();
            assert!(matches!(error, Error::Busy { holder: Some(pid), .. } if pid == here), "{error:?}");
        }
        let waits = path.clone();
        let next = tokio::spawn(async move { acquire(&waits, LockMode::Alone, late()).await });
        tokio::task::yield_now().await;
        drop(held);
        let held = next.await.unwrap().unwrap().unwrap();
        assert!(is_held(&path));
        drop(held);
        drop(acquire(&path, LockMode::Alone, late()).await.unwrap().unwrap());
    }
}
