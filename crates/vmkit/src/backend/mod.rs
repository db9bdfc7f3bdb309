//! The backends: what makes the contract true on some kind of hypervisor.

pub(crate) mod noop;
pub(crate) mod qemu;
pub(crate) mod router;
pub(crate) mod supervise;
