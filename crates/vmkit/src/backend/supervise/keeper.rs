//! The keeper: a small process, the parent of one hypervisor while that runs.
//!
//! A hypervisor outlives the `vmkit` that started it, and only a parent learns how a process ended.
//! So a keeper stands between them, as conmon does for containers. It starts the hypervisor,
//! records its identity and keeps the logs, that of its events among them, within their limits.
//! When the hypervisor has ended, it records how, removes the run's sockets and exits. It makes no
//! decisions and accepts no requests. If it is killed, the hypervisor runs on; only the cause of
//! its end, further console output and further events are lost.
//!
//! ```text
//!   library ──spawn──▶ keeper ──spawn──▶ hypervisor    stdin of the keeper is a socket pair: one request goes in,
//!      │ request + descriptors  │  ◀── stderr, console ──┘   with the descriptors to inherit, and one reply comes back.
//!      ◀────── process ─────────┘
//! ```
//!
//! It has one thread and no async runtime, so that it can pass descriptors on without a race, and
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

/// The first argument of a process that becomes a keeper.
pub(crate) const ARG0: &str = "vmkit-keeper";

/// The maximum number of descriptors of one request.
pub(crate) const MAX_DESCRIPTORS: usize = 16;

static HAS_ASKED: AtomicBool = AtomicBool::new(false);

/// The only request to a keeper.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KeeperRequest {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<OsString>,
    /// The hypervisor's current directory; `/` unless set.
    pub(crate) work_dir: Option<PathBuf>,
    /// Whether the hypervisor's output is also copied to the library, as long as that reads it.
    pub(crate) copy_log: bool,
    /// For each descriptor of the message, its number in the hypervisor.
    pub(crate) descriptors: Vec<i32>,
    /// The number of the write end of the console's log in the hypervisor.
    pub(crate) console_log_descriptor: Option<i32>,
    pub(crate) console_log: PathBuf,
    pub(crate) console_log_bytes: u64,
    pub(crate) log: PathBuf,
    pub(crate) log_bytes: u64,
    pub(crate) run_file: PathBuf,
    /// What is removed when the hypervisor has ended: files, and their directory.
    pub(crate) sockets: Vec<PathBuf>,
    pub(crate) run_dir: PathBuf,
    /// What runs the guest's code, for the run file.
    #[serde(default)]
    pub(crate) accel: Option<String>,
    /// The version of the guest's devices, for the run file.
    #[serde(default)]
    pub(crate) devices: Option<u32>,
    #[serde(default)]
    pub(crate) events: Option<EventsRequest>,
}

/// A channel on which the hypervisor reports events, of which the keeper writes a log.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct EventsRequest {
    /// The number that the hypervisor's end of the channel has in it.
    pub(crate) descriptor: i32,
    /// What the hypervisor is sent on it, once, before it runs.
    pub(crate) request: String,
    pub(crate) log: PathBuf,
    pub(crate) log_bytes: u64,
}

/// The keeper's only reply.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KeeperReply {
    Started { pid: u32 },
    Failed { what: String },
}

/// Becomes a VM's keeper if this process was started as one, and then never returns.
///
/// A program that embeds vmkit calls this first in `main`, before it starts a thread or a runtime,
/// so that [`QemuHypervisor`] can start the program itself as the keeper of each VM. A program that
/// does not (a test program has no `main` of its own) needs the program `vmkit-keeper` in the same
/// directory or the parent directory, or sets it by [`QemuHypervisorBuilder::keeper`].
///
/// # Examples
/// ```no_run
/// fn main() -> vmkit::Result<()> {
///     vmkit::run_if_keeper();
///     run()
/// }
///
/// // A runtime in `main` itself would be started in each keeper, too, with threads that run as long
/// // as the VM.
/// #[tokio::main]
/// async fn run() -> vmkit::Result<()> {
///     Ok(())
/// }
/// ```
///
/// [`QemuHypervisor`]: crate::QemuHypervisor
/// [`QemuHypervisorBuilder::keeper`]: crate::qemu::QemuHypervisorBuilder::keeper
pub fn run_if_keeper() {
    let asked = std::env::args_os()
        .next()
        .is_some_and(|arg0| arg0.to_string_lossy().starts_with(&format!("{ARG0}: ")));
    if asked {
        std::process::exit(main());
    }
    HAS_ASKED.store(true, Ordering::Relaxed);
}

/// Returns whether this program becomes a keeper if it is started as one: it has called
/// [`run_if_keeper`].
pub(crate) fn this_program_can_be_one() -> bool {
    HAS_ASKED.load(Ordering::Relaxed)
}

/// Does all of a keeper's work, and returns its exit code.
fn main() -> i32 {
    // A new session: Ctrl-C or a hang-up of a terminal does not reach the keeper or its hypervisor.
    let _ = rustix::process::setsid();
    // Files that the hypervisor creates, such as a VNC socket, are only accessible to their owner,
    // whatever the caller's umask was.
    rustix::process::umask(Mode::from_raw_mode(0o177));
    // Descriptors that the library's program leaks to its children are closed: otherwise a lock or
    // a pipe would stay in use as long as the guest runs.
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
        // The library died before it sent a request: nothing was started.
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
    // Never blocks: if the library does not read the copy, it loses it.
    if launch.copy_log && control.set_nonblocking(true).is_ok() {
        kept.own_log().copy = Some(control);
    } else {
        drop(control);
    }
    let ended = kept.watch();
    kept.finish(&launch, &ended)
}

fn answer(control: &mut UnixStream, answer: &KeeperReply) {
    let mut line = serde_json::to_vec(answer).expect("a reply is plain data");
    line.push(b'\n');
    // The library may be gone; the run file has the same information.
    let _ = control.write_all(&line);
}

/// Receives the request and its descriptors, which come with the first bytes of its line.
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
        // Not every system sets the flag on receipt; this process has one thread, so nothing is
        // started in the meantime.
        rustix::io::fcntl_setfd(descriptor, FdFlags::CLOEXEC)?;
    }
    head.truncate(received.bytes);
    let mut line = Vec::new();
    BufReader::new(head.chain(control)).read_until(b'\n', &mut line)?;
    Ok((serde_json::from_slice(&line)?, descriptors))
}

/// Checks that the descriptors' numbers in the hypervisor are below the limit.
fn check_descriptor_limit(launch: &KeeperRequest) -> Result<(), String> {
    let events = launch.events.as_ref().map(|events| events.descriptor);
    let highest = launch.descriptors.iter().chain(&launch.console_log_descriptor).chain(&events).max();
    let needed = highest.map_or(0, |number| u64::try_from(*number).unwrap_or(0) + 1);
    match inherited::most_descriptors() {
        Some(most) if most < needed => Err(format!(
            "RLIMIT_NOFILE, the limit of open descriptors, is {most} (expected at least {needed}): raise its hard limit \
             (`ulimit -Hn`, LimitNOFILE of a systemd unit)"
        )),
        _ => Ok(()),
    }
}

/// A hypervisor with its process and logs.
struct SupervisedProcess {
    child: Child,
    run_file: RunFile,
    /// `None` if it had ended before its process could be opened.
    process: Option<ProcessFd>,
    /// The console's, the events', then the hypervisor's own; removed when their pipe is closed.
    logs: Vec<LogPipe>,
    /// Held until the end: the lock shows that this run is not over until its end is recorded.
    _descriptors: Vec<OwnedFd>,
}

/// A pipe whose output is copied to a log.
struct LogPipe {
    pipe: OwnedFd,
    log: BoundedLog,
    /// The reader of a copy, as long as it keeps up.
    copy: Option<UnixStream>,
}

impl LogPipe {
    /// Opens the log of the hypervisor's events, and returns it with the hypervisor's end of their
    /// channel, under its number.
    fn of_events(events: &EventsRequest) -> Result<(Self, OwnedFd), String> {
        let mut log = open_log(&events.log, events.log_bytes)?;
        // The events of an earlier run are not part of this one's.
        log.rotate();
        let (ours, theirs) = UnixStream::pair().map_err(not_created)?;
        (&ours).write_all(events.request.as_bytes()).map_err(not_created)?;
        let channel = inheritable(&theirs.into(), events.descriptor)?;
        Ok((Self { pipe: ours.into(), log, copy: None }, channel))
    }

    /// Copies the available output of the pipe; returns whether the pipe is still open.
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
            return Err(format!(
                "received {} descriptors (expected {})",
                descriptors.len(),
                launch.descriptors.len()
            ));
        }
        check_descriptor_limit(launch)?;
        let mut logs = Vec::new();
        let (console_read, console_write) = pipe()?;
        let (log_read, log_write) = pipe()?;
        let console = open_log(&launch.console_log, launch.console_log_bytes)?;
        let begin = launch.console_log_descriptor.and_then(|_| console.position().ok());
        logs.push(LogPipe { pipe: console_read, log: console, copy: None });
        let mut inherited = Vec::new();
        if let Some(events) = &launch.events {
            let (log, channel) = LogPipe::of_events(events)?;
            logs.push(log);
            inherited.push(channel);
        }
        let mut log = open_log(&launch.log, launch.log_bytes)?;
        // The log of an earlier run is not part of this one's.
        log.rotate();
        logs.push(LogPipe { pipe: log_read, log, copy: None });
        for (descriptor, number) in descriptors.iter().zip(&launch.descriptors) {
            inherited.push(inheritable(descriptor, *number)?);
        }
        if let Some(number) = launch.console_log_descriptor {
            inherited.push(inheritable(&console_write, number)?);
        }
        let stderr = log_write.try_clone().map_err(|e| format!("cannot copy a pipe: {e}"))?;
        let accel = launch.accel.clone();
        let mut run_file = RunFile::create(&launch.run_file, &launch.run_dir, begin, accel, launch.devices)
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
        // A run file that can't be written is no reason to kill a healthy guest: the file has had
        // its full size since its creation, and the lock shows that something runs.
        let _ = run_file.started(child.id());
        Ok(Self { child, run_file, process, logs, _descriptors: descriptors })
    }

    /// Returns the log of the hypervisor's own output.
    fn own_log(&mut self) -> &mut LogPipe {
        self.logs.last_mut().expect("`watch` is called after the pipe was added")
    }

    /// Copies output into the logs until the hypervisor has ended, and returns how.
    fn watch(&mut self) -> ProcessEnd {
        let mut buffer = vec![0; 16 << 10];
        let mut process = self.process.take();
        // A process that could not be opened has ended.
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
                // The process may still live, with a descriptor that is no longer valid, for
                // example since it has more privileges than this user. Then its pipes show its end.
                match self.child.try_wait() {
                    Ok(None) => process = None,
                    _ => break,
                }
            }
            watches = process.is_some() || !self.logs.is_empty();
        }
        let ended = self.child.wait();
        // Its last output may still be in the pipes.
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

fn open_log(path: &Path, bound_bytes: u64) -> Result<BoundedLog, String> {
    BoundedLog::open(path, bound_bytes).map_err(|e| format!("cannot open {}: {e}", path.display()))
}

/// Opens a process that was just started; ends it if that fails, since it could not be watched.
fn held(mut child: Child) -> Result<(Child, Option<ProcessFd>), String> {
    let process = ProcessId::of(child.id()).and_then(|id| id.map_or(Ok(None), |id| id.open()));
    match process {
        Ok(process) => Ok((child, process)),
        Err(error) => {
            // It is our own child and was not waited for, so its PID is still its own.
            let _ = child.kill();
            let _ = child.wait();
            Err(format!("cannot watch the hypervisor's process: {error}"))
        }
    }
}

/// Removes the sockets of the run. If that fails, the next start or `destroy` removes them, and
/// reports errors.
fn remove_sockets(launch: &KeeperRequest) {
    for socket in &launch.sockets {
        let _ = fs::remove_file(socket);
    }
    let _ = fs::remove_dir(&launch.run_dir);
}

fn pipe() -> Result<(OwnedFd, OwnedFd), String> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(|errno| not_created(errno.into()))
}

fn not_created(error: io::Error) -> String {
    format!("cannot create a pipe: {error}")
}

/// Duplicates a descriptor to this number, for a child to inherit.
fn inheritable(descriptor: &OwnedFd, number: i32) -> Result<OwnedFd, String> {
    let copy = rustix::io::fcntl_dupfd_cloexec(descriptor, number)
        .map_err(|e| format!("cannot copy a descriptor to {number}: {e}"))?;
    if copy.as_raw_fd() != number {
        return Err(format!(
            "the descriptor {number} is in use: the program that embeds vmkit leaks it to its children"
        ));
    }
    rustix::io::fcntl_setfd(&copy, FdFlags::empty())
        .map_err(|e| format!("cannot pass on the descriptor {number}: {e}"))?;
    Ok(copy)
}
