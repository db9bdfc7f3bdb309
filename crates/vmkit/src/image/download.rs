//! Downloads an image into an [`ImageIntake`], and resumes after a broken connection.
//!
//! Edge: the network, and the directory of a download. It knows nothing of images or how they are
//! verified.
//!
//! What was received stays, and the rest is asked for with `Range` and `If-Range`. If the server
//! can't do that, or has another file by now, the download starts from the beginning: two files are
//! never joined. Attempts are counted from the last progress; after much progress, the next attempt
//! begins at once.

use reqwest::header::{CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, LAST_MODIFIED, RANGE};
use reqwest::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use uuid::Uuid;

use super::digest::DigestAlgorithm;
use super::downloads::{DOWNLOAD, DownloadDir};
use super::files::{read_bytes, replace};
use super::intake::{ImageIntake, ReceivedImage};
use super::progress::{PullProgress, PullStage};
use super::remote::{
    AttemptFailure, HttpFetcher, RetryBudget, challenge, fetch_error, is_passing, is_web_page, refusal,
    shown, with,
};
use crate::error::{Error, Result};
use crate::host::process::boot_id;
use crate::room::check_room;

/// The file that records what is being downloaded, beside the partial download.
const STATE: &str = "state.json";

/// A file to download.
#[derive(Debug)]
pub(super) struct DownloadRequest<'a> {
    pub(super) url: &'a str,
    /// The hash algorithm.
    pub(super) algorithm: DigestAlgorithm,
    /// Whether the checksum is known, so that the download may be resumed without the server's word
    /// that the file is the same.
    pub(super) is_checked: bool,
}

/// A completed download.
#[derive(Debug)]
pub(super) struct FetchedFile {
    pub(super) taken: ReceivedImage,
    /// Whether a part of it came from an earlier attempt, perhaps of another process.
    pub(super) is_resumed: bool,
}

/// The record of a download that has begun.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct DownloadRecord {
    url: String,
    #[serde(flatten)]
    version: HttpValidators,
    total_bytes: Option<u64>,
    /// The boot id of the host when the data was written: unsynced data is lost with that boot.
    boot_id: Option<Uuid>,
}

/// The validators by which a server identifies this version of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct HttpValidators {
    etag: Option<String>,
    modified: Option<String>,
}

/// The part of a file that a reply has: `bytes FIRST-LAST/TOTAL`, where TOTAL may be `*`.
#[derive(Debug, PartialEq, Eq)]
struct ContentRange {
    first: u64,
    total_bytes: Option<u64>,
}

impl DownloadRecord {
    /// Returns how many bytes of a partial download can be kept. The server is asked for the rest,
    /// and for one byte at least unless a checksum is known: it may have another file by now.
    fn usable_bytes(&self, wanted: &DownloadRequest<'_>, there_bytes: u64) -> u64 {
        if self.url != wanted.url {
            return 0;
        }
        if wanted.is_checked {
            return there_bytes;
        }
        if self.version.validator().is_none() || self.boot_id.is_none() || self.boot_id != boot_id().ok() {
            return 0;
        }
        match self.total_bytes == Some(there_bytes) {
            true => there_bytes.saturating_sub(1),
            false => there_bytes,
        }
    }
}

impl HttpValidators {
    fn of(headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Self { etag: text(ETAG), modified: text(LAST_MODIFIED) }
    }

    /// Returns the validator for `If-Range`: a strong ETag, else a date.
    ///
    /// Source: RFC 9110, "If-Range": a weak ETag is not to be used there.
    fn validator(&self) -> Option<&str> {
        let strong = self.etag.as_deref().filter(|etag| etag.starts_with('"'));
        strong.or(self.modified.as_deref())
    }

    /// Returns whether these can't belong to one file. A validator that only one of them has is no
    /// difference: a reply with a part may have fewer.
    fn differs(&self, other: &Self) -> bool {
        let both = |a: &Option<String>, b: &Option<String>| a.clone().zip(b.clone());
        match both(&self.etag, &other.etag) {
            // Equal strong ETags mean the same file; the date may be that of a copy.
            Some((a, b)) if a.starts_with('"') && b.starts_with('"') => a != b,
            Some((a, b)) if a.trim_start_matches("W/") != b.trim_start_matches("W/") => true,
            _ => both(&self.modified, &other.modified).is_some_and(|(a, b)| a != b),
        }
    }
}

impl ContentRange {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let (range, total) = content_range(headers)?;
        let (first, last) = range.split_once('-')?;
        let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        let total_bytes = match total {
            "*" => None,
            total => Some(total.parse().ok()?),
        };
        (first <= last && total_bytes.is_none_or(|total| last < total)).then_some(Self { first, total_bytes })
    }
}

/// Returns both halves of `Content-Range: bytes RANGE/TOTAL`.
fn content_range(headers: &HeaderMap) -> Option<(&str, &str)> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = range.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.trim(), total.trim()))
}

impl HttpFetcher {
    /// Starts to download a file into a directory of its own, or resumes the download that is
    /// there.
    ///
    /// # Errors
    /// Those of [`ImageIntake::begin`].
    pub(super) fn download<'a>(
        &'a self,
        wanted: &'a DownloadRequest<'a>,
        place: &'a DownloadDir,
        authorization: Option<String>,
        progress: &'a watch::Sender<PullProgress>,
    ) -> Result<FileDownload<'a>> {
        let dir = &place.dir;
        let state: Option<DownloadRecord> =
            read_bytes(&dir.join(STATE))?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let there_bytes = std::fs::metadata(dir.join(DOWNLOAD)).map_or(0, |metadata| metadata.len());
        let kept_bytes = state.as_ref().map_or(0, |state| state.usable_bytes(wanted, there_bytes));
        let state = state.filter(|_| kept_bytes > 0);
        let intake = ImageIntake::begin(place, wanted.algorithm, kept_bytes)?;
        Ok(FileDownload {
            remote: self,
            wanted,
            place,
            progress,
            authorization,
            challenge: None,
            state: state.unwrap_or_default(),
            intake,
            got_bytes: kept_bytes,
            most_bytes: kept_bytes,
            is_resumed: kept_bytes > 0,
        })
    }
}

/// What the body of a reply has.
#[derive(Debug, PartialEq, Eq)]
enum ReplyBody {
    Bytes,
    /// Nothing: everything was received already.
    Nothing,
}

/// After how many bytes of progress the next attempt begins at once. A server that sends less per
/// connection is asked again after a pause.
const MUCH_BYTES: u64 = 4 << 10;

/// A download under way.
///
/// # Cancel safety
/// What was received stays in its directory, and the next download resumes there.
pub(super) struct FileDownload<'a> {
    remote: &'a HttpFetcher,
    wanted: &'a DownloadRequest<'a>,
    place: &'a DownloadDir,
    progress: &'a watch::Sender<PullProgress>,
    /// The authorization that the server is sent; a new one is used from the next
    /// [`run`](Self::run).
    pub(super) authorization: Option<String>,
    challenge: Option<String>,
    state: DownloadRecord,
    intake: ImageIntake,
    got_bytes: u64,
    /// The largest number of bytes so far: receiving the same bytes again is no progress.
    most_bytes: u64,
    is_resumed: bool,
}

impl FileDownload<'_> {
    /// Returns how many bytes were received.
    pub(super) fn got_bytes(&self) -> u64 {
        self.got_bytes
    }

    /// Returns the server's authentication challenge, if it refused for lack of one; only once.
    pub(super) fn challenge(&mut self) -> Option<String> {
        self.challenge.take()
    }

    /// Fetches until everything was received. After an error it may be called again, and resumes.
    ///
    /// # Errors
    /// `Remote`, `NotFound`; `Host` without disk space.
    pub(super) async fn run(&mut self) -> Result<()> {
        let mut tries = RetryBudget::new(self.remote.patience);
        while self.got_bytes == 0 || self.state.total_bytes != Some(self.got_bytes) {
            let before = self.got_bytes;
            let error = match self.try_once().await {
                Ok(()) => break,
                Err(AttemptFailure::Final(error)) => return Err(error),
                Err(AttemptFailure::Unreachable(error)) if before == 0 => return Err(error),
                Err(AttemptFailure::Again(error) | AttemptFailure::Unreachable(error)) => error,
                Err(AttemptFailure::Anew(error)) => {
                    self.begin_anew().await?;
                    error
                }
            };
            if self.got_bytes > self.most_bytes {
                let more_bytes = self.got_bytes - self.most_bytes;
                self.most_bytes = self.got_bytes;
                tries = RetryBudget::new(self.remote.patience);
                if more_bytes >= MUCH_BYTES {
                    tracing::debug!(%error, "going on");
                    continue;
                }
            }
            tries.pause(error).await?;
        }
        Ok(())
    }

    /// Stops the download, and waits until nothing is written any more.
    pub(super) async fn give_up(mut self) {
        self.intake.give_up().await;
    }

    /// Returns the result, once everything was received.
    ///
    /// # Errors
    /// Those of [`ImageIntake::finish`].
    pub(super) async fn finish(self) -> Result<FetchedFile> {
        self.progress.send_modify(|progress| progress.stage = PullStage::Finishing);
        Ok(FetchedFile { taken: self.intake.finish().await?, is_resumed: self.is_resumed })
    }

    /// Requests what is missing, and receives it until the end or until the connection breaks.
    async fn try_once(&mut self) -> Result<(), AttemptFailure> {
        let url = self.wanted.url;
        if self.got_bytes > 0 && self.state.version.validator().is_none() && !self.wanted.is_checked {
            // Nothing would show if the rest were that of another file.
            self.begin_anew().await.map_err(AttemptFailure::Final)?;
        }
        let request = self.remote.client().map_err(AttemptFailure::Final)?.get(url);
        let mut request = with(request, self.authorization.as_deref());
        if self.got_bytes > 0 {
            request = request.header(RANGE, format!("bytes={}-", self.got_bytes));
            if let Some(validator) = self.state.version.validator() {
                request = request.header(IF_RANGE, validator);
            }
        }
        let mut response = self.remote.send(url, request).await?;
        if self.accept(&response).await? == ReplyBody::Nothing {
            return Ok(());
        }
        while let Some(bytes) = self.remote.next(url, &mut response).await? {
            let count = bytes.len() as u64;
            if !self.intake.take(bytes).await {
                // The intake has failed, and says why when it is finished; there is nothing more to
                // fetch.
                return Ok(());
            }
            self.got_bytes += count;
            self.show();
        }
        let problem = |total: &str| fetch_error(url, &format!("{} of {total} bytes came", self.got_bytes));
        match self.state.total_bytes {
            Some(total) if total > self.got_bytes => Err(AttemptFailure::Again(problem(&total.to_string()))),
            Some(total) if total < self.got_bytes => Err(AttemptFailure::Anew(problem(&total.to_string()))),
            // The total is unknown: only a server that has no more can say that this was the last
            // part.
            None if response.status() == StatusCode::PARTIAL_CONTENT => {
                Err(AttemptFailure::Again(problem("unknown")))
            }
            _ => Ok(()),
        }
    }

    /// Reads the head of a reply: whether the rest follows, or the whole file, or nothing of use.
    async fn accept(&mut self, response: &Response) -> Result<ReplyBody, AttemptFailure> {
        let (url, status) = (self.wanted.url, response.status());
        // Before the partial one is dropped: a network that wants a login sends a page first.
        if status.is_success() && is_web_page(response.headers()) {
            let (status, problem) =
                (Some(status.as_u16()), "the server replied with a web page, not an image");
            let (url, problem) = (shown(url), problem.to_owned());
            return Err(AttemptFailure::Final(Error::Fetch { url, problem, status, source: None }));
        }
        let mut version = HttpValidators::of(response.headers());
        let total_bytes = match status {
            StatusCode::OK => {
                if self.got_bytes > 0 {
                    // The server knows no ranges, or has another file by now: it sends the whole
                    // file.
                    self.begin_anew().await.map_err(AttemptFailure::Final)?;
                }
                response.content_length()
            }
            StatusCode::PARTIAL_CONTENT => self.resume(response, &mut version)?,
            StatusCode::RANGE_NOT_SATISFIABLE if self.got_bytes > 0 => {
                let total =
                    content_range(response.headers()).and_then(|(_, total)| total.parse::<u64>().ok());
                return match total {
                    Some(total) if total == self.got_bytes && self.state.total_bytes.is_none() => {
                        Ok(ReplyBody::Nothing)
                    }
                    _ => Err(AttemptFailure::Anew(refusal(url, status))),
                };
            }
            _ if is_passing(status) => return Err(AttemptFailure::Again(refusal(url, status))),
            _ => {
                self.challenge = challenge(url, response);
                return Err(AttemptFailure::Final(refusal(url, status)));
            }
        };
        let state = DownloadRecord { url: url.to_owned(), version, total_bytes, boot_id: boot_id().ok() };
        if state != self.state {
            let bytes = serde_json::to_vec(&state).expect("it has only text and numbers");
            replace(&self.place.dir.join(STATE), &bytes).map_err(AttemptFailure::Final)?;
            self.state = state;
        }
        let left_bytes = self.state.total_bytes.map_or(0, |total| total.saturating_sub(self.got_bytes));
        check_room(&self.place.dir, left_bytes, |mib| format!("{mib} MiB are still to come"))
            .map_err(AttemptFailure::Final)?;
        self.show();
        Ok(ReplyBody::Bytes)
    }

    /// Checks that a partial reply continues what has come, and returns the file's length, if
    /// known.
    fn resume(
        &mut self,
        response: &Response,
        version: &mut HttpValidators,
    ) -> Result<Option<u64>, AttemptFailure> {
        let again = |problem| AttemptFailure::Anew(fetch_error(self.wanted.url, problem));
        let part = ContentRange::of(response.headers())
            .filter(|part| part.first == self.got_bytes)
            .ok_or_else(|| again("the server sent another part than was requested"))?;
        let known = &self.state.version;
        let has_other_size =
            part.total_bytes.zip(self.state.total_bytes).is_some_and(|(new, old)| new != old);
        if self.got_bytes > 0 {
            if has_other_size || version.differs(known) {
                return Err(again("the server has another file by now"));
            }
            let known = known.clone();
            version.etag = known.etag.or(version.etag.take());
            version.modified = known.modified.or(version.modified.take());
            self.is_resumed = true;
        }
        Ok(part.total_bytes.or(self.state.total_bytes))
    }

    /// Drops the partial download, once nothing is written any more, and starts from the beginning.
    async fn begin_anew(&mut self) -> Result<()> {
        self.intake.give_up().await;
        self.intake = ImageIntake::begin(self.place, self.wanted.algorithm, 0)?;
        self.got_bytes = 0;
        self.is_resumed = false;
        self.state = DownloadRecord::default();
        Ok(())
    }

    fn show(&self) {
        let (done_bytes, total_bytes) = (self.got_bytes, self.state.total_bytes);
        self.progress.send_replace(PullProgress { stage: PullStage::Fetching, done_bytes, total_bytes });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        all.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    const DATE: &str = "Mon, 01 Jan 2024 00:00:00 GMT";
    const LATER: &str = "Mon, 01 Jan 2024 00:00:01 GMT";

    #[test]
    fn only_what_names_one_file_is_a_validator() {
        for (all, expected) in [
            (&[("etag", "\"a\""), ("last-modified", DATE)][..], Some("\"a\"")),
            (&[("etag", "W/\"a\""), ("last-modified", DATE)], Some(DATE)),
            (&[("etag", "W/\"a\"")], None),
        ] {
            assert_eq!(HttpValidators::of(&headers(all)).validator(), expected);
        }
    }

    #[test]
    fn versions_differ_by_the_validators_that_both_have() {
        let version = |etag: &str, modified: &str| {
            let told = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            HttpValidators { etag: told(etag), modified: told(modified) }
        };
        for (a, b, differ) in [
            (("\"a\"", DATE), ("\"a\"", LATER), false),
            (("\"a\"", DATE), ("\"b\"", DATE), true),
            (("W/\"a\"", DATE), ("\"a\"", DATE), false),
            (("W/\"a\"", DATE), ("W/\"a\"", LATER), true),
            (("W/\"a\"", ""), ("W/\"b\"", ""), true),
            (("\"a\"", DATE), ("", LATER), true),
            (("\"a\"", ""), ("", DATE), false),
            (("", ""), ("\"a\"", DATE), false),
        ] {
            assert_eq!(version(a.0, a.1).differs(&version(b.0, b.1)), differ, "{a:?} {b:?}");
        }
    }

    #[test]
    fn a_part_is_read_with_its_total() {
        let part = |range: &str| ContentRange::of(&headers(&[("content-range", range)]));
        let read = |first, total_bytes| Some(ContentRange { first, total_bytes });
        assert_eq!(part("bytes 17-98/100"), read(17, Some(100)));
        assert_eq!(part("bytes 17-99/*"), read(17, None));
        for bad in
            ["bytes */100", "bytes 17-100/100", "bytes 9-8/100", "bytes 17-99", "17-99/100", "bytes a-b/c"]
        {
            assert_eq!(part(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_head_is_read_without_panic(range in "(bytes )?[0-9*/ -]{0,40}") {
            let _ = ContentRange::of(&headers(&[("content-range", &range)]));
        }
    }
}
