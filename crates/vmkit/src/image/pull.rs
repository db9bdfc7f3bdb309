//! Pulls a source: fetches it unless it is stored already, verifies it, and stores it.
//!
//! ```text
//! expected checksum ─▶ stored already? ─yes─▶ its name again
//!                           │no
//!                      the lock of this download
//!                      fetch, hashed meanwhile ─▶ compare ─▶ store, and name
//! ```
//!
//! Nothing is trusted, and nothing gets a name, before its checksum was compared.

use tokio::sync::watch;

use super::downloads::{Downloads, FetchTurn, remove_dir};
use super::fetcher::ImageFetcher;
use super::files::seconds_since_1970;
use super::kept::{LocalImage, LocalName, NewName, Verification};
use super::local_images::{ImageQuery, LocalImages, QueryTarget};
use super::progress::PullProgress;
use super::source::PullSource;
use crate::error::Result;
use crate::store::lock::LockMode;

/// How often a download with the wrong checksum is fetched again: once, if a part of it came from
/// an earlier attempt.
const FRESH_TRIES: u32 = 1;

/// A pull into the images of a home.
pub(super) struct ImagePull<'a> {
    pub(super) images: &'a LocalImages,
    pub(super) downloads: &'a Downloads,
    pub(super) fetcher: &'a ImageFetcher,
    pub(super) progress: &'a watch::Sender<PullProgress>,
}

impl ImagePull<'_> {
    /// Fetches a source, once for all processes that want it, and stores it under a name.
    pub(super) async fn bring(&self, source: &PullSource, name: NewName) -> Result<LocalImage> {
        let begun = seconds_since_1970();
        let verified_name = |verified: Verification| NewName { verified, ..name.clone() };
        let mut tries = 0;
        loop {
            if let Some((kept, verified)) = self.already_here(source, &name, begun).await?
                && let Some(image) = self.images.name_again(kept, verified_name(verified)).await?
            {
                return Ok(image);
            }
            // Another process has just finished this download: look again.
            let FetchTurn::Mine(place) =
                self.downloads.turn(&source.key(), &source.url, self.progress).await?
            else {
                continue;
            };
            let dir = &place.dir;
            if self.already_here(source, &name, begun).await?.is_some() {
                remove_dir(dir)?;
                continue;
            }
            let fetched = self.fetcher.fetch(source, &place, self.progress).await?;
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
            let kept = self.images.keep(fetched.taken, &source.origin(), verified_name(verified)).await;
            remove_dir(dir)?;
            return kept;
        }
    }

    /// Returns the stored image that equals what would be fetched, and how it is verified.
    async fn already_here(
        &self,
        source: &PullSource,
        name: &NewName,
        begun: u64,
    ) -> Result<Option<(LocalName, Verification)>> {
        let mut names = match &source.digest {
            Some(digest) => self.images.kept_downloads(digest)?,
            // No checksum is known: only what was stored since this call began is up to date.
            None => {
                let target = QueryTarget::Name(name.name.clone());
                let query = ImageQuery { text: name.name.clone(), target, arch: Some(name.arch) };
                let images = self.images.find(&query).unwrap_or_default();
                let is_new = |kept: &LocalName| query.names(kept) && kept.since >= begun;
                images.into_iter().flat_map(|image| image.names).filter(is_new).collect()
            }
        };
        // A damaged image is fetched again, which repairs it.
        names.retain(
            |kept| matches!(self.images.read(&kept.image), Ok(Some(image)) if self.images.is_sound(&image)),
        );
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
        let Some(_lock) = self.images.hold(&kept.image, LockMode::Shared).await? else { return Ok(None) };
        let Some(image) = self.images.read(&kept.image)? else { return Ok(None) };
        Ok(signed.verify(&image.facts.path).await?.ok().map(|verified| (kept, verified)))
    }
}
