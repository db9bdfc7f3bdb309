//! How a fake Propolis server behaves, and how a test tells it.

use serde::{Deserialize, Serialize};

/// The variable that holds a [`PropolisBehaviour`] as JSON, for the program `vmkit-fake-propolis`.
pub const BEHAVIOUR: &str = "VMKIT_FAKE_PROPOLIS";

/// How a fake Propolis server behaves; as a default, well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PropolisBehaviour {
    /// What the guest prints on its first serial port when it boots.
    pub console: String,
    /// Whether the guest echoes what is typed.
    pub echo: bool,
    /// The program says this on its standard error and ends with code 1 before it listens.
    pub refusal: Option<String>,
    /// The initialisation of a VM fails with this text, which only the log tells.
    pub ensure_fails: Option<String>,
    /// Whether a VM's devices fail to start: it is let go of, and only then said to have `Failed`.
    pub start_fails: bool,
    /// How many CPUs the host has; as many as this machine, but at least 4, unless named.
    pub host_cpus: Option<u8>,
    /// For how long the server asks its host for CPUID, and a DNS for Nexus, once a VM was asked
    /// for: it denies to have one.
    pub asks_host_millis: u64,
    /// How long a VM's devices take to pause before they are halted or reset: `GET /instance` waits
    /// for them.
    pub pause_millis: u64,
    /// Whether a panic ends no more than its task, as in a build for development.
    pub unwinds: bool,
    /// The newest version of the API that it serves; 5.0.0 unless named.
    pub latest_version: Option<String>,
    /// So many lines it logs before it makes a VM: more than anybody reads meanwhile.
    pub chatter: u32,
    /// The point at which the server dies, as by a bug of its own; what it holds of the kernel
    /// leaks.
    pub dies: Option<DeathPoint>,
}

impl Default for PropolisBehaviour {
    fn default() -> Self {
        Self {
            console: "no guest runs here\r\nlogin: ".to_owned(),
            echo: true,
            refusal: None,
            ensure_fails: None,
            start_fails: false,
            host_cpus: None,
            asks_host_millis: 0,
            pause_millis: 0,
            unwinds: false,
            latest_version: None,
            chatter: 0,
            dies: None,
        }
    }
}

/// Where a server can die.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeathPoint {
    /// While it makes a VM, after the kernel has one.
    Ensure,
    /// After it said that a VM starts.
    Start,
    /// After it said that a VM stops, before it let go of anything.
    Stop,
}

/// The points at which a server in this process can be held; see
/// [`FakePropolis::hold`](super::FakePropolis::hold).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// While it asks its host for CPUID, before anything is known of a VM that was requested.
    Host,
    /// Before it makes a VM that was requested, which is `Creating` by now.
    Ensure,
    /// After it sent a client the serial port's history, before it has the client on its list.
    Attach,
    /// Before it takes the next queued request or the guest's next event.
    Event,
    /// While it pauses a VM's devices, to halt or to reset them.
    Pause,
    /// After it said that a VM has stopped, before it lets go of it.
    Release,
}
