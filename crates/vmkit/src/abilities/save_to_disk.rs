//! The ability to write a guest's memory to disk and to continue from there: [`SaveToDisk`].

use std::future::Future;

use super::erased;
use crate::error::Result;
use crate::handle::VmHandle;

/// Saves guests to disk. `start` and `resume` of the contract continue a saved guest.
pub trait SaveToDisk: Send + Sync {
    /// Writes the guest's memory and the state of its devices to disk, ends the hypervisor's
    /// process, and returns a handle in `Saved`.
    ///
    /// The guest does not run meanwhile. Bounded by 60 s, and one second more for each 10 MiB of
    /// the guest's memory.
    ///
    /// # State
    /// | Prepared | Running | Suspended | Saved | Stopped | Failed |
    /// | --- | --- | --- | --- | --- | --- |
    /// | error | Saved | Saved | same | error | error |
    ///
    /// # Cancel safety
    /// Killed or dropped anywhere, the VM is `Saved`, or its guest is in memory as it was: running,
    /// or paused as `Suspended`, from where `resume` continues it.
    ///
    /// # Errors
    /// `InvalidState` where the table says error. After any error the guest is in the state that it
    /// was in: `Host` for too little space, which is estimated beforehand; `Hypervisor` for a
    /// device that can't be saved; `TimedOut`; `Io`.
    fn save(&self, vm: &VmHandle) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Returns the room that a saved guest takes on disk, in bytes; `None` for a VM that is not
    /// saved.
    ///
    /// # Errors
    /// `Io` and `Host` if that can't be determined.
    fn saved_bytes(&self, vm: &VmHandle) -> impl Future<Output = Result<Option<u64>>> + Send;
}

erased! {
    /// Any backend that saves guests to disk, its type erased.
    DynSaveToDisk of SaveToDisk by ErasedSaveToDisk for 'a;
    /// Calls [`SaveToDisk::save`].
    ///
    /// # Errors
    /// Those of the backend.
    save as save_dyn(vm: &'a VmHandle) -> VmHandle;
    /// Calls [`SaveToDisk::saved_bytes`].
    ///
    /// # Errors
    /// Those of the backend.
    saved_bytes as saved_bytes_dyn(vm: &'a VmHandle) -> Option<u64>;
}
