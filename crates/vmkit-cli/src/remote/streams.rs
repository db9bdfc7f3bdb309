//! This process's streams, read and written by threads: files and terminals can't be polled by the
//! event loop.

use std::io::{self, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::thread;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::oneshot;
use vmkit::Error;

use crate::failure::Failure;

/// The most that is read at once.
const PIECE_BYTES: usize = 32 << 10;
/// How many pieces are buffered for the slower side.
const PIECES: usize = 4;

/// Runs `work` on a thread of its own.
fn on_thread(what: &'static str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let begun = thread::Builder::new().name("vmkit-stream".to_owned()).spawn(work);
    begun.map(drop).map_err(Error::io("begin", format!("a thread that {what}")))
}

/// Standard input, read by a thread that ends with the process: its read can't be interrupted.
#[derive(Debug)]
pub(super) struct StdinThread(Receiver<Vec<u8>>);

impl StdinThread {
    /// Starts to read.
    ///
    /// # Errors
    /// `Io` if no thread can be created.
    pub(super) fn of_stdin() -> Result<Self, Error> {
        let (sender, receiver) = channel(PIECES);
        on_thread("reads standard input", move || {
            let mut piece = vec![0; PIECE_BYTES];
            loop {
                match io::stdin().read(&mut piece) {
                    Ok(bytes) if bytes > 0 => {
                        if sender.blocking_send(piece[..bytes].to_vec()).is_err() {
                            return;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    // Reading a terminal that is gone fails.
                    Ok(_) | Err(_) => return,
                }
            }
        })?;
        Ok(Self(receiver))
    }

    /// Waits for room in `to`, and then for the next piece; returns nothing at the end, and never
    /// returns if there is no reader.
    ///
    /// # Cancel safety
    /// A dropped call loses nothing.
    pub(super) async fn next<T>(reader: &mut Option<Self>, to: Sender<T>) -> Option<Vec<u8>> {
        let Some(reader) = reader else { return std::future::pending().await };
        // The previous piece has to be consumed first.
        let Ok(_room) = to.reserve().await else { return std::future::pending().await };
        reader.0.recv().await
    }
}

/// Standard input as a reader, with a thread that ends with the process.
///
/// Not Tokio's own: its event loop would wait at the end for a read that can't be interrupted.
#[derive(Debug)]
pub(crate) struct StdinStream {
    pieces: Receiver<io::Result<Vec<u8>>>,
    /// The rest of the last piece.
    left: io::Cursor<Vec<u8>>,
}

impl StdinStream {
    /// Starts to read.
    ///
    /// # Errors
    /// `Io` if no thread can be created.
    pub(crate) fn new() -> Result<Self, Error> {
        let (sender, pieces) = channel(PIECES);
        on_thread("reads standard input", move || {
            loop {
                let mut piece = vec![0; PIECE_BYTES];
                let read = match io::stdin().read(&mut piece) {
                    Ok(0) => return,
                    Ok(bytes) => {
                        piece.truncate(bytes);
                        Ok(piece)
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let is_last = read.is_err();
                if sender.blocking_send(read).is_err() || is_last {
                    return;
                }
            }
        })?;
        Ok(Self { pieces, left: io::Cursor::default() })
    }
}

impl AsyncRead for StdinStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.left.position() == self.left.get_ref().len() as u64 {
            match ready!(self.pieces.poll_recv(context)) {
                None => return Poll::Ready(Ok(())),
                Some(piece) => self.left = io::Cursor::new(piece?),
            }
        }
        Pin::new(&mut self.left).poll_read(context, buffer)
    }
}

/// Standard output and standard error, written in the order of arrival.
#[derive(Debug)]
pub(super) struct OutputThread {
    pieces: Option<Sender<(bool, Vec<u8>)>>,
    ended: oneshot::Receiver<io::Result<()>>,
}

impl OutputThread {
    /// Starts to write.
    ///
    /// # Errors
    /// `Io` if no thread can be created.
    pub(super) fn new() -> Result<Self, Error> {
        let (sender, mut receiver) = channel::<(bool, Vec<u8>)>(PIECES);
        let (tell, ended) = oneshot::channel();
        on_thread("writes the output", move || {
            let mut write = || {
                while let Some((is_error, piece)) = receiver.blocking_recv() {
                    if is_error {
                        io::stderr().write_all(&piece)?;
                    } else {
                        let mut stdout = io::stdout().lock();
                        stdout.write_all(&piece).and_then(|()| stdout.flush())?;
                    }
                }
                Ok(())
            };
            let written = write();
            drop(receiver);
            // The receiver is gone if the process is ending.
            let _ = tell.send(written);
        })?;
        Ok(Self { pieces: Some(sender), ended })
    }

    /// Queues a piece, as soon as there is room.
    ///
    /// # Errors
    /// `Output` if an earlier piece could not be written.
    pub(super) async fn write(&mut self, is_error: bool, piece: Vec<u8>) -> Result<(), Failure> {
        let pieces = self.pieces.as_ref().expect("only the last method takes it");
        match pieces.send((is_error, piece)).await {
            Ok(()) => Ok(()),
            Err(_) => self.finish().await,
        }
    }

    /// Waits until all pieces are written.
    ///
    /// # Errors
    /// `Output` if one can't be written.
    pub(super) async fn finish(&mut self) -> Result<(), Failure> {
        self.pieces = None;
        let written = (&mut self.ended).await;
        written
            .unwrap_or_else(|_| Err(io::Error::other("the writing thread is gone")))
            .map_err(Failure::Output)
    }
}
