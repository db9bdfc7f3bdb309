//! A VM that exists: [`VmHandle`], and what is known of its run.
//!
//! Pure: plain data. A handle of a backend that is missing on this host still loads and prints.

use std::fmt;
use std::net::SocketAddrV4;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::boundedlog::LogPosition;
use crate::error::Error;
use crate::lifecycle::VmState;
use crate::spec::{Accel, Protocol, VmName, VmSpec};

/// Names the backend that a VM belongs to; in data it is a bare string.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum BackendTag {
    /// Nothing runs: the contract's reference.
    Noop,
    /// QEMU on Linux.
    Qemu,
    /// Propolis (bhyve) on illumos.
    Propolis,
    /// A backend outside this crate.
    Custom(CustomTag),
}

/// The name of a backend outside this crate: `[a-z][a-z0-9-]{0,31}` and none of the built-in names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CustomTag(String);

impl CustomTag {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl BackendTag {
    /// Creates the tag of a backend outside this crate.
    ///
    /// # Errors
    /// `InvalidInput` for a name that is built in, or not `[a-z][a-z0-9-]{0,31}`.
    pub fn custom(name: &str) -> Result<Self, Error> {
        match name.parse()? {
            tag @ BackendTag::Custom(_) => Ok(tag),
            _ => Err(Error::invalid("backend", name, "this is the name of a built-in backend")),
        }
    }

    /// Returns the tag as text.
    pub fn as_str(&self) -> &str {
        match self {
            BackendTag::Noop => "noop",
            BackendTag::Qemu => "qemu",
            BackendTag::Propolis => "propolis",
            BackendTag::Custom(tag) => tag.as_str(),
        }
    }
}

impl FromStr for BackendTag {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "noop" => return Ok(BackendTag::Noop),
            "qemu" => return Ok(BackendTag::Qemu),
            "propolis" => return Ok(BackendTag::Propolis),
            _ => {}
        }
        let head = text.starts_with(|c: char| c.is_ascii_lowercase());
        let clean = text.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-'));
        if head && clean && text.len() <= 32 {
            return Ok(BackendTag::Custom(CustomTag(text.to_owned())));
        }
        let value: String = text.chars().take(40).collect();
        Err(Error::invalid(
            "backend",
            value,
            "a backend is named by 1 to 32 of a-z, 0-9 and -, a letter first",
        ))
    }
}

impl TryFrom<String> for BackendTag {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<BackendTag> for String {
    fn from(tag: BackendTag) -> String {
        tag.as_str().to_owned()
    }
}

impl fmt::Display for BackendTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A VM that exists, as of when the handle was returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmHandle {
    /// The id, for the life of the VM.
    pub id: Uuid,
    /// The backend that the VM belongs to.
    pub backend: BackendTag,
    /// What was wanted.
    pub spec: VmSpec,
    /// What is wanted from the next start on, if that differs from `spec`. `VmManager` puts this
    /// spec in the place of `spec` before it calls the backend's `start`.
    pub next_spec: Option<Box<VmSpec>>,
    /// The state at that time; the backend's `state` returns the present one.
    pub state: VmState,
    /// What is known while the VM runs.
    pub run: Option<RunInfo>,
    /// The log of the serial console's output, at most `spec.console_log` bytes of it.
    pub console_log: Option<PathBuf>,
    /// Where the last run begins in `console_log`; `None` if that is not known.
    pub console_since: Option<LogPosition>,
    /// The log of what the hypervisor itself printed.
    pub hypervisor_log: Option<PathBuf>,
    /// What only its backend reads.
    pub details: BackendDetails,
}

impl VmHandle {
    /// Creates the handle of a VM whose `prepare` has not ended: enough for `destroy` to remove
    /// what `prepare` created.
    pub fn preparing(id: Uuid, backend: BackendTag, spec: VmSpec) -> Self {
        Self {
            id,
            backend,
            spec,
            next_spec: None,
            state: VmState::Preparing,
            run: None,
            console_log: None,
            console_since: None,
            hypervisor_log: None,
            details: BackendDetails::default(),
        }
    }

    /// Returns the handle as it is from the next start on: what waits for that is its spec.
    #[must_use]
    pub fn with_next_spec(mut self) -> Self {
        if let Some(next) = self.next_spec.take() {
            // The number of cloud-init's runs goes on from what it has become meanwhile.
            self.spec = next.in_place_of(&self.spec);
        }
        self
    }

    /// Returns the VM's name.
    pub fn name(&self) -> &VmName {
        self.spec.name()
    }

    /// Returns the same handle in another state, without `run` if the VM neither runs nor is
    /// suspended in that state.
    #[must_use]
    pub fn in_state(mut self, state: VmState) -> Self {
        if !state.is_live() {
            self.run = None;
        }
        self.state = state;
        self
    }
}

/// What is known of a VM while it runs. Every field is optional for a backend; each buys something.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunInfo {
    /// The hypervisor's process. With it, the end of the VM is noticed at once.
    pub pid: Option<u32>,
    /// What really runs the guest's code, if the backend has a choice: never `auto`.
    pub accel: Option<Accel>,
    /// The console, as [`Hypervisor::console_endpoint`](crate::Hypervisor::console_endpoint)
    /// returns it.
    pub console: ConsoleEndpoint,
    /// The socket of the guest agent's channel.
    pub agent: Option<PathBuf>,
    /// The socket of a monitor for people; vmkit itself uses another.
    pub monitor: Option<PathBuf>,
    /// Where the screen is.
    pub vnc: Option<VncAddress>,
    /// The forwarded ports, with the port that the host really listens on. A guest with
    /// user networking is reached by SSH through the forward to its port 22; any other at the
    /// address that `guest_ip` returns.
    pub forwards: Vec<ActiveForward>,
}

/// Where a VM's serial console can be attached to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ConsoleEndpoint {
    /// A Unix stream socket: raw bytes in both directions, as of QEMU's serial console. One client
    /// at a time; the guest's output goes to the console log whether a client is connected or not.
    UnixSocket(PathBuf),
    /// The address of a WebSocket: Propolis's console.
    WebSocket(String),
    /// No console, as with the no-op backend.
    #[default]
    None,
}

/// Where a VM's screen can be viewed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum VncAddress {
    /// A Unix socket that only this user can open.
    Unix(PathBuf),
    /// A TCP port of loopback; the password is in a file that only this user can read.
    Tcp {
        /// The address.
        addr: SocketAddrV4,
        /// The file with the password.
        password_file: PathBuf,
    },
}

/// A forward in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActiveForward {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// The address and port that the host listens on.
    pub host: SocketAddrV4,
    /// The guest's port.
    pub guest_port: NonZeroU16,
}

/// Data that only the VM's own backend reads, with the version of its format.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BackendDetails {
    /// The version of the format; 0 means that there is no data yet.
    pub version: u32,
    /// The data.
    pub data: serde_json::Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_custom_tag_can_not_alias_a_built_in_one() {
        assert!(BackendTag::custom("qemu").is_err());
        assert!(BackendTag::custom("Qemu").is_err());
        assert_eq!(BackendTag::custom("cloud-hypervisor").unwrap().as_str(), "cloud-hypervisor");
    }

    #[test]
    fn a_tag_is_a_bare_string_in_data() {
        let tag = BackendTag::custom("mine").unwrap();
        assert_eq!(serde_json::to_string(&tag).unwrap(), "\"mine\"");
        assert_eq!(serde_json::from_str::<BackendTag>("\"qemu\"").unwrap(), BackendTag::Qemu);
    }
}
