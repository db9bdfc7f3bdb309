//! A console that is attached: [`AttachedConsole`].
//!
//! Edge: a socket. What a QEMU serves is the socket itself; what a server serves elsewhere is
//! carried to one by its backend.

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

/// How much is kept of what was said and not read, before the older half goes: a guest that floods
/// its console fills no memory.
const MOST_UNREAD_BYTES: usize = 8 << 20;
/// How much is read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// A VM's serial console, attached: what the guest says is read from it, and what is written to it
/// is typed.
///
/// It begins with what this run of the VM has said before, the last MiB of it, as far as the
/// backend tells runs apart, and each byte comes once. Dropping it leaves the console to others.
///
/// # Examples
/// ```no_run
/// # async fn example(manager: vmkit::VmManager<vmkit::QemuHypervisor>) -> vmkit::Result<()> {
/// let name = vmkit::spec::VmName::new("web")?;
/// let mut console = manager.attach_console(&name).await?;
/// let timeout = std::time::Duration::from_secs(60);
/// console.wait_for("login: ", timeout).await?;
/// console.send("root\n", timeout).await?;
/// let said = console.wait_for("# ", timeout).await?;
/// # drop(said); Ok(()) }
/// ```
pub struct AttachedConsole {
    vm: VmName,
    stream: UnixStream,
    /// What was said and not read yet.
    unread: Vec<u8>,
    /// How much of that was there when something was typed last.
    old: usize,
    turn: Option<ConsoleTurn>,
    /// Asks how the VM is once its console has closed.
    end: Box<dyn Fn() -> StateQuery + Send + Sync>,
}

impl AttachedConsole {
    /// Creates one of the stream, what was printed before it, and how to learn of the VM's end.
    pub(crate) fn new(
        vm: VmName,
        stream: UnixStream,
        unread: Vec<u8>,
        turn: Option<ConsoleTurn>,
        end: Box<dyn Fn() -> StateQuery + Send + Sync>,
    ) -> Self {
        Self { vm, stream, unread, old: 0, turn, end }
    }

    /// Reads until the guest has said this, and returns what was said up to there, with it; of very
    /// much, at least the last 4 MiB.
    ///
    /// What comes behind it is read next. Only what has come after the last [`send`](Self::send) is
    /// searched: an answer is waited for, and not the same text that stood there before.
    ///
    /// # Cancel safety
    /// What was read stays, and is looked at again.
    ///
    /// # Errors
    /// `TimedOut` with the console's last lines; `InvalidState` with them where the VM ends; `Busy`
    /// where the console is served to somebody who has not taken a [`ConsoleTurn`]; `Io`. What was
    /// read stays.
    pub async fn wait_for(&mut self, text: &str, timeout: Duration) -> Result<Vec<u8>> {
        let (begun, deadline) = (Instant::now(), later(timeout));
        let awaited = || format!("{text:?} on the console of the VM `{}`", self.vm);
        let awaited = awaited();
        // What was looked at is not looked at again, but for the beginning of what may be the text.
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
                        // One that has failed is not what is waited for, and has come to its end as
                        // well.
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

    /// Types this.
    ///
    /// # Errors
    /// `TimedOut` where the guest does not take it; `Io` where the console has closed. What was
    /// typed before stays so.
    pub async fn send(&mut self, typed: impl AsRef<[u8]>, timeout: Duration) -> Result<()> {
        let (begun, deadline) = (Instant::now(), later(timeout));
        self.hear_all();
        match timeout_at(deadline, self.stream.write_all(typed.as_ref())).await {
            Ok(sent) => sent.map_err(|error| self.failed("write to", error)),
            Err(_) => {
                let awaited =
                    format!("the guest to take what is typed on the console of the VM `{}`", self.vm);
                Err(Error::TimedOut { awaited, after: begun.elapsed(), console: last_lines(&self.unread) })
            }
        }
    }

    /// Drops the first of what is unread where that is too much.
    fn bound(&mut self, kept: usize) {
        if self.unread.len() > MOST_UNREAD_BYTES {
            let gone = self.unread.len().saturating_sub(kept);
            self.unread.drain(..gone);
            self.old = self.old.saturating_sub(gone);
        }
    }

    /// Reads what has come so far: whatever is typed next, this is no answer to it.
    fn hear_all(&mut self) {
        let mut chunk = vec![0; CHUNK_BYTES];
        // Of a guest that floods, no more than what is kept.
        for _ in 0..MOST_UNREAD_BYTES / CHUNK_BYTES {
            // An end and an error are found by the next read.
            let Ok(bytes @ 1..) = rustix::io::read(&self.stream, &mut chunk) else { break };
            self.unread.extend_from_slice(&chunk[..bytes]);
        }
        self.bound(MOST_UNREAD_BYTES / 2);
        self.old = self.unread.len();
    }

    /// Reads what comes next, and returns how much it is; 0 where the console has closed.
    async fn hear(&mut self) -> io::Result<usize> {
        match (&mut self.stream).take(CHUNK_BYTES as u64).read_buf(&mut self.unread).await {
            // A socket whose other end died with input that it had not read.
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

/// A question for a VM's state.
pub(crate) type StateQuery = Pin<Box<dyn Future<Output = Result<VmState>> + Send>>;

/// Returns where the text begins.
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
    async fn what_was_said_before_something_was_typed_is_no_answer_to_it() {
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
    async fn a_guest_that_floods_its_console_fills_no_memory_and_is_still_heard() {
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
