//! The command without a QEMU that runs.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "a test may panic, and prints what it skips")]

mod bad_input;
mod disks;
mod follow;
mod images;
mod output;
mod project;
mod propolis;
mod propolis_host;
mod reference;
mod set;
#[path = "../support/mod.rs"]
mod support;
