//! The ability to show a console's past and to attach to it: [`ConsoleHistory`].
//!
//! A backend whose console is a Unix socket and whose log is a file needs none of this: the manager
//! joins the two. This is for consoles that are elsewhere, such as at a server, which keeps what
//! the guest has printed.

use std::future::Future;

use tokio::net::UnixStream;

use super::erased;
use crate::error::Result;
use crate::handle::VmHandle;

/// A console that was attached.
#[derive(Debug)]
#[non_exhaustive]
pub struct AttachedStream {
    /// What the guest has printed in this run before.
    pub past: Vec<u8>,
    /// What it prints from there on, without a gap, and what is typed. It ends with the VM's run.
    pub stream: UnixStream,
}

impl AttachedStream {
    /// Creates one of what was printed before, and the stream that goes on from there.
    pub fn new(past: Vec<u8>, stream: UnixStream) -> Self {
        Self { past, stream }
    }
}

/// Reads what a guest has printed on its serial console in this run, and attaches to it.
pub trait ConsoleHistory: Send + Sync {
    /// Returns the last `most_bytes` that the guest has printed in this run.
    ///
    /// # State
    /// Running and Suspended. After that, `console_log` of the handle has what was printed.
    ///
    /// # Errors
    /// `InvalidState` unless the VM runs or is suspended; `TimedOut` and `Hypervisor` if the
    /// console can't be reached.
    fn console_tail(&self, vm: &VmHandle, most_bytes: u64) -> impl Future<Output = Result<Vec<u8>>> + Send;

    /// Attaches to the console, with the last `past_bytes` of what was printed before.
    ///
    /// Each byte that the guest prints comes once, either in the past or by the stream. Any number
    /// of clients may attach. Closing the stream detaches.
    ///
    /// # Errors
    /// As [`console_tail`](Self::console_tail).
    fn attach_console(
        &self,
        vm: &VmHandle,
        past_bytes: u64,
    ) -> impl Future<Output = Result<AttachedStream>> + Send;
}

erased! {
    /// Any backend with the past of its consoles, its type erased.
    DynConsoleHistory of ConsoleHistory by ErasedConsoleHistory for 'a;
    /// Calls [`ConsoleHistory::console_tail`].
    ///
    /// # Errors
    /// Those of the backend.
    console_tail as console_tail_dyn(vm: &'a VmHandle, most_bytes: u64) -> Vec<u8>;
    /// Calls [`ConsoleHistory::attach_console`].
    ///
    /// # Errors
    /// Those of the backend.
    attach_console as attach_console_dyn(vm: &'a VmHandle, past_bytes: u64) -> AttachedStream;
}
