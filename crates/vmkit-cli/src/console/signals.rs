//! Signals that end this process, as something to poll.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::{flag, low_level};

/// The signals that end a process and leave it the time to tidy up.
const ENDING: [i32; 4] = [SIGHUP, SIGINT, SIGQUIT, SIGTERM];

/// The signals caught from now on; readable once there is one.
#[derive(Debug)]
pub(super) struct Signals {
    pipe: UnixStream,
    last: Arc<AtomicUsize>,
}

impl Signals {
    /// Catches the signals that end a process.
    pub(super) fn catch() -> io::Result<Self> {
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

    /// Answers the signal that was caught, if one was.
    pub(super) fn caught(&mut self) -> Option<i32> {
        let _ = self.pipe.read(&mut [0; 16]);
        i32::try_from(self.last.load(Ordering::SeqCst)).ok().filter(|&signal| signal != 0)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

/// Ends this process as the signal would have, so that whoever waits for it sees the signal.
pub(super) fn die_of(signal: i32) {
    // It fails only for a signal that does not exist.
    let _ = low_level::emulate_default_handler(signal);
}
