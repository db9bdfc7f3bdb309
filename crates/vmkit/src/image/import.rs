//! Takes a file of the user's among the kept images, and looks whether a kept image is still what it was.

use std::io::Read;
use std::path::Path;

use bytes::Bytes;
use tokio::sync::watch;

use super::digest::{Digest, DigestAlgorithm, Hasher};
use super::downloads::{Place, remove_dir};
use super::intake::Intake;
use super::kept::{KeptImage, NewName, Verified};
use super::progress::{PullProgress, PullStage};
use super::store::{ImageStore, Import};
use crate::error::{Error, Result};
use crate::input_file::InputFile;
use crate::store::lock::Hold;

const BLOCK_BYTES: usize = 1 << 20;

impl ImageStore {
    /// Keeps a copy of a file under a name, unpacked where it is packed; the file stays as it is.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for what is no disk of the architecture; `Host` and `Io` where it can't be kept.
    pub async fn import(
        &self,
        path: &Path,
        import: Import,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<KeptImage> {
        let input = InputFile::open("image", path)?;
        // A directory of its own, so that two imports at once do not meet.
        let dir = self.downloads().join(format!("import-{}", uuid::Uuid::new_v4().simple()));
        let place = Place::new(&dir).await?;
        let kept = self.import_within(&place, input, import, progress).await;
        remove_dir(&dir)?;
        kept
    }

    async fn import_within(
        &self,
        place: &Place,
        input: InputFile,
        import: Import,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<KeptImage> {
        let mut intake = Intake::begin(place, DigestAlgorithm::Sha256, 0)?;
        let InputFile { mut file, path, bytes } = input;
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
            progress.send_replace(PullProgress { stage, done_bytes, total_bytes: Some(bytes) });
        }
        progress.send_modify(|progress| progress.stage = PullStage::Finishing);
        let name = NewName {
            name: import.name.to_string(),
            arch: import.arch,
            source: path.display().to_string(),
            verified: Verified::Nothing,
            user: import.user,
            firmware: import.firmware,
        };
        self.keep(intake.finish().await?, name).await
    }

    /// Reads a kept image whole, and answers what its disk hashes to now: its identity, if nothing happened to it.
    ///
    /// # Errors
    /// `NotFound`; `Io` where it can't be read.
    pub async fn rehash(&self, id: &Digest, progress: &watch::Sender<PullProgress>) -> Result<Digest> {
        let missing = || Error::NotFound { what: "image", name: id.to_string() };
        let _lock = self.hold(id, Hold::Shared).await?.ok_or_else(missing)?;
        let facts = self.read(id)?.ok_or_else(missing)?.facts;
        let mut file = InputFile::open("image", &facts.path)?.file;
        let (progress, path) = (progress.clone(), facts.path.clone());
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
                let (stage, total_bytes) = (PullStage::Finishing, Some(facts.file_bytes));
                progress.send_replace(PullProgress { stage, done_bytes, total_bytes });
            }
        };
        let hashed = tokio::task::spawn_blocking(hash).await.expect("hashing does not panic");
        hashed.map_err(Error::io("read", &path))
    }
}
