//! Where a session goes to, and as whom.

use std::fmt;
use std::net::SocketAddr;

use super::{HostKey, SshIdentity};

/// Everything that is needed to log in to one guest.
#[derive(Debug, Clone)]
pub struct SshTarget {
    /// What errors call the guest: the VM's name.
    pub name: String,
    /// Where its SSH server is reached.
    pub address: SocketAddr,
    /// The user to log in as.
    pub user: String,
    /// The key to log in with.
    pub identity: SshIdentity,
    /// What the server has to prove itself with.
    pub host_key: HostKey,
}

/// What the caller wants instead of the VM's record.
#[derive(Debug, Clone, Default)]
pub struct LoginOptions {
    /// The user to log in as; vmkit's own where none is given.
    pub user: Option<String>,
    /// The key to log in with; vmkit's own where none is given.
    pub identity: Option<SshIdentity>,
    /// What the server has to prove itself with; the key in the VM's record where none is given.
    pub host_key: Option<HostKey>,
}

impl fmt::Display for SshTarget {
    /// Writes it as errors have it, such as `vmkit@web (127.0.0.1:2222)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{} ({})", self.user, self.name, self.address)
    }
}
