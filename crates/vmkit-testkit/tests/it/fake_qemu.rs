//! The fake QEMU speaks like the real one where it says so, and misbehaves where it is told to.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use vmkit_testkit::fake_qemu::{FakeQemu, QemuBehaviour, QemuFault, StartRefusal, TimedFault};

const FAKE: &str = env!("CARGO_BIN_EXE_vmkit-fake-qemu");
const REAL: &str = "qemu-system-x86_64";

/// A QEMU of either kind, whose monitor is its standard input.
struct Qemu {
    child: Child,
    dir: TempDir,
}

impl Qemu {
    fn start(program: &Path, args: &[&str], dir: TempDir) -> Self {
        let listener = UnixListener::bind(dir.path().join("qmp")).expect("a socket");
        // QEMU takes a listener as it is, and now and then accepts a client that another of its
        // threads has taken already: a listener that blocks would stop its main loop for good (seen
        // once with 7.2.22).
        listener.set_nonblocking(true).expect("a socket");
        let child = Command::new(program)
            .args(["-M", "none", "-nodefaults", "-display", "none", "-chardev"])
            .args(["socket,id=qmp,fd=0,server=on,wait=off", "-mon", "chardev=qmp,mode=control"])
            .args(args)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error} (cargo xtask setup)", program.display()));
        Self { child, dir }
    }

    fn fake(behaviour: &QemuBehaviour, args: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let fake = FakeQemu::install(FAKE.as_ref(), dir.path()).expect("a link");
        fake.behave(behaviour).expect("a file");
        Self::start(fake.program(), args, dir)
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.dir.path().join("qmp")).expect("a monitor");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        Client { lines: BufReader::new(stream.try_clone().expect("a copy")), stream }
    }

    /// Connects and negotiates.
    fn talk(&self) -> Client {
        let mut client = self.connect();
        client.hear();
        client.ask("qmp_capabilities");
        client
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Waits for the end and returns it with what was said on standard error.
    fn ended(mut self) -> (ExitStatus, String) {
        let mut said = String::new();
        self.child.stderr.take().expect("a pipe").read_to_string(&mut said).expect("text");
        (self.child.wait().expect("a child"), said)
    }
}

struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    fn say(&mut self, line: &str) {
        self.stream.write_all(format!("{line}\n").as_bytes()).expect("somebody listens");
    }

    /// Hears a line, without what differs between any two runs or versions; `null` at the end of
    /// the connection.
    fn hear(&mut self) -> Value {
        let mut line = String::new();
        // A QEMU that ends resets what it has not read.
        if self.lines.read_line(&mut line).is_err() || line.is_empty() {
            return Value::Null;
        }
        let mut value: Value = serde_json::from_str(&line).unwrap_or_else(|_| json!({ "not JSON": line }));
        if let Some(map) = value.as_object_mut() {
            map.remove("timestamp");
        }
        if let Some(version) = value.pointer_mut("/QMP/version") {
            *version = Value::Null;
        }
        // Gone since 9.0.
        if let Some(status) = value.get_mut("return").and_then(Value::as_object_mut) {
            status.remove("singlestep");
        }
        value
    }

    /// Hears until an answer comes, which is the last of what it returns.
    fn hear_answer(&mut self) -> Vec<Value> {
        let mut heard = Vec::new();
        loop {
            let line = self.hear();
            let last = line.is_null() || line.get("return").is_some() || line.get("error").is_some();
            heard.push(line);
            if last {
                return heard;
            }
        }
    }

    fn ask(&mut self, command: &str) -> Vec<Value> {
        self.say(&json!({ "execute": command, "id": 1 }).to_string());
        self.hear_answer()
    }

    fn status(&mut self) -> Value {
        self.ask("query-status").pop().expect("an answer")["return"]["status"].clone()
    }
}

/// Holds one long conversation and returns all that was heard.
fn conversation(qemu: Qemu) -> Vec<Value> {
    let mut client = qemu.connect();
    let mut heard = vec![client.hear()];
    let hmp = |line: &str| {
        json!({"execute": "human-monitor-command", "arguments": {"command-line": line}, "id": 2}).to_string()
    };
    let command = |name: &str| json!({ "execute": name, "id": name }).to_string();
    for line in [
        command("query-status"),
        command("qmp_capabilities"),
        command("qmp_capabilities"),
        r#"{"foo": 1}"#.to_owned(),
        "[]".to_owned(),
        r#"{"execute": "stop", "arguments": 3, "id": {"a": 1}}"#.to_owned(),
        r#"{"execute": "query-status"}"#.to_owned(),
        command("make-coffee"),
        command("query-name"),
        command("query-uuid"),
        hmp("info status"),
        command("system_powerdown"),
        command("cont"),
        command("query-status"),
        command("cont"),
        hmp("info status"),
        command("stop"),
        command("stop"),
        command("query-status"),
        hmp("info status"),
        hmp("info usernet"),
        hmp("make coffee"),
    ] {
        client.say(&line);
        heard.extend(client.hear_answer());
    }
    drop(client);
    let mut second = qemu.connect();
    heard.push(second.hear());
    second.ask("qmp_capabilities");
    // Whether the answer to `quit` or the event comes first, or gets through at all, is not the
    // same in any two runs.
    second.say(&command("quit"));
    let (status, said) = qemu.ended();
    heard.push(json!({ "code": status.code(), "said": said }));
    heard
}

#[test]
fn the_fake_says_what_the_real_one_says() {
    let args = ["-S", "-name", "guest=web,debug-threads=on", "-uuid", "0b0e8e4c-5a0a-4f2c-9a3e-000000000001"];
    let dir = tempfile::tempdir().expect("a directory");
    let real = conversation(Qemu::start(REAL.as_ref(), &args, dir));
    // The fake's guest would obey the button once it runs; the real one here has no guest.
    let deaf = QemuBehaviour { ignore_power_down: true, ..QemuBehaviour::default() };
    let fake = conversation(Qemu::fake(&deaf, &args));
    assert_eq!(real.len(), 28, "{real:#?}");
    assert_eq!(fake, real);
}

#[test]
fn both_end_with_code_0_at_sigterm() {
    let fake = Qemu::fake(&QemuBehaviour::default(), &[]);
    let real = Qemu::start(REAL.as_ref(), &["-S"], tempfile::tempdir().expect("a directory"));
    for qemu in [fake, real] {
        let mut client = qemu.talk();
        qemu.signal(Signal::TERM);
        let event = client.hear();
        assert_eq!((&event["event"], &event["data"]["reason"]), (&json!("SHUTDOWN"), &json!("host-signal")));
        let (status, said) = qemu.ended();
        assert_eq!(status.code(), Some(0));
        assert!(said.contains("terminating on signal 15"), "{said}");
    }
}

#[test]
fn both_refuse_what_they_can_not_have_in_the_same_words() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port();
    let forward = format!("user,id=n,hostfwd=tcp:127.0.0.1:{port}-:22");
    let missing = "driver=raw,node-name=a,file.driver=file,file.filename=/nowhere/disk";
    for args in [vec!["-foo"], vec!["-netdev", &forward], vec!["-blockdev", missing]] {
        let fake = Qemu::fake(&QemuBehaviour::default(), &args).ended();
        let real = Qemu::start(REAL.as_ref(), &args, tempfile::tempdir().expect("a directory")).ended();
        assert_eq!((fake.0.code(), &fake.1), (Some(1), &real.1), "{args:?}");
        assert_eq!(real.0.code(), Some(1));
    }
}

#[test]
fn two_fakes_do_not_get_one_image() {
    let disk = tempfile::NamedTempFile::new().expect("a file");
    let blockdev = format!("driver=raw,node-name=a,file.driver=file,file.filename={}", disk.path().display());
    let first = Qemu::fake(&QemuBehaviour::default(), &["-blockdev", &blockdev]);
    first.talk();
    let (status, said) = Qemu::fake(&QemuBehaviour::default(), &["-blockdev", &blockdev]).ended();
    assert_eq!(status.code(), Some(1));
    assert!(said.contains(r#"Failed to get "write" lock"#), "{said}");
    first.signal(Signal::TERM);
    assert!(first.ended().0.success());
}

#[test]
fn the_guest_obeys_its_button_while_it_runs() {
    let qemu = Qemu::fake(&QemuBehaviour::default(), &["-S"]);
    let mut client = qemu.talk();
    client.ask("system_powerdown");
    assert_eq!(client.status(), "prelaunch");
    client.ask("cont");
    let event = client.hear();
    assert_eq!((&event["event"], &event["data"]["reason"]), (&json!("SHUTDOWN"), &json!("guest-shutdown")));
    assert!(qemu.ended().0.success());
}

#[test]
fn a_deaf_guest_does_not_hear_an_early_press() {
    let qemu = Qemu::fake(&QemuBehaviour { deaf_ms: 300, ..QemuBehaviour::default() }, &[]);
    let mut client = qemu.talk();
    client.ask("system_powerdown");
    // The fake is deaf for a time.
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(client.status(), "running");
    client.ask("system_powerdown");
    assert_eq!(client.hear()["event"], "SHUTDOWN");
    assert!(qemu.ended().0.success());
}

#[test]
fn panics_and_other_failures_show_in_the_state() {
    let qemu = Qemu::fake(&QemuBehaviour::default(), &["-action", "panic=pause"]);
    let mut client = qemu.talk();
    qemu.signal(Signal::USR1);
    assert_eq!([client.hear()["event"].clone(), client.hear()["event"].clone()], ["GUEST_PANICKED", "STOP"]);
    assert_eq!(client.status(), "guest-panicked");
    client.ask("quit");
    assert!(qemu.ended().0.success());

    let fate = TimedFault { after_ms: 1, what: QemuFault::InternalError };
    let qemu = Qemu::fake(&QemuBehaviour { fate: Some(fate), ..QemuBehaviour::default() }, &[]);
    let mut client = qemu.talk();
    while client.status() == "running" {}
    assert_eq!(client.status(), "internal-error");
    let refused = client.ask("cont").pop().expect("an answer");
    assert_eq!(refused["error"]["desc"], "Resetting the Virtual Machine is required");
    client.ask("quit");
    assert!(qemu.ended().0.success());
}

#[test]
fn it_ends_as_it_is_told_to() {
    let refusal = StartRefusal { stderr: "no such thing\n".into(), code: 3 };
    let (status, said) =
        Qemu::fake(&QemuBehaviour { refusal: Some(refusal), ..QemuBehaviour::default() }, &[]).ended();
    assert_eq!((status.code(), said.as_str()), (Some(3), "no such thing\n"));

    use std::os::unix::process::ExitStatusExt;
    let fate = TimedFault { after_ms: 10, what: QemuFault::Signal(6) };
    let (status, _) =
        Qemu::fake(&QemuBehaviour { fate: Some(fate), ..QemuBehaviour::default() }, &[]).ended();
    assert_eq!(status.signal(), Some(6));
}

#[test]
fn it_is_silent_rude_or_stubborn_where_it_is_told_to() {
    let behaviour = QemuBehaviour {
        mute: vec!["stop".into()],
        refuse: [("cont".to_owned(), "I would rather not".to_owned())].into(),
        hang_up: vec!["query-name".into()],
        junk: true,
        ignore_sigterm: true,
        ..QemuBehaviour::default()
    };
    let qemu = Qemu::fake(&behaviour, &[]);
    let mut client = qemu.talk();
    client.say(r#"{"execute": "stop"}"#);
    let heard = client.ask("cont");
    assert_eq!(heard[0], json!({"not JSON": "\u{1b}[31mthis is not JSON\r\n"}));
    assert_eq!(heard[1]["error"]["desc"], "I would rather not");
    assert_eq!(client.ask("query-name"), [Value::Null]);
    qemu.signal(Signal::TERM);
    let mut client = qemu.talk();
    assert_eq!(client.status(), "running");
    client.ask("quit");
    assert!(qemu.ended().0.success());

    let qemu = Qemu::fake(&QemuBehaviour { greet: false, ..QemuBehaviour::default() }, &[]);
    let mut client = qemu.connect();
    client.stream.set_read_timeout(Some(Duration::from_millis(100))).expect("a timeout");
    client.say(r#"{"execute": "qmp_capabilities"}"#);
    assert_eq!(client.hear(), Value::Null, "it says nothing");
    qemu.signal(Signal::KILL);
    qemu.ended();
}

#[test]
fn it_tells_its_version_without_a_machine() {
    let output = Command::new(FAKE).arg("--version").output().expect("it runs");
    assert!(output.status.success());
    assert!(output.stdout.starts_with(b"QEMU emulator version 7.2."));
}
