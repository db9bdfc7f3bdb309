//! [`ImageStore`]: the images of a home, from a reference to a disk.
//!
//! It looks names up in the catalogue, and leaves the work to the modules below, which do not know
//! it: [`LocalImages`] has the records, names and locks, [`Downloads`] the directories of
//! downloads, [`ImageFetcher`] the network.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use tokio::sync::watch;

use super::arch::of_disk;
use super::catalogue::{Catalogue, PublishedImage};
use super::credentials::RegistryCredentials;
use super::digest::Digest;
use super::disc::refuse_disc;
use super::downloads::Downloads;
use super::fetcher::ImageFetcher;
use super::import::{ImageImport, ImportOptions};
use super::inspect::inspect;
use super::kept::{LocalImage, NewName};
use super::local_images::{ImageInUse, ImageQuery, LocalImages, QueryTarget};
use super::progress::PullProgress;
use super::proxy::Proxies;
use super::pull::ImagePull;
use super::reference::{ImageName, ImageRef};
use super::removal::RemovedImage;
use super::source::PullSource;
use crate::error::{Error, Result, Subject};
use crate::span::{about, operation, within};
use crate::spec::{Arch, Mib, VmName};
use crate::store::Home;

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
    pub(super) catalogue: Catalogue,
    pub(super) images: LocalImages,
    downloads: Downloads,
    pub(super) fetcher: ImageFetcher,
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

impl ImageStore {
    /// Creates a store of the images in a home. Reads and writes nothing.
    pub fn new(home: &Home, catalogue: Catalogue) -> Self {
        let images = LocalImages { home: home.clone() };
        let downloads = Downloads { dir: home.images().join("downloads") };
        Self { catalogue, images, downloads, fetcher: ImageFetcher::default() }
    }

    /// Returns the same store with logins for registries.
    #[must_use]
    pub fn with_registry_credentials(mut self, credentials: RegistryCredentials) -> Self {
        self.fetcher.logins.credentials = credentials;
        self
    }

    /// Returns the same store, which reads logins from the first existing one of these files when a
    /// registry asks for a login; [`RegistryCredentials::from_docker_config`] describes the format.
    /// Logins that were given directly take precedence.
    #[must_use]
    pub fn with_login_files(mut self, files: Vec<PathBuf>) -> Self {
        self.fetcher.logins.files = files;
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
        self.fetcher.logins.set_helper_path(path);
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
        self.fetcher.remote = self.fetcher.remote.through(proxies);
        self
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
        self.images.list()
    }

    /// Returns the local images for a name or an address, for one architecture or all, or for the
    /// start of an identity, `sha256:` and at least 6 digits.
    ///
    /// # Errors
    /// `NotFound` if there is none, `InvalidInput` if several identities begin with the digits.
    pub fn find(&self, text: &str, arch: Option<Arch>) -> Result<Vec<LocalImage>> {
        self.images.find(&self.query(text, arch)?)
    }

    /// Returns an image that VMs can be created from, fetched if need be. The image can't be
    /// removed while the returned value exists.
    ///
    /// A file is used where it is. For anything else, `policy` says whether it is fetched.
    ///
    /// # Cancel safety
    /// What was fetched stays, and the next call continues from there.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for an unknown name, or an image of another architecture or
    /// format; `NotFound` for one that is not stored and may not be fetched; `Remote` if it can't
    /// be fetched or verified; `Host` and `Io` if it can't be stored; `TimedOut`.
    pub async fn resolve(
        &self,
        image: &ImageRef,
        arch: Arch,
        policy: PullPolicy,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<ImageInUse> {
        if let ImageRef::Path(path) = image {
            let found = self.images.use_file(path).await?;
            check_arch(path, found.arch, arch)?;
            return Ok(found);
        }
        let name = self.kept_name(image);
        if policy != PullPolicy::Newer
            && let Some(found) = self.images.use_kept(&name, arch).await?
        {
            return Ok(found);
        }
        if policy == PullPolicy::Never {
            // An unknown name is another error than a known one that is not stored.
            if let ImageRef::Name(name) = image {
                self.published(name, arch)?;
            }
            return Err(Error::not_found(Subject::Image, name));
        }
        loop {
            self.pull(image, arch, progress).await?;
            // It may have been removed in between.
            if let Some(found) = self.images.use_kept(&name, arch).await? {
                return Ok(found);
            }
        }
    }

    /// Fetches an image, unless the stored one is what would be fetched.
    ///
    /// # Cancel safety
    /// As for [`resolve`](Self::resolve).
    ///
    /// # Errors
    /// As for [`resolve`](Self::resolve); `InvalidInput` on `image` for a file, which is imported
    /// instead.
    pub async fn pull(
        &self,
        image: &ImageRef,
        arch: Arch,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<LocalImage> {
        // An address may have a token in it.
        let shown = match image {
            ImageRef::Name(_) | ImageRef::Oci(_) => image.to_string(),
            ImageRef::Url(_) | ImageRef::Path(_) => String::new(),
        };
        let pull = async {
            let kept = self.pull_in_span(image, arch, progress).await?;
            about(&kept.id);
            Ok(kept)
        };
        within(operation!("pull", image = &shown), pull).await
    }

    async fn pull_in_span(
        &self,
        image: &ImageRef,
        arch: Arch,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<LocalImage> {
        progress.send_replace(PullProgress::default());
        self.images.home.refuse_other_user(self.images.home.images())?;
        let (source, user, firmware) = match image {
            ImageRef::Name(asked) => {
                let published = match self.published(asked, arch) {
                    Ok(published) => published,
                    // An import has no address that a newer one could come from.
                    Err(error) => match self.find(&asked.to_string(), Some(arch)) {
                        Ok(mut kept) => return Ok(kept.remove(0)),
                        Err(_) => return Err(error),
                    },
                };
                let source = self.fetcher.published_source(&published).await?;
                (source, published.user.clone(), Some(published.firmware))
            }
            ImageRef::Url(url) => (PullSource::of_url(url), None, None),
            ImageRef::Oci(oci) => (self.fetcher.registry().source(oci, arch).await?, None, None),
            ImageRef::Path(path) => {
                let why = "this is a file: it is used in place, or `image import` stores it under a name";
                return Err(Error::invalid("image", path.display(), why));
            }
        };
        let name = NewName {
            name: self.kept_name(image),
            arch,
            source: source.url.clone(),
            verified: source.verified.clone(),
            user,
            firmware,
        };
        let (images, downloads, fetcher) = (&self.images, &self.downloads, &self.fetcher);
        ImagePull { images, downloads, fetcher, progress }.bring(&source, name).await
    }

    /// Stores a copy of a file, or of what comes from a pipe, under a name, unpacked if it is
    /// compressed; the file stays as it is.
    ///
    /// # Errors
    /// `InvalidInput` on `image` for a file that is no disk of the architecture; `Host` and `Io` if
    /// it can't be stored.
    pub async fn import(
        &self,
        path: &Path,
        import: ImportOptions,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<LocalImage> {
        let (images, downloads) = (&self.images, &self.downloads);
        ImageImport { images, downloads, progress }.import(path, import).await
    }

    /// Reads a local image completely, and returns the checksum of its disk: its id, if the disk is
    /// undamaged.
    ///
    /// Damage is recorded, so that the next pull or import of the image replaces the disk.
    ///
    /// # Errors
    /// `NotFound`; `Io` if the disk can't be read.
    pub async fn rehash(&self, id: &Digest, progress: &watch::Sender<PullProgress>) -> Result<Digest> {
        self.images.rehash(id, progress).await
    }

    /// Checks whether `resolve` could find or fetch an image, as far as this host knows: whether a
    /// name is that of a local image or of the catalogue, and whether a disk of this size can be
    /// created from one that is stored. Contacts no server.
    ///
    /// # Errors
    /// Those of [`published`](Self::published) for a name that is neither; those of [`inspect`],
    /// and `InvalidInput` on `image` for a file of another architecture; on `disk` for a size below
    /// the image's; `Record` and `Io` if the store can't be read.
    pub fn check(&self, image: &ImageRef, arch: Arch, disk: Option<Mib>) -> Result<()> {
        let facts = match image {
            ImageRef::Path(path) => {
                let facts = inspect(path)?;
                refuse_disc(&facts.path, &path.display().to_string())?;
                check_arch(path, of_disk(&facts)?, arch)?;
                Some(facts)
            }
            _ => match self.images.kept_under(&self.kept_name(image), arch)? {
                Some(kept) => self.images.read(&kept.image)?.map(|kept| kept.facts),
                None => None,
            },
        };
        match (&facts, image) {
            (Some(facts), _) => facts.disk_bytes(disk).map(drop),
            (None, ImageRef::Name(name)) => self.published(name, arch).map(drop),
            (None, _) => Ok(()),
        }
    }

    /// Returns the catalogue's entry for a name: the image's address and how it is verified.
    /// Contacts no server.
    ///
    /// # Errors
    /// `InvalidInput` on `image` as from [`Catalogue::find`](super::Catalogue::find), with the
    /// names of local images among those that may have been meant.
    pub fn published(&self, name: &ImageName, arch: Arch) -> Result<PublishedImage> {
        // What can't be read is reported where the images are listed.
        let kept = || self.list().unwrap_or_default().0.into_iter().flat_map(|image| image.names);
        if self.catalogue.whole_name(name).is_none()
            && let Some(other) = kept().find(|kept| kept.name == name.to_string() && kept.arch != arch)
        {
            let (other, asked) = (other.arch.as_str(), arch.as_str());
            return Err(Error::invalid(
                "image",
                name,
                format!("it is stored for {other}, and {asked} was requested"),
            ));
        }
        let others = || kept().filter_map(|kept| ImageName::new(&kept.name).ok()).collect();
        self.catalogue.find_beside(name, arch, others)
    }

    /// Returns the names of the VMs whose disks have an image as their backing file.
    ///
    /// # Errors
    /// `Record` if a VM's record can't be read, since that VM may be one of them.
    pub fn users(&self, id: &Digest) -> Result<Vec<VmName>> {
        self.images.users(id)
    }

    /// Removes a name, and its image if that was its last name; an image id is removed with all its
    /// names.
    ///
    /// # Errors
    /// `Busy` while the image is the backing file of a VM's disk ([`Error::ImageInUse`], with the
    /// VMs), or while a VM is being created from it; `NotFound`; `Record` if a VM's record can't be
    /// read, since that VM may need the image.
    pub async fn remove(&self, text: &str, arch: Option<Arch>) -> Result<RemovedImage> {
        self.images.remove(&self.query(text, arch)?).await
    }

    /// Removes the images that have no name and that no VM needs, with `all` also those with a
    /// name; and the remains of interrupted downloads. Returns how many images were removed, and
    /// how many bytes that freed.
    ///
    /// # Errors
    /// As for [`remove`](Self::remove), except that an image in use is kept.
    pub async fn prune(&self, all: bool) -> Result<(usize, u64)> {
        let (images, freed_bytes) = self.images.prune(all).await?;
        Ok((images, freed_bytes + self.downloads.prune().await?))
    }

    /// Returns the full name under which an image is stored.
    fn kept_name(&self, image: &ImageRef) -> String {
        match image {
            ImageRef::Name(name) => {
                self.catalogue.whole_name(name).unwrap_or_else(|| name.clone()).to_string()
            }
            other => other.to_string(),
        }
    }

    /// Returns which local images a text means.
    fn query(&self, text: &str, arch: Option<Arch>) -> Result<ImageQuery> {
        let target = match text.strip_prefix("sha256:") {
            Some(digits) => QueryTarget::Identity(digits.to_ascii_lowercase()),
            None => QueryTarget::Name(self.kept_name(&text.parse()?)),
        };
        Ok(ImageQuery { text: text.to_owned(), target, arch })
    }
}

/// Refuses a file that is known to be for another architecture.
fn check_arch(path: &Path, found: Option<Arch>, asked: Arch) -> Result<()> {
    match found.filter(|found| *found != asked) {
        Some(found) => {
            let why =
                format!("this is an image for {}, and {} was requested", found.as_str(), asked.as_str());
            Err(Error::invalid("image", path.display(), why))
        }
        None => Ok(()),
    }
}
