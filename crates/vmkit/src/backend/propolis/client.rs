//! Talking to a Propolis server: HTTP without encryption, one connection a request.
//!
//! Every request names the version of the API, has a deadline, and its answer a bound. The server's
//! own limit is none: its long poll blocks until there is something to tell. What goes wrong is
//! told apart here, since callers act on it: nobody listens, nobody answers, somebody else answers,
//! the server refuses.
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

/// The header that names the version.
const VERSION_HEADER: &str = "api-version";
/// The most bytes of an answer: a piece of the console's history, written as a list of numbers.
const MOST_ANSWER_BYTES: usize = 8 << 20;
/// How much of the console's history is asked for at once, in bytes.
pub(crate) const HISTORY_BYTES: u64 = 256 << 10;

/// What is seen of the VM at a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InstanceView {
    /// Whose VM it is; `None` where the server tells no more than the state.
    pub(super) id: Option<Uuid>,
    pub(super) state: InstanceState,
}

/// A server, spoken to in one version of its API.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PropolisClient {
    pub(crate) address: SocketAddr,
    pub(crate) version: &'static str,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum ClientError {
    /// Nobody listens there: the host itself says so.
    Refused(io::Error),
    /// There is no way there, or nothing comes back: whether somebody listens there is not known.
    Unreached(io::Error),
    /// The connection broke off.
    Lost(String),
    /// The deadline has passed; the server may have done what it was asked.
    TimedOut(Duration),
    /// The server says for so long that it still makes the VM, and denies to have one that could be
    /// ended.
    StillMaking(Duration),
    /// Whoever answers is no Propolis server.
    Foreign(String),
    /// The server says no.
    Denied { status: StatusCode, refusal: ErrorBody },
}

pub(crate) type ClientResult<T> = Result<T, ClientError>;

impl ClientError {
    /// Returns whether the server has no VM, or none that is alive.
    pub(crate) fn is_no_instance(&self) -> bool {
        matches!(self, ClientError::Denied { status, .. } if matches!(status.as_u16(), 424 | 410))
    }

    /// Returns whether the server has a VM already.
    pub(super) fn is_taken(&self) -> bool {
        matches!(self, ClientError::Denied { status, .. } if *status == StatusCode::CONFLICT)
    }

    /// Returns whether the network failed, which says nothing of the server: it may be asked again.
    pub(super) fn is_of_the_network(&self) -> bool {
        matches!(self, ClientError::Unreached(_) | ClientError::Lost(_))
    }

    /// Returns the request's id, by which the server's log tells more of a failure that it hides.
    pub(super) fn hidden(&self) -> Option<&str> {
        match self {
            ClientError::Denied { status, refusal } if status.is_server_error() => Some(&refusal.request_id),
            _ => None,
        }
    }

    /// Creates the library's error of it; `why` is what the server's log tells of a failure that it
    /// hides.
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
                format!("nobody listens at {address}: is the address right, and does it run?"),
            )
            .with_source(source),
            ClientError::Unreached(source) => Error::protocol(
                Peer::Propolis,
                format!("{address} can't be reached, so nobody knows what is there"),
            )
            .with_source(source),
            ClientError::Lost(how) => Error::protocol(
                Peer::Propolis,
                format!("the connection to {address} broke off while it was to {doing}: {how}"),
            ),
            ClientError::TimedOut(after) => {
                let awaited = format!("the Propolis server at {address} to {doing}");
                Error::timed_out(awaited, after)
            }
            ClientError::StillMaking(after) => {
                let awaited = format!(
                    "the Propolis server at {address} to {doing}, which it says is still being made (`Creating`): a \
                     server that panicked in making a VM says so until it is ended, and then the VM is gone"
                );
                Error::timed_out(awaited, after)
            }
            ClientError::Foreign(what) => Error::protocol(
                Peer::Propolis,
                format!("what answers at {address} is no Propolis server: {what}"),
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
    // Some refusals have their reason in the place of the code, and the bare status as their
    // message.
    let reason = match (why, error_code) {
        (Some(why), _) => why,
        (None, Some(code)) if code.contains(' ') => code,
        (None, _) if status.is_server_error() && !request_id.is_empty() => {
            format!("{message}; only that server's own log tells why, by the request id {request_id}")
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
            ClientError::Refused(error) => write!(f, "nobody listens: {error}"),
            ClientError::Unreached(error) => write!(f, "it can't be reached: {error}"),
            ClientError::Lost(how) => write!(f, "the connection broke off: {how}"),
            ClientError::TimedOut(after) => write!(f, "no answer within {:.1} s", after.as_secs_f64()),
            ClientError::StillMaking(after) => {
                write!(f, "it still makes the VM after {:.1} s", after.as_secs_f64())
            }
            ClientError::Foreign(what) => write!(f, "no Propolis server answers: {what}"),
            ClientError::Denied { status, refusal } => write!(f, "{status}: {}", refusal.message),
        }
    }
}

impl PropolisClient {
    /// Returns where the console is.
    pub(crate) fn console_url(&self) -> String {
        format!("ws://{}/instance/serial", self.address)
    }

    /// Has the server make a VM; comes back once all its devices are there.
    pub(super) async fn ensure(
        &self,
        request: &InstanceEnsureRequest,
        deadline: Instant,
    ) -> ClientResult<()> {
        let body = serde_json::to_vec(request).expect("a request is plain data of UTF-8 paths");
        self.send(Method::PUT, "/instance", Some(body), deadline).await.map(drop)
    }

    /// Asks what VM there is.
    pub(super) async fn instance(&self, deadline: Instant) -> ClientResult<InstanceReply> {
        let bytes = self.send(Method::GET, "/instance", None, deadline).await?;
        parsed::<InstanceAnswer>(&bytes).map(|answer| answer.instance)
    }

    /// Looks what VM there is. A server tells nothing of one whose devices it is pausing, to reset
    /// or to halt them, but its state: so that is asked for as well where there is no answer for so
    /// long.
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

    /// Asks the VM to become running or stopped; it is done some time after the answer.
    pub(super) async fn request(&self, state: RequestedState, deadline: Instant) -> ClientResult<()> {
        let body = serde_json::to_vec(&state).expect("a word is plain data");
        self.send(Method::PUT, "/instance/state", Some(body), deadline).await.map(drop)
    }

    /// Waits for the state of this generation, or a later one: states in between may be skipped.
    pub(super) async fn monitor(
        &self,
        generation: u64,
        deadline: Instant,
    ) -> ClientResult<StateMonitorReply> {
        let question = encoded(&MonitorQuestion { r#gen: generation });
        let bytes = self.send(Method::GET, "/instance/state-monitor", Some(question), deadline).await?;
        parsed(&bytes)
    }

    /// Asks for what the console has said from this offset on.
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
        // The connection is driven by whoever waits for the answer, so nothing outlives a dropped
        // future.
        tokio::pin!(connection);
        tokio::pin!(conversation);
        let (status, bytes) = tokio::select! {
            biased;
            answer = &mut conversation => answer?,
            ended = &mut connection => match ended {
                // The last bytes may lie in the conversation's hands still.
                Ok(()) => conversation.await?,
                Err(error) => return Err(broken(&error)),
            },
        };
        if status.is_success() {
            return Ok(bytes);
        }
        match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(refusal) => Err(ClientError::Denied { status, refusal }),
            Err(_) => Err(ClientError::Foreign(format!("it says {status} and {}", shown(&bytes)))),
        }
    }
}

/// Tells a server that is not there from a network that does not lead there.
fn unconnected(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => ClientError::Refused(error),
        _ => ClientError::Unreached(error),
    }
}

/// From where the console's history is read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HistoryStart {
    /// So many bytes after its beginning.
    Start(u64),
    /// So many bytes before its end.
    End(u64),
}

fn broken(error: &hyper::Error) -> ClientError {
    if error.is_parse() {
        return ClientError::Foreign(format!("it does not speak HTTP: {error}"));
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
    serde_json::from_slice(bytes).map_err(|error| {
        ClientError::Foreign(format!("it says {}, which is no answer: {error}", shown(bytes)))
    })
}

/// Returns the beginning of what somebody said, fit for a message.
fn shown(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).chars().take(80).collect();
    if bytes.is_empty() { "nothing".to_owned() } else { format!("{text:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    /// Returns whoever connects first with these bytes, and the request that came.
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
        failure.into_error(&client, "tell its state", None).to_string()
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
    async fn whoever_is_no_propolis_server_is_called_so() {
        let html = error_of(b"HTTP/1.1 200 OK\r\ncontent-length: 13\r\n\r\n<html></html>").await;
        assert!(html.contains("no Propolis server") && html.contains("<html>"), "{html}");
        let ssh = error_of(b"SSH-2.0-OpenSSH_9.2p1\r\n").await;
        assert!(ssh.contains("does not speak HTTP"), "{ssh}");
        let hung_up = error_of(b"").await;
        assert!(hung_up.contains("broke off"), "{hung_up}");
        let proxy = error_of(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 3\r\n\r\nno!").await;
        assert!(proxy.contains("502") && proxy.contains("\"no!\""), "{proxy}");
    }

    #[tokio::test]
    async fn both_shapes_of_a_refusal_tell_their_reason() {
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
    async fn an_address_where_nobody_listens_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = PropolisClient { address: listener.local_addr().unwrap(), version: "1.0.0" };
        drop(listener);
        let failure = client.instance(soon()).await.unwrap_err();
        assert!(matches!(failure, ClientError::Refused(_)), "{failure:?}");
        let error = failure.into_error(&client, "tell its state", None).to_string();
        assert!(error.contains("nobody listens at 127.0.0.1:"), "{error}");
    }

    #[tokio::test]
    async fn a_host_that_no_way_leads_to_is_not_taken_for_one_where_nobody_listens() {
        // No connection to everybody at once can be made: the kernel says that there is no way.
        let client = PropolisClient { address: "255.255.255.255:12400".parse().unwrap(), version: "1.0.0" };
        let failure = client.instance(soon()).await.unwrap_err();
        assert!(matches!(failure, ClientError::Unreached(_)), "{failure:?}");
        let error = failure.into_error(&client, "tell its state", None).to_string();
        assert!(error.contains("can't be reached"), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_never_answers_is_waited_for_until_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = PropolisClient { address: listener.local_addr().unwrap(), version: "1.0.0" };
        let failure = client.instance(Instant::now() + Duration::from_millis(50)).await.unwrap_err();
        assert!(matches!(failure, ClientError::TimedOut(_)), "{failure:?}");
    }
}
