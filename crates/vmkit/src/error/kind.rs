//! What a caller can do about an error: [`ErrorKind`].
//!
//! Pure: this module knows nothing of the host.

use std::io;

use super::Error;

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

impl Error {
    /// Returns the kind: what a caller can do about this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Invalid { .. } | Error::WrongFormat { .. } | Error::NotRecursive { .. } => {
                ErrorKind::InvalidInput
            }
            #[cfg(feature = "vmfile")]
            Error::Vmfile(error) => error.kind(),
            Error::AlreadyExists { .. } | Error::Foreign { .. } => ErrorKind::AlreadyExists,
            Error::Step { .. }
            | Error::CloudInit { .. }
            | Error::GuestProgram { .. }
            | Error::GuestUser { .. } => ErrorKind::Guest,
            Error::NotFound { .. } | Error::NoLogin { .. } | Error::Unknown { .. } => ErrorKind::NotFound,
            Error::Transition(_) | Error::Ended { .. } | Error::NotLive { .. } => ErrorKind::InvalidState,
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::UnknownBackend { .. } | Error::Host { .. } | Error::OtherUser { .. } => ErrorKind::Host,
            Error::Busy { .. } | Error::ImageInUse { .. } | Error::SameVm { .. } => ErrorKind::Busy,
            Error::TimedOut { .. } => ErrorKind::TimedOut,
            Error::Record { .. } | Error::Misplaced { .. } => ErrorKind::Record,
            Error::QemuExited { .. } => ErrorKind::Hypervisor,
            Error::Refused { peer, .. } | Error::Protocol { peer, .. } if peer.is_in_guest() => {
                ErrorKind::Guest
            }
            Error::Refused { .. } | Error::Protocol { .. } => ErrorKind::Hypervisor,
            Error::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull
                | io::ErrorKind::QuotaExceeded
                | io::ErrorKind::ReadOnlyFilesystem
                | io::ErrorKind::PermissionDenied => ErrorKind::Host,
                _ => ErrorKind::Io,
            },
            Error::Ssh { .. } | Error::HostKey { .. } | Error::LoginRefused { .. } => ErrorKind::Guest,
            Error::Copy { kind, .. } | Error::CopyPart { kind, .. } | Error::Backend { kind, .. } => *kind,
            Error::Fetch { status: Some(404 | 410), .. } => ErrorKind::NotFound,
            Error::Fetch { .. } | Error::Untrusted { .. } => ErrorKind::Remote,
        }
    }
}
