//! The backends: what makes the contract true on some kind of hypervisor.

pub(crate) mod noop;
#[cfg(feature = "propolis")]
pub(crate) mod propolis;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) mod qemu;
pub(crate) mod router;
#[cfg_attr(
    not(any(all(target_os = "linux", feature = "qemu"), feature = "propolis")),
    expect(dead_code, reason = "a build without backends supervises nothing")
)]
pub(crate) mod supervise;
