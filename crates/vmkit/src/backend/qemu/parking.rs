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
    /// Stops the guest's programs; they go on by themselves after this time.
    ///
    /// # Errors
    /// Those of [`exec`](Self::exec); `Protocol` with the guest's reason.
    pub(super) async fn park(&mut self, lasts: Duration, timeout: Duration) -> Result<()> {
        let seconds = lasts.as_secs().to_string();
        self.run_parking(&["park", &seconds], timeout).await.map(drop)
    }

    /// Lets the guest's programs go on, and returns whether they stood still until now.
    ///
    /// # Errors
    /// As [`park`](Self::park).
    pub(super) async fn unpark(&mut self, timeout: Duration) -> Result<bool> {
        self.run_parking(&["thaw"], timeout).await.map(|printed| printed == b"parked\n")
    }

    async fn run_parking(&mut self, what: &[&str], timeout: Duration) -> Result<Vec<u8>> {
        let done = self.exec("/bin/sh", &[&["-c", SCRIPT, "sh"], what].concat(), None, timeout).await?;
        match done.exit {
            GuestExitStatus::Code(0) => Ok(done.stdout),
            exit => {
                let words = String::from_utf8_lossy(&done.stderr);
                let problem = format!("the guest's programs do not stand still ({exit:?}): {}", words.trim());
                Err(Error::protocol(Peer::GuestAgent, problem))
            }
        }
    }
}

/// Lets the guest's programs go on, and removes the mark that they may stand still. Returns whether
/// they certainly stood still until now.
pub(super) async fn unpark(layout: &QemuLayout) -> bool {
    let unparked = async {
        let mut agent = GuestAgent::connect(&layout.agent_socket(), LIMIT).await?;
        step("snapshot: unpark").map_err(Error::io("write", layout.parked_mark()))?;
        let stood_still = agent.unpark(LIMIT).await?;
        remove_file(&layout.parked_mark())?;
        Ok::<_, Error>(stood_still)
    };
    unparked.await.unwrap_or_else(|error| {
        tracing::warn!(vm = %layout.name(), %error, "the guest's programs may stand still for a while");
        false
    })
}
