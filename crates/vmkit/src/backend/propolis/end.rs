//! Having a server end its VM, whatever became of that.
//!
//! ```text
//!  instance     ──▶ another VM that lives                         gone
//!               ──▶ Destroyed, none (424)   asked for just now:   may come yet: look again
//!                                           else                  gone
//!  Stop         ──▶ taken            ──▶ wait for Destroyed       gone
//!               ──▶ no active VM (424):  Failed                   as Destroyed: it has let go of everything
//!                                        Creating                 still being made: ask again
//!                                        else                     on its way out: wait for its last state
//! ```
//!
//! A server that was asked for a VM asks its host for CPUID, and a DNS for Nexus, before it knows
//! of any: meanwhile it says what it said before, and goes on though nobody waits for its answer.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::client::{ClientError, ClientResult, PropolisClient};
use super::instance_spec::{InstanceReply, InstanceState, RequestedState};
use super::monitor;

/// The pause before a server is asked again that may make a VM yet or still makes it, or that the
/// network did not lead to. No event tells of these: the monitor has none without a VM, and a VM is
/// `Creating` before and after it is made.
const AGAIN: Duration = Duration::from_millis(100);

/// How long the network may fail at a stretch.
const NETWORK_LIMIT: Duration = Duration::from_secs(5);

/// How long a VM is waited for that is still being made. One stays so for good whose server has
/// panicked and lives.
const MAKING_LIMIT: Duration = Duration::from_secs(30);

/// What an ending came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EndOutcome {
    /// The server has let go of everything that the VM had, or has no such VM.
    Gone,
    /// The server may have been asked for the VM, and never had it for as long as that was watched.
    NeverSeen,
}

/// How long each part of an ending may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct EndTimeouts {
    deadline: Instant,
    watched_until: Option<Instant>,
    making: Duration,
}

impl EndTimeouts {
    /// Returns the usual limits of an ending that is over at the deadline.
    pub(super) fn until(deadline: Instant) -> Self {
        Self { deadline, watched_until: None, making: MAKING_LIMIT }
    }

    /// Counts a VM as gone only if the server has none by this instant.
    pub(super) fn watching_until(self, until: Option<Instant>) -> Self {
        Self { watched_until: until, ..self }
    }

    /// Waits no longer than this for a VM that is still being made.
    pub(super) fn with_making(self, making: Duration) -> Self {
        Self { making, ..self }
    }
}

/// What one try to end a VM came to.
enum EndAttempt {
    /// The server has let go of everything.
    Gone,
    /// It has no such VM, or what has become of an earlier run.
    Nothing,
    /// It is still making the VM, and denies to have one.
    Creating,
}

/// Has a server end this VM, and comes back once it has let go of everything that the VM had.
///
/// That it has no such VM is success.
///
/// # Errors
/// `Refused` where nobody listens, so there is no server that could hold anything; any other
/// failure leaves open what runs.
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
                tracing::debug!(%failure, "the server is asked again to end its VM");
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

/// Looks what VM a server has, until it has one that lives or `until` has passed.
///
/// # Errors
/// What keeps the server from telling.
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
    // Of one that had failed before, this is no news.
    let has_failed = |state| state == InstanceState::Failed && there.state != InstanceState::Failed;
    match monitor::until(client, has_failed, deadline).await {
        Err(failure) if !failure.is_no_instance() => Err(failure),
        _ => Ok(EndAttempt::Gone),
    }
}
