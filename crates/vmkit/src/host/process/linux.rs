//! Processes as Linux has them: a pidfd holds one, and `/proc` tells when it began.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::OnceLock;
#[cfg(feature = "ssh")]
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
#[cfg(feature = "ssh")]
use rustix::param::clock_ticks_per_second;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
#[cfg(feature = "ssh")]
use rustix::time::{ClockId, clock_gettime};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::ProcessId;
use crate::error::{Error, Result};
use crate::sys;

/// Holds one process, so that its number can't come to mean another.
///
/// It does not keep the process alive, and dropping it does nothing to the process.
#[derive(Debug)]
pub(crate) struct ProcessFd {
    id: ProcessId,
    fd: OwnedFd,
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
        let boot_id = boot_id()?;
        Ok(match read_stat(pid)? {
            Some(stat) if !stat.is_dead() => Some(Self { pid, start_time: stat.start_time, boot_id }),
            _ => None,
        })
    }

    /// Opens the process, or returns `None` if it has ended: reaped, a zombie, or of an earlier
    /// boot.
    ///
    /// # Errors
    /// `Io` when the kernel can't tell.
    pub(crate) fn open(&self) -> Result<Option<ProcessFd>> {
        if self.boot_id != boot_id()? {
            return Ok(None);
        }
        let number = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let Some(number) = number else { return Ok(None) };
        let fd = match pidfd_open(number, PidfdFlags::empty()) {
            Ok(fd) => fd,
            // The number is unused, or by now that of a thread: EINVAL up to Linux 6.8, ENOENT from
            // then on.
            Err(Errno::SRCH | Errno::INVAL | Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(self.error("watch")(errno)),
        };
        let held = ProcessFd { id: *self, fd };
        // Read after the descriptor was opened: a process that still has the number and this start
        // time had them then.
        let same = read_stat(self.pid)?.is_some_and(|stat| stat.start_time == self.start_time);
        Ok(if same && held.is_alive()? { Some(held) } else { None })
    }

    /// Returns for how long the process has lived, or would have, if it is of this boot.
    #[cfg(feature = "ssh")]
    pub(crate) fn age(&self) -> Duration {
        let now = clock_gettime(ClockId::Boottime);
        let now = Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0));
        let ticks = clock_ticks_per_second().max(1);
        now.saturating_sub(Duration::from_millis(self.start_time.saturating_mul(1000) / ticks))
    }

    fn error(&self, verb: &'static str) -> impl FnOnce(Errno) -> Error {
        let path = proc_dir(self.pid);
        move |errno| Error::io(verb, path)(io::Error::from(errno))
    }
}

impl ProcessFd {
    /// Returns which process this is.
    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    /// Sends the process a signal; that it has ended already is success.
    ///
    /// # Errors
    /// `Host` when this user may not signal it.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        match pidfd_send_signal(&self.fd, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(self.id.error("signal")(errno)),
        }
    }

    /// Returns what to poll for the end of the process: any event is its end.
    pub(crate) fn end(&self) -> PollFd<'_> {
        PollFd::new(&self.fd, PollFlags::IN)
    }

    /// Returns whether the process has not ended yet; a zombie has.
    ///
    /// # Errors
    /// `Io` when the kernel can't tell.
    pub(crate) fn is_alive(&self) -> Result<bool> {
        let mut polled = [self.end()];
        loop {
            match poll(&mut polled, Some(&Timespec::default())) {
                Ok(ended) => return Ok(ended == 0),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(self.id.error("watch")(errno)),
            }
        }
    }

    /// Waits until the process has ended or the deadline has passed, and returns whether it has
    /// ended.
    ///
    /// Runs on a tokio runtime with I/O and time enabled. Any number of tasks may wait at once.
    ///
    /// # Cancel safety
    /// Nothing is lost: waiting again gives the same answer.
    ///
    /// # Errors
    /// `Io` when the kernel can't tell.
    pub(crate) async fn wait(&self, deadline: Instant) -> Result<bool> {
        // A descriptor of its own, since epoll refuses the same one twice.
        let fd = self.fd.try_clone().map_err(Error::io("watch", proc_dir(self.id.pid)))?;
        let fd = sys::watch_readable(fd).map_err(Error::io("watch", proc_dir(self.id.pid)))?;
        while self.is_alive()? {
            let Ok(ready) = timeout_at(deadline, fd.readable()).await else {
                return Ok(!self.is_alive()?);
            };
            ready.map_err(Error::io("watch", proc_dir(self.id.pid)))?.clear_ready();
        }
        Ok(true)
    }
}

/// Returns the id of this boot of the host, which the kernel draws at random.
///
/// Source: random(4).
///
/// # Errors
/// `Io` when it can't be read, `Host` when it is not a UUID.
pub(crate) fn boot_id() -> Result<Uuid> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    static BOOT_ID: OnceLock<Uuid> = OnceLock::new();
    if let Some(id) = BOOT_ID.get() {
        return Ok(*id);
    }
    let text = fs::read_to_string(PATH).map_err(Error::io("read", PATH))?;
    let id =
        text.trim().parse().map_err(|_| Error::host(PATH, format!("{:?} is not a UUID", text.trim())))?;
    Ok(*BOOT_ID.get_or_init(|| id))
}

/// The two fields of `/proc/PID/stat` that tell one process from another.
#[derive(Debug, PartialEq, Eq)]
struct ProcStat {
    state: char,
    start_time: u64,
}

impl ProcStat {
    /// Reads a line of `/proc/PID/stat`.
    ///
    /// The second field is the program's name in parentheses, and may itself hold spaces,
    /// parentheses and line ends; so the fields are counted from the last closing one.
    ///
    /// Source: proc_pid_stat(5).
    fn parse(line: &str) -> Option<Self> {
        let (_, fields) = line.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let state = fields.next().filter(|state| state.len() == 1)?.chars().next()?;
        // `start_time` is field 22 and `state` was field 3, so 18 lie between.
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Self { state, start_time })
    }

    /// Returns whether the process has ended and only its number is left.
    fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

fn read_stat(pid: u32) -> Result<Option<ProcStat>> {
    let path = proc_dir(pid).join("stat");
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        // ESRCH: it ended between the opening and the reading.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => return Ok(None),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    match ProcStat::parse(&String::from_utf8_lossy(&bytes)) {
        Some(stat) => Ok(Some(stat)),
        None => Err(Error::io("read", path)(io::Error::new(
            io::ErrorKind::InvalidData,
            "not a line of proc_pid_stat(5)",
        ))),
    }
}

fn proc_dir(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_hostile_program_name_does_not_shift_the_fields() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        for name in ["sleep", "a b", ") Z 1 2 3", "((", "\n) R 0"] {
            let stat = ProcStat::parse(&format!("42 ({name}) {fields}\n")).unwrap();
            assert_eq!(stat, ProcStat { state: 'S', start_time: 4711 }, "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            let _ = ProcStat::parse(&text);
        }

        #[test]
        fn the_fields_are_found_behind_any_name(name in any::<String>(), start_time: u64) {
            let line = format!("1 ({name}) R{} {start_time} 0 0\n", " 7".repeat(18));
            prop_assert_eq!(ProcStat::parse(&line), Some(ProcStat { state: 'R', start_time }));
        }
    }
}
