//! Detecting a guest's SSH server, soon after it starts to listen.
//!
//! A guest can't notify the host when it listens. QEMU's user network accepts connections even if
//! the guest does not, and sends the guest a SYN at once, after 6 s and then every 12 s, for 75 s,
//! even if the client is gone. So the interval of the probes depends on the replies:
//!
//! ```text
//! nothing yet ──a refusal──▶ the guest is up: every 20 ms ──accepted──▶ wait for the greeting
//!  at growing intervals: as long as it was silent, 200 ms to 2 s, until ten have no reply
//!  and when the guest prints on its console, twice in a row
//! ```
//!
//! A guest prints while it boots, and is silent on its console while it waits for something, so its
//! output is the best hint that its network may be up by now. A connection that is accepted late
//! still brings the greeting, so all are kept open, and ten of them, spread over QEMU's 12 s, probe
//! as often as new ones would. They have to be few, since each reaches the guest's server when that
//! starts to listen. OpenSSH refuses clients, the user's own among them, while ten have not logged
//! in (`MaxStartups`), and since 9.8 those with a penalty of more than 15 s, 1 s for each
//! connection without a login (`PerSourcePenalties`).
//!
//! Source: libslirp 4.7, `tcp_timer.h` and `socket.c`; sshd_config(5).

mod pace;

use std::fmt;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::store::RecordChanges;
use pace::{ProbeBackoff, ProbeReply};

/// The timeout of a connect. Outside of QEMU's user network, a guest that is not up does not
/// accept.
const CONNECT: Duration = Duration::from_secs(3);
/// How long a connection is kept: a little less than QEMU's user network keeps one without a reply
/// of the guest, since the end of that looks like a refusal.
const HELD: Duration = Duration::from_secs(70);
/// How long after the last refusal a port counts as one that refuses.
const CURRENT: Duration = Duration::from_secs(20);
/// The maximum length of a reply other than a greeting, in bytes.
const MOST_WORDS: usize = 120;

/// The last reply at an address without an SSH server.
#[derive(Debug)]
pub(super) struct ProbeFailure<'a> {
    address: SocketAddr,
    words: Option<&'a str>,
}

impl fmt::Display for ProbeFailure<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.words {
            Some(words) => {
                write!(
                    f,
                    "the server at {} is not an SSH server, or does not accept logins: {words:?}",
                    self.address
                )
            }
            None => write!(f, "the guest is up, but nothing in it listens at {}", self.address),
        }
    }
}

/// For how long a port has refused connections, as one task sees it and another reads it.
#[derive(Debug, Clone, Default)]
pub(super) struct RefusalClock(Arc<Mutex<Option<RefusalSpan>>>);

/// The first and the last of a series of refusals.
#[derive(Debug, Clone, Copy)]
struct RefusalSpan {
    first: Instant,
    last: Instant,
}

impl RefusalClock {
    /// Returns for how long connections have been refused; zero if they are not, or if the guest
    /// has been silent since, as one that reboots is.
    #[cfg(any(test, all(feature = "ssh", feature = "images")))]
    pub(super) fn elapsed(&self, now: Instant) -> Duration {
        let span = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        span.filter(|span| now - span.last < CURRENT).map_or(Duration::ZERO, |span| now - span.first)
    }

    fn replied(&self, reply: &ProbeReply, now: Instant) {
        let mut span = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match reply {
            ProbeReply::Refusal => {
                let current = span.filter(|span| now - span.last < CURRENT);
                *span = Some(RefusalSpan { first: current.map_or(now, |span| span.first), last: now });
            }
            ProbeReply::Greeting | ProbeReply::Words(_) => *span = None,
            ProbeReply::Silence => {}
        }
    }
}

/// Probes one address until an SSH server greets.
#[derive(Debug)]
pub(super) struct SshProbe {
    address: SocketAddr,
    refusals: RefusalClock,
    held: JoinSet<ProbeReply>,
    pace: ProbeBackoff,
    last_answer: Option<ProbeReply>,
}

impl SshProbe {
    /// Starts with the first connection attempt.
    pub(super) fn new(address: SocketAddr, refusals: RefusalClock) -> Self {
        let pace = ProbeBackoff::new(Instant::now());
        Self { address, refusals, held: JoinSet::new(), pace, last_answer: None }
    }

    /// Returns the address.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns the last reply, if it was neither a greeting nor silence.
    pub(super) fn failure(&self) -> Option<ProbeFailure<'_>> {
        let words = match self.last_answer.as_ref()? {
            ProbeReply::Words(words) => Some(words.as_str()),
            _ => None,
        };
        Some(ProbeFailure { address: self.address, words })
    }

    /// Waits until the server greets; output in the console's log, if there is one, speeds it up.
    /// Has no timeout.
    ///
    /// # Cancel safety
    /// The next call continues a dropped one: open connections are kept.
    pub(super) async fn greeted(&mut self, console: Option<&RecordChanges>) {
        loop {
            let next = self.pace.due(self.held.len());
            tokio::select! {
                Some(answer) = self.held.join_next() => {
                    if self.take_reply(answer.unwrap_or(ProbeReply::Silence)) {
                        return;
                    }
                }
                () = due(next) => {
                    self.held.spawn(probe(self.address));
                    self.pace.probed(Instant::now());
                }
                () = printed(console), if !self.pace.is_up() => self.pace.printed(Instant::now()),
            }
        }
    }

    /// Processes a reply, and returns whether it was the greeting.
    fn take_reply(&mut self, answer: ProbeReply) -> bool {
        self.pace.replied(&answer, Instant::now());
        self.refusals.replied(&answer, Instant::now());
        match answer {
            ProbeReply::Greeting => return true,
            ProbeReply::Silence => {}
            ProbeReply::Refusal | ProbeReply::Words(_) => self.last_answer = Some(answer),
        }
        false
    }
}

/// Waits until a probe is due, if there is to be one.
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

async fn probe(address: SocketAddr) -> ProbeReply {
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

/// Connects, and returns the start of the server's greeting.
///
/// Source: RFC 4253, section 4.2: lines may come before the one that starts with `SSH-`, but
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

    /// A guest that is silent, refuses or greets, as a test sets it.
    struct FakeGuest {
        address: SocketAddr,
        mood: Arc<Mutex<ProbeReply>>,
        probes: Arc<AtomicU32>,
    }

    impl FakeGuest {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let (mood, probes) = (Arc::new(Mutex::new(ProbeReply::Silence)), Arc::new(AtomicU32::new(0)));
            let (feels, counts) = (Arc::clone(&mood), Arc::clone(&probes));
            std::thread::spawn(move || {
                let mut held = Vec::new();
                for mut stream in listener.incoming().flatten() {
                    counts.fetch_add(1, Ordering::SeqCst);
                    let mood = feels.lock().unwrap().clone();
                    let words = match mood {
                        ProbeReply::Silence => {
                            held.push(stream);
                            continue;
                        }
                        ProbeReply::Refusal => continue,
                        ProbeReply::Greeting => "SSH-2.0-test\r\n".to_owned(),
                        ProbeReply::Words(words) => words,
                    };
                    // A probe reads as much as it needs, and leaves: the rest can't be written.
                    let _ = stream.write_all(words.as_bytes());
                }
            });
            Self { address, mood, probes }
        }

        fn turns(&self, mood: ProbeReply) {
            *self.mood.lock().unwrap() = mood;
        }
    }

    async fn greeted_within(probe: &mut SshProbe, millis: u64) -> bool {
        timeout(Duration::from_millis(millis), probe.greeted(None)).await.is_ok()
    }

    #[tokio::test]
    async fn a_greeting_after_refusals_is_detected_at_once() {
        let guest = FakeGuest::new();
        guest.turns(ProbeReply::Refusal);
        let mut probe = SshProbe::new(guest.address, RefusalClock::default());
        assert!(!greeted_within(&mut probe, 500).await);
        assert!(guest.probes.load(Ordering::SeqCst) >= 5, "a guest that is up is probed often");
        guest.turns(ProbeReply::Greeting);
        let began = Instant::now();
        assert!(greeted_within(&mut probe, 30_000).await);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[test]
    fn a_port_refuses_from_the_first_refusal_on_until_it_greets_or_is_silent() {
        let (clock, began) = (RefusalClock::default(), Instant::now());
        let at = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(clock.elapsed(at(0)), Duration::ZERO);
        for seconds in [5, 20, 39] {
            clock.replied(&ProbeReply::Refusal, at(seconds));
            clock.replied(&ProbeReply::Silence, at(seconds));
        }
        assert_eq!(clock.elapsed(at(40)), Duration::from_secs(35));
        assert_eq!(clock.elapsed(at(60)), Duration::ZERO, "it has been silent since");
        clock.replied(&ProbeReply::Refusal, at(61));
        assert_eq!(clock.elapsed(at(62)), Duration::from_secs(1), "it reboots");
        clock.replied(&ProbeReply::Greeting, at(63));
        assert_eq!(clock.elapsed(at(64)), Duration::ZERO);
    }

    #[tokio::test]
    async fn a_silent_guest_is_probed_at_growing_intervals() {
        let guest = FakeGuest::new();
        let mut probe = SshProbe::new(guest.address, RefusalClock::default());
        assert!(!greeted_within(&mut probe, 2000).await);
        let probes = guest.probes.load(Ordering::SeqCst);
        assert!((4..=14).contains(&probes), "{probes} probes in two seconds");
        guest.turns(ProbeReply::Greeting);
        assert!(greeted_within(&mut probe, 30_000).await);
    }

    #[tokio::test]
    async fn a_guest_that_falls_silent_after_refusals_is_not_probed_again() {
        let guest = FakeGuest::new();
        guest.turns(ProbeReply::Refusal);
        let mut probe = SshProbe::new(guest.address, RefusalClock::default());
        assert!(!greeted_within(&mut probe, 200).await);
        guest.turns(ProbeReply::Silence);
        assert!(!greeted_within(&mut probe, 100).await);
        let probes = guest.probes.load(Ordering::SeqCst);
        assert!(!greeted_within(&mut probe, 1000).await);
        assert!(guest.probes.load(Ordering::SeqCst) <= probes + 1, "probed again and again");
    }

    #[tokio::test]
    async fn the_reply_of_another_server_is_kept_and_probed_at_growing_intervals() {
        let guest = FakeGuest::new();
        guest.turns(ProbeReply::Words("Not allowed\u{1b}[31m at this time\r\n".into()));
        let mut probe = SshProbe::new(guest.address, RefusalClock::default());
        assert!(!greeted_within(&mut probe, 2000).await);
        let probes = guest.probes.load(Ordering::SeqCst);
        assert!((3..=10).contains(&probes), "{probes} probes in two seconds");
        let failure = probe.failure().unwrap().to_string();
        assert!(failure.ends_with("\"Not allowed[31m at this time\""), "{failure}");
        guest.turns(ProbeReply::Words("x".repeat(1 << 20)));
        assert!(!greeted_within(&mut probe, 5000).await);
        assert!(probe.failure().unwrap().to_string().len() < 250);
        guest.turns(ProbeReply::Greeting);
        assert!(greeted_within(&mut probe, 30_000).await);
    }

    #[tokio::test]
    async fn a_refusal_is_reported_and_silence_is_not() {
        let guest = FakeGuest::new();
        let mut probe = SshProbe::new(guest.address, RefusalClock::default());
        assert!(!greeted_within(&mut probe, 300).await);
        assert!(probe.failure().is_none());
        guest.turns(ProbeReply::Refusal);
        assert!(!greeted_within(&mut probe, 3000).await);
        let failure = probe.failure().unwrap().to_string();
        assert!(failure.contains("nothing in it listens at 127.0.0.1:"), "{failure}");
    }

    /// Measures the delay between a guest's first greeting and its detection.
    async fn lateness(before: &ProbeReply, console: Option<&std::path::Path>) -> Duration {
        let guest = FakeGuest::new();
        guest.turns(before.clone());
        let changes = console.map(|path| RecordChanges::of_log(path).unwrap());
        let mut probe = SshProbe::new(guest.address, RefusalClock::default());
        // Long enough for the interval of the probes to have grown.
        let waited = timeout(Duration::from_millis(1500), probe.greeted(changes.as_ref())).await;
        assert!(waited.is_err());
        guest.turns(ProbeReply::Greeting);
        let began = Instant::now();
        if let Some(path) = console {
            std::fs::OpenOptions::new().append(true).open(path).unwrap().write_all(b"up\n").unwrap();
        }
        timeout(Duration::from_secs(30), probe.greeted(changes.as_ref())).await.unwrap();
        began.elapsed()
    }

    /// Returns the shortest delay of several: a busy host adds some.
    async fn best_lateness(before: ProbeReply, console: Option<&std::path::Path>) -> Duration {
        let mut best = Duration::MAX;
        for _ in 0..7 {
            best = best.min(lateness(&before, console).await);
        }
        best
    }

    #[tokio::test]
    async fn a_greeting_after_refusals_is_detected_within_fifty_milliseconds() {
        let late = best_lateness(ProbeReply::Refusal, None).await;
        assert!(late < Duration::from_millis(50), "{late:?}");
    }

    #[tokio::test]
    async fn a_greeting_after_console_output_is_detected_within_fifty_milliseconds() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let late = best_lateness(ProbeReply::Silence, Some(log.path())).await;
        assert!(late < Duration::from_millis(50), "{late:?}");
    }
}
