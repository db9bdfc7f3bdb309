//! Processes that are named without doubt: [`ProcessId`], and [`ProcessFd`] to signal and await
//! one.
//!
//! A PID alone names nothing: the process may have ended and its number gone to a stranger. The
//! PID, the start time and the boot together are never used twice. Even those are compared only
//! after the process was taken hold of, by a pidfd or by a file of illumos's `/proc`: from then on
//! the kernel itself keeps the descriptor bound to that one process.

#[cfg(target_os = "illumos")]
mod illumos;
#[cfg(target_os = "linux")]
mod linux;
#[cfg(any(target_os = "illumos", test))]
mod psinfo;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

#[cfg(target_os = "illumos")]
pub(crate) use illumos::{ProcessFd, boot_id};
#[cfg(target_os = "linux")]
pub(crate) use linux::{ProcessFd, boot_id};

/// Names one process of one boot, for as long as anybody remembers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// The number; never to be signalled by itself.
    pub(crate) pid: u32,
    /// When the process began: on Linux in clock ticks after the boot, on illumos in nanoseconds
    /// after 1970.
    pub(crate) start_time: u64,
    /// The boot in which the number and the time mean anything.
    pub(crate) boot_id: Uuid,
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::Signal;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;
    use tokio::time::Instant;

    fn sleeper() -> (Child, ProcessId) {
        let child = Command::new("sleep").arg("300").stdin(Stdio::null()).spawn().unwrap();
        let id = ProcessId::of(child.id()).unwrap().unwrap();
        (child, id)
    }

    fn in_a_minute() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn this_process_is_alive_and_its_identity_survives_json() {
        let me = ProcessId::of(std::process::id()).unwrap().unwrap();
        let text = serde_json::to_string(&me).unwrap();
        assert_eq!(serde_json::from_str::<ProcessId>(&text).unwrap(), me);
        assert!(me.open().unwrap().unwrap().is_alive().unwrap());
    }

    #[test]
    fn a_number_with_another_start_time_or_boot_is_another_process() {
        let me = ProcessId::of(std::process::id()).unwrap().unwrap();
        assert!(ProcessId { start_time: me.start_time + 1, ..me }.open().unwrap().is_none());
        assert!(ProcessId { boot_id: Uuid::nil(), ..me }.open().unwrap().is_none());
    }

    #[test]
    fn a_number_that_cannot_be_a_pid_is_no_process() {
        let me = ProcessId::of(std::process::id()).unwrap().unwrap();
        for pid in [0, u32::MAX, i32::MAX as u32, 1 << 31] {
            assert!(ProcessId { pid, ..me }.open().unwrap().is_none(), "{pid}");
            assert_eq!(ProcessId::of(pid).unwrap(), None, "{pid}");
        }
    }

    #[tokio::test]
    async fn a_zombie_is_gone_and_signalling_it_is_no_error() {
        let (mut child, id) = sleeper();
        let held = id.open().unwrap().unwrap();
        held.signal(Signal::KILL).unwrap();
        assert!(held.wait(in_a_minute()).await.unwrap());
        // Not waited for yet, so this is a zombie.
        assert!(!held.is_alive().unwrap());
        assert_eq!(ProcessId::of(child.id()).unwrap(), None);
        assert!(id.open().unwrap().is_none());
        held.signal(Signal::TERM).unwrap();
        child.wait().unwrap();
        assert!(!held.is_alive().unwrap());
        held.signal(Signal::TERM).unwrap();
    }

    #[tokio::test]
    async fn waiting_ends_at_the_deadline_and_again_at_the_end() {
        let (mut child, id) = sleeper();
        let held = id.open().unwrap().unwrap();
        assert!(!held.wait(Instant::now() + Duration::from_millis(20)).await.unwrap());
        assert!(!held.wait(Instant::now() - Duration::from_secs(1)).await.unwrap());
        let two = async { tokio::join!(held.wait(in_a_minute()), held.wait(in_a_minute())) };
        let (waited, ()) = tokio::join!(two, async { held.signal(Signal::TERM).unwrap() });
        assert!(waited.0.unwrap() && waited.1.unwrap());
        child.wait().unwrap();
    }
}
