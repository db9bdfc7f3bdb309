//! Waiting until vmkit can log in to a guest and its cloud-init has finished, across reboots,
//! unless that has become impossible.
//!
//! cloud-init can reboot its own guest, or end before there is an SSH server. The first is a
//! connection that is lost and restored; the second is reported by the guest agent, if it replies,
//! and otherwise by what the guest printed on its console.

mod evidence;

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use self::evidence::ReadinessEvidence;
use super::login::GuestAge;
use super::{VmManager, WaitCondition};
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::lifecycle::VmState;
use crate::spec::VmName;
use crate::ssh::{CloudInitStatus, LoginOptions, Session};

/// How often the progress of cloud-init is checked in a guest without SSH.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// The timeout of a guest agent's reply.
const ANSWER: Duration = Duration::from_secs(30);
/// How long after the failed end of cloud-init an SSH server may still appear: the agent's report
/// is certain, the console's is not.
const GRACE: (Duration, Duration) = (Duration::from_secs(20), Duration::from_secs(60));
/// How long a guest that is up may be without an SSH server before that is reported.
const QUIET: Duration = Duration::from_secs(60);
/// How often in a row the watch on cloud-init may be lost without a result.
const MOST_FRUITLESS: u32 = 4;

impl<H: Backend + 'static> VmManager<H> {
    /// Waits until the guest's SSH server accepts vmkit's login, and logs in; gives up if
    /// cloud-init has failed in the guest and no server appears. Calls `notice` once if something
    /// is odd about a guest that is up.
    ///
    /// # Errors
    /// Those of [`wait`](Self::wait) and [`ssh_session`](Self::ssh_session), each with cloud-init's
    /// own errors if they are known; `Guest` with only these if they are the reason to give up.
    pub(crate) async fn enter(
        &self,
        name: &VmName,
        deadline: Instant,
        guest: GuestAge,
        notice: &mut (dyn FnMut(String) + Send),
    ) -> Result<Session> {
        let entering = async {
            self.wait(name, WaitCondition::Ssh, deadline.saturating_duration_since(Instant::now())).await?;
            self.log_in(name, &LoginOptions::default(), deadline, guest).await
        };
        let mut last = None;
        let error = tokio::select! {
            // A login takes precedence over a reason to give up.
            biased;
            entered = entering => match entered {
                Ok(session) => return Ok(session),
                Err(error) => error,
            },
            error = self.given_up(name, &mut last, notice) => return Err(error),
        };
        Err(match last.filter(|evidence| !evidence.errors.is_empty()) {
            Some(evidence) => with_reason(error, &evidence.told()),
            None => error,
        })
    }

    /// Returns why vmkit will not be able to log in, when that is known. There is no event for the
    /// progress of cloud-init in a guest without SSH, so it is polled.
    async fn given_up(
        &self,
        name: &VmName,
        last: &mut Option<ReadinessEvidence>,
        notice: &mut (dyn FnMut(String) + Send),
    ) -> Error {
        let (mut failed_since, mut up_since, mut is_told) = (None, None, false);
        loop {
            sleep_until(Instant::now() + LOOK_AGAIN).await;
            let Ok(vm) = self.info(name).await else { continue };
            let Some(evidence) = self.look_at_cloud_init(&vm).await else { continue };
            let now = Instant::now();
            failed_since = evidence.has_failed().then(|| failed_since.unwrap_or(now));
            up_since = evidence.is_up.then(|| up_since.unwrap_or(now));
            let grace = if evidence.is_certain { GRACE.0 } else { GRACE.1 };
            let is_over = |since: Option<Instant>, grace| since.is_some_and(|since| now - since >= grace);
            if is_over(failed_since, grace) {
                return Error::CloudInit { vm: name.clone(), is_locked: true, problem: evidence.told() };
            }
            let lacks = evidence.lacks();
            if !is_told && (lacks.is_some() || is_over(up_since, QUIET)) {
                is_told = true;
                let sign = lacks
                    .unwrap_or_else(|| "the guest is up, and its SSH server accepts no login yet".to_owned());
                notice(sign);
            }
            *last = Some(evidence);
        }
    }

    /// Waits until cloud-init has finished, including the reboots that it requests; returns the
    /// session that is open then. Reports each stage to `progressed`.
    ///
    /// # Errors
    /// `TimedOut`; `InvalidState` if the guest powers off; `Guest` if it accepts no login any more.
    pub(crate) async fn cloud_init_through(
        &self,
        name: &VmName,
        mut session: Option<Session>,
        deadline: Instant,
        mut progressed: impl FnMut(&CloudInitStatus),
    ) -> Result<(Session, CloudInitStatus)> {
        let (mut fruitless, began) = (0, Instant::now());
        // Errors and warnings before a reboot: the guest forgets them.
        let (mut errors, mut warnings) = (Vec::new(), Vec::new());
        loop {
            let current = match session.take() {
                Some(session) => session,
                None => self.again(name, began, deadline).await?,
            };
            let mut last = None;
            let watched = current.watch_cloud_init(deadline, |now| {
                last = Some(now.clone());
                progressed(now);
            });
            match watched.await {
                Ok(mut done) => {
                    done.errors = together(errors, done.errors);
                    done.warnings = together(warnings, done.warnings);
                    return Ok((current, done));
                }
                // Lost, for example by a reboot.
                Err(Error::Ssh { .. })
                    if Instant::now() < deadline && (last.is_some() || fruitless < MOST_FRUITLESS) =>
                {
                    fruitless = if last.is_none() { fruitless + 1 } else { 0 };
                    let (earlier, warned) = last.map(|last| (last.errors, last.warnings)).unwrap_or_default();
                    errors.extend(earlier);
                    warnings.extend(warned);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Determines the progress of cloud-init in a guest without SSH.
    async fn look_at_cloud_init(&self, vm: &VmHandle) -> Option<ReadinessEvidence> {
        if let Some(evidence) = self.ask_agent(vm).await {
            return Some(evidence);
        }
        let log = vm.console_log.as_deref()?;
        Some(evidence::of_console(&super::tail::this_run(log, vm.console_since.as_ref())?))
    }

    /// Asks the guest agent, if it replies and may run programs.
    async fn ask_agent(&self, vm: &VmHandle) -> Option<ReadinessEvidence> {
        let agent = self.abilities_of(vm).guest_agent()?;
        // The timeout for an agent that is not there is shorter than that of a slow program.
        if !agent.agent_responds(vm, LOOK_AGAIN).await.ok()? {
            return None;
        }
        let output = agent.agent_exec(vm, "/bin/sh", &["-c", evidence::ASK], ANSWER).await.ok()?;
        evidence::of_answer(&output.stdout)
    }

    /// Logs in again to a guest whose connection was lost while its cloud-init was running.
    async fn again(&self, name: &VmName, began: Instant, deadline: Instant) -> Result<Session> {
        let error = match self.log_in(name, &LoginOptions::default(), deadline, GuestAge::New).await {
            Ok(session) => return Ok(session),
            Err(error) => error,
        };
        let awaited = format!("the end of cloud-init in the VM `{name}`");
        match error {
            Error::NotLive { state, .. } | Error::Ended { state, .. } => {
                let awaited = match state {
                    VmState::Stopped => format!("{awaited}, whose guest powered off"),
                    _ => awaited,
                };
                let console = match self.info(name).await {
                    Ok(vm) => self.console_tail(&vm).await,
                    Err(_) => None,
                };
                Err(Error::Ended { awaited, state, console })
            }
            Error::TimedOut { awaited: what, console, .. } => {
                let awaited = format!("{awaited}, and after its SSH connection was lost for {what}");
                Err(Error::TimedOut { awaited, after: began.elapsed(), console })
            }
            error => Err(error),
        }
    }
}

/// Joins two lists without duplicates.
fn together(mut before: Vec<String>, now: Vec<String>) -> Vec<String> {
    before.retain(|said| !now.contains(said));
    before.extend(now);
    before.dedup();
    before
}

/// Adds cloud-init's errors to an error.
fn with_reason(error: Error, reason: &str) -> Error {
    let said = format!("cloud-init in it failed: {reason}");
    match error {
        Error::TimedOut { awaited, after, console } => {
            Error::TimedOut { awaited: format!("{awaited}; {said}"), after, console }
        }
        Error::LoginRefused { target, user, description } => {
            Error::LoginRefused { target, user, description: format!("{description}; {said}") }
        }
        error => error,
    }
}
