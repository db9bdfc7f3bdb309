//! The base image of a VM that is imported: [`ImportedBase`].
//!
//! It becomes a local image without a name, and so is there as long as a VM needs it: its bytes
//! come with the VM, and must not be what a name such as `debian:12` stands for.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::ImageFormat;
use super::digest::Digest;
use super::downloads::{DOWNLOAD, DownloadDir, Downloads, remove_dir};
use super::facts::ImageFacts;
use super::inspect::ImageOrigin;
use super::intake::ReceivedImage;
use super::kept;
use super::local_images::LocalImages;
use crate::error::{Error, Result};
use crate::steps::step;
use crate::store::Home;
use crate::store::lock::LockMode;

/// A base image that an export announces, and its place among the images of a home.
#[derive(Debug)]
pub(crate) struct ImportedBase {
    images: LocalImages,
    dir: PathBuf,
    digest: Digest,
    format: ImageFormat,
    /// There while it is received.
    place: Option<DownloadDir>,
    is_new: bool,
}

impl ImportedBase {
    /// Creates one for the VM of this identity. Reads and writes nothing.
    pub(crate) fn new(home: &Home, vm: Uuid, digest: Digest, format: ImageFormat) -> Self {
        let downloads = Downloads { dir: home.images().join("downloads") };
        // The name is the VM's own: another import of the same VM removes what this one left.
        let dir = downloads.dir.join(format!("vm-{}", vm.simple()));
        Self { images: LocalImages { home: home.clone() }, dir, digest, format, place: None, is_new: false }
    }

    /// Returns where it is once it is stored.
    pub(crate) fn path(&self) -> PathBuf {
        self.images.dir(&self.digest).join(kept::disk_name(self.format))
    }

    /// Returns the file that it is received in; `None` if the same image is stored already, which
    /// is read to compare it. The caller has recorded a VM that names [`path`](Self::path), so that
    /// it is not removed meanwhile.
    ///
    /// # Errors
    /// `Io`, `Host`, `Busy`.
    pub(crate) async fn begin(&mut self) -> Result<Option<(File, PathBuf)>> {
        self.images.home.refuse_other_user(self.images.home.images())?;
        let place = DownloadDir::new(&self.dir).await?;
        if self.images.is_whole(&self.digest).await? {
            self.place = Some(place);
            return Ok(None);
        }
        let path = place.dir.join(DOWNLOAD);
        let open = || {
            step("import: create the image")?;
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path)
        };
        let file = open().map_err(Error::io("create", &path))?;
        self.place = Some(place);
        self.is_new = true;
        Ok(Some((file, path)))
    }

    /// Stores what was received, whose checksum is the announced one, and returns it. `shown` is
    /// the export.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for what is no disk, has a backing file, or another format than
    /// announced; `Io`, `Host`.
    pub(crate) async fn keep(&mut self, shown: &Path) -> Result<ImageFacts> {
        let facts = match &self.place {
            Some(place) if self.is_new => {
                let (digest, disk_digest) = (self.digest.clone(), self.digest.clone());
                let taken = ReceivedImage { disk: place.dir.join(DOWNLOAD), disk_digest, digest };
                let origin = ImageOrigin { shown: shown.display().to_string(), file: None };
                self.images.keep_as(taken, &origin, None).await?.facts
            }
            _ => super::inspect(&self.path())?,
        };
        self.leave()?;
        if facts.format != self.format {
            let (found, announced) = (facts.format.as_str(), self.format.as_str());
            let why = format!("its base image is {found}, and {announced} is announced");
            return Err(Error::invalid("file", shown.display(), why));
        }
        Ok(facts)
    }

    /// Removes what a failed import has stored, unless a VM needs it by now.
    pub(crate) async fn undo(&mut self) {
        let removed = async {
            self.leave()?;
            if !self.is_new {
                return Ok(());
            }
            let Some(lock) = self.images.hold(&self.digest, LockMode::Alone).await? else { return Ok(()) };
            let is_needed = !self.images.names_of(&self.digest)?.is_empty()
                || !self.images.users(&self.digest)?.is_empty();
            match is_needed {
                true => Ok(()),
                false => self.images.remove_content(&self.digest, lock).map(drop),
            }
        };
        if let Err(error) = removed.await {
            tracing::warn!(%error, "cannot remove the base image of a failed import; `image prune` will");
        }
    }

    fn leave(&mut self) -> Result<()> {
        match self.place.take() {
            Some(place) => remove_dir(&place.dir).map(drop),
            None => Ok(()),
        }
    }
}
