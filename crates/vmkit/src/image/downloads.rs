//! Downloads in progress: a directory for each, and a lock, so that several processes share one.
//!
//! Edge: files, locks and their events. The process with the lock of a download fetches it; the
//! others watch it grow, and take over if that process dies.

use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::files::{entries, remove_file};
use super::progress::{PullProgress, PullStage};
use crate::error::{Error, Result, Subject};
use crate::steps::step;
use crate::store::lock::{self, FileLock, LockMode};
use crate::store::{RecordChanges, create_private};

/// The file with the bytes as received.
pub(super) const DOWNLOAD: &str = "download";
/// The lock of a download, in its directory.
const LOCK: &str = "lock";
/// How long another process's download may make no progress: longer than it takes to give up.
const PATIENCE: Duration = Duration::from_secs(600);

/// The downloads of a home.
#[derive(Debug, Clone)]
pub(super) struct Downloads {
    pub(super) dir: PathBuf,
}

/// The directory of a download, locked as long as anything works in it, including the threads of an
/// abandoned intake.
#[derive(Debug, Clone)]
pub(super) struct DownloadDir {
    pub(super) dir: PathBuf,
    _lock: Arc<FileLock>,
}

/// Which process is to fetch.
pub(super) enum FetchTurn {
    /// This one, in this directory.
    Mine(DownloadDir),
    /// Another one, which has ended.
    Over,
}

impl DownloadDir {
    fn held(dir: &Path, lock: FileLock) -> Self {
        Self { dir: dir.to_owned(), _lock: Arc::new(lock) }
    }

    /// Creates a directory that no other process knows.
    pub(super) async fn new(dir: &Path) -> Result<Self> {
        create_private(dir)?;
        match lock::acquire(&dir.join(LOCK), LockMode::Alone, Instant::now() + PATIENCE).await? {
            Some(lock) => Ok(Self::held(dir, lock)),
            None => Err(Error::not_found(Subject::Directory, dir.display())),
        }
    }
}

impl Downloads {
    /// Waits for the turn to fetch what is at an address; pulls with the same key share one
    /// download.
    ///
    /// # Errors
    /// `Busy` if another process fetches it, without progress for ten minutes.
    pub(super) async fn turn(
        &self,
        key: &str,
        url: &str,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<FetchTurn> {
        let dir = self.dir.join(key);
        create_private(&dir)?;
        let path = dir.join(LOCK);
        match lock::acquire(&path, LockMode::Alone, Instant::now()).await {
            Ok(Some(lock)) => return Ok(FetchTurn::Mine(DownloadDir::held(&dir, lock))),
            Ok(None) => return Ok(FetchTurn::Over),
            Err(Error::Busy { .. }) => {}
            Err(error) => return Err(error),
        }
        let mut seen_bytes = grown(&dir);
        loop {
            progress.send_modify(|progress| progress.stage = PullStage::Waiting);
            let lock = tokio::select! {
                lock = lock::acquire(&path, LockMode::Alone, Instant::now() + PATIENCE) => lock,
                never = show_growth(&dir, progress) => match never {},
            };
            match lock {
                // The process that had the lock has finished, failed or died.
                Ok(Some(lock)) => return Ok(FetchTurn::Mine(DownloadDir::held(&dir, lock))),
                Ok(None) => return Ok(FetchTurn::Over),
                Err(Error::Busy { .. }) if grown(&dir) != seen_bytes => seen_bytes = grown(&dir),
                Err(Error::Busy { holder, .. }) => {
                    return Err(Error::Busy { what: format!("the download of {url}"), holder });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Removes the downloads that no process works on, and returns how many bytes that freed.
    pub(super) async fn prune(&self) -> Result<u64> {
        let mut freed_bytes = 0;
        for entry in entries(&self.dir)? {
            let dir = self.dir.join(entry);
            match lock::acquire(&dir.join(LOCK), LockMode::Alone, Instant::now()).await {
                Ok(Some(_lock)) => freed_bytes += remove_dir(&dir)?,
                Ok(None) | Err(Error::Busy { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(freed_bytes)
    }
}

/// Reports the progress of another process's download, for as long as it is polled.
///
/// Stops if the directory can't be watched: the other process may just have removed it, and the
/// wait for the lock notices that.
async fn show_growth(dir: &Path, progress: &watch::Sender<PullProgress>) -> Infallible {
    let watched = async {
        let changes = RecordChanges::of_files(dir)?;
        loop {
            progress.send_modify(|progress| progress.done_bytes = grown(dir));
            changes.next().await?;
        }
    };
    let Err::<Infallible, Error>(error) = watched.await;
    tracing::debug!(%error, "cannot watch how a download grows");
    std::future::pending().await
}

/// Returns how many bytes of a download were received.
fn grown(dir: &Path) -> u64 {
    fs::metadata(dir.join(DOWNLOAD)).map_or(0, |metadata| metadata.len())
}

/// Removes a download's directory, its lock last, and returns how many bytes that freed.
pub(super) fn remove_dir(dir: &Path) -> Result<u64> {
    let mut freed_bytes = 0;
    for entry in entries(dir)?.into_iter().filter(|entry| entry != LOCK) {
        freed_bytes += remove_file(&dir.join(entry))?;
    }
    remove_file(&dir.join(LOCK))?;
    step("image: remove the download's directory").map_err(Error::io("remove", dir))?;
    match fs::remove_dir(dir) {
        // Another process has begun to fetch it again since the lock file was removed.
        Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(freed_bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(freed_bytes),
        removed => removed.map(|()| freed_bytes).map_err(Error::io("remove", dir)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_place_is_held_until_its_last_writer_has_ended() {
        use crate::image::DigestAlgorithm;
        use crate::image::intake::ImageIntake;

        let dir = tempfile::tempdir().unwrap();
        let place = DownloadDir::new(dir.path()).await.unwrap();
        let intake = ImageIntake::begin(&place, DigestAlgorithm::Sha256, 0).unwrap();
        drop(place);
        let lock = dir.path().join(LOCK);
        let busy = lock::acquire(&lock, LockMode::Alone, Instant::now()).await;
        assert!(matches!(busy, Err(Error::Busy { .. })), "{busy:?}");
        drop(intake);
        lock::acquire(&lock, LockMode::Alone, Instant::now() + PATIENCE).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_place_is_held_until_what_came_is_unpacked() {
        use crate::image::DigestAlgorithm;
        use crate::image::intake::ImageIntake;

        const UNPACKED_BYTES: usize = 64 << 20;
        let packed = zstd::stream::encode_all(&vec![7; UNPACKED_BYTES][..], 1).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let place = DownloadDir::new(dir.path()).await.unwrap();
        let mut intake = ImageIntake::begin(&place, DigestAlgorithm::Sha256, 0).unwrap();
        assert!(intake.take(packed.into()).await);
        drop((intake, place));
        let lock = lock::acquire(&dir.path().join(LOCK), LockMode::Alone, Instant::now() + PATIENCE).await;
        lock.unwrap().unwrap();
        let unpacked = fs::metadata(dir.path().join("disk")).unwrap().len();
        assert_eq!(unpacked, UNPACKED_BYTES as u64, "nobody writes there any more");
    }

    #[tokio::test]
    async fn who_waits_goes_on_waiting_where_nothing_can_be_watched() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("gone");
        let progress = crate::image::no_progress();
        // The wait ends with the lock or its deadline.
        let watched = tokio::time::timeout(Duration::from_millis(100), show_growth(&gone, &progress)).await;
        assert!(watched.is_err());
    }
}
