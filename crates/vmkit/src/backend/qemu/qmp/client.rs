//! The client of QEMU's monitor.
//!
//! QEMU serves one client at a time on a monitor, so a client is created for one operation and
//! dropped after it.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::codec::{QmpMessage, decode, encode};
use super::usernet;
use super::wire::{LineStream, within};
use crate::error::{Error, Peer, Result};
use crate::handle::ActiveForward;

/// The maximum length of a line, in bytes. The longest real one, of `query-qmp-schema`, has 200 kB.
const LINE_LIMIT_BYTES: usize = 4 * 1024 * 1024;

/// More names than QEMU has for events.
const MOST_SKIPPED: usize = 200;

/// The command that reports QEMU's run state.
const STATUS: &str = "query-status";
/// The command that runs a command of the monitor for people (HMP).
const HMP: &str = "human-monitor-command";
/// The HMP command that prints the forwards; QMP has none for it.
const USERNET: &str = "info usernet";

/// Returns the number before a client's first id: no other client of the same QEMU uses the same
/// ids, so a late reply to another client is recognized.
fn first_id() -> u64 {
    let (random, _) = uuid::Uuid::new_v4().as_u64_pair();
    // Exact in every JSON parser, with room for more commands than any client sends.
    (random >> 32) << 20
}

/// A connected monitor.
///
/// # Cancel safety
/// Any call may be dropped anywhere. QEMU may or may not carry out the command of a dropped call;
/// its late reply is skipped, and the client stays usable. The same holds after a deadline.
#[derive(Debug)]
pub(crate) struct QmpClient {
    wire: LineStream,
    last_id: u64,
    /// The names of events that came while this client waited for a reply.
    skipped: BTreeSet<String>,
}

impl QmpClient {
    /// Connects to the monitor at `path` and negotiates.
    ///
    /// # Errors
    /// `Io` if nothing listens there; `TimedOut` without a greeting, which happens while another
    /// client holds the monitor too.
    pub(crate) async fn connect(path: &Path, deadline: Instant) -> Result<Self> {
        let wire = LineStream::connect(path, Peer::Qemu, LINE_LIMIT_BYTES, deadline).await?;
        Self::negotiate(wire, None, deadline).await.map(|(client, _)| client)
    }

    /// Connects to the monitor at `path`, and sends the query for the run state along.
    ///
    /// # Errors
    /// As [`connect`](Self::connect) and [`execute`](Self::execute).
    pub(crate) async fn with_status(path: &Path, deadline: Instant) -> Result<(Self, RunState)> {
        let wire = LineStream::connect(path, Peer::Qemu, LINE_LIMIT_BYTES, deadline).await?;
        let (client, answer) = Self::negotiate(wire, Some((STATUS, None)), deadline).await?;
        let state = client.run_state(&answer)?;
        Ok((client, state))
    }

    /// Connects to the monitor at `path`, and sends the query for the active forwards of user
    /// networks along; they include the host ports that the kernel chose.
    ///
    /// # Errors
    /// As [`connect`](Self::connect) and [`execute`](Self::execute).
    pub(crate) async fn with_user_forwards(
        path: &Path,
        deadline: Instant,
    ) -> Result<(Self, Vec<ActiveForward>)> {
        let wire = LineStream::connect(path, Peer::Qemu, LINE_LIMIT_BYTES, deadline).await?;
        let question = (HMP, Some(json!({ "command-line": USERNET })));
        let (client, answer) = Self::negotiate(wire, Some(question), deadline).await?;
        let forwards = client.forwards(&answer)?;
        Ok((client, forwards))
    }

    /// Negotiates over a stream that is connected to a monitor.
    #[cfg(test)]
    async fn from_stream(stream: tokio::net::UnixStream, deadline: Instant) -> Result<Self> {
        let wire = LineStream::new(stream, Peer::Qemu, LINE_LIMIT_BYTES);
        Self::negotiate(wire, None, deadline).await.map(|(client, _)| client)
    }

    /// Negotiates with a command behind it, and returns the command's reply.
    ///
    /// Everything is sent before QEMU greets, since each round trip waits for a main loop that is
    /// busy with the guest. QEMU reads it when it accepts this client, even if the client has given
    /// up by then: so the command must not change anything.
    async fn negotiate(
        wire: LineStream,
        question: Option<(&str, Option<Value>)>,
        deadline: Instant,
    ) -> Result<(Self, Value)> {
        let mut client = Self { wire, last_id: first_id(), skipped: BTreeSet::new() };
        let negotiation = client.queue("qmp_capabilities", None);
        let question = question.map(|(command, arguments)| (command, client.queue(command, arguments)));
        // A peer that has closed the connection may have sent the reason before.
        let _ = within(deadline, || "QEMU to accept the connection".to_owned(), client.wire.flush()).await;
        let awaited = "QEMU's greeting: another client holds the monitor, or QEMU does not reply";
        within(deadline, || awaited.to_owned(), client.greeted()).await?;
        let mut answer = client.answer("qmp_capabilities", negotiation, deadline).await?;
        if let Some((command, id)) = question {
            answer = client.answer(command, id, deadline).await?;
        }
        Ok((client, answer))
    }

    /// Waits for the greeting. The remaining lines for an earlier client come before it.
    async fn greeted(&mut self) -> Result<()> {
        loop {
            match self.message().await? {
                QmpMessage::Greeting { .. } => return Ok(()),
                QmpMessage::Return { .. } | QmpMessage::Error { .. } | QmpMessage::Event(_) => {
                    tracing::debug!("skipped a line for an earlier client");
                }
                QmpMessage::Other(other) => {
                    return Err(self.wire.problem(format!("no greeting, but {other:?}")));
                }
            }
        }
    }

    /// Runs a command and returns its result. Events are skipped: vmkit waits for a process
    /// instead, and a client does not exist for long.
    ///
    /// # Errors
    /// `Refused` if QEMU refuses; `TimedOut`; `Protocol` if QEMU closes the connection or violates
    /// the protocol.
    pub(crate) async fn execute(
        &mut self,
        command: &str,
        arguments: Option<Value>,
        deadline: Instant,
    ) -> Result<Value> {
        let id = self.queue(command, arguments);
        self.answer(command, id, deadline).await
    }

    /// Runs a command that an open file goes with.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(super) async fn execute_with_file(
        &mut self,
        command: &str,
        arguments: Value,
        file: BorrowedFd<'_>,
        deadline: Instant,
    ) -> Result<Value> {
        let id = self.queue(command, Some(arguments));
        let awaited = || format!("QEMU to take `{command}`");
        within(deadline, awaited, self.wire.flush_with(file)).await?;
        self.answer(command, id, deadline).await
    }

    /// Waits for an event of this name; one that came while this client waited for a reply counts,
    /// for QEMU may send it between finding out what it replies and the reply.
    ///
    /// # Errors
    /// `Protocol` if QEMU closes the connection.
    pub(super) async fn event(&mut self, name: &str) -> Result<()> {
        if self.skipped.remove(name) {
            return Ok(());
        }
        loop {
            if let QmpMessage::Event(event) = self.message().await?
                && event.name == name
            {
                return Ok(());
            }
        }
    }

    /// Queues a command, and returns the id of its reply.
    fn queue(&mut self, command: &str, arguments: Option<Value>) -> u64 {
        self.last_id += 1;
        self.wire.queue(&encode(self.last_id, command, arguments));
        self.last_id
    }

    /// Sends the queue, and waits for the reply with this id.
    async fn answer(&mut self, command: &str, id: u64, deadline: Instant) -> Result<Value> {
        let awaited = || format!("QEMU's reply to `{command}`");
        within(deadline, awaited, self.converse(command, id)).await
    }

    async fn converse(&mut self, command: &str, ours: u64) -> Result<Value> {
        self.wire.flush().await?;
        loop {
            match self.message().await? {
                QmpMessage::Return { id: Some(id), value } if id == ours => return Ok(value),
                // An error without an id is about a command that QEMU could not parse; only this
                // one is pending.
                QmpMessage::Error { id, class, desc } if id.is_none_or(|id| id == ours) => {
                    let command = command.to_owned();
                    return Err(Error::Refused { peer: Peer::Qemu, command, class, description: desc });
                }
                QmpMessage::Event(event) => {
                    tracing::trace!(event = event.name, "skipped an event");
                    if self.skipped.len() < MOST_SKIPPED {
                        self.skipped.insert(event.name);
                    }
                }
                QmpMessage::Return { .. } | QmpMessage::Error { .. } => {
                    tracing::debug!(command, "skipped a late reply");
                }
                QmpMessage::Greeting { .. } | QmpMessage::Other(_) => {
                    tracing::debug!(command, "skipped a line that is not a reply");
                }
            }
        }
    }

    #[cfg(test)]
    async fn status(&mut self, deadline: Instant) -> Result<RunState> {
        let answer = self.execute(STATUS, None, deadline).await?;
        self.run_state(&answer)
    }

    fn run_state(&self, answer: &Value) -> Result<RunState> {
        match answer.get("status").and_then(Value::as_str) {
            Some(status) => Ok(RunState::from(status)),
            None => Err(self.wire.problem(format!("missing `status` in the reply: {answer}"))),
        }
    }

    /// Pauses the vCPUs; no effect if they are paused.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(crate) async fn pause(&mut self, deadline: Instant) -> Result<()> {
        self.execute("stop", None, deadline).await.map(drop)
    }

    /// Resumes the vCPUs; no effect if they run.
    ///
    /// # Errors
    /// As [`execute`](Self::execute); `Refused` in a state that can't be resumed, such as after a
    /// panic.
    pub(crate) async fn cont(&mut self, deadline: Instant) -> Result<()> {
        self.execute("cont", None, deadline).await.map(drop)
    }

    /// Wakes a guest that sleeps (ACPI S3).
    ///
    /// # Errors
    /// As [`execute`](Self::execute); `Refused` if it does not sleep, or can't be woken.
    pub(crate) async fn wake(&mut self, deadline: Instant) -> Result<()> {
        self.execute("system_wakeup", None, deadline).await.map(drop)
    }

    /// Presses the guest's power button. Only a later `SHUTDOWN` event shows whether the guest
    /// reacts.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(crate) async fn power_down(&mut self, deadline: Instant) -> Result<()> {
        self.execute("system_powerdown", None, deadline).await.map(drop)
    }

    /// Returns the active forwards of user networks.
    ///
    /// # Errors
    /// As [`execute`](Self::execute).
    pub(crate) async fn user_forwards(&mut self, deadline: Instant) -> Result<Vec<ActiveForward>> {
        self.hmp(USERNET, deadline).await.map(|table| usernet::forwards(&table))
    }

    /// Runs a command of the monitor for people, and returns what it printed.
    ///
    /// # Errors
    /// As [`execute`](Self::execute); the failure of such a command is only in its output.
    pub(crate) async fn hmp(&mut self, line: &str, deadline: Instant) -> Result<String> {
        let answer = self.execute(HMP, Some(json!({ "command-line": line })), deadline).await?;
        self.printed(line, &answer).map(str::to_owned)
    }

    /// Sends `quit`. The process ends a little later.
    ///
    /// # Errors
    /// As [`execute`](Self::execute), but a connection that QEMU closes before or after its reply
    /// is success.
    pub(crate) async fn quit(mut self, deadline: Instant) -> Result<()> {
        match self.execute("quit", None, deadline).await {
            Err(Error::Protocol { source: Some(source), .. })
                if source.downcast_ref().is_some_and(closed) =>
            {
                Ok(())
            }
            result => result.map(drop),
        }
    }

    fn forwards(&self, answer: &Value) -> Result<Vec<ActiveForward>> {
        self.printed(USERNET, answer).map(usernet::forwards)
    }

    fn printed<'a>(&self, command: &str, answer: &'a Value) -> Result<&'a str> {
        let problem = || self.wire.problem(format!("the reply to `{command}` is not text: {answer}"));
        answer.as_str().ok_or_else(problem)
    }

    async fn message(&mut self) -> Result<QmpMessage> {
        let line = self.wire.line().await?;
        decode(&line).map_err(|malformed| self.wire.malformed(malformed))
    }
}

fn closed(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | BrokenPipe | ConnectionReset)
}

/// QEMU's run state, as `query-status` names it.
///
/// Source: QEMU, `qapi/run-state.json`, `RunState`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RunState {
    /// The vCPUs run.
    Running,
    /// They are paused by a command.
    Paused,
    /// Not started yet (`-S`).
    Prelaunch,
    /// It waits for an incoming migration.
    InMigrate,
    /// The guest has shut down, and QEMU was started with `-no-shutdown`.
    Shutdown,
    /// The guest sleeps (ACPI S3).
    Suspended,
    /// The accelerator failed, and the guest can't continue.
    InternalError,
    /// A disk failed, with the error policy to pause.
    IoError,
    /// The guest's kernel panicked, as reported by pvpanic.
    GuestPanicked,
    /// The guest's watchdog fired.
    Watchdog,
    /// A debugger has stopped it.
    Debug,
    /// One of the short states around migrations and snapshots.
    Migrating,
    /// A state that this version does not know.
    Unknown(String),
}

impl From<&str> for RunState {
    fn from(status: &str) -> Self {
        match status {
            "running" => RunState::Running,
            "paused" => RunState::Paused,
            "prelaunch" => RunState::Prelaunch,
            "inmigrate" => RunState::InMigrate,
            "shutdown" => RunState::Shutdown,
            "suspended" => RunState::Suspended,
            "internal-error" => RunState::InternalError,
            "io-error" => RunState::IoError,
            "guest-panicked" => RunState::GuestPanicked,
            "watchdog" => RunState::Watchdog,
            "debug" => RunState::Debug,
            "postmigrate" | "finish-migrate" | "restore-vm" | "save-vm" | "colo" => RunState::Migrating,
            other => RunState::Unknown(other.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::os::fd::OwnedFd;
    use std::process::Stdio;
    use std::time::Duration;

    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufStream};
    use tokio::net::UnixStream;
    use tokio::process::{Child, Command};

    use super::*;
    use crate::error::ErrorKind;
    use crate::spec::Protocol;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}}}"#;

    fn in_ms(millis: u64) -> Instant {
        Instant::now() + Duration::from_millis(millis)
    }

    fn in_time() -> Instant {
        in_ms(20_000)
    }

    /// QEMU's side of the monitor, driven by a test.
    struct FakeMonitor(BufStream<UnixStream>);

    impl FakeMonitor {
        async fn say(&mut self, line: impl std::fmt::Display) {
            self.0.write_all(format!("{line}\r\n").as_bytes()).await.unwrap();
            self.0.flush().await.unwrap();
        }

        async fn hear(&mut self) -> Value {
            let mut line = String::new();
            self.0.read_line(&mut line).await.unwrap();
            serde_json::from_str(&line).unwrap()
        }

        async fn answer(&mut self, value: Value) {
            let id = self.hear().await["id"].clone();
            self.say(json!({ "return": value, "id": id })).await;
        }
    }

    /// Returns a client whose peer has greeted and then follows `script`.
    async fn greeted<F>(script: impl FnOnce(FakeMonitor) -> F + Send + 'static) -> QmpClient
    where
        F: Future<Output = ()> + Send,
    {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let mut peer = FakeMonitor(BufStream::new(theirs));
            peer.say(GREETING).await;
            peer.answer(json!({})).await;
            script(peer).await;
        });
        QmpClient::from_stream(ours, in_time()).await.unwrap()
    }

    #[tokio::test]
    async fn a_monitor_that_does_not_greet_may_be_held_by_another_client() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let error = QmpClient::from_stream(ours, in_ms(20)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert!(error.to_string().contains("another client holds the monitor"), "{error}");
    }

    #[tokio::test]
    async fn a_peer_that_is_not_qemu_is_reported() {
        for (said, expected) in [
            ("SSH-2.0-OpenSSH_9.2\n", "QEMU: `SSH-2.0-OpenSSH_9.2` is not JSON"),
            ("{\"hello\": 1}\n", "QEMU: no greeting"),
            ("{\"QMP\"", "QEMU: closed the connection"),
            ("", "QEMU: closed the connection"),
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(said.as_bytes()).await.unwrap();
            drop(theirs);
            let error = QmpClient::from_stream(ours, in_time()).await.unwrap_err();
            assert!(error.to_string().starts_with(expected), "{said:?}: {error}");
            assert_eq!(error.kind(), ErrorKind::Hypervisor);
        }
    }

    #[tokio::test]
    async fn lines_for_an_earlier_client_are_skipped() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(async move {
            let mut peer = FakeMonitor(BufStream::new(theirs));
            // As QEMU 7.2 does if a client disconnected while its command was carried out.
            for id in 1..=4 {
                peer.say(json!({"return": {"status": "shutdown"}, "id": id})).await;
            }
            peer.say(GREETING).await;
            for id in 1..=4 {
                peer.say(json!({"return": {"status": "shutdown"}, "id": id})).await;
            }
            peer.answer(json!({})).await;
            peer.answer(json!({"status": "running"})).await;
        });
        let mut client = QmpClient::from_stream(ours, in_time()).await.unwrap();
        assert_eq!(client.status(in_time()).await.unwrap(), RunState::Running);
    }

    #[tokio::test]
    async fn an_event_before_the_reply_it_came_after_is_not_lost() {
        let mut client = greeted(|mut peer| async move {
            let id = peer.hear().await["id"].clone();
            peer.say(json!({"event": "MIGRATION", "data": {}, "timestamp": {}})).await;
            peer.say(json!({"return": {"status": "active"}, "id": id})).await;
            peer.hear().await;
        })
        .await;
        assert_eq!(client.execute("query-migrate", None, in_time()).await.unwrap()["status"], "active");
        tokio::time::timeout(Duration::from_secs(30), client.event("MIGRATION")).await.unwrap().unwrap();
        let again = tokio::time::timeout(Duration::from_millis(20), client.event("MIGRATION")).await;
        assert!(again.is_err(), "it is reported once");
    }

    #[tokio::test]
    async fn a_late_reply_is_skipped() {
        let mut client = greeted(|mut peer| async move {
            let late = peer.hear().await["id"].clone();
            let now = peer.hear().await["id"].clone();
            peer.say(json!({"return": {"status": "paused"}, "id": late})).await;
            peer.say(json!({"return": {"status": "paused"}, "id": "not ours"})).await;
            peer.say(json!({"return": {"status": "running"}, "id": now})).await;
        })
        .await;
        let error = client.status(in_ms(50)).await.unwrap_err();
        assert!(error.to_string().ends_with("s for QEMU's reply to `query-status`"), "{error}");
        assert_eq!(client.status(in_time()).await.unwrap(), RunState::Running);
    }

    #[tokio::test]
    async fn unknown_events_and_states_are_accepted() {
        let mut client = greeted(|mut peer| async move {
            for number in 0..300 {
                peer.say(json!({"event": "NEVER_HEARD_OF", "data": number})).await;
            }
            peer.answer(json!({"status": "comatose"})).await;
        })
        .await;
        assert_eq!(client.status(in_time()).await.unwrap(), RunState::Unknown("comatose".into()));
    }

    #[tokio::test]
    async fn an_error_without_an_id_is_the_reply_to_the_pending_command() {
        let mut client = greeted(|mut peer| async move {
            peer.hear().await;
            peer.say(r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#).await;
        })
        .await;
        let error = client.pause(in_time()).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused `stop`: JSON parse error (GenericError)");
    }

    #[tokio::test]
    async fn junk_and_endless_lines_are_protocol_errors() {
        let mut client = greeted(|mut peer| async move {
            peer.hear().await;
            peer.say("\u{1b}[31mFATAL").await;
        })
        .await;
        let error = client.pause(in_time()).await.unwrap_err();
        assert!(error.to_string().starts_with(r"QEMU: `\x1b[31mFATAL` is not JSON"), "{error}");

        let mut client = greeted(|mut peer| async move {
            // The client closes the connection in the middle of it.
            let _ = peer.0.write_all(&vec![b'['; LINE_LIMIT_BYTES + 1024 * 1024]).await;
        })
        .await;
        let error = client.pause(in_time()).await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU: sent a line of more than 4194304 bytes");
    }

    #[tokio::test]
    async fn quit_succeeds_however_the_connection_ends() {
        let answered = greeted(|mut peer| async move { peer.answer(json!({})).await }).await;
        answered.quit(in_time()).await.unwrap();
        let unanswered = greeted(|mut peer| async move { drop(peer.hear().await) }).await;
        unanswered.quit(in_time()).await.unwrap();
        let gone = greeted(|peer| async move { drop(peer) }).await;
        gone.quit(in_time()).await.unwrap();
        let stuck = greeted(|mut peer| async move {
            peer.hear().await;
            std::future::pending().await
        })
        .await;
        assert_eq!(stuck.quit(in_ms(20)).await.unwrap_err().kind(), ErrorKind::TimedOut);
    }

    /// Starts the real QEMU, without a guest, on a monitor that is its standard input.
    async fn real_qemu(args: &[&str], fd: OwnedFd, server: &str) -> Child {
        Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-accel", "tcg", "-S"])
            .args(["-chardev", &format!("socket,id=qmp,fd=0{server}"), "-mon", "chardev=qmp,mode=control"])
            .args(args)
            .stdin(Stdio::from(fd))
            .kill_on_drop(true)
            .spawn()
            .expect("the tests need QEMU: cargo xtask setup")
    }

    #[tokio::test]
    async fn the_client_works_with_the_real_qemu() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = OwnedFd::from(theirs.into_std().unwrap());
        let net = "user,id=n,hostfwd=tcp:127.0.0.1:0-:22,hostfwd=udp:127.0.0.1:0-:53";
        let args = ["-M", "microvm", "-netdev", net, "-device", "virtio-net-device,netdev=n"];
        let mut qemu = real_qemu(&args, theirs, "").await;
        let mut client = QmpClient::from_stream(ours, in_time()).await.unwrap();

        assert_eq!(client.status(in_time()).await.unwrap(), RunState::Prelaunch);
        client.cont(in_time()).await.unwrap();
        assert_eq!(client.status(in_time()).await.unwrap(), RunState::Running);
        client.cont(in_time()).await.expect("again is no error");
        client.pause(in_time()).await.unwrap();
        client.pause(in_time()).await.expect("again is no error");
        assert_eq!(client.status(in_time()).await.unwrap(), RunState::Paused);

        let usernet = json!({ "command-line": USERNET });
        let printed = client.execute(HMP, Some(usernet), in_time()).await.unwrap();
        let forwards = client.forwards(&printed).unwrap();
        let found: Vec<_> = forwards.iter().map(|it| (it.protocol, it.guest_port.get())).collect();
        assert_eq!(found, [(Protocol::Tcp, 22), (Protocol::Udp, 53)]);
        assert!(forwards.iter().all(|it| *it.host.ip() == Ipv4Addr::LOCALHOST && it.host.port() != 0));

        let error = client.execute("make-coffee", None, in_time()).await.unwrap_err();
        assert!(error.to_string().ends_with("has not been found (CommandNotFound)"), "{error}");
        client.quit(in_time()).await.unwrap();
        assert!(qemu.wait().await.unwrap().success());
    }

    #[tokio::test]
    async fn the_real_qemu_serves_one_client_after_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        // As `start` passes it on, and for the same reason.
        listener.set_nonblocking(true).unwrap();
        let mut qemu = real_qemu(&["-M", "none"], listener.into(), ",server=on,wait=off").await;

        let first = QmpClient::connect(&path, in_time()).await.unwrap();
        let error = QmpClient::connect(&path, in_ms(100)).await.unwrap_err();
        assert!(error.to_string().contains("another client holds the monitor"), "{error}");

        let many: Vec<_> = (0..10)
            .map(|_| {
                let path = path.clone();
                tokio::spawn(
                    async move { QmpClient::with_status(&path, in_time()).await.map(|(_, state)| state) },
                )
            })
            .collect();
        drop(first);
        for one in many {
            assert_eq!(one.await.unwrap().unwrap(), RunState::Prelaunch);
        }
        QmpClient::connect(&path, in_time()).await.unwrap().quit(in_time()).await.unwrap();
        qemu.wait().await.unwrap();
        let error = QmpClient::connect(&path, in_time()).await.unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
}
