//! The one table of a VM's life: which operation is legal in which state, and which state follows.
//!
//! Pure: every backend, the manager, the CLI and the tests call [`next`]; no other code decides.
//!
//! ```text
//!             prepare
//!    Preparing ─────▶ Prepared ──start──▶ Running ◀──resume── Suspended
//!                        │                 │   └───suspend───────▲ │
//!                        └──────stop────▶ Stopped ◀─────stop───────┘
//!                                          │ ▲
//!            Failed ──start──▶ Running     │ └──stop── Failed
//!    save: from Running and Suspended to Saved; start and resume: from Saved to Running
//!    snapshot and export: the state stays; restore: from every state to Stopped, or to Saved with memory
//!    destroy: from every state to Destroyed
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a VM is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "state")]
#[non_exhaustive]
pub enum VmState {
    /// `prepare` is at work, or was interrupted: only `destroy` is legal.
    Preparing,
    /// Everything is created, and the VM has never been started.
    Prepared,
    /// The vCPUs run.
    Running,
    /// The vCPUs are paused; the guest keeps its memory.
    Suspended,
    /// Nothing runs, and the guest's memory is on disk: the guest continues from there.
    Saved,
    /// The guest was stopped or powered itself off; the disks are kept.
    Stopped,
    /// The VM ended in another way, or hangs.
    Failed {
        /// Why.
        cause: FailureCause,
    },
    /// The VM is gone.
    Destroyed,
}

/// Why a VM is [`VmState::Failed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureCause {
    /// Which kind of failure.
    pub kind: FailureKind,
    /// What is known, for a person: the exit status, the last lines of the log, a register dump.
    pub detail: String,
}

/// The kinds of failure that a caller may tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FailureKind {
    /// The hypervisor's process ended by itself with an error.
    HypervisorExited,
    /// The hypervisor's process was killed by a signal that vmkit did not send.
    HypervisorKilled,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The hardware virtualisation could not go on (KVM internal error).
    InternalError,
    /// A disk failed, or the host ran out of space under the guest.
    DiskError,
    /// The process is gone, and nothing is left that says why.
    Vanished,
    /// An operation of vmkit was interrupted and could not be finished.
    Interrupted,
    /// Something else; the detail says what.
    Other,
}

/// The operations that change a VM's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Allocates what the spec needs.
    Prepare,
    /// Boots the guest.
    Start,
    /// Shuts the guest down, by force when the timeout has passed.
    Stop,
    /// Pauses the vCPUs.
    Suspend,
    /// Unpauses the vCPUs.
    Resume,
    /// Writes the guest's memory to disk, and ends the hypervisor's process.
    Save,
    /// Takes a snapshot.
    Snapshot,
    /// Returns to a snapshot.
    Restore,
    /// Writes the VM to a file that another home imports.
    Export,
    /// Creates a VM as a copy of this one.
    Clone,
    /// Removes everything.
    Destroy,
}

/// An operation that is not legal in a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {operation} a VM that is {state}{}", hint(.state, .operation))]
pub struct InvalidTransition {
    /// The state the VM is in.
    pub state: VmState,
    /// The operation that was requested.
    pub operation: Operation,
}

/// Returns the state that follows `operation` in `state`.
///
/// Returns the same state where there is nothing to do, which is success.
///
/// # Errors
/// [`InvalidTransition`] if the operation is not legal in that state.
pub fn next(state: &VmState, operation: Operation) -> Result<VmState, InvalidTransition> {
    use Operation as Op;
    use VmState::{Destroyed, Failed, Prepared, Preparing, Running, Saved, Stopped, Suspended};
    let to = match (operation, state) {
        (Op::Destroy, _) => Destroyed,
        (Op::Prepare, Preparing) => Prepared,
        (Op::Start, Prepared | Running | Saved | Stopped | Failed { .. }) => Running,
        (Op::Stop, Prepared | Running | Suspended | Saved | Stopped | Failed { .. }) => Stopped,
        (Op::Suspend, Running | Suspended) => Suspended,
        (Op::Resume, Running | Suspended | Saved) => Running,
        (Op::Save, Running | Suspended | Saved) => Saved,
        (Op::Snapshot, Prepared | Running | Suspended | Stopped) => state.clone(),
        (Op::Export, Prepared | Saved | Stopped) => state.clone(),
        (Op::Clone, Prepared | Stopped) => state.clone(),
        // Or `Saved`, with the memory of the snapshot.
        (Op::Restore, Prepared | Running | Suspended | Saved | Stopped | Failed { .. }) => Stopped,
        (_, state) => return Err(InvalidTransition { state: state.clone(), operation }),
    };
    Ok(to)
}

fn hint(state: &VmState, operation: &Operation) -> &'static str {
    match (operation, state) {
        (Operation::Start, VmState::Suspended) => ": resume it",
        (Operation::Suspend, VmState::Saved) => ": its memory is on disk already",
        (Operation::Snapshot, VmState::Saved) => ": start it first",
        (Operation::Snapshot, VmState::Failed { .. }) => ": start it again, or stop it",
        (Operation::Export, VmState::Running | VmState::Suspended) => ": stop it, or save it to disk",
        (Operation::Export, VmState::Failed { .. }) => ": stop it",
        (Operation::Clone, VmState::Running | VmState::Suspended) => {
            ": stop it first, or clone one of its snapshots"
        }
        (Operation::Clone, VmState::Saved | VmState::Failed { .. }) => {
            ": start and stop it first, or clone one of its snapshots"
        }
        (Operation::Suspend | Operation::Resume | Operation::Save, VmState::Prepared | VmState::Stopped) => {
            ": start it first"
        }
        (Operation::Suspend | Operation::Resume | Operation::Save, VmState::Failed { .. }) => {
            ": start it again"
        }
        (Operation::Destroy, VmState::Running | VmState::Suspended) => ": stop it first, or use force",
        (_, VmState::Destroyed) => ": its removal was interrupted; remove it again",
        (_, VmState::Preparing) => ": its creation was interrupted; remove it",
        _ => "",
    }
}

impl VmState {
    /// Creates a `Failed` with its cause.
    pub fn failed(kind: FailureKind, detail: impl Into<String>) -> Self {
        VmState::Failed { cause: FailureCause { kind, detail: detail.into() } }
    }

    /// Returns the state's bare name, such as `running`.
    pub fn name(&self) -> &'static str {
        match self {
            VmState::Preparing => "preparing",
            VmState::Prepared => "prepared",
            VmState::Running => "running",
            VmState::Suspended => "suspended",
            VmState::Saved => "saved",
            VmState::Stopped => "stopped",
            VmState::Failed { .. } => "failed",
            VmState::Destroyed => "destroyed",
        }
    }

    /// Returns whether a guest's vCPUs exist in this state, running or paused.
    pub fn is_live(&self) -> bool {
        matches!(self, VmState::Running | VmState::Suspended)
    }

    /// Returns whether the guest's memory exists, in a process or on disk: what is changed of the
    /// VM waits for the next boot.
    pub fn has_memory(&self) -> bool {
        self.is_live() || *self == VmState::Saved
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for FailureCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Operation::Prepare => "prepare",
            Operation::Start => "start",
            Operation::Stop => "stop",
            Operation::Suspend => "suspend",
            Operation::Resume => "resume",
            Operation::Save => "save",
            Operation::Snapshot => "snapshot",
            Operation::Restore => "restore",
            Operation::Export => "export",
            Operation::Clone => "clone",
            // As people say it, and the command: `vmkit rm`.
            Operation::Destroy => "remove",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the contract: a row per operation, a column per state.
    #[test]
    fn the_table_is_the_one_of_the_contract() {
        use Operation as Op;
        let states = [
            VmState::Prepared,
            VmState::Running,
            VmState::Suspended,
            VmState::Saved,
            VmState::Stopped,
            VmState::failed(FailureKind::Other, "x"),
        ];
        let table = [
            (Op::Start, ["running", "running", "error", "running", "running", "running"]),
            (Op::Stop, ["stopped"; 6]),
            (Op::Suspend, ["error", "suspended", "suspended", "error", "error", "error"]),
            (Op::Resume, ["error", "running", "running", "running", "error", "error"]),
            (Op::Save, ["error", "saved", "saved", "saved", "error", "error"]),
            (Op::Snapshot, ["prepared", "running", "suspended", "error", "stopped", "error"]),
            (Op::Restore, ["stopped"; 6]),
            (Op::Export, ["prepared", "error", "error", "saved", "stopped", "error"]),
            (Op::Clone, ["prepared", "error", "error", "error", "stopped", "error"]),
            (Op::Destroy, ["destroyed"; 6]),
        ];
        for (operation, row) in table {
            for (state, expected) in states.iter().zip(row) {
                let found = next(state, operation);
                let found = found.as_ref().map_or("error", VmState::name);
                assert_eq!(found, expected, "{operation} of {state}");
            }
        }
    }

    #[test]
    fn starting_a_suspended_vm_suggests_resume() {
        let error = next(&VmState::Suspended, Operation::Start).unwrap_err();
        assert_eq!(error.to_string(), "cannot start a VM that is suspended: resume it");
    }

    #[test]
    fn a_state_survives_its_text() {
        let state = VmState::failed(FailureKind::GuestPanic, "panic");
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(text, r#"{"state":"failed","cause":{"kind":"guest-panic","detail":"panic"}}"#);
        assert_eq!(serde_json::from_str::<VmState>(&text).unwrap(), state);
    }
}
