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
use super::probe::RefusalClock;
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
/// How long a guest may be without an SSH server before that is reported: one that has printed a
/// login prompt and refuses connections, and one of which only one of the two is known.
const QUIET: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(60));
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
        let refusals = RefusalClock::default();
        let entering = async {
            let left = deadline.saturating_duration_since(Instant::now());
            self.wait_timed(name, WaitCondition::Ssh, left, refusals.clone()).await?;
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
            error = self.given_up(name, &refusals, &mut last, notice) => return Err(error),
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
        refusals: &RefusalClock,
        last: &mut Option<ReadinessEvidence>,
        notice: &mut (dyn FnMut(String) + Send),
    ) -> Error {
        let (mut failed_since, mut up_since, mut is_told) = (None, None, false);
        loop {
            sleep_until(Instant::now() + LOOK_AGAIN).await;
            let Ok(vm) = self.info(name).await else { continue };
            let evidence = self.look_at_cloud_init(&vm).await;
            let now = Instant::now();
            let over = |since: Option<Instant>| since.map_or(Duration::ZERO, |since| now - since);
            if let Some(evidence) = &evidence {
                failed_since = evidence.has_failed().then(|| failed_since.unwrap_or(now));
                up_since = evidence.is_up.then(|| up_since.unwrap_or(now));
                let grace = if evidence.is_certain { GRACE.0 } else { GRACE.1 };
                if failed_since.is_some() && over(failed_since) >= grace {
                    return Error::CloudInit { vm: name.clone(), is_locked: true, problem: evidence.told() };
                }
            }
            let lacks = evidence.as_ref().and_then(ReadinessEvidence::lacks);
            let sign = lacks.or_else(|| sign_of_no_server(refusals.elapsed(now), over(up_since)));
            if let Some(sign) = sign.filter(|_| !is_told) {
                is_told = true;
                notice(sign);
            }
            *last = evidence.or_else(|| last.take());
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

/// Returns what is odd about a guest that has refused SSH connections, and has shown its login
/// prompt, for so long.
fn sign_of_no_server(refused: Duration, up: Duration) -> Option<String> {
    if refused >= QUIET.1 || refused.min(up) >= QUIET.0 {
        return Some(format!("the guest is up, and has refused SSH connections for {} s", refused.as_secs()));
    }
    (up >= QUIET.1).then(|| "the guest is up, and its SSH server accepts no login yet".to_owned())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::noop::NoopHypervisor;
    use crate::spec::{Boot, CloudInitConfig, GuestAccess, Kernel, NetworkConfig, UserNetwork, VmSpec};
    use crate::store::Home;
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
    use std::net::{Ipv4Addr, SocketAddrV4};

    #[test]
    fn a_prompt_and_a_refusal_together_count_sooner_than_one_of_them() {
        let sign = |refused, up| {
            sign_of_no_server(Duration::from_secs(refused), Duration::from_secs(up)).unwrap_or_default()
        };
        for (refused, up) in [(0, 0), (29, 59), (59, 29)] {
            assert_eq!(sign(refused, up), "");
        }
        assert!(sign(30, 30).ends_with("has refused SSH connections for 30 s"));
        assert!(sign(60, 0).ends_with("has refused SSH connections for 60 s"));
        assert!(sign(0, 60).ends_with("accepts no login yet"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_refuses_ssh_is_reported_once_and_long_before_the_deadline() {
        // A port that is taken and refuses, since nothing listens at it.
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address: SocketAddrV4 = getsockname(&socket).unwrap().try_into().unwrap();
        let port = address.port();
        let dir = tempfile::tempdir().unwrap();
        let manager = VmManager::new(NoopHypervisor::new(), Home::at(dir.path().join("home")).unwrap());
        let name = VmName::new("web").unwrap();
        let kernel = Kernel { path: "/k".into(), initrd: None, cmdline: String::new() };
        let network = NetworkConfig::User(UserNetwork { forwards: Vec::new(), restrict: false });
        let cloud_init =
            CloudInitConfig { access: Some(GuestAccess::generate("vmkit").unwrap()), ..Default::default() };
        let spec = VmSpec::builder(name.clone()).boot(Boot::Kernel(kernel)).network(network);
        manager.create(spec.cloud_init(cloud_init).build().unwrap()).await.unwrap();
        manager.start(&name).await.unwrap();
        manager.add_forward(&name, &format!("{port}:22").parse().unwrap()).await.unwrap();
        let (mut told, began) = (Vec::new(), Instant::now());
        let mut notice = |sign| told.push((began.elapsed(), sign));
        let deadline = began + Duration::from_secs(200);
        let error = manager.enter(&name, deadline, GuestAge::New, &mut notice).await.unwrap_err().to_string();
        assert!(error.contains("nothing in it listens at 127.0.0.1:"), "{error}");
        let [(after, sign)] = &told[..] else { panic!("{told:?}") };
        assert!(sign.contains("the guest is up, and has refused SSH connections for "), "{sign}");
        assert!(*after < Duration::from_secs(100), "{after:?}");
    }
}
