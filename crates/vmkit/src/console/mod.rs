//! Serial consoles of VMs: [`AttachedConsole`], one that is attached, and [`SerialConsole`], one that a
//! Propolis server serves.
//!
//! [`VmManager::attach_console`](crate::VmManager::attach_console) makes the first of either kind.
//! QEMU's console serves one client at a time, so whoever is there has a [`ConsoleTurn`], which the
//! next one is told of.

#[cfg(feature = "propolis")]
mod address;
mod attached;
#[cfg(feature = "propolis")]
mod bell;
mod joined;
#[cfg(feature = "propolis")]
pub(crate) mod pump;
#[cfg(feature = "propolis")]
pub(crate) mod serial;
#[cfg(feature = "propolis")]
mod tape;
mod turn;

pub use attached::AttachedConsole;
pub use joined::{ConsoleLog, JoinedConsole};
pub use turn::ConsoleTurn;

#[cfg(feature = "propolis")]
pub use address::HistoryRange;
#[cfg(feature = "propolis")]
pub use serial::{ConsoleEnd, ConsoleEvent, ConsoleHistory, SerialConsole};
