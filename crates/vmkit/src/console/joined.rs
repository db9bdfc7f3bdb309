//! Joining a console's log and its socket, so that each byte comes exactly once.
//!
//! QEMU sends the guest's output to the console's client first, and then to the log. It does not
//! report when it has accepted a client. So the end of the log may also be in the socket:
//!
//! ```text
//!  log   ───────────────────┐
//!  socket          ┌────────┴─────────▶
//!                  accepted  overlap
//! ```
//!
//! Both are read until neither grows for a moment: then the log contains all that was sent. For a
//! guest that never pauses, the longest overlap counts.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::ConsoleTurn;
use super::turn::ConsoleClient;
use crate::boundedlog::{tail_of_log, tail_of_log_since};
use crate::error::{Error, Result};
use crate::log_position::LogPosition;

/// How much of the log is compared with the socket, in bytes.
const COMPARED_BYTES: u64 = 2 << 20;
/// How much is read from the socket before it is compared with the log, in bytes.
const MOST_SENT_BYTES: usize = 1 << 20;
/// The pause in the output after which the guest is regarded as silent; there is no event for that.
const PAUSE: Duration = Duration::from_millis(10);
/// How long to wait for such a pause, and for the client to be accepted.
const PAUSE_LIMIT: Duration = Duration::from_secs(1);

/// The log of a console, and which part of it to return.
#[derive(Debug, Clone, Copy)]
pub struct ConsoleLog<'a> {
    /// The log.
    pub path: &'a Path,
    /// Where to start.
    pub since: Option<LogPosition>,
    /// The maximum length, in bytes, up to the log's end.
    pub most_bytes: u64,
}

/// A console with its output so far.
#[derive(Debug)]
pub struct JoinedConsole {
    /// The output in the log.
    pub past: Vec<u8>,
    /// The output after that, as far as it was read from the socket.
    pub said: Vec<u8>,
    /// The socket, in non-blocking mode.
    pub stream: UnixStream,
}

impl ConsoleTurn {
    /// Connects to the console, and reads its output so far from its log: each byte once, in order,
    /// without a gap to what comes from the socket.
    ///
    /// Blocks until the guest pauses for a moment, at most a second.
    ///
    /// # Errors
    /// `Busy` if the console serves a client that has not taken its turn, and others wait; `Io` if
    /// it can't be reached, or the log can't be read.
    pub fn join(&self, log: Option<ConsoleLog>) -> Result<JoinedConsole> {
        self.client().join(log)
    }
}

impl ConsoleClient {
    /// Connects to the console as [`ConsoleTurn::join`] does, with or without a turn.
    pub(crate) fn join(&self, log: Option<ConsoleLog>) -> Result<JoinedConsole> {
        let Some(log) = log else {
            return Ok(JoinedConsole { past: Vec::new(), said: Vec::new(), stream: self.connected()? });
        };
        let failed = || Error::io("read", log.path);
        let before = LogPosition::end_of(log.path).map_err(failed())?;
        let stream = self.connected()?;
        let deadline = Instant::now() + PAUSE_LIMIT;
        let (mut past, mut said) = (Vec::new(), Vec::new());
        loop {
            let known = (past.len(), said.len());
            // Read without a pause: QEMU logs a byte twice if its client can't take it at once.
            let mut is_open = true;
            while is_open
                && said.len() < MOST_SENT_BYTES
                && Instant::now() < deadline
                && comes(&stream).map_err(Error::io("wait at", self.socket()))?
            {
                is_open = read_some(&stream, &mut said).map_err(Error::io("read", self.socket()))?;
            }
            past = log.tail().map_err(failed())?;
            // Read in this order: what is in the log by now was sent before.
            is_open &= read_some(&stream, &mut said).map_err(Error::io("read", self.socket()))?;
            let is_silent = known == (past.len(), said.len()) && !self.is_waiting();
            let added = added_since(log.path, before.as_ref()).map_err(failed())?;
            let overlap = overlap(&past, &said, added);
            if (is_silent && overlap.is_whole)
                || !is_open
                || said.len() >= MOST_SENT_BYTES
                || Instant::now() >= deadline
            {
                past.truncate(past.len() - overlap.logged_bytes);
                let surplus = past.len() as u64 - log.most_bytes.min(past.len() as u64);
                past.drain(..usize::try_from(surplus).unwrap_or(0));
                return Ok(JoinedConsole { past, said, stream });
            }
        }
    }

    /// Connects without waiting: with a full queue and no process that accepts, `connect` would
    /// block forever.
    fn connected(&self) -> Result<UnixStream> {
        let failed = |errno: Errno| Error::io("connect to", self.socket())(errno.into());
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let address = SocketAddrUnix::new(self.socket()).map_err(failed)?;
        match connect(&socket, &address) {
            Ok(()) => Ok(socket.into()),
            Err(Errno::AGAIN) => Err(self.busy()),
            Err(errno) => Err(failed(errno)),
        }
    }
}

impl ConsoleLog<'_> {
    fn tail(&self) -> io::Result<Vec<u8>> {
        let most = self.most_bytes.saturating_add(COMPARED_BYTES);
        match &self.since {
            Some(since) => tail_of_log_since(self.path, since, most),
            None => tail_of_log(self.path, most),
        }
    }
}

fn added_since(log: &Path, before: Option<&LogPosition>) -> io::Result<usize> {
    let added = match before {
        Some(before) => tail_of_log_since(log, before, COMPARED_BYTES),
        None => tail_of_log(log, COMPARED_BYTES),
    };
    added.map(|added| added.len())
}

/// Reads the available output; returns false at the end.
fn read_some(mut stream: &UnixStream, said: &mut Vec<u8>) -> io::Result<bool> {
    let mut chunk = vec![0; 64 << 10];
    while said.len() < MOST_SENT_BYTES {
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(false),
            Ok(bytes) => said.extend_from_slice(&chunk[..bytes]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// The overlap of the end of a log and the start of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Overlap {
    /// How many bytes at the end of the log were also sent.
    logged_bytes: usize,
    /// Whether the log contains all that was sent.
    is_whole: bool,
}

/// Returns the longest overlap of what was sent and the last `added` bytes of the log.
///
/// QEMU logs a byte again each time that its client can't take it. So both are compared as runs of
/// one byte, whatever the length of a run.
fn overlap(past: &[u8], said: &[u8], added: usize) -> Overlap {
    let recent = &past[past.len() - past.len().min(added)..];
    let (logged, sent) = (runs(recent), runs(said));
    let matched = longest_overlap(&logged, &sent);
    let Some((first, others)) = logged[logged.len() - matched..].split_first() else {
        return Overlap { logged_bytes: 0, is_whole: said.is_empty() };
    };
    // The part beyond the first run that was sent was before the client.
    let first_bytes = first.bytes.len().min(sent[0].bytes.len());
    let last_logged = others.last().map_or(first_bytes, |run| run.bytes.len());
    Overlap {
        logged_bytes: first_bytes + others.iter().map(|run| run.bytes.len()).sum::<usize>(),
        is_whole: matched == sent.len() && last_logged >= sent[matched - 1].bytes.len(),
    }
}

/// One byte and its immediate repetitions.
struct Run<'a> {
    bytes: &'a [u8],
}

impl PartialEq for Run<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.bytes[0] == other.bytes[0]
    }
}

fn runs(bytes: &[u8]) -> Vec<Run<'_>> {
    bytes.chunk_by(|a, b| a == b).map(|bytes| Run { bytes }).collect()
}

/// Returns the length of the longest end of `log` that `sent` starts with, by Knuth, Morris and
/// Pratt: a guest controls both, so the time must not grow quadratically.
fn longest_overlap<T: PartialEq>(log: &[T], sent: &[T]) -> usize {
    let advance = |shorter: &[usize], mut matched: usize, next: &T| {
        while matched > 0 && sent.get(matched) != Some(next) {
            matched = shorter[matched - 1];
        }
        matched + usize::from(sent.get(matched) == Some(next))
    };
    let mut shorter = vec![0; sent.len()];
    for at in 1..sent.len() {
        shorter[at] = advance(&shorter, shorter[at - 1], &sent[at]);
    }
    log.iter().fold(0, |matched, next| advance(&shorter, matched, next))
}

/// Waits for further output; returns false if the guest pauses.
fn comes(stream: &UnixStream) -> io::Result<bool> {
    let pause = Timespec::try_from(PAUSE).map_err(io::Error::other)?;
    match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&pause)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::thread::sleep;

    use super::*;
    use crate::boundedlog::BoundedLog;
    use crate::spec::VmName;

    #[test]
    fn bytes_in_both_the_log_and_the_socket_are_returned_once() {
        let of = |past: &str, said: &str, added| {
            let overlap = overlap(past.as_bytes(), said.as_bytes(), added);
            (overlap.logged_bytes, overlap.is_whole)
        };
        assert_eq!(of("boot login: ", "login: ", 12), (7, true));
        assert_eq!(of("boot login: ", "login: ", 0), (0, false), "no output since");
        assert_eq!(of("boot log", "login: ", 8), (3, false));
        assert_eq!(of("boot ", "login: ", 5), (0, false));
        assert_eq!(of("boot ", "", 5), (0, true));
        assert_eq!(of("....", "..", 2), (2, true));
        assert_eq!(of("....", "..", 4), (2, true), "the longer run began before the client");
        assert_eq!(of("..", "...", 2), (2, false));
        assert_eq!(of("abab", "ababab", 4), (4, false));
        assert_eq!(of("ababab", "abab", 6), (4, true));
    }

    #[test]
    fn a_byte_that_is_logged_twice_hides_no_overlap() {
        let said: String = (100..200).map(|line| format!("\r\nline {line}")).collect::<String>() + "\r\n";
        for doubled in ["\r\nline 100", "line 150", "line 199\r\n"] {
            for (at, byte) in doubled.char_indices().skip(1) {
                let mut twice = doubled.to_owned();
                twice.insert(at, byte);
                let log = format!("boot\r\n{}", said.replace(doubled, &twice));
                let found = overlap(log.as_bytes(), said.as_bytes(), log.len());
                assert_eq!(found, Overlap { logged_bytes: said.len() + 1, is_whole: true }, "{twice:?}");
            }
        }
    }

    #[test]
    fn output_during_the_attachment_is_neither_lost_nor_doubled() {
        let dir = tempfile::tempdir().unwrap();
        let (path, socket) = (dir.path().join("console.log"), dir.path().join("console.sock"));
        let listener = UnixListener::bind(&socket).unwrap();
        let guest = std::thread::spawn({
            let path = path.clone();
            move || {
                listener.set_nonblocking(true).unwrap();
                let mut log = BoundedLog::open(&path, 4 << 20).unwrap();
                let mut client: Option<UnixStream> = None;
                for line in 0..400 {
                    // As QEMU does: a client is accepted between two lines, and gets a line before
                    // the log.
                    client = client.or_else(|| listener.accept().ok().map(|(client, _)| client));
                    let text = format!("line {line}\r\n");
                    client.iter().for_each(|mut client| client.write_all(text.as_bytes()).unwrap());
                    if line % 7 == 0 {
                        sleep(Duration::from_millis(3));
                    }
                    log.append(text.as_bytes());
                }
            }
        });
        sleep(Duration::from_millis(20));
        let turn = ConsoleTurn::take(&VmName::new("web").unwrap(), &socket).unwrap();
        let log = ConsoleLog { path: &path, since: None, most_bytes: 1 << 20 };
        let JoinedConsole { past, said, mut stream } = turn.join(Some(log)).unwrap();
        stream.set_nonblocking(false).unwrap();
        let mut all = [past, said].concat();
        stream.read_to_end(&mut all).unwrap();
        guest.join().unwrap();
        assert_eq!(String::from_utf8_lossy(&all), std::fs::read_to_string(&path).unwrap());
    }
}
