//! The ability to keep states of a VM and to go back to them: [`Snapshots`].

use std::fmt;
use std::future::Future;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::erased;
use crate::error::Result;
use crate::handle::VmHandle;
use crate::spec::SnapshotName;

/// Whether a snapshot of a guest that lives has its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryMode {
    /// With the memory: the guest continues from that instant. Without effect on a VM that does not
    /// live.
    Include,
    /// With the memory, and fit for clones that continue: the programs of the guest stand still
    /// meanwhile, so that in a clone none of them runs before it has random numbers of its own.
    /// The guest has to run, and to have an agent.
    ForClones,
    /// The disks alone: the guest boots from them.
    DisksOnly,
}

/// How a snapshot was taken, which is what to expect of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SnapshotKind {
    /// The VM did not run.
    Stopped,
    /// The guest lived, and its memory is part of the snapshot.
    Memory,
    /// The disks of a guest that lived, whose file systems its agent had frozen.
    Quiesced,
    /// The disks of a guest that lived: as after a power cut.
    CrashConsistent,
}

impl SnapshotKind {
    /// Returns the kind as it is shown and stored, such as `crash-consistent`.
    pub fn as_str(self) -> &'static str {
        match self {
            SnapshotKind::Stopped => "stopped",
            SnapshotKind::Memory => "memory",
            SnapshotKind::Quiesced => "quiesced",
            SnapshotKind::CrashConsistent => "crash-consistent",
        }
    }
}

impl fmt::Display for SnapshotKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A snapshot of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// Its name.
    pub name: SnapshotName,
    /// The snapshot that the VM's disks continued from when this one was taken.
    pub parent: Option<SnapshotName>,
    /// Whether the VM's disks continue from this one.
    pub is_current: bool,
    /// When it was taken.
    pub created: SystemTime,
    /// How it was taken.
    pub kind: SnapshotKind,
    /// The space that its own files take on the host's disk, in bytes; another snapshot's are not
    /// counted.
    pub bytes: u64,
}

impl Snapshot {
    /// Creates one without a parent, which takes no space.
    pub fn new(name: SnapshotName, kind: SnapshotKind, created: SystemTime) -> Self {
        Self { name, parent: None, is_current: false, created, kind, bytes: 0 }
    }
}

/// Takes snapshots of VMs, and goes back to them.
///
/// The snapshots of a VM are a tree: each is below the one that the VM's disks continued from.
pub trait Snapshots: Send + Sync {
    /// Takes a snapshot; the VM's state stays.
    ///
    /// Disks and memory are of one instant. A guest stands still for some of the time, at most
    /// 100 ms for 512 MiB on an idle host.
    ///
    /// # State
    /// | Prepared | Running | Suspended | Saved | Stopped | Failed |
    /// | --- | --- | --- | --- | --- | --- |
    /// | disks | same | same | error | disks | error |
    ///
    /// # Cancel safety
    /// Killed or dropped anywhere, the snapshot is there or it is not, and no data of the VM is
    /// lost. The guest goes on, or is paused as `Suspended`, from where `resume` continues it.
    ///
    /// # Errors
    /// `InvalidState` where the table says error; `AlreadyExists`; `InvalidInput` for a disk that
    /// can't be part of it. After any error the guest is in the state that it was in: `Host` for
    /// too little space, which is estimated beforehand; `Hypervisor` for a device that can't be
    /// saved; `TimedOut`; `Io`.
    fn create_snapshot(
        &self,
        vm: &VmHandle,
        name: &SnapshotName,
        memory: MemoryMode,
    ) -> impl Future<Output = Result<Snapshot>> + Send;

    /// Returns the snapshots of a VM, the oldest first.
    ///
    /// # Errors
    /// `Record` for one that can't be read; `Io`.
    fn snapshots(&self, vm: &VmHandle) -> impl Future<Output = Result<Vec<Snapshot>>> + Send;

    /// Returns the VM to a snapshot: ends what runs by force, discards what its disks and its
    /// memory have become since, and returns a handle in `Saved`, or in `Stopped` for a snapshot
    /// without memory.
    ///
    /// `vm` has the spec of the time of the snapshot: a guest continues on the hardware that it was
    /// saved on.
    ///
    /// # State
    /// Any in which the VM has all its parts.
    ///
    /// # Cancel safety
    /// Killed or dropped anywhere, the VM is as it was but for its end by force, or it is `Failed`
    /// until the call is repeated.
    ///
    /// # Errors
    /// `NotFound`; `Record` for memory that is missing or truncated; `Busy`; `Io`; `Host`.
    fn restore_snapshot(
        &self,
        vm: &VmHandle,
        name: &SnapshotName,
    ) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Removes a snapshot; the VM and its other snapshots stay what they are.
    ///
    /// # State
    /// Any.
    ///
    /// # Cancel safety
    /// Killed or dropped anywhere, the snapshot is there or it is not; in the latter case a later
    /// removal frees the rest of its space.
    ///
    /// # Errors
    /// `NotFound`; `Busy`; `Host` and `Io` if the space can't be freed, which can be tried again.
    fn remove_snapshot(&self, vm: &VmHandle, name: &SnapshotName) -> impl Future<Output = Result<()>> + Send;
}

erased! {
    /// Any backend that takes snapshots, its type erased.
    DynSnapshots of Snapshots by ErasedSnapshots for 'a;
    /// Calls [`Snapshots::create_snapshot`].
    ///
    /// # Errors
    /// Those of the backend.
    create_snapshot as create_snapshot_dyn(
        vm: &'a VmHandle, name: &'a SnapshotName, memory: MemoryMode
    ) -> Snapshot;
    /// Calls [`Snapshots::snapshots`].
    ///
    /// # Errors
    /// Those of the backend.
    snapshots as snapshots_dyn(vm: &'a VmHandle) -> Vec<Snapshot>;
    /// Calls [`Snapshots::restore_snapshot`].
    ///
    /// # Errors
    /// Those of the backend.
    restore_snapshot as restore_snapshot_dyn(vm: &'a VmHandle, name: &'a SnapshotName) -> VmHandle;
    /// Calls [`Snapshots::remove_snapshot`].
    ///
    /// # Errors
    /// Those of the backend.
    remove_snapshot as remove_snapshot_dyn(vm: &'a VmHandle, name: &'a SnapshotName) -> ();
}
