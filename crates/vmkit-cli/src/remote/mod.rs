//! A program in a guest with this process's own streams, terminal and signals.
//!
//! One loop on one thread; standard input is read, and both outputs are written, by threads that
//! may block. Whatever is slow holds the others back: nothing is kept beyond a few pieces. The
//! terminal is itself again on every way out.

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
use tokio::time::{Instant, timeout};
use vmkit::Error;
use vmkit::ssh::{Command, Event, Exit, Input, Output, Session, TerminalSize};

use crate::console::signals::{Resizes, Signals, die_of, name_of};
use crate::console::terminal::RawMode;
use crate::failure::Failure;
use crate::output;
use escape::{Escape, Typed};
use streams::{Reader, Writer};

/// How long the program in the guest has to end after a signal that ends this process.
const GOODBYE: Duration = Duration::from_secs(2);
/// The key that ends a terminal's input, unless somebody has set another: Ctrl-D.
const END_OF_FILE: u8 = 4;
/// Whose programs OpenSSH passes no signals on to. Source: OpenSSH, `session.c`,
/// `session_signal_req`.
const ROOT: &str = "root";
/// How long the guest has to begin a program: more than a loaded one needs, less than a person
/// waits for.
const BEGIN: Duration = Duration::from_secs(60);

/// Returns whether there is a person at both ends of this process.
pub(crate) fn is_at_terminal() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// Why the loop has ended.
enum Ending {
    /// The program has.
    Exit(Exit),
    /// This process was told to end.
    Signal(i32),
    /// The person left.
    Left,
}

/// Runs the command with this process's streams, and returns how it ended.
///
/// # Errors
/// Those of the session; `Output` where nobody reads what the program writes. `Own` where the
/// connection is lost on the way.
pub(crate) async fn run(session: &Session, command: &Command, feed_stdin: bool) -> Result<Exit, Failure> {
    Ok(attend(session, command, feed_stdin).await?.or_die())
}

/// What ended first.
pub(crate) enum Attended {
    /// The program, or the person's stay with it.
    Exit(Exit),
    /// This process is to, by this signal, once it has tidied up.
    Signal(i32),
}

impl Attended {
    /// Returns how the program ended; dies of the signal that this process is to end by.
    pub(crate) fn or_die(self) -> Exit {
        match self {
            Attended::Exit(exit) => exit,
            Attended::Signal(signal) => {
                die_of(signal);
                Exit::Code(255)
            }
        }
    }
}

/// Runs the command as [`run`] does, and leaves it to the caller to die of a signal.
pub(crate) async fn attend(
    session: &Session,
    command: &Command,
    feed_stdin: bool,
) -> Result<Attended, Failure> {
    let at_terminal = command.terminal.is_some();
    let mut signals = Signals::catch().map_err(Error::io("watch for", "signals"))?;
    let (mut input, output) = session.spawn(command, Instant::now() + BEGIN).await?.split();
    if !feed_stdin {
        // Else whoever reads it would wait for ever.
        end_input(&mut input, at_terminal, false).await?;
    }
    let raw = if at_terminal { RawMode::enter().map_err(Error::io("set up", "the terminal"))? } else { None };
    let is_raw = raw.is_some();
    let attached = Attached {
        input,
        output,
        reader: feed_stdin.then(Reader::of_stdin),
        writer: Writer::new(),
        escape: is_raw.then(Escape::new),
        at_terminal,
        follows_size: is_raw,
    };
    let ended = attached.run(session, &mut signals).await;
    drop(raw);
    match ended? {
        Ending::Exit(exit) => Ok(Attended::Exit(exit)),
        Ending::Left => {
            output::notice("left; what ran there was hung up");
            Ok(Attended::Exit(Exit::Signal("HUP".to_owned())))
        }
        Ending::Signal(signal) => Ok(Attended::Signal(signal)),
    }
}

struct Attached {
    input: Input,
    output: Output,
    /// Standard input until its end.
    reader: Option<Reader>,
    writer: Writer,
    escape: Option<Escape>,
    at_terminal: bool,
    follows_size: bool,
}

/// What happened first.
enum Happened {
    Output(Event),
    Input(Option<Vec<u8>>),
    Resized,
    Signal(i32),
}

impl Attached {
    async fn run(self, session: &Session, signals: &mut Signals) -> Result<Ending, Failure> {
        let Self { mut input, mut output, mut reader, mut writer, mut escape, at_terminal, follows_size } =
            self;
        let unwatched = || Error::io("watch for", "signals");
        let caught = signals.bell().map_err(unwatched())?;
        let resizes = follows_size.then(Resizes::catch).transpose().map_err(unwatched())?;
        let (pieces, mut taken) = channel::<Option<Vec<u8>>>(1);
        // Its own future, so that a guest that reads nothing keeps neither output nor signals
        // waiting.
        let (resized, mut sizes) = channel::<TerminalSize>(1);
        let mut feed = Box::pin(feed(&mut input, &mut taken, &mut sizes, at_terminal));
        let mut is_fed = false;
        let ending = loop {
            let room = pieces.clone();
            let happened = tokio::select! {
                event = output.next() => Happened::Output(event.map_err(Failure::unknown)?),
                // A lost connection is told by the output, which has more to say about it.
                _ = &mut feed, if !is_fed => { is_fed = true; continue }
                piece = Reader::next(&mut reader, room) => Happened::Input(piece),
                () = Resizes::next(resizes.as_ref()) => Happened::Resized,
                signal = signals.next(&caught) => Happened::Signal(signal),
            };
            match happened {
                Happened::Output(event) => {
                    // Whoever reads slowly, or not at all, can still have this ended.
                    tokio::select! {
                        written = write(&mut writer, event) => if let Some(exit) = written? {
                            break Ending::Exit(exit);
                        },
                        signal = signals.next(&caught) => break Ending::Signal(signal),
                    }
                }
                Happened::Input(None) => {
                    reader = None;
                    let _ = pieces.try_send(None);
                }
                Happened::Input(Some(piece)) => match escape.as_mut().map(|escape| escape.take(&piece)) {
                    Some(Typed::Left) => break Ending::Left,
                    Some(Typed::Pass(piece)) => drop(pieces.try_send(Some(piece))),
                    None => drop(pieces.try_send(Some(piece))),
                },
                Happened::Resized => drop(TerminalSize::of(io::stdin()).map(|size| resized.try_send(size))),
                Happened::Signal(signal) => break Ending::Signal(signal),
            }
        };
        drop(feed);
        if let Ending::Signal(signal) = &ending
            && let Some(name) = name_of(*signal)
        {
            tokio::select! {
                // A guest that can't be told learns it from the connection.
                _ = timeout(GOODBYE, end(session, name, &input, &mut output, &mut writer)) => {}
                // A second signal ends the wait.
                _ = signals.next(&caught) => {}
            }
        }
        Ok(ending)
    }
}

/// Hands the program what is typed, and its terminal each new size, until nothing more comes.
async fn feed(
    input: &mut Input,
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

/// Tells the program that nothing more comes. At a terminal a server has no way to say so but to
/// type the key for it: once hands over the line that was begun, and at the beginning of one it is
/// the end.
async fn end_input(input: &mut Input, at_terminal: bool, in_line: bool) -> Result<(), Error> {
    if at_terminal {
        input.write(if in_line { &[END_OF_FILE; 2] } else { &[END_OF_FILE] }).await?;
    }
    input.end().await
}

/// Has the program end by a signal, and writes what it says until it has.
///
/// The signal is only queued by the call: it is on its way while the end is waited for.
async fn end(session: &Session, signal: &str, input: &Input, output: &mut Output, writer: &mut Writer) {
    let told = match session.user() {
        ROOT => session.signal_all(signal, Instant::now() + GOODBYE).await,
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

/// Writes what came out of the program; at its end all of it, and returns how it ended.
async fn write(writer: &mut Writer, event: Event) -> Result<Option<Exit>, Failure> {
    match event {
        Event::Stdout(data) => writer.write(false, data).await.map(|()| None),
        Event::Stderr(data) => writer.write(true, data).await.map(|()| None),
        Event::Ended(exit) => writer.finish().await.map(|()| Some(exit)),
    }
}
