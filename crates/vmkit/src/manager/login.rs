//! Logging in to a guest that may still be booting.
//!
//! A guest refuses logins before cloud-init has created its users and installed its host key, and
//! on some systems its SSH server listens before that. So a refusal of a guest that boots is
//! retried, while that of any other guest is an error:
//!
//! ```text
//! nothing listens ──────────────────────────▶ wait for the greeting ─┐
//! too late, or closed before a login ───────▶ growing pauses ────────┼─▶ try again, until the deadline
//! refused, still booting ───────────────────▶ growing pauses ────────┘
//! refused, otherwise ───────────────────────▶ an error at once
//! ```
//!
//! A server that closes the connection, or is late, may have too many other clients: that passes.
//! So that vmkit's own logins are not those clients, each waits for its turn ([`TurnFor`]).
//!
//! OpenSSH (9.8 and later) imposes a penalty of 5 s for a refused login and of 1 s for a connection
//! without a login, such as a probe; and it refuses clients whose penalties exceed 15 s. The pauses
//! between two logins keep below that, without probes in between. Source: sshd_config(5),
//! `PerSourcePenalties`.

use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::wait::hold;
use super::{VmManager, WaitCondition, later};
use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::host::process::{ProcessFd, ProcessId};
use crate::hypervisor::Backend;
use crate::lifecycle::VmState;
use crate::spec::VmName;
use crate::ssh::{Lifeline, LoginOptions, Session, SshTarget, keep, may_pass};
use crate::store::{TurnFor, VmTurn, create_private};

/// How often the state of a VM with an open session is checked.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long a VM whose process has ended may take to report why.
const CAUSE_LIMIT: Duration = Duration::from_secs(3);
/// How long a guest may be silent before its server is regarded as not being up yet: one that has
/// just been started, and any other.
const SILENCE: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(8));
/// How long a guest counts as just started.
const YOUNG: Duration = Duration::from_secs(60);
/// The timeout of the first login. If one took longer, the next one's is twice that: a guest
/// without KVM on a busy host needs seconds for its cryptography.
const ATTEMPT: Duration = Duration::from_secs(30);
/// How often to try a server whose protocol differs from ours.
const TRIES: u32 = 4;
/// The first and the longest pause after a failure that may pass; each is twice the one before,
/// with a random addition.
const PASSING: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(4));
/// How long after the start of a VM without a login so far cloud-init may still be about to create
/// its users.
const BOOTING: Duration = Duration::from_secs(10 * 60);
/// The pauses after the first refusals, and after all later ones.
const PAUSES: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(3), Duration::from_secs(5)];
/// Why the session of a guest that was reset has ended.
const RESTARTED: &str = "the guest was restarted";
/// The file with the run of cloud-init after which a login succeeded.
const ENTERED: &str = "entered";

/// Whether a guest that refuses a login may not have created its users yet.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GuestAge {
    /// According to its record and its age.
    Known,
    /// It has just been created, or is about to run cloud-init again.
    #[cfg(feature = "images")]
    New,
}

impl GuestAge {
    fn is_new(self) -> bool {
        match self {
            GuestAge::Known => false,
            #[cfg(feature = "images")]
            GuestAge::New => true,
        }
    }
}

/// What to do after a failed login.
#[derive(Debug, PartialEq, Eq)]
enum LoginNext {
    /// Return the error.
    Fail,
    /// Try again after a pause, and when the server greets.
    Probe(Duration),
    /// Try again after a pause.
    Pause(Duration),
}

/// How often a login failed.
#[derive(Debug, Default)]
struct LoginFailures {
    all: u32,
    greeted: usize,
}

impl LoginFailures {
    fn next(&mut self, error: &Error, has_greeted: bool, is_booting: bool) -> LoginNext {
        self.all += 1;
        self.greeted += usize::from(has_greeted);
        let is_strange = matches!(error, Error::Ssh { .. }) && (is_booting || self.all < TRIES);
        match error {
            _ if may_pass(error) || is_strange => {
                let doubled = |times: u32| PASSING.0.saturating_mul(1 << times.min(10)).min(PASSING.1);
                match has_greeted {
                    true => LoginNext::Pause(doubled(self.all - 1)),
                    // The first time, the wait for the greeting is over already.
                    false if self.all == 1 => LoginNext::Probe(Duration::ZERO),
                    false => LoginNext::Probe(doubled(self.all - 2)),
                }
            }
            Error::LoginRefused { .. } | Error::HostKey { .. } if is_booting => {
                LoginNext::Pause(PAUSES[self.greeted.saturating_sub(1).min(PAUSES.len() - 1)])
            }
            _ => LoginNext::Fail,
        }
    }

    /// Adds the number of tries to an error that might have passed.
    fn told(&self, error: Error, began: Instant) -> Error {
        match error {
            Error::Ssh { target, problem, source } if self.all > 1 => {
                let seconds = began.elapsed().as_secs_f64();
                let problem = format!("{problem} (the last of {} tries in {seconds:.1} s)", self.all);
                Error::Ssh { target, problem, source }
            }
            error => error,
        }
    }
}

/// Adds up to a half at random, so that clients that were refused together don't return together.
fn scattered(pause: Duration) -> Duration {
    pause + pause * u32::from(uuid::Uuid::new_v4().as_bytes()[0]) / 512
}

impl<H: Backend + 'static> VmManager<H> {
    /// Logs in to a running guest, and waits if its SSH server is not up yet or has too many
    /// clients, or its users are not created yet.
    ///
    /// `timeout` applies to all of it except the time in which other processes log in to the same
    /// guest and this one waits for its turn: at most as long again. The session ends with the VM's
    /// process, if that is one of this host.
    ///
    /// # Errors
    /// Those of [`ssh_target`](Self::ssh_target), [`Session::connect`] and [`wait`](Self::wait). A
    /// refusal of a guest that has accepted a login before, or has been running for ten minutes, is
    /// returned at once.
    pub async fn ssh_session(
        &self,
        name: &VmName,
        login: &LoginOptions,
        timeout: Duration,
    ) -> Result<Session> {
        self.log_in(name, login, later(timeout), GuestAge::Known).await
    }

    /// Logs in as [`ssh_session`](Self::ssh_session) does.
    pub(crate) async fn log_in(
        &self,
        name: &VmName,
        login: &LoginOptions,
        mut deadline: Instant,
        guest: GuestAge,
    ) -> Result<Session> {
        let (began, mut failures, mut limit) = (Instant::now(), LoginFailures::default(), ATTEMPT);
        let last = later(deadline.saturating_duration_since(began).saturating_mul(2));
        let mut refusal = None;
        loop {
            let vm = self.info_in_turn(name, deadline).await?;
            let target = self.target_of(&vm, login).await?;
            let asked = Instant::now();
            let turn = self.turn(name, TurnFor::Login, last).await?;
            // Waiting for other processes is not the guest's fault.
            deadline = last.min(deadline + asked.elapsed());
            let until = deadline.min(Instant::now() + limit);
            let reached = self.visit(&vm, &target, until, deadline).await;
            let has_greeted = reached.is_ok();
            let connected = match reached {
                Ok(stream) => self.over(stream, &vm, &target, until).await,
                Err(error) => Err(error),
            };
            drop(turn);
            let error = match connected {
                Ok(session) => {
                    self.note_entered(&vm).await;
                    return Ok(session);
                }
                Err(error) => error,
            };
            tracing::debug!(vm = %name, %error, "a login failed");
            let is_booting = guest.is_new() || self.is_booting(&vm);
            let next = failures.next(&error, has_greeted, is_booting);
            match next {
                LoginNext::Pause(pause) if Instant::now() + pause < deadline => {
                    self.pause(name, pause).await?
                }
                LoginNext::Probe(pause) if Instant::now() + pause < deadline => {
                    self.pause(name, pause).await?;
                    self.greeted(name, deadline).await?;
                }
                // The refusal says more than that the time is over.
                _ if matches!(error, Error::TimedOut { .. }) => return Err(refusal.unwrap_or(error)),
                _ => return Err(failures.told(error, began)),
            }
            match error {
                Error::TimedOut { .. } => limit *= 2,
                Error::LoginRefused { .. } | Error::HostKey { .. } | Error::Ssh { .. } if has_greeted => {
                    refusal = Some(error);
                }
                _ => {}
            }
        }
    }

    /// Connects, and waits for the server's greeting; a silent server may not be up yet, and is
    /// probed as well.
    ///
    /// The first connection is kept in the meantime: a server that is only slow greets on it, and
    /// is spared others.
    async fn visit(
        &self,
        vm: &VmHandle,
        target: &SshTarget,
        until: Instant,
        deadline: Instant,
    ) -> Result<TcpStream> {
        let mut kept = std::pin::pin!(Session::reach(target, until));
        let is_young = self.is_booting(vm) || age(vm).is_some_and(|age| age < YOUNG);
        let silence = if is_young { SILENCE.0 } else { SILENCE.1 };
        if let Ok(reached) = timeout(silence, &mut kept).await {
            return reached;
        }
        tokio::select! {
            reached = &mut kept => reached,
            greeted = self.greeted(vm.name(), deadline) => {
                greeted?;
                Session::reach(target, deadline.min(Instant::now() + ATTEMPT)).await
            }
        }
    }

    /// Waits for a turn, unless the VM ends. At the deadline, continues without a turn.
    async fn turn(&self, name: &VmName, what: TurnFor, deadline: Instant) -> Result<VmTurn> {
        match self.store.turn_now(name, what).await {
            Some(turn) => Ok(turn),
            None => self.unless_ended(name, self.store.turn(name, what, deadline)).await,
        }
    }

    /// Waits until the server greets, or another process has seen it do so: each connection without
    /// a login burdens the server.
    async fn greeted(&self, name: &VmName, deadline: Instant) -> Result<()> {
        let left = || deadline.saturating_duration_since(Instant::now());
        match self.store.turn_now(name, TurnFor::Greeting).await {
            Some(_turn) => self.wait(name, WaitCondition::Ssh, left()).await.map(drop),
            // Not to the end, so that there is time to report the reply.
            None => self.turn(name, TurnFor::Greeting, Instant::now() + left() * 9 / 10).await.map(drop),
        }
    }

    /// Sleeps, unless the VM ends.
    async fn pause(&self, name: &VmName, pause: Duration) -> Result<()> {
        match pause.is_zero() {
            true => Ok(()),
            false => self.unless_ended(name, sleep(scattered(pause))).await,
        }
    }

    /// Waits for a future, unless the VM ends.
    async fn unless_ended<T>(&self, name: &VmName, awaited: impl Future<Output = T>) -> Result<T> {
        tokio::select! {
            awaited = awaited => Ok(awaited),
            ended = self.wait(name, WaitCondition::Stopped, Duration::MAX) => {
                let vm = ended?;
                let (awaited, console) = (format!("the login in the VM `{name}`"), self.console_tail(&vm).await);
                Err(Error::Ended { awaited, state: vm.state, console })
            }
        }
    }

    /// Returns whether cloud-init may still be about to create the users of this guest.
    fn is_booting(&self, vm: &VmHandle) -> bool {
        let Some(run) = vm.spec.cloud_init().map(|config| config.run) else { return false };
        let entered = std::fs::read_to_string(self.home().kept(vm.name()).join(ENTERED));
        !entered.is_ok_and(|entered| entered == entry(run)) && age(vm).is_some_and(|age| age < BOOTING)
    }

    /// Records that the guest's users exist. If that fails, a later login may wait longer than
    /// necessary.
    async fn note_entered(&self, vm: &VmHandle) {
        let Some(run) = vm.spec.cloud_init().map(|config| config.run) else { return };
        let kept = self.home().kept(vm.name());
        let path = kept.join(ENTERED);
        if std::fs::read_to_string(&path).is_ok_and(|entered| entered == entry(run)) {
            return;
        }
        // Locked, so that the VM can't be removed in the meantime; a process that has the lock may
        // be doing just that.
        let Ok(_locked) = self.store.lock(vm.name(), Instant::now()).await else { return };
        if self.store.read(vm.name()).is_ok_and(|record| record.handle.id == vm.id) {
            let written = create_private(&kept).and_then(|()| keep(&path, &entry(run)));
            if let Err(error) = written {
                tracing::debug!(%error, "cannot record that a login to the guest succeeded");
            }
        }
    }

    /// Logs in over a connection with a greeting. The session ends with the VM if that is a process
    /// of this host: with its process, and with its guest if the kernel panics or the guest is
    /// reset.
    pub(super) async fn over(
        &self,
        stream: TcpStream,
        vm: &VmHandle,
        target: &SshTarget,
        until: Instant,
    ) -> Result<Session> {
        let lifeline = hold(vm)?.map(|process| -> Lifeline {
            let (manager, vm) = (self.clone(), vm.clone());
            Box::pin(async move {
                tokio::select! {
                    end = manager.end_of(&vm, &process) => end,
                    Ok(()) = manager.guest_reset(&vm) => RESTARTED.to_owned(),
                }
            })
        });
        Session::over(stream, target, lifeline, until).await
    }

    /// Waits until no guest runs in the VM any more, and returns why.
    async fn end_of(&self, vm: &VmHandle, process: &ProcessFd) -> String {
        loop {
            // There is no event for a panic.
            match process.wait(Instant::now() + LOOK_AGAIN).await {
                Ok(true) => {
                    let state = timeout(CAUSE_LIMIT, self.state(vm)).await;
                    let Ok(Ok(VmState::Failed { cause })) = state else {
                        return "the VM has ended".to_owned();
                    };
                    return format!("the VM has ended: {}", cause.detail);
                }
                Ok(false) => {}
                // An unknown state ends nothing: the keep-alive does.
                Err(_) => std::future::pending::<()>().await,
            }
            if let Ok(VmState::Failed { cause }) = self.state(vm).await {
                return cause.detail;
            }
        }
    }
}

/// Returns for how long a VM has been running, if it is a process of this host.
fn age(vm: &VmHandle) -> Option<Duration> {
    let pid = vm.run.as_ref().and_then(|run| run.pid)?;
    ProcessId::of(pid).ok().flatten().map(|process| process.age())
}

fn entry(run: u32) -> String {
    format!("{run}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> Error {
        let refused = String::new;
        Error::LoginRefused { target: refused(), user: refused(), description: refused() }
    }

    #[test]
    fn a_refusal_is_final_unless_the_guest_boots_which_is_retried_at_growing_pauses() {
        assert_eq!(LoginFailures::default().next(&refused(), true, false), LoginNext::Fail);
        let mut failures = LoginFailures::default();
        let pauses: Vec<_> = (0..6).map(|_| failures.next(&refused(), true, true)).collect();
        let expected =
            [500, 3000, 5000, 5000, 5000, 5000].map(|ms| LoginNext::Pause(Duration::from_millis(ms)));
        assert_eq!(pauses, expected);
    }

    #[test]
    fn no_series_of_refusals_exceeds_the_penalty_limit_of_openssh() {
        // There were probes before.
        let (mut failures, mut penalty) = (LoginFailures::default(), Duration::from_secs(2));
        for _ in 0..1000 {
            penalty += Duration::from_secs(5);
            assert!(penalty < Duration::from_secs(15), "{penalty:?}");
            let LoginNext::Pause(pause) = failures.next(&refused(), true, true) else {
                panic!("no further try")
            };
            penalty = penalty.saturating_sub(pause);
        }
    }

    #[test]
    fn a_passing_failure_is_retried_without_end_and_another_protocol_a_few_times() {
        let broken = |source: Option<russh::Error>| Error::Ssh {
            target: String::new(),
            problem: String::new(),
            source: source.map(Into::into),
        };
        let tries = |error: &Error, is_booting| {
            let mut failures = LoginFailures::default();
            (0..100).take_while(|_| failures.next(error, true, is_booting) != LoginNext::Fail).count()
        };
        let late = Error::timed_out("", ATTEMPT);
        for passing in [late, broken(None), broken(Some(russh::Error::HUP))] {
            assert_eq!((tries(&passing, false), tries(&passing, true)), (100, 100), "{passing}");
        }
        let strange = broken(Some(russh::Error::KexInit));
        assert_eq!((tries(&strange, false), tries(&strange, true)), (3, 100));
    }

    #[test]
    fn the_pauses_after_a_passing_failure_grow_up_to_a_limit() {
        let late = Error::timed_out("", ATTEMPT);
        let mut failures = LoginFailures::default();
        let pauses: Vec<_> = (0..40).map(|_| failures.next(&late, true, false)).collect();
        let expected =
            [250, 500, 1000, 2000, 4000, 4000].map(|ms| LoginNext::Pause(Duration::from_millis(ms)));
        assert_eq!((&pauses[..6], &pauses[39]), (&expected[..], &expected[5]));
        for _ in 0..100 {
            let pause = scattered(PASSING.1);
            assert!(pause >= PASSING.1 && pause < PASSING.1 * 3 / 2, "{pause:?}");
        }
    }
}
