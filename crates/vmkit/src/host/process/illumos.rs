//! Processes as illumos has them: an open file of `/proc/PID` stays bound to its process, as a
//! pidfd does.
//!
//! Compiled for illumos and never run there by this project.
//!
//! Source: proc(5); illumos, `fs/proc/prvnops.c` (`prpoll`) and `fs/proc/prcontrol.c`
//! (`prwritectl`).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Signal;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::ProcessId;
use super::psinfo::{self, NEEDED_BYTES, PsInfo};
use crate::error::{Error, Result};

/// The control message that sends a signal, which follows; each is a `long`. Source:
/// `sys/procfs.h`.
const PCKILL: i64 = 9;

/// Holds one process, so that its number can't come to mean another.
///
/// It does not keep the process alive, and dropping it does nothing to the process.
#[derive(Debug)]
pub(crate) struct ProcessFd {
    id: ProcessId,
    psinfo: Arc<File>,
}

impl ProcessId {
    /// Returns the full identity of the process that has this number now, or `None` where none has
    /// it.
    ///
    /// A zombie counts as gone. The answer is only as good as the caller's knowledge of whose
    /// number this is: ask for one's own child before it is waited for, or for oneself.
    ///
    /// # Errors
    /// `Io` when `/proc` can't be read.
    pub(crate) fn of(pid: u32) -> Result<Option<Self>> {
        let Some(file) = open(pid)? else { return Ok(None) };
        let found = read(pid, &file)?.filter(|found| !found.is_zombie);
        let boot_id = boot_id()?;
        Ok(found.map(|found| Self { pid, start_time: found.start_time, boot_id }))
    }

    /// Opens the process, or returns `None` if it has ended: reaped, a zombie, or of an earlier
    /// boot.
    ///
    /// # Errors
    /// `Io` when the kernel can't tell.
    pub(crate) fn open(&self) -> Result<Option<ProcessFd>> {
        let Some(file) = open(self.pid)? else { return Ok(None) };
        let same = read(self.pid, &file)?
            .is_some_and(|found| !found.is_zombie && found.start_time == self.start_time);
        let is_its = same && self.boot_id == boot_id()?;
        Ok(is_its.then(|| ProcessFd { id: *self, psinfo: Arc::new(file) }))
    }
}

impl ProcessId {
    /// Returns for how long the process has lived, or would have.
    #[cfg(feature = "ssh")]
    pub(crate) fn age(&self) -> std::time::Duration {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        now.saturating_sub(std::time::Duration::from_nanos(self.start_time))
    }
}

impl ProcessFd {
    /// Returns which process this is.
    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// Sends the process a signal; that it has ended already is success. SIGKILL returns once it
    /// has taken effect.
    ///
    /// # Errors
    /// `Host` when this user may not signal it.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let path = proc_dir(self.id.pid).join("ctl");
        let sent = OpenOptions::new().write(true).open(&path).and_then(|mut control| {
            // Checked after it was opened: a process that is alive still had the number then.
            if self.is_alive_now()? {
                let mut message = PCKILL.to_ne_bytes().to_vec();
                message.extend(i64::from(signal.as_raw()).to_ne_bytes());
                control.write_all(&message)?;
            }
            Ok(())
        });
        match sent {
            Err(error) if is_gone(&error) => Ok(()),
            sent => sent.map_err(Error::io("signal", path)),
        }
    }

    /// Returns what to poll for the end of the process: any event is its end.
    pub(crate) fn end(&self) -> PollFd<'_> {
        // No event is asked for: a hang-up is told of in any case.
        PollFd::new(&*self.psinfo, PollFlags::empty())
    }

    /// Returns whether the process has not ended yet; a zombie has.
    ///
    /// # Errors
    /// `Io` when the kernel can't tell.
    pub(crate) fn is_alive(&self) -> Result<bool> {
        self.is_alive_now().map_err(Error::io("watch", proc_dir(self.id.pid)))
    }

    fn is_alive_now(&self) -> io::Result<bool> {
        has_ended(&self.psinfo, None, Some(&Timespec::default())).map(|ended| !ended)
    }

    /// Waits until the process has ended or the deadline has passed, and returns whether it has
    /// ended.
    ///
    /// A thread waits in `poll` for it: the event is a hang-up, while the file of a process that
    /// lives is always readable, which tokio's reactor can't tell apart.
    ///
    /// # Cancel safety
    /// Nothing is lost: waiting again gives the same answer. The thread ends with the future.
    ///
    /// # Errors
    /// `Io` when the kernel can't tell.
    pub(crate) async fn wait(&self, deadline: Instant) -> Result<bool> {
        let failed = || Error::io("watch", proc_dir(self.id.pid));
        if !self.is_alive()? {
            return Ok(true);
        }
        // Dropped with this future, which the thread sees as a hang-up.
        let (_ours, theirs) = UnixStream::pair().map_err(failed())?;
        let (sender, ended) = oneshot::channel();
        let file = Arc::clone(&self.psinfo);
        std::thread::Builder::new()
            .name("vmkit-wait".into())
            .spawn(move || {
                // The receiver is gone once the future was dropped.
                let _ = sender.send(has_ended(&file, Some(&theirs), None));
            })
            .map_err(failed())?;
        match timeout_at(deadline, ended).await {
            Ok(ended) => ended.expect("the thread sends before it ends").map_err(failed()),
            Err(_) => self.is_alive().map(|alive| !alive),
        }
    }
}

/// Waits until the process of this file has ended, the other side of `given_up` was closed, or the
/// time has passed.
fn has_ended(psinfo: &File, given_up: Option<&UnixStream>, at_most: Option<&Timespec>) -> io::Result<bool> {
    // No event is asked for: a hang-up is told of in any case.
    let mut polled = vec![PollFd::new(psinfo, PollFlags::empty())];
    polled.extend(given_up.map(|stream| PollFd::new(stream, PollFlags::empty())));
    loop {
        match poll(&mut polled, at_most) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let found = polled.first().map_or(PollFlags::empty(), PollFd::revents);
        if found.intersects(PollFlags::ERR | PollFlags::NVAL) {
            // The process became one whose file this user may no longer hold.
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        return Ok(found.contains(PollFlags::HUP));
    }
}

/// Returns which boot this is: the one whose first process began when it did.
///
/// In a zone that is its own `init`, since nothing of before outlives the zone's boot either.
///
/// # Errors
/// `Io` when `/proc` can't be read.
pub(crate) fn boot_id() -> Result<Uuid> {
    const INIT: u32 = 1;
    let missing = || Error::io("read", proc_dir(INIT))(io::ErrorKind::NotFound.into());
    let first = open(INIT)?.ok_or_else(missing)?;
    let first = read(INIT, &first)?.ok_or_else(missing)?;
    Ok(psinfo::boot_of(first.start_time))
}

fn open(pid: u32) -> Result<Option<File>> {
    let path = proc_dir(pid).join("psinfo");
    match File::open(&path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}

/// Reads what is told of the process; `None` where it was reaped meanwhile.
fn read(pid: u32, psinfo: &File) -> Result<Option<PsInfo>> {
    let mut bytes = [0; NEEDED_BYTES];
    let read = psinfo.read_exact_at(&mut bytes, 0).and_then(|()| {
        PsInfo::parse(&bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a psinfo_t"))
    });
    match read {
        Ok(found) => Ok(Some(found)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(Error::io("read", proc_dir(pid).join("psinfo"))(error)),
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

fn proc_dir(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}
