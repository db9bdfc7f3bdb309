//! The event that a VM's record was replaced.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};
use crate::sys;

/// The changes of one VM's records from now on.
#[derive(Debug)]
pub(crate) struct RecordChanges {
    path: PathBuf,
    inotify: AsyncFd<OwnedFd>,
    is_log: bool,
}

/// What happens to a log: it grows, and is moved away when it has grown too much.
const LOG: WatchFlags = WatchFlags::MODIFY.union(WatchFlags::MOVE_SELF);

impl RecordChanges {
    /// Starts to watch a VM's directory. Read the VM after this: earlier changes raise no event.
    ///
    /// # Errors
    /// `NotFound`-like `Io` without the directory, and `Io` where the system has no watches left.
    pub(in crate::store) fn of(dir: &Path) -> Result<Self> {
        Self::watch(dir, WatchFlags::MOVED_TO)
    }

    /// Starts to watch the files in a directory for writes.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    #[cfg(feature = "images")]
    pub(crate) fn of_files(dir: &Path) -> Result<Self> {
        Self::watch(dir, WatchFlags::MOVED_TO | WatchFlags::MODIFY)
    }

    /// Starts to watch one file for writes, also after another file has replaced it.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub(crate) fn of_log(file: &Path) -> Result<Self> {
        Self::watch(file, LOG)
    }

    /// Starts to watch the logs in a directory: their growth, and the removal of the directory.
    ///
    /// While a file in it is open, the removal of a directory raises no event: so the parent
    /// directory is watched as well.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    pub(crate) fn of_logs(dir: &Path) -> Result<Self> {
        let changes = Self::watch(dir, WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_TO)?;
        if let Some(above) = dir.parent() {
            let removed = WatchFlags::DELETE | WatchFlags::MOVED_FROM;
            inotify::add_watch(changes.inotify.get_ref(), above, removed)
                .map_err(|errno| Error::io("watch", above)(errno.into()))?;
        }
        Ok(changes)
    }

    fn watch(path: &Path, what: WatchFlags) -> Result<Self> {
        let is_log = what == LOG;
        let kind = if is_log { WatchFlags::empty() } else { WatchFlags::DELETE_SELF | WatchFlags::ONLYDIR };
        let watched = || {
            let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            inotify::add_watch(&fd, path, what | kind)?;
            sys::watch_readable(fd)
        };
        let inotify = watched().map_err(Error::io("watch", path))?;
        Ok(Self { path: path.to_owned(), inotify, is_log })
    }

    /// Waits for the next change; several at once are one.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn next(&self) -> Result<()> {
        loop {
            let mut ready = self.inotify.readable().await.map_err(Error::io("watch", &self.path))?;
            let mut buffer = [MaybeUninit::uninit(); 1024];
            let mut seen = false;
            let mut events = inotify::Reader::new(self.inotify.get_ref(), &mut buffer);
            let end = loop {
                match events.next() {
                    Ok(event) => seen |= !event.events().contains(ReadFlags::IGNORED),
                    Err(errno) => break errno,
                }
            };
            match end {
                Errno::AGAIN if seen => {
                    if self.is_log {
                        // The same watch as before, but for a new log; one that is not there yet is
                        // found the next time.
                        let _ = inotify::add_watch(self.inotify.get_ref(), &self.path, LOG);
                    }
                    return Ok(());
                }
                Errno::AGAIN => ready.clear_ready(),
                errno => return Err(Error::io("watch", &self.path)(errno.into())),
            }
        }
    }
}
