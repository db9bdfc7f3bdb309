//! Listing all VMs without waiting for any.

use std::path::PathBuf;
use std::time::Duration;

use tokio::task::{JoinError, JoinSet, yield_now};
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::spec::VmName;
use crate::store::{Intent, VmRecord, stranger};

use super::ephemeral::is_ephemeral;
use super::{STATE_PATIENCE, VmManager};

/// How long all VMs together have to reply.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many VMs are queried before the first replies are read.
const BATCH: usize = 16;

/// One VM in a list, or what has its place.
#[derive(Debug)]
#[non_exhaustive]
pub struct VmEntry {
    /// The VM's name.
    pub name: VmName,
    /// The VM's directory.
    pub path: PathBuf,
    /// The VM with its current state, or why that is unknown.
    pub handle: Result<VmHandle>,
    /// The VM as it was recorded, if its state is unknown.
    pub recorded: Option<VmHandle>,
    /// The operation in progress, or the one that was interrupted.
    pub intent: Option<Intent>,
    /// Whether that was interrupted: no process works on the VM.
    pub interrupted: bool,
}

impl VmEntry {
    /// Returns whether the VM is ephemeral: `remove_orphans` may remove it.
    pub fn is_ephemeral(&self) -> bool {
        self.known().is_some_and(|vm| is_ephemeral(&vm.spec))
    }

    /// Returns the VM with its current state if known, otherwise as it was recorded.
    pub(crate) fn known(&self) -> Option<&VmHandle> {
        self.handle.as_ref().ok().or(self.recorded.as_ref())
    }
}

impl<H: Backend + 'static> VmManager<H> {
    /// Returns all VMs sorted by name, each with its current state.
    ///
    /// Takes no lock and queries all at the same time. A VM that has not replied after a second is
    /// listed with `TimedOut`, and one whose record can't be used with the problem.
    ///
    /// # Errors
    /// `Io` or `Host` if the home can't be read; never for a single VM.
    pub async fn list(&self) -> Result<Vec<VmEntry>> {
        let deadline = Instant::now() + PATIENCE;
        let names = self.store.names()?;
        let mut listed: Vec<Option<VmEntry>> = Vec::new();
        listed.resize_with(names.len(), || None);
        let mut asked = JoinSet::new();
        let mut take = |answer: std::result::Result<(usize, Option<VmEntry>), JoinError>| match answer {
            Ok((place, answer)) => listed[place] = answer,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        for (place, name) in names.into_iter().enumerate() {
            let manager = self.clone();
            asked.spawn(async move { (place, manager.list_one(name, deadline).await) });
            // Most have replied by then, and the memory of their queries is reused for the next
            // ones.
            if place % BATCH == BATCH - 1 {
                yield_now().await;
                while let Some(answer) = asked.try_join_next() {
                    take(answer);
                }
            }
        }
        while let Some(answer) = asked.join_next().await {
            take(answer);
        }
        Ok(listed.into_iter().flatten().collect())
    }

    /// Returns one VM as [`list`](Self::list) does, or `None` if there is nothing of that name.
    ///
    /// Waits for the VM: it has as long to reply as for any operation, and is queried a second
    /// time.
    pub async fn find(&self, name: &VmName) -> Option<VmEntry> {
        let once = || self.list_one(name.clone(), Instant::now() + STATE_PATIENCE);
        match once().await {
            Some(VmEntry { handle: Err(Error::TimedOut { .. }), .. }) => once().await,
            found => found,
        }
    }

    /// Returns all VMs as they were recorded, sorted by name, without asking a backend; unreadable
    /// records are skipped.
    ///
    /// # Errors
    /// `Io` or `Host` if the home can't be read.
    #[cfg(all(feature = "images", feature = "ssh", feature = "vmfile"))]
    pub(crate) fn recorded(&self) -> Result<Vec<VmHandle>> {
        let records = self.store.names()?.into_iter().filter_map(|name| self.store.read(&name).ok());
        Ok(records.map(|record| record.handle).collect())
    }

    async fn list_one(&self, name: VmName, deadline: Instant) -> Option<VmEntry> {
        match self.store.read_now(&name) {
            Ok((record, is_cut_off)) => Some(self.listed(name, record, is_cut_off, deadline).await),
            Err(error) => self.unread(name, error),
        }
    }

    async fn listed(&self, name: VmName, record: VmRecord, is_cut_off: bool, deadline: Instant) -> VmEntry {
        let intent = record.intent.clone();
        let began = Instant::now();
        let state = timeout_at(deadline, self.look(&record, is_cut_off)).await.unwrap_or_else(|_| {
            let awaited = format!("the state of the VM `{name}`");
            Err(Error::timed_out(awaited, began.elapsed()))
        });
        let (handle, recorded) = match state {
            Ok(state) => (Ok(record.handle.in_state(state)), None),
            Err(error) => (Err(error), Some(record.handle)),
        };
        VmEntry { path: self.home().vm(&name), name, handle, recorded, intent, interrupted: is_cut_off }
    }

    /// Returns the entry for a directory whose record can't be read; `None` if it has nothing of a
    /// VM.
    fn unread(&self, name: VmName, error: Error) -> Option<VmEntry> {
        let path = self.home().vm(&name);
        let error = match error {
            Error::NotFound { .. } => {
                let left = stranger(&path).ok()??;
                let problem = "the VM's directory has no record".to_owned();
                Error::record(left, problem)
            }
            error => error,
        };
        Some(VmEntry { name, path, handle: Err(error), recorded: None, intent: None, interrupted: false })
    }
}
