//! The guest's first serial port, its history, and the WebSockets at which it is watched and typed into.
//!
//! One task reads the port and sends each chunk to all clients before it reads the next: one who does not read stalls them all,
//! and the guest. So does the real server (its issues 158, 391, 409, 540), and so a client must be tested against it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use dropshot::WebsocketConnectionRaw;
use futures_util::future::join_all;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{FutureExt, SinkExt, StreamExt};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::history::{DEFAULT_BYTES, History, Offset};

type Socket = WebSocketStream<WebsocketConnectionRaw>;

/// How many bytes are sent at once of what the guest says now.
const LIVE_BYTES: usize = 1024;

/// How many bytes a port holds that nobody has read.
pub(super) const UART_BYTES: usize = 1024;

/// For how long a client is waited for that does not take its farewell.
const FAREWELL: Duration = Duration::from_secs(1);

/// The port as the rest of the server sees it.
#[derive(Debug, Clone)]
pub(super) struct Serial {
    history: Arc<Mutex<History>>,
    control: mpsc::UnboundedSender<Control>,
}

/// Ends the port's task when told to, which says farewell to every client.
#[derive(Debug)]
pub(super) struct SerialTask {
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

enum Control {
    /// Here is one who wants to watch, and from where on it wants the history.
    Attach(Box<Socket>, Option<Offset>),
    /// One is no longer there.
    Detach(u64),
    /// The VM moves.
    Migrating(SocketAddr),
}

impl Serial {
    /// Serves the host's end of a port.
    pub(super) fn serve(uart: DuplexStream) -> (Self, SerialTask) {
        let (output, mut input) = tokio::io::split(uart);
        let (typed, mut to_type) = mpsc::channel::<Vec<u8>>(4);
        tokio::spawn(async move {
            while let Some(bytes) = to_type.recv().await {
                if input.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        });
        let (control, orders) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let serial = Self { history: Arc::default(), control };
        let port = Port { serial: serial.clone(), clients: Vec::new(), next_client: 0, typed };
        let task = tokio::spawn(port.run(output, orders, stopped));
        (serial, SerialTask { stop, task })
    }

    fn lock(&self) -> MutexGuard<'_, History> {
        self.history.lock().expect("no holder panics")
    }

    /// Answers a part of the history.
    ///
    /// # Errors
    /// Says that this part is lost.
    pub(super) fn read(&self, offset: Offset, max_bytes: usize) -> Result<(Vec<u8>, u64), String> {
        self.lock().read(offset, max_bytes)
    }

    /// Takes a client on, which is first sent the history from an offset on.
    ///
    /// # Errors
    /// Says that this part of the history is lost, or that the port has ended.
    pub(super) fn attach(&self, socket: Socket, offset: Option<Offset>) -> Result<(), String> {
        if let Some(offset) = offset {
            self.read(offset, 0)?;
        }
        let gone = |_| "the serial task has ended".to_owned();
        self.control.send(Control::Attach(Box::new(socket), offset)).map_err(gone)
    }

    /// Tells every client where the VM moves, as a migration does.
    pub(super) fn say_migrating(&self, destination: SocketAddr) {
        // A port that has ended has nobody to tell.
        let _ = self.control.send(Control::Migrating(destination));
    }
}

impl SerialTask {
    /// Says farewell to every client, and ends.
    pub(super) async fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.task.await;
    }
}

struct Port {
    serial: Serial,
    clients: Vec<(u64, SplitSink<Socket, Message>)>,
    next_client: u64,
    typed: mpsc::Sender<Vec<u8>>,
}

impl Port {
    async fn run(
        mut self,
        mut output: ReadHalf<DuplexStream>,
        mut orders: mpsc::UnboundedReceiver<Control>,
        mut stopped: oneshot::Receiver<()>,
    ) {
        let mut chunk = [0; LIVE_BYTES];
        loop {
            tokio::select! {
                biased;
                _ = &mut stopped => break,
                Some(order) = orders.recv() => if !unless_stopped(&mut stopped, self.obey(order)).await {
                    break;
                },
                Ok(read) = output.read(&mut chunk) => {
                    let chunk = &chunk[..read];
                    self.serial.lock().record(chunk);
                    let message = Message::binary(chunk.to_vec());
                    if !unless_stopped(&mut stopped, self.send(&message)).await {
                        break;
                    }
                }
            }
        }
        self.drain(&mut output).await;
        let farewell = CloseFrame { code: CloseCode::Away, reason: "VM stopped".into() };
        let farewells = self.clients.iter_mut().map(|(_, client)| {
            tokio::time::timeout(FAREWELL, client.send(Message::Close(Some(farewell.clone()))))
        });
        join_all(farewells).await;
    }

    /// Sends what the guest said before it ended, to whoever takes it.
    async fn drain(&mut self, output: &mut ReadHalf<DuplexStream>) {
        let mut rest = Vec::new();
        let mut chunk = [0; LIVE_BYTES];
        while let Some(Ok(read @ 1..)) = output.read(&mut chunk).now_or_never() {
            rest.extend_from_slice(&chunk[..read]);
        }
        if !rest.is_empty() {
            self.serial.lock().record(&rest);
            // Whoever does not take it in time misses it.
            let _ = tokio::time::timeout(FAREWELL, self.send(&Message::binary(rest))).await;
        }
    }

    async fn obey(&mut self, order: Control) {
        match order {
            Control::Attach(socket, offset) => self.welcome(*socket, offset).await,
            Control::Detach(gone) => {
                if let Some(index) = self.clients.iter().position(|(client, _)| *client == gone) {
                    let (_, mut client) = self.clients.remove(index);
                    // It is gone, whatever its connection says to that.
                    let _ = client.close().await;
                }
            }
            Control::Migrating(destination) => {
                let from_start = self.serial.lock().total();
                let text = json!({ "Migrating": { "destination": destination, "from_start": from_start } });
                self.send(&Message::text(text.to_string())).await;
            }
        }
    }

    /// Takes a client on before it hears anything: whoever hears something hears the farewell, too.
    async fn welcome(&mut self, socket: Socket, offset: Option<Offset>) {
        let (sink, stream) = socket.split();
        let id = self.next_client;
        self.next_client += 1;
        self.clients.push((id, sink));
        if let Some(offset) = offset
            && self.send_history(offset).await.is_err()
        {
            self.clients.pop();
            return;
        }
        tokio::spawn(listen(stream, id, self.typed.clone(), self.serial.control.clone()));
    }

    /// Sends the history to the client who came last.
    async fn send_history(&mut self, offset: Offset) -> Result<(), String> {
        let Some((_, client)) = self.clients.last_mut() else { return Ok(()) };
        let (mut data, mut end) = self.serial.read(offset, DEFAULT_BYTES)?;
        while !data.is_empty() {
            client.send(Message::binary(data)).await.map_err(|error| error.to_string())?;
            (data, end) = self.serial.read(Offset::FromStart(end), DEFAULT_BYTES)?;
        }
        Ok(())
    }

    /// Sends something to all, and drops those who can't be reached.
    async fn send(&mut self, message: &Message) {
        let sent = self.clients.iter_mut().map(|(id, client)| {
            let message = message.clone();
            async move { client.send(message).await.err().map(|_| *id) }
        });
        let gone: Vec<u64> = join_all(sent).await.into_iter().flatten().collect();
        self.clients.retain(|(id, _)| !gone.contains(id));
    }
}

/// Does something to its end, or, once the port is stopped, as far as it comes in the time for a farewell: what is on its way then
/// is the guest's last words. Answers whether the port goes on.
async fn unless_stopped(stopped: &mut oneshot::Receiver<()>, work: impl Future<Output = ()>) -> bool {
    tokio::pin!(work);
    tokio::select! {
        biased;
        _ = stopped => {
            let _ = tokio::time::timeout(FAREWELL, work).await;
            false
        }
        () = &mut work => true,
    }
}

/// Types what a client sends.
async fn listen(
    mut stream: SplitStream<Socket>,
    client: u64,
    typed: mpsc::Sender<Vec<u8>>,
    control: mpsc::UnboundedSender<Control>,
) {
    while let Some(Ok(message)) = stream.next().await {
        match message {
            Message::Binary(bytes) if typed.send(bytes.to_vec()).await.is_err() => return,
            Message::Close(_) => break,
            _ => {}
        }
    }
    // A port that has ended has dropped its clients itself.
    let _ = control.send(Control::Detach(client));
}
