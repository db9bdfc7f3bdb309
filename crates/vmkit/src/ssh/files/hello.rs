//! The beginning of SFTP, found behind what a guest's login shell prints first.
//!
//! A server that runs SFTP as a program runs it by the user's login shell, whose start-up files may
//! print. OpenSSH's own client takes that for a packet ("Received message too long 1460865107").
//! Here all is passed over until the first packet of the server.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::ssh::noise::first_line;

/// How much is passed over at most, in bytes.
const MOST_NOISE: usize = 256 << 10;
/// The bytes from a packet's length to the version in it.
const HEAD: usize = 9;
/// The longest first packet that is taken for one, in bytes: a version and the names of extensions.
const MOST_HELLO: u32 = 64 << 10;

/// What was said before SFTP began.
#[derive(Debug, Clone, Default)]
pub(super) struct SftpPreface(Arc<Mutex<Vec<u8>>>);

impl SftpPreface {
    /// Returns its first line; nothing where nothing was said.
    pub(super) fn first_line(&self) -> String {
        first_line(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note(&self, words: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let room = 400usize.saturating_sub(kept.len()).min(words.len());
        kept.extend_from_slice(&words[..room]);
    }
}

/// A stream that begins with the server's first packet, whatever came before.
pub(super) struct AfterPreface<S> {
    stream: S,
    preface: SftpPreface,
    /// What was read, and is not known to be noise or has not been handed over.
    held: Vec<u8>,
    passed_over: usize,
    has_begun: bool,
}

impl<S> AfterPreface<S> {
    pub(super) fn new(stream: S, preface: SftpPreface) -> Self {
        Self { stream, preface, held: Vec::new(), passed_over: 0, has_begun: false }
    }

    /// Looks for the first packet in what is held, and drops what certainly lies before.
    fn look(&mut self) {
        let at = self.held.windows(HEAD).position(is_hello);
        let noise = at.unwrap_or(self.held.len().saturating_sub(HEAD - 1));
        self.preface.note(&self.held[..noise]);
        self.held.drain(..noise);
        self.passed_over += noise;
        self.has_begun = at.is_some();
    }
}

/// Checks whether these bytes are the head of `SSH_FXP_VERSION`. Source:
/// draft-ietf-secsh-filexfer-02, 3 and 4.
fn is_hello(head: &[u8]) -> bool {
    const VERSION: u8 = 2;
    let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    (5..=MOST_HELLO).contains(&number(0)) && head[4] == VERSION && (1..=6).contains(&number(5))
}

impl<S: AsyncRead + Unpin> AsyncRead for AfterPreface<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.has_begun {
            let mut room = [0; 4096];
            let mut piece = ReadBuf::new(&mut room);
            ready!(Pin::new(&mut self.stream).poll_read(context, &mut piece))?;
            if piece.filled().is_empty() || self.passed_over > MOST_NOISE {
                let rest = std::mem::take(&mut self.held);
                self.preface.note(&rest);
                return Poll::Ready(Ok(()));
            }
            self.held.extend_from_slice(piece.filled());
            self.look();
        }
        if self.held.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        let taken = self.held.len().min(buffer.remaining());
        buffer.put_slice(&self.held[..taken]);
        self.held.drain(..taken);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AfterPreface<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    /// The first packet, with one extension, and what comes after.
    const HELLO: &[u8] = b"\0\0\0\x0d\x02\0\0\0\x03\0\0\0\x01a\0\0\0and more";

    async fn read(said: &[u8], chunk: usize) -> (Vec<u8>, String) {
        let (mut guest, host) = duplex(chunk);
        let preface = SftpPreface::default();
        let mut stream = AfterPreface::new(host, preface.clone());
        let said = said.to_vec();
        let writer = tokio::spawn(async move { guest.write_all(&said).await });
        let mut found = Vec::new();
        stream.read_to_end(&mut found).await.unwrap();
        drop(stream);
        let _ = writer.await.unwrap();
        (found, preface.first_line())
    }

    #[tokio::test]
    async fn what_comes_before_the_first_packet_is_passed_over_however_it_is_cut() {
        for noise in ["", "\0", "WELCOME\nto vmkit-web\n", "\0\0\0", &"x".repeat(20_000)] {
            for chunk in [1, 3, 10, 1 << 20] {
                let said = [noise.as_bytes(), HELLO].concat();
                let (found, words) = read(&said, chunk).await;
                assert_eq!(found, HELLO, "{chunk}");
                assert!(noise.trim_matches('\0').starts_with(&words), "{words:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_stream_without_a_packet_ends_and_its_first_bytes_are_kept() {
        let (found, words) = read(b"\nThis account is currently not available.\n", 7).await;
        assert_eq!(
            (found.as_slice(), words.as_str()),
            (&b""[..], "This account is currently not available.")
        );
        let (found, words) = read(&vec![b'y'; MOST_NOISE * 2], 1 << 16).await;
        assert_eq!((found.len(), words.len()), (0, 120), "noise has no end, and waiting has");
    }
}
