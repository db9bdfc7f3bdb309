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
//! Of a server elsewhere there is no process: that nobody listens there any more is its end.

use std::time::Duration;

use tokio::time::Instant;

use super::Site;
use super::client::{Client, Failure};
use super::files;
use super::hold;
use super::instance_spec::{Instance, InstanceState};
use super::log;
use crate::backend::supervise::process::{self, Found};
use crate::backend::supervise::runfile::Ended;
use crate::boundedlog::tail_of_log;
use crate::error::{Error, Result};
use crate::lifecycle::{FailureKind, VmState};

/// How long a question to a server may take.
pub(super) const ASK_LIMIT: Duration = Duration::from_secs(1);
/// How long a server that no longer answers is given to end, before it counts as one that hangs.
const ENDING_LIMIT: Duration = Duration::from_millis(500);
/// How much of a server's log is looked at for its last words, in bytes.
const LOG_BYTES: u64 = 64 << 10;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// An operation, which holds the VM's lock: what is half done was cut off.
    Operation,
    /// Anybody: what is half done may be somebody's work.
    Anybody,
}

/// Answers where the VM is in its life.
///
/// # Errors
/// `Busy` while a start is at work, `TimedOut` where the server does not answer, `Hypervisor` where it answers nonsense.
pub(super) async fn observe(site: &Site<'_>, asker: Asker) -> Result<VmState> {
    if let Some(address) = site.claim.options.address {
        return elsewhere(site, site.client(address)).await;
    }
    match process::look(&site.layout.place()).await? {
        Found::Nothing => Ok(at_rest(site)),
        Found::Rebooted => Ok(VmState::Stopped),
        Found::Launching | Found::Starting(_) => half_done(site, asker),
        Found::Ended(ended) => Ok(ended_state(site, ended)),
        Found::Live(process) => {
            let Some(server) = files::server(&site.layout)? else { return half_done(site, asker) };
            let client = site.client(server.address);
            match client.instance(Instant::now() + ASK_LIMIT).await {
                Ok(instance) => of_instance(site, &instance, asker),
                Err(failure) if failure.is_no_instance() => {
                    Ok(forgotten(site, "the server has forgotten it: it was started anew"))
                }
                // A server that is ending closes its port first: what counts then is how it ends.
                Err(failure) => match process.wait(Instant::now() + ENDING_LIMIT).await? {
                    true => {
                        process::settled(&site.layout.place()).await?;
                        match process::look(&site.layout.place()).await? {
                            Found::Ended(ended) => Ok(ended_state(site, ended)),
                            _ => Ok(ended_state(site, None)),
                        }
                    }
                    false => Err(failure.into_error(&client, "tell its state", None)),
                },
            }
        }
    }
}

async fn elsewhere(site: &Site<'_>, client: Client) -> Result<VmState> {
    if files::server(&site.layout)?.is_none() {
        return Ok(at_rest(site));
    }
    match client.instance(Instant::now() + ASK_LIMIT).await {
        Ok(instance) if instance.properties.id == site.vm.id => {
            of_instance(site, &instance, Asker::Operation)
        }
        Ok(instance) => {
            let other =
                format!("the server at {} has another VM now, {}", client.address, instance.properties.id);
            Ok(forgotten(site, &other))
        }
        Err(failure) if failure.is_no_instance() => {
            Ok(forgotten(site, "the server has forgotten it: it was started anew"))
        }
        Err(Failure::Refused(error)) => {
            Ok(forgotten(site, &format!("nobody listens at {} any more: {error}", client.address)))
        }
        Err(failure) => Err(failure.into_error(&client, "tell its state", None)),
    }
}

fn at_rest(site: &Site<'_>) -> VmState {
    if site.layout.stop_mark().exists() { VmState::Stopped } else { VmState::Prepared }
}

/// A VM that is gone without a word: as was asked for, or a failure.
fn forgotten(site: &Site<'_>, why: &str) -> VmState {
    if site.layout.stop_mark().exists() {
        return VmState::Stopped;
    }
    VmState::failed(FailureKind::Vanished, why)
}

fn half_done(site: &Site<'_>, asker: Asker) -> Result<VmState> {
    if asker == Asker::Anybody && hold::is_held(&site.layout.operation_lock())? {
        return Err(Error::Busy { what: format!("VM `{}`", site.vm.name()), holder: None });
    }
    let cut_off = "a start was cut off before the guest ran; start it again";
    Ok(VmState::failed(FailureKind::Interrupted, cut_off))
}

fn of_instance(site: &Site<'_>, instance: &Instance, asker: Asker) -> Result<VmState> {
    Ok(match instance.state {
        InstanceState::Creating => return half_done(site, asker),
        InstanceState::Starting
        | InstanceState::Running
        | InstanceState::Stopping
        | InstanceState::Rebooting
        | InstanceState::Migrating
        | InstanceState::Repairing
        | InstanceState::Unknown => VmState::Running,
        InstanceState::Stopped | InstanceState::Destroyed => VmState::Stopped,
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

fn ended_state(site: &Site<'_>, ended: Option<Ended>) -> VmState {
    if site.layout.stop_mark().exists() {
        return VmState::Stopped;
    }
    let kernel = match site.kernel_vm().exists() {
        true => "; its VM is still in the kernel, and the next start, stop or removal takes it away",
        false => "",
    };
    let Some(ended) = ended else {
        let vanished = "propolis-server is gone, and its keeper was killed before it could write down why";
        return VmState::failed(FailureKind::Vanished, format!("{vanished}{kernel}"));
    };
    let words = last_words(site);
    let words = words.lines().next_back().unwrap_or_default();
    let colon = if words.is_empty() { "" } else { ": " };
    let kind =
        if ended.signal.is_some() { FailureKind::HypervisorKilled } else { FailureKind::HypervisorExited };
    VmState::failed(kind, format!("propolis-server ended, {ended}{colon}{words}{kernel}"))
}

/// Answers what the server of this VM said last, where it is one of vmkit's own.
pub(super) fn last_words(site: &Site<'_>) -> String {
    if site.claim.options.address.is_some() {
        return String::new();
    }
    let log = tail_of_log(&site.layout.server_log(), LOG_BYTES).unwrap_or_default();
    log::last_words(&String::from_utf8_lossy(&log))
}
