//! Keeping what a console said: its server forgets it with the VM.
//!
//! ```text
//!  history by HTTP (first and last MiB) ──▶ console.log ◀── what comes after that, by WebSocket, until the VM is gone
//! ```
//!
//! How far the log has come is in a file beside it, so that a stop that was cut off and begun again writes nothing twice but
//! what it wrote in its last moment.

use std::fs;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::client::{Client, Failure, From};
use super::files;
use super::layout::Layout;
use crate::boundedlog::BoundedLog;
use crate::spec::Mib;

/// How much the server keeps of the end of what was said, in bytes.
const KEPT_BYTES: u64 = 1 << 20;
/// How long the history may take: it lies in the server's memory.
const HISTORY_LIMIT: Duration = Duration::from_secs(2);

/// A connection to a console.
pub(super) type Console = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Writes the console's output to its log.
pub(super) struct Keeping<'a> {
    client: Client,
    layout: &'a Layout,
    log: BoundedLog,
    /// How many bytes of this run are in the log.
    at: u64,
    /// How many bytes come that are in the log already.
    again: u64,
}

impl<'a> Keeping<'a> {
    /// Begins where the log ends; `None`, with a warning, where there can be no log.
    pub(super) fn begin(client: Client, layout: &'a Layout, bound: Mib) -> Option<Self> {
        let log = match BoundedLog::open(&layout.console_log(), bound.bytes()) {
            Ok(log) => log,
            Err(error) => {
                tracing::warn!(%error, "the console's last words can't be kept");
                return None;
            }
        };
        let at = fs::read_to_string(layout.console_mark()).ok().and_then(|text| text.trim().parse().ok());
        Some(Self { client, layout, log, at: at.unwrap_or(0), again: 0 })
    }

    /// Writes down what was said so far.
    pub(super) async fn history(&mut self) {
        let deadline = Instant::now() + HISTORY_LIMIT;
        let mut from = From::Start(self.at);
        loop {
            match self.client.history(from, deadline).await {
                Ok(history) if history.data.is_empty() => break,
                Ok(history) => {
                    self.log.append(&history.data);
                    self.at = history.last_byte_offset;
                    from = From::Start(self.at);
                }
                // The middle of a long history is lost.
                Err(Failure::Denied { status, .. })
                    if status.as_u16() == 400 && matches!(from, From::Start(_)) =>
                {
                    from = From::End(KEPT_BYTES);
                }
                Err(failure) if failure.is_no_instance() => break,
                Err(failure) => {
                    tracing::warn!(%failure, "what the console said can't be kept");
                    break;
                }
            }
        }
        self.remember();
    }

    /// Connects to the console, so that nothing is missed of what the guest says once it is told to go.
    pub(super) async fn attach(&mut self) -> Option<Console> {
        match timeout_at(Instant::now() + HISTORY_LIMIT, self.connected()).await {
            Ok(Ok(console)) => Some(console),
            Ok(Err(error)) => {
                tracing::debug!(%error, "the console can't be followed");
                None
            }
            Err(_) => None,
        }
    }

    async fn connected(&mut self) -> Result<Console, tungstenite::Error> {
        // The last byte is asked for once more: that it comes tells that the server has this end on its list.
        self.again = u64::from(self.at > 0);
        let url = format!("{}?from_start={}", self.client.console_url(), self.at - self.again);
        let mut request = url.into_client_request()?;
        request.headers_mut().insert("api-version", HeaderValue::from_static(self.client.version));
        let (mut console, _) = tokio_tungstenite::connect_async(request).await?;
        while self.again > 0 {
            match console.next().await.ok_or(tungstenite::Error::ConnectionClosed)?? {
                Message::Binary(bytes) => self.take(&bytes),
                Message::Close(_) => return Err(tungstenite::Error::ConnectionClosed),
                _ => {}
            }
        }
        Ok(console)
    }

    fn take(&mut self, bytes: &[u8]) {
        let known = usize::try_from(self.again).unwrap_or(usize::MAX).min(bytes.len());
        self.again -= known as u64;
        self.log.append(&bytes[known..]);
        self.at += (bytes.len() - known) as u64;
    }

    /// Writes down what is said from now on, until the VM is gone or the deadline has passed.
    pub(super) async fn follow(&mut self, console: Console, deadline: Instant) {
        let followed = timeout_at(deadline, self.frames(console)).await;
        if let Ok(Err(error)) = followed {
            tracing::debug!(%error, "the console broke off");
        }
        self.remember();
    }

    async fn frames(&mut self, mut console: Console) -> Result<(), tungstenite::Error> {
        while let Some(message) = console.next().await {
            match message? {
                Message::Binary(bytes) => self.take(&bytes),
                Message::Close(_) => break,
                _ => {}
            }
        }
        Ok(())
    }

    fn remember(&self) {
        if let Err(error) = files::write(&self.layout.console_mark(), &self.at) {
            tracing::debug!(%error, "how far the console's log has come can't be kept");
        }
    }
}
