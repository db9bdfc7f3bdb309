//! The machine: where it is, who is told of it, and how it ends.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::future::poll_fn;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};
use tokio::signal::unix::Signal;
use tokio::sync::Notify;
use tokio::time::sleep;
use vmkit_testkit::fake_qemu::{QemuBehaviour, QemuFault};

use crate::args::{CommandLine, ForwardArg};
use crate::host::HeldResources;
use crate::say;

/// How the process ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum ExitCause {
    Exit(i32),
    Signal(i32),
}

/// An answer to a command: its value, or the class and the text of a refusal.
pub(crate) type CommandResult = Result<Value, (&'static str, String)>;

/// The machine, as its monitors see it.
#[derive(Debug)]
pub(crate) struct FakeMachine {
    behaviour: QemuBehaviour,
    /// As `query-status` names it.
    state: &'static str,
    panic_pauses: bool,
    name: Option<String>,
    uuid: Option<String>,
    chardevs: Vec<String>,
    forwards: Vec<ForwardArg>,
    vnc_port: Option<u16>,
    since: Instant,
    /// The clients that have negotiated, of all monitors.
    clients: Vec<Rc<UnixStream>>,
    end: Option<ExitCause>,
    pressed: bool,
    changed: Rc<Notify>,
}

impl FakeMachine {
    pub(crate) fn new(line: &CommandLine, behaviour: QemuBehaviour, held: &HeldResources) -> Self {
        Self {
            behaviour,
            state: if line.paused { "prelaunch" } else { "running" },
            panic_pauses: line.panic_pauses,
            name: line.name.clone(),
            uuid: line.uuid.clone(),
            chardevs: line.chardevs.iter().map(|it| it.id.clone()).collect(),
            forwards: held.forwards.clone(),
            vnc_port: held.vnc_port,
            since: Instant::now(),
            clients: Vec::new(),
            end: None,
            pressed: false,
            changed: Rc::default(),
        }
    }

    pub(crate) fn behaviour(&self) -> &QemuBehaviour {
        &self.behaviour
    }

    /// Subscribes a client to events, until [`leave`](Self::leave).
    pub(crate) fn join(&mut self, client: Rc<UnixStream>) {
        self.clients.push(client);
    }

    pub(crate) fn leave(&mut self, client: &Rc<UnixStream>) {
        self.clients.retain(|it| !Rc::ptr_eq(it, client));
    }

    /// Does what a command says.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> CommandResult {
        match command {
            "qmp_capabilities" => {
                let text = "Capabilities negotiation is already complete, command ignored";
                return Err(("CommandNotFound", text.to_owned()));
            }
            "query-status" => {
                let running = self.state == "running";
                return Ok(json!({ "status": self.state, "singlestep": false, "running": running }));
            }
            "stop" => self.pause("paused"),
            "cont" => self.go_on()?,
            "system_wakeup" if self.state == "suspended" => {
                self.state = "running";
                self.tell("WAKEUP", Value::Null);
                self.changed.notify_waiters();
            }
            "system_wakeup" => {
                let text = "Unable to wake up: guest is not in suspended state";
                return Err(("GenericError", text.to_owned()));
            }
            "system_powerdown" => {
                self.tell("POWERDOWN", Value::Null);
                self.press();
            }
            "quit" => {
                self.tell("SHUTDOWN", json!({ "guest": false, "reason": "host-qmp-quit" }));
                self.finish(ExitCause::Exit(0));
            }
            "set_password" => {}
            "human-monitor-command" => {
                let line = arguments["command-line"].as_str().unwrap_or_default();
                return Ok(Value::from(self.people(line)));
            }
            "query-version" => return Ok(version()),
            "query-name" => return Ok(self.name.as_ref().map_or(json!({}), |name| json!({ "name": name }))),
            "query-uuid" => {
                let uuid = self.uuid.as_deref().unwrap_or("00000000-0000-0000-0000-000000000000");
                return Ok(json!({ "UUID": uuid }));
            }
            "query-chardev" => return Ok(self.chardevs.iter().map(|id| chardev(id)).collect()),
            "query-vnc" => {
                let port = self.vnc_port.map(|port| port.to_string());
                return Ok(match port {
                    Some(port) => json!({"enabled": true, "auth": "vnc", "family": "ipv4", "clients": [],
                        "service": port, "host": "127.0.0.1"}),
                    None => json!({ "enabled": false }),
                });
            }
            "query-commands" => return Ok(COMMANDS.iter().map(|name| json!({ "name": name })).collect()),
            unknown => {
                return Err(("CommandNotFound", format!("The command {unknown} has not been found")));
            }
        }
        Ok(json!({}))
    }

    /// Applies an event to the machine.
    pub(crate) fn suffer(&mut self, blow: QemuFault) {
        match blow {
            QemuFault::Panic if self.panic_pauses => {
                self.tell("GUEST_PANICKED", json!({ "action": "pause" }));
                self.pause("guest-panicked");
            }
            QemuFault::Panic => {
                self.tell("GUEST_PANICKED", json!({ "action": "poweroff" }));
                self.tell("SHUTDOWN", json!({ "guest": true, "reason": "guest-panic" }));
                self.finish(ExitCause::Exit(0));
            }
            QemuFault::InternalError => self.pause("internal-error"),
            QemuFault::IoError => {
                self.tell("BLOCK_IO_ERROR", json!({ "device": "", "action": "stop", "operation": "write" }));
                self.pause("io-error");
            }
            QemuFault::Sleep => {
                self.tell("SUSPEND", Value::Null);
                self.pause("suspended");
            }
            QemuFault::Exit(code) => self.finish(ExitCause::Exit(code)),
            QemuFault::Signal(number) => self.finish(ExitCause::Signal(number)),
        }
    }

    fn pause(&mut self, state: &'static str) {
        if self.state == "running" {
            self.tell("STOP", Value::Null);
        }
        if matches!(self.state, "running" | "prelaunch" | "paused") {
            self.state = state;
        }
    }

    fn go_on(&mut self) -> Result<(), (&'static str, String)> {
        match self.state {
            "running" => {}
            "internal-error" => {
                return Err(("GenericError", "Resetting the Virtual Machine is required".to_owned()));
            }
            _ => {
                self.state = "running";
                self.tell("RESUME", Value::Null);
                self.changed.notify_waiters();
            }
        }
        Ok(())
    }

    fn press(&mut self) {
        let deaf = Duration::from_millis(self.behaviour.deaf_ms);
        if self.state != "suspended" && !self.behaviour.ignore_power_down && self.since.elapsed() >= deaf {
            self.pressed = true;
            self.changed.notify_waiters();
        }
    }

    /// Returns what the monitor for people prints.
    fn people(&self, line: &str) -> String {
        match line {
            "info status" => match self.state {
                "running" | "paused" => format!("VM status: {}\r\n", self.state),
                state => format!("VM status: paused ({state})\r\n"),
            },
            "info usernet" if self.forwards.is_empty() => String::new(),
            "info usernet" => {
                let mut table = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   \
                    Dest. Address  Port RecvQ SendQ\r\n"
                    .to_owned();
                for forward in &self.forwards {
                    let protocol = if forward.udp { "UDP[HOST_FORWARD]" } else { "TCP[HOST_FORWARD]" };
                    let host =
                        if forward.host.is_unspecified() { "*".to_owned() } else { forward.host.to_string() };
                    let (host_port, guest_port) = (forward.host_port, forward.guest_port);
                    let row = format!(
                        "  {protocol:19} 10 {host:>15} {host_port:>5}       10.0.2.15 {guest_port:>5}"
                    );
                    let _ = write!(table, "{row}     0     0\r\n");
                }
                table
            }
            unknown => {
                let word = unknown.split(' ').next().unwrap_or_default();
                format!("unknown command: '{word}'\r\n")
            }
        }
    }

    fn tell(&mut self, event: &str, data: Value) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({ "seconds": now.as_secs(), "microseconds": now.subsec_micros() });
        let mut line = json!({ "timestamp": timestamp, "event": event });
        if !data.is_null() {
            line["data"] = data;
        }
        for client in &self.clients {
            write_line(client, &line);
        }
    }

    fn finish(&mut self, end: ExitCause) {
        self.end.get_or_insert(end);
        self.changed.notify_waiters();
    }
}

/// The commands that are known, as `query-commands` lists them.
const COMMANDS: [&str; 15] = [
    "qmp_capabilities",
    "query-status",
    "stop",
    "cont",
    "system_powerdown",
    "system_wakeup",
    "quit",
    "set_password",
    "human-monitor-command",
    "query-version",
    "query-name",
    "query-uuid",
    "query-chardev",
    "query-vnc",
    "query-commands",
];

/// Returns the version as the greeting and `query-version` tell it.
pub(crate) fn version() -> Value {
    json!({ "qemu": { "micro": 22, "minor": 2, "major": 7 }, "package": "vmkit-fake-qemu" })
}

fn chardev(id: &str) -> Value {
    json!({ "frontend-open": true, "filename": "disconnected:unix:", "label": id })
}

/// Writes a line at once; a client whose buffer is full has not read for long, and loses it.
pub(crate) fn write_line(mut stream: &UnixStream, line: &Value) {
    let _ = stream.write_all(format!("{line}\r\n").as_bytes());
}

/// Plays the guest: it shuts down a while after its power button was pressed, while it runs.
pub(crate) async fn guest(machine: Rc<RefCell<FakeMachine>>) {
    when(&machine, |it| (it.pressed && it.state == "running").then_some(())).await;
    let takes = Duration::from_millis(machine.borrow().behaviour.power_down_ms);
    sleep(takes).await;
    when(&machine, |it| (it.state == "running").then_some(())).await;
    let mut machine = machine.borrow_mut();
    machine.tell("SHUTDOWN", json!({ "guest": true, "reason": "guest-shutdown" }));
    machine.finish(ExitCause::Exit(0));
}

/// Waits for the end, by itself or by a signal.
pub(crate) async fn ended(
    machine: &Rc<RefCell<FakeMachine>>,
    mut signals: Vec<(i32, Option<QemuFault>, Signal)>,
) -> ExitCause {
    loop {
        let signal = poll_fn(|context| {
            let arrived = signals
                .iter_mut()
                .find_map(|(number, blow, it)| it.poll_recv(context).is_ready().then_some((*number, *blow)));
            arrived.map_or(Poll::Pending, Poll::Ready)
        });
        let (number, blow) = tokio::select! {
            end = when(machine, |it| it.end) => return end,
            signal = signal => signal,
        };
        let mut machine = machine.borrow_mut();
        match blow {
            Some(blow) => machine.suffer(blow),
            None if machine.behaviour.ignore_sigterm => {}
            None => {
                say(&format!("terminating on signal {number}"));
                machine.tell("SHUTDOWN", json!({ "guest": false, "reason": "host-signal" }));
                machine.finish(ExitCause::Exit(0));
            }
        }
    }
}

/// Waits until `what` returns a value.
async fn when<T>(machine: &Rc<RefCell<FakeMachine>>, what: impl Fn(&FakeMachine) -> Option<T>) -> T {
    let changed = Rc::clone(&machine.borrow().changed);
    loop {
        let notified = changed.notified();
        if let Some(found) = what(&machine.borrow()) {
            return found;
        }
        notified.await;
    }
}
