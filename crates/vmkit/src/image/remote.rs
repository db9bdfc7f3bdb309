//! Asks servers: small files whole, and images into an [`Intake`], going on where a cut left off.
//!
//! Edge: the network. It knows HTTP and nothing of what an image is or how it is checked.
//!
//! Every wait is bounded: for a connection, and for the next byte. A cut, a silence or a server that is overloaded is tried
//! again after a while; what has come stays, and the rest is asked for with `Range` and `If-Range`. Where the server can't
//! do that, or has another file by now, it begins anew. Tries count from the last byte that came.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap, HeaderValue, IF_RANGE,
    LAST_MODIFIED, RANGE, WWW_AUTHENTICATE,
};
use reqwest::{Client, NoProxy, Proxy, RequestBuilder, Response, StatusCode, Url, redirect};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::digest::DigestAlgorithm;
use super::downloads::Place;
use super::intake::{DOWNLOAD, Intake, Taken};
use super::progress::{PullProgress, PullStage};
use super::store::{read_bytes, replace};
use crate::error::{Error, Result};
use crate::host::process::boot_id;

/// The most servers that an address may lead to one after the other.
const MOST_REDIRECTS: usize = 10;
/// The file that says what is being downloaded, beside what came of it.
const STATE: &str = "state.json";

/// How servers are asked.
#[derive(Clone, Default)]
pub(super) struct Remote {
    pub(super) patience: Patience,
    proxy: Option<Proxy>,
    client: Arc<OnceLock<Client>>,
}

impl fmt::Debug for Remote {
    /// Shows whether there is a proxy only: its address may have a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has_proxy = self.proxy.is_some();
        f.debug_struct("Remote").field("patience", &self.patience).field("has_proxy", &has_proxy).finish()
    }
}

/// How long a server is waited for, and how often it is asked again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    pub(super) connect: Duration,
    /// How long no byte may come.
    pub(super) idle: Duration,
    /// How often it is tried again without a byte in between.
    pub(super) tries: u32,
    /// How long is waited before the first of these; twice as long before each further one.
    pub(super) pause: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            idle: Duration::from_secs(60),
            tries: 5,
            pause: Duration::from_secs(1),
        }
    }
}

/// A file to download.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    pub(super) url: &'a str,
    /// What it is hashed by.
    pub(super) algorithm: DigestAlgorithm,
    /// Whether what it must hash to is known, so that it may go on from an earlier try without the server's word that the
    /// file is the same.
    pub(super) is_checked: bool,
}

/// What came of a download.
#[derive(Debug)]
pub(super) struct Fetched {
    pub(super) taken: Taken,
    /// Whether a part of it came in an earlier try of perhaps another process.
    pub(super) is_resumed: bool,
}

/// What is known of a download that has begun.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    url: String,
    /// A strong ETag or a date: what the server knows this very file by.
    validator: Option<String>,
    total_bytes: Option<u64>,
    /// Which run of the host wrote what came: what has not reached the disk is lost with it.
    boot_id: Option<Uuid>,
}

impl State {
    /// Answers how much of what is there can be built upon; the server is asked for the rest, one byte at least unless a checksum tells
    /// what the whole is: it may have another file by now.
    fn usable_bytes(&self, wanted: &Wanted<'_>, there_bytes: u64) -> u64 {
        if self.url != wanted.url {
            return 0;
        }
        if wanted.is_checked {
            return there_bytes;
        }
        if self.validator.is_none() || self.boot_id.is_none() || self.boot_id != boot_id().ok() {
            return 0;
        }
        match self.total_bytes == Some(there_bytes) {
            true => there_bytes.saturating_sub(1),
            false => there_bytes,
        }
    }
}

/// Why a try did not come to the end.
enum Cut {
    /// It may be tried again.
    Again(Error),
    /// The server can't be reached: worth another try only where it was there a moment ago.
    Unreachable(Error),
    /// The server has no more of this file: begin anew.
    Anew(Error),
    /// That will not change.
    Final(Error),
}

/// What a server answered where a registry's client has to look at it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// How the server wants to be shown who asks, where it does.
    pub(super) challenge: Option<String>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// Answers the body of a success.
    ///
    /// # Errors
    /// `Remote` and `NotFound` for any other status.
    pub(super) fn body(self, url: &str) -> Result<Vec<u8>> {
        if self.status.is_success() { Ok(self.body) } else { Err(refusal(url, self.status)) }
    }
}

impl Remote {
    /// Answers the same, asking through a proxy.
    ///
    /// # Errors
    /// `InvalidInput` on `proxy`.
    pub(super) fn through(self, url: &str, except: &str) -> Result<Self> {
        // The address may have a password, so it is not repeated.
        let proxy = Proxy::all(url).map_err(|_| {
            Error::invalid("proxy", "…", "write the address of a proxy, such as http://HOST:PORT")
        })?;
        let proxy = proxy.no_proxy(NoProxy::from_string(except));
        Ok(Self { proxy: Some(proxy), client: Arc::default(), ..self })
    }

    /// Asks for a small file.
    ///
    /// # Errors
    /// `Remote` where the server can't be reached, refuses, or has more than `most_bytes` to say; `NotFound`.
    pub(super) async fn small_file(&self, url: &str, most_bytes: usize) -> Result<Vec<u8>> {
        let answer = self.ask(url, None, None, most_bytes).await?;
        let is_page = is_web_page(&answer.headers);
        let body = answer.body(url)?;
        if is_page {
            return Err(fetch_error(url, "the server answered with a web page"));
        }
        Ok(body)
    }

    /// Asks and answers what came, whatever its status.
    ///
    /// # Errors
    /// `Remote` where the server can't be reached or has more than `most_bytes` to say.
    pub(super) async fn ask(
        &self,
        url: &str,
        accept: Option<&str>,
        authorization: Option<&str>,
        most_bytes: usize,
    ) -> Result<Answer> {
        let client = self.client()?;
        let request = || {
            let request = with(client.get(url), authorization);
            match accept {
                Some(accept) => request.header(ACCEPT, accept),
                None => request,
            }
        };
        self.asked(url, request, most_bytes).await
    }

    /// Sends a form and answers what came, whatever its status. Where the server leads elsewhere, nobody follows: what is in the
    /// form is for this server.
    ///
    /// # Errors
    /// As for [`ask`](Self::ask).
    pub(super) async fn post(&self, url: &str, form: String, most_bytes: usize) -> Result<Answer> {
        let client = self.new_client(redirect::Policy::none())?;
        let request =
            || client.post(url).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form.clone());
        self.asked(url, request, most_bytes).await
    }

    async fn asked(
        &self,
        url: &str,
        request: impl Fn() -> RequestBuilder,
        most_bytes: usize,
    ) -> Result<Answer> {
        let mut tries = Tries::new(self.patience);
        loop {
            match self.ask_once(url, request(), most_bytes).await {
                Ok(answer) => return Ok(answer),
                Err(Cut::Final(error) | Cut::Unreachable(error)) => return Err(error),
                Err(Cut::Again(error) | Cut::Anew(error)) => tries.pause(error).await?,
            }
        }
    }

    async fn ask_once(&self, url: &str, request: RequestBuilder, most_bytes: usize) -> Result<Answer, Cut> {
        let mut response = self.send(url, request).await?;
        if is_passing(response.status()) {
            return Err(Cut::Again(refusal(url, response.status())));
        }
        let (status, headers, challenge) =
            (response.status(), response.headers().clone(), challenge(url, &response));
        let mut body = Vec::new();
        while let Some(bytes) = self.next(url, &mut response).await? {
            body.extend_from_slice(&bytes);
            if body.len() > most_bytes {
                let problem = format!("more than {most_bytes} bytes came, and this should be a small file");
                return Err(Cut::Final(fetch_error(url, &problem)));
            }
        }
        Ok(Answer { status, headers, challenge, body })
    }

    /// Begins to download a file into a directory of its own, or to go on with what is there of it.
    ///
    /// # Errors
    /// Those of [`Intake::begin`].
    pub(super) fn download<'a>(
        &'a self,
        wanted: &'a Wanted<'a>,
        place: &'a Place,
        authorization: Option<String>,
        progress: &'a watch::Sender<PullProgress>,
    ) -> Result<Download<'a>> {
        let dir = &place.dir;
        let state: Option<State> =
            read_bytes(&dir.join(STATE))?.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let there_bytes = std::fs::metadata(dir.join(DOWNLOAD)).map_or(0, |metadata| metadata.len());
        let kept_bytes = state.as_ref().map_or(0, |state| state.usable_bytes(wanted, there_bytes));
        let state = state.filter(|_| kept_bytes > 0);
        let intake = Intake::begin(place, wanted.algorithm, kept_bytes)?;
        Ok(Download {
            remote: self,
            wanted,
            place,
            progress,
            authorization,
            challenge: None,
            state: state.unwrap_or_default(),
            intake,
            got_bytes: kept_bytes,
            is_resumed: kept_bytes > 0,
        })
    }

    async fn send(&self, url: &str, request: RequestBuilder) -> Result<Response, Cut> {
        match timeout(self.patience.connect + self.patience.idle, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            // What was asked for, or where it led to, is wrong, and will be.
            Ok(Err(error)) if error.is_redirect() || error.is_builder() => {
                Err(Cut::Final(fetch_error_of(url, error)))
            }
            Ok(Err(error)) if error.is_connect() => Err(Cut::Unreachable(fetch_error_of(url, error))),
            Ok(Err(error)) => Err(Cut::Again(fetch_error_of(url, error))),
            Err(_) => Err(Cut::Again(self.silence(url))),
        }
    }

    async fn next(&self, url: &str, response: &mut Response) -> Result<Option<bytes::Bytes>, Cut> {
        match timeout(self.patience.idle, response.chunk()).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) => Err(Cut::Again(fetch_error_of(url, error))),
            Err(_) => Err(Cut::Again(self.silence(url))),
        }
    }

    fn silence(&self, url: &str) -> Error {
        let awaited = format!("{} to send the next byte", shown(url));
        Error::TimedOut { awaited, after: self.patience.idle, console: String::new() }
    }

    fn client(&self) -> Result<&Client> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let follow =
            redirect::Policy::custom(|attempt| match refusal_to_follow(attempt.previous(), attempt.url()) {
                Some(why) => attempt.error(why),
                None => attempt.follow(),
            });
        let client = self.new_client(follow)?;
        Ok(self.client.get_or_init(|| client))
    }

    fn new_client(&self, follow: redirect::Policy) -> Result<Client> {
        use rustls_platform_verifier::BuilderVerifierExt;

        let refused = |problem: String| Error::Host { needed: "TLS".to_owned(), problem };
        // Handed over, so that no provider is installed for the whole process, which is not the library's to do.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(BuilderVerifierExt::with_platform_verifier)
            .map_err(|error| refused(format!("the system's certificates can't be used: {error}")))?
            .with_no_client_auth();
        let mut builder = Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(follow)
            .connect_timeout(self.patience.connect)
            .no_proxy()
            .user_agent(concat!("vmkit/", env!("CARGO_PKG_VERSION")));
        if let Some(proxy) = &self.proxy {
            builder = builder.proxy(proxy.clone());
        }
        builder.build().map_err(|error| refused(error.to_string()))
    }
}

/// A download under way.
///
/// # Cancel safety
/// What came stays in its directory, and the next one goes on from there.
pub(super) struct Download<'a> {
    remote: &'a Remote,
    wanted: &'a Wanted<'a>,
    place: &'a Place,
    progress: &'a watch::Sender<PullProgress>,
    /// What the server is shown; another one counts from the next [`run`](Self::run).
    pub(super) authorization: Option<String>,
    challenge: Option<String>,
    state: State,
    intake: Intake,
    got_bytes: u64,
    is_resumed: bool,
}

impl Download<'_> {
    /// Answers how much is here.
    pub(super) fn got_bytes(&self) -> u64 {
        self.got_bytes
    }

    /// Answers how the server wanted to be shown who asks, where it refused for that; only once.
    pub(super) fn challenge(&mut self) -> Option<String> {
        self.challenge.take()
    }

    /// Fetches until all is here. After an error it may be called again, and goes on.
    ///
    /// # Errors
    /// `Remote`, `NotFound`; `Host` without room for it.
    pub(super) async fn run(&mut self) -> Result<()> {
        let mut tries = Tries::new(self.remote.patience);
        while self.got_bytes == 0 || self.state.total_bytes != Some(self.got_bytes) {
            let before = self.got_bytes;
            let error = match self.try_once().await {
                Ok(()) => break,
                Err(Cut::Final(error)) => return Err(error),
                Err(Cut::Unreachable(error)) if before == 0 => return Err(error),
                Err(Cut::Again(error) | Cut::Unreachable(error)) => error,
                Err(Cut::Anew(error)) => {
                    self.begin_anew().await?;
                    error
                }
            };
            if self.got_bytes > before {
                tries = Tries::new(self.remote.patience);
            }
            tries.pause(error).await?;
        }
        Ok(())
    }

    /// Ends it where it is, and waits until nothing is written any more.
    pub(super) async fn give_up(mut self) {
        self.intake.give_up().await;
    }

    /// Answers what came, once all is here.
    ///
    /// # Errors
    /// Those of [`Intake::finish`].
    pub(super) async fn finish(self) -> Result<Fetched> {
        self.progress.send_modify(|progress| progress.stage = PullStage::Finishing);
        Ok(Fetched { taken: self.intake.finish().await?, is_resumed: self.is_resumed })
    }

    /// Asks for what is missing, and takes it in until the end or a cut.
    async fn try_once(&mut self) -> Result<(), Cut> {
        let url = self.wanted.url;
        let request = self.remote.client().map_err(Cut::Final)?.get(url);
        let mut request = with(request, self.authorization.as_deref());
        if self.got_bytes > 0 {
            request = request.header(RANGE, format!("bytes={}-", self.got_bytes));
            if let Some(validator) = &self.state.validator {
                request = request.header(IF_RANGE, validator);
            }
        }
        let mut response = self.remote.send(url, request).await?;
        self.accept(&response).await?;
        while let Some(bytes) = self.remote.next(url, &mut response).await? {
            let count = bytes.len() as u64;
            if !self.intake.take(bytes).await {
                // The intake has failed, and says why when it is ended; there is nothing more to fetch.
                return Ok(());
            }
            self.got_bytes += count;
            self.show();
        }
        match self.state.total_bytes {
            Some(total) if total != self.got_bytes => {
                let problem = format!("{} of {total} bytes came", self.got_bytes);
                Err(Cut::Again(fetch_error(url, &problem)))
            }
            _ => Ok(()),
        }
    }

    /// Looks at the head of an answer: whether the rest comes, or the whole, or nothing of use.
    async fn accept(&mut self, response: &Response) -> Result<(), Cut> {
        let (url, status) = (self.wanted.url, response.status());
        // Before what came earlier is dropped for it: a network that wants a login first answers so.
        if status.is_success() && is_web_page(response.headers()) {
            let (status, problem) =
                (Some(status.as_u16()), "the server answered with a web page, not an image");
            let (url, problem) = (shown(url), problem.to_owned());
            return Err(Cut::Final(Error::Fetch { url, problem, status, source: None }));
        }
        match status {
            StatusCode::OK => {
                if self.got_bytes > 0 {
                    // It knows no ranges, or has another file by now: it sends the whole.
                    self.begin_anew().await.map_err(Cut::Final)?;
                }
            }
            StatusCode::PARTIAL_CONTENT => {
                let range = response.headers().get(CONTENT_RANGE).and_then(|range| range.to_str().ok());
                if range.and_then(first_of_range) != Some(self.got_bytes) {
                    return Err(Cut::Anew(fetch_error(
                        url,
                        "the server sent another part than was asked for",
                    )));
                }
            }
            StatusCode::RANGE_NOT_SATISFIABLE if self.got_bytes > 0 => {
                return Err(Cut::Anew(refusal(url, status)));
            }
            _ if is_passing(status) => return Err(Cut::Again(refusal(url, status))),
            _ => {
                self.challenge = challenge(url, response);
                return Err(Cut::Final(refusal(url, status)));
            }
        }
        let total_bytes = response.content_length().map(|rest| self.got_bytes + rest);
        let validator = validator(response.headers());
        let state = State { url: url.to_owned(), validator, total_bytes, boot_id: boot_id().ok() };
        if state != self.state {
            let bytes = serde_json::to_vec(&state).expect("it has only text and numbers");
            replace(&self.place.dir.join(STATE), &bytes).map_err(Cut::Final)?;
            self.state = state;
        }
        check_room(&self.place.dir, self.state.total_bytes.map(|total| total - self.got_bytes))
            .map_err(Cut::Final)?;
        self.show();
        Ok(())
    }

    /// Drops what came, once nobody writes it any more, and begins with nothing.
    async fn begin_anew(&mut self) -> Result<()> {
        self.intake.give_up().await;
        self.intake = Intake::begin(self.place, self.wanted.algorithm, 0)?;
        self.got_bytes = 0;
        self.is_resumed = false;
        self.state = State::default();
        Ok(())
    }

    fn show(&self) {
        let (done_bytes, total_bytes) = (self.got_bytes, self.state.total_bytes);
        self.progress.send_replace(PullProgress { stage: PullStage::Fetching, done_bytes, total_bytes });
    }
}

/// Counts tries, and waits longer between each two.
struct Tries {
    patience: Patience,
    failed: u32,
}

impl Tries {
    fn new(patience: Patience) -> Self {
        Self { patience, failed: 0 }
    }

    /// Waits before the next try; the error is final where there were enough.
    async fn pause(&mut self, error: Error) -> Result<()> {
        if self.failed >= self.patience.tries {
            return Err(error);
        }
        tracing::debug!(%error, "trying again");
        sleep(self.patience.pause * 2_u32.pow(self.failed.min(5))).await;
        self.failed += 1;
        Ok(())
    }
}

fn with(request: RequestBuilder, authorization: Option<&str>) -> RequestBuilder {
    // Marked, so that it is in no log; the client takes it away where it is led to another server.
    match authorization.map(HeaderValue::from_str) {
        Some(Ok(mut value)) => {
            value.set_sensitive(true);
            request.header(AUTHORIZATION, value)
        }
        _ => request,
    }
}

/// Answers what the server knows this very file by: a strong ETag, else a date.
///
/// Source: RFC 9110, "If-Range": a weak ETag is not to be used there.
fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let strong = text(ETAG).filter(|etag| etag.starts_with('"'));
    strong.or_else(|| text(LAST_MODIFIED)).map(str::to_owned)
}

/// Answers where a part begins: `bytes FIRST-LAST/TOTAL`.
fn first_of_range(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

/// Answers why one is not led on to this address from those before, if so.
fn refusal_to_follow(before: &[Url], next: &Url) -> Option<String> {
    if before.len() > MOST_REDIRECTS {
        return Some(format!("it leads on and on, {MOST_REDIRECTS} times and more"));
    }
    let was_safe = before.last().is_some_and(|url| url.scheme() == "https");
    (was_safe && next.scheme() != "https")
        .then(|| "it leads from https:// to an address that is not safe".to_owned())
}

/// Answers how a server wants to be shown who asks, where it refused for that; a server that was led to is told nothing.
fn challenge(url: &str, response: &Response) -> Option<String> {
    let is_asked = Url::parse(url).is_ok_and(|asked| asked.origin() == response.url().origin());
    let header = response.headers().get(WWW_AUTHENTICATE)?.to_str().ok()?;
    (is_asked && response.status() == StatusCode::UNAUTHORIZED).then(|| header.to_owned())
}

/// Tells whether what came is worth keeping after a refusal with this status: whoever logs in, or asks later, may get the rest.
///
/// A page of the wrong kind (200) is what a network shows that wants a login first.
pub(super) fn may_go_on_later(status: u16) -> bool {
    matches!(status, 200 | 401 | 403 | 407) || StatusCode::from_u16(status).is_ok_and(is_passing)
}

/// Tells whether a refusal may be none in a moment.
fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

fn is_web_page(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().to_ascii_lowercase().starts_with(b"text/html"))
}

/// Refuses what there is no room for, before it is fetched.
fn check_room(dir: &Path, bytes: Option<u64>) -> Result<()> {
    let Some(bytes) = bytes else { return Ok(()) };
    let system = rustix::fs::statvfs(dir).map_err(|errno| Error::io("examine", dir)(errno.into()))?;
    let free_bytes = system.f_bavail.saturating_mul(system.f_frsize);
    if bytes > free_bytes {
        let problem = format!(
            "{} MiB are still to come, and {} MiB are free there",
            bytes.div_ceil(1 << 20),
            free_bytes >> 20
        );
        return Err(Error::Host { needed: format!("room in {}", dir.display()), problem });
    }
    Ok(())
}

fn fetch_error(url: &str, problem: &str) -> Error {
    Error::Fetch { url: shown(url), problem: problem.to_owned(), status: None, source: None }
}

fn fetch_error_of(url: &str, error: reqwest::Error) -> Error {
    let problem = match () {
        () if error.is_connect() => "the server can't be reached",
        () if error.is_redirect() => "it leads somewhere that is not followed",
        () if error.is_builder() => "this is no address",
        () => "the connection broke",
    };
    Error::Fetch {
        url: shown(url),
        problem: problem.to_owned(),
        status: None,
        // The address is in the error already.
        source: Some(Box::new(error.without_url())),
    }
}

fn refusal(url: &str, status: StatusCode) -> Error {
    let problem = match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => "there is no such file on the server".to_owned(),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            format!("the server does not give it to everybody ({status})")
        }
        _ => format!("the server answered {status}"),
    };
    Error::Fetch { url: shown(url), problem, status: Some(status.as_u16()), source: None }
}

/// Answers an address without what may be secret in it: signed addresses have their signature behind a `?`.
fn shown(url: &str) -> String {
    match url.split_once('?') {
        Some((address, _)) => format!("{address}?…"),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_led_from_a_safe_address_to_one_that_is_not() {
        let url = |text: &str| text.parse::<Url>().unwrap();
        let refused = |from: &str, to: &str| refusal_to_follow(&[url(from)], &url(to)).is_some();
        assert!(refused("https://a/x", "http://a/x") && refused("https://a/x", "ftp://a/x"));
        for (from, to) in
            [("https://a/x", "https://b/x"), ("http://a", "https://a"), ("http://a", "http://b")]
        {
            assert!(!refused(from, to), "{from} {to}");
        }
        assert!(refusal_to_follow(&vec![url("https://a"); 11], &url("https://a")).is_some());
    }

    #[test]
    fn only_what_names_one_file_is_a_validator() {
        let headers = |all: &[(&'static str, &str)]| -> HeaderMap {
            all.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
        };
        let date = "Mon, 01 Jan 2024 00:00:00 GMT";
        assert_eq!(validator(&headers(&[("etag", "\"a\""), ("last-modified", date)])).unwrap(), "\"a\"");
        assert_eq!(validator(&headers(&[("etag", "W/\"a\""), ("last-modified", date)])).unwrap(), date);
        assert_eq!(validator(&headers(&[("etag", "W/\"a\"")])), None);
    }

    #[test]
    fn what_may_be_secret_in_an_address_is_not_shown() {
        assert_eq!(shown("https://h/x?sig=secret"), "https://h/x?…");
        assert_eq!(first_of_range("bytes 17-99/100"), Some(17));
        assert_eq!(first_of_range("bytes */100"), None);
    }
}
