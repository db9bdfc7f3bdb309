//! Changes as inotify tells of them.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use vmkit::Error;

use super::is_at;

/// The changes in a log's directory, and its end.
///
/// While one of its files is open, the removal of a directory raises no event: so the parent
/// directory is watched, too.
#[derive(Debug)]
pub(super) struct LogChanges {
    inotify: OwnedFd,
    dir: File,
    path: PathBuf,
}

impl LogChanges {
    pub(super) fn watch(log: &Path) -> Result<Self, Error> {
        let path = log.parent().unwrap_or(Path::new("/"));
        let failed = |errno: Errno| Error::io("watch", path)(errno.into());
        let dir = File::open(path).map_err(Error::io("open", path))?;
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(failed)?;
        let written = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO;
        inotify::add_watch(&inotify, path, written).map_err(failed)?;
        if let Some(above) = path.parent() {
            inotify::add_watch(&inotify, above, WatchFlags::DELETE | WatchFlags::MOVED_FROM)
                .map_err(failed)?;
        }
        Ok(Self { inotify, dir, path: path.to_owned() })
    }

    /// Waits for a change; false if the directory is gone or standard output was closed.
    pub(super) fn wait(&self) -> Result<bool, Error> {
        let failed = |errno: Errno| Error::io("watch", &self.path)(errno.into());
        let stdout = io::stdout();
        let mut polled = [
            PollFd::new(&self.inotify, PollFlags::IN),
            PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut polled, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(true),
            Err(errno) => return Err(failed(errno)),
        }
        if polled[1].revents().contains(PollFlags::ERR) {
            return Ok(false);
        }
        let mut space = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut space);
        loop {
            // What happened does not matter: the files are looked at anyway.
            match events.next() {
                Ok(_) => {}
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(errno) => return Err(failed(errno)),
            }
        }
        Ok(self.path.exists() && is_at(Some(&self.dir), &self.path)?)
    }
}
