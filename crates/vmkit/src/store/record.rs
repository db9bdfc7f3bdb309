//! A VM as its record has it: [`VmRecord`].
//!
//! Pure. What lies on disk of it is in `bytes.rs`.

use crate::handle::VmHandle;
use crate::lifecycle::Operation;
use crate::spec::SnapshotName;

/// A handle as it lies on disk, with what is being done to the VM. This is how a program keeps a
/// handle without [`VmManager`](crate::VmManager), too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRecord {
    /// The VM as it was when the record was written.
    pub handle: VmHandle,
    /// The operation that was about to begin; absent once it has ended.
    pub intent: Option<Intent>,
}

/// An operation, written down before it is carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intent {
    /// The operation.
    pub operation: Operation,
    /// When it began, in seconds after the beginning of 1970 (UTC).
    pub since: u64,
    /// The process that began it, for a person to read: it may be gone, and its number another's.
    pub pid: u32,
    /// The snapshot that a restore returns to.
    pub snapshot: Option<SnapshotName>,
}

impl VmRecord {
    /// Creates the record of a VM that no operation works on.
    pub fn settled(handle: VmHandle) -> Self {
        Self { handle, intent: None }
    }

    /// Creates the record of a VM that an operation is about to work on.
    pub fn intending(handle: VmHandle, intent: Intent) -> Self {
        Self { handle, intent: Some(intent) }
    }

    /// Returns whether there is nothing to be done with this VM but to remove it: its making or its
    /// removal has begun.
    pub fn is_unfinished(&self) -> bool {
        let operation = self.intent.as_ref().map(|intent| intent.operation);
        matches!(operation, Some(Operation::Prepare | Operation::Destroy))
    }
}
