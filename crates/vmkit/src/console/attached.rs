//! A console with a client: [`AttachedConsole`].
//!
//! The backend provides a socket: QEMU's own, or one to which it copies the console of a server.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use super::lines::last_lines;
use super::turn::ConsoleTurn;
use crate::deadline::later;
use crate::error::{Error, Result};
use crate::lifecycle::VmState;
use crate::spec::VmName;

/// The maximum amount of unread output; beyond that, the older half is dropped, so that a guest
/// with endless output fills no memory.
const MOST_UNREAD_BYTES: usize = 8 << 20;
/// The size of one read.
const CHUNK_BYTES: usize = 16 << 10;

/// A VM's serial console: reads the guest's output, and writes to its input.
///
/// The output starts with that of this run so far, the last MiB of it, as far as the backend can
/// tell runs apart, and has each byte once. Dropping the console makes it available to others.
///
/// # Examples
/// ```no_run
/// # async fn example(manager: vmkit::VmManager<vmkit::QemuHypervisor>) -> vmkit::Result<()> {
/// let name = vmkit::spec::VmName::new("web")?;
/// let mut console = manager.attach_console(&name).await?;
/// let timeout = std::time::Duration::from_secs(60);
/// console.wait_for("login: ", timeout).await?;
/// console.send("root\n", timeout).await?;
/// let output = console.wait_for("# ", timeout).await?;
/// # drop(output); Ok(()) }
/// ```
pub struct AttachedConsole {
    vm: VmName,
    stream: UnixStream,
    /// Output that was not returned yet.
    unread: Vec<u8>,
    /// How much of it was there at the last `send`.
    old: usize,
    turn: Option<ConsoleTurn>,
    /// Queries the VM's state after its console was closed.
    end: Box<dyn Fn() -> StateQuery + Send + Sync>,
}

impl AttachedConsole {
    /// Creates a console from its stream, the output before that, and a query for the VM's state.
    pub(crate) fn new(
        vm: VmName,
        stream: UnixStream,
        unread: Vec<u8>,
        turn: Option<ConsoleTurn>,
        end: Box<dyn Fn() -> StateQuery + Send + Sync>,
    ) -> Self {
        Self { vm, stream, unread, old: 0, turn, end }
    }

    /// Reads until the guest has printed this text, and returns the output up to its end; if it is
    /// very long, at least the last 4 MiB.
    ///
    /// The next call continues behind it. Only output after the last [`send`](Self::send) is
    /// searched, so that the same text from before is not taken for a reply.
    ///
    /// # Cancel safety
    /// The output that was read is kept, and searched again.
    ///
    /// # Errors
    /// `TimedOut` with the console's last lines; `InvalidState` with them if the VM ends; `Busy` if
    /// the console serves a client that has not taken a [`ConsoleTurn`]; `Io`. The output that was
    /// read is kept.
    pub async fn wait_for(&mut self, text: &str, timeout: Duration) -> Result<Vec<u8>> {
        let (begun, deadline) = (Instant::now(), later(timeout));
        let awaited = || format!("{text:?} on the console of the VM `{}`", self.vm);
        let awaited = awaited();
        // What was searched is not searched again, but for a possible start of the text.
        let mut looked_at = self.old;
        loop {
            if let Some(at) = find(&self.unread[looked_at..], text.as_bytes()) {
                let rest = self.unread.split_off(looked_at + at + text.len());
                self.old = 0;
                return Ok(std::mem::replace(&mut self.unread, rest));
            }
            self.bound((MOST_UNREAD_BYTES / 2).max(text.len()));
            looked_at = self.unread.len().saturating_sub(text.len().saturating_sub(1)).max(self.old);
            match timeout_at(deadline, self.hear()).await {
                Ok(Ok(0)) => {
                    let console = last_lines(&self.unread);
                    let state = match timeout_at(deadline, (self.end)()).await {
                        // A VM that has failed has ended as well.
                        Ok(Ok(state) | Err(Error::Ended { state, .. })) => state,
                        Ok(Err(error)) => return Err(error),
                        Err(_) => return Err(Error::TimedOut { awaited, after: begun.elapsed(), console }),
                    };
                    return Err(Error::Ended { awaited, state, console });
                }
                Ok(heard) => drop(heard.map_err(|error| self.failed("read", error))?),
                Err(_) if self.turn.as_ref().is_some_and(ConsoleTurn::is_disregarded) => {
                    return Err(self.turn.as_ref().map(ConsoleTurn::busy).expect("it was just asked"));
                }
                Err(_) => {
                    let (after, console) = (begun.elapsed(), last_lines(&self.unread));
                    return Err(Error::TimedOut { awaited, after, console });
                }
            }
        }
    }

    /// Writes to the console's input.
    ///
    /// # Errors
    /// `TimedOut` if the guest does not read its input; `Io` if the console is closed. A part may
    /// have been written by then.
    pub async fn send(&mut self, typed: impl AsRef<[u8]>, timeout: Duration) -> Result<()> {
        let (begun, deadline) = (Instant::now(), later(timeout));
        self.hear_all();
        match timeout_at(deadline, self.stream.write_all(typed.as_ref())).await {
            Ok(sent) => sent.map_err(|error| self.failed("write to", error)),
            Err(_) => {
                let awaited = format!("the guest to read the input of the console of the VM `{}`", self.vm);
                Err(Error::TimedOut { awaited, after: begun.elapsed(), console: last_lines(&self.unread) })
            }
        }
    }

    /// Drops the start of the unread output if there is too much.
    fn bound(&mut self, kept: usize) {
        if self.unread.len() > MOST_UNREAD_BYTES {
            let gone = self.unread.len().saturating_sub(kept);
            self.unread.drain(..gone);
            self.old = self.old.saturating_sub(gone);
        }
    }

    /// Reads the output so far, which can't be a reply to the next input.
    fn hear_all(&mut self) {
        let mut chunk = vec![0; CHUNK_BYTES];
        // At most the amount that is kept, if the output is endless.
        for _ in 0..MOST_UNREAD_BYTES / CHUNK_BYTES {
            // The next read reports an end or an error.
            let Ok(bytes @ 1..) = rustix::io::read(&self.stream, &mut chunk) else { break };
            self.unread.extend_from_slice(&chunk[..bytes]);
        }
        self.bound(MOST_UNREAD_BYTES / 2);
        self.old = self.unread.len();
    }

    /// Reads the next output, and returns its length; 0 if the console is closed.
    async fn hear(&mut self) -> io::Result<usize> {
        match (&mut self.stream).take(CHUNK_BYTES as u64).read_buf(&mut self.unread).await {
            // The other end was closed with unread input.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(0),
            heard => heard,
        }
    }

    fn failed(&self, verb: &'static str, error: io::Error) -> Error {
        Error::io(verb, format!("the console of {}", self.vm))(error)
    }
}

impl AsyncRead for AttachedConsole {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.unread.is_empty() {
            return match ready!(Pin::new(&mut this.stream).poll_read(cx, into)) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Poll::Ready(Ok(())),
                read => Poll::Ready(read),
            };
        }
        let now = this.unread.len().min(into.remaining());
        into.put_slice(&this.unread[..now]);
        this.unread.drain(..now);
        this.old = this.old.saturating_sub(now);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for AttachedConsole {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, typed: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, typed)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

impl fmt::Debug for AttachedConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").field("vm", &self.vm).field("turn", &self.turn).finish_non_exhaustive()
    }
}

/// A query for a VM's state.
pub(crate) type StateQuery = Pin<Box<dyn Future<Output = Result<VmState>> + Send>>;

/// Returns the position of the text.
fn find(said: &[u8], text: &[u8]) -> Option<usize> {
    match text.len() {
        0 => Some(0),
        length => said.windows(length).position(|window| window == text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_before_an_input_is_no_reply_to_it() {
        let (stream, mut guest) = UnixStream::pair().unwrap();
        let end = Box::new(|| -> StateQuery { Box::pin(async { Ok(VmState::Stopped) }) });
        let vm = VmName::new("web").unwrap();
        let unread = b"login: login: ".to_vec();
        let mut console = AttachedConsole { vm, stream, unread, old: 0, turn: None, end };
        let soon = || Duration::from_secs(60);
        assert_eq!(console.wait_for("login: ", soon()).await.unwrap(), b"login: ");
        guest.write_all(b"lo").await.unwrap();
        console.send("root\r", soon()).await.unwrap();
        guest.write_all(b"gin: ").await.unwrap();
        let shortly = Duration::from_millis(50);
        assert!(matches!(console.wait_for("login: ", shortly).await, Err(Error::TimedOut { .. })));
        guest.write_all(b"login: $").await.unwrap();
        assert_eq!(console.wait_for("login: ", soon()).await.unwrap(), b"login: login: login: ");
        assert_eq!(console.wait_for("$", soon()).await.unwrap(), b"$");
    }

    #[tokio::test]
    async fn endless_output_fills_no_memory_and_is_still_searched() {
        let (stream, mut guest) = UnixStream::pair().unwrap();
        let end = Box::new(|| -> StateQuery { Box::pin(async { Ok(VmState::Stopped) }) });
        let vm = VmName::new("web").unwrap();
        let mut console = AttachedConsole { vm, stream, unread: Vec::new(), old: 0, turn: None, end };
        let flood = tokio::spawn(async move {
            let line = [b'.'; 64 << 10];
            for _ in 0..4 * MOST_UNREAD_BYTES / line.len() {
                guest.write_all(&line).await.unwrap();
            }
            guest.write_all(b"login: and more").await.unwrap();
        });
        let soon = Duration::from_secs(60);
        let said = console.wait_for("login: ", soon).await.unwrap();
        assert!(said.capacity() <= 3 * MOST_UNREAD_BYTES);
        assert!(said.ends_with(b".login: ") && said.len() <= MOST_UNREAD_BYTES + CHUNK_BYTES);
        flood.await.unwrap();
        console.wait_for("more", soon).await.unwrap();
        let ended = console.wait_for("never", soon).await.unwrap_err();
        assert!(matches!(ended, Error::Ended { state: VmState::Stopped, .. }), "{ended}");
    }
}
