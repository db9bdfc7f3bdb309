//! The serial console of a VM that a Propolis server runs: [`SerialConsole`].
//!
//! The server keeps the first and the last MiB of what the guest said, each byte with its number
//! since the boot, and has a WebSocket for what comes. That can't be counted by: the last chunk
//! comes again to the first client that attaches, and to all while one of them does not read; what
//! is said in the moment of attaching never comes; the last words may not come. But each byte is in
//! the history before it is sent. So a [`SerialConsole`] takes every byte from the history, by its
//! number, and what comes by WebSocket only tells that there is something to ask for:
//!
//! ```text
//!              ┌──────── lost, or `Migrating`: the same there ────────┐
//!              ▼                                                      │
//! attach ─▶ WebSocket ──rings──▶ history from byte N ─▶ the reader    │
//!              │  ▲                                                   │
//!              │  └─ what is typed                                    │
//!              ├──────────────────────────────────────────────────────┘
//!              └─ closed, "VM stopped": the end
//! ```
//!
//! One request is made at a time, at most a hundred a second after the first few, and the next only
//! once the reader has taken what the last one brought. The WebSocket is read all the while: the
//! server awaits each of its clients, so one that does not read would stall all. The history ends
//! with the VM; of what rang and could no longer be asked for, the last few frames are taken
//! themselves, as far as what was said before shows where they belong.
//!
//! Source: the Propolis API, `/instance/serial` and `/instance/serial/history`; seen with the
//! server's code run on Linux.

use tokio::net::UnixStream;
use tokio::time::Instant;

use super::super::client::PropolisClient;
use super::address::{self, HistoryRange};
use super::event::{ConsoleEnd, ConsoleEvent};
use super::history::{ANSWER_LIMIT, API_VERSION, KEPT_BYTES, no_vm, page};
use super::pump;
use crate::error::Result;

/// A serial console at a WebSocket.
///
/// # Examples
/// ```no_run
/// use vmkit::propolis::{HistoryRange, SerialConsole};
///
/// # async fn example() -> vmkit::Result<()> {
/// let console = SerialConsole::at("ws://127.0.0.1:12400/instance/serial")?;
/// let past = console.history(HistoryRange::MostRecent(64 << 10)).await?;
/// let (ours, theirs) = tokio::net::UnixStream::pair().map_err(vmkit::Error::io("make", "a socket pair"))?;
/// let ending = console.pump(past.end, theirs, |event| eprintln!("{event:?}")).await?;
/// # drop(ours); println!("{ending:?}"); Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct SerialConsole {
    client: PropolisClient,
}

/// Some of what a console has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialOutput {
    /// What it said; without the middle, where the server no longer has that.
    pub bytes: Vec<u8>,
    /// How many bytes it had said at the end of these, since the boot.
    pub end: u64,
    /// How many bytes the middle has that is missing.
    pub missed: u64,
}

impl SerialConsole {
    /// Creates the client of the console at this URL. Touches nothing.
    ///
    /// # Errors
    /// `InvalidInput` for a URL that is no Propolis VM's console.
    pub fn at(url: &str) -> Result<Self> {
        Ok(Self { client: PropolisClient { address: address::server(url)?, version: API_VERSION } })
    }

    /// Returns what the console has said, as far as the server keeps it: the first and the last
    /// MiB.
    ///
    /// # Errors
    /// `InvalidState` where no VM is active there; `TimedOut`, and `Hypervisor` for a server that
    /// can't be reached or speaks something else.
    pub async fn history(&self, since: HistoryRange) -> Result<SerialOutput> {
        let mut past = SerialOutput { bytes: Vec::new(), end: 0, missed: 0 };
        let (mut since, client) = (since, &self.client);
        loop {
            let asked = page(client, since, Instant::now() + ANSWER_LIMIT).await;
            let page = asked.map_err(|failure| failure.into_error(client, "report its console", None))?;
            let page = page.ok_or_else(|| no_vm(client))?;
            if let HistoryRange::Start(next) = since {
                past.missed += page.begin().saturating_sub(next);
            }
            past.bytes.extend(&page.bytes);
            past.end = page.end;
            since = HistoryRange::Start(page.end);
            // A guest that speaks faster than it is asked is not followed for good: all that is
            // kept is enough.
            if page.is_last || past.bytes.len() as u64 >= 2 * KEPT_BYTES {
                return Ok(past);
            }
        }
    }

    /// Carries the console from byte `next` on to `stream`, and what comes from there to the guest,
    /// until one of both ends.
    ///
    /// `next` is [`SerialOutput::end`] of the past that is already known, 0 for everything. A
    /// connection that is lost is recreated, 10 s long, and no byte is lost or doubled by that;
    /// what is typed at such a moment may be lost. `tell` hears what happens meanwhile.
    ///
    /// # Cancel safety
    /// Nothing is left behind; what was not yet taken from `stream`'s other end is lost.
    ///
    /// # Errors
    /// `InvalidState` where no VM is active there at the beginning; `Hypervisor` and `TimedOut` for
    /// a server that can't be reached, or no longer.
    pub async fn pump(
        &self,
        next: u64,
        stream: UnixStream,
        tell: impl FnMut(ConsoleEvent) + Send,
    ) -> Result<ConsoleEnd> {
        Box::pin(pump::ConsolePump::new(self.client, next, stream, tell).run()).await
    }
}
