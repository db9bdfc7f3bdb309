//! Asking reality where a VM is in its life: the process first, then the server's own word, then
//! what is left of both.
//!
//! ```text
//!  server's process   its VM                     →  state
//!  never started      -                             Prepared, or Stopped where that was asked for
//!  lives              Creating, or not asked yet    a start is at work (Busy), or was cut off (Failed)
//!  elsewhere, begun not   none, or an earlier run's end   likewise: the VM may come yet
//!  lives              Starting … Stopping           Running
//!  lives              Stopped, Destroyed            Stopped: the guest ended, or was stopped
//!  lives              Failed                        Failed
//!  lives              none (424)                    Failed: the server has forgotten it
//!  ended              in the kernel or not          Stopped where that was asked for, else Failed, with how it ended
//!  another boot's     -                             Stopped
//! ```
//!
//! Of a server elsewhere there is no process: that nobody listens there any more is its end. A
//! network that does not lead there tells nothing. Once a run was seen to end, nobody is asked
//! about it any more. A copy of a VM's directory is at rest, whatever runs for the VM that it is a
//! copy of.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::VmContext;
use super::client::{ClientError, InstanceView, PropolisClient};
use super::files::{self, ServerFile};
use super::hold;
use super::instance_spec::InstanceState;
use super::log;
use crate::backend::supervise::process::{self, ProcessState};
use crate::backend::supervise::runfile::ProcessEnd;
use crate::boundedlog::tail_of_file;
use crate::error::{Error, Result};
use crate::lifecycle::{FailureKind, VmState};

/// How long the server has to answer somebody who only looks.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(1);
/// How long it has to answer an operation, which would go on with less than it could know.
pub(super) const ASK_LIMIT: Duration = Duration::from_secs(10);
/// How long a server that no longer answers is given to end, before it counts as one that hangs.
const ENDING_LIMIT: Duration = Duration::from_millis(500);
/// How much of a server's log is looked at for its last words, in bytes: a panic within a panic
/// prints long lists of calls.
pub(super) const LOG_BYTES: u64 = 256 << 10;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateCaller {
    /// An operation, which holds the VM's lock: what is half done was cut off.
    Operation,
    /// Anybody: what is half done may be somebody's work.
    Anybody,
}

impl StateCaller {
    /// Returns how long a server may tell nothing of its VM before its state alone will do: an
    /// operation would rather know whose VM it is.
    fn blocked_after(self, limit: Duration) -> Duration {
        match self {
            Self::Operation => limit * 3 / 4,
            Self::Anybody => limit / 4,
        }
    }
}

/// What was seen of a VM.
enum ObservedVm {
    State(VmState),
    /// A start is at work, or was cut off.
    HalfDone,
}

/// Returns where the VM is in its life; its server is given `limit` to answer.
///
/// # Errors
/// `Busy` while a start is at work, `TimedOut` where the server does not answer, `Hypervisor` where
/// it answers nonsense or can't be reached.
pub(super) async fn observe(site: &VmContext<'_>, asker: StateCaller, limit: Duration) -> Result<VmState> {
    if site.original.is_some() {
        return Ok(at_rest(site));
    }
    if site.claim.is_going {
        let begun = "its removal was interrupted: remove it again";
        return Ok(VmState::failed(FailureKind::Interrupted, begun));
    }
    // A start may have come to its end between a look at the VM and one at the lock: then the VM is
    // looked at again.
    for _ in 0..2 {
        let seen = match site.claim.options.address {
            Some(address) => elsewhere(site, site.client(address), asker, limit).await?,
            None => own(site, asker, limit).await?,
        };
        match seen {
            ObservedVm::State(state) => return Ok(state),
            ObservedVm::HalfDone if asker == StateCaller::Operation => break,
            ObservedVm::HalfDone if hold::is_held(&site.layout.operation_lock())? => {
                return Err(Error::Busy { what: format!("VM `{}`", site.vm.name()), holder: None });
            }
            ObservedVm::HalfDone => {}
        }
    }
    let cut_off = "a start was cut off before the guest ran; start it again";
    Ok(VmState::failed(FailureKind::Interrupted, cut_off))
}

/// Looks at a VM with a server of its own.
async fn own(site: &VmContext<'_>, asker: StateCaller, limit: Duration) -> Result<ObservedVm> {
    let process = match process::look(&site.place()).await? {
        ProcessState::Nothing => return Ok(ObservedVm::State(at_rest(site))),
        ProcessState::Rebooted | ProcessState::Copied => return Ok(ObservedVm::State(VmState::Stopped)),
        ProcessState::Launching | ProcessState::Starting(_) => return Ok(ObservedVm::HalfDone),
        ProcessState::Ended(ended) => return ended_state(site, ended).map(ObservedVm::State),
        ProcessState::Live(process) => process,
    };
    let Some(server) = files::server(&site.layout)? else { return Ok(ObservedVm::HalfDone) };
    let client = site.client(server.address);
    let state = match client.look(asker.blocked_after(limit), Instant::now() + limit).await {
        Ok(sight) => return Ok(of_instance(site, sight.state, &server)),
        Err(failure) if failure.is_no_instance() => {
            forgotten(site, &server, "the server has forgotten it: it was started anew")
        }
        // A server that is ending closes its port first: what counts then is how it ends.
        Err(failure) => match process.wait(Instant::now() + ENDING_LIMIT).await? {
            true => {
                process::settled(&site.place()).await?;
                match process::look(&site.place()).await? {
                    ProcessState::Ended(ended) => ended_state(site, ended)?,
                    _ => ended_state(site, None)?,
                }
            }
            false => return Err(failure.into_error(&client, "tell its state", None)),
        },
    };
    Ok(ObservedVm::State(state))
}

/// Looks at a VM at a server that is somebody else's.
async fn elsewhere(
    site: &VmContext<'_>,
    client: PropolisClient,
    asker: StateCaller,
    limit: Duration,
) -> Result<ObservedVm> {
    // Read before the server is asked: a run that is begun meanwhile is another one.
    let Some(server) = files::server(&site.layout)? else { return Ok(ObservedVm::State(at_rest(site))) };
    if files::has_ended(&site.layout, &server) {
        return Ok(ObservedVm::State(VmState::Stopped));
    }
    let address = client.address;
    let sight = client.look(asker.blocked_after(limit), Instant::now() + limit).await;
    let is_ours = |id: Option<Uuid>| id.is_none_or(|id| id == site.vm.id);
    let state = match sight {
        // Of a run that was not begun, that is what an earlier one has come to.
        Ok(InstanceView { state: InstanceState::Destroyed | InstanceState::Failed, .. })
            if !server.is_begun =>
        {
            return Ok(ObservedVm::HalfDone);
        }
        Ok(InstanceView { id: None, .. }) | Err(ClientError::Refused(_)) if !server.is_begun => {
            return Ok(ObservedVm::HalfDone);
        }
        // Where only the state is told, it is believed that no other VM has come; nothing is done
        // or kept by it.
        Ok(InstanceView { id: None, state: InstanceState::Destroyed }) => VmState::Stopped,
        Ok(InstanceView { id, state }) if is_ours(id) => return Ok(of_instance(site, state, &server)),
        Ok(_) if !server.is_begun => return Ok(ObservedVm::HalfDone),
        Err(failure) if failure.is_no_instance() && !server.is_begun => return Ok(ObservedVm::HalfDone),
        Ok(InstanceView { id, .. }) => {
            let other = id.unwrap_or_default();
            forgotten(site, &server, &format!("the server at {address} has another VM now, {other}"))
        }
        Err(failure) if failure.is_no_instance() => {
            forgotten(site, &server, "the server has forgotten it: it was started anew")
        }
        Err(ClientError::Refused(error)) => {
            forgotten(site, &server, &format!("nobody listens at {address} any more: {error}"))
        }
        Err(failure) => return Err(failure.into_error(&client, "tell its state", None)),
    };
    Ok(ObservedVm::State(state))
}

fn at_rest(site: &VmContext<'_>) -> VmState {
    if site.layout.stop_mark().exists() { VmState::Stopped } else { VmState::Prepared }
}

/// A VM that is gone without a word: as was asked for, or as was seen, or a failure.
fn forgotten(site: &VmContext<'_>, server: &ServerFile, why: &str) -> VmState {
    if site.layout.stop_mark().exists() || files::has_ended(&site.layout, server) {
        return VmState::Stopped;
    }
    VmState::failed(FailureKind::Vanished, why)
}

fn of_instance(site: &VmContext<'_>, state: InstanceState, server: &ServerFile) -> ObservedVm {
    ObservedVm::State(match state {
        InstanceState::Creating => return ObservedVm::HalfDone,
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

fn ended_state(site: &VmContext<'_>, ended: Option<ProcessEnd>) -> Result<VmState> {
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
    let words = log::cause(&own_log(site));
    let colon = if words.is_empty() { "" } else { ": " };
    let kind =
        if ended.signal.is_some() { FailureKind::HypervisorKilled } else { FailureKind::HypervisorExited };
    Ok(VmState::failed(kind, format!("propolis-server ended, {ended}{colon}{words}{kernel}")))
}

/// Returns what the server of this VM said last, where it is one of vmkit's own.
pub(super) fn last_words(site: &VmContext<'_>) -> String {
    log::last_words(&own_log(site))
}

/// Returns the panic of the server of this VM in this run, where there was one and the server is
/// one of vmkit's own.
pub(super) fn last_panic(site: &VmContext<'_>) -> Option<String> {
    log::panic(&own_log(site))
}

/// Returns what the server of this VM said in this run, as far as it is of use; nothing of one
/// elsewhere.
fn own_log(site: &VmContext<'_>) -> String {
    if site.claim.options.address.is_some() {
        return String::new();
    }
    // The newer half alone: each run begins with one.
    let log = tail_of_file(&site.layout.server_log(), LOG_BYTES).unwrap_or_default();
    String::from_utf8_lossy(&log).into_owned()
}
