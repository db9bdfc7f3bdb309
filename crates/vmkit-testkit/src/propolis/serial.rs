//! The guest's first serial port, its history, and the WebSockets that read and write it.
//!
//! ```text
//! attach ─▶ history ─▶ on the list ─▶ each chunk that is read while on the list
//! ```
//!
//! One task serves the port, one step at a time, and starts each step from scratch. Its oddities
//! are the real server's, and clients must be tested against them:
//! - no chunk is read before all clients have the last one: a client that does not read stalls the
//!   others and the guest (Propolis issues 158, 391, 409, 540);
//! - meanwhile each step sends that chunk again to the clients that do read;
//! - a chunk that was read while the list was empty is sent to the first client on it, which has it
//!   from the history already;
//! - what is read between sending a client the history and putting it on the list is never sent to
//!   that client;
//! - what the port still holds when the VM stops is lost, and a client that does not read keeps the
//!   others from getting their close frame.
//!
//! Source: propolis-server, `instance_serial` and `serial/mod.rs`; observed with its code run on
//! Linux.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use dropshot::WebsocketConnectionRaw;
use futures_util::stream::{SplitSink, SplitStream, iter};
use futures_util::{FutureExt, SinkExt, StreamExt};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{self, Message};

use super::behaviour::Gate;
use super::gates::MachineGates;
use super::history::{DEFAULT_BYTES, HistoryOffset, SerialHistory};

type ClientSocket = WebSocketStream<WebsocketConnectionRaw>;
type FrameSink = SplitSink<ClientSocket, Message>;
type FrameStream = SplitStream<ClientSocket>;

/// The most that is sent at once of live output, in bytes.
const LIVE_BYTES: usize = 1024;

/// How many unread bytes a port holds.
pub(super) const UART_BYTES: usize = 1024;

/// How many clients are served at a time.
const AT_A_TIME: usize = 4;

/// A handle to the port for the rest of the server.
#[derive(Debug, Clone)]
pub(super) struct SerialHandle {
    history: Arc<Mutex<SerialHistory>>,
    gates: MachineGates,
    clients: mpsc::Sender<Box<ClientSocket>>,
    moves: mpsc::UnboundedSender<SocketAddr>,
}

/// Ends the port's task on request, after a close frame to every client.
#[derive(Debug)]
pub(super) struct SerialTask {
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

impl SerialHandle {
    /// Serves the host's end of a port.
    pub(super) fn serve(uart: DuplexStream, gates: MachineGates) -> (Self, SerialTask) {
        let (clients, come) = mpsc::channel(1);
        let (moves, told) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let serial = Self { history: Arc::default(), gates, clients, moves };
        let port =
            SerialPort { serial: serial.clone(), sinks: Vec::new(), streams: Vec::new(), next_client: 0 };
        let task = tokio::spawn(port.run(uart, come, told, stopped));
        (serial, SerialTask { stop, task })
    }

    fn lock(&self) -> MutexGuard<'_, SerialHistory> {
        self.history.lock().expect("no holder panics")
    }

    /// Returns a part of the history.
    ///
    /// # Errors
    /// Says that this part is lost.
    pub(super) fn read(&self, offset: HistoryOffset, max_bytes: usize) -> Result<(Vec<u8>, u64), String> {
        self.lock().read(offset, max_bytes)
    }

    /// Sends a client the history from an offset on, and then puts it on the list.
    ///
    /// # Errors
    /// Says that this part of the history is lost, or that the client or the port has gone.
    pub(super) async fn attach(
        &self,
        mut socket: ClientSocket,
        offset: Option<HistoryOffset>,
    ) -> Result<(), String> {
        let mut next = offset;
        while let Some(offset) = next {
            let (data, end) = self.read(offset, DEFAULT_BYTES)?;
            next = (!data.is_empty()).then_some(HistoryOffset::FromStart(end));
            if next.is_some() {
                socket.send(Message::binary(data)).await.map_err(|error| error.to_string())?;
            }
        }
        self.gates.pass(Gate::Attach).await;
        self.clients.send(Box::new(socket)).await.map_err(|_| "the serial task has ended".to_owned())
    }

    /// Sends every client the address that the VM migrates to.
    pub(super) fn say_migrating(&self, destination: SocketAddr) {
        // A port that has ended has no clients.
        let _ = self.moves.send(destination);
    }
}

impl SerialTask {
    /// Sends every client a close frame, and ends.
    pub(super) async fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.task.await;
    }
}

struct SerialPort {
    serial: SerialHandle,
    sinks: Vec<(u64, FrameSink)>,
    streams: Vec<(u64, FrameStream)>,
    next_client: u64,
}

type ReceivedFrame = Option<tungstenite::Result<Message>>;

/// The result of one step of the port.
enum PortStep {
    Moves(SocketAddr),
    Comes(Box<ClientSocket>),
    Typed(usize),
    Sent,
    Read(usize),
    Received(u64, ReceivedFrame),
    Listened,
}

impl SerialPort {
    async fn run(
        mut self,
        uart: DuplexStream,
        mut come: mpsc::Receiver<Box<ClientSocket>>,
        mut told: mpsc::UnboundedReceiver<SocketAddr>,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let (mut output, mut input) = tokio::io::split(uart);
        let (hears, mut heard) = mpsc::channel(AT_A_TIME);
        let mut chunk = [0; LIVE_BYTES];
        let (mut unsent, mut typed): (Option<Message>, Vec<u8>) = (None, Vec::new());
        loop {
            let sends = unsent.is_some() && !self.sinks.is_empty();
            let message = unsent.clone().unwrap_or_else(|| Message::binary(Vec::new()));
            let step = tokio::select! {
                biased;
                _ = &mut stopped => break,
                Some(destination) = told.recv() => PortStep::Moves(destination),
                Some(client) = come.recv() => PortStep::Comes(client),
                Ok(bytes) = input.write(&typed), if !typed.is_empty() => PortStep::Typed(bytes),
                () = send(&mut self.sinks, &message), if sends => PortStep::Sent,
                Ok(bytes @ 1..) = output.read(&mut chunk), if !sends => PortStep::Read(bytes),
                Some((client, received)) = heard.recv() => PortStep::Received(client, received),
                () = listen(&mut self.streams, &hears), if typed.is_empty() && !self.streams.is_empty() => {
                    PortStep::Listened
                }
            };
            match step {
                PortStep::Moves(destination) => self.tell(destination).await,
                PortStep::Comes(client) => self.enlist(*client),
                PortStep::Typed(bytes) => drop(typed.drain(..bytes)),
                PortStep::Sent => unsent = None,
                PortStep::Read(bytes) => {
                    self.serial.lock().record(&chunk[..bytes]);
                    unsent = Some(Message::binary(chunk[..bytes].to_vec()));
                }
                PortStep::Received(_, Some(Ok(Message::Binary(bytes)))) => typed = bytes.to_vec(),
                PortStep::Received(client, Some(Ok(Message::Close(_))) | None) => self.dismiss(client).await,
                PortStep::Received(..) | PortStep::Listened => {}
            }
        }
        self.say_farewell().await;
    }

    fn enlist(&mut self, client: ClientSocket) {
        let (sink, stream) = client.split();
        self.sinks.push((self.next_client, sink));
        self.streams.push((self.next_client, stream));
        self.next_client += 1;
    }

    async fn dismiss(&mut self, gone: u64) {
        self.streams.retain(|(client, _)| *client != gone);
        if let Some(index) = self.sinks.iter().position(|(client, _)| *client == gone) {
            let (_, mut sink) = self.sinks.remove(index);
            // The client is gone, even if closing fails.
            let _ = sink.close().await;
        }
    }

    async fn tell(&mut self, destination: SocketAddr) {
        let from_start = self.serial.lock().total();
        let text = json!({ "Migrating": { "destination": destination, "from_start": from_start } });
        send(&mut self.sinks, &Message::text(text.to_string())).await;
    }

    /// Closes one connection after the other, however long each of them takes.
    async fn say_farewell(self) {
        for ((_, sink), (_, stream)) in self.sinks.into_iter().zip(self.streams) {
            let farewell = CloseFrame { code: CloseCode::Away, reason: "VM stopped".into() };
            if let Ok(mut client) = sink.reunite(stream) {
                let _ = client.close(Some(farewell)).await;
            }
        }
    }
}

/// Sends a message to all clients. The reading side notices those that are gone.
async fn send(sinks: &mut [(u64, FrameSink)], message: &Message) {
    iter(sinks).for_each_concurrent(AT_A_TIME, |(_, sink)| sink.send(message.clone()).map(drop)).await;
}

/// Waits for one message of each client.
async fn listen(streams: &mut [(u64, FrameStream)], hears: &mpsc::Sender<(u64, ReceivedFrame)>) {
    let listening = iter(streams).for_each_concurrent(AT_A_TIME, |(client, stream)| {
        stream.next().then(|received| hears.send((*client, received)).map(drop))
    });
    listening.await;
}
