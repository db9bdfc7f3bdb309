//! A network that misbehaves: a proxy in front of any server, with faults that tests choose.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional, sink};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// What goes wrong with a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetworkFault {
    /// The connection is refused.
    Refuse,
    /// The connection breaks after this many bytes of the replies.
    DropAfter(u64),
    /// The request arrives, and no reply comes back.
    Stall,
    /// The request arrives after this long.
    Slow(Duration),
    /// Every request gets these bytes as the reply, and the connection ends.
    Junk(Vec<u8>),
    /// Every request gets a page of HTML with status 200, as from a captive portal.
    Html,
    /// The connection ends right after the upgrade to a WebSocket.
    HangUpAfterUpgrade,
}

/// A sign-in page, as a captive portal sends it.
const PAGE: &str = "<!doctype html><title>Sign in</title><p>This network wants to know who you are.";

/// The most that is read of a reply's head, in bytes.
const LONGEST_HEAD: usize = 64 * 1024;

/// A proxy in front of a server. Without a fault it passes everything on.
#[derive(Debug)]
pub struct FaultProxy {
    address: SocketAddr,
    now: Arc<Mutex<ProxyNow>>,
    orders: Option<mpsc::UnboundedSender<ProxyOrder>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone)]
struct ProxyNow {
    upstream: SocketAddr,
    fault: Option<NetworkFault>,
}

#[derive(Debug)]
enum ProxyOrder {
    Listen(Sender<io::Result<()>>),
    Refuse(Sender<io::Result<()>>),
    Cut(Sender<io::Result<()>>),
}

impl FaultProxy {
    /// Creates a proxy in front of `upstream`.
    ///
    /// # Errors
    /// Fails if the listening socket can't be created.
    pub fn new(upstream: SocketAddr) -> io::Result<Self> {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let now = Arc::new(Mutex::new(ProxyNow { upstream, fault: None }));
        let (orders, taken) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = {
            let now = Arc::clone(&now);
            std::thread::spawn(move || runtime.block_on(run(listener, now, taken)))
        };
        Ok(Self { address, now, orders: Some(orders), thread: Some(thread) })
    }

    /// Returns the address it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Applies this fault to every connection from now on.
    ///
    /// # Errors
    /// Fails if it has refused connections and can't listen again.
    pub fn set(&self, fault: Option<NetworkFault>) -> io::Result<()> {
        let refuse = fault == Some(NetworkFault::Refuse);
        self.now.lock().expect("no holder panics").fault = fault;
        self.order(if refuse { ProxyOrder::Refuse } else { ProxyOrder::Listen })
    }

    /// Replaces the server behind it for every new connection, and closes the present ones: a
    /// restarted server has lost its state.
    ///
    /// # Errors
    /// Fails only if the proxy has ended.
    pub fn replace(&self, upstream: SocketAddr) -> io::Result<()> {
        self.now.lock().expect("no holder panics").upstream = upstream;
        self.cut()
    }

    /// Closes every connection.
    ///
    /// # Errors
    /// Fails only if the proxy has ended.
    pub fn cut(&self) -> io::Result<()> {
        self.order(ProxyOrder::Cut)
    }

    fn order(&self, order: impl FnOnce(Sender<io::Result<()>>) -> ProxyOrder) -> io::Result<()> {
        let gone = || io::Error::other("the proxy has ended");
        let (done, waits) = channel();
        self.orders.as_ref().ok_or_else(gone)?.send(order(done)).map_err(|_| gone())?;
        waits.recv().unwrap_or_else(|_| Err(gone()))
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // The thread returns nothing.
            let _ = thread.join();
        }
    }
}

async fn run(
    listener: std::net::TcpListener,
    now: Arc<Mutex<ProxyNow>>,
    mut orders: mpsc::UnboundedReceiver<ProxyOrder>,
) {
    let Ok(address) = listener.local_addr() else { return };
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            order = orders.recv() => match order {
                None => return,
                Some(ProxyOrder::Refuse(done)) => {
                    listener = None;
                    let _ = done.send(Ok(()));
                }
                Some(ProxyOrder::Listen(done)) => {
                    let listens = match &listener {
                        Some(_) => Ok(()),
                        None => TcpListener::bind(address).await.map(|again| listener = Some(again)),
                    };
                    let _ = done.send(listens);
                }
                Some(ProxyOrder::Cut(done)) => {
                    connections.shutdown().await;
                    let _ = done.send(Ok(()));
                }
            },
            Some(client) = accept(listener.as_ref()) => {
                let now = now.lock().expect("no holder panics").clone();
                connections.spawn(async move {
                    // Connections are expected to break here.
                    let _ = serve(client, now).await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> Option<TcpStream> {
    match listener {
        Some(listener) => listener.accept().await.ok().map(|(client, _)| client),
        None => None,
    }
}

async fn serve(mut client: TcpStream, now: ProxyNow) -> io::Result<()> {
    match now.fault {
        // A connection accepted before new ones were refused is passed on.
        None | Some(NetworkFault::Refuse) => {
            let mut server = TcpStream::connect(now.upstream).await?;
            copy_bidirectional(&mut client, &mut server).await?;
        }
        Some(NetworkFault::Junk(junk)) => return answer(client, &junk).await,
        Some(NetworkFault::Html) => {
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\n\r\n",
                PAGE.len()
            );
            return answer(client, format!("{head}{PAGE}").as_bytes()).await;
        }
        Some(NetworkFault::Slow(pause)) => {
            tokio::time::sleep(pause).await;
            let mut server = TcpStream::connect(now.upstream).await?;
            copy_bidirectional(&mut client, &mut server).await?;
        }
        Some(NetworkFault::Stall) => {
            let mut server = TcpStream::connect(now.upstream).await?;
            copy(&mut client, &mut server).await?;
        }
        Some(NetworkFault::DropAfter(bytes)) => {
            let mut server = TcpStream::connect(now.upstream).await?;
            let ((mut answers, mut asked), (mut asks, mut answered)) = (server.split(), client.split());
            let mut limited = (&mut answers).take(bytes);
            tokio::select! {
                passed = copy(&mut limited, &mut answered) => drop(passed?),
                broken = pass_on(&mut asks, &mut asked) => broken?,
            }
        }
        Some(NetworkFault::HangUpAfterUpgrade) => {
            let mut server = TcpStream::connect(now.upstream).await?;
            hang_up_after_upgrade(&mut client, &mut server).await?;
        }
    }
    Ok(())
}

/// Reads a part of the request, and replies without having parsed it.
async fn answer(mut client: TcpStream, text: &[u8]) -> io::Result<()> {
    let mut asked = [0; 4096];
    let _ = client.read(&mut asked).await?;
    client.write_all(text).await?;
    client.shutdown().await?;
    // Data that still arrives must not reset the connection before the reply is read.
    copy(&mut client, &mut sink()).await.map(drop)
}

/// Forwards the request, and waits after its end: the reply is still to come.
async fn pass_on(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
) -> io::Result<()> {
    copy(from, to).await?;
    std::future::pending().await
}

async fn hang_up_after_upgrade(client: &mut TcpStream, server: &mut TcpStream) -> io::Result<()> {
    let mut head = Vec::new();
    {
        let ((mut answers, mut asked), (mut asks, _)) = (server.split(), client.split());
        let read = async {
            while !head.ends_with(b"\r\n\r\n") && head.len() < LONGEST_HEAD {
                head.push(answers.read_u8().await?);
            }
            io::Result::Ok(())
        };
        tokio::select! {
            read = read => read?,
            broken = pass_on(&mut asks, &mut asked) => broken?,
        }
    }
    client.write_all(&head).await?;
    if !head.starts_with(b"HTTP/1.1 101") {
        copy_bidirectional(client, server).await?;
    }
    Ok(())
}
