//! Pulls an image: finds out its checksum, fetches it, verifies it, and hands it to the store.
//!
//! ```text
//! checksums ─▶ their signature ─▶ expected checksum ─▶ stored already? ─yes─▶ its name again
//!                                                         │no
//!                         the lock of this download ◀─────┘
//!                         fetch, hashed meanwhile ─▶ compare ─▶ store, and name
//! ```
//!
//! Nothing is trusted, and nothing gets a name, before its checksum was compared.

use std::fs::File;
use std::path::Path;

use tokio::sync::watch;

use super::catalogue::{
    OpenPgpKey, PublicKey, PublishedImage, PublishedSignature, SignatureTarget, without_query,
};
use super::checksums;
use super::digest::{Digest, DigestAlgorithm, Hasher};
use super::download::{DownloadRequest, FetchedFile};
use super::downloads::{DownloadDir, FetchTurn, remove_dir};
use super::inspect::{ImageOrigin, inspect};
use super::kept::{LocalImage, LocalName, NewName, Verification};
use super::progress::PullProgress;
use super::reference::{ImageName, ImageRef, ImageUrl, OciRef};
use super::remote::{may_go_on_later, shown};
use super::signature::{self, Certificate, MOST_KEY_BYTES, MOST_SIGNATURE_BYTES};
use super::store::{ImageInUse, ImageStore, PullPolicy, seconds_since_1970};
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::span::{about, operation, within};
use crate::spec::{Arch, Mib};
use crate::store::lock::LockMode;

/// The largest file of checksums, in bytes.
const MOST_CHECKSUM_BYTES: usize = 4 << 20;
/// How often a download with the wrong checksum is fetched again: once, if a part of it came from
/// an earlier attempt.
const FRESH_TRIES: u32 = 1;

/// A file to fetch, and how it is verified.
#[derive(Debug)]
pub(super) struct PullSource {
    pub(super) url: String,
    /// The name in a registry that it is from, and the authorization that the registry was sent so
    /// far.
    pub(super) registry: Option<(OciRef, Option<String>)>,
    /// The checksum of the file as it is transferred.
    pub(super) digest: Option<Digest>,
    pub(super) verified: Verification,
    /// A signature over this file, verified when the file is complete.
    pub(super) signed_file: Option<FileSignature>,
}

/// A signature over a file, and the keys that may have made it.
#[derive(Debug, Clone)]
pub(super) struct FileSignature {
    signature: Vec<u8>,
    keys: Vec<Certificate>,
}

impl ImageStore {
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
            let found = self.use_file(path).await?;
            check_arch(path, found.arch, arch)?;
            return Ok(found);
        }
        let name = self.kept_name(image);
        if policy != PullPolicy::Newer
            && let Some(found) = self.use_kept(&name, arch).await?
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
            if let Some(found) = self.use_kept(&name, arch).await? {
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
        self.home.refuse_other_user(self.home.images())?;
        let name = self.kept_name(image);
        match image {
            ImageRef::Name(asked) => {
                let published = match self.published(asked, arch) {
                    Ok(published) => published,
                    // An import has no address that a newer one could come from.
                    Err(error) => match self.find(&asked.to_string(), Some(arch)) {
                        Ok(mut kept) => return Ok(kept.remove(0)),
                        Err(_) => return Err(error),
                    },
                };
                let source = self.published_source(&published).await?;
                let user = published.user.clone();
                self.bring(source, name, arch, user, Some(published.firmware), progress).await
            }
            ImageRef::Url(url) => self.bring(url_source(url), name, arch, None, None, progress).await,
            ImageRef::Oci(oci) => {
                let source = self.registry_source(oci, arch).await?;
                self.bring(source, name, arch, None, None, progress).await
            }
            ImageRef::Path(path) => {
                let why =
                    "this is a file: it is used where it lies, or kept under a name with `image import`";
                Err(Error::invalid("image", path.display(), why))
            }
        }
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
                super::refuse_disc(&facts.path, &path.display().to_string())?;
                check_arch(path, super::arch::of_disk(&facts)?, arch)?;
                Some(facts)
            }
            _ => match self.kept_under(&self.kept_name(image), arch)? {
                Some(kept) => self.read(&kept.image)?.map(|kept| kept.facts),
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
                format!("it is kept for {other}, and {asked} was asked for"),
            ));
        }
        let others = || kept().filter_map(|kept| ImageName::new(&kept.name).ok()).collect();
        self.catalogue.find_beside(name, arch, others)
    }

    /// Finds out the checksum of an image of the catalogue.
    async fn published_source(&self, published: &PublishedImage) -> Result<PullSource> {
        let mut source = PullSource {
            url: published.url.clone(),
            registry: None,
            digest: published.digest.clone(),
            verified: if published.digest.is_some() { Verification::Digest } else { Verification::Nothing },
            signed_file: None,
        };
        // Before the image, which can't be used without it.
        if let Some(one) = published.signature.as_ref().filter(|one| one.signed == SignatureTarget::Image) {
            let signature = self.remote.small_file(&one.url, MOST_SIGNATURE_BYTES).await?;
            source.signed_file = Some(FileSignature { signature, keys: self.signers(one).await? });
        }
        let Some(checksums) = published.checksums.as_ref().filter(|_| source.digest.is_none()) else {
            return Ok(source);
        };
        let mut bytes = self.remote.small_file(checksums, MOST_CHECKSUM_BYTES).await?;
        source.verified = Verification::Checksum { from: checksums.clone() };
        let now = seconds_since_1970();
        let untrusted = |problem: String| Error::untrusted(checksums.clone(), problem);
        match &published.signature {
            Some(one) if one.signed == SignatureTarget::Checksums => {
                let signature = self.remote.small_file(&one.url, MOST_SIGNATURE_BYTES).await?;
                let fingerprint =
                    signature::verify_detached(&signature, &self.signers(one).await?, now, || Ok(&bytes[..]));
                source.verified = Verification::Signature { fingerprint: fingerprint.map_err(untrusted)? };
            }
            Some(one) if one.signed == SignatureTarget::Inline => {
                // Only the signed part is used, not the text around it.
                let signers = self.signers(one).await?;
                let (fingerprint, text) =
                    signature::verify_inline(&bytes, &signers, now).map_err(untrusted)?;
                source.verified = Verification::Signature { fingerprint };
                bytes = text.into_bytes();
            }
            _ => {}
        }
        let file = without_query(&published.url).rsplit('/').next().unwrap_or_default();
        let found = checksums::find(&String::from_utf8_lossy(&bytes), file);
        source.digest = Some(found.ok_or_else(|| {
            Error::untrusted(checksums.clone(), format!("it has no SHA-256 or SHA-512 checksum of {file}"))
        })?);
        Ok(source)
    }

    /// Returns the keys, any of which may have signed; fetches those that are not in the catalogue.
    async fn signers(&self, signature: &PublishedSignature) -> Result<Vec<Certificate>> {
        let mut signers = Vec::new();
        for OpenPgpKey { fingerprint, public } in &signature.keys {
            let (read, from) = match public {
                PublicKey::Here(text) => {
                    (Certificate::read(fingerprint, text.as_bytes()), "a key of the catalogue")
                }
                PublicKey::At(url) => {
                    let text = self.remote.small_file(url, MOST_KEY_BYTES).await?;
                    (Certificate::read(fingerprint, &text), url.as_str())
                }
            };
            signers.push(read.map_err(|problem| Error::untrusted(from, problem))?);
        }
        Ok(signers)
    }

    /// Fetches a source, once for all processes that want it, and stores it under a name.
    async fn bring(
        &self,
        source: PullSource,
        name: String,
        arch: Arch,
        user: Option<crate::spec::UserName>,
        firmware: Option<crate::spec::Firmware>,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<LocalImage> {
        let begun = seconds_since_1970();
        let new_name = |verified: Verification| NewName {
            name: name.clone(),
            arch,
            source: source.url.clone(),
            verified,
            user: user.clone(),
            firmware,
        };
        let mut tries = 0;
        loop {
            if let Some((kept, verified)) = self.already_here(&source, &name, arch, begun).await?
                && let Some(image) = self.name_again(kept, new_name(verified)).await?
            {
                return Ok(image);
            }
            // Another process has just finished this download: look again.
            let FetchTurn::Mine(place) = self.turn(&source, progress).await? else { continue };
            let dir = &place.dir;
            if self.already_here(&source, &name, arch, begun).await?.is_some() {
                remove_dir(dir)?;
                continue;
            }
            let fetched = self.fetch(&source, &place, progress).await?;
            let verified = match source.check(&fetched.taken.digest, &fetched.taken.disk, dir).await {
                Ok(verified) => verified,
                Err(error) => {
                    remove_dir(dir)?;
                    if fetched.is_resumed && tries < FRESH_TRIES {
                        // A power cut can damage what an earlier attempt had written.
                        tries += 1;
                        continue;
                    }
                    return Err(error);
                }
            };
            let kept = self.keep(fetched.taken, &source.origin(), new_name(verified)).await;
            remove_dir(dir)?;
            return kept;
        }
    }

    /// Fetches a source, and renews the authorization at a registry if that expires meanwhile.
    ///
    /// On failure, the partial download stays only if it can be resumed.
    async fn fetch(
        &self,
        source: &PullSource,
        place: &DownloadDir,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<FetchedFile> {
        let wanted = source.wanted();
        let (image, authorization) = source.registry.clone().unzip();
        let mut download = self.remote.download(&wanted, place, authorization.flatten(), progress)?;
        let mut shown_at = None;
        loop {
            let error = match download.run().await {
                Ok(()) => {
                    let finished = download.finish().await.map_err(|error| source.origin().named(error));
                    return finished.map_err(|error| give_up(&place.dir, error));
                }
                Err(error) => error,
            };
            let (got_bytes, challenge) = (download.got_bytes(), download.challenge());
            // A registry that refuses a new authorization at once will refuse the next one as well.
            let is_new = shown_at.replace(got_bytes) != Some(got_bytes);
            download.authorization = match (&image, challenge) {
                (Some(image), Some(challenge)) if is_new => {
                    self.registry_authorization(image, &challenge).await?
                }
                _ => None,
            };
            if download.authorization.is_none() {
                download.give_up().await;
                if got_bytes == 0 {
                    remove_dir(&place.dir)?;
                }
                return Err(give_up(&place.dir, error));
            }
        }
    }

    /// Returns the stored image that equals what would be fetched, and how it is verified.
    async fn already_here(
        &self,
        source: &PullSource,
        name: &str,
        arch: Arch,
        begun: u64,
    ) -> Result<Option<(LocalName, Verification)>> {
        let mut names = match &source.digest {
            Some(digest) => self.kept_downloads(digest)?,
            // No checksum is known: only what was stored since this call began is up to date.
            None => {
                let images = self.find(name, Some(arch)).unwrap_or_default();
                let is_new = |kept: &LocalName| kept.name == name && kept.arch == arch && kept.since >= begun;
                images.into_iter().flat_map(|image| image.names).filter(is_new).collect()
            }
        };
        // A damaged image is fetched again, which repairs it.
        names.retain(|kept| matches!(self.read(&kept.image), Ok(Some(image)) if self.is_sound(&image)));
        let Some(signed) = &source.signed_file else {
            return Ok(names.pop().map(|kept| (kept, source.verified.clone())));
        };
        let by_one_of_the_keys = |kept: &LocalName| match &kept.verified {
            Verification::Signature { fingerprint } => {
                signed.keys.iter().any(|key| key.fingerprint == *fingerprint)
            }
            _ => false,
        };
        if let Some(at) = names.iter().position(by_one_of_the_keys) {
            let kept = names.swap_remove(at);
            let verified = kept.verified.clone();
            return Ok(Some((kept, verified)));
        }
        // A checksum alone is no signature. The stored disk may be the signed file itself; if it
        // was unpacked from that, the signature can't be verified, and the file is fetched again.
        let Some(kept) = names.pop() else { return Ok(None) };
        let Some(_lock) = self.hold(&kept.image, LockMode::Shared).await? else { return Ok(None) };
        let Some(image) = self.read(&kept.image)? else { return Ok(None) };
        Ok(signed.verify(&image.facts.path).await.ok().map(|verified| (kept, verified)))
    }
}

impl PullSource {
    fn wanted(&self) -> DownloadRequest<'_> {
        DownloadRequest {
            url: &self.url,
            algorithm: self.digest.as_ref().map_or(DigestAlgorithm::Sha256, Digest::algorithm),
            is_checked: self.digest.is_some(),
        }
    }

    /// Returns the name for errors: as the image was asked for, or the catalogue's address.
    fn origin(&self) -> ImageOrigin {
        let shown = match &self.registry {
            Some((image, _)) => image.to_string(),
            None => shown(&self.url),
        };
        ImageOrigin { shown, file: None }
    }

    /// Returns the key of this download: pulls with the same key share one download.
    pub(super) fn key(&self) -> String {
        let text = self.digest.as_ref().map_or_else(|| self.url.clone(), Digest::to_string);
        let hex = Hasher::digest(DigestAlgorithm::Sha256, text.as_bytes());
        hex.hex()[..32].to_owned()
    }

    /// Compares the checksum with the expected one, and returns how the image was verified.
    async fn check(&self, found: &Digest, download: &Path, dir: &Path) -> Result<Verification> {
        if let Some(wanted) = self.digest.as_ref().filter(|wanted| *wanted != found) {
            let problem = format!(
                "it hashes to {found}, and has to hash to {wanted}: it was damaged on its way, or replaced"
            );
            return Err(Error::untrusted(self.url.clone(), problem));
        }
        let Some(signed) = &self.signed_file else { return Ok(self.verified.clone()) };
        let file = dir.join(super::intake::DOWNLOAD);
        // A compressed image was signed as it was compressed.
        let file = if file.exists() { &file } else { download };
        let verified = signed.verify(file).await;
        verified.map_err(|problem| Error::untrusted(self.url.clone(), problem))
    }
}

impl FileSignature {
    /// Checks the signature over a file.
    ///
    /// # Errors
    /// The reason why the signature is not valid, for a person to read.
    async fn verify(&self, file: &Path) -> std::result::Result<Verification, String> {
        let (Self { signature, keys }, file) = (self.clone(), file.to_owned());
        let checked = tokio::task::spawn_blocking(move || {
            signature::verify_detached(&signature, &keys, seconds_since_1970(), || File::open(&file))
        });
        let fingerprint = checked.await.expect("checking a signature does not panic")?;
        Ok(Verification::Signature { fingerprint })
    }
}

fn url_source(url: &ImageUrl) -> PullSource {
    PullSource {
        url: url.as_str().to_owned(),
        registry: None,
        digest: url.digest().cloned(),
        verified: if url.digest().is_some() { Verification::Digest } else { Verification::Nothing },
        signed_file: None,
    }
}

/// Refuses a file that is known to be for another architecture.
fn check_arch(path: &Path, found: Option<Arch>, asked: Arch) -> Result<()> {
    match found.filter(|found| *found != asked) {
        Some(found) => {
            let why =
                format!("this is an image for {}, and {} was asked for", found.as_str(), asked.as_str());
            Err(Error::invalid("image", path.display(), why))
        }
        None => Ok(()),
    }
}

/// Removes a partial download that can't be resumed, or that filled the disk; keeps any other.
fn give_up(dir: &Path, error: Error) -> Error {
    let is_useless = match &error {
        Error::Fetch { status: Some(status), .. } => !may_go_on_later(*status),
        error => matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Host | ErrorKind::NotFound),
    };
    if is_useless && let Err(second) = remove_dir(dir) {
        tracing::warn!(error = %second, "cannot remove what came of a download");
    }
    error
}
