//! The programs of a guest stand still while its memory is written for clones: so in a clone none
//! of them runs before the agent has given the guest random numbers of its own.
//!
//! Source: Linux, `Documentation/admin-guide/cgroup-v2.rst`, `cgroup.freeze`.

use std::time::Duration;

use super::agent::GuestAgent;
use super::layout::QemuLayout;
use crate::backend::supervise::files::remove_file;
use crate::error::{Error, Peer, Result};
use crate::program::GuestExitStatus;
use crate::steps::step;

/// The timeout of an agent that lets the guest's programs go on.
const LIMIT: Duration = Duration::from_secs(10);

const SCRIPT: &str = include_str!("parking.sh");

impl GuestAgent {
    /// Stops the guest's programs; they go on by themselves after a minute.
    ///
    /// # Errors
    /// Those of [`exec`](Self::exec); `Protocol` with the guest's reason.
    pub(super) async fn park(&mut self, timeout: Duration) -> Result<()> {
        self.run_parking("park", timeout).await
    }

    /// Lets the guest's programs go on.
    ///
    /// # Errors
    /// As [`park`](Self::park).
    pub(super) async fn unpark(&mut self, timeout: Duration) -> Result<()> {
        self.run_parking("thaw", timeout).await
    }

    async fn run_parking(&mut self, what: &str, timeout: Duration) -> Result<()> {
        let done = self.exec("/bin/sh", &["-c", SCRIPT, "sh", what], None, timeout).await?;
        match done.exit {
            GuestExitStatus::Code(0) => Ok(()),
            exit => {
                let words = String::from_utf8_lossy(&done.stderr);
                let problem = format!("the guest's programs do not stand still ({exit:?}): {}", words.trim());
                Err(Error::protocol(Peer::GuestAgent, problem))
            }
        }
    }
}

/// Lets the guest's programs go on, and removes the mark that they may stand still.
pub(super) async fn unpark(layout: &QemuLayout) {
    let unparked = async {
        let mut agent = GuestAgent::connect(&layout.agent_socket(), LIMIT).await?;
        step("snapshot: unpark").map_err(Error::io("write", layout.parked_mark()))?;
        agent.unpark(LIMIT).await?;
        remove_file(&layout.parked_mark())
    };
    if let Err(error) = unparked.await {
        tracing::warn!(vm = %layout.name(), %error, "the guest's programs may stand still for a minute");
    }
}
