//! A QEMU that is started and spoken to by hand: the same command line, sockets bound the same way,
//! and nothing else.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::FdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vmkit::qemu::QemuPlan;

use crate::Result;

/// The number that a plan's arguments give the log of the console.
const CONSOLE_LOG: i32 = 205;
/// The number that they give the monitor for events.
const EVENTS: i32 = 208;

/// How long anybody is waited for: a machine under load is slow, a guest that hangs is hung.
const PATIENCE: Duration = Duration::from_secs(120);

/// A command line with everything that it refers to.
pub(crate) struct Outfit {
    command: Command,
    run: PathBuf,
    descriptors: Vec<OwnedFd>,
}

/// A QEMU that only this process knows; ended when dropped.
pub(crate) struct ByHand {
    child: Child,
    run: PathBuf,
}

/// A monitor that has greeted.
pub(crate) struct Monitor(BufReader<UnixStream>);

impl Outfit {
    /// Binds the sockets of a plan, and gives them the numbers that it says.
    pub(crate) fn of(plan: &QemuPlan, console_log: &Path) -> Result<Self> {
        let run = plan.sockets.first().and_then(|socket| socket.path.parent());
        let run = run.ok_or("a plan without sockets")?.to_owned();
        fs::create_dir_all(&run)?;
        let mut descriptors = Vec::new();
        for socket in &plan.sockets {
            if let Some(parent) = socket.path.parent() {
                fs::create_dir_all(parent)?;
            }
            // The one in the VM's directory is still there after an earlier run.
            let _ = fs::remove_file(&socket.path);
            let listener = UnixListener::bind(&socket.path)?;
            descriptors.push(inheritable(listener.into(), socket.descriptor)?);
        }
        descriptors.push(inheritable(File::create(console_log)?.into(), CONSOLE_LOG)?);
        // What it writes there is lost, as after the death of a keeper.
        let (theirs, _) = UnixStream::pair()?;
        descriptors.push(inheritable(theirs.into(), EVENTS)?);
        let mut command = Command::new(&plan.program);
        command.args(&plan.args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self { command, run, descriptors })
    }

    /// Adds arguments.
    pub(crate) fn with_args(mut self, args: &[&str]) -> Self {
        self.command.args(args);
        self
    }

    /// Adds an open file under a number.
    pub(crate) fn with_file(mut self, file: File, number: i32) -> Result<Self> {
        self.descriptors.push(inheritable(file.into(), number)?);
        Ok(self)
    }

    /// Executes it.
    pub(crate) fn spawn(mut self) -> Result<ByHand> {
        let child = self.command.spawn()?;
        drop(self.descriptors);
        Ok(ByHand { child, run: self.run })
    }
}

fn inheritable(descriptor: OwnedFd, number: i32) -> Result<OwnedFd> {
    let copy = rustix::io::fcntl_dupfd_cloexec(&descriptor, number)?;
    if copy.as_raw_fd() != number {
        return Err(format!("the descriptor {number} is taken").into());
    }
    rustix::io::fcntl_setfd(&copy, FdFlags::empty())?;
    Ok(copy)
}

impl ByHand {
    /// Connects to the monitor and negotiates.
    pub(crate) fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.run.join("qmp.sock"))
    }

    /// Connects to the guest's console.
    pub(crate) fn console(&self) -> Result<Console> {
        Console::connect(&self.run.join("console.sock"))
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(&mut self) -> Result<()> {
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        // What has ended already can't be killed, and the directory is in a temporary one anyway.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.run);
    }
}

impl Monitor {
    /// Connects to the monitor that listens at a path, and negotiates.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let mut monitor = Self::greeted(path)?;
        monitor.execute("qmp_capabilities")?;
        Ok(monitor)
    }

    fn greeted(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self(BufReader::new(stream));
        monitor.line_with("\"QMP\"")?;
        Ok(monitor)
    }

    /// Runs a command and waits for what it returns.
    pub(crate) fn execute(&mut self, command: &str) -> Result<()> {
        self.send(command)?;
        self.line_with("\"return\"")
    }

    /// Runs a command with arguments, as JSON.
    pub(crate) fn execute_with(&mut self, command: &str, arguments: &str) -> Result<()> {
        self.0.get_mut().write_all(line(command, Some(arguments)).as_bytes())?;
        self.line_with("\"return\"")
    }

    /// Gives QEMU an open file under a name.
    pub(crate) fn give_file(&mut self, name: &str, file: &File) -> Result<()> {
        let text = line("getfd", Some(&format!("{{\"fdname\": \"{name}\"}}")));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&files));
        let bytes = [IoSlice::new(text.as_bytes())];
        rustix::net::sendmsg(self.0.get_ref(), &bytes, &mut control, SendFlags::NOSIGNAL)?;
        self.line_with("\"return\"")
    }

    /// Waits for a line with this word, such as an event.
    pub(crate) fn says(&mut self, word: &str) -> Result<()> {
        self.line_with(word)
    }

    fn send(&mut self, command: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(line(command, None).as_bytes())?)
    }

    fn line_with(&mut self, word: &str) -> Result<()> {
        line_with(&mut self.0, word)
    }
}

fn line(command: &str, arguments: Option<&str>) -> String {
    let arguments = arguments.map_or(String::new(), |arguments| format!(", \"arguments\": {arguments}"));
    format!("{{\"execute\": \"{command}\"{arguments}}}\n")
}

/// Asks all monitors for their status, all at the same time, and returns how long that took.
pub(crate) fn ask_all(sockets: &[PathBuf]) -> Result<Duration> {
    let begin = Instant::now();
    let mut monitors = Vec::new();
    for path in sockets {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Monitor(BufReader::new(stream));
        monitor.send("qmp_capabilities")?;
        monitor.send("query-status")?;
        monitors.push(monitor);
    }
    for monitor in &mut monitors {
        monitor.line_with("\"status\"")?;
    }
    Ok(begin.elapsed())
}

/// A guest's console: what the guest says from here on is not lost.
pub(crate) struct Console(BufReader<UnixStream>);

impl Console {
    /// Connects to the console that listens at a path.
    pub(crate) fn connect(path: &Path) -> Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Waits until the guest has said this.
    pub(crate) fn says(mut self, words: &str) -> Result<()> {
        line_with(&mut self.0, words)
    }
}

fn line_with(lines: &mut impl BufRead, word: &str) -> Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = lines.read_until(b'\n', &mut line).map_err(|error| format!("wait for {word}: {error}"))?;
        if read == 0 {
            return Err(format!("it closed the connection before it said {word}").into());
        }
        if String::from_utf8_lossy(&line).contains(word) {
            return Ok(());
        }
    }
}
