//! A QEMU without a guest, for tests: it accepts the command lines that vmkit generates, speaks
//! QMP, and misbehaves on demand.
//!
//! Like QEMU 7.2.22, as measured:
//! - sockets inherited as file descriptors, with one client at a time; the greeting, the capability
//!   negotiation, ids, events and their order before the reply; the errors for unknown commands and
//!   for invalid JSON;
//! - `query-status`, `stop`, `cont`, `system_powerdown`, `quit`, `human-monitor-command` with
//!   `info usernet` and `info status`, `query-chardev`, `query-version`, `query-name`,
//!   `query-uuid`, `query-commands`, `query-vnc`, `set_password`;
//! - the states `prelaunch`, `running`, `paused`, `guest-panicked`, `internal-error`, `io-error`,
//!   `suspended`, and which of them `cont` refuses; a power button pressed while the guest is
//!   paused takes effect when it resumes;
//! - SIGTERM, SIGINT and SIGHUP end it with exit code 0; the messages on standard error for an
//!   unknown switch, a missing kernel or image, a port in use, an image in use;
//! - the host ports of forwards and the VNC socket are bound.
//!
//! Fake:
//! - there is no guest. The power button takes effect after a delay, the console prints one text
//!   and then echoes its input, and the agent's channel stays silent;
//! - property lists are parsed only as far as the above needs, so a misspelt device is accepted;
//! - images are locked against other fakes only; a forwarded port accepts no connection;
//! - a QMP command must be one line, where QEMU accepts any white space.
//!
//! [`vmkit_testkit::fake_qemu::QemuBehaviour`] sets the behaviour: JSON in `VMKIT_FAKE_QEMU` or in
//! a file named there, else the file `NAME.json` beside the name it was started as. SIGUSR1
//! simulates a guest panic, SIGUSR2 a failure of the virtualisation.

mod args;
mod host;
mod machine;
mod monitor;

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;
use vmkit_testkit::fake_qemu::{QemuBehaviour, QemuFault, VARIABLE, behaviour_of};

use args::{ChardevArg, CommandLine};
use machine::{ExitCause, FakeMachine};

/// The output of `--version`.
const VERSION: &str = "QEMU emulator version 7.2.22 (vmkit-fake-qemu)";

fn main() {
    // Started as a VM's keeper, it is a real keeper, so that tests need only one program.
    vmkit::run_if_keeper();
    let mut args = std::env::args_os();
    let program = PathBuf::from(args.next().unwrap_or_default());
    let result = CommandLine::parse(args).and_then(|line| {
        if line.version {
            return writeln!(io::stdout(), "{VERSION}").map_err(|error| error.to_string());
        }
        let behaviour = behaviour_of(&program, std::env::var_os(VARIABLE))
            .map_err(|error| format!("reading the behaviour failed: {error}"))?;
        run(&line, behaviour)
    });
    if let Err(problem) = result {
        say(&problem);
        std::process::exit(1);
    }
}

/// Writes a message on standard error as QEMU does.
fn say(text: &str) {
    // A closed standard error is no reason to fail.
    let _ = writeln!(io::stderr(), "qemu-system-x86_64: {text}");
}

fn run(line: &CommandLine, behaviour: QemuBehaviour) -> Result<(), String> {
    if let Some(refusal) = &behaviour.refusal {
        let _ = io::stderr().write_all(refusal.stderr.as_bytes());
        std::process::exit(refusal.code);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime: {error}"))?;
    LocalSet::new().block_on(&runtime, async {
        // The end of the process releases what is held here.
        let held = host::HeldResources::take(line)?;
        let machine = Rc::new(RefCell::new(FakeMachine::new(line, behaviour, &held)));
        for chardev in &line.chardevs {
            serve(line, chardev, &machine)?;
        }
        spawn_local(machine::guest(Rc::clone(&machine)));
        spawn_local(fate(Rc::clone(&machine)));
        let end = machine::ended(&machine, signals()?).await;
        drop(held);
        match end {
            ExitCause::Exit(code) => std::process::exit(code),
            ExitCause::Signal(number) => host::die_by(number),
        }
    })
}

/// Serves one channel: a monitor, or the guest's end of a serial port or agent channel.
fn serve(line: &CommandLine, chardev: &ChardevArg, machine: &Rc<RefCell<FakeMachine>>) -> Result<(), String> {
    let listener = host::inherited_listener(chardev.fd)?;
    if line.monitors.contains(&chardev.id) {
        spawn_local(monitor::serve(listener, Rc::clone(machine)));
        return Ok(());
    }
    let is_console = line.console.as_deref() == Some(chardev.id.as_str());
    let log = line.log_of(chardev).map(host::inherited_file).transpose()?;
    if let (Some(log), true) = (&log, is_console) {
        write_log(log, machine.borrow().behaviour().console.as_bytes());
    }
    spawn_local(async move {
        while let Ok((client, _)) = listener.accept().await {
            let _ = guest_side(client, log.as_ref(), is_console).await;
        }
    });
    Ok(())
}

/// Serves the guest's end of a channel: the console echoes, any other channel stays silent.
async fn guest_side(client: UnixStream, log: Option<&std::fs::File>, echo: bool) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        client.readable().await?;
        let bytes = match client.try_read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        if !echo {
            continue;
        }
        if let Some(log) = log {
            write_log(log, &buffer[..bytes]);
        }
        client.writable().await?;
        // A client that sends without reading loses its echo, as on a real serial line.
        let _ = client.try_write(&buffer[..bytes]);
    }
}

fn write_log(mut log: &std::fs::File, text: &[u8]) {
    // QEMU too continues when its log can't be written.
    let _ = log.write_all(text);
}

/// Waits for the fault that the behaviour asks for, and causes it.
async fn fate(machine: Rc<RefCell<FakeMachine>>) {
    let Some(fate) = machine.borrow().behaviour().fate.clone() else { return };
    sleep(Duration::from_millis(fate.after_ms)).await;
    machine.borrow_mut().suffer(fate.what);
}

/// Returns the handled signals: those that end the process, and those that cause a fault.
fn signals() -> Result<Vec<(i32, Option<QemuFault>, Signal)>, String> {
    let kinds = [
        (SignalKind::terminate(), None),
        (SignalKind::interrupt(), None),
        (SignalKind::hangup(), None),
        (SignalKind::user_defined1(), Some(QemuFault::Panic)),
        (SignalKind::user_defined2(), Some(QemuFault::InternalError)),
    ];
    let listen =
        |(kind, blow): (SignalKind, Option<QemuFault>)| Ok((kind.as_raw_value(), blow, signal(kind)?));
    let signals: io::Result<Vec<_>> = kinds.into_iter().map(listen).collect();
    signals.map_err(|error| format!("no signals: {error}"))
}
