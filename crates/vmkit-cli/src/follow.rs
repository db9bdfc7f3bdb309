//! A log of the library, printed and followed.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tokio::sync::oneshot;
use vmkit::{Error, LogPosition, LogReader};

use crate::context::CommandContext;
use crate::failure::Failure;
use crate::output;

/// What of a log is printed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogRange {
    /// What was written since; without it, all that is kept.
    pub(crate) since: Option<LogPosition>,
    /// The number of last lines to print of that.
    pub(crate) tail: Option<usize>,
}

/// Prints a part of a log.
///
/// # Errors
/// `Io` if it can't be read. A log that is not there yet is empty.
pub(crate) fn print(log: &Path, part: LogRange) -> Result<(), Failure> {
    let mut reader = open(log, part)?;
    loop {
        match reader.read()? {
            chunk if chunk.is_empty() => return Ok(()),
            chunk => output::bytes(&chunk)?,
        }
    }
}

/// Prints a part of a log, and what is added from now on, until its directory is removed or
/// standard output is closed.
///
/// # Errors
/// As for [`print`].
pub(crate) fn follow(context: &CommandContext, log: &Path, part: LogRange) -> Result<(), Failure> {
    context.block_on(async {
        let mut reader = open(log, part)?;
        let mut closed = closed_output()?;
        loop {
            let chunk = tokio::select! {
                chunk = reader.next() => chunk?,
                _ = &mut closed => None,
            };
            match chunk {
                Some(chunk) => output::bytes(&chunk)?,
                None => return Ok(()),
            }
        }
    })
}

fn open(log: &Path, part: LogRange) -> Result<LogReader, Error> {
    let mut reader = LogReader::open(log, part.since.as_ref())?;
    if let Some(lines) = part.tail {
        reader.skip_to_last_lines(lines)?;
    }
    Ok(reader)
}

/// Returns the event that standard output was closed, by a thread that waits for it as long as this
/// process lives: what standard output is may be none of the event loop's.
fn closed_output() -> Result<oneshot::Receiver<()>, Error> {
    let (closed, event) = oneshot::channel();
    let wait = move || {
        let stdout = io::stdout();
        let mut polled = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty())];
        while matches!(poll(&mut polled, None), Err(Errno::INTR)) {}
        if polled[0].revents().contains(PollFlags::ERR) {
            let _ = closed.send(());
        } else {
            // Not an event of a closed pipe: nothing more is known of this output.
            std::mem::forget(closed);
        }
    };
    let started = thread::Builder::new().name("vmkit-output".into()).spawn(wait);
    started.map(|_| event).map_err(Error::io("watch", "standard output"))
}
