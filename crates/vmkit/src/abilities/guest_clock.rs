//! The ability to set a guest's clock when the guest is resumed: [`GuestClock`].
//!
//! The clock of a suspended guest stands still, and the guest does not notice: without a time
//! server it stays behind by the length of the suspension.

use std::future::Future;
use std::time::Duration;

use super::erased;
use crate::error::Result;
use crate::handle::VmHandle;

/// Whether a guest's clock is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockState {
    /// It is right, or was never wrong.
    Right,
    /// It could not be set, or not be read.
    Unknown,
}

/// A VM, and whether its guest's clock is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClockedVm {
    /// The VM.
    pub vm: VmHandle,
    /// Whether the clock is right.
    pub clock: ClockState,
}

impl ClockedVm {
    /// Returns a VM that has booted: its guest has read the clock of its machine.
    pub(crate) fn booted(vm: VmHandle) -> Self {
        Self { vm, clock: ClockState::Right }
    }

    /// Returns a VM of whose clock nothing is known.
    pub fn unknown(vm: VmHandle) -> Self {
        Self { vm, clock: ClockState::Unknown }
    }
}

/// Resumes a guest and sets its clock.
pub trait GuestClock: Send + Sync {
    /// Does what [`Hypervisor::resume`](crate::Hypervisor::resume) does, and then sets the guest's
    /// clock; `paused` is how long the guest was suspended, if the caller knows.
    ///
    /// A clock that can't be set is not an error: the guest runs, and the result says `Unknown`.
    /// Bounded by the time of `resume`, and some 20 s more for a slow guest.
    ///
    /// # State
    /// As for `resume`. The clock of a VM that was running already is `Right`.
    ///
    /// # Errors
    /// Those of `resume`.
    fn resume_and_set_clock(
        &self,
        vm: &VmHandle,
        paused: Option<Duration>,
    ) -> impl Future<Output = Result<ClockedVm>> + Send;
}

erased! {
    /// Any backend that sets guests' clocks, its type erased.
    DynGuestClock of GuestClock by ErasedGuestClock for 'a;
    /// Calls [`GuestClock::resume_and_set_clock`].
    ///
    /// # Errors
    /// Those of the backend.
    resume_and_set_clock as resume_and_set_clock_dyn(
        vm: &'a VmHandle, paused: Option<Duration>
    ) -> ClockedVm;
}
