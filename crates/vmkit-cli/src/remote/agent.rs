//! A program in a guest by its guest agent: no network is needed, and nothing streams.

use std::ffi::OsString;
use std::io::{self, IsTerminal, Read, Write};
use std::time::Duration;

use tokio::time::Instant;
use vmkit::ssh::Command;
use vmkit::{Error, GuestAgent, GuestExit, VmHandle};

use crate::failure::Failure;
use crate::output;

/// The most that is handed to a program: the agent takes it in one piece.
const MOST_INPUT_BYTES: u64 = 8 << 20;
/// How long a program may run: as good as for ever.
const AGES: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Runs the command, prints what it wrote once it has ended, and answers its exit code.
///
/// # Errors
/// `Unsupported` for a VM without an agent's channel; those of the agent; `InvalidInput` for what it can't be told.
pub(crate) async fn run(
    vm: &VmHandle,
    command: &Command,
    feed_stdin: bool,
    timeout: Duration,
) -> Result<u8, Failure> {
    let Some(socket) = vm.run.as_ref().and_then(|run| run.agent.as_ref()) else {
        let what = format!("a guest agent in the VM `{}`", vm.name());
        return Err(Error::Unsupported { backend: vm.backend.clone(), what }.into());
    };
    let (program, arguments) = words(command)?;
    let stdin = if feed_stdin && !io::stdin().is_terminal() { Some(stdin()?) } else { None };
    let mut agent = GuestAgent::connect(socket, Instant::now() + timeout).await?;
    let ran = agent.exec(&program, &arguments, stdin.as_deref(), Instant::now() + AGES).await?;
    output::bytes(&ran.stdout)?;
    io::stderr().write_all(&ran.stderr).map_err(Failure::Output)?;
    if ran.truncated {
        output::warning("the guest agent kept only the beginning of what it wrote; over SSH all of it comes");
    }
    Ok(match ran.exit {
        GuestExit::Code(code) => u8::try_from(code).unwrap_or(u8::MAX),
        GuestExit::Signal(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
    })
}

/// Answers the program and its arguments; a shell sets directory and variables, for the agent knows neither.
fn words(command: &Command) -> Result<(String, Vec<String>), Error> {
    let text = |word: OsString| {
        word.into_string().map_err(|word| {
            Error::invalid("command", word.display(), "the guest agent takes UTF-8 only: go over SSH")
        })
    };
    if command.env.is_empty() && command.dir.is_none() {
        let mut words = command.argv.iter().cloned().map(text);
        let program = words.next().expect("the arguments need a program")?;
        return Ok((program, words.collect::<Result<_, _>>()?));
    }
    let line = command.line()?.unwrap_or_default();
    let line = String::from_utf8(line).map_err(|_| {
        Error::invalid("command", "(not shown)", "the guest agent takes UTF-8 only: go over SSH")
    })?;
    Ok(("/bin/sh".to_owned(), vec!["-c".to_owned(), line]))
}

fn stdin() -> Result<Vec<u8>, Error> {
    let mut input = Vec::new();
    let read = io::stdin().take(MOST_INPUT_BYTES + 1).read_to_end(&mut input);
    read.map_err(Error::io("read", "standard input"))?;
    if input.len() as u64 > MOST_INPUT_BYTES {
        let bound = format!("the guest agent takes {MOST_INPUT_BYTES} bytes at the most: go over SSH");
        return Err(Error::invalid("standard input", "too long", bound));
    }
    Ok(input)
}
