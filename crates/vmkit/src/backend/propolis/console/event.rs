//! What happens to a console beside its words.
//!
//! Pure: data.

/// Why a console has nothing more to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsoleEnd {
    /// The VM has stopped.
    Stopped,
    /// The reader has left.
    Left,
}

/// What happens to a console beside its words.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConsoleEvent {
    /// The connection was lost; it is tried again.
    Lost,
    /// It is there again.
    Restored,
    /// The VM goes on at another server.
    Moved {
        /// Its address.
        server: std::net::SocketAddr,
    },
    /// The server no longer has what was said meanwhile.
    Missed {
        /// So many bytes.
        bytes: u64,
    },
}
