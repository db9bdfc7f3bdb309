//! A Propolis server without a hypervisor, and the tools of the host that it lives on, for tests.
//!
//! ```no_run
//! use vmkit_testkit::propolis::{FakePropolis, PropolisBehaviour};
//! # fn main() -> std::io::Result<()> {
//! let server = FakePropolis::spawn(PropolisBehaviour::default())?;
//! // Talk to `http://{server.address()}` as if it were a propolis-server; afterwards:
//! assert!(server.kernel_vms().is_empty(), "it has left a VM in the kernel");
//! # Ok(()) }
//! ```
//!
//! Real, as read in its source or from its published description:
//! - the framework, dropshot: versions of the API and what is said of wrong ones, request ids,
//!   limits, the words for bodies that don't parse, upgrades to WebSocket, the log;
//! - which request is taken, ignored or denied in which state, with which words; the states, their
//!   generations, the long poll that blocks and skips; that failures of the server are told to its
//!   log alone;
//! - that nothing is known of a VM that was asked for while the server asks its host for CPUID;
//!   that `GET /instance` waits while a VM's devices pause; that one whose devices don't start is
//!   let go of before it has `Failed`;
//! - that a VM is `Destroyed` only after it has let go of everything; that a second one of the same
//!   id takes the first one's place in the kernel; that a killed server leaves its VM there;
//! - the serial port: what is kept of its history, several clients, and one who does not read and
//!   stalls them all; what its WebSockets send twice, and what they never send;
//! - what kills it: no `com1`, no firmware or one that does not fit, a device where the chipset is,
//!   blocks of no bytes, a VM whose half in the kernel somebody else destroys while it runs; and
//!   what it says then.
//!
//! Fake:
//! - there is no guest; see the text that it prints and the lines that it obeys in [`PropolisBehaviour`];
//! - there is no Crucible, no migration, no VNC: what asks for them fails, or nobody answers;
//! - memory and CPUs are only counted.
//!
//! [`FaultProxy`] is a network in front of it that misbehaves; [`illumos`] has the tools of its
//! host.
//!
//! Source: the sources of propolis-server and its API description 5.0.0, which is kept below
//! `data/propolis/`; and its own HTTP server, state driver and serial task, run on Linux over a
//! stand-in for the kernel's half. Nothing of this was compared with a server on illumos.

mod api;
mod behaviour;
mod description;
mod fake;
mod guest;
mod history;
mod host;
pub mod illumos;
mod machine;
mod proxy;
mod queue;
mod serial;
pub mod server;
mod spec;
mod wire;

pub use behaviour::{BEHAVIOUR, DeathPoint, Gate, PropolisBehaviour};
pub use description::{check_answer, check_ensure_request, description};
pub use fake::{FakePropolis, FakeSetup, HeldGate};
pub use proxy::{FaultProxy, NetworkFault};
