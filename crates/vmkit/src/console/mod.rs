//! Serial consoles of VMs: [`AttachedConsole`], one that is attached, and what it is made of.
//!
//! [`VmManager::attach_console`](crate::VmManager::attach_console) attaches to the console of any
//! backend. QEMU's console serves one client at a time, so whoever is there has a [`ConsoleTurn`],
//! which the next one is told of.

mod attached;
mod joined;
mod lines;
mod turn;

pub use attached::AttachedConsole;
pub(crate) use attached::StateQuery;
pub use joined::{ConsoleLog, JoinedConsole};
pub(crate) use lines::last_lines;
#[cfg(all(feature = "ssh", feature = "images"))]
pub(crate) use lines::without_sequences;
pub(crate) use turn::ConsoleClient;
pub use turn::ConsoleTurn;
