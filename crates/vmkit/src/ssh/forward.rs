//! Ports of the host that lead into a guest through a session, for as long as that lives.

use std::convert::Infallible;
use std::num::NonZeroU16;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tracing::warn;

use super::Session;
use crate::error::{Error, Result};

/// How long the guest's server may take to reach a port of the guest itself.
const REACH: Duration = Duration::from_secs(30);

impl Session {
    /// Leads each connection that somebody makes to `listener` to a port of the guest's own loopback, until the session ends.
    ///
    /// A connection that the guest refuses is closed and warned of, and the next one is taken.
    ///
    /// # Cancel safety
    /// Dropped, it ends the connections that it led.
    ///
    /// # Errors
    /// `Guest` once the session has ended; `Io` where the listener fails.
    pub async fn forward(&self, listener: &TcpListener, guest_port: NonZeroU16) -> Result<Infallible> {
        // In one task with the listener, so that whoever is slow to be reached keeps nobody else waiting.
        let mut led = FuturesUnordered::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (stream, _) = accepted.map_err(Error::io("listen at", "a forwarded port"))?;
                    led.push(self.lead(stream, guest_port));
                }
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
        match self.dial("localhost", guest_port.get(), Instant::now() + REACH).await {
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
