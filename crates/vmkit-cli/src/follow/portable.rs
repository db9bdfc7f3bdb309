//! Changes where no safe crate wraps what the system has for them: the files are looked at again
//! and again.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmkit::Error;

use super::is_at;

/// How long what is written may go unseen: 200 ms.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// The passing of time, and the end of a log's directory.
#[derive(Debug)]
pub(super) struct LogChanges {
    dir: File,
    path: PathBuf,
}

impl LogChanges {
    pub(super) fn watch(log: &Path) -> Result<Self, Error> {
        let path = log.parent().unwrap_or(Path::new("/"));
        let dir = File::open(path).map_err(Error::io("open", path))?;
        Ok(Self { dir, path: path.to_owned() })
    }

    /// Waits for a while; false if the directory is gone or standard output was closed.
    pub(super) fn wait(&self) -> Result<bool, Error> {
        let stdout = io::stdout();
        let mut polled = [PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty())];
        match poll(&mut polled, Some(&LOOK_AGAIN)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::io("watch", &self.path)(errno.into())),
        }
        if polled[0].revents().contains(PollFlags::ERR) {
            return Ok(false);
        }
        Ok(self.path.exists() && is_at(Some(&self.dir), &self.path)?)
    }
}
