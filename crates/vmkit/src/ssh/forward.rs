//! Ports of the host that lead into a guest through a session, for as long as that lives.

use std::convert::Infallible;
use std::num::NonZeroU16;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
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
        let mut led = JoinSet::new();
        loop {
            let (mut stream, _) = tokio::select! {
                accepted = listener.accept() => accepted.map_err(Error::io("listen at", "a forwarded port"))?,
                // What has ended is forgotten.
                Some(_) = led.join_next() => continue,
            };
            match self.dial("localhost", guest_port.get(), Instant::now() + REACH).await {
                Ok(mut channel) => {
                    led.spawn(async move {
                        // However a connection ends is for its two ends to tell.
                        let _ = copy_bidirectional(&mut stream, &mut channel).await;
                    });
                }
                Err(error) if self.has_ended() => return Err(error),
                Err(error) => warn!(%error, "a connection was closed again"),
            }
        }
    }
}
