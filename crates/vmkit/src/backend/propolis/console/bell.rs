//! A WebSocket at a console, of which one thing matters: that something came.
//!
//! What comes there may come twice, and may not come at all (see the module
//! [`serial`](super::serial)), so the words themselves are taken from the server's history, and a
//! frame only rings for them.

use std::net::SocketAddr;

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use hyper::body::Bytes;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_tungstenite::tungstenite::client::ClientRequestBuilder;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::super::client::PropolisClient;
use super::address::ControlMessage;
use super::history::{ANSWER_LIMIT, API_VERSION};
use crate::error::{Error, Peer, Result};

type ConsoleSocket = WebSocketStream<TcpStream>;

/// The direction in which keys are sent.
pub(super) type InputSink = SplitSink<ConsoleSocket, Message>;

/// A connection that rings when the guest has said something.
pub(super) struct OutputSignal {
    pub(super) keys: InputSink,
    frames: SplitStream<ConsoleSocket>,
}

/// Why a bell rings no more.
pub(super) enum SignalEnd {
    /// The VM has stopped.
    Stopped,
    /// The connection broke, or was closed without a word.
    Lost,
    /// The VM goes on elsewhere.
    Moved(SocketAddr),
}

impl OutputSignal {
    /// Connects to a console. A server without an active VM accepts the connection and drops it.
    pub(super) async fn hang(client: &PropolisClient) -> Result<Self> {
        let url = client.console_url();
        let uri = url.parse().map_err(|_| Error::invalid("console", url, "this is not a URL"))?;
        let request = ClientRequestBuilder::new(uri).with_header("api-version", API_VERSION);
        let opening = async {
            let stream = TcpStream::connect(client.address).await.map_err(tungstenite::Error::Io)?;
            stream.set_nodelay(true).map_err(tungstenite::Error::Io)?;
            let (mut socket, _) = client_async(request, stream).await?;
            // The server reads this once it has the client on its list. The pong rings for what was
            // said until then.
            socket.send(Message::Ping(Bytes::new())).await?;
            Ok(socket)
        };
        let broken = |how| Error::protocol(Peer::Propolis, format!("{}: {how}", client.address));
        match timeout_at(Instant::now() + ANSWER_LIMIT, opening).await {
            Ok(Ok(socket)) => {
                let (keys, frames) = socket.split();
                Ok(Self { keys, frames })
            }
            Ok(Err(tungstenite::Error::Io(source))) => {
                Err(broken("its console can't be reached").with_source(source))
            }
            Ok(Err(_)) => Err(broken("it does not serve a console")),
            Err(_) => {
                let awaited = format!("the console of the Propolis server at {}", client.address);
                Err(Error::timed_out(awaited, ANSWER_LIMIT))
            }
        }
    }

    /// Returns the direction of the keys, and a future that rings until the connection ends.
    ///
    /// It rings once at the beginning. Frames go along as long as there is room; it never waits for
    /// room, since a client that does not read stalls the server.
    pub(super) fn ring(
        self,
        rings: mpsc::Sender<Bytes>,
    ) -> (InputSink, impl Future<Output = SignalEnd> + Send) {
        let Self { keys, mut frames } = self;
        // One that is full rings already.
        let ring = move |frame| drop(rings.try_send(frame));
        ring(Bytes::new());
        let ringing = async move {
            // Its end is the end of the channel.
            let ring = ring;
            loop {
                match frames.next().await {
                    Some(Ok(Message::Binary(frame))) => ring(frame),
                    Some(Ok(Message::Pong(_))) => ring(Bytes::new()),
                    Some(Ok(Message::Text(text))) => {
                        if let Some(ControlMessage::Migrating { destination }) = ControlMessage::read(&text) {
                            return SignalEnd::Moved(destination);
                        }
                    }
                    Some(Ok(Message::Close(Some(frame)))) if frame.code == CloseCode::Away => {
                        return SignalEnd::Stopped;
                    }
                    Some(Ok(Message::Ping(_) | Message::Frame(_))) => {}
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return SignalEnd::Lost,
                }
            }
        };
        (keys, ringing)
    }
}
