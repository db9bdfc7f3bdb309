//! Finds out when a guest's SSH server speaks, soon after it does.
//!
//! A guest has no way to tell the host that it listens. QEMU's user network accepts at once for a guest that is not there,
//! sends the guest one SYN, and the next after 6 s; and each connection that the guest has not answered stays in QEMU for 75 s,
//! even if nobody holds it any more. So how often one knocks depends on what was heard:
//!
//! ```text
//! nothing yet ──a refusal──▶ the guest is up: every 20 ms ──accepted──▶ wait for the greeting
//!  ever more rarely: after a quarter of the silence, 100 ms to 2 s
//! ```
//!
//! A connection that is accepted late still brings the greeting, so those before it are held meanwhile. They stay few, since
//! OpenSSH turns away whom it has seen come and go too often (`MaxStartups`, `PerSourcePenalties`).
//!
//! Source: libslirp 4.7, `tcp_timer.h` and `socket.c`; sshd_config(5).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

/// After how long a guest that refuses is asked again.
const REFUSED: Duration = Duration::from_millis(20);
/// The shortest and the longest pause after which a silent guest is asked again.
const SILENT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How long one connection is held. A guest without KVM on a busy host needs seconds to say a word.
const HELD: Duration = Duration::from_secs(10);

/// What a knock was answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// An SSH server's greeting.
    Greeting,
    /// The guest is up, and nobody listens.
    Refusal,
    /// Nothing that tells anything.
    Silence,
}

/// Knocks at one address until an SSH server greets.
#[derive(Debug)]
pub(super) struct Knocker {
    address: SocketAddr,
    held: JoinSet<Answer>,
    silent_since: Instant,
    next: Instant,
    /// It has refused: what is silent after that has been accepted.
    is_up: bool,
}

impl Knocker {
    /// Begins with the first knock.
    pub(super) fn new(address: SocketAddr) -> Self {
        let now = Instant::now();
        Self { address, held: JoinSet::new(), silent_since: now, next: now, is_up: false }
    }

    /// Answers where it knocks.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until the server greets. It has no end of its own.
    ///
    /// # Cancel safety
    /// A dropped call goes on in the next: what is held stays held.
    pub(super) async fn greeted(&mut self) {
        loop {
            tokio::select! {
                Some(answer) = self.held.join_next() => {
                    match answer {
                        Ok(Answer::Greeting) => return,
                        Ok(Answer::Refusal) => self.refused(Instant::now()),
                        Ok(Answer::Silence) | Err(_) => {}
                    }
                }
                () = sleep_until(self.next) => {
                    self.held.spawn(knock(self.address));
                    self.next = Instant::now() + self.pause(Instant::now());
                }
            }
        }
    }

    fn refused(&mut self, now: Instant) {
        self.is_up = true;
        self.silent_since = now;
        self.next = now + REFUSED;
    }

    fn pause(&self, now: Instant) -> Duration {
        match self.is_up {
            true => SILENT.1,
            false => (now.saturating_duration_since(self.silent_since) / 4).clamp(SILENT.0, SILENT.1),
        }
    }
}

async fn knock(address: SocketAddr) -> Answer {
    match timeout(HELD, greeting(address)).await {
        Ok(Ok(true)) => Answer::Greeting,
        Ok(Ok(false)) => Answer::Refusal,
        Ok(Err(error)) => match error.kind() {
            io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => Answer::Refusal,
            _ => Answer::Silence,
        },
        Err(_) => Answer::Silence,
    }
}

/// Connects, and answers whether an SSH server is the one who speaks first.
///
/// Source: RFC 4253, section 4.2: lines may come before the one that begins with `SSH-`, but servers send none.
async fn greeting(address: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    let mut greeting = [0; 4];
    stream.read_exact(&mut greeting).await?;
    Ok(&greeting == b"SSH-")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, Mutex};

    /// A guest that is silent, refuses, and greets, each when it is told to.
    struct Guest {
        address: SocketAddr,
        mood: Arc<Mutex<Answer>>,
        knocks: Arc<AtomicU32>,
    }

    impl Guest {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = listener.local_addr().unwrap();
            let (mood, knocks) = (Arc::new(Mutex::new(Answer::Silence)), Arc::new(AtomicU32::new(0)));
            let (feels, counts) = (Arc::clone(&mood), Arc::clone(&knocks));
            std::thread::spawn(move || {
                let mut held = Vec::new();
                for mut stream in listener.incoming().flatten() {
                    counts.fetch_add(1, Ordering::SeqCst);
                    let mood = *feels.lock().unwrap();
                    match mood {
                        Answer::Silence => held.push(stream),
                        Answer::Refusal => drop(stream),
                        Answer::Greeting => stream.write_all(b"SSH-2.0-test\r\n").unwrap(),
                    }
                }
            });
            Self { address, mood, knocks }
        }

        fn turns(&self, mood: Answer) {
            *self.mood.lock().unwrap() = mood;
        }
    }

    async fn knocked(knocker: &mut Knocker, millis: u64) -> bool {
        timeout(Duration::from_millis(millis), knocker.greeted()).await.is_ok()
    }

    #[tokio::test]
    async fn a_greeting_is_heard_at_once_by_one_who_is_refused() {
        let guest = Guest::new();
        guest.turns(Answer::Refusal);
        let mut knocker = Knocker::new(guest.address);
        assert!(!knocked(&mut knocker, 500).await);
        assert!(guest.knocks.load(Ordering::SeqCst) >= 5, "it knocks often at a guest that is up");
        guest.turns(Answer::Greeting);
        let began = Instant::now();
        assert!(knocked(&mut knocker, 30_000).await);
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_silent_guest_is_knocked_at_ever_more_rarely() {
        let guest = Guest::new();
        let mut knocker = Knocker::new(guest.address);
        assert!(!knocked(&mut knocker, 2000).await);
        let knocks = guest.knocks.load(Ordering::SeqCst);
        assert!((4..=14).contains(&knocks), "{knocks} knocks in two seconds");
        guest.turns(Answer::Greeting);
        assert!(knocked(&mut knocker, 30_000).await);
    }

    #[tokio::test]
    async fn a_guest_that_has_refused_and_is_silent_is_left_to_find_its_words() {
        let guest = Guest::new();
        guest.turns(Answer::Refusal);
        let mut knocker = Knocker::new(guest.address);
        assert!(!knocked(&mut knocker, 200).await);
        guest.turns(Answer::Silence);
        assert!(!knocked(&mut knocker, 100).await);
        let knocks = guest.knocks.load(Ordering::SeqCst);
        assert!(!knocked(&mut knocker, 1000).await);
        assert!(guest.knocks.load(Ordering::SeqCst) <= knocks + 1, "it knocks again and again");
    }
}
