//! Ports of the host that lead into a guest through a session, for as long as that lives.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustix::io::Errno;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep_until};
use tracing::warn;

use super::Session;
use crate::error::{Error, Result};

/// How long the guest's server may take to reach a port of the guest itself.
const REACH: Duration = Duration::from_secs(30);

/// The pause after a failed accept: until some of the present connections may have ended.
const PAUSE: Duration = Duration::from_millis(100);

/// Waits for a connection, from this moment on.
async fn accept_from(listener: &TcpListener, from: Instant) -> io::Result<(TcpStream, SocketAddr)> {
    sleep_until(from).await;
    listener.accept().await
}

/// Returns whether the listener itself is well: the visitor has left again, or the host is short of
/// something now.
///
/// Source: accept(2).
fn is_passing(error: &io::Error) -> bool {
    let short = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::CONNABORTED, Errno::PROTO];
    Errno::from_io_error(error).is_some_and(|errno| short.contains(&errno))
}

impl Session {
    /// Forwards each connection to `listener` to a port of the guest's own loopback, until the
    /// session ends.
    ///
    /// A connection that the guest refuses is closed and warned of, and the next one is taken.
    ///
    /// # Cancel safety
    /// Dropped, it ends the connections that it led.
    ///
    /// # Errors
    /// `Guest` once the session has ended; `Io` where the listener fails.
    pub async fn forward(&self, listener: &TcpListener, guest_port: NonZeroU16) -> Result<Infallible> {
        // In one task with the listener, so that a slow connection delays no other.
        let mut led = FuturesUnordered::new();
        let mut next = Instant::now();
        loop {
            tokio::select! {
                accepted = accept_from(listener, next) => match accepted {
                    Ok((stream, _)) => led.push(self.lead(stream, guest_port)),
                    Err(error) if is_passing(&error) => {
                        warn!(%error, "a connection could not be accepted; existing ones continue");
                        next = Instant::now() + PAUSE;
                    }
                    Err(error) => return Err(Error::io("listen at", "a forwarded port")(error)),
                },
                // What has ended is forgotten.
                Some(ended) = led.next() => ended?,
            }
        }
    }

    /// Leads one connection for as long as it lasts.
    ///
    /// # Errors
    /// `Guest` where the session itself has ended.
    async fn lead(&self, mut stream: TcpStream, guest_port: NonZeroU16) -> Result<()> {
        match self.dial("localhost", guest_port.get(), REACH).await {
            Ok(mut channel) => {
                // However a connection ends is for its two ends to tell.
                let _ = copy_bidirectional(&mut stream, &mut channel).await;
            }
            Err(error) if self.has_ended() => return Err(error),
            Err(error) => warn!(%error, "a connection was closed again"),
        }
        Ok(())
    }
}
