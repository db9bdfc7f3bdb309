//! The ability to create VMs as copies of others: [`Clones`].

use std::future::Future;

use super::{MemoryMode, erased};
use crate::error::Result;
use crate::handle::VmHandle;
use crate::spec::{SnapshotName, VmSpec};

/// What a clone has in common with its source on the host's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CloneMode {
    /// The data of the disks until now: a clone takes no time and no space. Either VM can be
    /// removed; the data stays as long as one of them needs it.
    #[default]
    Linked,
    /// Nothing but the image that the source was created from.
    Full,
}

/// What happens if a guest that continues can't be given an identity of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IdentityPolicy {
    /// It does not run.
    #[default]
    Unique,
    /// It runs, and shares with its source what could not be renewed: its next random numbers, its
    /// machine ID, its keys.
    MayShare,
}

/// A VM to be created as a copy of another one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CloneRequest {
    /// The new VM, with an identity. It has the disks of the source; with memory, it has also its
    /// hardware.
    pub spec: VmSpec,
    /// The snapshot of the source that it continues from; without one, the source as it is.
    pub snapshot: Option<SnapshotName>,
    /// What the two have in common.
    pub mode: CloneMode,
    /// Whether the guest continues, if the snapshot has its memory.
    pub memory: MemoryMode,
    /// What happens if that guest can't be given an identity of its own.
    pub identity: IdentityPolicy,
}

impl CloneRequest {
    /// Creates the request for a linked clone of the disks as they are.
    pub fn new(spec: VmSpec) -> Self {
        Self {
            spec,
            snapshot: None,
            mode: CloneMode::Linked,
            memory: MemoryMode::DisksOnly,
            identity: IdentityPolicy::Unique,
        }
    }
}

/// Creates VMs as copies of others.
pub trait Clones: Send + Sync {
    /// Creates a VM with the disks of another one, and with its memory if the request says so;
    /// returns it in `Prepared`, or with memory in `Saved`. The source stays what it is.
    ///
    /// A guest that continues gets an identity of its own when it is started: random numbers before
    /// its programs run, if the snapshot was taken [for clones](MemoryMode::ForClones), then a
    /// machine ID, a host name, host keys and the login of the spec. A snapshot that was not is
    /// refused, unless the guest [may share](IdentityPolicy::MayShare) its identity.
    ///
    /// # State
    /// Of the source, without a snapshot; with one, any.
    ///
    /// | Prepared | Running | Suspended | Saved | Stopped | Failed |
    /// | --- | --- | --- | --- | --- | --- |
    /// | ok | error | error | error | ok | error |
    ///
    /// # Cancel safety
    /// Killed or dropped anywhere, the source has its content, and what was created of the new VM
    /// is removed by `destroy` with the identity of the spec.
    ///
    /// # Errors
    /// `InvalidState` where the table says error; `NotFound` for the snapshot; `AlreadyExists` for
    /// the new VM; `InvalidInput` for a disk that can't be copied; `Busy`; `Host`; `Io`. Nothing of
    /// the new VM is left.
    fn create_clone(
        &self,
        source: &VmHandle,
        request: &CloneRequest,
    ) -> impl Future<Output = Result<VmHandle>> + Send;
}

erased! {
    /// Any backend that clones VMs, its type erased.
    DynClones of Clones by ErasedClones for 'a;
    /// Calls [`Clones::create_clone`].
    ///
    /// # Errors
    /// Those of the backend.
    create_clone as create_clone_dyn(source: &'a VmHandle, request: &'a CloneRequest) -> VmHandle;
}
