//! The keeper: a small process, the parent of one hypervisor, for as long as that runs.
//!
//! A hypervisor outlives the `vmkit` that started it, and only a parent learns how a process ended.
//! So a keeper stands between them, as conmon does for containers. It starts the hypervisor, writes
//! down its identity, keeps the console's log within its bound, and when that has ended writes how,
//! removes the run's sockets and goes. It decides nothing and listens to nobody. If it is killed,
//! the hypervisor goes on; only the cause of its end and further console output are lost.
//!
//! ```text
//!   library ──spawn──▶ keeper ──spawn──▶ hypervisor    stdin of the keeper is a socket pair: one message goes in,
//!      │  launch + descriptors  │  ◀── stderr, console ──┘   with the descriptors that it shall inherit, one comes back.
//!      ◀────── process ─────────┘
//! ```
//!
//! It runs no async runtime and one thread, so that it can hand descriptors on without a race and
//! stays small.

use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, BufReader, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::Mode;
use rustix::io::{Errno, FdFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde::{Deserialize, Serialize};

use super::runfile::{ProcessEnd, RunFile};
use crate::boundedlog::BoundedLog;
use crate::host::inherited;
use crate::host::process::{ProcessFd, ProcessId};

/// The name that a process gives itself (as its first argument) to be a keeper.
pub(crate) const ARG0: &str = "vmkit-keeper";

/// The most descriptors that one launch carries.
pub(crate) const MAX_DESCRIPTORS: usize = 16;

static HAS_ASKED: AtomicBool = AtomicBool::new(false);

/// What the keeper is told, once.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KeeperRequest {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// Where the hypervisor works; `/` unless named.
    pub(crate) work_dir: Option<PathBuf>,
    /// Whether what it says goes to the library, too, for as long as that listens.
    pub(crate) copy_log: bool,
    /// For each descriptor that came along, the number it has in the hypervisor.
    pub(crate) descriptors: Vec<i32>,
    /// The number that the write end of the console's log has in the hypervisor.
    pub(crate) console_log_descriptor: Option<i32>,
    pub(crate) console_log: PathBuf,
    pub(crate) console_log_bytes: u64,
    pub(crate) log: PathBuf,
    pub(crate) log_bytes: u64,
    pub(crate) run_file: PathBuf,
    /// What is removed once the hypervisor has ended: files, then the directory they lie in.
    pub(crate) sockets: Vec<PathBuf>,
    pub(crate) run_dir: PathBuf,
    /// What runs the guest's code, for the run file.
    #[serde(default)]
    pub(crate) accel: Option<String>,
}

/// What the keeper answers, once.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KeeperReply {
    Started { pid: u32 },
    Failed { what: String },
}

/// Becomes a VM's keeper if this process was started as one, and then never returns.
///
/// A program that embeds vmkit calls this first in `main`, before it starts a thread or a runtime,
/// so that [`QemuHypervisor`] can start the program itself once more as the keeper of each VM. A
/// program that does not (a test program has no `main` of its own) needs the program `vmkit-keeper`
/// beside it or one directory up; or it names one, see [`QemuHypervisorBuilder::keeper`].
///
/// # Examples
/// ```no_run
/// fn main() -> vmkit::Result<()> {
///     vmkit::run_if_keeper();
///     run()
/// }
///
/// // A runtime that was there first would be started with each keeper, too, and its threads would stay for as long as the VM.
/// #[tokio::main]
/// async fn run() -> vmkit::Result<()> {
///     Ok(())
/// }
/// ```
///
/// [`QemuHypervisor`]: crate::QemuHypervisor
/// [`QemuHypervisorBuilder::keeper`]: crate::QemuHypervisorBuilder::keeper
pub fn run_if_keeper() {
    let asked = std::env::args_os()
        .next()
        .is_some_and(|arg0| arg0.to_string_lossy().starts_with(&format!("{ARG0}: ")));
    if asked {
        std::process::exit(main());
    }
    HAS_ASKED.store(true, Ordering::Relaxed);
}

/// Returns whether this very program, started once more, would become a keeper: it has called
/// [`run_if_keeper`].
pub(crate) fn this_program_can_be_one() -> bool {
    HAS_ASKED.load(Ordering::Relaxed)
}

/// Does a keeper's whole work and returns its exit code.
fn main() -> i32 {
    // A session of its own: no terminal's Ctrl-C and no hang-up reaches the keeper or its
    // hypervisor.
    let _ = rustix::process::setsid();
    // What the hypervisor makes itself, such as a screen's socket, is the owner's alone, whatever
    // the caller's mask was.
    rustix::process::umask(Mode::from_raw_mode(0o177));
    // Whatever the library's program left open for its children is neither the keeper's nor the
    // hypervisor's: a lock or a pipe would stay in use for as long as the guest runs.
    if crate::sys::close_inherited(3).is_err() {
        return 1;
    }
    inherited::settle_keeper();
    let Ok(control) = io::stdin().as_fd().try_clone_to_owned() else {
        return 1;
    };
    let mut control = UnixStream::from(control);
    let (launch, descriptors) = match receive(&control) {
        Ok(received) => received,
        // The library died before it had said anything: nothing was started, nothing is owed.
        Err(_) => return 1,
    };
    let mut kept = match SupervisedProcess::start(&launch, descriptors) {
        Ok(kept) => kept,
        Err(what) => {
            remove_sockets(&launch);
            answer(&mut control, &KeeperReply::Failed { what });
            return 1;
        }
    };
    answer(&mut control, &KeeperReply::Started { pid: kept.child.id() });
    // Never waited for: a library that does not listen loses the copy.
    if launch.copy_log && control.set_nonblocking(true).is_ok() {
        kept.own_log().copy = Some(control);
    } else {
        drop(control);
    }
    let ended = kept.watch();
    kept.finish(&launch, &ended)
}

fn answer(control: &mut UnixStream, answer: &KeeperReply) {
    let mut line = serde_json::to_vec(answer).expect("an answer is plain data");
    line.push(b'\n');
    // Nobody may be listening any more; the run file says the same to whoever comes next.
    let _ = control.write_all(&line);
}

/// Receives the launch and its descriptors: they come with the first bytes of one line.
fn receive(control: &UnixStream) -> io::Result<(KeeperRequest, Vec<OwnedFd>)> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut head = vec![0; 64 << 10];
    let received =
        rustix::net::recvmsg(control, &mut [IoSliceMut::new(&mut head)], &mut ancillary, RecvFlags::empty())?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    for descriptor in &descriptors {
        // Not every system marks them as they come in; this process has one thread, so nothing is
        // started in between.
        rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC)?;
    }
    head.truncate(received.bytes);
    let mut line = Vec::new();
    BufReader::new(head.chain(control)).read_until(b'\n', &mut line)?;
    Ok((serde_json::from_slice(&line)?, descriptors))
}

/// Checks that the hypervisor can have its descriptors under their numbers.
fn check_descriptor_limit(launch: &KeeperRequest) -> Result<(), String> {
    let highest = launch.descriptors.iter().chain(&launch.console_log_descriptor).max();
    let needed = highest.map_or(0, |number| u64::try_from(*number).unwrap_or(0) + 1);
    match inherited::most_descriptors() {
        Some(most) if most < needed => Err(format!(
            "RLIMIT_NOFILE, the limit of open descriptors, is {most} (expected at least {needed}): raise its hard limit \
             (`ulimit -Hn`, LimitNOFILE of a systemd unit)"
        )),
        _ => Ok(()),
    }
}

/// The hypervisor and all that hangs on it.
struct SupervisedProcess {
    child: Child,
    run_file: RunFile,
    /// Nothing where it had ended before anybody could take hold of it.
    process: Option<ProcessFd>,
    /// The console's, then the hypervisor's own; gone once their pipe is closed.
    logs: Vec<LogPipe>,
    /// Held to the end: the lock tells others that this run is not over until how it ended is
    /// written down.
    _descriptors: Vec<OwnedFd>,
}

/// Output on its way from a pipe to a log.
struct LogPipe {
    pipe: OwnedFd,
    log: BoundedLog,
    /// Who gets a copy, for as long as they take it.
    copy: Option<UnixStream>,
}

impl LogPipe {
    /// Copies what is there from the pipe; answers whether that is still open.
    fn copy_some(&mut self, buffer: &mut [u8]) -> bool {
        match rustix::io::read(&self.pipe, &mut *buffer) {
            Ok(0) => false,
            Ok(bytes) => {
                self.log.append(&buffer[..bytes]);
                if self.copy.as_mut().is_some_and(|copy| copy.write_all(&buffer[..bytes]).is_err()) {
                    self.copy = None;
                }
                true
            }
            Err(Errno::INTR | Errno::AGAIN) => true,
            Err(_) => false,
        }
    }
}

impl SupervisedProcess {
    fn start(launch: &KeeperRequest, descriptors: Vec<OwnedFd>) -> Result<Self, String> {
        if descriptors.len() != launch.descriptors.len() {
            return Err(format!("{} descriptors came, not {}", descriptors.len(), launch.descriptors.len()));
        }
        check_descriptor_limit(launch)?;
        let mut logs = Vec::new();
        let (console_read, console_write) = pipe()?;
        let (log_read, log_write) = pipe()?;
        let open = |path: &PathBuf, bytes| {
            BoundedLog::open(path, bytes).map_err(|e| format!("cannot open {}: {e}", path.display()))
        };
        let console = open(&launch.console_log, launch.console_log_bytes)?;
        let begin = launch.console_log_descriptor.and_then(|_| console.position().ok());
        logs.push(LogPipe { pipe: console_read, log: console, copy: None });
        let mut log = open(&launch.log, launch.log_bytes)?;
        // The last words of an earlier run are not this one's.
        log.rotate();
        logs.push(LogPipe { pipe: log_read, log, copy: None });
        let mut inherited = Vec::new();
        for (descriptor, number) in descriptors.iter().zip(&launch.descriptors) {
            inherited.push(inheritable(descriptor, *number)?);
        }
        if let Some(number) = launch.console_log_descriptor {
            inherited.push(inheritable(&console_write, number)?);
        }
        let stderr = log_write.try_clone().map_err(|e| format!("cannot copy a pipe: {e}"))?;
        let mut run_file = RunFile::create(&launch.run_file, &launch.run_dir, begin, launch.accel.clone())
            .map_err(|e| format!("cannot write {}: {e}", launch.run_file.display()))?;
        let child = Command::new(&launch.program)
            .args(&launch.args)
            .current_dir(launch.work_dir.as_deref().unwrap_or(Path::new("/")))
            .stdin(Stdio::null())
            .stdout(Stdio::from(log_write))
            .stderr(Stdio::from(stderr))
            .spawn();
        drop((inherited, console_write));
        let held = child
            .map_err(|e| {
                format!("cannot start {}: {}", launch.program.display(), inherited::child_problem(&e))
            })
            .and_then(held);
        let (child, process) = held.inspect_err(|_| {
            let _ = run_file.ended(&ProcessEnd { code: None, signal: None });
        })?;
        // A run file that can't be written does not kill a healthy guest: the file has its size
        // since it was created, and the lock tells that something runs.
        let _ = run_file.started(child.id());
        Ok(Self { child, run_file, process, logs, _descriptors: descriptors })
    }

    /// Returns the log of what the hypervisor itself says.
    fn own_log(&mut self) -> &mut LogPipe {
        self.logs.last_mut().expect("the pipe is looked at only once the hypervisor is watched")
    }

    /// Copies output into the logs until the hypervisor has ended, and returns how.
    fn watch(&mut self) -> ProcessEnd {
        let mut buffer = vec![0; 16 << 10];
        let mut process = self.process.take();
        // One that nobody could take hold of has ended.
        let mut watches = process.is_some();
        while watches {
            let mut waited: Vec<PollFd<'_>> =
                self.logs.iter().map(|log| PollFd::new(&log.pipe, PollFlags::IN)).collect();
            waited.extend(process.iter().map(ProcessFd::end));
            match poll(&mut waited, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => break,
            }
            let ready: Vec<bool> = waited.iter().map(|fd| !fd.revents().is_empty()).collect();
            let (log_is_ready, process_is_ready) = ready.split_at(self.logs.len());
            let mut log_is_ready = log_is_ready.iter();
            self.logs.retain_mut(|log| {
                !log_is_ready.next().is_some_and(|ready| *ready) || log.copy_some(&mut buffer)
            });
            if process_is_ready.contains(&true) {
                // Whatever made what is held of it worthless, such as privileges that this user has
                // not, it lives: then its pipes tell of its end.
                match self.child.try_wait() {
                    Ok(None) => process = None,
                    _ => break,
                }
            }
            watches = process.is_some() || !self.logs.is_empty();
        }
        let ended = self.child.wait();
        // What it wrote last lies in the pipes still.
        for log in &mut self.logs {
            while rustix::io::ioctl_fionread(&log.pipe).is_ok_and(|bytes| bytes > 0)
                && log.copy_some(&mut buffer)
            {}
        }
        match ended {
            Ok(status) => ProcessEnd { code: status.code(), signal: status.signal() },
            Err(_) => ProcessEnd { code: None, signal: None },
        }
    }

    fn finish(&mut self, launch: &KeeperRequest, ended: &ProcessEnd) -> i32 {
        let written = self.run_file.ended(ended);
        remove_sockets(launch);
        i32::from(written.is_err())
    }
}

/// Takes hold of a process that was just started; one that can't be held is ended again, for nobody
/// could watch it.
fn held(mut child: Child) -> Result<(Child, Option<ProcessFd>), String> {
    let process = ProcessId::of(child.id()).and_then(|id| id.map_or(Ok(None), |id| id.open()));
    match process {
        Ok(process) => Ok((child, process)),
        Err(error) => {
            // It is our own child and not waited for, so the number is its.
            let _ = child.kill();
            let _ = child.wait();
            Err(format!("cannot watch the hypervisor's process: {error}"))
        }
    }
}

/// Removes the sockets of the run. What can't be removed here, the next start or `destroy` removes,
/// and reports.
fn remove_sockets(launch: &KeeperRequest) {
    for socket in &launch.sockets {
        let _ = fs::remove_file(socket);
    }
    let _ = fs::remove_dir(&launch.run_dir);
}

fn pipe() -> Result<(OwnedFd, OwnedFd), String> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|e| format!("cannot make a pipe: {e}"))
}

/// Copies a descriptor to this very number, for a child to inherit.
fn inheritable(descriptor: &OwnedFd, number: i32) -> Result<OwnedFd, String> {
    let copy = rustix::io::fcntl_dupfd_cloexec(descriptor, number)
        .map_err(|e| format!("cannot copy a descriptor to {number}: {e}"))?;
    if copy.as_raw_fd() != number {
        return Err(format!(
            "the descriptor {number} is taken: the program that embeds vmkit leaks it to its children"
        ));
    }
    rustix::io::fcntl_setfd(&copy, FdFlags::empty()).map_err(|e| format!("cannot hand on {number}: {e}"))?;
    Ok(copy)
}
