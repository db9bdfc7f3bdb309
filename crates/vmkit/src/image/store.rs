//! The images that are kept: [`ImageStore`].
//!
//! Edge: files and locks; what lies where is drawn in `kept.rs`. An image is named by what its disk
//! hashes to, so two names of one image share it, and it is never written to again. What removes
//! them is in `removal.rs`.

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

/// How long one who removes an image waits for those who are just making a VM of it, and the other
/// way round.
const PATIENCE: Duration = Duration::from_secs(30);
/// The lock of an image, in its directory.
pub(super) const LOCK: &str = "lock";

/// The images of one home: found, pulled, imported, checked and removed.
///
/// # Concurrency
/// Any number of stores in any number of processes may work on one home.
///
/// # Cancel safety
/// A dropped future, like a killed process, leaves no half image under any name. What was
/// downloaded stays, and the next pull goes on from there.
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
    /// Where the programs are that keep logins; none is run where nobody has said that.
    helper_path: Option<Vec<PathBuf>>,
}

/// Whether an image may be, or has to be, fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PullPolicy {
    /// What is kept is taken as it is, however old; what is missing is fetched.
    #[default]
    Missing,
    /// The server is asked whether there is a newer one.
    Newer,
    /// Nothing is fetched.
    Never,
}

/// An image that a VM can be made of now: as long as this lives, nobody removes it.
#[derive(Debug)]
pub struct ImageInUse {
    /// The whole name it was found by: with its version, or as it was given.
    pub name: String,
    /// What it is, and where.
    pub facts: ImageFacts,
    /// The image's identity, where it is a kept one.
    pub id: Option<Digest>,
    /// The architecture of the guest, where the disk tells it.
    pub arch: Option<Arch>,
    /// The user that cloud-init in the image makes, where that is known.
    pub user: Option<UserName>,
    /// The firmware that it boots with, where that is known.
    pub firmware: Option<Firmware>,
    _lock: Option<FileLock>,
}

/// What an import says of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportOptions {
    /// The name that it has from now on.
    pub name: ImageName,
    /// The architecture of the guest.
    pub arch: Arch,
    /// The user that cloud-init in the image makes, where that is known.
    pub user: Option<UserName>,
    /// The firmware that it boots with, where that is known.
    pub firmware: Option<Firmware>,
}

/// What removing a name led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemovedImage {
    /// The names that are gone.
    pub names: Vec<String>,
    /// How many images went with them: none while the image has another name.
    pub images: usize,
    /// How much room that made; 0 while the image has another name.
    pub freed_bytes: u64,
}

impl ImageStore {
    /// Creates a store of the images in a home. Touches nothing.
    pub fn new(home: &Home, catalogue: Catalogue) -> Self {
        let (remote, credentials) = (HttpFetcher::default(), RegistryCredentials::default());
        let (login_files, helper_path) = (Vec::new(), None);
        Self { home: home.clone(), catalogue, remote, credentials, login_files, helper_path }
    }

    /// Returns the same store, which shows registries who asks.
    #[must_use]
    pub fn with_registry_credentials(mut self, credentials: RegistryCredentials) -> Self {
        self.credentials = credentials;
        self
    }

    /// Returns the same store, which looks for logins in the first of these files that is there,
    /// once a registry asks who asks: each is what [`RegistryCredentials::from_docker_config`]
    /// reads. Logins that were handed over count before.
    #[must_use]
    pub fn with_login_files(mut self, files: Vec<PathBuf>) -> Self {
        self.login_files = files;
        self
    }

    /// Returns the same store, which runs the helpers that keep logins (`credHelpers`,
    /// `credsStore`), `docker-credential-NAME`, found as `PATH` has it. Without this it runs none,
    /// and only logins that are written down count.
    ///
    /// A helper runs with this process's environment, once a registry asks who asks, and is killed
    /// after 30 s.
    #[must_use]
    pub fn with_credential_helpers(mut self, path: &OsStr) -> Self {
        self.helper_path = Some(std::env::split_paths(path).collect());
        self
    }

    /// Returns the same store, which asks all servers through a proxy, but for the hosts that
    /// `except` lists with commas: see [`Proxies`] for its forms.
    ///
    /// # Errors
    /// `InvalidInput` on `proxy` for what is no address of one.
    pub fn with_proxy(self, url: &str, except: &str) -> Result<Self> {
        let proxies = Proxies::default().with_http("proxy", url)?.with_https("proxy", url)?;
        Ok(self.with_proxies(proxies.with_exceptions(except)))
    }

    /// Returns the same store, which asks servers through these proxies.
    #[must_use]
    pub fn with_proxies(mut self, proxies: Proxies) -> Self {
        self.remote = self.remote.through(proxies);
        self
    }

    /// Returns the login at the registry of an image: the helper's that keeps it, else the one that
    /// is written down.
    ///
    /// # Errors
    /// `InvalidInput` on `registry credentials` for a file that is something else; `Io` for one
    /// that can't be read; `Host` and `TimedOut` for a helper that does not answer. One that is not
    /// installed is no error, and warned of.
    pub(super) async fn login(&self, image: &OciRef) -> Result<Option<RegistryLogin>> {
        let (credentials, registry) = (self.logins()?, image.registry());
        if let (Some(path), Some(name)) = (&self.helper_path, credentials.helper(registry)) {
            match CredentialProgram::find(name, path, registry) {
                Ok(helper) => {
                    if let Some(login) = helper.login(registry).await? {
                        return Ok(Some(login));
                    }
                }
                // Named by what was uninstalled since. Most images need no login; a registry that
                // wants one says so.
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

    /// Returns the catalogue that names are looked up in.
    pub fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// Returns all kept images in the order of their names, those without one last; and what could
    /// not be read.
    ///
    /// # Errors
    /// `Io` where the directory can't be read.
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

    /// Returns the kept images that a text means: a name or an address, for one architecture or
    /// all, or the beginning of an identity, `sha256:` and at least 6 digits.
    ///
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

    /// Returns the whole name under which an image is kept.
    pub(super) fn kept_name(&self, image: &ImageRef) -> String {
        match image {
            ImageRef::Name(name) => {
                self.catalogue.whole_name(name).unwrap_or_else(|| name.clone()).to_string()
            }
            other => other.to_string(),
        }
    }

    /// Returns what a whole name stands for; `None` where no image is kept under it.
    pub(super) fn kept_under(&self, name: &str, arch: Arch) -> Result<Option<LocalName>> {
        self.read_name(&self.names_dir().join(kept::file_name(name, arch)))
    }

    /// Returns the image that a name stands for, held against removal; `None` where none is kept.
    pub(super) async fn use_kept(&self, name: &str, arch: Arch) -> Result<Option<ImageInUse>> {
        loop {
            let Some(kept) = self.kept_under(name, arch)? else { return Ok(None) };
            let lock = self.hold(&kept.image, LockMode::Shared).await?;
            // It may have become another image's name, or gone, while this waited.
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

    /// Returns an image that is a file of the user's; one that lies in the store is held against
    /// removal.
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

    /// Puts a disk that was taken in among the images, and names it.
    ///
    /// The disk is synced before it has its place, and the record beside it is written last. Where
    /// the same is kept already but was damaged, this one takes its place; who has the damaged file
    /// open goes on with that.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for what is no disk of this architecture; `Host` and `Io`.
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
        // Read whole before it is held alone, so that nobody who makes a VM of it waits for that.
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

    /// Returns whether a kept image can be what it was, as far as a glance tells: its disk has its
    /// length, and was not found damaged.
    pub(super) fn is_sound(&self, image: &LocalImage) -> bool {
        let has_length = |metadata: fs::Metadata| metadata.len() == image.facts.file_bytes;
        !self.dir(&image.id).join(DAMAGED).exists() && fs::metadata(&image.facts.path).is_ok_and(has_length)
    }

    /// Returns whether an image is kept whose disk still hashes to what it is known by.
    async fn is_whole(&self, id: &Digest) -> Result<bool> {
        let Some(_lock) = self.hold(id, LockMode::Shared).await? else { return Ok(false) };
        match self.read_unless_spoilt(id)? {
            // One that can't be read is damaged.
            Some(image) if self.is_sound(&image) => {
                Ok(hash_of_file(&image.facts.path, |_| {}).await.is_ok_and(|found| found == *id))
            }
            _ => Ok(false),
        }
    }

    /// Returns the names of kept images whose download had this checksum: then there is nothing to
    /// fetch.
    pub(super) fn kept_downloads(&self, download: &Digest) -> Result<Vec<LocalName>> {
        let mut names = Vec::new();
        for file in entries(&self.names_dir())?.into_iter().filter(|file| file.ends_with(".json")) {
            let name = self.read_name(&self.names_dir().join(file));
            // A record that can't be read is somebody else's trouble: then the image is fetched.
            if let Ok(Some(name)) = name
                && name.download == *download
                && self.read_unless_spoilt(&name.image)?.is_some()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// Gives a kept image a further name.
    pub(super) async fn name_again(&self, kept: LocalName, name: NewName) -> Result<Option<LocalImage>> {
        let Some(_lock) = self.hold(&kept.image, LockMode::Alone).await? else { return Ok(None) };
        let Some(image) = self.read(&kept.image)? else { return Ok(None) };
        self.write_name(&name.of(kept.image.clone(), kept.download, seconds_since_1970())).await?;
        Ok(Some(LocalImage { names: self.names_of(&kept.image)?, ..image }))
    }

    /// Writes down what a name stands for.
    async fn write_name(&self, name: &LocalName) -> Result<()> {
        let _lock = self.hold_names().await?;
        replace(&self.names_dir().join(name.file_name()), &name.encode())
    }

    /// Holds the names against others who write one, and removes what such a one left who died.
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

    /// Returns where the downloads are.
    pub(super) fn downloads(&self) -> PathBuf {
        self.home.images().join("downloads")
    }

    /// Reads a kept image without its names; `None` where there is none.
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

    /// Returns what an image is called in errors: by its names, or by its identity where it has
    /// none.
    pub(super) fn called(&self, id: &Digest) -> String {
        // A name that can't be read is missing here, and an error elsewhere.
        let mut names: Vec<String> =
            self.names_of(id).unwrap_or_default().into_iter().map(|name| name.name).collect();
        names.dedup();
        match names.split_first() {
            None => format!("image {id}"),
            Some((name, [])) => format!("image `{name}`"),
            Some((name, others)) => format!("image `{name}`, also called `{}`", others.join("`, `")),
        }
    }

    /// Holds an image; `None` where there is none, not even its directory.
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

/// Waits for `work`, and calls `on_progress` with each state that it sends meanwhile.
pub async fn watch_progress<T>(
    work: impl Future<Output = T>,
    mut progress: watch::Receiver<PullProgress>,
    on_progress: &mut (dyn FnMut(PullProgress) + Send),
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            // The end first: the last progress is no news then.
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
