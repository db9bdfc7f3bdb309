//! The serial consoles of VMs: [`AttachedConsole`], and its parts.
//!
//! [`VmManager::attach_console`](crate::VmManager::attach_console) attaches to the console of any
//! backend. QEMU's console serves one client at a time, so a client takes a [`ConsoleTurn`], which
//! another one is refused with.

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
