//! The library without a QEMU: what is a file, a fake or a server on loopback is enough here.
#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test may panic, and prints its figures and what it skips"
)]

#[cfg(feature = "ssh")]
mod clock;
mod common;
#[cfg(feature = "propolis")]
mod console;
mod crash;
#[cfg(all(target_os = "linux", feature = "images", feature = "ssh", feature = "vmfile"))]
mod few_threads;
mod manager;
mod noop_console;
#[cfg(all(feature = "propolis", feature = "ssh"))]
mod power_off;
#[cfg(all(feature = "images", feature = "ssh", feature = "vmfile"))]
mod project;
#[cfg(all(feature = "images", feature = "ssh", feature = "vmfile"))]
mod project_changes;
mod reconfigure;
mod refused;
mod restore;
#[cfg(all(feature = "images", feature = "ssh", feature = "vmfile"))]
mod shop;
#[cfg(feature = "ssh")]
mod ssh;
#[cfg(feature = "ssh")]
mod ssh_files;
#[cfg(feature = "ssh")]
mod sshd;
#[cfg(feature = "vmfile")]
mod vmfile;
mod watch;
