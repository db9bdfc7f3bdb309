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
pub(crate) struct Changes {
    dir: PathBuf,
    inotify: AsyncFd<OwnedFd>,
}

impl Changes {
    /// Begins to watch a VM's directory. Look at the VM after this: what happened before raises no event.
    ///
    /// # Errors
    /// `NotFound`-like `Io` without the directory, and `Io` where the system has no watches left.
    pub(in crate::store) fn of(dir: &Path) -> Result<Self> {
        Self::watch(dir, WatchFlags::MOVED_TO)
    }

    /// Begins to watch the files in a directory for being written to.
    ///
    /// # Errors
    /// As for [`of`](Self::of).
    #[cfg(feature = "images")]
    pub(crate) fn of_files(dir: &Path) -> Result<Self> {
        Self::watch(dir, WatchFlags::MOVED_TO | WatchFlags::MODIFY)
    }

    fn watch(dir: &Path, what: WatchFlags) -> Result<Self> {
        let watched = || {
            let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            inotify::add_watch(&fd, dir, what | WatchFlags::DELETE_SELF | WatchFlags::ONLYDIR)?;
            sys::watch_readable(fd)
        };
        let inotify = watched().map_err(Error::io("watch", dir))?;
        Ok(Self { dir: dir.to_owned(), inotify })
    }

    /// Waits for the next change; several at once are one.
    ///
    /// # Cancel safety
    /// Nothing is lost.
    pub(crate) async fn next(&self) -> Result<()> {
        loop {
            let mut ready = self.inotify.readable().await.map_err(Error::io("watch", &self.dir))?;
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
                Errno::AGAIN if seen => return Ok(()),
                Errno::AGAIN => ready.clear_ready(),
                errno => return Err(Error::io("watch", &self.dir)(errno.into())),
            }
        }
    }
}
