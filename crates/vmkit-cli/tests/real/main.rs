//! The command on the real QEMU; a guest boots only in tests that need one.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test may panic, and prints its figures and what it skips"
)]

mod agent;
mod booting;
mod clones;
mod console;
mod exports;
mod harness;
mod inherited;
mod life;
mod owners;
mod reports;
mod saved;
mod snapshots;
mod ssh;
#[path = "../../../vmkit/tests/it/sshd.rs"]
mod sshd;
#[path = "../support/mod.rs"]
mod support;
