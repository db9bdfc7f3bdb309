//! What a running program says, read as it comes and with a deadline.

use std::io::Read;
use std::os::fd::AsFd;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};

/// More than anything takes here, even on a busy host.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// A stream with what was read of it.
pub(crate) struct Heard<R> {
    stream: R,
    pub(crate) text: String,
}

impl<R: Read + AsFd> Heard<R> {
    pub(crate) fn new(stream: R) -> Self {
        Self { stream, text: String::new() }
    }

    /// Reads until all this was said.
    pub(crate) fn until(&mut self, said: &str) {
        let deadline = Instant::now() + DEADLINE;
        while !self.text.contains(said) {
            assert!(self.more(deadline), "ended without {said:?}: {:?}", self.text);
        }
    }

    /// Reads to the end.
    pub(crate) fn rest(mut self) -> String {
        let deadline = Instant::now() + DEADLINE;
        while self.more(deadline) {}
        self.text
    }

    fn more(&mut self, deadline: Instant) -> bool {
        assert!(readable(&self.stream, deadline), "nothing more came after {:?}", self.text);
        let mut chunk = [0; 4096];
        // Reading a terminal whose other side is closed is an error.
        let bytes = self.stream.read(&mut chunk).unwrap_or(0);
        self.text.push_str(&String::from_utf8_lossy(&chunk[..bytes]));
        bytes > 0
    }

    pub(crate) fn stream(&mut self) -> &mut R {
        &mut self.stream
    }
}

fn readable(stream: &impl AsFd, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let mut polled = [PollFd::new(stream, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::try_from(left).unwrap())).unwrap() > 0
}

/// Waits for the end of a program.
pub(crate) fn ended(child: &mut Child) -> ExitStatus {
    let pid = rustix::process::Pid::from_child(child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    assert!(readable(&pidfd, Instant::now() + DEADLINE), "the program does not end");
    child.wait().unwrap()
}
