//! The library on the real QEMU, with guests that boot, and beside other real programs.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a test may panic, and prints what it skips"
)]

mod clone;
mod console;
#[cfg(feature = "images")]
mod convert;
mod crash;
mod devices;
#[cfg(feature = "images")]
mod export;
mod guest;
mod harness;
mod host;
mod identity;
mod qemu;
#[cfg(feature = "images")]
mod registry;
mod save;
mod snapshot;
mod tap;
