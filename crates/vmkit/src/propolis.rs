//! What only the Propolis backend has: the client of its consoles.
//! [`VmManager::attach_console`](crate::VmManager::attach_console) attaches to them as to any
//! other.

pub use crate::backend::propolis::console::{
    ConsoleEnd, ConsoleEvent, HistoryRange, SerialConsole, SerialOutput,
};
