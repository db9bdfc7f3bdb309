//! The client of a Propolis server: HTTP without encryption, one connection per request.
//!
//! Every request names the version of the API and has a deadline; a reply has a size limit. The
//! server has no timeout of its own: its long poll blocks until the state changes. Failures are
//! distinguished here, since callers act on them: nothing listens, no reply, a reply from something
//! else than Propolis, a refusal.
//!
//! Source: the API description of propolis-server 5.0.0, and dropshot's error bodies.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::instance_spec::{
    ErrorBody, InstanceAnswer, InstanceEnsureRequest, InstanceReply, InstanceState, MonitorQuestion,
    RequestedState, SerialHistory, StateMonitorReply,
};
use crate::error::{Error, ErrorKind, Peer};

/// The header with the version of the API.
const VERSION_HEADER: &str = "api-version";
/// The maximum size of a reply: a piece of the console's history, written as a list of numbers.
const MOST_ANSWER_BYTES: usize = 8 << 20;
/// How much of the console's history one request asks for, in bytes.
pub(crate) const HISTORY_BYTES: u64 = 256 << 10;

/// A server's VM, as the server reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InstanceView {
    /// `None` if the server reports only the state.
    pub(super) id: Option<Uuid>,
    pub(super) state: InstanceState,
}

/// A server's address, with the version of the API to use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PropolisClient {
    pub(crate) address: SocketAddr,
    pub(crate) version: &'static str,
}

/// Why a request has no result.
#[derive(Debug)]
pub(crate) enum ClientError {
    /// Nothing listens there: the host refused the connection.
    Refused(io::Error),
    /// The network is down, or nothing comes back: whether a server listens there is unknown.
    Unreached(io::Error),
    /// The connection was lost.
    Lost(String),
    /// The deadline has passed; the server may have done what it was asked.
    TimedOut(Duration),
    /// The server has reported for this long that the VM is `Creating`, and has no VM that could be
    /// ended.
    StillMaking(Duration),
    /// The peer is not a Propolis server.
    Foreign(String),
    /// The server refused.
    Denied { status: StatusCode, refusal: ErrorBody },
}

pub(crate) type ClientResult<T> = Result<T, ClientError>;

impl ClientError {
    /// Returns whether the server has no VM, or none that is alive.
    pub(crate) fn is_no_instance(&self) -> bool {
        matches!(self, ClientError::Denied { status, .. } if matches!(status.as_u16(), 424 | 410))
    }

    /// Returns whether the server already has a VM.
    pub(super) fn is_taken(&self) -> bool {
        matches!(self, ClientError::Denied { status, .. } if *status == StatusCode::CONFLICT)
    }

    /// Returns whether the network failed, which says nothing about the server: the caller may
    /// retry.
    pub(super) fn is_of_the_network(&self) -> bool {
        matches!(self, ClientError::Unreached(_) | ClientError::Lost(_))
    }

    /// Returns the id of a request whose failure the server explains only in its log.
    pub(super) fn hidden(&self) -> Option<&str> {
        match self {
            ClientError::Denied { status, refusal } if status.is_server_error() => Some(&refusal.request_id),
            _ => None,
        }
    }

    /// Converts to the library's error; `why` is the reason from the server's log, if the reply
    /// hides it.
    pub(crate) fn into_error(
        self,
        client: &PropolisClient,
        doing: &'static str,
        why: Option<String>,
    ) -> Error {
        let address = client.address;
        match self {
            ClientError::Refused(source) => Error::protocol(
                Peer::Propolis,
                format!("nothing listens at {address}: check the address, and that the server runs"),
            )
            .with_source(source),
            ClientError::Unreached(source) => Error::protocol(
                Peer::Propolis,
                format!("{address} can't be reached, so the VM's state is unknown"),
            )
            .with_source(source),
            ClientError::Lost(how) => Error::protocol(
                Peer::Propolis,
                format!("the connection to {address} was lost during a request to {doing}: {how}"),
            ),
            ClientError::TimedOut(after) => {
                let awaited = format!("the Propolis server at {address} to {doing}");
                Error::timed_out(awaited, after)
            }
            ClientError::StillMaking(after) => {
                let awaited = format!(
                    "the Propolis server at {address} to {doing}, which it reports as `Creating`: a server \
                     that panicked while it created a VM reports that until it is ended, and the VM is gone then"
                );
                Error::timed_out(awaited, after)
            }
            ClientError::Foreign(what) => Error::protocol(
                Peer::Propolis,
                format!("the peer at {address} is not a Propolis server: {what}"),
            ),
            ClientError::Denied { status, refusal } => denied(client, doing, status, refusal, why),
        }
    }
}

fn denied(
    client: &PropolisClient,
    doing: &str,
    status: StatusCode,
    refusal: ErrorBody,
    why: Option<String>,
) -> Error {
    let ErrorBody { error_code, message, request_id } = refusal;
    let address = client.address;
    if message.contains("does not support this API version") {
        let problem = format!(
            "the server at {address} is too old: this VM needs version {} of its API ({message})",
            client.version
        );
        return Error::protocol(Peer::Propolis, problem);
    }
    // Some refusals have their reason in `error_code`, and only the status as their message.
    let reason = match (why, error_code) {
        (Some(why), _) => why,
        (None, Some(code)) if code.contains(' ') => code,
        (None, _) if status.is_server_error() && !request_id.is_empty() => {
            format!("{message}; the reason is in that server's log, at the request id {request_id}")
        }
        (None, _) => message,
    };
    let message =
        format!("the Propolis server at {address} refused to {doing}: {reason} ({})", status.as_u16());
    let kind = if status == StatusCode::CONFLICT { ErrorKind::Busy } else { ErrorKind::Hypervisor };
    Error::Backend { message, kind, source: None }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Refused(error) => write!(f, "nothing listens: {error}"),
            ClientError::Unreached(error) => write!(f, "unreachable: {error}"),
            ClientError::Lost(how) => write!(f, "the connection was lost: {how}"),
            ClientError::TimedOut(after) => write!(f, "no reply within {:.1} s", after.as_secs_f64()),
            ClientError::StillMaking(after) => {
                write!(f, "still creating the VM after {:.1} s", after.as_secs_f64())
            }
            ClientError::Foreign(what) => write!(f, "not a Propolis server: {what}"),
            ClientError::Denied { status, refusal } => write!(f, "{status}: {}", refusal.message),
        }
    }
}

impl PropolisClient {
    /// Returns the URL of the console's WebSocket.
    pub(crate) fn console_url(&self) -> String {
        format!("ws://{}/instance/serial", self.address)
    }

    /// Asks the server to create a VM; returns when all its devices exist.
    pub(super) async fn ensure(
        &self,
        request: &InstanceEnsureRequest,
        deadline: Instant,
    ) -> ClientResult<()> {
        let body = serde_json::to_vec(request).expect("a request is plain data of UTF-8 paths");
        self.send(Method::PUT, "/instance", Some(body), deadline).await.map(drop)
    }

    /// Requests the server's VM.
    pub(super) async fn instance(&self, deadline: Instant) -> ClientResult<InstanceReply> {
        let bytes = self.send(Method::GET, "/instance", None, deadline).await?;
        parsed::<InstanceAnswer>(&bytes).map(|answer| answer.instance)
    }

    /// Reports the server's VM. While the server pauses the devices of a VM, to reset or to halt
    /// them, it reports only the state: that is requested as well if there is no reply within
    /// `blocked_after`.
    pub(super) async fn look(
        &self,
        blocked_after: Duration,
        deadline: Instant,
    ) -> ClientResult<InstanceView> {
        let whole = async {
            let there = self.instance(deadline).await?;
            Ok(InstanceView { id: Some(there.properties.id), state: there.state })
        };
        tokio::pin!(whole);
        if let Ok(answer) = timeout_at(deadline.min(Instant::now() + blocked_after), &mut whole).await {
            return answer;
        }
        tokio::select! {
            biased;
            answer = &mut whole => answer,
            state = self.monitor(0, deadline) => match state {
                Ok(seen) => Ok(InstanceView { id: None, state: seen.state }),
                Err(_) => whole.await,
            },
        }
    }

    /// Asks the VM to become running or stopped; the change follows some time after the reply.
    pub(super) async fn request(&self, state: RequestedState, deadline: Instant) -> ClientResult<()> {
        let body = serde_json::to_vec(&state).expect("a word is plain data");
        self.send(Method::PUT, "/instance/state", Some(body), deadline).await.map(drop)
    }

    /// Waits for the state of this generation or a later one: states in between may be skipped.
    pub(super) async fn monitor(
        &self,
        generation: u64,
        deadline: Instant,
    ) -> ClientResult<StateMonitorReply> {
        let question = encoded(&MonitorQuestion { r#gen: generation });
        let bytes = self.send(Method::GET, "/instance/state-monitor", Some(question), deadline).await?;
        parsed(&bytes)
    }

    /// Requests the console's output from this offset on.
    pub(crate) async fn history(&self, from: HistoryStart, deadline: Instant) -> ClientResult<SerialHistory> {
        let path = match from {
            HistoryStart::Start(offset) => {
                format!("/instance/serial/history?from_start={offset}&max_bytes={HISTORY_BYTES}")
            }
            HistoryStart::End(bytes) => {
                format!("/instance/serial/history?most_recent={bytes}&max_bytes={HISTORY_BYTES}")
            }
        };
        let bytes = self.send(Method::GET, &path, None, deadline).await?;
        parsed(&bytes)
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Vec<u8>>,
        deadline: Instant,
    ) -> ClientResult<Bytes> {
        let began = Instant::now();
        let answer = timeout_at(deadline, self.converse(method, path, body)).await;
        answer.unwrap_or_else(|_| Err(ClientError::TimedOut(began.elapsed())))
    }

    async fn converse(&self, method: Method, path: &str, body: Option<Vec<u8>>) -> ClientResult<Bytes> {
        let stream = TcpStream::connect(self.address).await.map_err(unconnected)?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, self.address.to_string())
            .header(VERSION_HEADER, self.version);
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        let request = request.body(body).expect("every part of it was written here");
        let conversation = async {
            let answer = sender.send_request(request).await.map_err(|error| broken(&error))?;
            let status = answer.status();
            let limited = Limited::new(answer.into_body(), MOST_ANSWER_BYTES);
            let bytes =
                limited.collect().await.map_err(|error| ClientError::Lost(error.to_string()))?.to_bytes();
            Ok((status, bytes))
        };
        // This future drives the connection, so nothing outlives it if it is dropped.
        tokio::pin!(connection);
        tokio::pin!(conversation);
        let (status, bytes) = tokio::select! {
            biased;
            answer = &mut conversation => answer?,
            ended = &mut connection => match ended {
                // The connection may close before its last bytes were read.
                Ok(()) => conversation.await?,
                Err(error) => return Err(broken(&error)),
            },
        };
        if status.is_success() {
            return Ok(bytes);
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(refusal) => Err(ClientError::Denied { status, refusal }),
            Err(_) => Err(ClientError::Foreign(format!("the reply is {status} with {}", shown(&bytes)))),
        }
    }
}

/// Distinguishes a refused connection from a network failure.
fn unconnected(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => ClientError::Refused(error),
        _ => ClientError::Unreached(error),
    }
}

/// Where to start reading the console's history.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HistoryStart {
    /// This many bytes after its start.
    Start(u64),
    /// This many bytes before its end.
    End(u64),
}

fn broken(error: &hyper::Error) -> ClientError {
    if error.is_parse() {
        return ClientError::Foreign(format!("not HTTP: {error}"));
    }
    ClientError::Lost(chain(error))
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn encoded(question: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(question).expect("a question is plain data")
}

fn parsed<T: DeserializeOwned>(bytes: &[u8]) -> ClientResult<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| ClientError::Foreign(format!("unexpected reply {}: {error}", shown(bytes))))
}

/// Returns the start of a reply, printable.
fn shown(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).chars().take(80).collect();
    if bytes.is_empty() { "nothing".to_owned() } else { format!("{text:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    /// Returns a server that replies to the first connection with these bytes, and the request it
    /// got.
    fn answering(bytes: &'static [u8]) -> (PropolisClient, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let read = stream.read(&mut request).unwrap();
            stream.write_all(bytes).unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        (PropolisClient { address, version: "1.0.0" }, thread)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    async fn error_of(bytes: &'static [u8]) -> String {
        let (client, thread) = answering(bytes);
        let failure = client.instance(soon()).await.unwrap_err();
        thread.join().unwrap();
        failure.into_error(&client, "report its state", None).to_string()
    }

    #[tokio::test]
    async fn every_request_names_the_version_and_the_monitor_has_a_body() {
        let (client, thread) =
            answering(b"HTTP/1.1 200 OK\r\ncontent-length: 27\r\n\r\n{\"gen\":3,\"state\":\"Running\"}");
        let seen = client.monitor(2, soon()).await.unwrap();
        assert_eq!((seen.r#gen, format!("{:?}", seen.state)), (3, "Running".to_owned()));
        let request = thread.join().unwrap().to_lowercase();
        assert!(request.starts_with("get /instance/state-monitor http/1.1"), "{request}");
        assert!(request.contains("api-version: 1.0.0\r\n") && request.ends_with("{\"gen\":2}"), "{request}");
    }

    #[tokio::test]
    async fn a_peer_that_is_not_a_propolis_server_is_reported_as_such() {
        let html = error_of(b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n<html></html>").await;
        assert!(html.contains("not a Propolis server") && html.contains("<html>"), "{html}");
        let ssh = error_of(b"SSH-2.0-OpenSSH_9.2p1\r\n").await;
        assert!(ssh.contains("not HTTP"), "{ssh}");
        let hung_up = error_of(b"").await;
        assert!(hung_up.contains("was lost"), "{hung_up}");
        let proxy = error_of(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 3\r\n\r\nno!").await;
        assert!(proxy.contains("502") && proxy.contains("\"no!\""), "{proxy}");
    }

    #[tokio::test]
    async fn both_shapes_of_a_refusal_keep_their_reason() {
        let code = error_of(
            b"HTTP/1.1 403 Forbidden\r\ncontent-length: 82\r\n\r\n{\"request_id\":\"1\",\"error_code\":\"instance state change \
              not allowed\",\"message\":\"No\"}",
        )
        .await;
        assert!(code.contains("not allowed (403)"), "{code}");
        let version = error_of(
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 81\r\n\r\n{\"request_id\":\"1\",\"message\":\"server does not support \
              this API version: 1.0.0\"}   ",
        )
        .await;
        assert!(version.contains("too old") && version.contains("1.0.0"), "{version}");
    }

    #[tokio::test]
    async fn a_refused_connection_names_the_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = PropolisClient { address: listener.local_addr().unwrap(), version: "1.0.0" };
        drop(listener);
        let failure = client.instance(soon()).await.unwrap_err();
        assert!(matches!(failure, ClientError::Refused(_)), "{failure:?}");
        let error = failure.into_error(&client, "report its state", None).to_string();
        assert!(error.contains("nothing listens at 127.0.0.1:"), "{error}");
    }

    #[tokio::test]
    async fn an_unreachable_network_is_not_a_refused_connection() {
        // The kernel refuses a TCP connection to the broadcast address: no route.
        let client = PropolisClient { address: "255.255.255.255:12400".parse().unwrap(), version: "1.0.0" };
        let failure = client.instance(soon()).await.unwrap_err();
        assert!(matches!(failure, ClientError::Unreached(_)), "{failure:?}");
        let error = failure.into_error(&client, "report its state", None).to_string();
        assert!(error.contains("can't be reached"), "{error}");
    }

    #[tokio::test]
    async fn a_silent_server_is_waited_for_until_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = PropolisClient { address: listener.local_addr().unwrap(), version: "1.0.0" };
        let failure = client.instance(Instant::now() + Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(failure, ClientError::TimedOut(_)), "{failure:?}");
    }
}
