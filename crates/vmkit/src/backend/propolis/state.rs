//! Asking reality where a VM is in its life: the process first, then the server's own word, then what is left of both.
//!
//! ```text
//!  server's process   its VM                     →  state
//!  never started      -                             Prepared, or Stopped where that was asked for
//!  lives              Creating, or not asked yet    a start is at work (Busy), or was cut off (Failed)
//!  lives              Starting … Stopping           Running
//!  lives              Stopped, Destroyed            Stopped: the guest ended, or was stopped
//!  lives              Failed                        Failed
//!  lives              none (424)                    Failed: the server has forgotten it
//!  ended              in the kernel or not          Stopped where that was asked for, else Failed, with how it ended
//!  another boot's     -                             Stopped
//! ```
//!
//! Of a server elsewhere there is no process: that nobody listens there any more is its end. A network that does not lead
//! there tells nothing. Once a run was seen to end, nobody is asked about it any more.

use std::time::Duration;

use tokio::time::Instant;

use super::Site;
use super::client::{Client, Failure};
use super::files::{self, ServerFile};
use super::hold;
use super::instance_spec::{Instance, InstanceState};
use super::log;
use crate::backend::supervise::process::{self, Found};
use crate::backend::supervise::runfile::Ended;
use crate::boundedlog::tail_of_log;
use crate::error::{Error, Result};
use crate::lifecycle::{FailureKind, VmState};

/// How long the server has to answer somebody who only looks.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(1);
/// How long it has to answer an operation, which would go on with less than it could know.
pub(super) const ASK_LIMIT: Duration = Duration::from_secs(10);
/// How long a server that no longer answers is given to end, before it counts as one that hangs.
const ENDING_LIMIT: Duration = Duration::from_millis(500);
/// How much of a server's log is looked at for its last words, in bytes.
pub(super) const LOG_BYTES: u64 = 64 << 10;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// An operation, which holds the VM's lock: what is half done was cut off.
    Operation,
    /// Anybody: what is half done may be somebody's work.
    Anybody,
}

/// What was seen of a VM.
enum Seen {
    State(VmState),
    /// A start is at work, or was cut off.
    HalfDone,
}

/// Answers where the VM is in its life; its server is given `limit` to answer.
///
/// # Errors
/// `Busy` while a start is at work, `TimedOut` where the server does not answer, `Hypervisor` where it answers nonsense or can't
/// be reached.
pub(super) async fn observe(site: &Site<'_>, asker: Asker, limit: Duration) -> Result<VmState> {
    // A start may have come to its end between a look at the VM and one at the lock: then the VM is looked at again.
    for _ in 0..2 {
        let seen = match site.claim.options.address {
            Some(address) => elsewhere(site, site.client(address), limit).await?,
            None => own(site, limit).await?,
        };
        match seen {
            Seen::State(state) => return Ok(state),
            Seen::HalfDone if asker == Asker::Operation => break,
            Seen::HalfDone if hold::is_held(&site.layout.operation_lock())? => {
                return Err(Error::Busy { what: format!("VM `{}`", site.vm.name()), holder: None });
            }
            Seen::HalfDone => {}
        }
    }
    let cut_off = "a start was cut off before the guest ran; start it again";
    Ok(VmState::failed(FailureKind::Interrupted, cut_off))
}

/// Looks at a VM with a server of its own.
async fn own(site: &Site<'_>, limit: Duration) -> Result<Seen> {
    let process = match process::look(&site.place()).await? {
        Found::Nothing => return Ok(Seen::State(at_rest(site))),
        Found::Rebooted => return Ok(Seen::State(VmState::Stopped)),
        Found::Launching | Found::Starting(_) => return Ok(Seen::HalfDone),
        Found::Ended(ended) => return ended_state(site, ended).map(Seen::State),
        Found::Live(process) => process,
    };
    let Some(server) = files::server(&site.layout)? else { return Ok(Seen::HalfDone) };
    let client = site.client(server.address);
    let state = match client.instance(Instant::now() + limit).await {
        Ok(instance) => return Ok(of_instance(site, &instance, &server)),
        Err(failure) if failure.is_no_instance() => {
            forgotten(site, &server, "the server has forgotten it: it was started anew")
        }
        // A server that is ending closes its port first: what counts then is how it ends.
        Err(failure) => match process.wait(Instant::now() + ENDING_LIMIT).await? {
            true => {
                process::settled(&site.place()).await?;
                match process::look(&site.place()).await? {
                    Found::Ended(ended) => ended_state(site, ended)?,
                    _ => ended_state(site, None)?,
                }
            }
            false => return Err(failure.into_error(&client, "tell its state", None)),
        },
    };
    Ok(Seen::State(state))
}

/// Looks at a VM at a server that is somebody else's.
async fn elsewhere(site: &Site<'_>, client: Client, limit: Duration) -> Result<Seen> {
    // Read before the server is asked: a run that is begun meanwhile is another one.
    let Some(server) = files::server(&site.layout)? else { return Ok(Seen::State(at_rest(site))) };
    if files::has_ended(&site.layout, &server) {
        return Ok(Seen::State(VmState::Stopped));
    }
    let address = client.address;
    let state = match client.instance(Instant::now() + limit).await {
        Ok(instance) if instance.properties.id == site.vm.id => {
            return Ok(of_instance(site, &instance, &server));
        }
        Ok(_) | Err(Failure::Refused(_)) if !server.is_begun => return Ok(Seen::HalfDone),
        Err(failure) if failure.is_no_instance() && !server.is_begun => return Ok(Seen::HalfDone),
        Ok(other) => {
            let other = format!("the server at {address} has another VM now, {}", other.properties.id);
            forgotten(site, &server, &other)
        }
        Err(failure) if failure.is_no_instance() => {
            forgotten(site, &server, "the server has forgotten it: it was started anew")
        }
        Err(Failure::Refused(error)) => {
            forgotten(site, &server, &format!("nobody listens at {address} any more: {error}"))
        }
        Err(failure) => return Err(failure.into_error(&client, "tell its state", None)),
    };
    Ok(Seen::State(state))
}

fn at_rest(site: &Site<'_>) -> VmState {
    if site.layout.stop_mark().exists() { VmState::Stopped } else { VmState::Prepared }
}

/// A VM that is gone without a word: as was asked for, or as was seen, or a failure.
fn forgotten(site: &Site<'_>, server: &ServerFile, why: &str) -> VmState {
    if site.layout.stop_mark().exists() || files::has_ended(&site.layout, server) {
        return VmState::Stopped;
    }
    VmState::failed(FailureKind::Vanished, why)
}

fn of_instance(site: &Site<'_>, instance: &Instance, server: &ServerFile) -> Seen {
    Seen::State(match instance.state {
        InstanceState::Creating => return Seen::HalfDone,
        InstanceState::Starting
        | InstanceState::Running
        | InstanceState::Stopping
        | InstanceState::Rebooting
        | InstanceState::Migrating
        | InstanceState::Repairing
        | InstanceState::Unknown => VmState::Running,
        InstanceState::Stopped => VmState::Stopped,
        InstanceState::Destroyed => {
            files::remember_end(&site.layout, server);
            VmState::Stopped
        }
        InstanceState::Failed => {
            let words = last_words(site);
            let colon = if words.is_empty() { "" } else { ": " };
            VmState::failed(
                FailureKind::Other,
                format!("the server says that the VM has failed{colon}{words}"),
            )
        }
    })
}

fn ended_state(site: &Site<'_>, ended: Option<Ended>) -> Result<VmState> {
    let seen = files::server(&site.layout)?.is_some_and(|server| files::has_ended(&site.layout, &server));
    if seen || site.layout.stop_mark().exists() {
        return Ok(VmState::Stopped);
    }
    let kernel = match site.kernel_vm().exists() {
        true => "; its VM is still in the kernel, and the next start, stop or removal takes it away",
        false => "",
    };
    let Some(ended) = ended else {
        let vanished = "propolis-server is gone, and its keeper was killed before it could write down why";
        return Ok(VmState::failed(FailureKind::Vanished, format!("{vanished}{kernel}")));
    };
    let words = last_words(site);
    let words = words.lines().next_back().unwrap_or_default();
    let colon = if words.is_empty() { "" } else { ": " };
    let kind =
        if ended.signal.is_some() { FailureKind::HypervisorKilled } else { FailureKind::HypervisorExited };
    Ok(VmState::failed(kind, format!("propolis-server ended, {ended}{colon}{words}{kernel}")))
}

/// Answers what the server of this VM said last, where it is one of vmkit's own.
pub(super) fn last_words(site: &Site<'_>) -> String {
    if site.claim.options.address.is_some() {
        return String::new();
    }
    let log = tail_of_log(&site.layout.server_log(), LOG_BYTES).unwrap_or_default();
    log::last_words(&String::from_utf8_lossy(&log))
}
