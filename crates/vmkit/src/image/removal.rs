//! Removes images that no VM needs.
//!
//! Edge: files and locks. The removal of an image holds its lock exclusively and reads all VMs
//! under it; the creation of a VM holds the lock shared. So no image is removed while a VM needs
//! it.

use std::path::Path;

use tokio::time::Instant;

use super::digest::Digest;
use super::files::{entries, remove_file, sweep};
use super::kept::{self, LocalName};
use super::local_images::{ImageQuery, LocalImages, QueryTarget};
use crate::error::{Error, Result};
use crate::spec::{Arch, DataDisk, VmName};
use crate::store::RecordStore;
use crate::store::lock::LockMode;

/// The result of the removal of names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedImage {
    /// The removed names.
    pub names: Vec<String>,
    /// How many images were removed: none while the image has another name.
    pub images: usize,
    /// The space that was freed, in bytes; 0 while the image has another name.
    pub freed_bytes: u64,
}

impl LocalImages {
    /// Returns the names of the VMs whose disks have an image as their backing file.
    ///
    /// # Errors
    /// `Record` if a VM's record can't be read, since that VM may be one of them.
    pub(super) fn users(&self, id: &Digest) -> Result<Vec<VmName>> {
        let dir = self.dir(id);
        let dir = dir.canonicalize().unwrap_or(dir);
        let within = |path: &Path| {
            path.starts_with(&dir) || path.canonicalize().is_ok_and(|path| path.starts_with(&dir))
        };
        let store = RecordStore::new(self.home.clone());
        let mut users = Vec::new();
        for name in store.names()? {
            let spec = match store.read(&name) {
                Ok(record) => record.handle.spec,
                Err(Error::NotFound { .. }) => continue,
                Err(error) => return Err(error),
            };
            let existing = |disk: &DataDisk| match disk {
                DataDisk::Existing { path, .. } => within(path),
                DataDisk::Fresh { .. } => false,
            };
            if spec.disk().is_some_and(|disk| within(&disk.image)) || spec.data_disks().iter().any(existing) {
                users.push(name);
            }
        }
        Ok(users)
    }

    /// Removes a name, and its image if that was its last name; an image id is removed with all its
    /// names.
    ///
    /// # Errors
    /// `Busy` while the image is the backing file of a VM's disk ([`Error::ImageInUse`], with the
    /// VMs), or while a VM is being created from it; `NotFound`; `Record` if a VM's record can't be
    /// read, since that VM may need the image.
    pub(super) async fn remove(&self, query: &ImageQuery) -> Result<RemovedImage> {
        let (found, spoilt_names) = match self.find(query) {
            Ok(found) => (found.into_iter().map(|image| image.id).collect(), Vec::new()),
            Err(missing @ Error::NotFound { .. }) => match self.find_spoilt(query)? {
                (images, names) if images.is_empty() && names.is_empty() => return Err(missing),
                found => found,
            },
            Err(error) => return Err(error),
        };
        let goes = |kept: &LocalName| match &query.target {
            QueryTarget::Identity(_) => true,
            QueryTarget::Name(_) => query.names(kept),
        };
        let mut removed = RemovedImage { names: Vec::new(), images: 0, freed_bytes: 0 };
        for file in spoilt_names {
            let _lock = self.hold_names().await?;
            remove_file(&self.names_dir().join(&file))?;
            removed.names.push(file.trim_end_matches(".json").to_owned());
        }
        for id in found {
            let Some(lock) = self.hold(&id, LockMode::Alone).await? else { continue };
            // Read again under the lock.
            let names = self.names_of(&id)?;
            let (going, staying): (Vec<_>, Vec<_>) = names.into_iter().partition(goes);
            if staying.is_empty() {
                self.refuse_if_used(&id)?;
            }
            for name in &going {
                remove_file(&self.names_dir().join(name.file_name()))?;
            }
            if staying.is_empty() {
                removed.freed_bytes += self.remove_content(&id, lock)?;
                removed.images += 1;
            }
            removed
                .names
                .extend(going.into_iter().map(|name| format!("{}@{}", name.name, name.arch.as_str())));
        }
        Ok(removed)
    }

    /// Removes the images that have no name and that no VM needs, with `all` also those with a
    /// name. Returns how many images were removed, and how many bytes that freed.
    ///
    /// # Errors
    /// As for [`remove`](Self::remove), except that an image in use is kept.
    pub(super) async fn prune(&self, all: bool) -> Result<(usize, u64)> {
        self.home.refuse_other_user(self.home.images())?;
        let (mut count, mut freed_bytes) = (0, 0);
        let spoilt_names = self.spoilt_names()?;
        if let (Some(file), false) = (spoilt_names.first(), all) {
            // What it named may be any of the images without a name.
            return Err(Error::record(
                self.names_dir().join(file),
                "this is not a record of an image's name: remove it by `image rm`, or import the image again",
            ));
        }
        for entry in entries(self.home.images())? {
            let Some(id) = kept::id_of_dir(&entry) else { continue };
            let lock = match self.hold_until(&id, LockMode::Alone, Instant::now()).await {
                Ok(Some(lock)) => lock,
                Ok(None) | Err(Error::Busy { .. }) => continue,
                Err(error) => return Err(error),
            };
            sweep(&self.dir(&id))?;
            let names = self.names_of(&id)?;
            if !(all || names.is_empty()) || !self.users(&id)?.is_empty() {
                continue;
            }
            for name in names {
                remove_file(&self.names_dir().join(name.file_name()))?;
            }
            freed_bytes += self.remove_content(&id, lock)?;
            count += 1;
        }
        if self.names_dir().exists() {
            let _lock = self.hold_names().await?;
            for file in spoilt_names {
                remove_file(&self.names_dir().join(file))?;
            }
        }
        Ok((count, freed_bytes))
    }

    /// Returns what a text means of the images and names whose records are spoilt.
    fn find_spoilt(&self, query: &ImageQuery) -> Result<(Vec<Digest>, Vec<String>)> {
        let mut images = Vec::new();
        for entry in entries(self.home.images())? {
            let Some(id) = kept::id_of_dir(&entry) else { continue };
            let is_meant = match &query.target {
                QueryTarget::Identity(digits) => id.hex().starts_with(digits.as_str()),
                QueryTarget::Name(_) => self.names_of(&id)?.iter().any(|kept| query.names(kept)),
            };
            if is_meant && self.read(&id).is_err_and(|error| kept::is_spoilt(&error)) {
                images.push(id);
            }
        }
        let QueryTarget::Name(name) = &query.target else { return Ok((images, Vec::new())) };
        let mut names = self.spoilt_names()?;
        let arches = query.arch.map_or_else(|| vec![Arch::X86_64, Arch::Aarch64], |arch| vec![arch]);
        names.retain(|file| arches.iter().any(|arch| *file == kept::file_name(name, *arch)));
        Ok((images, names))
    }

    fn refuse_if_used(&self, id: &Digest) -> Result<()> {
        let users = self.users(id)?;
        if users.is_empty() {
            return Ok(());
        }
        Err(Error::ImageInUse { image: self.called(id), vms: users })
    }
}
