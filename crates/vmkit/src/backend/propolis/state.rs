//! Determining the state of a VM: from its process, then from the server, then from the files.
//!
//! ```text
//!  server's process   its VM                     →  state
//!  never started      -                             Prepared, or Stopped if that was requested
//!  lives              Creating, or not asked yet    a start is at work (Busy), or was interrupted (Failed)
//!  elsewhere, not run yet   none, or an earlier run's end   likewise: the VM may still appear
//!  lives              Starting … Stopping           Running
//!  lives              Stopped, Destroyed            Stopped: the guest ended, or was stopped
//!  lives              Failed                        Failed
//!  lives              none (424)                    Failed: the server was restarted
//!  ended              in the kernel or not          Stopped if that was requested, else Failed, with how it ended
//!  another boot's     -                             Stopped
//! ```
//!
//! A server elsewhere has no process here: a refused connection is its end, while a network failure
//! says nothing. Once a run was seen to have ended, its server is not asked about it again. A copy
//! of a VM's directory never runs, even if the original does.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::client::{ClientError, InstanceView, PropolisClient};
use super::context::VmContext;
use super::files::{self, ServerFile};
use super::hold;
use super::instance_spec::InstanceState;
use super::log;
use crate::backend::supervise::process::{self, ProcessState};
use crate::backend::supervise::runfile::ProcessEnd;
use crate::boundedlog::tail_of_file;
use crate::error::{Error, Result};
use crate::lifecycle::{FailureKind, VmState};

/// How long the server has to reply to a caller that only looks.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(1);
/// How long it has to reply to an operation, which would otherwise go on with less information.
pub(super) const ASK_LIMIT: Duration = Duration::from_secs(10);
/// How long a server that doesn't reply has to end, before it is regarded as hanging.
const ENDING_LIMIT: Duration = Duration::from_millis(500);
/// How much of a server's log is searched for its last lines, in bytes: a panic within a panic
/// prints long backtraces.
pub(super) const LOG_BYTES: u64 = 256 << 10;

/// The caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateCaller {
    /// An operation, which holds the VM's lock: what is incomplete was interrupted.
    Operation,
    /// Any other: another process may be at work on what is incomplete.
    Anybody,
}

impl StateCaller {
    /// Returns after which time without a reply the bare state is enough; an operation prefers to
    /// know the VM's id.
    fn blocked_after(self, limit: Duration) -> Duration {
        match self {
            Self::Operation => limit * 3 / 4,
            Self::Anybody => limit / 4,
        }
    }
}

/// The state as it was observed.
enum ObservedVm {
    State(VmState),
    /// A start is at work, or was interrupted.
    HalfDone,
}

/// Returns the VM's state; its server is given `limit` to reply.
///
/// # Errors
/// `Busy` while a start is at work, `TimedOut` if the server does not reply, `Hypervisor` if the
/// reply is invalid or the server can't be reached.
pub(super) async fn observe(site: &VmContext<'_>, asker: StateCaller, limit: Duration) -> Result<VmState> {
    if site.original.is_some() {
        return Ok(at_rest(site));
    }
    if site.claim.is_going {
        let begun = "its removal was interrupted: remove the VM again";
        return Ok(VmState::failed(FailureKind::Interrupted, begun));
    }
    // A start may have ended between the look at the VM and the one at the lock: then look again.
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
    let interrupted = "a start was interrupted before the guest ran; start the VM again";
    Ok(VmState::failed(FailureKind::Interrupted, interrupted))
}

/// Observes a VM with its own server.
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
            forgotten(site, &server, "the server was restarted and has no such VM")
        }
        // A server that is ending closes its port first: its state depends on how it ends.
        Err(failure) => match process.wait(Instant::now() + ENDING_LIMIT).await? {
            true => {
                process::settled(&site.place()).await?;
                match process::look(&site.place()).await? {
                    ProcessState::Ended(ended) => ended_state(site, ended)?,
                    _ => ended_state(site, None)?,
                }
            }
            false => return Err(failure.into_error(&client, "report its state", None)),
        },
    };
    Ok(ObservedVm::State(state))
}

/// Observes a VM at a server elsewhere.
async fn elsewhere(
    site: &VmContext<'_>,
    client: PropolisClient,
    asker: StateCaller,
    limit: Duration,
) -> Result<ObservedVm> {
    // Read before the server is asked: a run that starts in the meantime is another one.
    let Some(server) = files::server(&site.layout)? else { return Ok(ObservedVm::State(at_rest(site))) };
    if files::has_ended(&site.layout, &server) {
        return Ok(ObservedVm::State(VmState::Stopped));
    }
    let address = client.address;
    let sight = client.look(asker.blocked_after(limit), Instant::now() + limit).await;
    let is_ours = |id: Option<Uuid>| id.is_none_or(|id| id == site.vm.id);
    let state = match sight {
        // This is the end of an earlier run, if this one was not asked to run.
        Ok(InstanceView { state: InstanceState::Destroyed | InstanceState::Failed, .. })
            if !server.is_begun =>
        {
            return Ok(ObservedVm::HalfDone);
        }
        Ok(InstanceView { id: None, .. }) | Err(ClientError::Refused(_)) if !server.is_begun => {
            return Ok(ObservedVm::HalfDone);
        }
        // If only the state is reported, it is assumed to be this VM's; nothing is done or recorded
        // because of it.
        Ok(InstanceView { id: None, state: InstanceState::Destroyed }) => VmState::Stopped,
        Ok(InstanceView { id, state }) if is_ours(id) => return Ok(of_instance(site, state, &server)),
        Ok(_) if !server.is_begun => return Ok(ObservedVm::HalfDone),
        Err(failure) if failure.is_no_instance() && !server.is_begun => return Ok(ObservedVm::HalfDone),
        Ok(InstanceView { id, .. }) => {
            let other = id.unwrap_or_default();
            forgotten(site, &server, &format!("the server at {address} has another VM now, {other}"))
        }
        Err(failure) if failure.is_no_instance() => {
            forgotten(site, &server, "the server was restarted and has no such VM")
        }
        Err(ClientError::Refused(error)) => {
            forgotten(site, &server, &format!("nothing listens at {address} any more: {error}"))
        }
        Err(failure) => return Err(failure.into_error(&client, "report its state", None)),
    };
    Ok(ObservedVm::State(state))
}

fn at_rest(site: &VmContext<'_>) -> VmState {
    if site.layout.stop_mark().exists() { VmState::Stopped } else { VmState::Prepared }
}

/// Returns the state of a VM that is gone without an explanation: a failure, unless its end was
/// requested or seen.
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
                format!("the server reports that the VM has failed{colon}{words}"),
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
        true => "; its VM is still in the kernel, and the next start, stop or removal removes it",
        false => "",
    };
    let Some(ended) = ended else {
        let vanished = "propolis-server is gone, and its keeper was killed before it could record why";
        return Ok(VmState::failed(FailureKind::Vanished, format!("{vanished}{kernel}")));
    };
    let words = log::cause(&own_log(site));
    let colon = if words.is_empty() { "" } else { ": " };
    let kind =
        if ended.signal.is_some() { FailureKind::HypervisorKilled } else { FailureKind::HypervisorExited };
    Ok(VmState::failed(kind, format!("propolis-server ended, {ended}{colon}{words}{kernel}")))
}

/// Returns the last lines of the log of this VM's server, if it is its own.
pub(super) fn last_words(site: &VmContext<'_>) -> String {
    log::last_words(&own_log(site))
}

/// Returns the panic of this VM's server in this run, if there was one and the server is its own.
pub(super) fn last_panic(site: &VmContext<'_>) -> Option<String> {
    log::panic(&own_log(site))
}

/// Returns the log of this VM's server in this run, as far as it is useful; empty for a server
/// elsewhere.
fn own_log(site: &VmContext<'_>) -> String {
    if site.claim.options.address.is_some() {
        return String::new();
    }
    // Only the newer half: each run starts a new one.
    let log = tail_of_file(&site.layout.server_log(), LOG_BYTES).unwrap_or_default();
    String::from_utf8_lossy(&log).into_owned()
}
