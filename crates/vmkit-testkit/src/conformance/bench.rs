//! What a case works on: the backend, and the VMs that the case has made of it.

use std::fmt::Write;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;
use vmkit::abilities::{CloneRequest, DynSnapshots, MemoryMode};
use vmkit::lifecycle::{Operation, VmState, next};
use vmkit::spec::{SnapshotName, VmName, VmSpec};
use vmkit::{Backend, Capabilities, Error, ErrorKind, VmHandle};

use super::options::Conformance;

/// Why the cases about `Saved` are skipped where they are.
pub(crate) const CANT_SAVE: &str = "the backend can't save a guest to disk";
/// Why the cases about `Suspended` are skipped where they are.
pub(crate) const CANT_SUSPEND: &str = "the backend can't suspend";

/// The result of a case.
pub(crate) type CaseResult = Result<(), CaseStop>;

/// Why a case ends early.
#[derive(Debug)]
pub(crate) enum CaseStop {
    /// The backend does not keep the contract.
    Failed(String),
    /// This can't be tried here.
    Skipped(String),
}

impl From<Error> for CaseStop {
    fn from(error: Error) -> Self {
        CaseStop::Failed(format!("it failed: {}", chain(&error)))
    }
}

/// Fails with what `otherwise` says, unless `holds`.
pub(crate) fn check(holds: bool, otherwise: impl FnOnce() -> String) -> CaseResult {
    if holds { Ok(()) } else { Err(CaseStop::Failed(otherwise())) }
}

fn chain(error: &Error) -> String {
    let mut text = format!("{error} [{:?}]", error.kind());
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}

/// What the contract says of an operation in a state.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum ExpectedOutcome {
    /// It succeeds and leads there.
    To(VmState),
    /// It fails as one of these kinds.
    Refusal(&'static [ErrorKind]),
}

/// Returns what the contract says of `operation` in `state`.
pub(crate) fn expected(
    capabilities: &Capabilities,
    state: &VmState,
    operation: Operation,
) -> ExpectedOutcome {
    let denied = match operation {
        Operation::Suspend | Operation::Resume => !capabilities.suspend,
        Operation::Save => !capabilities.save_to_disk,
        Operation::Snapshot | Operation::Restore => !capabilities.snapshots,
        Operation::Export => !capabilities.export,
        Operation::Clone => !capabilities.clones,
        _ => false,
    };
    match (next(state, operation), state) {
        // Nothing is left that could tell which state it was in.
        (Err(_), VmState::Destroyed | VmState::Preparing) if !denied => {
            ExpectedOutcome::Refusal(&[ErrorKind::InvalidState, ErrorKind::NotFound])
        }
        (Err(_), VmState::Destroyed | VmState::Preparing) => {
            ExpectedOutcome::Refusal(&[ErrorKind::InvalidState, ErrorKind::NotFound, ErrorKind::Unsupported])
        }
        (Err(_), _) if denied => ExpectedOutcome::Refusal(&[ErrorKind::InvalidState, ErrorKind::Unsupported]),
        (Err(_), _) => ExpectedOutcome::Refusal(&[ErrorKind::InvalidState]),
        (Ok(_), _) if denied => ExpectedOutcome::Refusal(&[ErrorKind::Unsupported]),
        (Ok(state), _) => ExpectedOutcome::To(state),
    }
}

/// Runs one operation other than `prepare`; for `destroy`, returns the handle in `Destroyed`.
///
/// Fails the case where the operation does not end in its time.
pub(crate) async fn apply<H: Backend>(
    backend: &H,
    options: &Conformance,
    vm: &VmHandle,
    operation: Operation,
) -> Result<vmkit::Result<VmHandle>, CaseStop> {
    let grace = options.grace;
    match operation {
        Operation::Start => within("start", options.start_limit + grace, backend.start(vm)).await,
        Operation::Stop => {
            let timeout = options.stop_timeout;
            within("stop", timeout + grace, backend.stop(vm, timeout)).await
        }
        Operation::Suspend => within("suspend", grace, backend.suspend(vm)).await,
        Operation::Resume => within("resume", grace, backend.resume(vm)).await,
        Operation::Save => {
            let tag = backend.tag();
            match backend.abilities(&tag).save_to_disk() {
                Some(disk) => within("save", grace, disk.save(vm)).await,
                None => Ok(Err(Error::Unsupported { backend: tag, what: "saving a guest".to_owned() })),
            }
        }
        Operation::Snapshot | Operation::Restore => {
            let tag = backend.tag();
            match backend.abilities(&tag).snapshots() {
                Some(snapshots) => {
                    within(
                        "snapshot or restore",
                        grace,
                        apply_to_snapshots(backend, snapshots, vm, operation),
                    )
                    .await
                }
                None => Ok(Err(Error::Unsupported { backend: tag, what: "snapshots".to_owned() })),
            }
        }
        Operation::Export => {
            let tag = backend.tag();
            match backend.abilities(&tag).export() {
                Some(export) => {
                    let exported = within("export", grace, export.export(vm, MemoryMode::Include)).await?;
                    Ok(exported.map(|exported| vm.clone().in_state(exported.vm.state.clone())))
                }
                None => Ok(Err(Error::Unsupported { backend: tag, what: "exports".to_owned() })),
            }
        }
        Operation::Clone => {
            let tag = backend.tag();
            let Some(clones) = backend.abilities(&tag).clones() else {
                return Ok(Err(Error::Unsupported { backend: tag, what: "clones".to_owned() }));
            };
            let request = CloneRequest::new((options.spec)(new_clone_name()).with_id(Uuid::new_v4()));
            match within("create_clone", grace, clones.create_clone(vm, &request)).await? {
                Ok(clone) => {
                    within("destroy", grace, backend.destroy(clone)).await??;
                    let state = within("state", grace, backend.state(vm)).await?;
                    Ok(state.map(|state| vm.clone().in_state(state)))
                }
                Err(error) => Ok(Err(error)),
            }
        }
        Operation::Destroy => {
            let gone = within("destroy", grace, backend.destroy(vm.clone())).await?;
            Ok(gone.map(|()| vm.clone().in_state(VmState::Destroyed)))
        }
        Operation::Prepare => within("prepare", grace, backend.prepare(&vm.spec)).await,
    }
}

/// Takes a snapshot of the disks with a new name, or restores the newest one.
async fn apply_to_snapshots<H: Backend>(
    backend: &H,
    snapshots: DynSnapshots<'_>,
    vm: &VmHandle,
    operation: Operation,
) -> vmkit::Result<VmHandle> {
    if operation == Operation::Restore {
        let newest = snapshots.snapshots(vm).await?.pop();
        let newest = newest.ok_or_else(|| Error::not_found(vmkit::error::Subject::Snapshot, "any"))?;
        return snapshots.restore_snapshot(vm, &newest.name).await;
    }
    snapshots.create_snapshot(vm, &new_snapshot_name(), MemoryMode::DisksOnly).await?;
    let state = backend.state(vm).await?;
    Ok(vm.clone().in_state(state))
}

/// Returns a name that no other snapshot has.
pub(crate) fn new_snapshot_name() -> SnapshotName {
    static LAST: AtomicU32 = AtomicU32::new(0);
    let number = LAST.fetch_add(1, Ordering::Relaxed);
    SnapshotName::new(format!("snapshot-{number}")).expect("letters, digits and a hyphen")
}

/// Returns a name that no other clone has.
pub(crate) fn new_clone_name() -> VmName {
    static LAST: AtomicU32 = AtomicU32::new(0);
    let number = LAST.fetch_add(1, Ordering::Relaxed);
    VmName::new(format!("clone-{number}")).expect("letters, digits and a hyphen")
}

/// Compares what an operation answered with what the contract says, and with what the backend then
/// says of the VM.
///
/// `vm` is the handle that the operation was given, `before` the state that the VM really was in.
pub(crate) async fn judge<H: Backend>(
    backend: &H,
    options: &Conformance,
    (vm, before, operation): (&VmHandle, &VmState, Operation),
    answer: vmkit::Result<VmHandle>,
) -> Result<Option<VmHandle>, CaseStop> {
    let what = format!("{operation} of a VM that is {before}");
    let (after, handle) =
        match (expected(&backend.abilities(&backend.tag()).capabilities(), before, operation), answer) {
            (ExpectedOutcome::To(state), Ok(handle)) => (state, Some(handle)),
            (ExpectedOutcome::To(state), Err(error)) => {
                return Err(CaseStop::Failed(format!(
                    "{what} must lead to {state}, but failed: {}",
                    chain(&error)
                )));
            }
            (ExpectedOutcome::Refusal(kinds), Ok(handle)) => {
                return Err(CaseStop::Failed(format!(
                    "{what} must fail ({kinds:?}), but led to {}",
                    handle.state
                )));
            }
            (ExpectedOutcome::Refusal(kinds), Err(error)) => {
                check(kinds.contains(&error.kind()), || {
                    format!("{what} must fail as one of {kinds:?}, but: {}", chain(&error))
                })?;
                (before.clone(), None)
            }
        };
    if let Some(handle) = &handle {
        check(handle.state == after, || format!("{what} answered a handle in {}", handle.state))?;
        check(handle.id == vm.id, || format!("{what} answered a handle of another VM, {}", handle.id))?;
        check(handle.spec == vm.spec, || format!("{what} answered a handle with another spec"))?;
        check(handle.backend == backend.tag(), || {
            format!("{what} answered a handle of the backend {}", handle.backend)
        })?;
        // What a suspend or resume knows of the run is what it was given.
        let told = operation == Operation::Start || vm.run.is_some();
        check(if after.is_live() { handle.run.is_some() || !told } else { handle.run.is_none() }, || {
            format!("{what} answered a handle in {after} with the run {:?}", handle.run)
        })?;
    }
    let found = within("state", options.grace, backend.state(vm)).await??;
    check(found == after, || format!("after {what} the backend says {found:?}, not {after:?}"))?;
    Ok(handle)
}

pub(crate) async fn within<T>(
    what: &str,
    limit: Duration,
    future: impl Future<Output = T>,
) -> Result<T, CaseStop> {
    let endless = |_| CaseStop::Failed(format!("{what} has not ended after {} s", limit.as_secs_f64()));
    timeout(limit, future).await.map_err(endless)
}

/// A state that a case can bring a VM to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Situation {
    Prepared,
    Running,
    Suspended,
    Saved,
    Stopped,
    Failed,
}

impl Situation {
    pub(crate) const ALL: [Situation; 6] =
        [Self::Prepared, Self::Running, Self::Suspended, Self::Saved, Self::Stopped, Self::Failed];
}

/// The backend under test and what the case has made of it.
pub(crate) struct CaseBench<H> {
    pub(crate) backend: H,
    pub(crate) options: Conformance,
    make: Arc<dyn Fn() -> H + Send + Sync>,
    made: Mutex<Vec<VmHandle>>,
}

impl<H: Backend> CaseBench<H> {
    pub(super) fn new(make: Arc<dyn Fn() -> H + Send + Sync>, options: Conformance) -> Self {
        Self { backend: make(), options, make, made: Mutex::default() }
    }

    /// Returns what the backend says that it can do.
    pub(crate) fn capabilities(&self) -> Capabilities {
        self.backend.abilities(&self.backend.tag()).capabilities()
    }

    /// Returns another instance over the same VMs.
    pub(crate) fn another(&self) -> H {
        (self.make)()
    }

    /// Returns a spec with a name that no other VM has, and without an identity.
    pub(crate) fn spec(&self) -> VmSpec {
        static LAST: AtomicU32 = AtomicU32::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed);
        let name = format!("conformance-{}-{number}", std::process::id());
        (self.options.spec)(VmName::new(name).expect("letters, digits and hyphens, short"))
    }

    /// Registers this VM to be destroyed at the end of the case.
    pub(crate) fn remember(&self, vm: &VmHandle) {
        self.made.lock().expect("nothing panics while it holds the list").push(vm.clone());
    }

    /// Prepares a VM.
    pub(crate) async fn prepare(&self, spec: &VmSpec) -> Result<vmkit::Result<VmHandle>, CaseStop> {
        let prepared = within("prepare", self.options.grace, self.backend.prepare(spec)).await?;
        if let Ok(vm) = &prepared {
            self.remember(vm);
        }
        Ok(prepared)
    }

    /// Prepares a VM with a new name.
    pub(crate) async fn prepared(&self) -> Result<VmHandle, CaseStop> {
        Ok(self.prepare(&self.spec()).await??)
    }

    /// Brings a new VM to a state and returns its newest handle, with the state that the backend
    /// says it is in.
    ///
    /// Skips the case where the backend has no way there.
    pub(crate) async fn bring_to(&self, situation: Situation) -> Result<VmHandle, CaseStop> {
        let vm = self.prepared().await?;
        self.lead_to(vm, situation).await
    }

    /// Brings a prepared VM to a state, as [`bring_to`](Self::bring_to) does.
    pub(crate) async fn lead_to(&self, vm: VmHandle, situation: Situation) -> Result<VmHandle, CaseStop> {
        let vm = match situation {
            Situation::Prepared => vm,
            Situation::Running => self.apply(&vm, Operation::Start).await??,
            Situation::Suspended => {
                if !self.capabilities().suspend {
                    return Err(CaseStop::Skipped(CANT_SUSPEND.into()));
                }
                let vm = self.apply(&vm, Operation::Start).await??;
                self.apply(&vm, Operation::Suspend).await??
            }
            Situation::Saved => {
                if !self.capabilities().save_to_disk {
                    return Err(CaseStop::Skipped(CANT_SAVE.into()));
                }
                let vm = self.apply(&vm, Operation::Start).await??;
                self.apply(&vm, Operation::Save).await??
            }
            Situation::Stopped => {
                let vm = self.apply(&vm, Operation::Start).await??;
                within("stop", self.options.grace, self.backend.stop(&vm, Duration::ZERO)).await??
            }
            Situation::Failed => {
                let Some(break_vm) = &self.options.break_vm else {
                    return Err(CaseStop::Skipped("the suite has no way to make a VM fail".into()));
                };
                let vm = self.apply(&vm, Operation::Start).await??;
                break_vm(&vm);
                let state = self.state(&vm).await?;
                vm.in_state(state)
            }
        };
        let found = self.state(&vm).await?;
        let wanted = format!("{situation:?}").to_lowercase();
        check(found.name() == wanted, || format!("a VM brought to {wanted} says it is {found:?}"))?;
        Ok(vm)
    }

    /// Runs an operation in its time.
    pub(crate) async fn apply(
        &self,
        vm: &VmHandle,
        operation: Operation,
    ) -> Result<vmkit::Result<VmHandle>, CaseStop> {
        apply(&self.backend, &self.options, vm, operation).await
    }

    /// Runs an operation and judges its answer, which is the newest handle where there is one.
    pub(crate) async fn try_out(
        &self,
        vm: &VmHandle,
        before: &VmState,
        operation: Operation,
    ) -> Result<Option<VmHandle>, CaseStop> {
        let answer = self.apply(vm, operation).await?;
        judge(&self.backend, &self.options, (vm, before, operation), answer).await
    }

    /// Asks the backend for a VM's state.
    pub(crate) async fn state(&self, vm: &VmHandle) -> Result<VmState, CaseStop> {
        Ok(within("state", self.options.grace, self.backend.state(vm)).await??)
    }

    /// Fails unless `wanted` guests run for a VM, if the backend's test can count them.
    pub(crate) fn check_guests(&self, vm: &VmHandle, wanted: usize) -> CaseResult {
        let Some(count) = &self.options.count_guests else { return Ok(()) };
        let found = count(vm);
        check(found == wanted, || format!("{found} guests run for the VM, not {wanted}"))
    }

    /// Destroys a VM and fails unless it is gone, by its handle and by what an unfinished `prepare`
    /// leaves of one.
    pub(crate) async fn check_destroyed(&self, vm: &VmHandle) -> CaseResult {
        self.apply(vm, Operation::Destroy).await??;
        let found = self.state(vm).await?;
        check(found == VmState::Destroyed, || format!("after destroy the VM is {found:?}"))?;
        self.check_guests(vm, 0)
    }

    /// Returns the handle that a caller has of a `prepare` that has not ended.
    pub(crate) fn preparing(&self, spec: &VmSpec, id: Uuid) -> VmHandle {
        VmHandle::preparing(id, self.backend.tag(), spec.clone().with_id(id))
    }

    /// Destroys all that the case has made, and fails where that fails or leaves something behind.
    pub(super) async fn clean(&self) -> CaseResult {
        let made = std::mem::take(&mut *self.made.lock().expect("nothing panics while it holds the list"));
        let mut verdict = Ok(());
        for vm in made {
            let destroyed = self.check_destroyed(&vm).await;
            verdict = verdict.and(destroyed);
        }
        verdict?;
        let left = self.options.find_leftovers.as_ref().map(|find| find()).unwrap_or_default();
        check(left.is_empty(), || format!("all VMs are destroyed, and this is left:\n{}", left.join("\n")))
    }
}
