//! A guest that was entered, and what is run in it as whom: [`GuestShell`].

use std::pin::pin;
use std::sync::{Mutex, PoisonError};

use tokio::sync::{Notify, OnceCell};
use tokio::time::{Duration, Instant, sleep_until, timeout_at};

use super::end_mark::EndMark;
use super::guests::{ConnectedGuest, GuestInput, GuestOutput};
use super::ports;
use super::privilege::PrivilegeTool;
use super::script::{self, GuestScript, ROOT};
use crate::error::{Error, Result};
use crate::program::GuestExitStatus;
use crate::vmfile::ReadyProbes;

/// The shortest and the longest pause between two questions whether a guest is ready. A service
/// that begins to answer tells nothing outside of the guest, so there is nothing to wait for but
/// time.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// The most that is kept of what a question was answered with.
const MOST_ANSWER_BYTES: usize = 4096;
/// How long interrupted tasks have to end: what the guest itself gives them, and the round trip.
const END_LIMIT: Duration = Duration::from_secs(60);

/// How long a connection may take to end after the step at its other end: what that left in the
/// background keeps it open.
const BACKGROUND_GRACE: Duration = Duration::from_secs(1);

/// A guest that was entered.
#[derive(Debug)]
pub(super) struct GuestShell<G> {
    guest: G,
    machine: String,
    means: OnceCell<PrivilegeTool>,
}

impl<G: ConnectedGuest> GuestShell<G> {
    /// Creates it from the guest of a machine.
    pub(super) fn new(guest: G, machine: &str) -> Self {
        Self { guest, machine: machine.to_owned(), means: OnceCell::new() }
    }

    /// Waits until cloud-init has ended in the guest.
    pub(super) async fn cloud_init(&self, deadline: Instant) -> Result<()> {
        self.guest.cloud_init(deadline).await
    }

    /// Runs a script to its end, as its own user.
    ///
    /// # Errors
    /// `Guest` where that user can't be become, and those of [`ConnectedGuest::run`].
    pub(super) async fn run(
        &self,
        script: &GuestScript,
        input: GuestInput,
        output: GuestOutput<'_>,
        deadline: Instant,
    ) -> Result<GuestExitStatus> {
        let login = self.guest.user();
        let argv = match script.user.as_deref().filter(|user| *user != login) {
            None => script.argv.clone(),
            Some(user) => {
                let argv = self.means(deadline).await?.argv(user, &script.argv);
                argv.ok_or_else(|| self.without_means(user))?
            }
        };
        self.guest.run(argv, input, output, deadline).await
    }

    /// Runs a step until it says that it has ended: what it leaves in the background goes on, and
    /// is not waited for.
    ///
    /// # Errors
    /// As for [`run`](Self::run).
    pub(super) async fn run_step(
        &self,
        script: &GuestScript,
        input: GuestInput,
        output: GuestOutput<'_>,
        deadline: Instant,
    ) -> Result<GuestExitStatus> {
        let Some(token) = &script.token else { return self.run(script, input, output, deadline).await };
        let (mark, output) = (Mutex::new(EndMark::new(token)), Mutex::new(output));
        let marked = Notify::new();
        let print = |own: Vec<u8>| output.lock().unwrap_or_else(PoisonError::into_inner)(&own);
        let mut take = |bytes: &[u8]| {
            let mut mark = mark.lock().unwrap_or_else(PoisonError::into_inner);
            print(mark.take(bytes));
            if mark.code().is_some() {
                marked.notify_one();
            }
        };
        let exit = {
            let mut run = pin!(self.run(script, input, &mut take, deadline));
            tokio::select! {
                biased;
                exit = &mut run => exit,
                () = marked.notified() => {
                    let grace = deadline.min(Instant::now() + BACKGROUND_GRACE);
                    timeout_at(grace, run).await.unwrap_or(Ok(GuestExitStatus::Code(0)))
                }
            }
        };
        let mut mark = mark.into_inner().unwrap_or_else(PoisonError::into_inner);
        print(mark.rest());
        match mark.code() {
            // It is known, whatever became of the connection since.
            Some(code) => Ok(GuestExitStatus::Code(code)),
            None => exit,
        }
    }

    /// Ends all tasks whose end was not recorded, and waits for that.
    ///
    /// # Errors
    /// `Guest` where one of them does not end, and those of [`ConnectedGuest::run`].
    pub(super) async fn end_tasks(&self) -> Result<()> {
        let deadline = Instant::now() + END_LIMIT;
        let is_root = self.guest.user() == ROOT;
        let as_root = !is_root && self.means(deadline).await? != PrivilegeTool::None;
        // A user who can't become root has started nothing as another user either.
        let script = script::of_end(as_root.then_some(ROOT));
        let (exit, said) = self.ask(&script, deadline).await?;
        match exit.is_success() {
            true => Ok(()),
            false => Err(self.problem(format!("the interrupted step can't be ended ({exit}): {said}"))),
        }
    }

    /// Waits until the ports of the guest answer and the command of the file succeeds.
    pub(super) async fn answers(&self, ready: &ReadyProbes, deadline: Instant) -> Result<()> {
        for port in &ready.tcp {
            self.listens(*port, deadline).await?;
        }
        match &ready.command {
            Some(text) => self.succeeds_at(text, deadline).await,
            None => Ok(()),
        }
    }

    /// Waits until something listens on a port of the guest.
    pub(super) async fn listens(&self, port: u16, deadline: Instant) -> Result<()> {
        let awaited = ports::awaited(port);
        self.succeeds(&script::listens(port), &awaited, Some(ports::SILENT), deadline).await
    }

    /// Waits until a command of the file succeeds.
    pub(super) async fn succeeds_at(&self, text: &str, deadline: Instant) -> Result<()> {
        self.succeeds(&script::of_command(text), "the ready command to succeed", None, deadline).await
    }

    /// Runs a command again and again until it succeeds; `silence` is what it means by exit code 1
    /// without a word.
    async fn succeeds(
        &self,
        script: &GuestScript,
        awaited: &str,
        silence: Option<&str>,
        deadline: Instant,
    ) -> Result<()> {
        let began = Instant::now();
        let mut pause = BACK_OFF.0;
        let mut last = String::new();
        let tries = async {
            loop {
                let (exit, said) = self.ask(script, deadline).await?;
                if exit.is_success() {
                    return Ok(());
                }
                last = match silence {
                    Some(silence) if said.is_empty() && exit == GuestExitStatus::Code(1) => {
                        silence.to_owned()
                    }
                    _ if said.is_empty() => format!("last: {exit}"),
                    _ => format!("last: {exit}: {said}"),
                };
                sleep_until(Instant::now() + pause).await;
                pause = (pause * 2).min(BACK_OFF.1);
            }
        };
        timeout_at(deadline, tries).await.unwrap_or_else(|_| {
            let awaited = match last.is_empty() {
                true => awaited.to_owned(),
                false => format!("{awaited} ({last})"),
            };
            Err(Error::timed_out(awaited, began.elapsed()))
        })
    }

    /// Runs a script without input; returns how it ended, and its last line of output.
    async fn ask(&self, script: &GuestScript, deadline: Instant) -> Result<(GuestExitStatus, String)> {
        let mut said = Vec::new();
        let mut take = |bytes: &[u8]| add_bounded(&mut said, bytes);
        let exit = self.run(script, Box::pin(tokio::io::empty()), &mut take, deadline).await?;
        let said = String::from_utf8_lossy(&said).trim().lines().last().unwrap_or_default().to_owned();
        Ok((exit, said))
    }

    /// Returns the means to become another user, asked of the guest once.
    async fn means(&self, deadline: Instant) -> Result<PrivilegeTool> {
        let asked = self.means.get_or_try_init(async || {
            // Not by `ask`: no other user is needed for this.
            let (question, mut said) = (PrivilegeTool::question(), Vec::new());
            let mut take = |bytes: &[u8]| add_bounded(&mut said, bytes);
            let input: GuestInput = Box::pin(tokio::io::empty());
            let exit = self.guest.run(question.argv, input, &mut take, deadline).await?;
            let said = String::from_utf8_lossy(&said);
            match exit.is_success() {
                true => Ok(PrivilegeTool::named(&said)),
                false => Err(self.problem(format!("cannot find out who may become root: {exit}"))),
            }
        });
        asked.await.copied()
    }

    fn without_means(&self, user: &str) -> Error {
        let login = self.guest.user();
        self.problem(format!(
            "`{login}`, the user that vmkit logs in as, can't become `{user}`: the guest has neither sudo \
             nor doas that lets \
             `{login}` do so without a password"
        ))
    }

    fn problem(&self, problem: String) -> Error {
        Error::GuestUser { machine: self.machine.to_owned(), problem }
    }
}

/// Keeps the beginning of an answer: a guest may say without end.
fn add_bounded(said: &mut Vec<u8>, bytes: &[u8]) {
    let room = MOST_ANSWER_BYTES.saturating_sub(said.len());
    said.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Stdio;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use crate::project::script::{TaskToken, of_step};
    use crate::project::script_text::ScriptText;
    use crate::vmfile;

    /// A guest with this host's own shell. As with an SSH server, a command is over once its output
    /// is closed.
    struct HostShell;

    impl ConnectedGuest for HostShell {
        fn user(&self) -> &str {
            ROOT
        }

        async fn cloud_init(&self, _: Instant) -> Result<()> {
            Ok(())
        }

        async fn run(
            &self,
            argv: Vec<String>,
            mut input: GuestInput,
            output: GuestOutput<'_>,
            deadline: Instant,
        ) -> Result<GuestExitStatus> {
            let mut command = tokio::process::Command::new(&argv[0]);
            command.args(&argv[1..]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            let mut sent = Vec::new();
            input.read_to_end(&mut sent).await.unwrap();
            let mut stdin = child.stdin.take().unwrap();
            let mut stdout = child.stdout.take().unwrap();
            stdin.write_all(&sent).await.unwrap();
            drop(stdin);
            let all = async {
                let mut bytes = [0; 512];
                loop {
                    match stdout.read(&mut bytes).await.unwrap() {
                        0 => break child.wait().await.unwrap(),
                        read => output(&bytes[..read]),
                    }
                }
            };
            let status = timeout_at(deadline, all).await.expect("the step is waited for until it has ended");
            Ok(GuestExitStatus::Code(status.code().unwrap().cast_unsigned()))
        }
    }

    #[tokio::test]
    async fn a_step_ends_though_it_leaves_a_program_in_the_background() {
        let text =
            "version = 1\n[machine.web]\nimage = 'a'\n[[machine.web.provision]]\nname = 's'\nshell = 'x'\n";
        let project =
            vmfile::parse(std::path::Path::new("/p/vmkit.toml"), text, &|_| Err(String::new())).unwrap();
        let inside = GuestShell::new(HostShell, "web");
        for (last, code) in [("echo done", 0), ("exit 7", 7)] {
            let text = ScriptText::of_step(&format!("sleep 600 &\necho $!\n{last}\n"));
            let token = TaskToken::new(uuid::Uuid::new_v4().as_u128());
            let script = of_step(&project.machines[0].steps[0], &text, "s", &token);
            let mut said = Vec::new();
            let mut take = |bytes: &[u8]| said.extend_from_slice(bytes);
            let input: GuestInput = Box::pin(std::io::Cursor::new(script.input.clone()));
            let deadline = Instant::now() + Duration::from_secs(120);
            let exit = inside.run_step(&script, input, &mut take, deadline).await.unwrap();
            assert_eq!(exit, GuestExitStatus::Code(code));
            let said = String::from_utf8(said).unwrap();
            let mut lines = said.lines();
            let pid: i32 = lines.next().unwrap().parse().unwrap();
            assert_eq!(lines.next(), (code == 0).then_some("done"), "{said:?}");
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it goes on");
        }
    }
}
