//! The real QEMU with a proxy in front of its monitors, which drops, replaces and invents lines.
//!
//! The program `vmkit-faulty-qemu` is started in QEMU's place. It hands the listening sockets of
//! the monitors over to the test, gives QEMU others, and becomes QEMU. So the process, its signals
//! and its end are QEMU's own.
//!
//! ```no_run
//! use vmkit_testkit::faulty_qemu::{FaultyQemu, QemuFaults};
//! # fn main() -> std::io::Result<()> {
//! # let dir = std::path::Path::new("/tmp");
//! // In an integration test of this crate, this is `env!("CARGO_BIN_EXE_vmkit-faulty-qemu")`.
//! let qemu = FaultyQemu::install("target/debug/vmkit-faulty-qemu".as_ref(), dir)?;
//! qemu.set(QemuFaults { mute: vec!["query-status"], ..QemuFaults::default() });
//! // Run `qemu.program()` as QEMU.
//! # Ok(()) }
//! ```

use std::io::{self, BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The most monitors of one QEMU.
pub const MOST_MONITORS: usize = 8;

/// What is wrong with a QEMU; as a default, nothing.
#[derive(Debug, Clone, Default)]
pub struct QemuFaults {
    /// Whether its monitors accept clients and never send anything.
    pub is_silent: bool,
    /// This is sent in place of the greeting.
    pub greeting: Option<&'static str>,
    /// The commands that have no effect and get no reply.
    pub mute: Vec<&'static str>,
    /// The status of the VM, as `query-status` reports it until this command is sent.
    pub status: Option<(&'static str, &'static str)>,
    /// Whether SIGTERM, SIGINT and SIGHUP have no effect on a QEMU that is started from now on.
    pub ignore_signals: bool,
}

/// What the program sends to the test, together with a listening socket for each monitor.
#[derive(Debug, Serialize, Deserialize)]
pub struct Handover {
    /// The process that becomes QEMU.
    pub pid: i32,
    /// The abstract names of the sockets at which QEMU's monitors listen, in the order of the
    /// sockets.
    pub names: Vec<String>,
}

/// A QEMU whose faults a test sets, under a name of its own.
#[derive(Debug)]
pub struct FaultyQemu {
    program: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    faults: Mutex<QemuFaults>,
    commands: Mutex<Vec<String>>,
}

impl FaultyQemu {
    /// Links the program `binary` into `dir`, as `qemu-system-x86_64`. It has no faults at first.
    ///
    /// # Errors
    /// A link or a socket that can't be created in `dir`.
    pub fn install(binary: &Path, dir: &Path) -> io::Result<Self> {
        let program = dir.join("qemu-system-x86_64");
        symlink(binary, &program)?;
        let control = UnixListener::bind(control_socket(&program))?;
        let shared = Arc::new(Shared::default());
        let of_thread = Arc::clone(&shared);
        thread::spawn(move || {
            while let Ok((stream, _)) = control.accept() {
                // The program sees that nothing is replied, and fails.
                let _ = of_thread.take_over(&stream);
            }
        });
        Ok(Self { program, shared })
    }

    /// Returns the path to run.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Sets the faults, at once where nothing else is said.
    pub fn set(&self, faults: QemuFaults) {
        *held(&self.shared.faults) = faults;
    }

    /// Returns the QMP commands that were sent so far.
    pub fn commands(&self) -> Vec<String> {
        held(&self.shared.commands).clone()
    }
}

/// Returns the socket at which the test that installed `program` takes over monitors.
pub fn control_socket(program: &Path) -> PathBuf {
    program.with_extension("control")
}

impl Shared {
    /// Serves the monitors of one QEMU from now on; replies whether it is to ignore signals.
    fn take_over(self: &Arc<Self>, mut stream: &UnixStream) -> io::Result<()> {
        let mut text = vec![0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_MONITORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let message =
            recvmsg(stream, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let sockets = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
            _ => None,
        });
        let sockets: Vec<OwnedFd> = sockets.flatten().collect();
        let handover: Handover = serde_json::from_slice(&text[..message.bytes])?;
        let pid = Pid::from_raw(handover.pid).ok_or(io::ErrorKind::InvalidData)?;
        for (socket, name) in sockets.into_iter().zip(handover.names) {
            let monitor = Monitor {
                listener: socket.into(),
                qemu: SocketAddr::from_abstract_name(name)?,
                process: pidfd_open(pid, PidfdFlags::empty())?,
                shared: Arc::clone(self),
            };
            thread::spawn(move || monitor.serve());
        }
        stream.write_all(&[u8::from(held(&self.faults).ignore_signals)])
    }

    /// Returns what is replied to a command in QEMU's place: nothing, or a value.
    fn reply(&self, command: &str) -> Option<Option<Value>> {
        held(&self.commands).push(command.to_owned());
        let mut faults = held(&self.faults);
        if faults.is_silent || faults.mute.contains(&command) {
            return Some(None);
        }
        let (status, until) = faults.status?;
        if command == until {
            faults.status = None;
            return Some(Some(json!({})));
        }
        (command == "query-status").then(|| Some(json!({ "status": status, "running": false })))
    }

    /// Returns what a client gets for a line of QEMU's, where this is what replies shall be.
    fn passed(&self, line: Vec<u8>, replies: &mut Vec<(Value, Value)>) -> Option<Vec<u8>> {
        let faults = held(&self.faults);
        if faults.is_silent {
            return None;
        }
        if let Some(greeting) = faults.greeting.filter(|_| line.starts_with(b"{\"QMP\"")) {
            return Some(format!("{greeting}\r\n").into_bytes());
        }
        let reply: Value = serde_json::from_slice(&line).unwrap_or_default();
        let Some(at) = replies.iter().position(|(id, _)| reply.get("id") == Some(id)) else {
            return Some(line);
        };
        let (id, value) = replies.swap_remove(at);
        Some(format!("{}\r\n", json!({ "return": value, "id": id })).into_bytes())
    }
}

/// One monitor.
struct Monitor {
    listener: UnixListener,
    qemu: SocketAddr,
    process: OwnedFd,
    shared: Arc<Shared>,
}

impl Monitor {
    /// Serves one client after the other, as QEMU does, until QEMU has ended.
    fn serve(self) {
        loop {
            let mut ready =
                [PollFd::new(&self.listener, PollFlags::IN), PollFd::new(&self.process, PollFlags::IN)];
            if poll(&mut ready, None).is_err() || !ready[1].revents().is_empty() {
                return;
            }
            // The listener does not block: the client may have gone.
            let Ok((client, _)) = self.listener.accept() else { continue };
            let Ok(qemu) = UnixStream::connect_addr(&self.qemu) else { return };
            // However a conversation ends, it is over.
            let _ = client.set_nonblocking(false).and_then(|()| self.converse(&client, &qemu));
        }
    }

    fn converse(&self, client: &UnixStream, qemu: &UnixStream) -> io::Result<()> {
        let replies = Mutex::new(Vec::new());
        thread::scope(|scope| {
            scope.spawn(|| {
                let _ = lines(qemu, |line| match self.shared.passed(line, &mut held(&replies)) {
                    Some(line) => (&mut &*client).write_all(&line),
                    None => Ok(()),
                });
                client.shutdown(Shutdown::Both)
            });
            let files = Mutex::new(Vec::new());
            let received = lines(FileReceiver { stream: client, files: &files }, |line| {
                let request: Value = serde_json::from_slice(&line).unwrap_or_default();
                match self.shared.reply(request["execute"].as_str().unwrap_or_default()) {
                    None => send(qemu, &line, std::mem::take(&mut *held(&files))),
                    Some(None) => Ok(()),
                    Some(Some(value)) => {
                        // QEMU replies to something else at that place: commands may be pipelined.
                        held(&replies).push((request["id"].clone(), value));
                        let harmless = json!({ "execute": "query-status", "id": request["id"] });
                        (&mut &*qemu).write_all(format!("{harmless}\n").as_bytes())
                    }
                }
            });
            // A client that has gone frees the monitor.
            let _ = qemu.shutdown(Shutdown::Both);
            received
        })
    }
}

/// A client's end of a conversation: the open files that come with its lines are kept.
struct FileReceiver<'a> {
    stream: &'a UnixStream,
    files: &'a Mutex<Vec<OwnedFd>>,
}

impl Read for FileReceiver<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(buffer)];
        let received = recvmsg(self.stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                held(self.files).extend(files);
            }
        }
        Ok(received.bytes)
    }
}

/// Sends a line, and with it the open files that came with it.
fn send(qemu: &UnixStream, line: &[u8], files: Vec<OwnedFd>) -> io::Result<()> {
    let Some(file) = files.first() else { return (&mut &*qemu).write_all(line) };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&files));
    let sent = sendmsg(qemu, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?;
    (&mut &*qemu).write_all(&line[sent..])
}

/// Passes on each line of a stream, until its end.
fn lines(stream: impl Read, mut take: impl FnMut(Vec<u8>) -> io::Result<()>) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        if reader.read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        take(line)?;
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
