//! The one table of a VM's life: which operation is legal in which state, and where it leads.
//!
//! Pure: every backend, the manager, the CLI and the tests ask [`next`]; nobody else decides.
//!
//! ```text
//!             prepare
//!    Preparing ─────▶ Prepared ──start──▶ Running ◀──resume── Suspended
//!                        │                 │   └───suspend───────▲ │
//!                        └──────stop────▶ Stopped ◀─────stop───────┘
//!                                          │ ▲
//!            Failed ──start──▶ Running     │ └──stop── Failed
//!    destroy: from every state to Destroyed
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where a VM is in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "state")]
#[non_exhaustive]
pub enum VmState {
    /// `prepare` is at work, or was cut off: only `destroy` is legal.
    Preparing,
    /// Everything is there, and it has never been started.
    Prepared,
    /// The vCPUs run.
    Running,
    /// The vCPUs are paused, the guest's memory is kept.
    Suspended,
    /// The guest has ended, the disks are kept.
    Stopped,
    /// It ended, or hangs, in a way nobody asked for.
    Failed {
        /// Why.
        cause: FailureCause,
    },
    /// It is gone.
    Destroyed,
}

/// Why a VM is [`VmState::Failed`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailureCause {
    /// Which kind of failure.
    pub kind: FailureKind,
    /// What is known, for a person: the exit status, the last words, the register dump.
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
    /// The process is gone, and nothing was left that says why.
    Vanished,
    /// An operation of vmkit was cut off and could not be finished.
    Interrupted,
    /// Something else, said in the detail.
    Other,
}

/// The operations that change where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// Allocates what the spec needs.
    Prepare,
    /// Boots.
    Start,
    /// Shuts down, by force at the deadline.
    Stop,
    /// Pauses the vCPUs.
    Suspend,
    /// Unpauses the vCPUs.
    Resume,
    /// Removes everything.
    Destroy,
}

/// An operation that is not legal in a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {operation} a VM that is {state}{}", hint(.state, .operation))]
pub struct InvalidTransition {
    /// The state the VM is in.
    pub state: VmState,
    /// What was asked.
    pub operation: Operation,
}

/// Answers the state that `operation` leads to from `state`.
///
/// The same state as an answer means: nothing to do, success.
///
/// # Errors
/// [`InvalidTransition`] where the operation is not legal in that state.
pub fn next(state: &VmState, operation: Operation) -> Result<VmState, InvalidTransition> {
    use Operation as Op;
    use VmState::{Destroyed, Failed, Prepared, Preparing, Running, Stopped, Suspended};
    let to = match (operation, state) {
        (Op::Destroy, _) => Destroyed,
        (Op::Prepare, Preparing) => Prepared,
        (Op::Start, Prepared | Running | Stopped | Failed { .. }) => Running,
        (Op::Stop, Prepared | Running | Suspended | Stopped | Failed { .. }) => Stopped,
        (Op::Suspend, Running | Suspended) => Suspended,
        (Op::Resume, Running | Suspended) => Running,
        (Op::Prepare | Op::Start | Op::Stop | Op::Suspend | Op::Resume, _) => {
            return Err(InvalidTransition { state: state.clone(), operation });
        }
    };
    Ok(to)
}

fn hint(state: &VmState, operation: &Operation) -> &'static str {
    match (operation, state) {
        (Operation::Start, VmState::Suspended) => ": resume it",
        (Operation::Suspend | Operation::Resume, VmState::Prepared | VmState::Stopped) => ": start it first",
        (Operation::Suspend | Operation::Resume, VmState::Failed { .. }) => ": start it again",
        (Operation::Destroy, VmState::Running | VmState::Suspended) => ": stop it first, or use force",
        (_, VmState::Destroyed) => ": its removal was begun, remove it",
        (_, VmState::Preparing) => ": its making was cut off, remove it",
        _ => "",
    }
}

impl VmState {
    /// Makes a `Failed` with its cause.
    pub fn failed(kind: FailureKind, detail: impl Into<String>) -> Self {
        VmState::Failed { cause: FailureCause { kind, detail: detail.into() } }
    }

    /// Answers the state's bare name, such as `running`.
    pub fn name(&self) -> &'static str {
        match self {
            VmState::Preparing => "preparing",
            VmState::Prepared => "prepared",
            VmState::Running => "running",
            VmState::Suspended => "suspended",
            VmState::Stopped => "stopped",
            VmState::Failed { .. } => "failed",
            VmState::Destroyed => "destroyed",
        }
    }

    /// Tells whether a guest's vCPUs exist in this state, running or paused.
    pub fn is_live(&self) -> bool {
        matches!(self, VmState::Running | VmState::Suspended)
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
            // As people say it, and the command: `vmkit rm`.
            Operation::Destroy => "remove",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the contract, one row an operation: an answer per state.
    #[test]
    fn the_table_is_the_one_of_the_contract() {
        use Operation as Op;
        let states = [
            VmState::Prepared,
            VmState::Running,
            VmState::Suspended,
            VmState::Stopped,
            VmState::failed(FailureKind::Other, "x"),
        ];
        let table = [
            (Op::Start, ["running", "running", "error", "running", "running"]),
            (Op::Stop, ["stopped"; 5]),
            (Op::Suspend, ["error", "suspended", "suspended", "error", "error"]),
            (Op::Resume, ["error", "running", "running", "error", "error"]),
            (Op::Destroy, ["destroyed"; 5]),
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
    fn starting_a_suspended_vm_says_resume() {
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
