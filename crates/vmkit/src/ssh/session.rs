//! A connection to a guest's SSH server, on which programs run and files are copied.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use russh::client::{self, AuthResult, Handle, Msg};
use russh::keys::Algorithm;
use russh::{Channel, Disconnect, Preferred, kex};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::auth;
use super::line::{GuardedStream, Lifeline};
use super::verifier::{DisconnectCause, KEEPALIVE, MOST_UNANSWERED, ServerVerifier};
use super::{HostKey, SshTarget};
use crate::deadline::later;
use crate::error::{Error, Result};

/// A session of a user in a guest, logged in.
///
/// A guest that no longer replies is given up after a minute. A session of
/// [`VmManager::ssh_session`](crate::VmManager::ssh_session) notices at once that the VM has ended,
/// or that its guest was reset, if the VM is a process of this host.
///
/// # Cancel safety
/// Every call may be dropped; the server may or may not carry out what it was sent by then.
pub struct Session {
    handle: Arc<Handle<ServerVerifier>>,
    target: String,
    user: String,
    fate: DisconnectCause,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({})", self.target)
    }
}

impl Session {
    /// Connects, verifies the host key, and logs in.
    ///
    /// # Errors
    /// `TimedOut` with what was awaited; `Guest` if nothing listens, the server has another host
    /// key (with both fingerprints), does not accept the key, or closes the connection.
    pub async fn connect(target: &SshTarget, timeout: Duration) -> Result<Self> {
        let deadline = later(timeout);
        Self::over(Self::reach(target, deadline).await?, target, None, deadline).await
    }

    /// Connects, and waits until the server has started to send.
    pub(crate) async fn reach(target: &SshTarget, deadline: Instant) -> Result<TcpStream> {
        let broken = |problem: &str, source: Option<io::Error>| Error::Ssh {
            target: target.to_string(),
            problem: problem.to_owned(),
            source: source.map(Into::into),
        };
        let reached = async {
            let connected = TcpStream::connect(target.address).await;
            let stream = connected.map_err(|error| broken("cannot connect", Some(error)))?;
            // The host accepts connections even if the guest does not listen yet: only data shows
            // that it does.
            match stream.peek(&mut [0]).await {
                Ok(bytes) if bytes > 0 => Ok(stream),
                Ok(_) => Err(broken("the server closed the connection without a greeting", None)),
                Err(error) => Err(broken("the server closed the connection without a greeting", Some(error))),
            }
        };
        let began = Instant::now();
        timeout_at(deadline, reached).await.unwrap_or_else(|_| {
            let awaited = format!("the server's greeting of SSH to {target}");
            Err(Error::timed_out(awaited, began.elapsed()))
        })
    }

    /// Verifies the host key, and logs in; the session ends with the lifeline, if it has one.
    pub(crate) async fn over(
        stream: TcpStream,
        target: &SshTarget,
        lifeline: Option<Lifeline>,
        deadline: Instant,
    ) -> Result<Self> {
        let to = target.to_string();
        let fate = DisconnectCause::default();
        let guard = ServerVerifier { host_key: target.host_key.clone(), fate: fate.clone() };
        let began = Instant::now();
        // A lock rather than a cell, so that the future is `Send`.
        let stage = Mutex::new("the key exchange");
        let stage = |next: Option<&'static str>| {
            let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
            *stage = next.unwrap_or(*stage);
            *stage
        };
        let opened = timeout_at(deadline, async {
            // Typed keys have to be sent at once.
            stream.set_nodelay(true).map_err(russh::Error::IO)?;
            fate.note_first_words(&stream).await;
            let line = GuardedStream::new(stream, lifeline);
            let mut handle = client::connect_stream(Arc::new(config(&target.host_key)), line, guard).await?;
            stage(Some("the login"));
            let answer = auth::log_in(&mut handle, target).await?;
            Ok::<_, auth::LoginFailure>((handle, answer))
        });
        let (handle, answer) = match opened.await {
            Ok(Ok(opened)) => opened,
            Ok(Err(auth::LoginFailure::Session(error))) => {
                return Err(fate.explain(target, &to, stage(None), error));
            }
            Ok(Err(auth::LoginFailure::Agent { problem, source })) => {
                let error = Error::invalid("identity", target.identity.origin(), problem);
                return Err(match source {
                    Some(source) => error.with_source(source),
                    None => error,
                });
            }
            Err(_) => {
                let awaited = format!("{} of SSH to {to}", stage(None));
                return Err(Error::timed_out(awaited, began.elapsed()));
            }
        };
        let session = Self { handle: Arc::new(handle), target: to, user: target.user.clone(), fate };
        match answer {
            AuthResult::Success => Ok(session),
            // The result if the reply never came.
            AuthResult::Failure { remaining_methods, .. } if remaining_methods.is_empty() => {
                Err(session.fate.lost(&session.target, "the server ended the login"))
            }
            AuthResult::Failure { remaining_methods, .. } => {
                let offered: Vec<_> = remaining_methods.iter().map(Into::<&'static str>::into).collect();
                let offered = offered.join(", ");
                Err(Error::LoginRefused {
                    target: session.target,
                    user: target.user.clone(),
                    description: format!(
                        "the server does not accept {} for the user `{}` (it accepts: {offered})",
                        target.identity.described(),
                        target.user
                    ),
                })
            }
        }
    }

    /// Returns the user who is logged in.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Ends the session in order. Dropping it ends it as well, and the server only sees a closed
    /// connection.
    pub async fn close(self) {
        // A server that is gone needs no message.
        let _ = self.handle.disconnect(Disconnect::ByApplication, "", "").await;
    }

    /// Connects to a port from within the guest, and returns the connection.
    ///
    /// # Errors
    /// `Guest` if the guest can't connect, or its server refuses forwards; `TimedOut`.
    pub async fn dial(
        &self,
        host: &str,
        port: u16,
        timeout: Duration,
    ) -> Result<impl AsyncRead + AsyncWrite + Send + Unpin + use<>> {
        let dialled = async {
            let opened = self.handle.channel_open_direct_tcpip(host, port.into(), "127.0.0.1", 0).await;
            let what = || format!("the guest can't connect to {host}:{port}");
            Ok(opened.map_err(|error| self.failed(&what(), error))?.into_stream())
        };
        self.within(later(timeout), "the guest's own connection", dialled).await
    }

    /// Returns whether the connection is closed.
    pub(super) fn has_ended(&self) -> bool {
        self.handle.is_closed()
    }

    /// Returns the connection, which ends with the session.
    pub(super) fn connection(&self) -> Weak<Handle<ServerVerifier>> {
        Arc::downgrade(&self.handle)
    }

    /// Opens a channel for one program.
    pub(super) async fn channel(&self) -> Result<Channel<Msg>> {
        let opened = self.handle.channel_open_session().await;
        opened.map_err(|error| self.failed("the server refuses a channel", error))
    }

    /// Returns why the session has ended, if that is known.
    pub(super) fn fate(&self) -> DisconnectCause {
        self.fate.clone()
    }

    pub(super) fn target(&self) -> &str {
        &self.target
    }

    pub(super) fn problem(&self, problem: impl Into<String>) -> Error {
        Error::Ssh { target: self.target.clone(), problem: problem.into(), source: None }
    }

    pub(super) fn failed(&self, what: &str, error: russh::Error) -> Error {
        self.fate.failed(&self.target, what, error)
    }

    /// Waits for a result of this session until the deadline.
    pub(super) async fn within<T>(
        &self,
        deadline: Instant,
        awaited: &str,
        future: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let began = Instant::now();
        timeout_at(deadline, future).await.unwrap_or_else(|_| {
            let awaited = format!("{awaited} of SSH to {}", self.target);
            Err(Error::timed_out(awaited, began.elapsed()))
        })
    }
}

/// Returns whether a failed login may succeed a moment later, with nothing changed: the server was
/// too slow, had too many other clients, or ended the connection. What both ends can't agree on, or
/// a wrong key, stays so.
pub(crate) fn may_pass(error: &Error) -> bool {
    let source = match error {
        Error::TimedOut { .. } => return true,
        Error::Ssh { source, .. } => source.as_deref(),
        _ => return false,
    };
    match source.and_then(|source| source.downcast_ref()) {
        Some(russh::Error::IO(_) | russh::Error::HUP | russh::Error::Disconnect) => true,
        Some(_) => false,
        None => true,
    }
}

fn config(host_key: &HostKey) -> client::Config {
    let mut preferred = Preferred::default();
    // The cheapest first: the guest may be emulated, and an attacker who could break it later is on
    // this host already.
    let mut exchanges = vec![kex::CURVE25519];
    exchanges.extend(preferred.kex.iter().filter(|&&other| other != kex::CURVE25519));
    preferred.kex = Cow::Owned(exchanges);
    // A signature with SHA-1 proves nothing any more.
    preferred.key.to_mut().retain(|kind| *kind != Algorithm::Rsa { hash: None });
    if let Some(known) = host_key.algorithm() {
        // Others are offered as well: otherwise a server without such a key could not be
        // distinguished from one with a wrong key.
        let is_known = |kind: &Algorithm| match (kind, &known) {
            (Algorithm::Rsa { .. }, Algorithm::Rsa { .. }) => true,
            (kind, known) => kind == known,
        };
        let (first, others): (Vec<_>, Vec<_>) = preferred.key.iter().cloned().partition(is_known);
        preferred.key = Cow::Owned([first, others].concat());
    }
    client::Config {
        preferred,
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: MOST_UNANSWERED,
        nodelay: true,
        ..client::Config::default()
    }
}
