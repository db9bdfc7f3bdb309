//! The ability to check beforehand what can never work: [`Preflight`].
//!
//! Fetching an image and waiting for a guest to shut down take minutes. What would fail after that
//! for a reason that is known before is refused at once.

use std::future::Future;

use super::erased;
use crate::error::Result;
use crate::handle::VmHandle;
use crate::spec::VmSpec;

/// Checks a spec, or a VM, against the host, and changes nothing.
///
/// What passes may still fail: the host may change meanwhile. What is refused MUST fail in
/// `prepare` or `start` as well.
pub trait Preflight: Send + Sync {
    /// Checks that `prepare` and `start` of this spec can work on this host.
    ///
    /// The image of the root disk need not exist yet: it may have to be fetched.
    ///
    /// # Errors
    /// `InvalidInput` with the field and the value; `Host` for what the host lacks.
    fn check_spec(&self, spec: &VmSpec) -> impl Future<Output = Result<()>> + Send;

    /// Checks that a VM can be started again once it is stopped: with its next spec, if it has one.
    ///
    /// # State
    /// Any, which stays.
    ///
    /// # Errors
    /// `InvalidInput` with the field and the path, as for an image that was changed under the VM.
    fn check_restart(&self, vm: &VmHandle) -> impl Future<Output = Result<()>> + Send;
}

erased! {
    /// Any backend that checks specs beforehand, its type erased.
    DynPreflight of Preflight by ErasedPreflight for 'a;
    /// Calls [`Preflight::check_spec`].
    ///
    /// # Errors
    /// Those of the backend.
    check_spec as check_spec_dyn(spec: &'a VmSpec) -> ();
    /// Calls [`Preflight::check_restart`].
    ///
    /// # Errors
    /// Those of the backend.
    check_restart as check_restart_dyn(vm: &'a VmHandle) -> ();
}
