//! The conformance suite, the fakes, and the backends on the fakes.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod conformance;
mod console_backend;
#[cfg(feature = "propolis")]
mod crash_propolis;
#[cfg(feature = "propolis")]
mod fake_propolis;
#[cfg(feature = "propolis")]
mod propolis_on_fake;
mod qemu_faults;
#[path = "../../../vmkit/tests/it/sshd.rs"]
mod sshd;
