//! Signals of this process, as something to wait for.

use std::future::pending;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
use signal_hook::{flag, low_level};

/// The signals that end a process and leave it the time to tidy up.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// The signals caught from now on; readable once there is one.
#[derive(Debug)]
pub(crate) struct CaughtSignals {
    pipe: UnixStream,
    last: Arc<AtomicUsize>,
}

impl CaughtSignals {
    /// Catches the signals that end a process.
    pub(crate) fn catch() -> io::Result<Self> {
        let (pipe, bell) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        let last = Arc::new(AtomicUsize::new(0));
        for signal in ENDING {
            // In this order: who hears the bell finds the number.
            flag::register_usize(signal, Arc::clone(&last), signal.unsigned_abs() as usize)?;
            low_level::pipe::register(signal, bell.try_clone()?)?;
        }
        Ok(Self { pipe, last })
    }

    /// Returns the signal that was caught, if one was.
    pub(crate) fn caught(&mut self) -> Option<i32> {
        let _ = self.pipe.read(&mut [0; 16]);
        i32::try_from(self.last.load(Ordering::SeqCst)).ok().filter(|&signal| signal != 0)
    }

    /// Returns what rings at a signal, for an event loop.
    pub(crate) fn bell(&self) -> io::Result<tokio::net::UnixStream> {
        tokio::net::UnixStream::from_std(self.pipe.try_clone()?)
    }

    /// Waits for a signal, at the bell of these.
    pub(crate) async fn next(&mut self, bell: &tokio::net::UnixStream) -> i32 {
        loop {
            rung(bell).await;
            if let Some(signal) = self.caught() {
                return signal;
            }
        }
    }
}

impl AsFd for CaughtSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// The changes of the terminal's size from now on.
#[derive(Debug)]
pub(crate) struct ResizeSignals(tokio::net::UnixStream);

impl ResizeSignals {
    /// Listens to the signal that tells of them.
    pub(crate) fn catch() -> io::Result<Self> {
        let (pipe, bell) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        low_level::pipe::register(SIGWINCH, bell)?;
        Ok(Self(tokio::net::UnixStream::from_std(pipe)?))
    }

    /// Waits for the next signal; for ever if none is caught.
    pub(crate) async fn next(resizes: Option<&Self>) {
        match resizes {
            Some(Self(bell)) => rung(bell).await,
            None => pending().await,
        }
    }
}

/// Waits until it rings, and silences it.
async fn rung(bell: &tokio::net::UnixStream) {
    if bell.readable().await.is_err() {
        // An event loop that can't wait is about to end with its process.
        return pending().await;
    }
    while bell.try_read(&mut [0; 16]).is_ok_and(|bytes| bytes > 0) {}
}

/// Ends this process as the signal would have, so that its parent sees the signal.
pub(crate) fn die_of(signal: i32) {
    // It fails only for a signal that does not exist.
    let _ = low_level::emulate_default_handler(signal);
}

/// Returns what SSH calls a signal that ends a process.
pub(crate) fn name_of(signal: i32) -> Option<&'static str> {
    match signal {
        SIGHUP => Some("HUP"),
        SIGINT => Some("INT"),
        SIGQUIT => Some("QUIT"),
        SIGTERM => Some("TERM"),
        _ => None,
    }
}
