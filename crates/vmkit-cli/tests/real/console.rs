//! The console at a terminal and at a pipe: mostly with a socket of the test in QEMU's place.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use vmkit_testkit::guest;

use crate::harness::Life;
use crate::support::stream::{DEADLINE, Heard, ended};
use crate::support::{Host, answer};

const ESCAPE: &[u8] = b"\x1d";

/// A host with the VM `web`, which runs until this is dropped.
struct RunningHost(Host);

impl RunningHost {
    fn new() -> Self {
        let host = Self(Host::with_real_qemu());
        host.must(["create", "web", "--image", "base.img", "--memory", "64MiB", "--accel", "tcg"]);
        host.must(["start", "web"]);
        host
    }
}

impl Deref for RunningHost {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.0
    }
}

impl Drop for RunningHost {
    fn drop(&mut self) {
        self.0.vmkit(["stop", "--timeout", "0", "web"]);
    }
}

/// A VM that runs, and whose console is served by the test: a VM that does not run has none.
struct Served {
    host: RunningHost,
    socket: PathBuf,
    listener: UnixListener,
}

impl Served {
    fn new() -> Self {
        let host = RunningHost::new();
        let socket = PathBuf::from(host.must(["console", "web", "--print-endpoint"]).trim_end());
        // QEMU goes on listening at a socket that has no name any more.
        fs::remove_file(&socket).unwrap();
        let listener = UnixListener::bind(&socket).unwrap();
        Self { host, socket, listener }
    }

    fn log(&self, content: &str) {
        fs::write(self.host.home().join("vms/web/console.log"), content).unwrap();
    }

    fn accept(&self) -> Heard<UnixStream> {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Heard::new(stream)
    }

    /// Attaches a terminal to the console.
    fn attach(&self) -> Attached {
        let terminal = Terminal::new();
        let mut command = self.host.command(["console", "web"]);
        let mut child = terminal.run(&mut command);
        let notes = Heard::new(child.stderr.take().unwrap());
        let mut attached = Attached { terminal, child, notes };
        attached.notes.until("attached to the console of web; Ctrl-] detaches");
        attached
    }
}

/// A terminal and the program at it.
struct Attached {
    terminal: Terminal,
    child: Child,
    notes: Heard<ChildStderr>,
}

struct Terminal {
    ours: Heard<File>,
    theirs: OwnedFd,
}

impl Terminal {
    fn new() -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&ours).unwrap();
        unlockpt(&ours).unwrap();
        let path = ptsname(&ours, Vec::new()).unwrap();
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let theirs = open(path.as_c_str(), flags, Mode::empty()).unwrap();
        Self { ours: Heard::new(ours.into()), theirs }
    }

    fn run(&self, command: &mut Command) -> Child {
        let end = || Stdio::from(self.theirs.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn type_in(&mut self, bytes: &[u8]) {
        self.ours.stream().write_all(bytes).unwrap();
    }

    /// Returns whether the terminal is as a shell leaves it: it echoes and reads by lines.
    fn is_cooked(&self) -> bool {
        let modes = tcgetattr(&self.theirs).unwrap().local_modes;
        modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }
}

#[test]
fn a_person_sees_the_past_talks_to_the_guest_and_leaves() {
    let served = Served::new();
    served.log("booted\r\nlogin: ");
    let mut attached = served.attach();
    let mut guest = served.accept();
    attached.terminal.ours.until("booted\r\nlogin: ");
    assert!(!attached.terminal.is_cooked());

    // Ctrl-C and Ctrl-Z are the guest's.
    attached.terminal.type_in(b"root\r\x03\x1a");
    guest.until("root\r\x03\x1a");
    guest.stream().write_all(b"welcome\r\n# ").unwrap();
    attached.terminal.ours.until("welcome\r\n# ");

    attached.terminal.type_in(b"x\x1dnot sent");
    assert_eq!(ended(&mut attached.child).code(), Some(0));
    assert!(attached.terminal.is_cooked());
    assert!(attached.notes.rest().contains("detached from the console of web"));
    assert!(guest.rest().ends_with('x'));
}

#[test]
fn only_the_end_of_a_long_past_is_shown_and_it_begins_with_a_line() {
    let served = Served::new();
    let line = format!("{}\r\n", "x".repeat(100));
    served.log(&format!("first line\r\n{}the end", line.repeat(2000)));
    let mut attached = served.attach();
    attached.terminal.ours.until("the end");
    let shown = &attached.terminal.ours.text;
    assert!(shown.len() <= 64 << 10 && shown.len() > 60 << 10, "{}", shown.len());
    assert!(shown.starts_with(&line), "{:?}", &shown[..200]);
    attached.terminal.type_in(ESCAPE);
    ended(&mut attached.child);
}

#[test]
fn the_end_of_the_vm_gives_the_terminal_back_with_a_note() {
    let served = Served::new();
    let mut attached = served.attach();
    let mut guest = served.accept();
    guest.stream().write_all(b"reboot: Power down").unwrap();
    attached.terminal.ours.until("Power down");
    drop(guest);
    assert_eq!(ended(&mut attached.child).code(), Some(0));
    assert!(attached.terminal.is_cooked());
    assert!(attached.notes.rest().contains("the console of web has closed: the VM has ended"));
}

#[test]
fn a_signal_gives_the_terminal_back_and_is_died_of() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let served = Served::new();
        let mut attached = served.attach();
        assert!(!attached.terminal.is_cooked());
        kill_process(Pid::from_child(&attached.child), signal).unwrap();
        assert_eq!(ended(&mut attached.child).signal(), Some(signal.as_raw()));
        assert!(attached.terminal.is_cooked(), "{signal:?}");
    }
}

#[test]
fn a_terminal_that_takes_no_output_can_still_be_ended() {
    let served = Served::new();
    let mut attached = served.attach();
    let mut guest = served.accept();
    // The terminal is not read from here on; when the socket is full, too, the program has stopped
    // reading.
    guest.stream().set_nonblocking(true).unwrap();
    while guest.stream().write(&[b'x'; 4096]).is_ok() {}
    kill_process(Pid::from_child(&attached.child), Signal::TERM).unwrap();
    assert_eq!(ended(&mut attached.child).signal(), Some(Signal::TERM.as_raw()));
    assert!(attached.terminal.is_cooked());
}

#[test]
fn a_guest_that_reads_nothing_delays_no_client() {
    let served = Served::new();
    let mut attached = served.attach();
    let _guest = served.accept();
    for _ in 0..1024 {
        attached.terminal.type_in(&[b'x'; 1024]);
    }
    attached.terminal.type_in(ESCAPE);
    assert_eq!(ended(&mut attached.child).code(), Some(0));
    assert!(attached.terminal.is_cooked());
}

#[test]
fn a_second_client_of_a_console_gets_the_pid_of_the_first() {
    let served = Served::new();
    let mut attached = served.attach();
    let _guest = served.accept();
    let answer = served.host.vmkit(["console", "web"]);
    assert_eq!(answer.code, Some(6), "{answer:?}");
    let first = attached.child.id();
    assert_eq!(answer.stderr, format!("error: the console of the VM `web` is in use by process {first}\n"));

    attached.terminal.type_in(ESCAPE);
    ended(&mut attached.child);
    let mut attached = served.attach();
    attached.terminal.type_in(ESCAPE);
    assert_eq!(ended(&mut attached.child).code(), Some(0));
}

#[test]
fn a_console_that_another_program_holds_is_not_silent_about_it() {
    let served = Served::new();
    let _other = UnixStream::connect(&served.socket).unwrap();
    let _its_guest = served.accept();
    // As QEMU does: no second client is accepted.
    let mut attached = served.attach();
    attached.notes.until("another program uses this console");
    attached.terminal.type_in(ESCAPE);
    assert_eq!(ended(&mut attached.child).code(), Some(0));
    assert!(attached.terminal.is_cooked());
}

#[test]
fn a_pipe_is_sent_whole_and_output_is_read_for_the_time_after_it() {
    let served = Served::new();
    served.log("past\n");
    let mut command = served.host.command(["console", "web", "--timeout", "1"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut guest = served.accept();
    let sent = "a long command\x1d\n".repeat(20_000);
    let mut stdin = child.stdin.take().unwrap();
    let written = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(written.as_bytes()));
    let mut received = vec![0; sent.len()];
    guest.stream().read_exact(&mut received).unwrap();
    assert!(received == sent.as_bytes(), "the escape is for terminals alone");
    writer.join().unwrap().unwrap();
    guest.stream().write_all(b"done\n").unwrap();
    let answer = answer(child.wait_with_output().unwrap());
    assert_eq!((answer.code, answer.stdout.as_str(), answer.stderr.as_str()), (Some(0), "past\ndone\n", ""));
}

#[test]
fn without_a_timeout_a_pipe_reads_the_guest_to_its_end() {
    let served = Served::new();
    let child = served.host.command(["console", "web"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut guest = served.accept();
    guest.stream().write_all(b"last words\n").unwrap();
    drop(guest);
    let answer = answer(child.unwrap().wait_with_output().unwrap());
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(0), "last words\n"));
    assert!(answer.stderr.contains("the VM has ended"), "{answer:?}");
}

#[test]
fn a_reader_who_leaves_ends_the_console_even_if_the_guest_is_silent() {
    let served = Served::new();
    let mut child = served.host.command(["console", "web"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut guest = served.accept();
    drop(child.stdout.take());
    assert_eq!(ended(&mut child).code(), Some(0));
    let read = guest.stream().read(&mut [0; 16]);
    assert!(
        read.as_ref().is_ok_and(|&bytes| bytes == 0)
            || read.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
    );
}

#[test]
fn a_vm_that_does_not_run_has_no_console_whatever_listens_at_its_socket() {
    let host = Host::with_refusing_qemu();
    host.create("web");
    // As the VM of a home does that this one is a copy of.
    let socket = PathBuf::from(host.must(["console", "web", "--print-endpoint"]).trim_end());
    fs::create_dir_all(socket.parent().unwrap()).unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    let answer = host.vmkit(["console", "web"]);
    assert_eq!(answer.code, Some(4), "{answer:?}");
    assert!(answer.stderr.contains("the console is known only while the VM runs"), "{answer:?}");
}

/// With a guest of the real QEMU.
#[test]
fn a_shell_in_the_guest_replies_at_the_console() {
    let life = Life::new();
    life.boot("web", "");
    let mut command = life.command(["console", "web"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut said = Heard::new(child.stdout.take().unwrap());
    said.until(&guest::tiny().ready_line);

    let second = life.vmkit(["console", "web"]);
    assert_eq!(second.code, Some(6), "{second:?}");
    assert!(second.stderr.contains(&format!("by process {}", child.id())), "{second:?}");

    let mut stdin = child.stdin.take().unwrap();
    // QEMU logs a byte after it has sent it: once a later one is here, the first answer is in the
    // log, killed or not.
    stdin.write_all(b"\necho $((6 * 7 * 1000)); echo $((43 * 1000))\n").unwrap();
    said.until("43000");
    life.must(["stop", "web", "--timeout", "0"]);
    assert!(ended(&mut child).success());
    assert!(life.must(["logs", "web", "--tail", "20"]).contains("42000"));
}
