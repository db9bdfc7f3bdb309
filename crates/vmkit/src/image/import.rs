//! Imports a user's file as a local image, and verifies local images.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::SystemTime;

use bytes::Bytes;
use tokio::sync::watch;

use super::digest::{Digest, DigestAlgorithm, Hasher};
use super::downloads::{DownloadDir, remove_dir};
use super::files::remove_file;
use super::inspect::ImageOrigin;
use super::intake::ImageIntake;
use super::kept::{DAMAGED, LocalImage, NewName, Verification};
use super::progress::{PullProgress, PullStage};
use super::store::{ImageStore, ImportOptions};
use crate::error::{Error, Result, Subject};
use crate::input_file::{InputFile, InputStream};
use crate::steps::step;
use crate::store::lock::LockMode;

const BLOCK_BYTES: usize = 1 << 20;

impl ImageStore {
    /// Stores a copy of a file, or of what comes from a pipe, under a name, unpacked if it is
    /// compressed; the file stays as it is.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for a file that is no disk of the architecture; `Host` and `Io` if
    /// it can't be stored.
    pub async fn import(
        &self,
        path: &Path,
        import: ImportOptions,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<LocalImage> {
        self.home.refuse_other_user(self.home.images())?;
        let input = InputStream::open("image", path)?;
        // A pipe is read once, so the image is looked at in its copy.
        let file = input.bytes.is_some().then(|| input.path.clone());
        let origin = ImageOrigin { shown: path.display().to_string(), file };
        // A directory of its own, so that two imports at once do not collide.
        let dir = self.downloads().join(format!("import-{}", uuid::Uuid::new_v4().simple()));
        let place = DownloadDir::new(&dir).await?;
        let kept = self.import_within(&place, input, &origin, import, progress).await;
        remove_dir(&dir)?;
        kept
    }

    async fn import_within(
        &self,
        place: &DownloadDir,
        input: InputStream,
        origin: &ImageOrigin,
        import: ImportOptions,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<LocalImage> {
        let mut intake = ImageIntake::begin(place, DigestAlgorithm::Sha256, 0)?;
        let InputStream { mut file, path, bytes } = input;
        // What a pipe gives is nowhere else to be changed.
        let look = || bytes.map(|_| written(&path)).transpose().map_err(Error::io("examine", &path));
        let before = look()?;
        let mut done_bytes = 0;
        loop {
            let read = move || {
                let mut block = Vec::with_capacity(BLOCK_BYTES);
                let read = file.by_ref().take(BLOCK_BYTES as u64).read_to_end(&mut block);
                read.map(|_| (file, block))
            };
            let read = tokio::task::spawn_blocking(read).await.expect("reading does not panic");
            let block;
            (file, block) = read.map_err(Error::io("read", &path))?;
            let read_bytes = block.len() as u64;
            if read_bytes == 0 || !intake.take(Bytes::from(block)).await {
                break;
            }
            done_bytes += read_bytes;
            let stage = PullStage::Fetching;
            progress.send_replace(PullProgress { stage, done_bytes, total_bytes: bytes });
        }
        progress.send_modify(|progress| progress.stage = PullStage::Finishing);
        let name = NewName {
            name: import.name.to_string(),
            arch: import.arch,
            source: path.display().to_string(),
            verified: Verification::Nothing,
            user: import.user,
            firmware: import.firmware,
        };
        if before != look()? {
            intake.give_up().await;
            let why = "the file was written to while it was read: stop what writes to it, such as a VM, and import it again";
            return Err(Error::invalid("image", &origin.shown, why));
        }
        let taken = intake.finish().await.map_err(|error| origin.named(error))?;
        self.keep(taken, origin, name).await
    }

    /// Reads a local image completely, and returns the checksum of its disk: its id, if the disk is
    /// undamaged.
    ///
    /// Damage is recorded, so that the next pull or import of the image replaces the disk.
    ///
    /// # Errors
    /// `NotFound`; `Io` if the disk can't be read.
    pub async fn rehash(&self, id: &Digest, progress: &watch::Sender<PullProgress>) -> Result<Digest> {
        let missing = || Error::not_found(Subject::Image, id);
        let _lock = self.hold(id, LockMode::Shared).await?.ok_or_else(missing)?;
        let facts = self.read(id)?.ok_or_else(missing)?.facts;
        let (progress, total_bytes) = (progress.clone(), Some(facts.file_bytes));
        let found = hash_of_file(&facts.path, move |done_bytes| {
            let stage = PullStage::Finishing;
            progress.send_replace(PullProgress { stage, done_bytes, total_bytes });
        });
        let found = found.await?;
        // The caller has the result, even if it can't be recorded.
        if let Err(error) = mark(&self.dir(id).join(DAMAGED), found != *id) {
            tracing::warn!(%error, "cannot write down how an image was found");
        }
        Ok(found)
    }
}

/// Returns what a write to a file changes: its length, and when it was written last.
fn written(path: &Path) -> std::io::Result<(u64, SystemTime)> {
    let metadata = path.metadata()?;
    Ok((metadata.len(), metadata.modified()?))
}

/// Reads a file completely, and returns its checksum; reports to `progress` how much was read.
pub(super) async fn hash_of_file(path: &Path, progress: impl Fn(u64) + Send + 'static) -> Result<Digest> {
    let mut file = InputFile::open("image", path)?.file;
    let hash = move || {
        let mut hasher = Hasher::new(DigestAlgorithm::Sha256);
        let mut block = vec![0; BLOCK_BYTES];
        let mut done_bytes = 0;
        loop {
            let read = file.read(&mut block)?;
            if read == 0 {
                return Ok(hasher.finish());
            }
            hasher.update(&block[..read]);
            done_bytes += read as u64;
            progress(done_bytes);
        }
    };
    let hashed = tokio::task::spawn_blocking(hash).await.expect("hashing does not panic");
    hashed.map_err(Error::io("read", path))
}

/// Creates an empty marker file, or removes it.
fn mark(path: &Path, is_so: bool) -> Result<()> {
    match is_so {
        false => remove_file(path).map(drop),
        true => {
            let write = || {
                step("image: mark it as damaged")?;
                OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map(drop)
            };
            write().map_err(Error::io("create", path))
        }
    }
}
