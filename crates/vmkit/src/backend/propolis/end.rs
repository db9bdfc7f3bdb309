//! Ending the VM of a server, whatever state it is in.
//!
//! ```text
//!  instance     ──▶ another VM that lives                         gone
//!               ──▶ Destroyed, none (424)   requested just now:   may still appear: look again
//!                                           else                  gone
//!  Stop         ──▶ accepted         ──▶ wait for Destroyed       gone
//!               ──▶ no active VM (424):  Failed                   as Destroyed: everything is released
//!                                        Creating                 still being created: ask again
//!                                        else                     ending: wait for its last state
//! ```
//!
//! After a request for a VM, a server asks its host for CPUID, and a DNS for Nexus, before it has
//! one: until then its replies are the same as before. It goes on even if the client is gone.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::client::{ClientError, ClientResult, PropolisClient};
use super::instance_spec::{InstanceReply, InstanceState, RequestedState};
use super::monitor;

/// The pause before asking again: a server that may still create a VM, or is creating it, or that
/// the network did not reach. There is no event: without a VM the monitor has none, and a VM is
/// `Creating` before and after it is created.
const AGAIN: Duration = Duration::from_millis(100);

/// How long the network may fail without a break.
const NETWORK_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait for a VM that is being created. It stays so forever if its server has panicked
/// and still runs.
const MAKING_LIMIT: Duration = Duration::from_secs(30);

/// The result of [`end`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndOutcome {
    /// The server has released everything that the VM had, or has no such VM.
    Gone,
    /// The server may have been asked for the VM, and did not have it until `watched_until`.
    NeverSeen,
}

/// The timeouts of [`end`].
#[derive(Debug, Clone, Copy)]
pub(super) struct EndTimeouts {
    deadline: Instant,
    watched_until: Option<Instant>,
    making: Duration,
}

impl EndTimeouts {
    /// Returns the usual timeouts, up to this deadline.
    pub(super) fn until(deadline: Instant) -> Self {
        Self { deadline, watched_until: None, making: MAKING_LIMIT }
    }

    /// Regards a VM as gone only if the server still has none at this instant.
    pub(super) fn watching_until(self, until: Option<Instant>) -> Self {
        Self { watched_until: until, ..self }
    }

    /// Waits at most this long for a VM that is being created.
    pub(super) fn with_making(self, making: Duration) -> Self {
        Self { making, ..self }
    }
}

/// The result of one attempt to end a VM.
enum EndAttempt {
    /// The server has released everything.
    Gone,
    /// The server has no such VM, or only the last state of an earlier run.
    Nothing,
    /// The server is creating the VM, and can't end it yet.
    Creating,
}

/// Ends this VM of a server; returns when the server has released everything that the VM had.
///
/// A server without this VM is success.
///
/// # Errors
/// `Refused` if nothing listens, so there is no server that could hold anything; after any other
/// failure it is unknown what runs.
pub(super) async fn end(client: &PropolisClient, id: Uuid, limits: EndTimeouts) -> ClientResult<EndOutcome> {
    let began = Instant::now();
    let (mut heard, mut making) = (began, None);
    loop {
        match end_once(client, id, limits.deadline).await {
            Ok(EndAttempt::Gone) => return Ok(EndOutcome::Gone),
            Ok(EndAttempt::Nothing) => match limits.watched_until {
                None => return Ok(EndOutcome::Gone),
                Some(until) if Instant::now() >= until => return Ok(EndOutcome::NeverSeen),
                Some(_) => (heard, making) = (Instant::now(), None),
            },
            Ok(EndAttempt::Creating) => {
                heard = Instant::now();
                if making.get_or_insert(heard).elapsed() >= limits.making {
                    return Err(ClientError::StillMaking(limits.making));
                }
            }
            Err(failure) if failure.is_of_the_network() && heard.elapsed() < NETWORK_LIMIT => {
                tracing::debug!(%failure, "could not reach the server to end its VM; trying again");
            }
            Err(failure) => return Err(failure),
        }
        if Instant::now() + AGAIN >= limits.deadline {
            return Err(match making {
                Some(since) => ClientError::StillMaking(since.elapsed()),
                None => ClientError::TimedOut(began.elapsed()),
            });
        }
        sleep(AGAIN).await;
    }
}

/// Waits until the server has a VM that lives, or `until` has passed; returns the server's VM.
///
/// # Errors
/// What kept the server from replying.
pub(super) async fn shown(
    client: &PropolisClient,
    until: Instant,
    deadline: Instant,
) -> ClientResult<Option<InstanceReply>> {
    loop {
        let there = match client.instance(deadline).await {
            Err(failure) if failure.is_no_instance() => None,
            there => Some(there?),
        };
        let lives =
            |there: &InstanceReply| !matches!(there.state, InstanceState::Destroyed | InstanceState::Failed);
        if there.as_ref().is_some_and(lives) || Instant::now() >= until.min(deadline) {
            return Ok(there);
        }
        sleep(AGAIN).await;
    }
}

async fn end_once(client: &PropolisClient, id: Uuid, deadline: Instant) -> ClientResult<EndAttempt> {
    let there = match client.instance(deadline).await {
        Err(failure) if failure.is_no_instance() => return Ok(EndAttempt::Nothing),
        there => there?,
    };
    match there.state {
        InstanceState::Destroyed => return Ok(EndAttempt::Nothing),
        InstanceState::Failed if there.properties.id != id => return Ok(EndAttempt::Nothing),
        _ if there.properties.id != id => return Ok(EndAttempt::Gone),
        _ => {}
    }
    match client.request(RequestedState::Stop, deadline).await {
        Err(failure) if failure.is_no_instance() => match there.state {
            InstanceState::Failed => return Ok(EndAttempt::Nothing),
            InstanceState::Creating => return Ok(EndAttempt::Creating),
            _ => {}
        },
        told => told?,
    }
    // A VM that had failed before doesn't change to `Failed` again.
    let has_failed = |state| state == InstanceState::Failed && there.state != InstanceState::Failed;
    match monitor::until(client, has_failed, deadline).await {
        Err(failure) if !failure.is_no_instance() => Err(failure),
        _ => Ok(EndAttempt::Gone),
    }
}
