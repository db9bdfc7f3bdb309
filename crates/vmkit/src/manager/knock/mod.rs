//! Finds out when a guest's SSH server speaks, soon after it does.
//!
//! A guest has no way to tell the host that it listens. QEMU's user network accepts at once for a
//! guest that is not there, and sends the guest a SYN at once, after 6 s and then every 12 s, for
//! 75 s, even if nobody holds the connection any more. So how often one knocks depends on what was
//! heard:
//!
//! ```text
//! nothing yet ──a refusal──▶ the guest is up: every 20 ms ──accepted──▶ wait for the greeting
//!  ever more rarely: after as long as it was silent, 200 ms to 2 s, until ten are unanswered
//!  and when the guest prints on its console, twice in a row
//! ```
//!
//! A guest that boots prints, and is silent on its console when it waits for something, so what it
//! prints is the best hint that its network may be up by now. A connection that is accepted late
//! still brings the greeting, so all are held, and ten of them, spread over QEMU's 12 s, knock as
//! often as new ones would. They have to stay few: each comes to the guest's server when that has
//! begun to listen. OpenSSH turns visitors away, the user's own among them, where ten have not
//! logged in (`MaxStartups`), and from 9.8 on whom it has laid 15 s of penalty on, 1 s for each
//! visit without a login (`PerSourcePenalties`).
//!
//! Source: libslirp 4.7, `tcp_timer.h` and `socket.c`; sshd_config(5).

mod pace;

use std::fmt;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::store::RecordChanges;
use pace::ProbeBackoff;

/// How long one may take to connect. Beyond QEMU's user network a guest that is not there takes no
/// connection.
const CONNECT: Duration = Duration::from_secs(3);
/// How long one connection is held: a little less than QEMU's user network holds one that the guest
/// does not answer, since what it closes then looks like a refusal.
const HELD: Duration = Duration::from_secs(70);
/// How much of another answer than a greeting is kept, in bytes.
const MOST_WORDS: usize = 120;

/// What a knock was answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ProbeReply {
    /// An SSH server's greeting.
    Greeting,
    /// The guest is up, and nothing listens.
    Refusal,
    /// Something listens that sends this instead.
    Words(String),
    /// Nothing that tells anything.
    Silence,
}

/// What was heard last at an address where no SSH server greets.
#[derive(Debug)]
pub(super) struct ProbeFailure<'a> {
    address: SocketAddr,
    words: Option<&'a str>,
}

impl fmt::Display for ProbeFailure<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.words {
            Some(words) => {
                write!(f, "what answers at {} is no SSH server that lets one in: {words:?}", self.address)
            }
            None => write!(f, "the guest is up, and nothing in it listens at {}", self.address),
        }
    }
}

/// Knocks at one address until an SSH server greets.
#[derive(Debug)]
pub(super) struct SshProbe {
    address: SocketAddr,
    held: JoinSet<ProbeReply>,
    pace: ProbeBackoff,
    last_answer: Option<ProbeReply>,
}

impl SshProbe {
    /// Starts with the first connection attempt.
    pub(super) fn new(address: SocketAddr) -> Self {
        Self { address, held: JoinSet::new(), pace: ProbeBackoff::new(Instant::now()), last_answer: None }
    }

    /// Returns where it knocks.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns what was heard last, where it was no greeting and not nothing.
    pub(super) fn heard(&self) -> Option<ProbeFailure<'_>> {
        let words = match self.last_answer.as_ref()? {
            ProbeReply::Words(words) => Some(words.as_str()),
            _ => None,
        };
        Some(ProbeFailure { address: self.address, words })
    }

    /// Waits until the server greets, hinted at by the console's log where there is one. It has no
    /// end of its own.
    ///
    /// # Cancel safety
    /// A dropped call goes on in the next: what is held stays held.
    pub(super) async fn greeted(&mut self, console: Option<&RecordChanges>) {
        loop {
            let next = self.pace.due(self.held.len());
            tokio::select! {
                Some(answer) = self.held.join_next() => {
                    if self.hear(answer.unwrap_or(ProbeReply::Silence)) {
                        return;
                    }
                }
                () = due(next) => {
                    self.held.spawn(knock(self.address));
                    self.pace.knocked(Instant::now());
                }
                () = printed(console), if !self.pace.is_up() => self.pace.printed(Instant::now()),
            }
        }
    }

    /// Takes an answer, and tells whether it was the greeting.
    fn hear(&mut self, answer: ProbeReply) -> bool {
        self.pace.heard(&answer, Instant::now());
        match answer {
            ProbeReply::Greeting => return true,
            ProbeReply::Silence => {}
            ProbeReply::Refusal | ProbeReply::Words(_) => self.last_answer = Some(answer),
        }
        false
    }
}

/// Waits until a knock is due, if one is.
async fn due(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

/// Waits until the guest prints something.
async fn printed(console: Option<&RecordChanges>) {
    match console {
        Some(console) if console.next().await.is_ok() => {}
        // There is no event.
        _ => pending().await,
    }
}

async fn knock(address: SocketAddr) -> ProbeReply {
    match timeout(HELD, answer(address)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => ProbeReply::Refusal,
            _ => ProbeReply::Silence,
        },
        Err(_) => ProbeReply::Silence,
    }
}

/// Connects, and returns what the one who listens says first, if it is as much as a word.
///
/// Source: RFC 4253, section 4.2: lines may come before the one that begins with `SSH-`, but
/// servers send none.
async fn answer(address: SocketAddr) -> io::Result<ProbeReply> {
    let mut stream = timeout(CONNECT, TcpStream::connect(address)).await??;
    let mut said = Vec::new();
    let mut piece = [0; MOST_WORDS];
    loop {
        let bytes = stream.read(&mut piece).await?;
        said.extend_from_slice(&piece[..bytes]);
        if said.starts_with(b"SSH-") {
            return Ok(ProbeReply::Greeting);
        }
        if bytes == 0 || said.contains(&b'\n') || said.len() >= MOST_WORDS {
            break;
        }
    }
    said.truncate(MOST_WORDS);
    let words = String::from_utf8_lossy(&said);
    let words: String = words.trim().chars().filter(|c| !c.is_control()).collect();
    Ok(if said.is_empty() { ProbeReply::Refusal } else { ProbeReply::Words(words) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    /// A guest that is silent, refuses, and greets, each when it is told to.
    struct FakeGuest {
        address: SocketAddr,
        mood: Arc<Mutex<ProbeReply>>,
        knocks: Arc<AtomicU32>,
    }

    impl FakeGuest {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let (mood, knocks) = (Arc::new(Mutex::new(ProbeReply::Silence)), Arc::new(AtomicU32::new(0)));
            let (feels, counts) = (Arc::clone(&mood), Arc::clone(&knocks));
            std::thread::spawn(move || {
                let mut held = Vec::new();
                for mut stream in listener.incoming().flatten() {
                    counts.fetch_add(1, Ordering::SeqCst);
                    let mood = feels.lock().unwrap().clone();
                    match mood {
                        ProbeReply::Silence => held.push(stream),
                        ProbeReply::Refusal => drop(stream),
                        ProbeReply::Greeting => stream.write_all(b"SSH-2.0-test\r\n").unwrap(),
                        ProbeReply::Words(words) => stream.write_all(words.as_bytes()).unwrap(),
                    }
                }
            });
            Self { address, mood, knocks }
        }

        fn turns(&self, mood: ProbeReply) {
            *self.mood.lock().unwrap() = mood;
        }
    }

    async fn knocked(knocker: &mut SshProbe, millis: u64) -> bool {
        timeout(Duration::from_millis(millis), knocker.greeted(None)).await.is_ok()
    }

    #[tokio::test]
    async fn a_greeting_is_heard_at_once_by_one_who_is_refused() {
        let guest = FakeGuest::new();
        guest.turns(ProbeReply::Refusal);
        let mut knocker = SshProbe::new(guest.address);
        assert!(!knocked(&mut knocker, 500).await);
        assert!(guest.knocks.load(Ordering::SeqCst) >= 5, "it knocks often at a guest that is up");
        guest.turns(ProbeReply::Greeting);
        let began = Instant::now();
        assert!(knocked(&mut knocker, 30_000).await);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_silent_guest_is_knocked_at_ever_more_rarely() {
        let guest = FakeGuest::new();
        let mut knocker = SshProbe::new(guest.address);
        assert!(!knocked(&mut knocker, 2000).await);
        let knocks = guest.knocks.load(Ordering::SeqCst);
        assert!((4..=14).contains(&knocks), "{knocks} knocks in two seconds");
        guest.turns(ProbeReply::Greeting);
        assert!(knocked(&mut knocker, 30_000).await);
    }

    #[tokio::test]
    async fn a_guest_that_has_refused_and_is_silent_is_left_to_find_its_words() {
        let guest = FakeGuest::new();
        guest.turns(ProbeReply::Refusal);
        let mut knocker = SshProbe::new(guest.address);
        assert!(!knocked(&mut knocker, 200).await);
        guest.turns(ProbeReply::Silence);
        assert!(!knocked(&mut knocker, 100).await);
        let knocks = guest.knocks.load(Ordering::SeqCst);
        assert!(!knocked(&mut knocker, 1000).await);
        assert!(guest.knocks.load(Ordering::SeqCst) <= knocks + 1, "it knocks again and again");
    }

    #[tokio::test]
    async fn somebody_else_s_words_are_kept_and_asked_for_ever_more_rarely() {
        let guest = FakeGuest::new();
        guest.turns(ProbeReply::Words("Not allowed\u{1b}[31m at this time\r\n".into()));
        let mut knocker = SshProbe::new(guest.address);
        assert!(!knocked(&mut knocker, 2000).await);
        let knocks = guest.knocks.load(Ordering::SeqCst);
        assert!((3..=10).contains(&knocks), "{knocks} knocks in two seconds");
        let heard = knocker.heard().unwrap().to_string();
        assert!(heard.ends_with("\"Not allowed[31m at this time\""), "{heard}");
        guest.turns(ProbeReply::Words("x".repeat(1 << 20)));
        assert!(!knocked(&mut knocker, 5000).await);
        assert!(knocker.heard().unwrap().to_string().len() < 250);
        guest.turns(ProbeReply::Greeting);
        assert!(knocked(&mut knocker, 30_000).await);
    }

    #[tokio::test]
    async fn a_refusal_is_told_as_one_and_silence_as_nothing() {
        let guest = FakeGuest::new();
        let mut knocker = SshProbe::new(guest.address);
        assert!(!knocked(&mut knocker, 300).await);
        assert!(knocker.heard().is_none());
        guest.turns(ProbeReply::Refusal);
        assert!(!knocked(&mut knocker, 3000).await);
        let heard = knocker.heard().unwrap().to_string();
        assert!(heard.contains("nothing in it listens at 127.0.0.1:"), "{heard}");
    }

    /// Measures how late the greeting is heard of a guest that changes its mind at a known moment.
    async fn lateness(before: &ProbeReply, console: Option<&std::path::Path>) -> Duration {
        let guest = FakeGuest::new();
        guest.turns(before.clone());
        let changes = console.map(|path| RecordChanges::of_log(path).unwrap());
        let mut knocker = SshProbe::new(guest.address);
        // Long enough that the pauses between two knocks have grown.
        let waited = timeout(Duration::from_millis(1500), knocker.greeted(changes.as_ref())).await;
        assert!(waited.is_err());
        guest.turns(ProbeReply::Greeting);
        let began = Instant::now();
        if let Some(path) = console {
            std::fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"up\n").unwrap();
        }
        timeout(Duration::from_secs(30), knocker.greeted(changes.as_ref())).await.unwrap();
        began.elapsed()
    }

    /// Returns the best of several: a busy host delays some.
    async fn best_lateness(before: ProbeReply, console: Option<&std::path::Path>) -> Duration {
        let mut best = Duration::MAX;
        for _ in 0..7 {
            best = best.min(lateness(&before, console).await);
        }
        best
    }

    #[tokio::test]
    async fn a_guest_that_has_refused_is_heard_within_fifty_milliseconds() {
        let late = best_lateness(ProbeReply::Refusal, None).await;
        assert!(late < Duration::from_millis(50), "{late:?}");
    }

    #[tokio::test]
    async fn a_silent_guest_that_prints_is_heard_within_fifty_milliseconds() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let late = best_lateness(ProbeReply::Silence, Some(log.path())).await;
        assert!(late < Duration::from_millis(50), "{late:?}");
    }
}
