//! How a fake Propolis server behaves, and how a test tells it.

use serde::{Deserialize, Serialize};

/// The variable that holds a [`Behaviour`] as JSON, for the program `vmkit-fake-propolis`.
pub const BEHAVIOUR: &str = "VMKIT_FAKE_PROPOLIS";

/// How a fake Propolis server behaves; as a default, well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Behaviour {
    /// What the guest prints on its first serial port when it boots.
    pub console: String,
    /// Whether the guest echoes what is typed.
    pub echo: bool,
    /// The program says this on its standard error and ends with code 1 before it listens.
    pub refusal: Option<String>,
    /// The initialisation of a VM fails with this text, which only the log tells.
    pub ensure_fails: Option<String>,
    /// Whether a VM's devices fail to start: it goes from `Starting` to `Failed`.
    pub start_fails: bool,
    /// The newest version of the API that it serves; 5.0.0 unless named.
    pub latest_version: Option<String>,
    /// So many lines it logs before it makes a VM: more than anybody reads meanwhile.
    pub chatter: u32,
    /// The point at which the server dies, as by a bug of its own; what it holds of the kernel leaks.
    pub dies: Option<Death>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            console: "no guest runs here\r\nlogin: ".to_owned(),
            echo: true,
            refusal: None,
            ensure_fails: None,
            start_fails: false,
            latest_version: None,
            chatter: 0,
            dies: None,
        }
    }
}

/// Where a server can die.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Death {
    /// While it makes a VM, after the kernel has one.
    Ensure,
    /// After it said that a VM starts.
    Start,
    /// After it said that a VM stops, before it let go of anything.
    Stop,
}

/// The points at which a server in this process can be held; see [`FakePropolis::hold`](super::FakePropolis::hold).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Before it makes a VM that was asked for.
    Ensure,
    /// Before it takes the next queued request or the guest's next event.
    Event,
    /// After it said that a VM has stopped, before it lets go of it.
    Release,
}
