//! Stores received images, and verifies those that are stored.
//!
//! Edge: files, locks and threads.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tokio::sync::watch;

use super::arch::of_disk;
use super::digest::{Digest, DigestAlgorithm, Hasher};
use super::disc::refuse_disc;
use super::facts::ImageFacts;
use super::files::{entries, remove_file, replace, seconds_since_1970, settle, sweep, sync_dir};
use super::inspect::{ImageOrigin, inspect_from, is_text};
use super::intake::ReceivedImage;
use super::kept::{self, DAMAGED, LocalImage, NewName, RECORD};
use super::local_images::{LOCK, LocalImages};
use super::progress::{PullProgress, PullStage};
use crate::blocking::blocking;
use crate::error::{Error, Result, Subject};
use crate::input_file::InputFile;
use crate::steps::step;
use crate::store::create_private;
use crate::store::lock::{FileLock, LockMode};

const BLOCK_BYTES: usize = 1 << 20;

impl LocalImages {
    /// Stores a received disk as a local image, under a name.
    ///
    /// The disk is synced before it is moved to its place, and its record is written last. An
    /// existing but damaged copy of the same image is replaced; processes that have the damaged
    /// file open keep it.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for a disk of another architecture; `Host` and `Io`.
    pub(super) async fn keep(
        &self,
        taken: ReceivedImage,
        origin: &ImageOrigin,
        name: NewName,
    ) -> Result<LocalImage> {
        self.keep_as(taken, origin, Some(name)).await
    }

    /// Stores a received disk as a local image, as [`keep`](Self::keep) does; without a name it is
    /// there as long as a VM needs it.
    ///
    /// # Errors
    /// As for [`keep`](Self::keep).
    pub(super) async fn keep_as(
        &self,
        taken: ReceivedImage,
        origin: &ImageOrigin,
        name: Option<NewName>,
    ) -> Result<LocalImage> {
        let facts = inspect_from("image", &taken.disk, Some(origin))?;
        if let Some(name) = name.as_ref().filter(|_| is_text(&facts)) {
            tracing::warn!("{} is a text file, and is used as a raw disk", name.source);
        }
        refuse_disc(&facts.path, &origin.shown)?;
        let found = of_disk(&facts).map_err(|error| origin.named(error))?;
        if let (Some(name), Some(found)) = (&name, found)
            && found != name.arch
        {
            let why =
                format!("this is an image for {}, and {} was requested", found.as_str(), name.arch.as_str());
            return Err(Error::invalid("image", &name.name, why));
        }
        let id = taken.disk_digest.clone();
        let dir = self.dir(&id);
        // Read completely before the image is locked, so that the creation of a VM does not wait
        // for that.
        let was_whole = self.is_whole(&id).await?;
        let lock = loop {
            create_private(&dir)?;
            if let Some(lock) = self.hold(&id, LockMode::Alone).await? {
                break lock;
            }
        };
        sweep(&dir)?;
        let now = seconds_since_1970();
        let known = self.read_unless_spoilt(&id)?;
        let is_new = known.is_none();
        let content = LocalImage {
            id: id.clone(),
            facts: ImageFacts { path: dir.join(kept::disk_name(facts.format)), ..facts },
            arch: found,
            kept_at: known.as_ref().map_or(now, |known| known.kept_at),
            names: Vec::new(),
        };
        let image = match known {
            Some(image) if was_whole && self.is_sound(&image) => Ok(image),
            _ => self.write_content(&taken, content).await,
        };
        let stored = match (image, name) {
            (Ok(image), Some(name)) => {
                self.write_name(&name.of(id.clone(), taken.digest, now)).await.map(|()| image)
            }
            (image, _) => image,
        };
        match stored {
            Ok(image) => {
                drop(lock);
                Ok(LocalImage { names: self.names_of(&id)?, ..image })
            }
            Err(error) => {
                // On a full disk, what has no name would only be in the way.
                if is_new && let Err(left) = self.remove_content(&id, lock) {
                    tracing::warn!(error = %left, "cannot remove an image that could not be stored");
                }
                Err(error)
            }
        }
    }

    /// Puts a disk and its record in an image's directory.
    async fn write_content(&self, taken: &ReceivedImage, image: LocalImage) -> Result<LocalImage> {
        let dir = self.dir(&image.id);
        settle(&taken.disk, &image.facts.path).await?;
        replace(&dir.join(RECORD), &image.encode())?;
        remove_file(&dir.join(DAMAGED))?;
        sync_dir(self.home.images())?;
        Ok(image)
    }

    /// Returns whether a local image still has its recorded hash.
    pub(super) async fn is_whole(&self, id: &Digest) -> Result<bool> {
        let Some(_lock) = self.hold(id, LockMode::Shared).await? else { return Ok(false) };
        match self.read_unless_spoilt(id)? {
            // An image that can't be read is damaged.
            Some(image) if self.is_sound(&image) => {
                Ok(hash_of_file(&image.facts.path, |_| {}).await.is_ok_and(|found| found == *id))
            }
            _ => Ok(false),
        }
    }

    /// Reads a local image completely, and returns the checksum of its disk: its id, if the disk is
    /// undamaged.
    ///
    /// Damage is recorded, so that the next pull or import of the image replaces the disk.
    ///
    /// # Errors
    /// `NotFound`; `Io` if the disk can't be read.
    pub(super) async fn rehash(&self, id: &Digest, progress: &watch::Sender<PullProgress>) -> Result<Digest> {
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
            tracing::warn!(%error, "cannot record how an image was found");
        }
        Ok(found)
    }

    /// Removes an image that is locked exclusively: the record first, since without it there is no
    /// image.
    pub(super) fn remove_content(&self, id: &Digest, lock: FileLock) -> Result<u64> {
        let dir = self.dir(id);
        let mut freed_bytes = remove_file(&dir.join(RECORD))?;
        for entry in entries(&dir)?.into_iter().filter(|entry| entry != LOCK) {
            freed_bytes += remove_file(&dir.join(entry))?;
        }
        remove_file(&dir.join(LOCK))?;
        drop(lock);
        step("image: remove the directory").map_err(Error::io("remove", &dir))?;
        match fs::remove_dir(&dir) {
            // Another process has begun to store the same image again since the lock file was
            // removed.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(freed_bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(freed_bytes),
            removed => removed.map(|()| freed_bytes).map_err(Error::io("remove", &dir)),
        }
    }
}

/// Reads a file completely, and returns its checksum; reports to `progress` how much was read.
async fn hash_of_file(path: &Path, progress: impl Fn(u64) + Send + 'static) -> Result<Digest> {
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
    blocking(hash).await?.map_err(Error::io("read", path))
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
