//! The clock of a guest that goes on after it was paused, where its backend could not set it.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::VmManager;
use crate::error::{ErrorKind, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::spec::{NetworkConfig, VmName};
use crate::ssh::{LoginOptions, Session, SshTarget, may_pass};

/// How long the guest's SSH server has to greet in one attempt: a busy emulated guest takes
/// seconds.
const GREETING: Duration = Duration::from_secs(15);
/// How long all of it may take: logins, and the next second of the clock, on a slow guest several
/// times.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a guest that refuses or closes connections is tried: its SSH server does not run, or
/// has too many logins for the moment. A busy one greets late, and is tried until `LIMIT`.
const REFUSED_LIMIT: Duration = Duration::from_secs(5);
/// The pause before another attempt.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a pause has to be for a clock that is behind by it to be worth a warning.
const NOTICED: Duration = Duration::from_secs(1);

impl<H: Backend + 'static> VmManager<H> {
    /// Returns how long a VM has been paused, by when that was recorded.
    pub(super) fn paused_for(&self, name: &VmName) -> Option<Duration> {
        self.store.changed_at(name)?.elapsed().ok()
    }

    /// Sets the clock of a guest that has gone on over SSH, where vmkit has a login; what can't be
    /// done is warned of.
    pub(super) async fn set_clock(&self, vm: &VmHandle, paused: Option<Duration>) {
        let by_ssh = match vm.run.as_ref().and_then(|run| run.pid) {
            Some(_) if has_login(vm) => Some(self.set_clock_by_ssh(vm).await),
            // Not a guest of this host's.
            None => return,
            Some(_) => None,
        };
        let why = match by_ssh {
            Some(Ok(())) => return,
            Some(Err(error)) => format!("no guest agent set it, and by SSH: {}", error.chain()),
            None => "no guest agent set it, and vmkit has no login by SSH".to_owned(),
        };
        match paused {
            Some(paused) if paused < NOTICED => {
                tracing::debug!(vm = %vm.name(), "the clock was not set: {why}")
            }
            _ => tracing::warn!(
                "the clock of the guest in the VM `{}` may be behind by as long as it was suspended: {why}",
                vm.name()
            ),
        }
    }

    async fn set_clock_by_ssh(&self, vm: &VmHandle) -> Result<()> {
        let deadline = Instant::now() + LIMIT;
        let target = self.target_of(vm, &LoginOptions::default()).await?;
        attempt_until(deadline, || self.set_clock_once(vm, &target, deadline)).await
    }

    async fn set_clock_once(&self, vm: &VmHandle, target: &SshTarget, deadline: Instant) -> Result<()> {
        let stream = Session::reach(target, deadline.min(Instant::now() + GREETING)).await?;
        let session = self.over(stream, vm, target, deadline).await?;
        let set = session.set_clock(deadline).await;
        session.close().await;
        set
    }
}

/// Tries until it works, it fails in a way that does not pass, or there is no time for another
/// attempt.
async fn attempt_until<F: Future<Output = Result<()>>>(
    deadline: Instant,
    mut attempt: impl FnMut() -> F,
) -> Result<()> {
    let refused_deadline = deadline.min(Instant::now() + REFUSED_LIMIT);
    loop {
        let tried = attempt().await;
        let until = match &tried {
            Err(error) if error.kind() == ErrorKind::TimedOut => deadline,
            _ => refused_deadline,
        };
        match tried {
            Err(error) if may_pass(&error) && Instant::now() + PAUSE < until => {
                tracing::debug!(%error, "the clock was not set, and is tried again");
                sleep(PAUSE).await;
            }
            tried => return tried,
        }
    }
}

fn has_login(vm: &VmHandle) -> bool {
    let access = vm.spec.cloud_init().and_then(|config| config.access.as_ref());
    access.is_some() && !matches!(vm.spec.network(), NetworkConfig::None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, Subject};

    #[tokio::test(start_paused = true)]
    async fn what_passes_is_tried_again_until_the_deadline_and_nothing_else_is() {
        let tries = async |failing: usize, error: fn() -> Error| {
            let mut tries = 0;
            let attempt = || {
                tries += 1;
                std::future::ready(if tries <= failing { Err(error()) } else { Ok(()) })
            };
            let result = attempt_until(Instant::now() + LIMIT, attempt).await;
            (tries, result.is_ok())
        };
        let late: fn() -> Error = || Error::timed_out("a greeting", GREETING);
        assert_eq!(tries(3, late).await, (4, true));
        assert_eq!(tries(usize::MAX, late).await, (120, false));
        let refused: fn() -> Error = || Error::Ssh {
            target: "vmkit@web".into(),
            problem: "the connection was closed".into(),
            source: None,
        };
        assert_eq!(tries(3, refused).await, (4, true));
        assert_eq!(tries(usize::MAX, refused).await, (10, false));
        assert_eq!(tries(3, || Error::not_found(Subject::Vm, "web")).await, (1, false));
    }
}
