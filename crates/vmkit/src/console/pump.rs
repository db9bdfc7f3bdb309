//! One stream of a console's words, over as many connections as it takes.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_tungstenite::tungstenite::client::ClientRequestBuilder;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::address::{Control, Since};
use super::serial::{ANSWER_LIMIT, API_VERSION, Ending, Event, Page, no_vm, pages};
use crate::backend::propolis::client::{Client, PEER};
use crate::error::{Error, Result};

/// How much waits for a slow reader before the connection is given up; less than the server keeps, so that nothing is lost
/// if the reader catches up.
const SPOOL_BYTES: usize = 512 << 10;
/// How long a lost connection is tried anew.
const RECONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The shortest and the longest pause between two such tries.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

type Socket = WebSocketStream<TcpStream>;

/// What became of a connection.
enum Turn {
    /// It is over for good.
    Ended(Ending),
    /// It broke, or was closed without a word.
    Lost,
    /// It was given up, since the reader is too slow.
    Full,
    /// The VM goes on elsewhere.
    Moved(SocketAddr),
}

/// What a try to connect led to.
enum Tried {
    Live(Box<Socket>),
    /// Nothing runs there any more.
    NoVm,
}

pub(super) struct Pump<T> {
    /// The server that the VM is at now.
    client: Client,
    /// The number of the first byte that was not received yet.
    next: u64,
    /// What was received, and not taken by the reader yet.
    spool: VecDeque<u8>,
    reader: OwnedWriteHalf,
    typed: OwnedReadHalf,
    tell: T,
    /// Whether the VM was said to be here from now on, and has not been seen here yet.
    is_coming: bool,
    /// Until when, and after which pause, a connection is tried anew; nothing since one was good for something.
    trouble: Option<(Instant, Duration)>,
}

impl<T: FnMut(Event) + Send> Pump<T> {
    pub(super) fn new(client: Client, next: u64, stream: UnixStream, tell: T) -> Self {
        let (typed, reader) = stream.into_split();
        Self { client, next, spool: VecDeque::new(), reader, typed, tell, is_coming: false, trouble: None }
    }

    pub(super) async fn run(mut self) -> Result<Ending> {
        let mut socket = match self.connect(Instant::now() + ANSWER_LIMIT).await? {
            Tried::Live(socket) => socket,
            Tried::NoVm => return Err(no_vm(&self.client)),
        };
        // How far it had come when the connection was last lost: what is gained while it is made anew counts, too.
        let mut had = self.next;
        loop {
            let began = Instant::now();
            let turn = self.carry(*socket).await?;
            if self.next > had || began.elapsed() > RECONNECT_LIMIT {
                self.trouble = None;
            }
            had = self.next;
            match turn {
                Turn::Ended(ending) => return self.drained(ending).await,
                Turn::Moved(server) => {
                    self.client.address = server;
                    self.is_coming = true;
                    (self.tell)(Event::Moved { server });
                }
                Turn::Full => {
                    if !self.caught_up().await? {
                        return Ok(Ending::Left);
                    }
                }
                Turn::Lost => (self.tell)(Event::Lost),
            }
            socket = match self.reconnect().await? {
                Some(socket) => socket,
                None => return self.drained(Ending::Stopped).await,
            };
        }
    }

    /// Connects once, from the next byte on.
    ///
    /// A server without an active VM takes the connection and drops it, so its word about the past is asked for first; the
    /// bytes that are missing by now come with it.
    async fn connect(&mut self, deadline: Instant) -> Result<Tried> {
        let client = self.client;
        if !pages(&client, Since::Start(self.next), |page| self.take(page)).await? {
            return Ok(Tried::NoVm);
        }
        let url = format!("{}?from_start={}", client.console_url(), self.next);
        let uri = url.parse().map_err(|_| Error::invalid("console", url, "this is no URL"))?;
        let request = ClientRequestBuilder::new(uri).with_header("api-version", API_VERSION);
        let opening = async {
            let stream = TcpStream::connect(client.address).await.map_err(tungstenite::Error::Io)?;
            stream.set_nodelay(true).map_err(tungstenite::Error::Io)?;
            client_async(request, stream).await
        };
        match timeout_at(deadline, opening).await {
            Ok(Ok((socket, _))) => Ok(Tried::Live(Box::new(socket))),
            Ok(Err(tungstenite::Error::Io(source))) => {
                Err(broken(&client, "its console can't be reached", Some(source)))
            }
            Ok(Err(_)) => Err(broken(&client, "it does not serve a console", None)),
            Err(_) => Err(slow(&client)),
        }
    }

    /// Takes what was said since, and tells of what nobody has any more.
    fn take(&mut self, page: Page) {
        let first = page.end.saturating_sub(page.bytes.len() as u64);
        if first > self.next && !page.bytes.is_empty() {
            (self.tell)(Event::Missed { bytes: first - self.next });
        }
        // Of a page that begins earlier only the rest is new.
        let known = usize::try_from(self.next.saturating_sub(first)).unwrap_or(usize::MAX);
        self.spool.extend(page.bytes.into_iter().skip(known));
        self.next = self.next.max(page.end);
    }

    /// Tries to connect again until it succeeds; nothing where the VM has ended meanwhile.
    ///
    /// A server that is coming back has no way to say so: there is nothing to wait for but time. One that takes every
    /// connection and drops it is waited for no longer than one that takes none.
    async fn reconnect(&mut self) -> Result<Option<Box<Socket>>> {
        loop {
            let (deadline, pause) = match self.trouble {
                None => (Instant::now() + RECONNECT_LIMIT, Duration::ZERO),
                Some((deadline, pause)) => (deadline, (pause * 2).clamp(BACK_OFF.0, BACK_OFF.1)),
            };
            self.trouble = Some((deadline, pause));
            let problem = match timeout_at(deadline, sleep(pause)).await {
                Ok(()) => match self.connect(deadline).await {
                    Ok(Tried::Live(socket)) => {
                        self.is_coming = false;
                        (self.tell)(Event::Restored);
                        return Ok(Some(socket));
                    }
                    // The one who sends it tells of the move before the one who gets it has it.
                    Ok(Tried::NoVm) if self.is_coming => {
                        broken(&self.client, "the VM moves there, and has not come", None)
                    }
                    Ok(Tried::NoVm) => return Ok(None),
                    Err(problem) => problem,
                },
                Err(_) => broken(&self.client, "it takes every connection to its console and drops it", None),
            };
            if Instant::now() + pause >= deadline {
                return Err(problem);
            }
            tracing::debug!(error = %problem, "the console is tried again");
        }
    }

    /// Carries both directions over one connection until that ends.
    async fn carry(&mut self, socket: Socket) -> Result<Turn> {
        let (mut to_guest, mut from_guest) = socket.split();
        let typed = &self.typed;
        let typing = async {
            let mut keys = vec![0; 4096];
            loop {
                if typed.readable().await.is_err() {
                    return;
                }
                match typed.try_read(&mut keys) {
                    Ok(0) => return,
                    Ok(bytes) => {
                        // A connection that is lost shows itself to the other direction.
                        if to_guest.send(Message::binary(keys[..bytes].to_vec())).await.is_err() {
                            std::future::pending::<()>().await;
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return,
                }
            }
        };
        let (spool, next, reader) = (&mut self.spool, &mut self.next, &self.reader);
        let saying = async {
            loop {
                if spool.len() >= SPOOL_BYTES {
                    return Ok(Turn::Full);
                }
                tokio::select! {
                    message = from_guest.next() => match understood(message) {
                        Said::Words(words) => {
                            *next += words.len() as u64;
                            spool.extend(words);
                        }
                        Said::Nothing => {}
                        Said::Last(turn) => return Ok(turn),
                    },
                    room = reader.writable(), if !spool.is_empty() => {
                        if room.is_err() || !hand_over(spool, reader)? {
                            return Ok(Turn::Ended(Ending::Left));
                        }
                    }
                }
            }
        };
        tokio::select! {
            turn = saying => turn,
            () = typing => Ok(Turn::Ended(Ending::Left)),
        }
    }

    /// Waits until the reader has taken all that is spooled; false where it has left.
    async fn caught_up(&mut self) -> Result<bool> {
        while !self.spool.is_empty() {
            if self.reader.writable().await.is_err() || !hand_over(&mut self.spool, &self.reader)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hands over what is left to say.
    async fn drained(mut self, ending: Ending) -> Result<Ending> {
        Ok(if self.caught_up().await? { ending } else { Ending::Left })
    }
}

/// What a message means.
enum Said {
    Words(Vec<u8>),
    Nothing,
    Last(Turn),
}

fn understood(message: Option<tungstenite::Result<Message>>) -> Said {
    match message {
        Some(Ok(Message::Binary(words))) => Said::Words(words.to_vec()),
        Some(Ok(Message::Text(text))) => match Control::read(&text) {
            Some(Control::Migrating { destination }) => Said::Last(Turn::Moved(destination)),
            None => Said::Nothing,
        },
        Some(Ok(Message::Close(Some(frame)))) if frame.code == CloseCode::Away => {
            Said::Last(Turn::Ended(Ending::Stopped))
        }
        Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => Said::Nothing,
        Some(Ok(Message::Close(_)) | Err(_)) | None => Said::Last(Turn::Lost),
    }
}

/// Gives the reader as much as it takes now; false where it has left.
fn hand_over(spool: &mut VecDeque<u8>, reader: &OwnedWriteHalf) -> Result<bool> {
    let (front, _) = spool.as_slices();
    match reader.try_write(front) {
        Ok(bytes) => {
            spool.drain(..bytes);
            Ok(true)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            Ok(false)
        }
        Err(error) => Err(Error::io("write to", "the console's reader")(error)),
    }
}

fn broken(client: &Client, how: &str, source: Option<io::Error>) -> Error {
    Error::Protocol { peer: PEER, problem: format!("{}: {how}", client.address), source }
}

fn slow(client: &Client) -> Error {
    let awaited = format!("the console of the Propolis server at {}", client.address);
    Error::TimedOut { awaited, after: ANSWER_LIMIT, console: String::new() }
}
