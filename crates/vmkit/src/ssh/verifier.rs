//! The server's proof of its identity, and the reason for the end of a connection.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use russh::client::{self, DisconnectReason};
use russh::keys::PublicKeyOrCertificate;
use tokio::net::TcpStream;

use super::keys::fingerprint;
use super::line;
use super::{HostKey, SshTarget};
use crate::error::Error;

/// After how long without data the server is sent a keep-alive request.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(15);
/// The maximum number of such requests in a row without a reply.
pub(super) const MOST_UNANSWERED: usize = 3;
/// The maximum length of what a server sends instead of its greeting, in bytes.
const MOST_FIRST_WORDS: usize = 120;

/// The cause of the end of a connection.
#[derive(Debug, Clone, Default)]
pub(super) struct DisconnectCause(Arc<Mutex<KnownDisconnect>>);

#[derive(Debug, Default)]
struct KnownDisconnect {
    /// What the server sent instead of its greeting, such as OpenSSH's `Exceeded MaxStartups`.
    first_words: Option<String>,
    /// The fingerprint of a host key that was refused.
    refused_key: Option<String>,
    /// Why the connection has ended.
    ended: Option<String>,
}

impl DisconnectCause {
    fn write(&self, write: impl FnOnce(&mut KnownDisconnect)) {
        write(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn ended(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).ended.clone()
    }

    /// Creates the error for a connection that has ended.
    pub(super) fn lost(&self, target: &str, what: &str) -> Error {
        let why = self.ended().unwrap_or_else(|| "the connection is closed".to_owned());
        Error::Ssh { target: target.to_owned(), problem: format!("{what}: {why}"), source: None }
    }

    /// Creates the error for a request that failed.
    pub(super) fn failed(&self, target: &str, what: &str, error: russh::Error) -> Error {
        match error {
            russh::Error::SendError | russh::Error::Disconnect | russh::Error::RecvError => {
                self.lost(target, what)
            }
            error => Error::Ssh {
                target: target.to_owned(),
                problem: what.to_owned(),
                source: Some(Box::new(error)),
            },
        }
    }

    /// Records what the server has sent instead of a greeting. A greeting may still follow: RFC
    /// 4253, 4.2, permits other lines before it.
    pub(super) async fn note_first_words(&self, stream: &TcpStream) {
        let mut words = [0; MOST_FIRST_WORDS];
        let said = stream.peek(&mut words).await.unwrap_or(0);
        let said = String::from_utf8_lossy(&words[..said]);
        let line: String =
            said.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).collect();
        if !line.is_empty() && !line.starts_with("SSH-") {
            self.write(|known| known.first_words = Some(line));
        }
    }

    fn closed(&self, to: &str, stage: &str) -> Error {
        let words = self.0.lock().unwrap_or_else(PoisonError::into_inner).first_words.take();
        let said = words.map_or(String::new(), |words| format!(", after sending {words:?}"));
        let problem = format!("the server closed the connection during {stage}{said}");
        Error::Ssh { target: to.to_owned(), problem, source: None }
    }

    /// Creates the error for a connection that was not established.
    pub(super) fn explain(&self, target: &SshTarget, to: &str, stage: &str, error: russh::Error) -> Error {
        let refused = self.0.lock().unwrap_or_else(PoisonError::into_inner).refused_key.take();
        if let Some(found) = refused {
            let expected = target.host_key.fingerprint().unwrap_or_default();
            return Error::HostKey { target: to.to_owned(), expected, found };
        }
        match error {
            russh::Error::HUP | russh::Error::Disconnect => self.closed(to, stage),
            russh::Error::IO(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::UnexpectedEof
                ) =>
            {
                self.closed(to, stage)
            }
            error => self.failed(to, &format!("the connection failed during {stage}"), error),
        }
    }
}

/// Checks the server's host key, and remembers how the connection ended.
pub(super) struct ServerVerifier {
    pub(super) host_key: HostKey,
    pub(super) fate: DisconnectCause,
}

impl client::Handler for ServerVerifier {
    type Error = russh::Error;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, russh::Error> {
        let key = match shown {
            PublicKeyOrCertificate::PublicKey { key, .. } => key.clone(),
            // No certificate was offered, so none is accepted.
            PublicKeyOrCertificate::Certificate(certificate) => {
                russh::keys::PublicKey::from(certificate.public_key().clone())
            }
        };
        let accepted = self.host_key.accepts(&key);
        if !accepted {
            self.fate.write(|known| known.refused_key = Some(fingerprint(&key)));
        }
        Ok(accepted)
    }

    async fn disconnected(&mut self, reason: DisconnectReason<russh::Error>) -> Result<(), russh::Error> {
        let why = match reason {
            DisconnectReason::ReceivedDisconnect(info) => format!("the server sent {:?}", info.message),
            DisconnectReason::Error(russh::Error::KeepaliveTimeout) => {
                format!(
                    "the guest did not reply for {} s",
                    KEEPALIVE.as_secs() * (MOST_UNANSWERED as u64 + 1)
                )
            }
            DisconnectReason::Error(russh::Error::IO(error)) if line::is_cut(&error) => error.to_string(),
            DisconnectReason::Error(russh::Error::HUP | russh::Error::Disconnect) => {
                "the server closed the connection".to_owned()
            }
            DisconnectReason::Error(error) => error.to_string(),
        };
        self.fate.write(|known| known.ended = Some(why));
        Ok(())
    }
}
