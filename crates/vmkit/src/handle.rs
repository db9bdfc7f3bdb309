//! A VM that exists: [`VmHandle`], and what is known of its run.
//!
//! Pure: plain data. A handle of a backend that is missing on this host still loads and prints.

use std::net::SocketAddrV4;
use std::num::NonZeroU16;
use std::path::PathBuf;

use uuid::Uuid;

pub use crate::backend_tag::{BackendTag, CustomTag};
use crate::lifecycle::VmState;
use crate::log_position::LogPosition;
use crate::spec::{Accel, Protocol, VmName, VmSpec};

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
    /// Where the last run begins in `console_log`; `None` if that is not known. `start` sets it,
    /// by [`BoundedLog::position`](crate::BoundedLog::position). Without it, a client that attaches
    /// has what earlier runs printed as well.
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
    /// The socket of the guest agent's channel. Only the backend's own
    /// [`GuestAgentChannel`](crate::abilities::GuestAgentChannel) and people read it.
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
    /// A Unix stream socket: raw bytes in both directions, as of QEMU's serial console.
    ///
    /// A backend MUST write what the guest prints to [`VmHandle::console_log`], whether a client is
    /// connected or not, and to a client first and to the log after it: `VmManager` joins the two,
    /// so that a client has each byte once, what was printed before it attached among them. A
    /// client that does not read MUST NOT stop the guest for good. The stream ends with the VM's
    /// run, not with a pause.
    ///
    /// One client at a time is served, and `VmManager` reports the process that is attached to the
    /// next one; unless the backend says that many are
    /// ([`Abilities::with_shared_console`](crate::Abilities::with_shared_console)).
    UnixSocket(PathBuf),
    /// The address of a WebSocket: Propolis's console. `VmManager` attaches to it by the backend's
    /// [`ConsoleHistory`](crate::abilities::ConsoleHistory).
    WebSocket(String),
    /// No console, as with the no-op backend unless it was given a directory for them.
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
