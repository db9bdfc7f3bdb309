//! Moves lines over a Unix socket, for QEMU's monitor and for the guest agent.
//!
//! What was read and what is not yet written are kept in [`LineStream`], not in the futures: each
//! may be dropped anywhere and not a byte is lost or sent twice.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::codec::{LineBuffer, MalformedLine, TooLong};
use crate::backend::qemu::layout::MAX_SOCKET_PATH_BYTES;
use crate::blocking::blocking;
use crate::error::{Error, Peer, Result};

/// How much is read at least in one go, in bytes.
const READ_BYTES: usize = 8 * 1024;

/// A connection that carries lines.
#[derive(Debug)]
pub(crate) struct LineStream {
    stream: UnixStream,
    incoming: LineBuffer,
    outgoing: Vec<u8>,
    peer: Peer,
}

impl LineStream {
    /// Wraps a connected stream; no line may have more than `line_limit` bytes, and errors call the
    /// other side `peer`.
    pub(crate) fn new(stream: UnixStream, peer: Peer, line_limit: usize) -> Self {
        Self { stream, incoming: LineBuffer::new(line_limit), outgoing: Vec::new(), peer }
    }

    /// Connects to the socket at `path`.
    pub(crate) async fn connect(
        path: &Path,
        peer: Peer,
        line_limit: usize,
        deadline: Instant,
    ) -> Result<Self> {
        let near = ShortSocketPath::to(path).map_err(Error::io("connect to", path))?;
        let stream = match UnixStream::connect(&near.path).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                connect_in_turn(&near.path, path, deadline).await
            }
            result => result.map_err(Error::io("connect to", path)),
        }?;
        Ok(Self::new(stream, peer, line_limit))
    }

    /// Appends to what will be written; nothing is, until [`flush`](Self::flush).
    pub(crate) fn queue(&mut self, bytes: &[u8]) {
        self.outgoing.extend_from_slice(bytes);
    }

    /// Forgets what was queued and not yet written.
    pub(crate) fn forget_unsent(&mut self) {
        self.outgoing.clear();
    }

    /// Writes what is queued.
    ///
    /// # Cancel safety
    /// What a dropped call left unwritten is written by the next one.
    pub(crate) async fn flush(&mut self) -> Result<()> {
        while !self.outgoing.is_empty() {
            let written = self.stream.write(&self.outgoing).await.map_err(|source| self.broke(source))?;
            self.outgoing.drain(..written);
        }
        Ok(())
    }

    /// Writes what is queued, with an open file that goes with its first byte.
    ///
    /// # Cancel safety
    /// A dropped call has sent the file with a part of the queue, or nothing at all.
    pub(crate) async fn flush_with(&mut self, file: BorrowedFd<'_>) -> Result<()> {
        loop {
            self.stream.writable().await.map_err(|source| self.broke(source))?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                let files = [file];
                control.push(SendAncillaryMessage::ScmRights(&files));
                let bytes = [IoSlice::new(&self.outgoing)];
                Ok(rustix::net::sendmsg(&self.stream, &bytes, &mut control, SendFlags::NOSIGNAL)?)
            });
            match sent {
                Ok(written) => {
                    self.outgoing.drain(..written);
                    return self.flush().await;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(source) => return Err(self.broke(source)),
            }
        }
    }

    /// Waits for the next line.
    ///
    /// # Cancel safety
    /// A dropped call loses nothing.
    ///
    /// # Errors
    /// `Protocol` when the peer closes the connection or sends a line beyond the limit.
    pub(crate) async fn line(&mut self) -> Result<Vec<u8>> {
        loop {
            match self.incoming.next_line() {
                Ok(Some(line)) => return Ok(line),
                Ok(None) => {}
                Err(TooLong { limit }) => {
                    return Err(self.problem(format!("sent a line of more than {limit} bytes")));
                }
            }
            let tail = self.incoming.tail();
            tail.reserve(READ_BYTES);
            match self.stream.read_buf(tail).await {
                Ok(0) => {
                    return Err(self.broke(io::ErrorKind::UnexpectedEof.into()));
                }
                Ok(_) => {}
                Err(source) => return Err(self.broke(source)),
            }
        }
    }

    /// Returns the error for something that the peer must not do.
    pub(crate) fn problem(&self, problem: impl Into<String>) -> Error {
        Error::protocol(self.peer, problem)
    }

    /// Returns the error for a line that is none of the protocol's.
    pub(crate) fn malformed(&self, line: MalformedLine) -> Error {
        let error = self.problem(line.problem);
        match line.source {
            Some(source) => error.with_source(source),
            None => error,
        }
    }

    fn broke(&self, source: io::Error) -> Error {
        Error::protocol(self.peer, "closed the connection").with_source(source)
    }
}

/// A path to a socket that is short enough to be bound or connected to, as long as this lives.
struct ShortSocketPath {
    path: PathBuf,
    _dir: Option<OwnedFd>,
}

impl ShortSocketPath {
    /// Finds one for this path: a long one by the descriptor of its directory.
    ///
    /// Source: unix(7), BUGS; proc_pid_fd(5).
    fn to(path: &Path) -> io::Result<Self> {
        if path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES {
            return Ok(Self { path: path.to_owned(), _dir: None });
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(parent, flags, Mode::empty())?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
        Ok(Self { path, _dir: Some(dir) })
    }
}

/// Binds a listening socket at this path, however long that is.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    UnixListener::bind(ShortSocketPath::to(path)?.path)
}

/// Waits for `future` until `deadline`.
///
/// # Errors
/// `TimedOut`, which says what was `awaited`.
pub(crate) async fn within<T>(
    deadline: Instant,
    awaited: impl FnOnce() -> String,
    future: impl Future<Output = Result<T>>,
) -> Result<T> {
    let start = Instant::now();
    match timeout_at(deadline, future).await {
        Ok(result) => result,
        Err(_) => Err(Error::timed_out(awaited(), start.elapsed())),
    }
}

/// Connects where so many wait already that the kernel refuses one more.
///
/// QEMU takes one client at a time and lets one more wait. Beyond that a connect that must not
/// block fails at once with EAGAIN, and no event tells when to try again; one that may block is
/// woken by the kernel, or by its send timeout. So it is made on a thread of its own; if this
/// future is dropped, it ends by itself at the deadline.
///
/// Source: unix(7), EAGAIN of connect(2); `SO_SNDTIMEO` in socket(7).
async fn connect_in_turn(near: &Path, path: &Path, deadline: Instant) -> Result<UnixStream> {
    let start = Instant::now();
    let address =
        SocketAddrUnix::new(near).map_err(io::Error::from).map_err(Error::io("connect to", path))?;
    // The kernel takes a timeout of zero for none at all.
    let timeout = deadline.saturating_duration_since(start).max(Duration::from_millis(1));
    let connecting = blocking(move || {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
        rustix::net::connect(&socket, &address)?;
        set_socket_timeout(&socket, Timeout::Send, None)?;
        io::Result::Ok(std::os::unix::net::UnixStream::from(socket))
    });
    let stream = match connecting.await? {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            let awaited = format!("a turn on {}, where other clients wait too", path.display());
            return Err(Error::timed_out(awaited, start.elapsed()));
        }
        result => result.map_err(Error::io("connect to", path))?,
    };
    stream.set_nonblocking(true).map_err(Error::io("connect to", path))?;
    UnixStream::from_std(stream).map_err(Error::io("connect to", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(100)
    }

    #[tokio::test]
    async fn a_line_half_read_by_a_dropped_call_is_whole_in_the_next() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut wire = LineStream::new(ours, Peer::Qemu, 100);
        theirs.write_all(b"hello, ").await.unwrap();
        let error = within(soon(), || "a line".into(), wire.line()).await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        theirs.write_all(b"world\n").await.unwrap();
        assert_eq!(wire.line().await.unwrap(), b"hello, world");
    }

    #[tokio::test]
    async fn bytes_half_written_by_a_dropped_call_are_written_once() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut wire = LineStream::new(ours, Peer::Qemu, 100);
        let sent = vec![b'x'; 4 * 1024 * 1024];
        wire.queue(&sent);
        assert!(within(soon(), || "room".into(), wire.flush()).await.is_err(), "nobody reads yet");
        let reader = tokio::spawn(async move {
            let mut found = Vec::new();
            theirs.read_to_end(&mut found).await.unwrap();
            found
        });
        wire.flush().await.unwrap();
        drop(wire);
        assert!(reader.await.unwrap() == sent);
    }

    #[tokio::test]
    async fn a_full_queue_of_clients_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _first = UnixStream::connect(&path).await.unwrap();
        assert_eq!(UnixStream::connect(&path).await.unwrap_err().kind(), io::ErrorKind::WouldBlock);

        let error = LineStream::connect(&path, Peer::Qemu, 100, soon()).await.unwrap_err();
        assert!(error.to_string().contains("a turn on"), "{error}");

        let waiting = tokio::spawn(async move {
            LineStream::connect(&path, Peer::Qemu, 100, Instant::now() + Duration::from_secs(20)).await
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        let _first_served = listener.accept().unwrap();
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_socket_at_a_long_path_works_and_its_missing_directory_is_named() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("d".repeat(150));
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("spare.sock");
        let listener = bind(&path).unwrap();
        LineStream::connect(&path, Peer::Qemu, 100, soon()).await.unwrap();
        listener.accept().unwrap();
        let missing = temp.path().join("x".repeat(150)).join("spare.sock");
        let error = LineStream::connect(&missing, Peer::Qemu, 100, soon()).await.unwrap_err().to_string();
        assert!(error.contains(missing.to_str().unwrap()), "{error}");
    }
}
