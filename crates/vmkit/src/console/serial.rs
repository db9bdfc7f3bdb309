//! The serial console of a VM that a Propolis server runs: [`SerialConsole`].
//!
//! The server keeps the first and the last MiB of what the guest said, each byte with its number since the boot, and
//! sends what comes. A [`SerialConsole`] makes one stream of that, whatever happens to the connection: it knows the number
//! of the last byte that it has, and asks for the next.
//!
//! ```text
//!            ┌── lost, or this side is too slow: let go of the server ──┐
//!            ▼                                                          │
//! history ─▶ live from byte N ─▶ spool ─▶ whoever reads                 │
//!            │  │                                                       │
//!            │  └─ `Migrating`: the same at the other server ───────────┘
//!            └─ closed, "VM stopped": the end
//! ```
//!
//! The server awaits each of its clients, so one that stalls would stall all. This one never does: what its reader does not
//! take waits in a spool, and when that is full the connection is given up until the reader has caught up.
//!
//! Source: the Propolis API, `/instance/serial` and `/instance/serial/history`.

use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::Instant;

use super::address::{self, Since};
use super::pump;
use crate::backend::propolis::client::{Client, Failure, From};
use crate::error::{Error, Result};
use crate::lifecycle::VmState;

/// The lowest version of the API that has all of this.
pub(super) const API_VERSION: &str = "1.0.0";
/// How long the server may take for one answer.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How much the server keeps of the beginning, and as much of the end, in bytes.
const KEPT_BYTES: u64 = 1 << 20;

/// A serial console at a WebSocket.
///
/// # Examples
/// ```no_run
/// use vmkit::console::{SerialConsole, Since};
///
/// # async fn example() -> vmkit::Result<()> {
/// let console = SerialConsole::at("ws://127.0.0.1:12400/instance/serial")?;
/// let past = console.history(Since::MostRecent(64 << 10)).await?;
/// let (ours, theirs) = tokio::net::UnixStream::pair().map_err(vmkit::Error::io("make", "a socket pair"))?;
/// let ending = console.pump(past.end, theirs, |event| eprintln!("{event:?}")).await?;
/// # drop(ours); println!("{ending:?}"); Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct SerialConsole {
    client: Client,
}

/// Some of what a console has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    /// What it said; without the middle, where the server no longer has that.
    pub bytes: Vec<u8>,
    /// How many bytes it had said at the end of these, since the boot.
    pub end: u64,
    /// How many bytes the middle has that is missing.
    pub missed: u64,
}

/// Why a console has nothing more to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ending {
    /// The VM has stopped.
    Stopped,
    /// Whoever read it has left.
    Left,
}

/// What happens to a console beside its words.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The connection was lost; it is tried anew.
    Lost,
    /// It is there again.
    Restored,
    /// The VM goes on at another server.
    Moved {
        /// Its address.
        server: std::net::SocketAddr,
    },
    /// The server no longer has what was said meanwhile.
    Missed {
        /// So many bytes.
        bytes: u64,
    },
}

/// A piece of the past without a gap.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) bytes: Vec<u8>,
    pub(super) end: u64,
}

/// What can be had of the past.
#[derive(Debug)]
enum Asked {
    Had(Page),
    /// These bytes are no longer kept.
    Expired,
    /// No VM is active there.
    NoVm,
}

impl SerialConsole {
    /// Makes the client of the console at this URL. Touches nothing.
    ///
    /// # Errors
    /// `InvalidInput` for a URL that is no Propolis VM's console.
    pub fn at(url: &str) -> Result<Self> {
        Ok(Self { client: Client { address: address::server(url)?, version: API_VERSION } })
    }

    /// Answers what the console has said, as far as the server keeps it: the first and the last MiB.
    ///
    /// # Errors
    /// `InvalidState` where no VM is active there; `TimedOut`, and `Hypervisor` for a server that can't be reached or speaks
    /// something else.
    pub async fn history(&self, since: Since) -> Result<Past> {
        let mut past = Past { bytes: Vec::new(), end: 0, missed: 0 };
        let active = pages(&self.client, since, |page| {
            let begin = page.end.saturating_sub(page.bytes.len() as u64);
            if !past.bytes.is_empty() {
                past.missed += begin.saturating_sub(past.end);
            }
            past.bytes.extend(page.bytes);
            past.end = page.end;
        });
        if active.await? { Ok(past) } else { Err(no_vm(&self.client)) }
    }

    /// Carries the console from byte `next` on to `stream`, and what comes from there to the guest, until one of both ends.
    ///
    /// `next` is [`Past::end`] of the past that is already known, 0 for everything. A connection that is lost is made
    /// anew, 10 s long, and no byte is lost or doubled by that; what is typed at such a moment may be lost. `tell` hears
    /// what happens meanwhile.
    ///
    /// # Cancel safety
    /// Nothing is left behind; what was not yet taken from `stream`'s other end is lost.
    ///
    /// # Errors
    /// `InvalidState` where no VM is active there at the beginning; `Hypervisor` and `TimedOut` for a server that can't be
    /// reached, or no longer.
    pub async fn pump(
        &self,
        next: u64,
        stream: UnixStream,
        tell: impl FnMut(Event) + Send,
    ) -> Result<Ending> {
        pump::Pump::new(self.client, next, stream, tell).run().await
    }
}

/// Takes the past page by page, a gap where the server no longer has the middle; answers whether a VM is active there.
///
/// A guest that speaks faster than it is asked is not followed for good: all that the server keeps is enough.
pub(super) async fn pages(client: &Client, since: Since, mut take: impl FnMut(Page)) -> Result<bool> {
    let (mut since, mut taken) = (since, 0);
    while taken < 2 * KEPT_BYTES {
        match page(client, since).await? {
            Asked::Had(page) if page.bytes.is_empty() => {
                take(page);
                return Ok(true);
            }
            Asked::Had(page) => {
                taken += page.bytes.len() as u64;
                since = Since::Start(page.end);
                take(page);
            }
            Asked::Expired if matches!(since, Since::Start(_)) => since = Since::MostRecent(KEPT_BYTES),
            // The end is pushed out by what comes behind it; nearer to the end there is time.
            Asked::Expired => since = Since::MostRecent(KEPT_BYTES / 2),
            Asked::NoVm => return Ok(false),
        }
    }
    Ok(true)
}

async fn page(client: &Client, since: Since) -> Result<Asked> {
    let from = match since {
        Since::Start(bytes) => From::Start(bytes),
        Since::MostRecent(bytes) => From::End(bytes),
    };
    match client.history(from, Instant::now() + ANSWER_LIMIT).await {
        Ok(history) => Ok(Asked::Had(Page { bytes: history.data, end: history.last_byte_offset })),
        Err(failure) if failure.is_no_instance() => Ok(Asked::NoVm),
        Err(Failure::Denied { refusal, .. }) if refusal.message.contains("no longer cached") => {
            Ok(Asked::Expired)
        }
        Err(failure) => Err(failure.into_error(client, "tell of its console", None)),
    }
}

pub(super) fn no_vm(client: &Client) -> Error {
    Error::Ended {
        awaited: format!("the console at {}", client.address),
        state: VmState::Stopped,
        console: String::new(),
    }
}
