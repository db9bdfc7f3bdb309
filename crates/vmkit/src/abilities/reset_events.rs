//! The ability to notice that a guest was reset: [`ResetEvents`].
//!
//! A reset ends no process and changes no state: the VM runs before and after it. But all that ran
//! in the guest is gone, and a connection into it stays open until the guest has booted again.

use std::future::Future;

use super::erased;
use crate::error::Result;
use crate::handle::VmHandle;

/// Reports resets of a guest.
pub trait ResetEvents: Send + Sync {
    /// Waits until the guest is reset: by its own hardware reset, as at the end of `reboot`, or
    /// from outside.
    ///
    /// Resets before the first poll do not count. Never completes for a VM of which this can't be
    /// known, such as one that an earlier version has started.
    ///
    /// # Cancel safety
    /// Nothing is changed by waiting.
    ///
    /// # Errors
    /// `Io` and `Host` if the events can't be read.
    fn guest_reset(&self, vm: &VmHandle) -> impl Future<Output = Result<()>> + Send;
}

erased! {
    /// Any backend that reports resets, its type erased.
    DynResetEvents of ResetEvents by ErasedResetEvents for 'a;
    /// Calls [`ResetEvents::guest_reset`].
    ///
    /// # Errors
    /// Those of the backend.
    guest_reset as guest_reset_dyn(vm: &'a VmHandle) -> ();
}
