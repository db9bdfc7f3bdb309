//! The local images: [`ImageStore`].
//!
//! Edge: files and locks; `kept.rs` draws the layout. An image is identified by the hash of its
//! disk, so names of the same image share it, and it is never written to again. `removal.rs`
//! removes images.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use tokio::sync::watch;

use super::catalogue::Catalogue;
use super::credential_helper::CredentialProgram;
use super::credentials::{RegistryCredentials, RegistryLogin};
use super::digest::Digest;
use super::files::{entries, read_bytes, remove_file, replace, settle, sweep, sync_dir};
use super::import::hash_of_file;
use super::inspect::{ImageFacts, ImageOrigin, inspect, inspect_from, is_text};
use super::intake::ReceivedImage;
use super::kept::{self, DAMAGED, LocalImage, LocalName, NewName, RECORD};
use super::progress::PullProgress;
use super::proxy::Proxies;
use super::reference::{ImageName, ImageRef, OciRef};
use super::remote::HttpFetcher;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::spec::{Arch, Firmware, UserName};
use crate::store::lock::{self, FileLock, LockMode};
use crate::store::{Home, create_private};

/// How long the removal of an image waits for a VM that is being created from it, and vice versa.
const PATIENCE: Duration = Duration::from_secs(30);
/// The lock of an image, in its directory.
pub(super) const LOCK: &str = "lock";

/// The images of one home: resolves, pulls, imports, verifies and removes them.
///
/// # Concurrency
/// Any number of stores in any number of processes may use one home.
///
/// # Cancel safety
/// A dropped future, like a killed process, leaves no incomplete image under any name. A partial
/// download stays, and the next pull continues it.
///
/// # Examples
/// ```
/// use vmkit::image::{Catalogue, ImageStore, PullPolicy, no_progress};
/// use vmkit::spec::Arch;
/// use vmkit::store::Home;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> vmkit::Result<()> {
/// # let temp = tempfile::tempdir().unwrap();
/// # std::fs::write(temp.path().join("disk.raw"), [1; 512]).unwrap();
/// # let (home, disk) = (temp.path(), temp.path().join("disk.raw").to_str().unwrap().to_owned());
/// let store = ImageStore::new(&Home::at(home)?, Catalogue::built_in());
/// let image = store.resolve(&disk.parse()?, Arch::X86_64, PullPolicy::Missing, &no_progress()).await?;
/// assert_eq!(image.facts.virtual_size_bytes, 512);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct ImageStore {
    pub(super) home: Home,
    pub(super) catalogue: Catalogue,
    pub(super) remote: HttpFetcher,
    credentials: RegistryCredentials,
    login_files: Vec<PathBuf>,
    /// The directories of the credential helpers; without them no helper is run.
    helper_path: Option<Vec<PathBuf>>,
}

/// Whether an image may or must be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PullPolicy {
    /// A local image is used however old it is; a missing one is fetched.
    #[default]
    Missing,
    /// The server is asked for a newer image.
    Newer,
    /// Nothing is fetched.
    Never,
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

impl ImageStore {
    /// Creates a store of the images in a home. Reads and writes nothing.
    pub fn new(home: &Home, catalogue: Catalogue) -> Self {
        let (remote, credentials) = (HttpFetcher::default(), RegistryCredentials::default());
        let (login_files, helper_path) = (Vec::new(), None);
        Self { home: home.clone(), catalogue, remote, credentials, login_files, helper_path }
    }

    /// Returns the same store with logins for registries.
    #[must_use]
    pub fn with_registry_credentials(mut self, credentials: RegistryCredentials) -> Self {
        self.credentials = credentials;
        self
    }

    /// Returns the same store, which reads logins from the first existing one of these files when a
    /// registry asks for a login; [`RegistryCredentials::from_docker_config`] describes the format.
    /// Logins that were given directly take precedence.
    #[must_use]
    pub fn with_login_files(mut self, files: Vec<PathBuf>) -> Self {
        self.login_files = files;
        self
    }

    /// Returns the same store, which runs credential helpers (`credHelpers`, `credsStore`):
    /// `docker-credential-NAME`, searched as in `PATH`. Without this it runs none, and uses only
    /// logins from files.
    ///
    /// A helper runs with this process's environment when a registry asks for a login, and is
    /// killed after 30 s.
    #[must_use]
    pub fn with_credential_helpers(mut self, path: &OsStr) -> Self {
        self.helper_path = Some(std::env::split_paths(path).collect());
        self
    }

    /// Returns the same store, which uses a proxy for all servers except the hosts in the
    /// comma-separated list `except`: [`Proxies`] describes its forms.
    ///
    /// # Errors
    /// `InvalidInput` on `proxy` for an invalid address.
    pub fn with_proxy(self, url: &str, except: &str) -> Result<Self> {
        let proxies = Proxies::default().with_http("proxy", url)?.with_https("proxy", url)?;
        Ok(self.with_proxies(proxies.with_exceptions(except)))
    }

    /// Returns the same store, which uses these proxies.
    #[must_use]
    pub fn with_proxies(mut self, proxies: Proxies) -> Self {
        self.remote = self.remote.through(proxies);
        self
    }

    /// Returns the login for the registry of an image: the credential helper's, else the one in a
    /// file.
    ///
    /// # Errors
    /// `InvalidInput` on `registry credentials` for a file of another format; `Io` for one that
    /// can't be read; `Host` and `TimedOut` for a helper that does not reply. A helper that is not
    /// installed causes only a warning.
    pub(super) async fn login(&self, image: &OciRef) -> Result<Option<RegistryLogin>> {
        let (credentials, registry) = (self.logins()?, image.registry());
        if let (Some(path), Some(name)) = (&self.helper_path, credentials.helper(registry)) {
            match CredentialProgram::find(name, path, registry) {
                Ok(helper) => {
                    if let Some(login) = helper.login(registry).await? {
                        return Ok(Some(login));
                    }
                }
                // The configuration refers to a helper that was uninstalled. Most images need no
                // login; a registry that requires one reports it.
                Err(error) if error.kind() == ErrorKind::Host => {
                    tracing::warn!(%error, "going on without a login");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(credentials.written_down(image))
    }

    /// Returns the logins at registries.
    fn logins(&self) -> Result<RegistryCredentials> {
        if !self.credentials.is_empty() {
            return Ok(self.credentials.clone());
        }
        for path in &self.login_files {
            if let Some(bytes) = read_bytes(path)? {
                return RegistryCredentials::from_file(path, &bytes);
            }
        }
        Ok(RegistryCredentials::default())
    }

    /// Returns the catalogue in which names are looked up.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// Returns all local images sorted by their names, with unnamed ones last, and the errors of
    /// those that could not be read.
    ///
    /// # Errors
    /// `Io` if the directory can't be read.
    pub fn list(&self) -> Result<(Vec<LocalImage>, Vec<Error>)> {
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

    /// Returns the local images for a name or an address, for one architecture or all, or for the
    /// start of an identity, `sha256:` and at least 6 digits.
    /// # Errors
    /// `NotFound` where there is none, `InvalidInput` where an identity's beginning fits several.
    pub fn find(&self, text: &str, arch: Option<Arch>) -> Result<Vec<LocalImage>> {
        let missing = || Error::not_found(Subject::Image, text);
        let (images, _) = self.list()?;
        if let Some(hex) = text.strip_prefix("sha256:") {
            let hex = hex.to_ascii_lowercase();
            if hex.len() < 6 {
                return Err(Error::invalid(
                    "image",
                    text,
                    "an identity is named by at least 6 of its digits",
                ));
            }
            let found: Vec<LocalImage> =
                images.into_iter().filter(|image| image.id.hex().starts_with(&hex)).collect();
            return match found.len() {
                0 => Err(missing()),
                1 => Ok(found),
                several => Err(Error::invalid(
                    "image",
                    text,
                    format!("{several} images begin so: write more digits"),
                )),
            };
        }
        let name = self.kept_name(&text.parse()?);
        let is_meant = |kept: &LocalName| kept.name == name && arch.is_none_or(|arch| arch == kept.arch);
        let found: Vec<LocalImage> =
            images.into_iter().filter(|image| image.names.iter().any(is_meant)).collect();
        if found.is_empty() { Err(missing()) } else { Ok(found) }
    }

    /// Returns the full name under which an image is stored.
    pub(super) fn kept_name(&self, image: &ImageRef) -> String {
        match image {
            ImageRef::Name(name) => {
                self.catalogue.whole_name(name).unwrap_or_else(|| name.clone()).to_string()
            }
            other => other.to_string(),
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
                tracing::warn!("image `{}` is damaged, and is used all the same", kept.name);
            }
            let facts = inspect(&image.facts.path)?;
            let firmware = match kept.firmware {
                None => super::arch::firmware_of_disk(&facts)?,
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
        super::refuse_disc(&facts.path, &path.display().to_string())?;
        let (arch, firmware) = (super::arch::of_disk(&facts)?, super::arch::firmware_of_disk(&facts)?);
        let name = path.display().to_string();
        if is_text(&facts) {
            tracing::warn!("{name} is a text, and is taken as the bytes of a disk");
        }
        Ok(ImageInUse { name, facts, id, arch, user: None, firmware, _lock: lock })
    }

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
        let facts = inspect_from("image", &taken.disk, Some(origin))?;
        if is_text(&facts) {
            tracing::warn!("{} is a text, and is taken as the bytes of a disk", name.source);
        }
        super::refuse_disc(&facts.path, &origin.shown)?;
        let found = super::arch::of_disk(&facts).map_err(|error| origin.named(error))?;
        if let Some(found) = found.filter(|found| *found != name.arch) {
            let why =
                format!("this is an image for {}, and {} was asked for", found.as_str(), name.arch.as_str());
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
        let stored = match image {
            Ok(image) => self.write_name(&name.of(id.clone(), taken.digest, now)).await.map(|()| image),
            Err(error) => Err(error),
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

    /// Returns whether a local image looks undamaged: its disk has the recorded length, and no
    /// verification has failed.
    pub(super) fn is_sound(&self, image: &LocalImage) -> bool {
        let has_length = |metadata: fs::Metadata| metadata.len() == image.facts.file_bytes;
        !self.dir(&image.id).join(DAMAGED).exists() && fs::metadata(&image.facts.path).is_ok_and(has_length)
    }

    /// Returns whether a local image still has its recorded hash.
    async fn is_whole(&self, id: &Digest) -> Result<bool> {
        let Some(_lock) = self.hold(id, LockMode::Shared).await? else { return Ok(false) };
        match self.read_unless_spoilt(id)? {
            // An image that can't be read is damaged.
            Some(image) if self.is_sound(&image) => {
                Ok(hash_of_file(&image.facts.path, |_| {}).await.is_ok_and(|found| found == *id))
            }
            _ => Ok(false),
        }
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
    async fn write_name(&self, name: &LocalName) -> Result<()> {
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

    /// Returns the directory of the downloads.
    pub(super) fn downloads(&self) -> PathBuf {
        self.home.images().join("downloads")
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

pub(super) fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Waits for `work`, and meanwhile calls `on_progress` with each state that it sends.
pub async fn watch_progress<T>(
    work: impl Future<Output = T>,
    mut progress: watch::Receiver<PullProgress>,
    on_progress: &mut (dyn FnMut(PullProgress) + Send),
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            // The end has priority: progress is no longer news then.
            biased;
            done = &mut work => return done,
            Ok(()) = progress.changed() => on_progress(*progress.borrow_and_update()),
        }
    }
}

/// Returns a sender of progress without a receiver.
pub fn no_progress() -> watch::Sender<PullProgress> {
    watch::Sender::new(PullProgress::default())
}
