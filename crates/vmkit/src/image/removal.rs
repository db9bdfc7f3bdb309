//! Removes images that no VM needs.
//!
//! Edge: files and locks. The removal of an image holds its lock exclusively and reads all VMs
//! under it; the creation of a VM holds the lock shared. So no image is removed while a VM needs
//! it.

use std::fs;
use std::io;
use std::path::Path;

use tokio::time::Instant;

use super::digest::Digest;
use super::kept::{self, LocalName, RECORD};
use super::store::{ImageStore, LOCK, RemovedImage, entries, remove_file, sweep};
use crate::error::{Error, Result};
use crate::spec::{Arch, DataDisk, VmName};
use crate::steps::step;
use crate::store::RecordStore;
use crate::store::lock::{FileLock, LockMode};

impl ImageStore {
    /// Returns the names of the VMs whose disks have an image as their backing file.
    ///
    /// # Errors
    /// `Record` if a VM's record can't be read, since that VM may be one of them.
    pub fn users(&self, id: &Digest) -> Result<Vec<VmName>> {
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
    pub async fn remove(&self, text: &str, arch: Option<Arch>) -> Result<RemovedImage> {
        let found = self.find(text, arch)?;
        let of_identity = text.starts_with("sha256:");
        let name = if of_identity { String::new() } else { self.kept_name(&text.parse()?) };
        let goes = |kept: &LocalName| {
            of_identity || (kept.name == name && arch.is_none_or(|arch| arch == kept.arch))
        };
        let mut removed = RemovedImage { names: Vec::new(), images: 0, freed_bytes: 0 };
        for image in found {
            let Some(lock) = self.hold(&image.id, LockMode::Alone).await? else { continue };
            // Read again under the lock.
            let names = self.names_of(&image.id)?;
            let (going, staying): (Vec<_>, Vec<_>) = names.into_iter().partition(goes);
            if staying.is_empty() {
                self.refuse_if_used(&image.id)?;
            }
            for name in &going {
                remove_file(&self.names_dir().join(name.file_name()))?;
            }
            if staying.is_empty() {
                removed.freed_bytes += self.remove_content(&image.id, lock)?;
                removed.images += 1;
            }
            removed
                .names
                .extend(going.into_iter().map(|name| format!("{}@{}", name.name, name.arch.as_str())));
        }
        Ok(removed)
    }

    /// Removes the images that have no name and that no VM needs, with `all` also those with a
    /// name; and the remains of interrupted downloads. Returns how many images were removed, and
    /// how many bytes that freed.
    ///
    /// # Errors
    /// As for [`remove`](Self::remove), except that an image in use is kept.
    pub async fn prune(&self, all: bool) -> Result<(usize, u64)> {
        self.home.refuse_other_user(self.home.images())?;
        let (mut count, mut freed_bytes) = (0, 0);
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
            drop(self.hold_names().await?);
        }
        freed_bytes += self.prune_downloads().await?;
        Ok((count, freed_bytes))
    }

    fn refuse_if_used(&self, id: &Digest) -> Result<()> {
        let users = self.users(id)?;
        if users.is_empty() {
            return Ok(());
        }
        Err(Error::ImageInUse { image: self.called(id), vms: users })
    }

    /// Removes an image that is locked exclusively: the record first, since without it there is no
    /// image.
    fn remove_content(&self, id: &Digest, lock: FileLock) -> Result<u64> {
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
