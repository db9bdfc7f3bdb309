//! The client of QEMU's guest agent.
//!
//! The protocol is that of QEMU's monitor without ids, and replies to an earlier client may still
//! be in the channel. So no line counts as a reply before the agent has replied to a
//! `guest-sync-delimited` with a number that was never used before. After every call that ended
//! without its reply, that is done again.
//!
//! ```text
//!    Lost ──sync──▶ InSync ──request──▶ Lost ──reply──▶ InSync
//! ```
//!
//! The guest is not trusted: what it sends is limited in size, and is only data.
//!
//! Source: QEMU, `qga/qapi-schema.json`.

use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::qmp::codec::{MalformedLine, object, text};
use super::qmp::wire::{LineStream, within};
use crate::deadline::later;
use crate::error::{Error, Peer, Result};
use crate::program::{GuestExitStatus, ProgramOutput};

/// The maximum length of a line, in bytes. The agent keeps at most 16 MiB of each of a program's
/// two streams, which are 43 MiB in base64 and in one line.
const LINE_LIMIT_BYTES: usize = 48 * 1024 * 1024;
/// Never part of UTF-8, so no line contains it by chance: it ends an incomplete line.
const DELIMITER: u8 = 0xFF;

/// Signals a process before its children, and theirs: a parent that ended later could start new
/// ones when they end. The children are looked up first, since they are another process's
/// afterwards. `pgrep` is for guests whose kernel does not list children.
const SIGNAL_ALL: &str = "end() { set -- \"$1\" $(cat /proc/$1/task/*/children 2>/dev/null || pgrep -P $1); \
    kill -s $name $1 2>/dev/null; shift; for p; do end $p; done; }; name=$1; end $2";

/// A connection to a guest agent. QEMU serves one client at a time; others wait.
///
/// # Cancel safety
/// Any call may be dropped anywhere, or reach its timeout; the client stays usable. The guest may
/// or may not carry out the command.
#[derive(Debug)]
pub struct GuestAgent {
    wire: LineStream,
    in_sync: bool,
}

/// A network interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestInterface {
    /// Its name in the guest.
    pub name: String,
    /// Its MAC address as the guest writes it, if it has one.
    pub mac: Option<String>,
    /// Its addresses.
    pub addrs: Vec<IpAddr>,
}

/// What the guest does after its shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShutdownMode {
    /// Power off.
    PowerDown,
    /// Stop, with the power on.
    Halt,
    /// Boot again.
    Reboot,
}

impl GuestAgent {
    /// Connects to the agent's channel, which is `agent` in a VM's [`RunInfo`](crate::RunInfo), and
    /// waits for the agent.
    ///
    /// # Errors
    /// `Io` if nothing listens at `path`; `TimedOut` while the guest is not up or has no agent, or
    /// another client uses the channel.
    pub async fn connect(path: &Path, timeout: Duration) -> Result<Self> {
        let deadline = later(timeout);
        let wire = LineStream::connect(path, Peer::GuestAgent, LINE_LIMIT_BYTES, deadline).await?;
        let mut agent = Self { wire, in_sync: false };
        let awaited =
            "the guest agent: the guest is not up, has no agent, or another client uses the channel";
        within(deadline, || awaited.to_owned(), agent.sync()).await?;
        Ok(agent)
    }

    /// Checks that the agent replies.
    ///
    /// # Errors
    /// `TimedOut` if it does not reply; `Guest` if it violates the protocol.
    pub async fn ping(&mut self, timeout: Duration) -> Result<()> {
        self.execute("guest-ping", None, later(timeout)).await.map(drop)
    }

    /// Returns the time of the guest's clock, since 1970 in UTC.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `Guest` if the agent refuses.
    pub async fn time(&mut self, timeout: Duration) -> Result<Duration> {
        let answer = self.execute("guest-get-time", None, later(timeout)).await?;
        let nanos = answer.as_u64().or_else(|| answer.as_i64().map(|_| 0));
        nanos
            .map(Duration::from_nanos)
            .ok_or_else(|| self.wire.problem(format!("invalid time in the reply: {answer}")))
    }

    /// Sets the guest's clock, in nanoseconds since 1970 in UTC, and lets the guest write it to its
    /// RTC.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `Guest` if the agent refuses, or could not write the RTC: then the
    /// clock is set nevertheless.
    pub async fn set_time(&mut self, nanos: i64, timeout: Duration) -> Result<()> {
        self.execute("guest-set-time", Some(json!({ "time": nanos })), later(timeout)).await.map(drop)
    }

    /// Freezes the guest's file systems, whose writes wait until [`thaw`](Self::thaw).
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `Guest` if the agent refuses.
    pub async fn freeze(&mut self, timeout: Duration) -> Result<()> {
        self.execute("guest-fsfreeze-freeze", None, later(timeout)).await.map(drop)
    }

    /// Thaws the guest's file systems; no effect if they are not frozen.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `Guest` if the agent refuses.
    pub async fn thaw(&mut self, timeout: Duration) -> Result<()> {
        self.execute("guest-fsfreeze-thaw", None, later(timeout)).await.map(drop)
    }

    /// Returns the guest's network interfaces, including the loopback one.
    ///
    /// # Errors
    /// As [`ping`](Self::ping); `Guest` if the agent refuses.
    pub async fn interfaces(&mut self, timeout: Duration) -> Result<Vec<GuestInterface>> {
        let answer = self.execute("guest-network-get-interfaces", None, later(timeout)).await?;
        interfaces(&answer)
            .ok_or_else(|| self.wire.problem(format!("invalid interfaces in the reply: {answer}")))
    }

    /// Runs a program in the guest, and returns its output when it has ended.
    ///
    /// `program` is looked up in the agent's `PATH` and gets no shell. `stdin` is all of its
    /// standard input; without one it is empty. A program that is still running after `timeout`
    /// keeps running.
    ///
    /// # Errors
    /// `Guest` if the program can't be run or the agent refuses; `TimedOut`.
    pub async fn exec(
        &mut self,
        program: &str,
        args: &[impl AsRef<str>],
        stdin: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<ProgramOutput> {
        let deadline = later(timeout);
        let pid = self.begin_until(program, args, stdin, deadline).await?;
        let awaited = || format!("the end of `{program}` in the guest (its process {pid})");
        within(deadline, awaited, self.outcome(pid)).await
    }

    /// Starts a program as [`exec`](Self::exec) does, and returns its PID in the guest.
    ///
    /// # Errors
    /// As [`exec`](Self::exec).
    pub async fn begin(
        &mut self,
        program: &str,
        args: &[impl AsRef<str>],
        stdin: Option<&[u8]>,
        timeout: Duration,
    ) -> Result<i64> {
        self.begin_until(program, args, stdin, later(timeout)).await
    }

    async fn begin_until(
        &mut self,
        program: &str,
        args: &[impl AsRef<str>],
        stdin: Option<&[u8]>,
        deadline: Instant,
    ) -> Result<i64> {
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        let mut request = json!({ "path": program, "arg": args, "capture-output": true });
        if let Some(stdin) = stdin {
            request["input-data"] = BASE64_STANDARD.encode(stdin).into();
        }
        let answer = self.execute("guest-exec", Some(request), deadline).await?;
        let pid = answer.get("pid").and_then(Value::as_i64);
        pid.ok_or_else(|| {
            self.wire.problem(format!("missing `pid` in the reply to guest-exec of `{program}`: {answer}"))
        })
    }

    /// Waits until a program that was [started](Self::begin) has ended, and returns its output. The
    /// agent reports that only once.
    ///
    /// # Errors
    /// `Guest` if the agent knows no such process; `TimedOut`.
    pub async fn ended(&mut self, pid: i64, timeout: Duration) -> Result<ProgramOutput> {
        let awaited = || format!("the end of the process {pid} in the guest");
        within(later(timeout), awaited, self.outcome(pid)).await
    }

    /// Sends the signal of this name, such as `TERM`, to a running program that was
    /// [started](Self::begin), and to all its descendants, by a shell in the guest: the agent has
    /// no command for it.
    ///
    /// # Errors
    /// As [`exec`](Self::exec).
    pub async fn signal_all(&mut self, pid: i64, name: &str, timeout: Duration) -> Result<()> {
        let args = ["-c", SIGNAL_ALL, "sh", name, &pid.to_string()];
        self.exec("/bin/sh", &args, None, timeout).await.map(drop)
    }

    /// Shuts the guest down. Returns before it is down: wait for the VM's process.
    ///
    /// # Errors
    /// `Guest` if the agent refuses. `TimedOut` if the guest ends the agent before it can report
    /// success: then the result is unknown.
    pub async fn shutdown(&mut self, mode: ShutdownMode, timeout: Duration) -> Result<()> {
        let awaited = || "the guest agent's reply to `guest-shutdown`".to_owned();
        within(later(timeout), awaited, self.tell_shutdown(mode)).await
    }

    async fn tell_shutdown(&mut self, mode: ShutdownMode) -> Result<()> {
        const COMMAND: &str = "guest-shutdown";
        self.sync().await?;
        self.in_sync = false;
        // Success has no reply, so a sync follows at once: only an error can come before its reply.
        // It has no delimiter in front, since the agent would reply to that with an error, too.
        let mark = fresh_number();
        self.wire.queue(&request(COMMAND, Some(json!({ "mode": mode.as_str() }))));
        self.wire.queue(&request("guest-sync-delimited", Some(json!({ "id": mark }))));
        self.wire.flush().await?;
        loop {
            let line = match self.wire.line().await {
                // The guest can be down, and its QEMU gone, before the agent replies.
                Err(error) if mode == ShutdownMode::PowerDown && has_hung_up(&error) => return Ok(()),
                line => line?,
            };
            match decode(&line) {
                Ok(AgentReply::Synced(number)) if number == mark => {
                    self.in_sync = true;
                    return Ok(());
                }
                Ok(AgentReply::Error { class, desc }) => return Err(refused(COMMAND, class, desc)),
                _ => {}
            }
        }
    }

    /// Waits for a program's end.
    ///
    /// The agent has no event for it and does not delay its reply until then. So ask again: soon at
    /// first, since most programs are short, and then every 100 ms.
    async fn outcome(&mut self, pid: i64) -> Result<ProgramOutput> {
        let mut pause = Duration::from_millis(5);
        loop {
            let status = self.converse("guest-exec-status", Some(json!({ "pid": pid }))).await?;
            match exec_status(&status) {
                Some(ExecStatus::Running) => {}
                Some(ExecStatus::Ended(output)) => return Ok(output),
                None => {
                    return Err(self.wire.problem(format!("invalid status of process {pid} in the reply")));
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    async fn execute(&mut self, command: &str, arguments: Option<Value>, deadline: Instant) -> Result<Value> {
        let awaited = || format!("the guest agent's reply to `{command}`");
        within(deadline, awaited, self.converse(command, arguments)).await
    }

    /// Sends a command and reads its reply. A dropped future leaves the client out of sync.
    async fn converse(&mut self, command: &str, arguments: Option<Value>) -> Result<Value> {
        self.sync().await?;
        self.in_sync = false;
        self.wire.queue(&request(command, arguments));
        self.wire.flush().await?;
        let line = self.wire.line().await?;
        let answer = match decode(&line) {
            Ok(AgentReply::Return(value)) => Ok(value),
            Ok(AgentReply::Error { class, desc }) => Err(refused(command, class, desc)),
            Ok(AgentReply::Synced(_) | AgentReply::Other) => {
                return Err(self.wire.problem(format!("unexpected reply to `{command}`")));
            }
            Err(malformed) => return Err(self.wire.malformed(malformed)),
        };
        self.in_sync = true;
        answer
    }

    /// Discards everything that earlier clients left in the channel.
    async fn sync(&mut self) -> Result<()> {
        if self.in_sync {
            return Ok(());
        }
        let mark = fresh_number();
        // An incomplete line of an earlier call must not be completed now; the delimiter makes the
        // agent discard it.
        self.wire.forget_unsent();
        self.wire.queue(&[DELIMITER]);
        self.wire.queue(&request("guest-sync-delimited", Some(json!({ "id": mark }))));
        self.wire.flush().await?;
        while !matches!(decode(&self.wire.line().await?), Ok(AgentReply::Synced(number)) if number == mark) {}
        self.in_sync = true;
        Ok(())
    }
}

impl ShutdownMode {
    fn as_str(self) -> &'static str {
        match self {
            ShutdownMode::PowerDown => "powerdown",
            ShutdownMode::Halt => "halt",
            ShutdownMode::Reboot => "reboot",
        }
    }
}

/// A line from the agent.
#[derive(Debug, Clone, PartialEq)]
enum AgentReply {
    /// A command succeeded.
    Return(Value),
    /// `guest-sync-delimited` succeeded: the delimiter came before the reply.
    Synced(i64),
    /// A command failed, or was not understood.
    Error { class: String, desc: String },
    /// Any other object.
    Other,
}

/// Parses a line; everything up to its last delimiter is discarded.
fn decode(line: &[u8]) -> Result<AgentReply, MalformedLine> {
    let delimiter = line.iter().rposition(|byte| *byte == DELIMITER);
    let mut map = object(&line[delimiter.map_or(0, |at| at + 1)..])?;
    if let Some(Value::Object(error)) = map.get("error") {
        return Ok(AgentReply::Error { class: text(error, "class"), desc: text(error, "desc") });
    }
    Ok(match (map.remove("return"), delimiter) {
        (Some(value), Some(_)) => value.as_i64().map_or(AgentReply::Other, AgentReply::Synced),
        (Some(value), None) => AgentReply::Return(value),
        (None, _) => AgentReply::Other,
    })
}

/// Returns whether the error is that the other end of the channel is closed.
fn has_hung_up(error: &Error) -> bool {
    let Error::Protocol { source: Some(source), .. } = error else { return false };
    let Some(source) = source.downcast_ref::<io::Error>() else { return false };
    matches!(
        source.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn request(command: &str, arguments: Option<Value>) -> Vec<u8> {
    let mut request = json!({ "execute": command });
    if let Some(arguments) = arguments {
        request["arguments"] = arguments;
    }
    let mut line = request.to_string().into_bytes();
    line.push(b'\n');
    line
}

fn refused(command: &str, class: String, description: String) -> Error {
    Error::Refused { peer: Peer::GuestAgent, command: command.to_owned(), class, description }
}

/// Returns a number that no earlier client of the channel has used, of 48 bits: JSON keeps those
/// exactly.
fn fresh_number() -> i64 {
    (Uuid::new_v4().as_u128() & 0xFFFF_FFFF_FFFF) as i64
}

fn interfaces(answer: &Value) -> Option<Vec<GuestInterface>> {
    let interface = |it: &Value| {
        let addrs = it.get("ip-addresses").and_then(Value::as_array).into_iter().flatten();
        Some(GuestInterface {
            name: it.get("name")?.as_str()?.to_owned(),
            mac: it.get("hardware-address").and_then(Value::as_str).map(str::to_owned),
            addrs: addrs.filter_map(|it| it.get("ip-address")?.as_str()?.parse().ok()).collect(),
        })
    };
    answer.as_array()?.iter().map(interface).collect()
}

#[derive(Debug, PartialEq)]
enum ExecStatus {
    Running,
    Ended(ProgramOutput),
}

fn exec_status(status: &Value) -> Option<ExecStatus> {
    let status = status.as_object()?;
    if !status.get("exited")?.as_bool()? {
        return Some(ExecStatus::Running);
    }
    let number = |key| status.get(key).and_then(Value::as_i64).and_then(|it| i32::try_from(it).ok());
    let exit = match number("exitcode") {
        Some(code) => GuestExitStatus::Code(code.cast_unsigned()),
        None => GuestExitStatus::of_signal(number("signal")?),
    };
    let cut = |key| status.get(key).and_then(Value::as_bool).unwrap_or(false);
    Some(ExecStatus::Ended(ProgramOutput {
        exit,
        stdout: data(status, "out-data")?,
        stderr: data(status, "err-data")?,
        truncated: cut("out-truncated") || cut("err-truncated"),
    }))
}

fn data(status: &Map<String, Value>, key: &str) -> Option<Vec<u8>> {
    match status.get(key) {
        None => Some(Vec::new()),
        Some(value) => BASE64_STANDARD.decode(value.as_str()?).ok(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufStream};
    use tokio::net::UnixStream;

    use super::*;
    use crate::error::ErrorKind;

    fn in_ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn in_time() -> Duration {
        in_ms(20_000)
    }

    /// The agent's side of the channel, driven by a test.
    struct FakeAgent(BufStream<UnixStream>);

    fn pair() -> (GuestAgent, FakeAgent) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let wire = LineStream::new(ours, Peer::GuestAgent, 64 * 1024);
        (GuestAgent { wire, in_sync: false }, FakeAgent(BufStream::new(theirs)))
    }

    impl FakeAgent {
        async fn say(&mut self, bytes: impl AsRef<[u8]>) {
            self.0.write_all(bytes.as_ref()).await.unwrap();
            self.0.flush().await.unwrap();
        }

        async fn hear(&mut self) -> Value {
            let mut line = Vec::new();
            self.0.read_until(b'\n', &mut line).await.unwrap();
            let from = line.iter().rposition(|byte| *byte == DELIMITER).map_or(0, |at| at + 1);
            serde_json::from_slice(&line[from..]).unwrap()
        }

        async fn sync(&mut self) {
            let heard = self.hear().await;
            assert_eq!(heard["execute"], "guest-sync-delimited");
            self.say("\n").await;
            self.say([DELIMITER]).await;
            self.say(format!("{{\"return\": {}}}\n", heard["arguments"]["id"])).await;
        }

        async fn answer(&mut self, command: &str, answer: Value) -> Value {
            let heard = self.hear().await;
            assert_eq!(heard["execute"], command);
            self.say(format!("{answer}\n")).await;
            heard
        }
    }

    #[tokio::test]
    async fn what_an_earlier_client_left_is_not_a_reply() {
        let (mut agent, mut peer) = pair();
        let script = tokio::spawn(async move {
            peer.say("{\"return\": {\"pid\": 1}}\nhalf a li").await;
            peer.sync().await;
            peer.answer("guest-ping", json!({"return": {}})).await;
            peer.answer("guest-ping", json!({"error": {"class": "GenericError", "desc": "no"}})).await;
            peer.answer("guest-ping", json!({"return": {}})).await;
        });
        agent.ping(in_time()).await.unwrap();
        let error = agent.ping(in_time()).await.unwrap_err();
        assert_eq!(error.to_string(), "the guest agent refused `guest-ping`: no (GenericError)");
        agent.ping(in_time()).await.expect("a refusal is a reply: no sync in between");
        script.await.unwrap();
    }

    #[tokio::test]
    async fn a_late_reply_is_discarded() {
        let (mut agent, mut peer) = pair();
        let (late, mut go) = tokio::sync::oneshot::channel::<()>();
        let script = tokio::spawn(async move {
            peer.sync().await;
            assert_eq!(peer.hear().await["execute"], "guest-network-get-interfaces");
            (&mut go).await.unwrap();
            peer.say("{\"return\": [{\"name\": \"late\"}]}\n").await;
            peer.sync().await;
            peer.answer("guest-network-get-interfaces", json!({"return": [{"name": "fresh"}]})).await;
        });
        let error = agent.interfaces(in_ms(50)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        late.send(()).unwrap();
        assert_eq!(agent.interfaces(in_time()).await.unwrap()[0].name, "fresh");
        script.await.unwrap();
    }

    #[tokio::test]
    async fn a_program_is_polled_until_it_has_ended() {
        let (mut agent, mut peer) = pair();
        let script = tokio::spawn(async move {
            peer.sync().await;
            let request = peer.answer("guest-exec", json!({"return": {"pid": 7}})).await;
            for _ in 0..3 {
                let asked = peer.answer("guest-exec-status", json!({"return": {"exited": false}})).await;
                assert_eq!(asked["arguments"]["pid"], 7);
            }
            let end = json!({"exited": true, "exitcode": 3, "out-data": "aGk=", "out-truncated": true});
            peer.answer("guest-exec-status", json!({ "return": end })).await;
            request
        });
        let output = agent.exec("/bin/cat", &["-n"], Some(b"hi"), in_time()).await.unwrap();
        assert_eq!((output.exit, output.stdout.as_slice()), (GuestExitStatus::Code(3), b"hi".as_slice()));
        assert!(output.truncated && output.stderr.is_empty());
        let request = script.await.unwrap();
        let expected =
            json!({"path": "/bin/cat", "arg": ["-n"], "capture-output": true, "input-data": "aGk="});
        assert_eq!(request["arguments"], expected);
    }

    #[tokio::test]
    async fn a_running_program_can_be_signalled() {
        let (mut agent, mut peer) = pair();
        let script = tokio::spawn(async move {
            peer.sync().await;
            peer.answer("guest-exec", json!({"return": {"pid": 7}})).await;
            let kill = peer.answer("guest-exec", json!({"return": {"pid": 8}})).await;
            for (pid, end) in [(8, json!({"exitcode": 0})), (7, json!({"signal": 15}))] {
                let mut end = end;
                end["exited"] = true.into();
                let asked = peer.answer("guest-exec-status", json!({ "return": end })).await;
                assert_eq!(asked["arguments"]["pid"], pid);
            }
            kill
        });
        let pid = agent.begin("sleep", &["9"], None, in_time()).await.unwrap();
        agent.signal_all(pid, "TERM", in_time()).await.unwrap();
        assert_eq!(agent.ended(pid, in_time()).await.unwrap().exit, GuestExitStatus::Signal("TERM".into()));
        let kill = script.await.unwrap();
        assert_eq!(kill["arguments"]["arg"], json!(["-c", SIGNAL_ALL, "sh", "TERM", "7"]));
    }

    #[test]
    fn a_signal_reaches_the_programs_descendants() {
        use std::io::{BufRead, BufReader};
        use std::os::unix::process::ExitStatusExt;
        use std::process::{Command, Stdio};
        let tree = "sh -c 'echo $$; sleep 1000; echo again' & wait; echo again";
        let mut program = Command::new("sh").args(["-c", tree]).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(program.stdout.take().unwrap()).lines();
        let child = said.next().unwrap().unwrap();
        let signal = ["-c", SIGNAL_ALL, "sh", "TERM", &program.id().to_string()];
        assert!(Command::new("sh").args(signal).status().unwrap().code().is_some());
        assert_eq!(program.wait().unwrap().signal(), Some(15));
        // Everything that could write has ended.
        assert!(said.next().is_none(), "{child} went on");
    }

    #[tokio::test]
    async fn a_refused_shutdown_is_an_error() {
        let (mut agent, mut peer) = pair();
        let script = tokio::spawn(async move {
            peer.sync().await;
            peer.answer("guest-shutdown", json!({"error": {"class": "GenericError", "desc": "no init"}}))
                .await;
            peer.sync().await;
            peer.sync().await;
            assert_eq!(peer.hear().await["arguments"]["mode"], "reboot");
            peer.sync().await;
        });
        let error = agent.shutdown(ShutdownMode::PowerDown, in_time()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Guest);
        agent.shutdown(ShutdownMode::Reboot, in_time()).await.unwrap();
        script.await.unwrap();
    }

    #[tokio::test]
    async fn a_connection_lost_during_a_shutdown_is_success() {
        let (mut agent, mut peer) = pair();
        let script = tokio::spawn(async move {
            peer.sync().await;
            peer.hear().await;
        });
        agent.shutdown(ShutdownMode::PowerDown, in_time()).await.unwrap();
        script.await.unwrap();
    }

    #[tokio::test]
    async fn an_endless_line_or_a_closed_channel_is_a_protocol_error() {
        let (mut agent, mut peer) = pair();
        let script = tokio::spawn(async move {
            peer.hear().await;
            peer.say(vec![b'x'; 128 * 1024]).await;
        });
        let error = agent.ping(in_time()).await.unwrap_err();
        assert_eq!(error.to_string(), "the guest agent: sent a line of more than 65536 bytes");
        script.await.unwrap();

        let (mut agent, peer) = pair();
        drop(peer);
        assert_eq!(agent.ping(in_time()).await.unwrap_err().kind(), ErrorKind::Guest);
    }

    #[test]
    fn interfaces_of_an_agent_of_version_7_2_are_parsed() {
        let answer = json!([
            {"name": "lo", "ip-addresses": [{"ip-address-type": "ipv4", "ip-address": "127.0.0.1", "prefix": 8}]},
            {"name": "eth0", "hardware-address": "52:54:00:12:34:56", "ip-addresses": [
                {"ip-address-type": "ipv4", "ip-address": "10.0.2.15", "prefix": 24},
                {"ip-address-type": "ipv6", "ip-address": "fec0::5054:ff:fe12:3456", "prefix": 64}]},
        ]);
        let found = interfaces(&answer).unwrap();
        assert_eq!((found[0].name.as_str(), &found[0].mac), ("lo", &None));
        assert_eq!(found[1].mac.as_deref(), Some("52:54:00:12:34:56"));
        let expected: Vec<IpAddr> =
            vec!["10.0.2.15".parse().unwrap(), "fec0::5054:ff:fe12:3456".parse().unwrap()];
        assert_eq!(found[1].addrs, expected);
    }

    #[test]
    fn a_signal_that_killed_a_program_is_reported() {
        let status = json!({"exited": true, "signal": 9});
        let Some(ExecStatus::Ended(output)) = exec_status(&status) else { panic!("no output") };
        assert_eq!(output.exit, GuestExitStatus::Signal("KILL".into()));
        assert_eq!(exec_status(&json!({"exited": true})), None);
        assert_eq!(exec_status(&json!({"exited": true, "exitcode": 0, "out-data": "%"})), None);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn a_sync_is_found_behind_any_rubbish(rubbish in prop::collection::vec(any::<u8>(), 0..100), mark: i64) {
            let mut line = rubbish;
            line.push(DELIMITER);
            line.extend(json!({ "return": mark }).to_string().into_bytes());
            prop_assert_eq!(decode(&line).unwrap(), AgentReply::Synced(mark));
        }

        #[test]
        fn output_survives_its_way(out: Vec<u8>, err: Vec<u8>, code: i32) {
            let status = json!({
                "exited": true, "exitcode": code,
                "out-data": BASE64_STANDARD.encode(&out), "err-data": BASE64_STANDARD.encode(&err),
            });
            let expected = ProgramOutput { exit: GuestExitStatus::Code(code.cast_unsigned()), stdout: out, stderr: err, truncated: false };
            prop_assert_eq!(exec_status(&status), Some(ExecStatus::Ended(expected)));
        }
    }
}
