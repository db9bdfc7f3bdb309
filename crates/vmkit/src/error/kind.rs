//! What a caller can do about an error: [`ErrorKind`].
//!
//! Pure: this module knows nothing of the host.

/// What a caller can do about an error. The CLI's exit codes come from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// What was given is wrong: change it and call again.
    InvalidInput,
    /// The name is taken.
    AlreadyExists,
    /// What was named does not exist.
    NotFound,
    /// Not legal in this state: another operation has to come first.
    InvalidState,
    /// This backend can never do it.
    Unsupported,
    /// Another process holds it now: trying again later may help.
    Busy,
    /// A deadline passed; nothing is known to be dead.
    TimedOut,
    /// A file of vmkit's own is unreadable, foreign or from a newer version.
    Record,
    /// The host lacks something: a program, a device, permission or space.
    Host,
    /// A server failed, or sent what could not be verified.
    Remote,
    /// The hypervisor failed.
    Hypervisor,
    /// What runs in the guest failed.
    Guest,
    /// The system failed in another way.
    Io,
}
