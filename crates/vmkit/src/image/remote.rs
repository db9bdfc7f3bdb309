//! The HTTP client: small files as a whole, and requests to registries; `download.rs` fetches
//! images with it.
//!
//! Edge: the network. It knows HTTP, and nothing of images or how they are verified.
//!
//! Every wait has a deadline: for a connection, and for the next byte. After a broken connection, a
//! silence or an overloaded server, the request is repeated after a pause.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Client, Proxy, RequestBuilder, Response, StatusCode, Url, redirect};
use tokio::time::{sleep, timeout};

use super::proxy::Proxies;
use super::resolver::{self, SystemResolver};
use crate::error::{Error, Result};

/// The largest number of redirects.
const MOST_REDIRECTS: usize = 10;

/// The HTTP client and its limits.
#[derive(Debug, Clone, Default)]
pub(super) struct HttpFetcher {
    pub(super) patience: RemoteTimeouts,
    proxies: Proxies,
    client: Arc<OnceLock<Client>>,
}

/// How long a server is waited for, and how often a request is repeated.
#[derive(Debug, Clone, Copy)]
pub(super) struct RemoteTimeouts {
    pub(super) connect: Duration,
    /// The longest silence between two bytes.
    pub(super) idle: Duration,
    /// How often a request is repeated without a byte in between.
    pub(super) tries: u32,
    /// The pause before the first repetition; it doubles with each one.
    pub(super) pause: Duration,
}

impl Default for RemoteTimeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            idle: Duration::from_secs(60),
            tries: 5,
            pause: Duration::from_secs(1),
        }
    }
}

/// Why an attempt failed.
pub(super) enum AttemptFailure {
    /// May succeed if repeated.
    Again(Error),
    /// The server can't be reached: worth repeating only if it was reachable a moment ago.
    Unreachable(Error),
    /// The server does not have this range of the file: start from the beginning.
    Anew(Error),
    /// Final.
    Final(Error),
}

/// A reply that a registry's client has to inspect.
#[derive(Debug)]
pub(super) struct HttpReply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// The authentication challenge, if the reply has one.
    pub(super) challenge: Option<String>,
    pub(super) body: Vec<u8>,
}

impl HttpReply {
    /// Returns the body of a success.
    ///
    /// # Errors
    /// `Remote` and `NotFound` for any other status.
    pub(super) fn body(self, url: &str) -> Result<Vec<u8>> {
        if self.status.is_success() { Ok(self.body) } else { Err(refusal(url, self.status)) }
    }
}

impl HttpFetcher {
    /// Returns the same, asking through proxies.
    pub(super) fn through(self, proxies: Proxies) -> Self {
        Self { proxies, client: Arc::default(), ..self }
    }

    /// Fetches a small file.
    ///
    /// # Errors
    /// `Remote` if the server can't be reached, refuses, or sends more than `most_bytes`;
    /// `NotFound`.
    pub(super) async fn small_file(&self, url: &str, most_bytes: usize) -> Result<Vec<u8>> {
        let answer = self.ask(url, None, None, most_bytes).await?;
        let is_page = is_web_page(&answer.headers);
        let body = answer.body(url)?;
        if is_page {
            return Err(fetch_error(url, "the server replied with a web page"));
        }
        Ok(body)
    }

    /// Sends a request and returns the reply, whatever its status.
    ///
    /// # Errors
    /// `Remote` if the server can't be reached or sends more than `most_bytes`.
    pub(super) async fn ask(
        &self,
        url: &str,
        accept: Option<&str>,
        authorization: Option<&str>,
        most_bytes: usize,
    ) -> Result<HttpReply> {
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

    /// Sends a form and returns the reply, whatever its status. Follows no redirect: the form's
    /// content is meant for this server.
    ///
    /// # Errors
    /// As for [`ask`](Self::ask).
    pub(super) async fn post(&self, url: &str, form: String, most_bytes: usize) -> Result<HttpReply> {
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
    ) -> Result<HttpReply> {
        let mut tries = RetryBudget::new(self.patience);
        loop {
            match self.ask_once(url, request(), most_bytes).await {
                Ok(answer) => return Ok(answer),
                Err(AttemptFailure::Final(error) | AttemptFailure::Unreachable(error)) => return Err(error),
                Err(AttemptFailure::Again(error) | AttemptFailure::Anew(error)) => tries.pause(error).await?,
            }
        }
    }

    async fn ask_once(
        &self,
        url: &str,
        request: RequestBuilder,
        most_bytes: usize,
    ) -> Result<HttpReply, AttemptFailure> {
        let mut response = self.send(url, request).await?;
        if is_passing(response.status()) {
            return Err(AttemptFailure::Again(refusal(url, response.status())));
        }
        let (status, headers, challenge) =
            (response.status(), response.headers().clone(), challenge(url, &response));
        let mut body = Vec::new();
        while let Some(bytes) = self.next(url, &mut response).await? {
            body.extend_from_slice(&bytes);
            if body.len() > most_bytes {
                let problem = format!("the server sent more than {most_bytes} bytes for a small file");
                return Err(AttemptFailure::Final(fetch_error(url, &problem)));
            }
        }
        Ok(HttpReply { status, headers, challenge, body })
    }

    pub(super) async fn send(&self, url: &str, request: RequestBuilder) -> Result<Response, AttemptFailure> {
        match timeout(self.patience.connect + self.patience.idle, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            // The request or the redirect is wrong, and will stay wrong.
            Ok(Err(error)) if error.is_redirect() || error.is_builder() => {
                Err(AttemptFailure::Final(self.fetch_error_of(url, error)))
            }
            Ok(Err(error)) if error.is_connect() => {
                Err(AttemptFailure::Unreachable(self.fetch_error_of(url, error)))
            }
            Ok(Err(error)) => Err(AttemptFailure::Again(self.fetch_error_of(url, error))),
            Err(_) => Err(AttemptFailure::Again(self.silence(url))),
        }
    }

    pub(super) async fn next(
        &self,
        url: &str,
        response: &mut Response,
    ) -> Result<Option<bytes::Bytes>, AttemptFailure> {
        match timeout(self.patience.idle, response.chunk()).await {
            Ok(Ok(bytes)) => Ok(bytes),
            Ok(Err(error)) => Err(AttemptFailure::Again(self.fetch_error_of(url, error))),
            Err(_) => Err(AttemptFailure::Again(self.silence(url))),
        }
    }

    fn silence(&self, url: &str) -> Error {
        let through = Url::parse(url).map_or_else(|_| String::new(), |url| self.through_what(&url));
        let awaited = format!("{} to send the next byte{through}", shown(url));
        Error::timed_out(awaited, self.patience.idle)
    }

    /// Returns the proxy that an address is fetched through, as messages name it.
    fn through_what(&self, url: &Url) -> String {
        self.proxies.of(url).map_or_else(String::new, |proxy| format!(" through the proxy {proxy}"))
    }

    fn fetch_error_of(&self, url: &str, error: reqwest::Error) -> Error {
        if let Some(refused) = resolver::refusal(&error) {
            return refused;
        }
        // After a redirect it is another address than the one that was asked for.
        let through = error.url().map_or_else(String::new, |url| self.through_what(url));
        let problem = match () {
            () if error.is_connect() => format!("the server can't be reached{through}"),
            () if error.is_redirect() => "it redirects to a URL that is not followed".to_owned(),
            () if error.is_builder() => "this is not a URL".to_owned(),
            () => format!("the connection{through} broke"),
        };
        Error::Fetch {
            url: shown(url),
            problem,
            status: None,
            // The error has the address already.
            source: Some(Box::new(error.without_url())),
        }
    }

    pub(super) fn client(&self) -> Result<&Client> {
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

        // Passed explicitly: a library must not install a provider for the whole process.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(BuilderVerifierExt::with_platform_verifier)
            .map_err(|error| {
                Error::host("TLS", "the system's certificates can't be used").with_source(error)
            })?
            .with_no_client_auth();
        let mut builder = Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(follow)
            .connect_timeout(self.patience.connect)
            .dns_resolver(SystemResolver)
            .no_proxy()
            .user_agent(concat!("vmkit/", env!("CARGO_PKG_VERSION")));
        if !self.proxies.is_empty() {
            let proxies = self.proxies.clone();
            builder = builder.proxy(Proxy::custom(move |url| proxies.of(url).map(|proxy| proxy.url.clone())));
        }
        builder.build().map_err(|error| Error::host("TLS", "no client can be made").with_source(error))
    }
}

/// Counts attempts, and waits longer between them each time.
pub(super) struct RetryBudget {
    patience: RemoteTimeouts,
    failed: u32,
}

impl RetryBudget {
    pub(super) fn new(patience: RemoteTimeouts) -> Self {
        Self { patience, failed: 0 }
    }

    /// Waits before the next attempt; returns the error if there were enough.
    pub(super) async fn pause(&mut self, error: Error) -> Result<()> {
        if self.failed >= self.patience.tries {
            return Err(error);
        }
        tracing::debug!(%error, "trying again");
        sleep(self.patience.pause * 2_u32.pow(self.failed.min(5))).await;
        self.failed += 1;
        Ok(())
    }
}

pub(super) fn with(request: RequestBuilder, authorization: Option<&str>) -> RequestBuilder {
    // Marked as sensitive, so that it is in no log; the client drops it on a redirect to another
    // host.
    match authorization.map(HeaderValue::from_str) {
        Some(Ok(mut value)) => {
            value.set_sensitive(true);
            request.header(AUTHORIZATION, value)
        }
        _ => request,
    }
}

/// Returns why a redirect to this address is not followed, if it is not.
fn refusal_to_follow(before: &[Url], next: &Url) -> Option<String> {
    if before.len() > MOST_REDIRECTS {
        return Some(format!("it redirects more than {MOST_REDIRECTS} times"));
    }
    let was_safe = before.last().is_some_and(|url| url.scheme() == "https");
    (was_safe && next.scheme() != "https")
        .then(|| "it redirects from https:// to a URL without TLS".to_owned())
}

/// Returns the server's authentication challenge, if it refused for lack of one; none after a
/// redirect, whose target is sent no credentials.
pub(super) fn challenge(url: &str, response: &Response) -> Option<String> {
    let is_asked = Url::parse(url).is_ok_and(|asked| asked.origin() == response.url().origin());
    if !is_asked || response.status() != StatusCode::UNAUTHORIZED {
        return None;
    }
    // Several headers of one name are one with commas between. Source: RFC 9110, "Field Lines and
    // Combined Field Value".
    let headers = response.headers().get_all(WWW_AUTHENTICATE).iter();
    let headers: Vec<&str> = headers.filter_map(|header| header.to_str().ok()).collect();
    (!headers.is_empty()).then(|| headers.join(", "))
}

/// Returns whether a partial download is worth keeping after a refusal with this status: after a
/// login, or later, the rest may be had.
///
/// An HTML page with status 200 is what a network sends that wants a login first.
pub(super) fn may_go_on_later(status: u16) -> bool {
    matches!(status, 200 | 401 | 403 | 407) || StatusCode::from_u16(status).is_ok_and(is_passing)
}

/// Returns whether a refusal with this status may pass.
pub(super) fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
}

pub(super) fn is_web_page(headers: &HeaderMap) -> bool {
    headers
        .get(CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().to_ascii_lowercase().starts_with(b"text/html"))
}

pub(super) fn fetch_error(url: &str, problem: &str) -> Error {
    Error::Fetch { url: shown(url), problem: problem.to_owned(), status: None, source: None }
}

pub(super) fn refusal(url: &str, status: StatusCode) -> Error {
    let problem = match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => "there is no such file on the server".to_owned(),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            format!("the server refuses it without a login ({status})")
        }
        StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
            format!("the proxy requires a login ({status}; expected USER:PASSWORD@ before its host)")
        }
        _ => format!("the server replied {status}"),
    };
    Error::Fetch { url: shown(url), problem, status: Some(status.as_u16()), source: None }
}

/// Returns an address without what may be secret in it: signed addresses have their signature in
/// the query.
pub(super) fn shown(url: &str) -> String {
    match url.split_once('?') {
        Some((address, _)) => format!("{address}?…"),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_redirect_leads_from_a_safe_address_to_an_unsafe_one() {
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
    fn what_may_be_secret_in_an_address_is_not_shown() {
        assert_eq!(shown("https://h/x?sig=secret"), "https://h/x?…");
    }
}
