//! The kind of each error.
//!
//! Pure: this module knows nothing of the host.

use std::io;

use super::{Error, ErrorKind};

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
            Error::Record { .. } | Error::Misplaced { .. } | Error::VmPart { .. } => ErrorKind::Record,
            Error::NotContinued { source } => source.kind(),
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
