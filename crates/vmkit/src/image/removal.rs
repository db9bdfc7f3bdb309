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
use super::files::{entries, remove_file, sweep};
use super::kept::{self, LocalName, RECORD};
use super::store::{ImageStore, LOCK, RemovedImage};
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
        let (found, spoilt_names) = match self.find(text, arch) {
            Ok(found) => (found.into_iter().map(|image| image.id).collect(), Vec::new()),
            Err(missing @ Error::NotFound { .. }) => match self.find_spoilt(text, arch)? {
                (images, names) if images.is_empty() && names.is_empty() => return Err(missing),
                found => found,
            },
            Err(error) => return Err(error),
        };
        let of_identity = text.starts_with("sha256:");
        let name = if of_identity { String::new() } else { self.kept_name(&text.parse()?) };
        let goes = |kept: &LocalName| {
            of_identity || (kept.name == name && arch.is_none_or(|arch| arch == kept.arch))
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
    /// name; and the remains of interrupted downloads. Returns how many images were removed, and
    /// how many bytes that freed.
    ///
    /// # Errors
    /// As for [`remove`](Self::remove), except that an image in use is kept.
    pub async fn prune(&self, all: bool) -> Result<(usize, u64)> {
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
        freed_bytes += self.prune_downloads().await?;
        Ok((count, freed_bytes))
    }

    /// Returns what a text means of the images and names whose records are spoilt.
    fn find_spoilt(&self, text: &str, arch: Option<Arch>) -> Result<(Vec<Digest>, Vec<String>)> {
        let mut images = Vec::new();
        let wanted = text.strip_prefix("sha256:").map(str::to_ascii_lowercase);
        let name = if wanted.is_some() { String::new() } else { self.kept_name(&text.parse()?) };
        for entry in entries(self.home.images())? {
            let Some(id) = kept::id_of_dir(&entry) else { continue };
            let is_meant = match &wanted {
                Some(hex) => id.hex().starts_with(hex),
                None => self
                    .names_of(&id)?
                    .iter()
                    .any(|kept| kept.name == name && arch.is_none_or(|arch| arch == kept.arch)),
            };
            if is_meant && self.read(&id).is_err_and(|error| kept::is_spoilt(&error)) {
                images.push(id);
            }
        }
        let mut names = self.spoilt_names()?;
        let arches = arch.map_or_else(|| vec![Arch::X86_64, Arch::Aarch64], |arch| vec![arch]);
        names.retain(|file| {
            wanted.is_none() && arches.iter().any(|arch| *file == kept::file_name(&name, *arch))
        });
        Ok((images, names))
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
