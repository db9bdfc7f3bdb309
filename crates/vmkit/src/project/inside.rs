//! A guest that was entered, and what is run in it as whom: [`Inside`].

use tokio::sync::OnceCell;
use tokio::time::{Duration, Instant, sleep_until, timeout_at};

use super::guests::{Guest, GuestInput, GuestOutput};
use super::ports;
use super::privilege::Means;
use super::script::{self, ROOT, Script};
use crate::error::{Error, ErrorKind, Result};
use crate::ssh::Exit;
use crate::vmfile::Ready;

/// The shortest and the longest pause between two questions whether a guest is ready. A service
/// that begins to answer tells nothing outside of the guest, so there is nothing to wait for but
/// time.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// The most that is kept of what a question was answered with.
const MOST_ANSWER_BYTES: usize = 4096;
/// How long interrupted tasks have to end: what the guest itself gives them, and the round trip.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A guest that was entered.
#[derive(Debug)]
pub(super) struct Inside<G> {
    guest: G,
    machine: String,
    means: OnceCell<Means>,
}

impl<G: Guest> Inside<G> {
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
    /// `Guest` where that user can't be become, and those of [`Guest::run`].
    pub(super) async fn run(
        &self,
        script: &Script,
        input: GuestInput,
        output: GuestOutput<'_>,
        deadline: Instant,
    ) -> Result<Exit> {
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

    /// Ends all tasks whose end was not recorded, and waits for that.
    ///
    /// # Errors
    /// `Guest` where one of them does not end, and those of [`Guest::run`].
    pub(super) async fn end_tasks(&self) -> Result<()> {
        let deadline = Instant::now() + END_LIMIT;
        let is_root = self.guest.user() == ROOT;
        let as_root = !is_root && self.means(deadline).await? != Means::None;
        // A user who can't become root has started nothing as another user either.
        let script = script::of_end(as_root.then_some(ROOT));
        let (exit, said) = self.ask(&script, deadline).await?;
        match exit.is_success() {
            true => Ok(()),
            false => Err(self.problem(format!("what was cut off can't be ended ({exit}): {said}"))),
        }
    }

    /// Waits until the ports of the guest answer and the command of the file succeeds.
    pub(super) async fn answers(&self, ready: &Ready, deadline: Instant) -> Result<()> {
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
        script: &Script,
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
                    Some(silence) if said.is_empty() && exit == Exit::Code(1) => silence.to_owned(),
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
            Err(Error::TimedOut { awaited, after: began.elapsed(), console: String::new() })
        })
    }

    /// Runs a script without input; returns how it ended, and its last line of output.
    async fn ask(&self, script: &Script, deadline: Instant) -> Result<(Exit, String)> {
        let mut said = Vec::new();
        let mut take = |bytes: &[u8]| add_bounded(&mut said, bytes);
        let exit = self.run(script, Box::pin(tokio::io::empty()), &mut take, deadline).await?;
        let said = String::from_utf8_lossy(&said).trim().lines().last().unwrap_or_default().to_owned();
        Ok((exit, said))
    }

    /// Returns the means to become another user, asked of the guest once.
    async fn means(&self, deadline: Instant) -> Result<Means> {
        let asked = self.means.get_or_try_init(async || {
            // Not by `ask`: no other user is needed for this.
            let (question, mut said) = (Means::question(), Vec::new());
            let mut take = |bytes: &[u8]| add_bounded(&mut said, bytes);
            let input: GuestInput = Box::pin(tokio::io::empty());
            let exit = self.guest.run(question.argv, input, &mut take, deadline).await?;
            let said = String::from_utf8_lossy(&said);
            match exit.is_success() {
                true => Ok(Means::named(&said)),
                false => Err(self.problem(format!("it can't be told who may become root: {exit}"))),
            }
        });
        asked.await.copied()
    }

    fn without_means(&self, user: &str) -> Error {
        let login = self.guest.user();
        self.problem(format!(
            "`{login}`, as whom vmkit is let in, can't become `{user}`: the guest has neither sudo nor doas that lets \
             `{login}` do so without a password"
        ))
    }

    fn problem(&self, what: String) -> Error {
        let message = format!("in the guest of the machine `{}` {what}", self.machine);
        Error::Backend { message, kind: ErrorKind::Guest, source: None }
    }
}

/// Keeps the beginning of an answer: a guest may say without end.
fn add_bounded(said: &mut Vec<u8>, bytes: &[u8]) {
    let room = MOST_ANSWER_BYTES.saturating_sub(said.len());
    said.extend_from_slice(&bytes[..bytes.len().min(room)]);
}
