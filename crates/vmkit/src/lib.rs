//! Runs virtual machines.

mod backend;
mod error;
mod handle;
mod hypervisor;
pub mod lifecycle;
pub mod spec;

pub use backend::noop::NoopHypervisor;
pub use backend::router::RouterHypervisor;
pub use error::{Error, ErrorKind, Result};
pub use handle::{
    ActiveForward, BackendDetails, BackendTag, ConsoleEndpoint, CustomTag, RunInfo, VmHandle, VncAddress,
};
pub use hypervisor::{Backend, Capabilities, DynHypervisor, Hypervisor};
pub use lifecycle::VmState;
