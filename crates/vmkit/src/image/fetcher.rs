//! Finds out how an image of the catalogue is verified, and fetches sources.
//!
//! Edge: the network, and the directory of a download. It knows nothing of local images.

use std::path::Path;

use tokio::sync::watch;

use super::catalogue::{
    OpenPgpKey, PublicKey, PublishedImage, PublishedSignature, SignatureTarget, without_query,
};
use super::checksums;
use super::digest::{Digest, DigestAlgorithm};
use super::download::{DownloadRequest, FetchedFile};
use super::downloads::{DownloadDir, remove_dir};
use super::files::seconds_since_1970;
use super::kept::Verification;
use super::logins::RegistryLogins;
use super::progress::PullProgress;
use super::registry::RegistryClient;
use super::remote::{HttpFetcher, may_go_on_later};
use super::signature::{self, Certificate, MOST_KEY_BYTES, MOST_SIGNATURE_BYTES};
use super::source::{FileSignature, PullSource};
use crate::error::{Error, ErrorKind, Result};

/// The largest file of checksums, in bytes.
const MOST_CHECKSUM_BYTES: usize = 4 << 20;

/// A fetcher of images from servers and registries.
#[derive(Debug, Clone, Default)]
pub(super) struct ImageFetcher {
    pub(super) remote: HttpFetcher,
    pub(super) logins: RegistryLogins,
}

impl ImageFetcher {
    /// Returns the client of registries.
    pub(super) fn registry(&self) -> RegistryClient<'_> {
        RegistryClient { remote: &self.remote, logins: &self.logins }
    }

    /// Finds out the checksum of an image of the catalogue.
    pub(super) async fn published_source(&self, published: &PublishedImage) -> Result<PullSource> {
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

    /// Fetches a source, and renews the authorization at a registry if that expires meanwhile.
    ///
    /// On failure, the partial download stays only if it can be resumed.
    pub(super) async fn fetch(
        &self,
        source: &PullSource,
        place: &DownloadDir,
        progress: &watch::Sender<PullProgress>,
    ) -> Result<FetchedFile> {
        let wanted = DownloadRequest {
            url: &source.url,
            algorithm: source.digest.as_ref().map_or(DigestAlgorithm::Sha256, Digest::algorithm),
            is_checked: source.digest.is_some(),
        };
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
                    self.registry().authorization(image, &challenge).await?
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
