//! Ending a run: ask the guest, then the server, then the kernel. The console's output is logged
//! until the end.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

use super::client::{ClientError, PropolisClient};
use super::console::LogWriter;
use super::context::VmContext;
use super::end::{EndOutcome, EndTimeouts, end};
use super::end_server::end_server;
use super::files;
use super::hold::OperationLock;
use super::instance_spec::InstanceState;
use super::monitor;
use crate::deadline::{later, left};
use crate::error::{Error, ErrorKind, Result};
use crate::steps::step;

/// How long a VM may take to halt after the request: it releases disks and links.
const HALT_LIMIT: Duration = Duration::from_secs(10);
/// The same at a server elsewhere, which can't be ended by force: slow disks delay it.
const HALT_ELSEWHERE_LIMIT: Duration = Duration::from_secs(60);
/// How long to wait for a VM that the server reports as `Creating`, though it has replied that the
/// creation failed.
const MAKING_ANSWERED_LIMIT: Duration = Duration::from_secs(2);
/// How long a server may take to report a VM that it did not show in time.
const LATE_LIMIT: Duration = Duration::from_secs(2);
/// How often the guest is asked again: while it boots it ignores the request, and there is no event
/// for the end of that.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Stops a guest that lives at its server, gracefully until `timeout` has passed.
///
/// # Errors
/// What keeps a server elsewhere from ending its VM, or from reporting that; a VM's own server is
/// ended by force then.
pub(super) async fn stop_guest(
    site: &VmContext<'_>,
    client: &PropolisClient,
    timeout: Duration,
) -> Result<()> {
    let mut keeping = LogWriter::begin(*client, &site.layout, site.vm.spec.console_log());
    if !timeout.is_zero() {
        // The timeout starts when the console is attached.
        let asking = async { ask_guest(site, client, later(timeout)).await };
        let is_gone = match &mut keeping {
            Some(keeping) => keeping.during(asking, |is_gone| *is_gone).await,
            None => asking.await,
        };
        if is_gone {
            mark_asked(site);
            return Ok(());
        }
    }
    // Not earlier: if this is interrupted while the guest is asked, a later end was not requested.
    mark_asked(site);
    step("server: stop the VM").map_err(Error::io("stop the VM of", &site.layout.work))?;
    let ending = end_guest(site, client);
    match &mut keeping {
        // The output up to here is read once more: a VM that is stopped by force prints nothing
        // after that.
        Some(keeping) => keeping.during(ending, |_| true).await,
        None => ending.await,
    }
}

async fn end_guest(site: &VmContext<'_>, client: &PropolisClient) -> Result<()> {
    if site.claim.options.address.is_some() {
        return end_elsewhere(site, client, StopRequest::MayBeAtWork).await;
    }
    // The server is ended by force next in any case.
    if let Err(failure) = end(client, site.vm.id, EndTimeouts::until(Instant::now() + HALT_LIMIT)).await {
        tracing::warn!(%failure, "the server did not stop its VM, so it is ended by force");
    }
    Ok(())
}

/// What is known of a server that was asked for a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopRequest {
    /// The start that asked it was interrupted, or given up: the server may still create the VM.
    MayBeAtWork,
    /// It has replied, or was not reached.
    Answered,
}

/// Ends the VM at a server elsewhere, and records that: a VM that is found there later is not this
/// run.
///
/// A VM that the server may have been asked for just now is waited for.
///
/// # Errors
/// What leaves it unknown whether the VM is gone. If nothing listens, no server has it.
pub(super) async fn end_elsewhere(
    site: &VmContext<'_>,
    client: &PropolisClient,
    asked: StopRequest,
) -> Result<()> {
    let server = files::server(&site.layout)?;
    let begun = Instant::now();
    let limits = EndTimeouts::until(begun + HALT_ELSEWHERE_LIMIT);
    let limits = match asked {
        StopRequest::Answered => limits.with_making(MAKING_ANSWERED_LIMIT),
        StopRequest::MayBeAtWork => {
            match server.and_then(|server| files::watched_until(&site.layout, &server)) {
                Some(until) => {
                    let seconds = until.duration_since(begun).as_secs_f64().ceil();
                    tracing::warn!(address = %client.address, "a start was interrupted just after it had requested the \
                    VM, which may still appear: waiting for at most {seconds} s, to end it");
                    EndTimeouts::until(until + HALT_ELSEWHERE_LIMIT).watching_until(Some(until))
                }
                None => limits,
            }
        }
    };
    match end(client, site.vm.id, limits).await {
        Ok(EndOutcome::Gone) => {}
        Ok(EndOutcome::NeverSeen) => {
            tracing::info!(address = %client.address, "the server has not created the VM that may have been requested");
        }
        Err(ClientError::Refused(error)) => {
            let (address, vm) = (client.address, site.vm.id);
            tracing::warn!(%error, %address, %vm, "nothing listens there, so the VM's server is gone; a server that was \
                killed leaves its VM in the kernel of its host, where bhyvectl --destroy removes it");
        }
        Err(failure) => return Err(failure.into_error(client, "stop the VM", None)),
    }
    if let Some(server) = server {
        files::remember_end(&site.layout, &server);
    }
    Ok(())
}

/// Ends what is left of a run at a server elsewhere, whatever its state.
///
/// # Errors
/// Those of [`end_elsewhere`].
pub(super) async fn clear_elsewhere(site: &VmContext<'_>, client: &PropolisClient) -> Result<()> {
    match files::server(&site.layout)? {
        Some(server) if !files::has_ended(&site.layout, &server) => {
            end_elsewhere(site, client, StopRequest::MayBeAtWork).await
        }
        // The run is regarded as ended, since the server did not show it in time: a last look.
        Some(server) if !server.is_begun => {
            let limits = EndTimeouts::until(Instant::now() + LATE_LIMIT);
            if let Err(failure) = end(client, site.vm.id, limits).await {
                tracing::debug!(%failure, "cannot find out whether the server created the VM late");
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Asks the guest to power off until it has, or the deadline has passed; returns whether it has.
async fn ask_guest(site: &VmContext<'_>, client: &PropolisClient, deadline: Instant) -> bool {
    let Some(power_off) = &site.settings.power_off else { return false };
    let gone = monitor::until(client, |state| state == InstanceState::Failed, deadline);
    let asking = async {
        loop {
            let again = Instant::now() + ASK_EVERY;
            let asked = async {
                let address = site.settings.guest_address(site.vm, &site.claim).await?;
                power_off.power_off(site.vm, address, left(deadline)).await
            };
            match asked.await {
                Ok(()) => return true,
                // Waiting would not help.
                Err(error) if error.kind() == ErrorKind::Unsupported => return false,
                Err(error) => tracing::debug!(%error, "the guest could not be asked to power off"),
            }
            if again >= deadline {
                return true;
            }
            sleep_until(again).await;
        }
    };
    tokio::pin!(gone);
    let ended = tokio::select! {
        ended = &mut gone => ended,
        asked = timeout_at(deadline, asking) => match asked {
            Ok(false) => return false,
            // The guest was asked, or did not reply in time: the monitor reports the result.
            _ => gone.await,
        },
    };
    match ended {
        Ok(state) => state == InstanceState::Destroyed,
        Err(failure) => {
            tracing::debug!(%failure, "the guest did not power itself off in time");
            failure.is_no_instance()
        }
    }
}

/// Records that the end was requested, so that even an end by force leads to `Stopped`.
///
/// A full or a read-only disk is no reason to leave a guest running: an end by force is reported as
/// one from outside then.
pub(super) fn mark_asked(site: &VmContext<'_>) {
    if let Err(error) = files::mark(&site.layout.stop_mark()) {
        tracing::warn!(%error, "cannot record that the VM is being stopped");
    }
}

/// Ends what is left of a run, the guest or only the server, whatever the VM's state.
///
/// # Errors
/// Those of the programs that it runs; for a server elsewhere, what keeps it from ending the VM.
pub(super) async fn clear(site: &VmContext<'_>, hold: &OperationLock) -> Result<()> {
    mark_asked(site);
    match site.claim.options.address {
        Some(address) => clear_elsewhere(site, &site.client(address)).await,
        None => end_server(site, site.host(), hold).await,
    }
}
