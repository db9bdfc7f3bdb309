//! Ending a run: ask the guest, then the server, then the kernel; and keep what the console says to its end.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};

use super::Site;
use super::client::{Client, Failure};
use super::console::Keeping;
use super::end::end;
use super::files;
use super::hold::Hold;
use super::instance_spec::InstanceState;
use super::monitor;
use super::start::end_server;
use crate::deadline::later;
use crate::error::{Error, ErrorKind, Result};
use crate::steps::step;

/// How long a VM may take to halt once its server was told: it lets go of disks and links.
pub(super) const HALT_LIMIT: Duration = Duration::from_secs(10);
/// How long the console may take to tell its last words once the VM is gone.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(500);
/// How often the guest is asked again: one that is still booting hears only a later question, and there is no event for "the
/// guest can be reached now".
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Stops a guest that lives at its server, gracefully until `timeout` has passed.
///
/// # Errors
/// Whatever keeps a server elsewhere from ending its VM, or from telling; one of vmkit's own is ended by force then.
pub(super) async fn stop_guest(site: &Site<'_>, client: &Client, timeout: Duration) -> Result<()> {
    let mut keeping = Keeping::begin(*client, &site.layout, site.vm.spec.console_log());
    let mut console = None;
    if let Some(keeping) = &mut keeping {
        keeping.history().await;
        console = keeping.attach().await;
    }
    let ending = end_guest(site, client, timeout);
    let (Some(keeping), Some(console)) = (&mut keeping, console) else { return ending.await };
    let followed = later(timeout.saturating_add(HALT_LIMIT + LAST_WORDS_LIMIT));
    let following = keeping.follow(console, followed);
    tokio::pin!(ending, following);
    let ended = tokio::select! {
        ended = &mut ending => ended,
        () = &mut following => return ending.await,
    };
    let _ = timeout_at(Instant::now() + LAST_WORDS_LIMIT, following).await;
    ended
}

async fn end_guest(site: &Site<'_>, client: &Client, timeout: Duration) -> Result<()> {
    if !timeout.is_zero() && ask_guest(site, client, later(timeout)).await {
        mark_asked(site);
        return Ok(());
    }
    // Not before: if this is cut off while the guest is asked, a later end from outside is still one from outside.
    mark_asked(site);
    step("server: stop the VM").map_err(Error::io("stop the VM of", &site.layout.work))?;
    if site.claim.options.address.is_some() {
        return end_elsewhere(site, client, Instant::now() + HALT_LIMIT).await;
    }
    // Its end by force follows in any case.
    if let Err(failure) = end(client, site.vm.id, Instant::now() + HALT_LIMIT).await {
        tracing::warn!(%failure, "the server did not stop its VM, so it is ended by force");
    }
    Ok(())
}

/// Has a server elsewhere end the VM, and remembers that it did: whatever is found there from then on is not this run.
///
/// # Errors
/// Whatever leaves open whether the VM is gone. Where nobody listens, no server has it.
pub(super) async fn end_elsewhere(site: &Site<'_>, client: &Client, deadline: Instant) -> Result<()> {
    match end(client, site.vm.id, deadline).await {
        Ok(()) => {}
        Err(Failure::Refused(error)) => {
            let (address, vm) = (client.address, site.vm.id);
            tracing::warn!(%error, %address, %vm, "nobody listens there, so the VM's server is gone; one that was \
                killed leaves its VM in the kernel of its host, where bhyvectl --destroy takes it away");
        }
        Err(failure) => return Err(failure.into_error(client, "stop the VM", None)),
    }
    if let Some(server) = files::server(&site.layout)? {
        files::remember_end(&site.layout, &server);
    }
    Ok(())
}

/// Asks the guest to power itself off until it has, or the deadline has passed; answers whether it has.
async fn ask_guest(site: &Site<'_>, client: &Client, deadline: Instant) -> bool {
    let Some(power_off) = &site.settings.power_off else { return false };
    let gone = monitor::until(client, |state| state == InstanceState::Failed, deadline);
    let asking = async {
        loop {
            let again = Instant::now() + ASK_EVERY;
            let asked = async {
                let address = site.settings.guest_address(site.vm, &site.claim).await?;
                power_off.power_off(site.vm, address, deadline.into_std()).await
            };
            match asked.await {
                Ok(()) => return true,
                // Waiting would not give the guest an ear.
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
            // The guest was asked, or did not hear in time: what comes of it the monitor tells.
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

/// Writes down that the end was asked for, so that even an end by force counts as `Stopped`.
///
/// A full or a read-only disk is no reason to leave a guest running: then an end by force looks like one from outside.
pub(super) fn mark_asked(site: &Site<'_>) {
    if let Err(error) = files::mark(&site.layout.stop_mark()) {
        tracing::warn!(%error, "cannot write down that the VM is being stopped");
    }
}

/// Ends whatever is left of a run, the guest's or only the server's, whatever state its VM is in.
///
/// # Errors
/// Those of the programs that are needed for it; where the server is elsewhere, whatever keeps it from ending the VM.
pub(super) async fn clear(site: &Site<'_>, hold: &Hold) -> Result<()> {
    mark_asked(site);
    match site.claim.options.address {
        Some(address) if files::may_run(&site.layout)? => {
            end_elsewhere(site, &site.client(address), Instant::now() + HALT_LIMIT).await
        }
        Some(_) => Ok(()),
        None => end_server(site, site.host(), hold).await,
    }
}
