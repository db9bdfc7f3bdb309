//! Walks a backend along any sequence of operations, beside the table of the lifecycle.

use proptest::prelude::*;
use vmkit::lifecycle::{Operation, VmState};
use vmkit::{Backend, ErrorKind, VmHandle};

use crate::conformance::{CaseStop, Conformance, apply, check, judge};

/// One step of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalkStep {
    /// What is done.
    pub operation: Operation,
    /// Whether it is given the handle that `prepare` answered, and not the newest.
    pub old_handle: bool,
}

/// Returns a strategy for walks of at most `length` steps, in which `destroy` is rare.
pub fn steps(length: usize) -> impl Strategy<Value = Vec<WalkStep>> {
    let operation = prop_oneof![
        1 => Just(Operation::Prepare),
        4 => Just(Operation::Start),
        4 => Just(Operation::Stop),
        4 => Just(Operation::Suspend),
        4 => Just(Operation::Resume),
        2 => Just(Operation::Save),
        2 => Just(Operation::Snapshot),
        1 => Just(Operation::Restore),
        1 => Just(Operation::Export),
        1 => Just(Operation::Clone),
        1 => Just(Operation::Destroy),
    ];
    let step =
        (operation, any::<bool>()).prop_map(|(operation, old_handle)| WalkStep { operation, old_handle });
    prop::collection::vec(step, 0..=length)
}

/// Prepares a VM, takes `steps` with it, and destroys it; `Err` says where the backend left the
/// table, and how.
///
/// `name` must be free.
///
/// # Errors
/// The step at which the backend did something else than the contract says, and what that was.
pub async fn along<H: Backend>(
    backend: &H,
    options: &Conformance,
    name: vmkit::spec::VmName,
    steps: &[WalkStep],
) -> Result<(), String> {
    let spec = (options.spec)(name);
    let made = backend.prepare(&spec).await.map_err(|error| format!("the first prepare failed: {error}"))?;
    let mut walk = RandomWalk { backend, options, old: made.clone(), new: made, state: VmState::Prepared };
    let mut failure = None;
    for (index, step) in steps.iter().enumerate() {
        if let Err(stop) = walk.take(*step).await {
            failure = Some(format!("step {index}, {step:?}: {stop:?}"));
            break;
        }
    }
    let destroyed = walk.take(WalkStep { operation: Operation::Destroy, old_handle: false }).await;
    let destroyed = destroyed.map_err(|stop| format!("the last destroy: {stop:?}"));
    failure.map_or(destroyed, Err)
}

/// Returns whether there is a snapshot to restore.
async fn has_snapshots<H: Backend>(backend: &H, vm: &VmHandle) -> Result<bool, CaseStop> {
    let tag = backend.tag();
    match backend.abilities(&tag).snapshots() {
        // A VM that is destroyed may have none, or not be found.
        Some(snapshots) => Ok(snapshots.snapshots(vm).await.is_ok_and(|all| !all.is_empty())),
        None => Ok(false),
    }
}

struct RandomWalk<'a, H> {
    backend: &'a H,
    options: &'a Conformance,
    old: VmHandle,
    new: VmHandle,
    /// Where the table says the VM is.
    state: VmState,
}

impl<H: Backend> RandomWalk<'_, H> {
    async fn take(&mut self, step: WalkStep) -> Result<(), CaseStop> {
        if step.operation == Operation::Prepare {
            return self.prepare().await;
        }
        let vm = if step.old_handle { &self.old } else { &self.new };
        if step.operation == Operation::Restore && !has_snapshots(self.backend, vm).await? {
            return Ok(());
        }
        let answer = apply(self.backend, self.options, vm, step.operation).await?;
        let case = (vm, &self.state, step.operation);
        if let Some(handle) = judge(self.backend, self.options, case, answer).await? {
            self.state = handle.state.clone();
            self.new = handle;
        }
        Ok(())
    }

    async fn prepare(&mut self) -> Result<(), CaseStop> {
        let answer = self.backend.prepare(&self.old.spec).await;
        if self.state == VmState::Destroyed {
            self.new = answer?;
            self.old = self.new.clone();
            self.state = VmState::Prepared;
            return Ok(());
        }
        let kind = answer.as_ref().err().map(vmkit::Error::kind);
        check(kind == Some(ErrorKind::AlreadyExists), || format!("a second prepare answered {answer:?}"))
    }
}
