//! The one file with `unsafe`: what the kernel offers and no safe crate wraps.
#![expect(
    unsafe_code,
    reason = "KVM memory, the tun ioctl and passing descriptors through exec have no safe wrapper"
)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has tokio's reactor watch a descriptor for being readable.
///
/// # Panics
/// Outside a tokio runtime, and on one without I/O.
pub(crate) fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and keeps its number and its file until it is dropped, and the `AsyncFd` owns it.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(Into::into)
}
