//! A Propolis server without a hypervisor, and the tools of its host, for tests.
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
//! Like propolis-server, as read in its source or its published description:
//! - the framework, dropshot: API versions and the errors for wrong ones, request ids, limits, the
//!   messages for bodies that don't parse, upgrades to WebSocket, the log;
//! - which request is accepted, ignored or denied in which state, with which message; the states,
//!   their generations, the long poll that blocks and skips; that only the log has the reason of a
//!   failure of the server;
//! - that a requested VM does not exist yet while the server asks its host for CPUID; that `GET
//!   /instance` waits while a VM's devices pause; that a VM whose devices don't start is released
//!   before its state is `Failed`;
//! - that a VM is `Destroyed` only after it has released everything; that a second VM of the same
//!   id takes the first one's place in the kernel; that a killed server leaves its VM there;
//! - the serial port: how much history it keeps, several clients, and one that does not read and
//!   stalls them all; what its WebSockets send twice, and what they never send;
//! - what makes it panic, and the message: no `com1`, no firmware or one of the wrong size, a
//!   device at the chipset's address, blocks of zero bytes, a VM whose kernel half another process
//!   destroys while it runs.
//!
//! Fake:
//! - there is no guest; [`PropolisBehaviour`] sets the text that it prints and the lines that it
//!   obeys;
//! - there is no Crucible, no migration, no VNC: requests for them fail or get no reply;
//! - memory and CPUs are only counted.
//!
//! [`FaultProxy`] is a network in front of it that misbehaves; [`illumos`] has stand-ins for the
//! tools of its host.
//!
//! Source: the sources of propolis-server and its API description 5.0.0, which is below
//! `data/propolis/`; and its own HTTP server, state driver and serial task, run on Linux with a
//! stand-in for the kernel half. None of this was compared with a server on illumos.

mod api;
mod behaviour;
mod description;
mod fake;
mod gates;
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
