//! Whose turn it is to log in to a VM's guest, among all processes of one home.
//!
//! An SSH server turns visitors away where ten have not logged in yet (`MaxStartups`,
//! sshd_config(5)), and an emulated guest needs a second of its CPU for each login: of forty at
//! once each would take longer than it may. So a few log in at the same time, one waits for the
//! server to come up, and the others wait for them.
//!
//! A turn is the kernel's lock on a file of the VM that is there in any case and that nothing else
//! locks. So it dies with its process, leaves nothing behind and needs no file of its own. A record
//! that is replaced meanwhile lets one more in, which harms nothing; where the file can't be
//! locked, there are no turns.

use std::fs::File;
use std::path::PathBuf;

use tokio::time::Instant;
use uuid::Uuid;

use super::RecordStore;
use super::files::{MADE, SINCE};
use super::lock::{FileLock, LockMode, locked};
use crate::spec::VmName;

/// What a turn is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TurnFor {
    /// A login: two at a time.
    Login,
    /// Waiting for the server to come up: one at a time.
    Greeting,
}

/// A turn, until this is dropped.
#[derive(Debug)]
pub(crate) struct VmTurn {
    #[cfg_attr(not(test), expect(dead_code, reason = "held, and let go of with the turn"))]
    lock: Option<FileLock>,
}

impl VmTurn {
    /// Checks whether this is more than leave to go on without one.
    #[cfg(test)]
    fn is_one(&self) -> bool {
        self.lock.is_some()
    }
}

impl RecordStore {
    /// Takes a turn where one is free, or where there are none to be had.
    pub(crate) async fn turn_now(&self, name: &VmName, what: TurnFor) -> Option<VmTurn> {
        let mut is_taken = false;
        for path in self.seats(name, what) {
            match File::open(&path) {
                Ok(file) => match locked(file, &path, LockMode::Alone, Instant::now()).await {
                    Ok(lock) => return Some(VmTurn { lock: Some(lock) }),
                    Err(error) => is_taken |= matches!(error, crate::Error::Busy { .. }),
                },
                Err(error) => tracing::debug!(%error, "no turn can be taken at {}", path.display()),
            }
        }
        (!is_taken).then_some(VmTurn { lock: None })
    }

    /// Waits for a turn until the deadline, after which there is none.
    pub(crate) async fn turn(&self, name: &VmName, what: TurnFor, deadline: Instant) -> VmTurn {
        if let Some(turn) = self.turn_now(name, what).await {
            return turn;
        }
        let seats = self.seats(name, what);
        // Not all at the same one.
        let one = usize::from(Uuid::new_v4().as_bytes()[0]) % seats.len();
        match File::open(&seats[one]) {
            Ok(file) => VmTurn { lock: locked(file, &seats[one], LockMode::Alone, deadline).await.ok() },
            Err(_) => VmTurn { lock: None },
        }
    }

    fn seats(&self, name: &VmName, what: TurnFor) -> Vec<PathBuf> {
        let dir = self.home.vm(name);
        match what {
            TurnFor::Login => [MADE, SINCE].map(|record| dir.join(record)).to_vec(),
            TurnFor::Greeting => vec![dir],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Home;
    use std::time::Duration;

    #[tokio::test]
    async fn two_log_in_at_a_time_and_the_next_one_waits_for_a_turn_and_not_for_ever() {
        let temp = tempfile::tempdir().unwrap();
        let store = RecordStore::new(Home::at(temp.path()).unwrap());
        let name = VmName::new("web").unwrap();
        assert!(store.turn_now(&name, TurnFor::Login).await.is_some(), "without files there are no turns");
        let dir = temp.path().join("vms/web");
        std::fs::create_dir_all(&dir).unwrap();
        for record in [MADE, SINCE] {
            std::fs::write(dir.join(record), "{}").unwrap();
        }
        let first = store.turn_now(&name, TurnFor::Login).await.unwrap();
        let second = store.turn_now(&name, TurnFor::Login).await.unwrap();
        assert!(first.is_one() && second.is_one());
        assert!(store.turn_now(&name, TurnFor::Login).await.is_none());
        let began = Instant::now();
        let none = store.turn(&name, TurnFor::Login, began + Duration::from_millis(50)).await;
        assert!(!none.is_one());
        let greeting = store.turn_now(&name, TurnFor::Greeting).await.unwrap();
        assert!(greeting.is_one() && store.turn_now(&name, TurnFor::Greeting).await.is_none());
        drop((first, second));
        assert!(store.turn(&name, TurnFor::Login, began + Duration::from_secs(60)).await.is_one());
    }
}
