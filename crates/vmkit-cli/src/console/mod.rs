//! A person, or a pipe, at a VM's serial console.
//!
//! One thread and one `poll`: the terminal, the console's socket, the signals. The terminal is raw
//! meanwhile, and is itself again on every way out: the escape, the VM's end, an error, a signal, a
//! panic. What is printed is printed by a second thread, and a console at a WebSocket is carried to
//! a socket by a third.
//!
//! ```text
//! hold ─▶ connect ─▶ raw mode ─▶ history ─▶ poll: input ⇄ socket ─▶ terminal restored ─▶ say why it ended
//! ```

pub(crate) mod escape;
mod printer;
pub(crate) mod signals;
pub(crate) mod terminal;
pub(crate) mod websocket;

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmkit::Error;
use vmkit::console::{ConsoleLog, ConsoleTurn, JoinedConsole};
use vmkit::propolis::HistoryRange;
use vmkit::spec::VmName;

use crate::failure::Failure;
use crate::output;
use escape::EscapeKey;
use printer::PrintThread;
use signals::CaughtSignals;
use terminal::RawMode;
use websocket::CarrierThread;

/// How much of the console's past is shown.
const HISTORY_BYTES: u64 = 64 << 10;
/// How much input waits for a guest that reads slowly before no more is taken.
const MOST_PENDING_BYTES: usize = 64 << 10;
/// After how long a silent console is checked for another process that holds it.
const SILENCE: Duration = Duration::from_secs(1);

/// Why a console session ended.
enum SessionEnd {
    /// They left.
    Left,
    /// The VM has ended, or its console was lost.
    Closed,
    /// The input has ended, and so has the time after it.
    TimeOver,
    /// This process was told to end.
    Signal(i32),
}

/// Where a console is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ConsoleAddress<'a> {
    /// At a socket that serves one client, beside a log of its past.
    Socket { path: &'a Path, log: Option<&'a Path> },
    /// At a server that serves many, and keeps the past itself.
    WebSocket(&'a str),
}

/// A console that was reached, whatever it is behind.
struct OpenConsole {
    stream: UnixStream,
    past: Vec<u8>,
    carrier: Option<CarrierThread>,
}

/// Attaches to a console until the person leaves or the VM ends.
///
/// `linger` is how long to go on after an input that is no terminal has ended; without it, until
/// the VM ends.
///
/// # Errors
/// `Busy` with the process that holds the console; `Io` and `Hypervisor` where it can't be reached,
/// or no longer.
pub(crate) fn attach(
    vm: &VmName,
    at: ConsoleAddress,
    escape: EscapeKey,
    linger: Option<Duration>,
) -> Result<(), Failure> {
    let turn = match at {
        ConsoleAddress::Socket { path, .. } => Some(ConsoleTurn::take(vm, path)?),
        ConsoleAddress::WebSocket(_) => None,
    };
    let place = match at {
        ConsoleAddress::Socket { path, .. } => path.to_owned(),
        ConsoleAddress::WebSocket(url) => url.into(),
    };
    let signals = CaughtSignals::catch().map_err(Error::io("watch for signals at", &place))?;
    let printer = PrintThread::start().map_err(Error::io("make", "the thread that prints"))?;
    let OpenConsole { stream, past, carrier } = OpenConsole::reach(turn.as_ref(), at, &printer)?;
    let terminal = RawMode::enter().map_err(Error::io("set up", "the terminal"))?;
    let was_terminal = terminal.is_some();
    if was_terminal {
        printer.notice(format!("attached to the console of {vm}; {escape}"));
    }
    printer.words(&past);
    let mut session = ConsoleSession {
        place,
        stream,
        signals,
        printer,
        is_terminal: was_terminal,
        escape,
        input_open: true,
        closed: false,
        pending: Vec::new(),
        look_at: turn.is_some().then(|| Instant::now() + SILENCE),
        turn,
        leave_at: None,
        linger,
    };
    let ended = session.run().and_then(|ending| session.last_words(ending));
    let ConsoleSession { printer, stream, .. } = session;
    // The receiver is gone.
    drop(stream);
    drop(terminal);
    match ended? {
        SessionEnd::Signal(signal) => signals::die_of(signal),
        ending => {
            printer.outcome()?;
            match ending {
                SessionEnd::Left if was_terminal => {
                    output::notice(format_args!("detached from the console of {vm}"))
                }
                SessionEnd::Closed => {
                    if let Some(carrier) = carrier {
                        websocket::outcome(carrier)?;
                    }
                    output::notice(format_args!("the console of {vm} has closed: the VM has ended"));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

impl OpenConsole {
    fn reach(turn: Option<&ConsoleTurn>, at: ConsoleAddress, printer: &PrintThread) -> Result<Self, Error> {
        match at {
            ConsoleAddress::Socket { log, .. } => {
                let log = log.map(|path| ConsoleLog { path, since: None, most_bytes: HISTORY_BYTES });
                let turn = turn.expect("a client of such a console holds a turn");
                let JoinedConsole { past, said, stream } = turn.join(log)?;
                let is_cut = past.len() as u64 == HISTORY_BYTES;
                let past = [whole_lines(past, is_cut), said].concat();
                Ok(Self { stream, past, carrier: None })
            }
            ConsoleAddress::WebSocket(url) => {
                let (past, stream, carrier) =
                    websocket::open(url, HistoryRange::MostRecent(HISTORY_BYTES), printer.teller())?;
                let is_cut = past.end > past.bytes.len() as u64;
                let past = whole_lines(past.bytes, is_cut);
                Ok(Self { stream, past, carrier: Some(carrier) })
            }
        }
    }
}

fn whole_lines(mut tail: Vec<u8>, is_cut: bool) -> Vec<u8> {
    if is_cut && let Some(end) = tail.iter().position(|&byte| byte == b'\n') {
        tail.drain(..=end);
    }
    tail
}

struct ConsoleSession {
    /// What errors call the console.
    place: PathBuf,
    stream: UnixStream,
    signals: CaughtSignals,
    printer: PrintThread,
    is_terminal: bool,
    escape: EscapeKey,
    input_open: bool,
    /// Whether the console has said its last word.
    closed: bool,
    /// What was typed and not taken by the guest yet.
    pending: Vec<u8>,
    /// This process's turn at the console, where it serves one client at a time.
    turn: Option<ConsoleTurn>,
    /// When to check whether another process holds the console; `None` after output, or after the
    /// check.
    look_at: Option<Instant>,
    /// When to go, after the input has ended.
    leave_at: Option<Instant>,
    linger: Option<Duration>,
}

/// What `poll` found.
struct PollResult {
    stream: bool,
    room: bool,
    signal: bool,
    /// Standard output was closed.
    unheard: bool,
    printed: bool,
    input: bool,
}

impl ConsoleSession {
    fn run(&mut self) -> Result<SessionEnd, Failure> {
        loop {
            let ready = self.wait().map_err(Error::io("wait at", &self.place))?;
            if ready.signal
                && let Some(signal) = self.signals.caught()
            {
                return Ok(SessionEnd::Signal(signal));
            }
            if ready.unheard || ready.printed && !self.printer.hear() {
                return Ok(SessionEnd::Left);
            }
            if ready.room {
                self.send()?;
            }
            if ready.stream
                && let Some(ending) = self.receive()?
            {
                return Ok(ending);
            }
            if ready.input
                && let Some(ending) = self.take_input()?
            {
                return Ok(ending);
            }
            let now = Instant::now();
            if self.leave_at.is_some_and(|at| at <= now) {
                return Ok(SessionEnd::TimeOver);
            }
            if self.look_at.is_some_and(|at| at <= now) {
                self.look_at = None;
                if self.turn.as_ref().is_some_and(ConsoleTurn::is_disregarded) {
                    let notice = "another program uses this console; waiting until it detaches";
                    self.printer.notice(notice);
                }
            }
        }
    }

    /// Waits until everything is printed; a signal, and a person who leaves, end even that.
    fn last_words(&mut self, ending: SessionEnd) -> Result<SessionEnd, Failure> {
        if let SessionEnd::Signal(_) = ending {
            return Ok(ending);
        }
        self.printer.finish();
        self.closed = true;
        loop {
            let ready = self.wait().map_err(Error::io("wait at", &self.place))?;
            if ready.signal
                && let Some(signal) = self.signals.caught()
            {
                return Ok(SessionEnd::Signal(signal));
            }
            if ready.printed && !self.printer.hear() {
                return Ok(ending);
            }
        }
    }

    fn wait(&self) -> io::Result<PollResult> {
        // What the terminal does not take is not read either, so that it waits where it is bounded.
        let hears = if self.printer.has_room() { PollFlags::IN } else { PollFlags::empty() };
        let room = if self.pending.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        // The terminal is always read, or a user could not leave a guest that reads nothing.
        let listens = self.input_open && (self.is_terminal || self.pending.len() < MOST_PENDING_BYTES);
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let mut polled =
            vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&self.printer, PollFlags::IN)];
        if !self.closed {
            polled.push(PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::empty()));
            // A console that has closed says so whatever is asked, and would be heard again and
            // again.
            let wanted = hears | room;
            let nothing = PollFd::new(&self.signals, PollFlags::IN);
            polled.push(if wanted.is_empty() { nothing } else { PollFd::new(&self.stream, wanted) });
        }
        if listens && !self.closed {
            polled.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        let next = [self.look_at, self.leave_at].into_iter().flatten().min().filter(|_| !self.closed);
        let timeout = next.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let found = |at: usize| polled.get(at).map_or(PollFlags::empty(), PollFd::revents);
        let has_said = found(3).intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        Ok(PollResult {
            signal: !found(0).is_empty(),
            printed: !found(1).is_empty(),
            unheard: found(2).contains(PollFlags::ERR),
            stream: has_said && !hears.is_empty(),
            room: found(3).contains(PollFlags::OUT),
            input: !found(4).is_empty(),
        })
    }

    /// Queues the guest's output for printing.
    fn receive(&mut self) -> Result<Option<SessionEnd>, Failure> {
        let mut said = [0; 16 << 10];
        match self.stream.read(&mut said) {
            Ok(0) => Ok(Some(SessionEnd::Closed)),
            Ok(bytes) => {
                self.look_at = None;
                self.printer.words(&said[..bytes]);
                Ok(None)
            }
            Err(error) if is_later(&error) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Some(SessionEnd::Closed)),
            Err(error) => Err(Error::io("read", &self.place)(error).into()),
        }
    }

    /// Hands the guest as much of what was typed as it takes now.
    fn send(&mut self) -> Result<(), Failure> {
        match self.stream.write(&self.pending) {
            Ok(bytes) => {
                self.pending.drain(..bytes);
            }
            Err(error) if is_later(&error) => {}
            // The next read says so, and what the guest said last is still to be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.pending.clear(),
            Err(error) => return Err(Error::io("write to", &self.place)(error).into()),
        }
        Ok(())
    }

    /// Takes what was typed, up to the escape where there is a person to type it.
    fn take_input(&mut self) -> Result<Option<SessionEnd>, Failure> {
        let mut typed = [0; 4096];
        let typed = match rustix::io::read(io::stdin(), &mut typed) {
            // Reading a terminal that is gone is an error.
            Ok(0) | Err(Errno::IO) => return Ok(self.end_of_input()),
            Ok(bytes) => &typed[..bytes],
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(Error::io("read", "standard input")(errno.into()).into()),
        };
        let escape = typed.iter().position(|&byte| self.is_terminal && Some(byte) == self.escape.byte());
        let taken = &typed[..escape.unwrap_or(typed.len())];
        if self.pending.len() + taken.len() <= MOST_PENDING_BYTES || !self.is_terminal {
            self.pending.extend_from_slice(taken);
        }
        self.send()?;
        Ok(escape.map(|_| SessionEnd::Left))
    }

    fn end_of_input(&mut self) -> Option<SessionEnd> {
        self.input_open = false;
        if self.is_terminal {
            return Some(SessionEnd::Left);
        }
        self.leave_at = self.linger.and_then(|linger| Instant::now().checked_add(linger));
        None
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
