//! The backends: what makes the contract true on some kind of hypervisor.

pub mod noop;
pub mod router;
