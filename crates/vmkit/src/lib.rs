//! Runs virtual machines.

mod backend;
pub mod cloud_init;
mod error;
mod handle;
pub mod host;
mod hypervisor;
pub mod image;
mod input_file;
pub mod lifecycle;
mod manager;
pub mod network;
pub mod spec;
mod steps;
pub mod store;
mod sys;

pub use backend::noop::NoopHypervisor;
pub use backend::qemu::agent::{ExecOutput, GuestAgent, GuestExit, GuestInterface, ShutdownMode};
pub use backend::qemu::keeper::run_if_keeper;
pub use backend::qemu::{
    Accelerator, FirmwareFiles, PrepareStep, QemuHypervisor, QemuHypervisorBuilder, QemuPlan, SocketPlan,
    tail_of_log,
};
pub use backend::router::RouterHypervisor;
pub use error::{Error, ErrorKind, Result};
pub use handle::{
    ActiveForward, BackendDetails, BackendTag, ConsoleEndpoint, CustomTag, RunInfo, VmHandle, VncAddress,
};
pub use hypervisor::{Backend, Capabilities, DynHypervisor, Hypervisor};
pub use lifecycle::{FailureCause, FailureKind, VmState};
pub use manager::{Condition, Listed, VmManager};
#[doc(hidden)]
pub use steps::set_step_hook;
