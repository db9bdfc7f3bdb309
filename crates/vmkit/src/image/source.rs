//! A source of an image: the address of its file, and how that is verified.
//!
//! It does not know who fetches it, or where it is stored.

use std::fs::File;
use std::path::Path;

use super::digest::{Digest, DigestAlgorithm, Hasher};
use super::downloads::DOWNLOAD;
use super::files::seconds_since_1970;
use super::inspect::ImageOrigin;
use super::kept::Verification;
use super::reference::{ImageUrl, OciRef};
use super::remote::shown;
use super::signature::{self, Certificate};
use crate::blocking::blocking;
use crate::error::{Error, Result};

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
    pub(super) signature: Vec<u8>,
    pub(super) keys: Vec<Certificate>,
}

impl PullSource {
    /// Returns the source that an address names.
    pub(super) fn of_url(url: &ImageUrl) -> Self {
        Self {
            url: url.as_str().to_owned(),
            registry: None,
            digest: url.digest().cloned(),
            verified: if url.digest().is_some() { Verification::Digest } else { Verification::Nothing },
            signed_file: None,
        }
    }

    /// Returns the name for errors: as the image was requested, or the catalogue's address.
    pub(super) fn origin(&self) -> ImageOrigin {
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
    pub(super) async fn check(&self, found: &Digest, download: &Path, dir: &Path) -> Result<Verification> {
        if let Some(wanted) = self.digest.as_ref().filter(|wanted| *wanted != found) {
            let problem = format!(
                "its checksum is {found} (expected {wanted}): it was damaged in transit, or replaced"
            );
            return Err(Error::untrusted(self.url.clone(), problem));
        }
        let Some(signed) = &self.signed_file else { return Ok(self.verified.clone()) };
        let file = dir.join(DOWNLOAD);
        // A compressed image was signed as it was compressed.
        let file = if file.exists() { &file } else { download };
        let verified = signed.verify(file).await?;
        verified.map_err(|problem| Error::untrusted(self.url.clone(), problem))
    }
}

impl FileSignature {
    /// Checks the signature over a file; returns the reason why it is not valid, for a person to
    /// read.
    ///
    /// # Errors
    /// `Host` if it can't be checked for lack of a thread.
    pub(super) async fn verify(&self, file: &Path) -> Result<std::result::Result<Verification, String>> {
        let (Self { signature, keys }, file) = (self.clone(), file.to_owned());
        let checked = blocking(move || {
            signature::verify_detached(&signature, &keys, seconds_since_1970(), || File::open(&file))
        });
        Ok(checked.await?.map(|fingerprint| Verification::Signature { fingerprint }))
    }
}
