//! What the engine needs of a guest: [`GuestConnector`] lets it in, and a [`ConnectedGuest`] runs
//! what it is told.

use std::pin::Pin;

use tokio::io::AsyncRead;
use tokio::time::Instant;

use crate::error::Result;
use crate::program::GuestExitStatus;
use crate::spec::VmName;

/// What is sent to a command, to its end.
pub type GuestInput = Pin<Box<dyn AsyncRead + Send>>;

/// Takes what a command prints, both streams as they come.
pub type GuestOutput<'a> = &'a mut (dyn FnMut(&[u8]) + Send);

/// Takes what is odd about a guest that is up and lets vmkit in no sooner, while it is waited for.
pub type GuestNotice<'a> = &'a mut (dyn FnMut(String) + Send);

/// The ways into the guests of one home.
pub trait GuestConnector: Send + Sync + 'static {
    /// A way into one guest.
    type Guest: ConnectedGuest;

    /// Waits until the guest lets vmkit in, and returns the way. Calls `notice` if it is probable
    /// meanwhile that the guest never will, such as one without an SSH server.
    ///
    /// # Errors
    /// `TimedOut` at the deadline; `InvalidState` when the VM ends meanwhile; `Guest` where there
    /// is no way in.
    fn enter(
        &self,
        vm: &VmName,
        deadline: Instant,
        notice: GuestNotice<'_>,
    ) -> impl Future<Output = Result<Self::Guest>> + Send;
}

/// A guest that was entered.
pub trait ConnectedGuest: Send + Sync {
    /// Returns the user that commands run as.
    fn user(&self) -> &str;

    /// Waits until cloud-init has ended in the guest.
    ///
    /// # Errors
    /// `Guest` with cloud-init's own error where it failed; `TimedOut` at the deadline.
    fn cloud_init(&self, deadline: Instant) -> impl Future<Output = Result<()>> + Send;

    /// Runs a command to its end.
    ///
    /// # Errors
    /// `TimedOut` at the deadline; `Guest` where the command's end is not known. That it fails is
    /// no error.
    fn run(
        &self,
        argv: Vec<String>,
        input: GuestInput,
        output: GuestOutput<'_>,
        deadline: Instant,
    ) -> impl Future<Output = Result<GuestExitStatus>> + Send;
}
