//! What only the QEMU backend has: the plan of a VM, and the client of QEMU's guest agent.
//!
//! [`abilities::GuestAgentChannel`](crate::abilities::GuestAgentChannel) is how the manager finds
//! the agent of a VM.

#[doc(no_inline)]
pub use crate::QemuHypervisor;
pub use crate::backend::qemu::agent::{GuestAgent, GuestInterface, ShutdownMode};
pub use crate::backend::qemu::identity::{IdentityPart, NewIdentity, RenewedIdentity, SharedPart};
pub use crate::backend::qemu::{
    Accelerator, DeviceVersion, FirmwareFiles, PrepareStep, QemuHypervisorBuilder, QemuPlan, RestoreStep,
    SeedStep, SocketPlan, UpdateStep,
};
