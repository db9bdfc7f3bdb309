//! A program in a guest with this process's own streams, terminal and signals.
//!
//! One loop on one thread; standard input is read, and both outputs are written, by threads that
//! may block. A slow stream slows the others: only a few pieces are buffered. The terminal is
//! restored on every way out.

#[cfg(target_os = "linux")]
pub(crate) mod agent;
mod escape;
#[cfg(not(target_os = "linux"))]
pub(crate) mod no_agent;
pub(crate) mod streams;
pub(crate) mod way;

#[cfg(not(target_os = "linux"))]
pub(crate) use no_agent as agent;

use std::io::{self, IsTerminal};
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, channel};
use tokio::time::timeout;
use vmkit::Error;
use vmkit::GuestExitStatus;
use vmkit::ssh::{GuestCommand, ProcessEvent, ProcessInput, ProcessOutput, Session, TerminalSize};

use crate::console::signals::{CaughtSignals, ResizeSignals, die_of, name_of};
use crate::console::terminal::RawMode;
use crate::failure::Failure;
use crate::output;
use escape::{EscapeParser, TypedBytes};
use streams::{OutputThread, StdinThread};

/// How long the program in the guest has to end after a signal that ends this process.
const GOODBYE: Duration = Duration::from_secs(2);
/// The key that ends a terminal's input unless the user has set another: Ctrl-D.
const END_OF_FILE: u8 = 4;
/// The user to whose programs OpenSSH passes no signals. Source: OpenSSH, `session.c`,
/// `session_signal_req`.
const ROOT: &str = "root";
/// How long the guest has to start a program: more than a loaded guest needs, less than a person
/// waits for.
const BEGIN: Duration = Duration::from_secs(60);

/// Returns whether both standard streams of this process are terminals.
pub(crate) fn is_at_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Why the loop has ended.
enum LoopEnd {
    /// The program has ended.
    Exit(GuestExitStatus),
    /// This process got a signal that ends it.
    Signal(i32),
    /// The user left with `~.`.
    Left,
}

/// Runs the command with this process's streams, and returns how it ended.
///
/// # Errors
/// Those of the session; `Output` if the program's output can't be written. `Own` where the
/// connection is lost on the way.
pub(crate) async fn run(
    session: &Session,
    command: &GuestCommand,
    feed_stdin: bool,
) -> Result<GuestExitStatus, Failure> {
    Ok(attend(session, command, feed_stdin).await?.or_die())
}

/// How an interaction with a program ended.
pub(crate) enum Interaction {
    /// The program has ended, or the user left it.
    Exit(GuestExitStatus),
    /// This process has to die of this signal, after its cleanup.
    Signal(i32),
}

impl Interaction {
    /// Returns how the program ended; dies of the signal that ended the interaction.
    pub(crate) fn or_die(self) -> GuestExitStatus {
        match self {
            Interaction::Exit(exit) => exit,
            Interaction::Signal(signal) => {
                die_of(signal);
                GuestExitStatus::Code(255)
            }
        }
    }
}

/// Runs the command as [`run`] does, and leaves dying of a signal to the caller.
pub(crate) async fn attend(
    session: &Session,
    command: &GuestCommand,
    feed_stdin: bool,
) -> Result<Interaction, Failure> {
    let at_terminal = command.terminal.is_some();
    let mut signals = CaughtSignals::catch().map_err(Error::io("watch for", "signals"))?;
    let (mut input, output) = session.spawn(command, BEGIN).await?.split();
    if !feed_stdin {
        // Otherwise a program that reads its input would wait for ever.
        end_input(&mut input, at_terminal, false).await?;
    }
    let raw = if at_terminal { RawMode::enter().map_err(Error::io("set up", "the terminal"))? } else { None };
    let is_raw = raw.is_some();
    let attached = AttachedStreams {
        input,
        output,
        reader: feed_stdin.then(StdinThread::of_stdin).transpose()?,
        writer: OutputThread::new()?,
        escape: is_raw.then(EscapeParser::new),
        at_terminal,
        follows_size: is_raw,
    };
    let ended = attached.run(session, &mut signals).await;
    drop(raw);
    match ended? {
        LoopEnd::Exit(exit) => Ok(Interaction::Exit(exit)),
        LoopEnd::Left => {
            output::notice("disconnected; the program in the guest was hung up");
            Ok(Interaction::Exit(GuestExitStatus::Signal("HUP".to_owned())))
        }
        LoopEnd::Signal(signal) => Ok(Interaction::Signal(signal)),
    }
}

struct AttachedStreams {
    input: ProcessInput,
    output: ProcessOutput,
    /// Standard input until its end.
    reader: Option<StdinThread>,
    writer: OutputThread,
    escape: Option<EscapeParser>,
    at_terminal: bool,
    follows_size: bool,
}

/// The next event of the loop.
enum LoopEvent {
    Output(ProcessEvent),
    Input(Option<Vec<u8>>),
    Resized,
    Signal(i32),
}

impl AttachedStreams {
    async fn run(self, session: &Session, signals: &mut CaughtSignals) -> Result<LoopEnd, Failure> {
        let Self { mut input, mut output, mut reader, mut writer, mut escape, at_terminal, follows_size } =
            self;
        let no_progress = || Error::io("watch for", "signals");
        let caught = signals.bell().map_err(no_progress())?;
        let resizes = follows_size.then(ResizeSignals::catch).transpose().map_err(no_progress())?;
        let (pieces, mut taken) = channel::<Option<Vec<u8>>>(1);
        // A future of its own, so that a guest that does not read blocks neither the output nor
        // signals.
        let (resized, mut sizes) = channel::<TerminalSize>(1);
        let mut feed = Box::pin(feed(&mut input, &mut taken, &mut sizes, at_terminal));
        let mut is_fed = false;
        let ending = loop {
            let room = pieces.clone();
            let happened = tokio::select! {
                event = output.next() => LoopEvent::Output(event.map_err(Failure::unknown)?),
                // The output reports a lost connection, with more details.
                _ = &mut feed, if !is_fed => { is_fed = true; continue }
                piece = StdinThread::next(&mut reader, room) => LoopEvent::Input(piece),
                () = ResizeSignals::next(resizes.as_ref()) => LoopEvent::Resized,
                signal = signals.next(&caught) => LoopEvent::Signal(signal),
            };
            match happened {
                LoopEvent::Output(event) => {
                    // A signal ends it even if the reader of the output is slow or blocked.
                    tokio::select! {
                        written = write(&mut writer, event) => if let Some(exit) = written? {
                            break LoopEnd::Exit(exit);
                        },
                        signal = signals.next(&caught) => break LoopEnd::Signal(signal),
                    }
                }
                LoopEvent::Input(None) => {
                    reader = None;
                    let _ = pieces.try_send(None);
                }
                LoopEvent::Input(Some(piece)) => match escape.as_mut().map(|escape| escape.take(&piece)) {
                    Some(TypedBytes::Left) => break LoopEnd::Left,
                    Some(TypedBytes::Pass(piece)) => drop(pieces.try_send(Some(piece))),
                    None => drop(pieces.try_send(Some(piece))),
                },
                LoopEvent::Resized => drop(TerminalSize::of(io::stdin()).map(|size| resized.try_send(size))),
                LoopEvent::Signal(signal) => break LoopEnd::Signal(signal),
            }
        };
        drop(feed);
        if let LoopEnd::Signal(signal) = &ending
            && let Some(name) = name_of(*signal)
        {
            tokio::select! {
                // A guest that can't be signalled notices the closed connection.
                _ = timeout(GOODBYE, end(session, name, &input, &mut output, &mut writer)) => {}
                // A second signal ends the wait.
                _ = signals.next(&caught) => {}
            }
        }
        Ok(ending)
    }
}

/// Sends the input and each new terminal size to the program, until the input ends.
async fn feed(
    input: &mut ProcessInput,
    pieces: &mut Receiver<Option<Vec<u8>>>,
    sizes: &mut Receiver<TerminalSize>,
    at_terminal: bool,
) -> Result<(), Error> {
    let mut in_line = false;
    loop {
        tokio::select! {
            Some(size) = sizes.recv() => input.resize(size).await?,
            piece = pieces.recv() => match piece {
                Some(Some(piece)) => {
                    in_line = !piece.ends_with(b"\n");
                    input.write(&piece).await?;
                }
                Some(None) => end_input(input, at_terminal, in_line).await?,
                None => return Ok(()),
            },
        }
    }
}

/// Ends the program's input. At a terminal a server can only type the key for it: the first one
/// submits an unfinished line, and at the start of a line it is the end.
async fn end_input(input: &mut ProcessInput, at_terminal: bool, in_line: bool) -> Result<(), Error> {
    if at_terminal {
        input.write(if in_line { &[END_OF_FILE; 2] } else { &[END_OF_FILE] }).await?;
    }
    input.end().await
}

/// Sends the program a signal, and writes its output until it has ended.
///
/// The call only queues the signal, which is sent while this waits for the end.
async fn end(
    session: &Session,
    signal: &str,
    input: &ProcessInput,
    output: &mut ProcessOutput,
    writer: &mut OutputThread,
) {
    let told = match session.user() {
        ROOT => session.signal_all(signal, GOODBYE).await,
        _ => input.signal(signal).await,
    };
    if told.is_err() {
        return;
    }
    while let Ok(event) = output.next().await {
        if !matches!(write(writer, event).await, Ok(None)) {
            return;
        }
    }
}

/// Writes the program's output; at its end writes the rest, and returns how it ended.
async fn write(writer: &mut OutputThread, event: ProcessEvent) -> Result<Option<GuestExitStatus>, Failure> {
    match event {
        ProcessEvent::Stdout(data) => writer.write(false, data).await.map(|()| None),
        ProcessEvent::Stderr(data) => writer.write(true, data).await.map(|()| None),
        ProcessEvent::Ended(exit) => writer.finish().await.map(|()| Some(exit)),
    }
}
