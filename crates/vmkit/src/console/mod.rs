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

mod address;
mod pump;

use std::time::Duration;

use serde::Deserialize;
use tokio::net::UnixStream;

pub use address::Since;

use self::address::Address;
use crate::error::{Error, Result};

/// The lowest version of the API that has all of this.
const API_VERSION: &str = "1.0.0";
/// How long the server may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How much past the server keeps at its end, in bytes, and so the most that is worth asking for at once.
const KEPT_BYTES: u64 = 1 << 20;
/// The peer's name in errors.
const PEER: &str = "the Propolis server";

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
    address: Address,
    http: reqwest::Client,
}

/// Some of what a console has said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    /// What it said.
    pub bytes: Vec<u8>,
    /// How many bytes it had said at the end of these, since the boot.
    pub end: u64,
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
        server: String,
    },
    /// The server no longer has what was said meanwhile.
    Missed {
        /// So many bytes.
        bytes: u64,
    },
}

/// The server's answer about the past.
#[derive(Debug, Deserialize)]
struct History {
    data: Vec<u8>,
    last_byte_offset: u64,
}

/// The server's answer where it refuses.
#[derive(Debug, Default, Deserialize)]
struct Refusal {
    #[serde(default)]
    error_code: Option<String>,
    #[serde(default)]
    message: String,
}

/// What can be had of the past.
enum Asked {
    Had(Past),
    /// These bytes are no longer kept.
    Expired,
    /// No VM is active there.
    NoVm,
}

impl SerialConsole {
    /// Makes the client of the console at this URL. Touches nothing.
    ///
    /// # Errors
    /// `InvalidInput` for a URL that is no console's; `Host` where the system can't make an HTTP client.
    pub fn at(url: &str) -> Result<Self> {
        let address = Address::parse(url)?;
        // Straight to the server: what proxies the environment names is no business of this library.
        let http = reqwest::Client::builder().no_proxy().connect_timeout(ANSWER_LIMIT).build();
        let http = http.map_err(|error| Error::Host {
            needed: "an HTTP client".to_owned(),
            problem: error.to_string(),
        })?;
        Ok(Self { address, http })
    }

    /// Answers what the console has said, at most the MiB that the server keeps.
    ///
    /// # Errors
    /// `InvalidState` where no VM is active there; `NotFound` where these bytes are no longer kept; `TimedOut`, and
    /// `Hypervisor` for a server that can't be reached or speaks something else.
    pub async fn history(&self, since: Since) -> Result<Past> {
        match self.ask(&self.address, since, KEPT_BYTES).await? {
            Asked::Had(past) => Ok(past),
            Asked::Expired => Err(Error::NotFound { what: "console output", name: format!("{since:?}") }),
            Asked::NoVm => Err(no_vm(&self.address)),
        }
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
        pump::Pump::new(self, next, stream, tell).run().await
    }

    async fn ask(&self, address: &Address, since: Since, most_bytes: u64) -> Result<Asked> {
        let failed = |error: reqwest::Error| {
            if error.is_timeout() {
                return slow(address);
            }
            Error::Protocol {
                peer: PEER,
                problem: format!("{}: it does not answer about its console", address.server),
                source: Some(std::io::Error::other(error)),
            }
        };
        let request = self.http.get(address.history(since, most_bytes)).header("api-version", API_VERSION);
        let response = request.timeout(ANSWER_LIMIT).send().await.map_err(failed)?;
        let status = response.status();
        let body = response.bytes().await.map_err(failed)?;
        if status.is_success() {
            let History { data, last_byte_offset: end } =
                serde_json::from_slice(&body).map_err(|_| foreign(address))?;
            return Ok(Asked::Had(Past { bytes: data, end }));
        }
        let refusal: Refusal = serde_json::from_slice(&body).map_err(|_| foreign(address))?;
        match status.as_u16() {
            424 => Ok(Asked::NoVm),
            400 if refusal.message.contains("no longer cached") => Ok(Asked::Expired),
            _ => Err(Error::Refused {
                peer: PEER,
                command: "serial/history".to_owned(),
                class: refusal.error_code.unwrap_or_else(|| status.as_str().to_owned()),
                description: refusal.message,
            }),
        }
    }
}

fn no_vm(address: &Address) -> Error {
    Error::Ended {
        awaited: format!("the console at {}", address.server),
        state: crate::lifecycle::VmState::Stopped,
        console: String::new(),
    }
}

fn foreign(address: &Address) -> Error {
    Error::Protocol {
        peer: PEER,
        problem: format!("{} does not answer as a Propolis server does", address.server),
        source: None,
    }
}

fn slow(address: &Address) -> Error {
    Error::TimedOut {
        awaited: format!("an answer of the Propolis server at {}", address.server),
        after: ANSWER_LIMIT,
        console: String::new(),
    }
}
