//! QEMU on Linux.

pub(crate) mod agent;
pub(crate) mod qmp;
