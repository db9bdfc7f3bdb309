//! The ability to hand out a VM as files, and to make a VM of such files elsewhere: [`Export`].

use std::any::Any;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;

use super::{MemoryMode, erased};
use crate::error::{Error, Result};
use crate::handle::VmHandle;

/// A VM as files, which do not change as long as this exists: the VM can't be started meanwhile.
#[non_exhaustive]
pub struct ExportedVm {
    /// The VM as another backend of the kind is to import it: its state, and what the backend
    /// itself keeps in a handle.
    pub vm: VmHandle,
    /// Its files, without the base image of its root disk.
    pub files: Vec<ExportedFile>,
    /// What the host has to have where the guest is to continue, such as `QEMU 7.2 or newer`.
    pub needs: Vec<String>,
    hold: Option<Box<dyn Any + Send + Sync>>,
}

/// A file that a VM consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportedFile {
    /// Its path below the VM's directory, with at most one directory in it, of letters, digits and
    /// `.`, `_`, `-`, such as `snapshots/one.json`.
    pub name: String,
    /// What it contains.
    pub content: FileContent,
}

/// The content of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileContent {
    /// That of this file.
    Path(PathBuf),
    /// These bytes.
    Bytes(Vec<u8>),
}

/// A VM that was imported.
#[derive(Debug)]
#[non_exhaustive]
pub struct ImportedVm {
    /// The VM, in `Prepared`, `Stopped` or `Saved`.
    pub vm: VmHandle,
    /// Why it can't be started, or its memory not be continued, on this host as it is now.
    pub problems: Vec<Error>,
}

impl ExportedVm {
    /// Creates one that consists of its handle alone.
    pub fn new(vm: VmHandle) -> Self {
        Self { vm, files: Vec::new(), needs: Vec::new(), hold: None }
    }

    /// Adds what keeps the VM from being started, such as a lock.
    #[must_use]
    pub fn held_by(mut self, hold: impl Any + Send + Sync) -> Self {
        self.hold = Some(Box::new(hold));
        self
    }
}

impl fmt::Debug for ExportedVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vm, files, needs, hold: _ } = self;
        f.debug_struct("ExportedVm").field("vm", vm).field("files", files).field("needs", needs).finish()
    }
}

impl ImportedVm {
    /// Creates one without problems.
    pub fn new(vm: VmHandle) -> Self {
        Self { vm, problems: Vec::new() }
    }
}

/// Exports VMs as files, and imports them.
///
/// The base image of a root disk is none of these files: the manager copies it, and the spec that
/// is imported names it where it is then.
pub trait Export: Send + Sync {
    /// Returns what a VM consists of, without what only one run of it needs.
    ///
    /// Without memory, a saved VM is exported as one that was stopped, and its snapshots as ones of
    /// the disks alone.
    ///
    /// # State
    /// | Prepared | Running | Suspended | Saved | Stopped | Failed |
    /// | --- | --- | --- | --- | --- | --- |
    /// | same | error | error | same | same | error |
    ///
    /// # Errors
    /// `InvalidState` where the table says error; `InvalidInput` for a disk that can't be part of
    /// it; `Busy`; `Record` for a part that is missing or damaged; `Io`.
    fn export(&self, vm: &VmHandle, memory: MemoryMode) -> impl Future<Output = Result<ExportedVm>> + Send;

    /// Checks that files of these names are a VM, claims a directory for it, and returns that: the
    /// caller writes them there. `vm` is in `Preparing`.
    ///
    /// The names come from a file that is not trusted.
    ///
    /// # Errors
    /// `InvalidInput` on `file` for a name that is missing or not a VM's; `AlreadyExists`; `Host`
    /// and `Io`. What was created is removed by `destroy`.
    fn prepare_import(&self, vm: &VmHandle, names: &[String])
    -> impl Future<Output = Result<PathBuf>> + Send;

    /// Creates a VM of the files in its directory, after [`prepare_import`](Self::prepare_import).
    /// `vm` is the one that was exported, with the spec for this host.
    ///
    /// No content of a file is trusted: none may lead to another file of the host.
    ///
    /// # Errors
    /// `InvalidInput` on `file` for content that is damaged, or not a VM's; `Io`. `destroy` removes
    /// everything.
    fn finish_import(&self, vm: &VmHandle) -> impl Future<Output = Result<ImportedVm>> + Send;
}

erased! {
    /// Any backend that exports and imports VMs, its type erased.
    DynExport of Export by ErasedExport for 'a;
    /// Calls [`Export::export`].
    ///
    /// # Errors
    /// Those of the backend.
    export as export_dyn(vm: &'a VmHandle, memory: MemoryMode) -> ExportedVm;
    /// Calls [`Export::prepare_import`].
    ///
    /// # Errors
    /// Those of the backend.
    prepare_import as prepare_import_dyn(vm: &'a VmHandle, names: &'a [String]) -> PathBuf;
    /// Calls [`Export::finish_import`].
    ///
    /// # Errors
    /// Those of the backend.
    finish_import as finish_import_dyn(vm: &'a VmHandle) -> ImportedVm;
}
