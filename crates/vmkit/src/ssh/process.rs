//! A program in a guest: its input, its output, its end.

use std::ffi::OsStr;
use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use russh::client::Msg;
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Sig};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::command_line::own_line;
use super::noise::{OutputMark, OutputStream};
use super::verifier::DisconnectCause;
use super::{GuestCommand, Session, TerminalSize, TerminalSpec};
use crate::deadline::later;
use crate::error::{Error, Result};
use crate::program::{GuestExitStatus, ProgramOutput};

/// The kind of extended data that is standard error. Source: RFC 4254, section 5.2.
const STDERR: u32 = 1;

/// A program that runs in a guest. When this is dropped, it runs on, and the server closes its
/// streams.
#[derive(Debug)]
pub struct GuestProcess {
    input: ProcessInput,
    output: ProcessOutput,
}

/// The input of a program.
pub struct ProcessInput {
    half: ChannelWriteHalf<Msg>,
    stdin: Pin<Box<dyn AsyncWrite + Send + Sync>>,
    target: String,
    fate: DisconnectCause,
}

/// The output of a program, in the order in which it arrives.
pub struct ProcessOutput {
    half: ChannelReadHalf,
    /// The mark behind which the program's own output starts, if there may be other output before
    /// it.
    mark: Option<OutputMark>,
    exit: Option<GuestExitStatus>,
    target: String,
    fate: DisconnectCause,
}

/// An event of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It wrote this to its standard output.
    Stdout(Vec<u8>),
    /// It wrote this to its standard error.
    Stderr(Vec<u8>),
    /// It has ended, and all of its output was returned.
    Ended(GuestExitStatus),
}

impl Session {
    /// The maximum size of each stream in the result of [`output`](Self::output): 16 MiB.
    pub const MOST_CAPTURED_BYTES: usize = 16 << 20;

    /// Starts a program, and returns when the server has started it.
    ///
    /// # Errors
    /// `InvalidInput` for a command that no shell can be given; `Guest` if the server refuses it;
    /// `TimedOut`.
    pub async fn spawn(&self, command: &GuestCommand, timeout: Duration) -> Result<GuestProcess> {
        let line = command.line()?;
        let terminal = command.terminal.as_ref();
        self.within(later(timeout), "the start of a program", self.begin(terminal, line)).await
    }

    /// Starts a program of vmkit's own, and returns only the program's output: the earlier output
    /// of the user's login shell is skipped. The shell need not be a POSIX one.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn). [`ProcessOutput::next`] fails with `Guest` if the shell ran
    /// nothing, with what it printed.
    pub(crate) async fn spawn_own(
        &self,
        argv: &[impl AsRef<OsStr>],
        deadline: Instant,
    ) -> Result<GuestProcess> {
        let mark = OutputMark::new();
        let line = own_line(argv, mark.text())?;
        let begun = self.begin(None, Some(line));
        let mut process = self.within(deadline, "the start of a program", begun).await?;
        process.output.mark = Some(mark);
        Ok(process)
    }

    async fn begin(&self, terminal: Option<&TerminalSpec>, line: Option<Vec<u8>>) -> Result<GuestProcess> {
        let channel = self.channel().await?;
        let (mut reading, writing) = channel.split();
        let failed = |error| self.failed("cannot start a program", error);
        // All requests are sent at once before waiting for the replies: one round trip.
        let mut asked = vec!["the server refuses to run a program"];
        if let Some(terminal) = terminal {
            let (columns, rows) = (u32::from(terminal.size.columns), u32::from(terminal.size.rows));
            let modes = terminal.modes();
            writing.request_pty(true, &terminal.term, columns, rows, 0, 0, modes).await.map_err(failed)?;
            asked.insert(0, "the server refuses a terminal");
        }
        match line {
            Some(line) => writing.exec(true, line).await,
            None => writing.request_shell(true).await,
        }
        .map_err(failed)?;
        for refusal in asked {
            loop {
                match reading.wait().await {
                    Some(ChannelMsg::Success) => break,
                    Some(ChannelMsg::Failure) => return Err(self.problem(refusal)),
                    Some(ChannelMsg::Close) | None => {
                        return Err(self.fate().lost(self.target(), "cannot start a program"));
                    }
                    // Window adjustments; no output comes before the reply.
                    Some(_) => {}
                }
            }
        }
        let stdin = Box::pin(writing.make_writer());
        let input =
            ProcessInput { half: writing, stdin, target: self.target().to_owned(), fate: self.fate() };
        let (target, fate) = (self.target().to_owned(), self.fate());
        let output = ProcessOutput { half: reading, mark: None, exit: None, target, fate };
        Ok(GuestProcess { input, output })
    }

    /// Runs a program to its end with this as its whole standard input, and returns its output.
    ///
    /// A program that still runs after `timeout` runs on, with its streams closed.
    ///
    /// # Errors
    /// Those of [`spawn`](Self::spawn); `Guest` if the connection is lost before its end.
    pub async fn output(
        &self,
        command: &GuestCommand,
        stdin: &[u8],
        timeout: Duration,
    ) -> Result<ProgramOutput> {
        let deadline = later(timeout);
        let (mut input, mut output) = self.spawn(command, timeout).await?.split();
        let feed = async {
            // A program that ends without reading everything is not an error.
            let _ = input.write(stdin).await;
            let _ = input.end().await;
            std::future::pending().await
        };
        let collect = async {
            let mut captured = ProgramOutput {
                exit: GuestExitStatus::Code(0),
                stdout: Vec::new(),
                stderr: Vec::new(),
                truncated: false,
            };
            loop {
                let (kept, data) = match output.next().await? {
                    ProcessEvent::Stdout(data) => (&mut captured.stdout, data),
                    ProcessEvent::Stderr(data) => (&mut captured.stderr, data),
                    ProcessEvent::Ended(exit) => {
                        captured.exit = exit;
                        return Ok(captured);
                    }
                };
                let room = Self::MOST_CAPTURED_BYTES - kept.len();
                captured.truncated |= data.len() > room;
                kept.extend_from_slice(&data[..data.len().min(room)]);
            }
        };
        let run = async {
            tokio::select! {
                captured = collect => captured,
                never = feed => never,
            }
        };
        self.within(deadline, "the end of a program", run).await
    }
}

/// Signals the process group of each program that the server's process for this connection has
/// started, except the one that runs this.
///
/// A server starts each program in a session of its own, so the group includes its children.
/// `pgrep` is for guests whose kernel does not list children.
const SIGNAL_ALL: &str = "for p in $(cat /proc/$PPID/task/$PPID/children 2>/dev/null || pgrep -P $PPID); do \
    [ \"$p\" = $$ ] || kill -s \"$1\" -- \"-$p\" 2>/dev/null || kill -s \"$1\" \"$p\" 2>/dev/null; done; :";

impl Session {
    /// Sends the signal of this name, such as `TERM`, to all programs of this session, by a program
    /// in the guest.
    ///
    /// For a server that does not pass signals on, as OpenSSH's to programs of root; otherwise see
    /// [`ProcessInput::signal`].
    ///
    /// # Errors
    /// Those of [`output`](Self::output).
    pub async fn signal_all(&self, name: &str, timeout: Duration) -> Result<()> {
        let deadline = later(timeout);
        let (_input, mut output) =
            self.spawn_own(&["sh", "-c", SIGNAL_ALL, "sh", name], deadline).await?.split();
        let end = async {
            while !matches!(output.next().await?, ProcessEvent::Ended(_)) {}
            Ok(())
        };
        self.within(deadline, "the end of a program", end).await
    }
}

impl GuestProcess {
    /// Splits this into both sides, to be used at the same time: a program whose output is not read
    /// may stop reading its input.
    pub fn split(self) -> (ProcessInput, ProcessOutput) {
        (self.input, self.output)
    }
}

impl ProcessInput {
    /// Writes all of this to the program, as fast as it reads.
    ///
    /// A program that has ended reads nothing more: wait for [`ProcessOutput::next`] at the same
    /// time.
    ///
    /// # Errors
    /// `Guest` if the connection is lost.
    pub async fn write(&mut self, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        let written = self.stdin.write_all(data).await;
        written.map_err(|_| self.fate.lost(&self.target, "cannot write to the program"))
    }

    /// Closes the program's input.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn end(&mut self) -> Result<()> {
        let told = self.half.eof().await;
        told.map_err(|error| self.fate.failed(&self.target, "cannot end the program's input", error))
    }

    /// Sets the size of the program's terminal.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn resize(&self, size: TerminalSize) -> Result<()> {
        let told = self.half.window_change(size.columns.into(), size.rows.into(), 0, 0).await;
        told.map_err(|error| self.fate.failed(&self.target, "cannot resize the terminal", error))
    }

    /// Sends the program the signal of this name, such as `TERM`. Some servers don't pass signals
    /// on.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn signal(&self, name: &str) -> Result<()> {
        let told = self.half.signal(signal(name)).await;
        told.map_err(|error| self.fate.failed(&self.target, "cannot send a signal", error))
    }
}

impl ProcessOutput {
    /// Waits for the next event; [`ProcessEvent::Ended`] is the last.
    ///
    /// Unless this is called, the program is blocked after a few hundred KiB of output.
    ///
    /// # Cancel safety
    /// A dropped call loses nothing.
    ///
    /// # Errors
    /// `Guest` if the connection is lost before the program's end was reported.
    pub async fn next(&mut self) -> Result<ProcessEvent> {
        loop {
            match self.half.wait().await {
                Some(ChannelMsg::Data { data }) => {
                    if let Some(data) = self.own(OutputStream::Stdout, data.into()) {
                        return Ok(ProcessEvent::Stdout(data));
                    }
                }
                Some(ChannelMsg::ExtendedData { data, ext: STDERR }) => {
                    if let Some(data) = self.own(OutputStream::Stderr, data.into()) {
                        return Ok(ProcessEvent::Stderr(data));
                    }
                }
                Some(ChannelMsg::ExitStatus { exit_status }) => {
                    self.exit = Some(GuestExitStatus::Code(exit_status))
                }
                Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                    self.exit = Some(GuestExitStatus::Signal(name(signal_name)));
                }
                // The server may send more between the exit and the close.
                Some(ChannelMsg::Close) | None => {
                    let lost = || self.fate.lost(&self.target, "the program's end is unknown");
                    let exit = self.exit.take().ok_or_else(lost)?;
                    return match self.mark.take_if(|mark| !mark.has_begun()) {
                        None => Ok(ProcessEvent::Ended(exit)),
                        Some(mark) => Err(self.not_begun(mark, &exit)),
                    };
                }
                Some(_) => {}
            }
        }
    }

    /// Returns the program's own part of the output, if there is one.
    fn own(&mut self, stream: OutputStream, data: Vec<u8>) -> Option<Vec<u8>> {
        match &mut self.mark {
            None => Some(data),
            Some(mark) => Some(mark.without_noise(stream, data)).filter(|data| !data.is_empty()),
        }
    }

    /// Creates the error for a login shell that has ended without running its command.
    fn not_begun(&self, mark: OutputMark, exit: &GuestExitStatus) -> Error {
        let said = match mark.said() {
            said if said.is_empty() => "printed nothing".to_owned(),
            said => format!("printed {said:?}"),
        };
        let problem = format!(
            "the user's login shell in the guest ran no command: it {said} and ended with {exit} (expected a shell that runs \
             its command, such as /bin/sh: `chsh` or `usermod -s` in the guest sets another)"
        );
        Error::Ssh { target: self.target.clone(), problem, source: None }
    }
}

fn name(signal: Sig) -> String {
    match signal {
        // OpenSSH's name for a signal that SSH has no name for is `SIG@openssh.com`.
        Sig::Custom(name) => name,
        signal => format!("{signal:?}"),
    }
}

fn signal(name: &str) -> Sig {
    match name {
        "ABRT" => Sig::ABRT,
        "ALRM" => Sig::ALRM,
        "FPE" => Sig::FPE,
        "HUP" => Sig::HUP,
        "ILL" => Sig::ILL,
        "INT" => Sig::INT,
        "KILL" => Sig::KILL,
        "PIPE" => Sig::PIPE,
        "QUIT" => Sig::QUIT,
        "SEGV" => Sig::SEGV,
        "TERM" => Sig::TERM,
        "USR1" => Sig::USR1,
        other => Sig::Custom(other.to_owned()),
    }
}

impl fmt::Debug for ProcessInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Input({})", self.target)
    }
}

impl fmt::Debug for ProcessOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Output({})", self.target)
    }
}

/// Checks at compile time that a program can be used on any thread.
const _: fn() = || {
    fn send<T: Send>() {}
    send::<GuestProcess>();
    send::<Error>();
};
