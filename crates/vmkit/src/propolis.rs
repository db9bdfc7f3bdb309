//! What only the Propolis backend has: the plan of a VM, and the client of its consoles.
//!
//! [`VmManager::attach_console`](crate::VmManager::attach_console) attaches to such a console as to
//! any other.

#[doc(no_inline)]
pub use crate::PropolisHypervisor;
pub use crate::backend::propolis::console::{
    ConsoleEnd, ConsoleEvent, HistoryRange, SerialConsole, SerialOutput,
};
pub use crate::backend::propolis::{
    HostStep, PowerOff, PropolisHypervisorBuilder, PropolisPlan, ServerPlan, StepDiff, instance_spec,
};
