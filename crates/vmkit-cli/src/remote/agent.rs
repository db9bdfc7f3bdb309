//! A program in a guest by its guest agent: no network is needed, and nothing streams.

use std::ffi::OsString;
use std::future::pending;
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;
use vmkit::error::Peer;
use vmkit::qemu::GuestAgent;
use vmkit::ssh::GuestCommand;
use vmkit::{Error, GuestExitStatus, ProgramOutput, VmHandle};

use super::{GOODBYE, Interaction};
use crate::console::signals::{CaughtSignals, name_of};
use crate::context::CliManager;
use crate::failure::Failure;
use crate::output;

/// The most that is handed to a program: the agent takes it in one piece.
const MOST_INPUT_BYTES: u64 = 8 << 20;
/// How long a program may run: as good as for ever.
const AGES: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A shell's exit codes for a program that does not exist, and for one that can't be run.
const NO_PROGRAM: u32 = 127;
const NOT_RUN: u32 = 126;

/// Runs the command, prints what it wrote once it has ended, and tells how it ended, as
/// [`attend`](super::attend) does.
///
/// A program that was begun is ended with this process, where a signal ends that. One that is being
/// begun at that very moment goes on, for the agent has not told its process.
///
/// # Errors
/// `Unsupported` for a VM without an agent's channel; those of the agent; `InvalidInput` for what
/// it can't be told. `Own` where the guest ends, panics or is reset meanwhile.
pub(crate) async fn attend(
    manager: &CliManager,
    vm: &VmHandle,
    command: &GuestCommand,
    feed_stdin: bool,
    timeout: Duration,
) -> Result<Interaction, Failure> {
    tokio::select! {
        attended = converse(manager, vm, command, feed_stdin, timeout) => attended,
        failure = gone(manager, vm) => Err(failure),
    }
}

async fn converse(
    manager: &CliManager,
    vm: &VmHandle,
    command: &GuestCommand,
    feed_stdin: bool,
    timeout: Duration,
) -> Result<Interaction, Failure> {
    let Some(socket) = vm.run.as_ref().and_then(|run| run.agent.as_ref()) else {
        let what = format!("a guest agent in the VM `{}`", vm.name());
        return Err(Error::Unsupported { backend: vm.backend.clone(), what }.into());
    };
    let (program, arguments) = words(command)?;
    let mut signals = CaughtSignals::catch().map_err(Error::io("watch for", "signals"))?;
    let bell = signals.bell().map_err(Error::io("watch for", "signals"))?;
    let (mut agent, stdin) = tokio::select! {
        reached = reach(socket, feed_stdin, timeout) => reached?,
        signal = signals.next(&bell) => return Ok(Interaction::Signal(signal)),
    };
    // Not before: a guest that boots again may have been asked for by the command before this one.
    let mut restarted = pin!(restarted(manager, vm));
    let begun = tokio::select! {
        begun = agent.begin(&program, &arguments, stdin.as_deref(), timeout) => begun,
        signal = signals.next(&bell) => return Ok(Interaction::Signal(signal)),
        () = &mut restarted => return Err(lost(&program)),
    };
    let pid = match begun {
        Ok(pid) => pid,
        Err(error) => return not_run(&program, error).map(Interaction::Exit),
    };
    let ended = tokio::select! {
        ended = agent.ended(pid, AGES) => Ok(ended),
        signal = signals.next(&bell) => Err(signal),
        () = &mut restarted => return Err(lost(&program)),
    };
    match ended {
        Ok(ended) => told(&ended.map_err(Failure::unknown)?).map(Interaction::Exit),
        Err(signal) => {
            tokio::select! {
                // A guest that can't be told keeps its program.
                _ = end(&mut agent, pid, signal) => {}
                // A second signal ends the wait.
                _ = signals.next(&bell) => {}
            }
            Ok(Interaction::Signal(signal))
        }
    }
}

/// Reads the program's input, and waits until the agent replies.
async fn reach(
    socket: &Path,
    feed_stdin: bool,
    timeout: Duration,
) -> Result<(GuestAgent, Option<Vec<u8>>), Error> {
    let stdin = if feed_stdin && !io::stdin().is_terminal() { Some(stdin().await?) } else { None };
    Ok((GuestAgent::connect(socket, timeout).await?, stdin))
}

/// Waits until a VM's guest is gone, also by a panic that ends no process, and returns the failure
/// to report.
async fn gone(manager: &CliManager, seen: &VmHandle) -> Failure {
    let mut last = seen.clone();
    loop {
        match manager.changed(&last, Duration::MAX).await {
            // A suspended guest may be resumed.
            Ok(vm) if vm.state.is_live() => last = vm,
            Ok(vm) => {
                let awaited = format!("the end of a program in the VM `{}`", vm.name());
                return Failure::unknown(Error::Ended { awaited, state: vm.state, console: None });
            }
            Err(error) => return Failure::unknown(error),
        }
    }
}

/// Waits until a VM's guest is reset, which ends all that runs in it; for ever where that is not
/// noticed.
async fn restarted(manager: &CliManager, vm: &VmHandle) {
    if manager.guest_reset(vm).await.is_err() {
        pending().await
    }
}

/// Creates the failure for a program whose guest was reset.
fn lost(program: &str) -> Failure {
    let problem = format!("the end of `{program}` is not known: the guest was restarted");
    Failure::unknown(Error::protocol(Peer::GuestAgent, problem))
}

/// Ends the program by this signal, and prints what it has written until then.
async fn end(agent: &mut GuestAgent, pid: i64, signal: i32) -> Result<(), Failure> {
    let Some(name) = name_of(signal) else { return Ok(()) };
    let deadline = Instant::now() + GOODBYE;
    agent.signal_all(pid, name, GOODBYE).await?;
    match agent.ended(pid, deadline.saturating_duration_since(Instant::now())).await {
        Ok(ended) => told(&ended).map(drop),
        Err(_) => Ok(()),
    }
}

/// Prints what a program wrote, and returns how it ended.
fn told(ran: &ProgramOutput) -> Result<GuestExitStatus, Failure> {
    output::bytes(&ran.stdout)?;
    io::stderr().write_all(&ran.stderr).map_err(Failure::Output)?;
    if ran.truncated {
        output::warning("the guest agent returned only the beginning of the output; SSH returns all of it");
    }
    Ok(ran.exit.clone())
}

/// Says of a program that the agent could not run what a shell says, and returns the code of one.
///
/// The agent passes on what GLib says, which names the system's error. Source: GLib, `gspawn.c`.
fn not_run(program: &str, error: Error) -> Result<GuestExitStatus, Failure> {
    let says = |text: &str| matches!(&error, Error::Refused { command, description, .. } if command == "guest-exec" && description.contains(text));
    let (problem, code) = match () {
        () if says("(No such file or directory)") => ("there is no such program", NO_PROGRAM),
        () if says("(Permission denied)") => ("it may not be run", NOT_RUN),
        () => return Err(error.into()),
    };
    output::error(None, &Error::GuestProgram { program: program.to_owned(), problem: problem.to_owned() });
    Ok(GuestExitStatus::Code(code))
}

/// Returns the program and its arguments; a shell sets directory and variables, for the agent knows
/// neither.
fn words(command: &GuestCommand) -> Result<(String, Vec<String>), Error> {
    let text = |word: OsString| {
        word.into_string().map_err(|word| {
            Error::invalid("command", word.display(), "the guest agent takes UTF-8 only: use SSH")
        })
    };
    if command.env.is_empty() && command.dir.is_none() {
        let mut words = command.argv.iter().cloned().map(text);
        let program = words.next().expect("the arguments need a program")?;
        return Ok((program, words.collect::<Result<_, _>>()?));
    }
    let line = command.line()?.unwrap_or_default();
    let line = String::from_utf8(line)
        .map_err(|_| Error::invalid("command", "(not shown)", "the guest agent takes UTF-8 only: use SSH"))?;
    Ok(("/bin/sh".to_owned(), vec!["-c".to_owned(), line]))
}

/// Reads all of standard input, on a thread that may block for ever.
async fn stdin() -> Result<Vec<u8>, Error> {
    let (sender, read) = oneshot::channel();
    let read_all = move || {
        let mut input = Vec::new();
        let read = io::stdin().take(MOST_INPUT_BYTES + 1).read_to_end(&mut input);
        let _ = sender.send(read.map(|_| input));
    };
    let begun = thread::Builder::new().name("vmkit-stream".to_owned()).spawn(read_all);
    begun.map_err(Error::io("begin", "a thread that reads standard input"))?;
    let read = read.await.unwrap_or_else(|_| Err(io::Error::other("the reading thread is gone")));
    let input = read.map_err(Error::io("read", "standard input"))?;
    if input.len() as u64 > MOST_INPUT_BYTES {
        let bound = format!("the guest agent takes at most {MOST_INPUT_BYTES} bytes: use SSH");
        return Err(Error::invalid("standard input", "too long", bound));
    }
    Ok(input)
}
