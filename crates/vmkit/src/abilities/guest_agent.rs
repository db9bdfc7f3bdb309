//! The ability to reach an agent in the guest: [`GuestAgentChannel`].
//!
//! The guest is not trusted: what its agent says is data, of a bounded size.

use std::future::Future;
use std::time::Duration;

use super::erased;
use crate::error::Result;
use crate::handle::VmHandle;
use crate::program::ProgramOutput;

/// Sends requests to an agent that runs in the guest.
///
/// # Cancel safety
/// A dropped future leaves the channel usable. What the guest was told may or may not be done.
pub trait GuestAgentChannel: Send + Sync {
    /// Returns whether the agent responds within `limit`; `false` while the guest boots, has no
    /// agent, or another client holds the channel.
    ///
    /// # Errors
    /// `Unsupported` for a VM that has no channel to an agent.
    fn agent_responds(&self, vm: &VmHandle, limit: Duration) -> impl Future<Output = Result<bool>> + Send;

    /// Runs a program in the guest, and returns its output once it has ended.
    ///
    /// The program is looked up in the agent's `PATH`, gets no shell, and its standard input is
    /// empty. A program that is still running after `limit` keeps running.
    ///
    /// # Errors
    /// `Unsupported` for a VM that has no channel to an agent; `TimedOut` if the agent does not
    /// respond, or the program has not ended within `limit`; `Guest` if the agent refuses.
    fn agent_exec(
        &self,
        vm: &VmHandle,
        program: &str,
        args: &[&str],
        limit: Duration,
    ) -> impl Future<Output = Result<ProgramOutput>> + Send;
}

erased! {
    /// Any backend with a guest agent, its type erased.
    DynGuestAgentChannel of GuestAgentChannel by ErasedGuestAgentChannel for 'a;
    /// Calls [`GuestAgentChannel::agent_responds`].
    ///
    /// # Errors
    /// Those of the backend.
    agent_responds as agent_responds_dyn(vm: &'a VmHandle, limit: Duration) -> bool;
    /// Calls [`GuestAgentChannel::agent_exec`].
    ///
    /// # Errors
    /// Those of the backend.
    agent_exec as agent_exec_dyn(
        vm: &'a VmHandle, program: &'a str, args: &'a [&'a str], limit: Duration
    ) -> ProgramOutput;
}
