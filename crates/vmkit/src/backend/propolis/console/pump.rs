//! One stream of a console's words, over as many connections as it takes.

use std::io;
use std::time::Duration;

use futures_util::SinkExt;
use hyper::body::Bytes;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_tungstenite::tungstenite::Message;

use super::super::client::PropolisClient;
use super::bell::{InputSink, OutputSignal, SignalEnd};
use super::event::{ConsoleEnd, ConsoleEvent};
use super::history::no_vm;
use super::tape::{ConsoleTape, MOST_FRAMES, TapeRead};
use crate::error::{Error, Peer, Result};

/// How long a lost connection is tried again.
const RECONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The shortest and the longest pause between two such tries.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long the farewell of a VM that has ended may take.
const FAREWELL_LIMIT: Duration = Duration::from_secs(1);

/// What a try to connect led to.
enum ConnectAttempt {
    Live(OutputSignal),
    /// Nothing runs there any more.
    NoVm,
}

pub(crate) struct ConsolePump<T> {
    tape: ConsoleTape<T>,
    typed: OwnedReadHalf,
    /// The first connection.
    bell: Option<OutputSignal>,
    /// Whether the VM was said to be here from now on, and has not been seen here yet.
    is_coming: bool,
    /// Until when, and after which pause, a connection is tried again; nothing since one was good
    /// for something.
    trouble: Option<(Instant, Duration)>,
}

impl<T: FnMut(ConsoleEvent) + Send> ConsolePump<T> {
    pub(crate) fn new(client: PropolisClient, next: u64, stream: UnixStream, tell: T) -> Self {
        let (typed, reader) = stream.into_split();
        let tape = ConsoleTape::new(client, next, reader, tell);
        Self { tape, typed, bell: None, is_coming: false, trouble: None }
    }

    /// Connects for the first time.
    ///
    /// # Errors
    /// `InvalidState` where no VM is active there; those of a server that can't be reached.
    pub(crate) async fn attach(&mut self) -> Result<()> {
        let heard = self.tape.begin().await;
        match self.connect(heard).await? {
            ConnectAttempt::Live(bell) => self.bell = Some(bell),
            ConnectAttempt::NoVm => return Err(no_vm(&self.tape.client)),
        }
        Ok(())
    }

    /// Carries both directions until one of both ends.
    pub(crate) async fn run(mut self) -> Result<ConsoleEnd> {
        if self.bell.is_none() {
            self.attach().await?;
        }
        let ending = self.carry_on().await;
        if matches!(ending, Ok(ConsoleEnd::Left)) || self.tape.last_words().await? {
            return ending;
        }
        Ok(ConsoleEnd::Left)
    }

    async fn carry_on(&mut self) -> Result<ConsoleEnd> {
        // How far it had come when the connection was last lost: what is gained while it is made
        // again counts, too.
        let mut had = self.tape.next;
        loop {
            let bell = match self.bell.take() {
                Some(bell) => bell,
                None => match self.reconnect().await? {
                    Some(bell) => bell,
                    None => return Ok(ConsoleEnd::Stopped),
                },
            };
            let began = Instant::now();
            let silence = self.carry(bell).await?;
            if self.tape.next > had || began.elapsed() > RECONNECT_LIMIT {
                self.trouble = None;
            }
            had = self.tape.next;
            match silence {
                None => return Ok(ConsoleEnd::Left),
                Some(SignalEnd::Stopped) => return Ok(ConsoleEnd::Stopped),
                Some(SignalEnd::Moved(server)) => {
                    self.tape.client.address = server;
                    self.is_coming = true;
                    (self.tape.tell)(ConsoleEvent::Moved { server });
                }
                Some(SignalEnd::Lost) => (self.tape.tell)(ConsoleEvent::Lost),
            }
        }
    }

    /// Connects once if the server has the VM: a server without one accepts the connection and
    /// drops it.
    async fn connect(&mut self, heard: TapeRead) -> Result<ConnectAttempt> {
        match heard {
            TapeRead::Failed(problem) => Err(problem),
            TapeRead::NoVm => Ok(ConnectAttempt::NoVm),
            TapeRead::All | TapeRead::Left => {
                OutputSignal::hang(&self.tape.client).await.map(ConnectAttempt::Live)
            }
        }
    }

    async fn try_again(&mut self) -> Result<ConnectAttempt> {
        let heard = self.tape.ask().await;
        self.connect(heard).await
    }

    /// Tries to connect again until it succeeds; nothing where the VM has ended meanwhile.
    ///
    /// A server that is coming back has no way to say so: there is nothing to wait for but time.
    /// One that takes every connection and drops it is waited for no longer than one that takes
    /// none.
    async fn reconnect(&mut self) -> Result<Option<OutputSignal>> {
        let broken = |client: &PropolisClient, how: &str| {
            Error::protocol(Peer::Propolis, format!("{}: {how}", client.address))
        };
        loop {
            let (deadline, pause) = match self.trouble {
                None => (Instant::now() + RECONNECT_LIMIT, Duration::ZERO),
                Some((deadline, pause)) => (deadline, (pause * 2).clamp(BACK_OFF.0, BACK_OFF.1)),
            };
            self.trouble = Some((deadline, pause));
            let problem = match timeout_at(deadline, sleep(pause)).await {
                Ok(()) => match self.try_again().await {
                    Ok(ConnectAttempt::Live(bell)) => {
                        self.is_coming = false;
                        (self.tape.tell)(ConsoleEvent::Restored);
                        return Ok(Some(bell));
                    }
                    // The one who sends it tells of the move before the one who gets it has it.
                    Ok(ConnectAttempt::NoVm) if self.is_coming => {
                        broken(&self.tape.client, "the VM is being migrated there, and has not arrived")
                    }
                    Ok(ConnectAttempt::NoVm) => return Ok(None),
                    Err(problem) => problem,
                },
                Err(_) => {
                    broken(&self.tape.client, "it accepts each connection to its console and closes it")
                }
            };
            if Instant::now() + pause >= deadline {
                return Err(problem);
            }
            tracing::debug!(error = %problem, "the console is tried again");
        }
    }

    /// Carries both directions over one connection until that ends; returns nothing if the reader
    /// has left.
    async fn carry(&mut self, bell: OutputSignal) -> Result<Option<SignalEnd>> {
        let (rings, mut rung) = mpsc::channel(MOST_FRAMES);
        let (keys, ringing) = bell.ring(rings);
        tokio::pin!(ringing);
        let typing = type_in(&self.typed, keys);
        let talking = async {
            let following = self.tape.follow(&mut rung);
            tokio::pin!(following);
            let (heard, silence) = tokio::select! {
                silence = &mut ringing => (following.await?, Some(silence)),
                heard = &mut following => (heard?, None),
            };
            Ok::<_, Error>(match heard {
                TapeRead::Left => None,
                TapeRead::All => Some(silence.unwrap_or(SignalEnd::Lost)),
                TapeRead::NoVm if silence.is_none() => {
                    // What came last is on its way still, and so is the word of a VM that goes on
                    // elsewhere.
                    Some(timeout(FAREWELL_LIMIT, ringing.as_mut()).await.unwrap_or(SignalEnd::Stopped))
                }
                TapeRead::NoVm => silence,
                TapeRead::Failed(problem) => {
                    tracing::debug!(error = %problem, "the console's server can't be queried");
                    Some(silence.unwrap_or(SignalEnd::Lost))
                }
            })
        };
        let silence = tokio::select! {
            silence = talking => silence?,
            () = typing => return Ok(None),
        };
        self.tape.keep_all(&mut rung);
        Ok(silence)
    }
}

/// Sends what is typed until the writer has left.
async fn type_in(typed: &OwnedReadHalf, mut keys: InputSink) {
    let mut chunk = vec![0; 4096];
    loop {
        if typed.readable().await.is_err() {
            return;
        }
        match typed.try_read(&mut chunk) {
            Ok(0) => return,
            Ok(bytes) => {
                // A connection that is lost shows itself to the other direction.
                if keys.send(Message::binary(Bytes::copy_from_slice(&chunk[..bytes]))).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
