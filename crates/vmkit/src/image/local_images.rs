//! The local images of a home: their records, names and locks.
//!
//! Edge: files and locks; `kept.rs` draws the layout. An image is identified by the hash of its
//! disk, so names of the same image share it, and it is never written to again. `keep.rs` stores
//! images, `removal.rs` removes them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use super::arch::{firmware_of_disk, of_disk};
use super::digest::Digest;
use super::disc::refuse_disc;
use super::facts::ImageFacts;
use super::files::{entries, read_bytes, replace, seconds_since_1970, sweep};
use super::inspect::{inspect, is_text};
use super::kept::{self, DAMAGED, LocalImage, LocalName, NewName, RECORD};
use crate::error::{Error, Result, Subject};
use crate::spec::{Arch, Firmware, UserName};
use crate::store::lock::{self, FileLock, LockMode};
use crate::store::{Home, create_private};

/// How long the removal of an image waits for a VM that is being created from it, and vice versa.
const PATIENCE: Duration = Duration::from_secs(30);
/// The lock of an image, in its directory.
pub(super) const LOCK: &str = "lock";

/// The local images of one home.
#[derive(Debug, Clone)]
pub(super) struct LocalImages {
    pub(super) home: Home,
}

/// An image that a VM can be created from: while this lives, the image is not removed.
#[derive(Debug)]
pub struct ImageInUse {
    /// The full name it was found by: with its version, or as given.
    pub name: String,
    /// Its path and properties.
    pub facts: ImageFacts,
    /// The image's identity, if it is a local image.
    pub id: Option<Digest>,
    /// The architecture of the guest, if known from the disk.
    pub arch: Option<Arch>,
    /// The user that cloud-init in the image creates, if known.
    pub user: Option<UserName>,
    /// The firmware that it boots with, if known.
    pub firmware: Option<Firmware>,
    _lock: Option<FileLock>,
}

/// Which local images are meant.
#[derive(Debug)]
pub(super) struct ImageQuery {
    /// The text that was given, for errors.
    pub(super) text: String,
    pub(super) target: QueryTarget,
    /// `None` for all architectures.
    pub(super) arch: Option<Arch>,
}

/// What a query names.
#[derive(Debug)]
pub(super) enum QueryTarget {
    /// The image whose identity begins with these digits, with all its names.
    Identity(String),
    /// The images of a full name.
    Name(String),
}

impl ImageQuery {
    /// Returns whether a name is one of those that are meant.
    pub(super) fn names(&self, kept: &LocalName) -> bool {
        matches!(&self.target, QueryTarget::Name(name) if kept.name == *name)
            && self.arch.is_none_or(|arch| arch == kept.arch)
    }
}

impl LocalImages {
    /// Returns all local images sorted by their names, with unnamed ones last, and the errors of
    /// those that could not be read.
    ///
    /// # Errors
    /// `Io` if the directory can't be read.
    pub(super) fn list(&self) -> Result<(Vec<LocalImage>, Vec<Error>)> {
        let mut unreadable = Vec::new();
        let mut images = BTreeMap::new();
        for name in entries(self.home.images())? {
            let Some(id) = kept::id_of_dir(&name) else { continue };
            match self.read(&id) {
                Ok(Some(image)) => drop(images.insert(id.hex().to_owned(), image)),
                Ok(None) => {}
                Err(error) => unreadable.push(error),
            }
        }
        for file in entries(&self.names_dir())?.into_iter().filter(|file| file.ends_with(".json")) {
            match self.read_name(&self.names_dir().join(file)) {
                Ok(Some(name)) => {
                    if let Some(image) = images.get_mut(name.image.hex()) {
                        image.names.push(name);
                    }
                }
                Ok(None) => {}
                Err(error) => unreadable.push(error),
            }
        }
        let mut images: Vec<LocalImage> = images.into_values().collect();
        let key = |image: &LocalImage| {
            let name = image.names.first().map(|name| name.name.clone());
            (name.is_none(), name, image.id.hex().to_owned())
        };
        images.sort_by_key(key);
        Ok((images, unreadable))
    }

    /// Returns the images that a query means.
    ///
    /// # Errors
    /// `NotFound` if there is none, `InvalidInput` if several identities begin with the digits.
    pub(super) fn find(&self, query: &ImageQuery) -> Result<Vec<LocalImage>> {
        const LEAST_DIGITS: usize = 6;
        let text = &query.text;
        let (images, _) = self.list()?;
        let is_meant = |image: &LocalImage| match &query.target {
            QueryTarget::Identity(digits) => image.id.hex().starts_with(digits.as_str()),
            QueryTarget::Name(_) => image.names.iter().any(|kept| query.names(kept)),
        };
        let is_identity = match &query.target {
            QueryTarget::Identity(digits) if digits.len() < LEAST_DIGITS => {
                let why = "at least 6 digits of the identity are needed";
                return Err(Error::invalid("image", text, why));
            }
            QueryTarget::Identity(_) => true,
            QueryTarget::Name(_) => false,
        };
        let found: Vec<LocalImage> = images.into_iter().filter(is_meant).collect();
        match found.len() {
            0 => Err(Error::not_found(Subject::Image, text)),
            several @ 2.. if is_identity => Err(Error::invalid(
                "image",
                text,
                format!("{several} images start with these digits: write more"),
            )),
            _ => Ok(found),
        }
    }

    /// Returns the entry of a full name; `None` if no local image has it.
    pub(super) fn kept_under(&self, name: &str, arch: Arch) -> Result<Option<LocalName>> {
        self.read_name(&self.names_dir().join(kept::file_name(name, arch)))
    }

    /// Returns the local image of a name, locked against removal; `None` if there is none.
    pub(super) async fn use_kept(&self, name: &str, arch: Arch) -> Result<Option<ImageInUse>> {
        loop {
            let Some(kept) = self.kept_under(name, arch)? else { return Ok(None) };
            let lock = self.hold(&kept.image, LockMode::Shared).await?;
            // The name may have moved to another image, or been removed, while this waited.
            if self.kept_under(name, arch)?.as_ref() != Some(&kept) {
                continue;
            }
            let (Some(lock), Some(image)) = (lock, self.read(&kept.image)?) else { return Ok(None) };
            if !self.is_sound(&image) {
                tracing::warn!("image `{}` is damaged, and is used anyway", kept.name);
            }
            let facts = inspect(&image.facts.path)?;
            let firmware = match kept.firmware {
                None => firmware_of_disk(&facts)?,
                known => known,
            };
            return Ok(Some(ImageInUse {
                name: kept.name,
                facts,
                id: Some(kept.image),
                arch: image.arch,
                user: kept.user,
                firmware,
                _lock: Some(lock),
            }));
        }
    }

    /// Returns a file of the user's as an image; a file in the store is locked against removal.
    pub(super) async fn use_file(&self, path: &Path) -> Result<ImageInUse> {
        let facts = inspect(path)?;
        let images = self.home.images();
        let images = images.canonicalize().unwrap_or_else(|_| images.to_owned());
        let first = facts.path.strip_prefix(&images).ok().and_then(|below| below.components().next());
        let id = first.and_then(|dir| kept::id_of_dir(dir.as_os_str().to_str()?));
        let lock = match &id {
            Some(id) => self.hold(id, LockMode::Shared).await?,
            None => None,
        };
        refuse_disc(&facts.path, &path.display().to_string())?;
        let (arch, firmware) = (of_disk(&facts)?, firmware_of_disk(&facts)?);
        let name = path.display().to_string();
        if is_text(&facts) {
            tracing::warn!("{name} is a text file, and is used as a raw disk");
        }
        Ok(ImageInUse { name, facts, id, arch, user: None, firmware, _lock: lock })
    }

    /// Returns whether a local image looks undamaged: its disk has the recorded length, and no
    /// verification has failed.
    pub(super) fn is_sound(&self, image: &LocalImage) -> bool {
        let has_length = |metadata: fs::Metadata| metadata.len() == image.facts.file_bytes;
        !self.dir(&image.id).join(DAMAGED).exists() && fs::metadata(&image.facts.path).is_ok_and(has_length)
    }

    /// Returns the names of local images whose download had this checksum: then nothing has to be
    /// fetched.
    pub(super) fn kept_downloads(&self, download: &Digest) -> Result<Vec<LocalName>> {
        let mut names = Vec::new();
        for file in entries(&self.names_dir())?.into_iter().filter(|file| file.ends_with(".json")) {
            let name = self.read_name(&self.names_dir().join(file));
            // An unreadable record is reported elsewhere: here the image is fetched.
            if let Ok(Some(name)) = name
                && name.download == *download
                && self.read_unless_spoilt(&name.image)?.is_some()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Gives a local image another name.
    pub(super) async fn name_again(&self, kept: LocalName, name: NewName) -> Result<Option<LocalImage>> {
        let Some(_lock) = self.hold(&kept.image, LockMode::Alone).await? else { return Ok(None) };
        let Some(image) = self.read(&kept.image)? else { return Ok(None) };
        self.write_name(&name.of(kept.image.clone(), kept.download, seconds_since_1970())).await?;
        Ok(Some(LocalImage { names: self.names_of(&kept.image)?, ..image }))
    }

    /// Writes the record of a name.
    pub(super) async fn write_name(&self, name: &LocalName) -> Result<()> {
        let _lock = self.hold_names().await?;
        replace(&self.names_dir().join(name.file_name()), &name.encode())
    }

    /// Locks the names for writing, and removes what a killed writer has left.
    pub(super) async fn hold_names(&self) -> Result<FileLock> {
        let dir = self.names_dir();
        self.home.refuse_other_user(self.home.images())?;
        loop {
            create_private(&dir)?;
            let lock = lock::acquire(&dir.join(LOCK), LockMode::Alone, Instant::now() + PATIENCE).await;
            let lock = lock.map_err(|error| match error {
                Error::Busy { holder, .. } => Error::Busy { what: "the names of images".to_owned(), holder },
                error => error,
            })?;
            if let Some(lock) = lock {
                sweep(&dir)?;
                return Ok(lock);
            }
        }
    }

    /// Reads a local image without its names; `None` if it does not exist.
    pub(super) fn read(&self, id: &Digest) -> Result<Option<LocalImage>> {
        let dir = self.dir(id);
        match read_bytes(&dir.join(RECORD))? {
            Some(bytes) => LocalImage::decode(id.clone(), &dir, &bytes).map(Some),
            None => Ok(None),
        }
    }

    /// Reads a local image as [`read`](Self::read) does; one whose record is spoilt is none.
    pub(super) fn read_unless_spoilt(&self, id: &Digest) -> Result<Option<LocalImage>> {
        match self.read(id) {
            Err(error) if kept::is_spoilt(&error) => Ok(None),
            read => read,
        }
    }

    pub(super) fn dir(&self, id: &Digest) -> PathBuf {
        self.home.images().join(kept::dir_name(id))
    }

    pub(super) fn names_dir(&self) -> PathBuf {
        self.home.images().join("names")
    }

    /// Returns the files of names whose records are spoilt.
    pub(super) fn spoilt_names(&self) -> Result<Vec<String>> {
        let mut files = entries(&self.names_dir())?;
        files.retain(|file| {
            let read = || self.read_name(&self.names_dir().join(file));
            file.ends_with(".json") && read().is_err_and(|error| kept::is_spoilt(&error))
        });
        Ok(files)
    }

    fn read_name(&self, path: &Path) -> Result<Option<LocalName>> {
        read_bytes(path)?.map(|bytes| LocalName::decode(path, &bytes)).transpose()
    }

    pub(super) fn names_of(&self, id: &Digest) -> Result<Vec<LocalName>> {
        let mut names = Vec::new();
        for file in entries(&self.names_dir())?.into_iter().filter(|file| file.ends_with(".json")) {
            match self.read_name(&self.names_dir().join(file)) {
                Ok(Some(name)) if name.image == *id => names.push(name),
                // A spoilt record is no image's name.
                Err(error) if !kept::is_spoilt(&error) => return Err(error),
                _ => {}
            }
        }
        Ok(names)
    }

    /// Returns an image's name for errors: its names, or its identity if it has none.
    pub(super) fn called(&self, id: &Digest) -> String {
        // An unreadable name is left out here, and reported elsewhere.
        let mut names: Vec<String> =
            self.names_of(id).unwrap_or_default().into_iter().map(|name| name.name).collect();
        names.dedup();
        match names.split_first() {
            None => format!("image {id}"),
            Some((name, [])) => format!("image `{name}`"),
            Some((name, others)) => format!("image `{name}`, also called `{}`", others.join("`, `")),
        }
    }

    /// Locks an image; `None` if it does not exist, not even its directory.
    pub(super) async fn hold(&self, id: &Digest, hold: LockMode) -> Result<Option<FileLock>> {
        self.hold_until(id, hold, Instant::now() + PATIENCE).await
    }

    pub(super) async fn hold_until(
        &self,
        id: &Digest,
        hold: LockMode,
        deadline: Instant,
    ) -> Result<Option<FileLock>> {
        lock::acquire(&self.dir(id).join(LOCK), hold, deadline).await.map_err(|error| match error {
            Error::Busy { holder, .. } => Error::Busy { what: self.called(id), holder },
            error => error,
        })
    }
}
