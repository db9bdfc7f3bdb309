//! Imports a user's file as a local image.

use std::path::Path;
use std::time::SystemTime;

use tokio::sync::watch;

use super::blocks::FileBlocks;
use super::digest::DigestAlgorithm;
use super::downloads::{DownloadDir, Downloads, remove_dir};
use super::inspect::ImageOrigin;
use super::intake::ImageIntake;
use super::kept::{LocalImage, NewName, Verification};
use super::local_images::LocalImages;
use super::progress::{PullProgress, PullStage};
use super::reference::ImageName;
use crate::error::{Error, Result};
use crate::input_file::InputStream;
use crate::spec::{Arch, Firmware, UserName};

/// The properties of an imported image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOptions {
    /// The name of the local image.
    pub name: ImageName,
    /// The architecture of the guest.
    pub arch: Arch,
    /// The user that cloud-init in the image creates, if known.
    pub user: Option<UserName>,
    /// The firmware that it boots with, if known.
    pub firmware: Option<Firmware>,
}

/// An import into the images of a home.
pub(super) struct ImageImport<'a> {
    pub(super) images: &'a LocalImages,
    pub(super) downloads: &'a Downloads,
    pub(super) progress: &'a watch::Sender<PullProgress>,
}

impl ImageImport<'_> {
    /// Stores a copy of a file, or of what comes from a pipe, under a name, unpacked if it is
    /// compressed; the file stays as it is.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for a file that is no disk of the architecture; `Host` and `Io` if
    /// it can't be stored.
    pub(super) async fn import(&self, path: &Path, import: ImportOptions) -> Result<LocalImage> {
        self.images.home.refuse_other_user(self.images.home.images())?;
        let input = InputStream::open("image", path)?;
        // A pipe is read once, so the image is looked at in its copy.
        let file = input.bytes.is_some().then(|| input.path.clone());
        let origin = ImageOrigin { shown: path.display().to_string(), file };
        // A directory of its own, so that two imports at once do not collide.
        let dir = self.downloads.dir.join(format!("import-{}", uuid::Uuid::new_v4().simple()));
        let place = DownloadDir::new(&dir).await?;
        let kept = self.import_within(&place, input, &origin, import).await;
        remove_dir(&dir)?;
        kept
    }

    async fn import_within(
        &self,
        place: &DownloadDir,
        input: InputStream,
        origin: &ImageOrigin,
        import: ImportOptions,
    ) -> Result<LocalImage> {
        let mut intake = ImageIntake::begin(place, DigestAlgorithm::Sha256, 0)?;
        let InputStream { file, path, bytes } = input;
        // What a pipe gives is nowhere else to be changed.
        let look = || bytes.map(|_| written(&path)).transpose().map_err(Error::io("examine", &path));
        let before = look()?;
        let mut done_bytes = 0;
        let mut blocks = FileBlocks::begin(file)?;
        while let Some(block) = blocks.next().await.map_err(Error::io("read", &path))? {
            let read_bytes = block.len() as u64;
            if !intake.take(block).await {
                break;
            }
            done_bytes += read_bytes;
            let stage = PullStage::Fetching;
            self.progress.send_replace(PullProgress { stage, done_bytes, total_bytes: bytes });
        }
        self.progress.send_modify(|progress| progress.stage = PullStage::Finishing);
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
        self.images.keep(taken, origin, name).await
    }
}

/// Returns what a write to a file changes: its length, and when it was written last.
fn written(path: &Path) -> std::io::Result<(u64, SystemTime)> {
    let metadata = path.metadata()?;
    Ok((metadata.len(), metadata.modified()?))
}
