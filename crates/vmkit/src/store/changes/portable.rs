//! Changes where the system has no inotify, or none that a safe crate wraps: the directory is
//! looked at again and again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::sleep;

use crate::error::{Error, Result};

/// How long a change may go unseen.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What a directory is like: another one whenever something in it was made, renamed or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DirStamp {
    file: (u64, u64),
    changed: (i64, i64),
}

/// The changes of one VM's records from now on.
#[derive(Debug)]
pub(crate) struct RecordChanges {
    dir: PathBuf,
    seen: Mutex<DirStamp>,
    /// Whether the passing of time is a change: growth of a file is not seen.
    is_timer: bool,
}

impl RecordChanges {
    /// Starts to watch a VM's directory. Read the VM after this: earlier changes raise no event.
    ///
    /// # Errors
    /// `NotFound`-like `Io` without the directory.
    pub(in crate::store) fn of(dir: &Path) -> Result<Self> {
        let seen = look(dir).map_err(Error::io("watch", dir))?;
        Ok(Self { dir: dir.to_owned(), seen: Mutex::new(seen), is_timer: false })
    }

    /// Starts to watch a directory for files that are created and removed; growth is not seen.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    #[cfg(all(feature = "images", not(target_os = "linux")))]
    pub(crate) fn of_files(dir: &Path) -> Result<Self> {
        Self::of(dir)
    }

    /// Starts to watch one file for writes, also after another file has replaced it.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn of_log(file: &Path) -> Result<Self> {
        Self::of(file)
    }

    /// Starts to watch the logs in a directory; each pause counts as a change.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn of_logs(dir: &Path) -> Result<Self> {
        Ok(Self { is_timer: true, ..Self::of(dir)? })
    }

    /// Waits for the next change; several at once are one. That the directory was removed is one,
    /// too.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn next(&self) -> Result<()> {
        loop {
            match look(&self.dir) {
                Ok(now) => {
                    let mut seen = self.seen.lock().expect("nothing panics while it holds the look");
                    if *seen != now {
                        *seen = now;
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(Error::io("watch", &self.dir)(error)),
            }
            sleep(LOOK_AGAIN).await;
            if self.is_timer {
                return Ok(());
            }
        }
    }
}

fn look(dir: &Path) -> io::Result<DirStamp> {
    let found = fs::metadata(dir)?;
    Ok(DirStamp { file: (found.dev(), found.ino()), changed: (found.ctime(), found.ctime_nsec()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    #[tokio::test]
    async fn a_renamed_file_and_the_end_of_the_directory_are_seen() {
        let above = tempfile::tempdir().unwrap();
        let dir = above.path().join("web");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("run.json.new"), "{}").unwrap();
        let changes = RecordChanges::of(&dir).unwrap();
        assert!(
            timeout(Duration::from_millis(10), changes.next()).await.is_err(),
            "nothing has happened yet"
        );
        fs::rename(dir.join("run.json.new"), dir.join("run.json")).unwrap();
        timeout(Duration::from_secs(60), changes.next()).await.unwrap().unwrap();
        assert!(timeout(Duration::from_millis(10), changes.next()).await.is_err(), "once is enough");
        fs::remove_dir_all(&dir).unwrap();
        timeout(Duration::from_secs(60), changes.next()).await.unwrap().unwrap();
        assert!(RecordChanges::of(&dir).is_err());
    }
}
