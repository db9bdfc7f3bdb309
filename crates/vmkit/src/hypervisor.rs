//! The trait [`Hypervisor`], which is the contract of every backend, and [`DynHypervisor`], which
//! erases the backend's type.
//!
//! Every backend passes the conformance suite of `vmkit-testkit`; what the suite can't observe is
//! written here with MUST. Which operation is legal in which state is decided by
//! [`lifecycle::next`](crate::lifecycle::next) alone.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::abilities::Abilities;
use crate::error::Result;
use crate::handle::{BackendTag, ConsoleEndpoint, VmHandle};
use crate::lifecycle::VmState;
use crate::spec::VmSpec;

/// Runs virtual machines of one kind.
///
/// # State
/// | | Preparing | Prepared | Running | Suspended | Saved | Stopped | Failed | Destroyed |
/// | --- | --- | --- | --- | --- | --- | --- | --- | --- |
/// | `start` | error | Running | same | error, says `resume` | Running | Running | Running | error |
/// | `stop` | error | Stopped | Stopped | Stopped | Stopped | same | Stopped | error |
/// | `suspend` | error | error | Suspended | same | error | error | error | error |
/// | `resume` | error | error | same | Running | Running | error | error | error |
/// | `destroy` | Destroyed | Destroyed | Destroyed | Destroyed | Destroyed | Destroyed | Destroyed | same |
///
/// "same" is success. Only a backend with [`SaveToDisk`](crate::abilities::SaveToDisk) has VMs in
/// `Saved`. An operation acts on the real state, which it asks for itself, never on the
/// state in the handle: a handle may be old. After an operation failed, [`state`](Self::state)
/// returns the state that the VM was left in; no operation stops halfway between two states.
///
/// # Concurrency
/// A backend MUST NOT let two operations on one VM start two guests on one disk, from one process
/// or from several. Beyond that it may leave the order of simultaneous operations on one VM to its
/// caller: `VmManager` takes a lock for each operation. A method may block its thread for short
/// file operations, and MUST NOT block it while waiting for a guest or another process.
///
/// # Cancel safety
/// A dropped future leaves nothing behind that `destroy` does not find: `destroy` of
/// [`VmHandle::preparing`] with the id and the spec of an unfinished `prepare` removes what it
/// created. A caller that may drop a `prepare` has to know the id, and therefore sets one in the
/// spec beforehand.
///
/// # Errors
/// Every method returns `InvalidState` where the table says error, `Unsupported` for what its
/// [`Capabilities`](crate::Capabilities) deny, `TimedOut` with what was awaited, and `Hypervisor`
/// or `Host` if one of them fails. Every wait has a deadline.
pub trait Hypervisor: Send + Sync {
    /// Creates everything that the spec needs and returns a handle in `Prepared`.
    ///
    /// The id is the spec's, or a new one if the spec has none. Nothing runs yet. On an error,
    /// everything that was created is removed again.
    ///
    /// # Errors
    /// `AlreadyExists` if this backend has a VM of that name; `InvalidInput` and `Host` for what
    /// only the host knows, such as a missing image; `Unsupported` for a spec that this backend
    /// can't run.
    fn prepare(&self, spec: &VmSpec) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Boots the VM and returns a handle with what is known at run time ([`VmHandle::run`]).
    ///
    /// Returns when the hypervisor runs, not when the guest is up; bounded by the backend's start
    /// limit (30 s unless set otherwise). On a running VM, returns a handle with the facts of that
    /// run. On a failed one, ends first what is left of the last run. A saved one continues from
    /// its memory, which is removed before the guest runs. A backend starts the VM by
    /// [`VmHandle::spec`]; putting [`VmHandle::next_spec`] in its place is the caller's work.
    fn start(&self, vm: &VmHandle) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Asks the guest to power down, and kills the hypervisor when `timeout` has passed.
    ///
    /// A `timeout` of zero kills at once, and discards the memory of a saved guest. A suspended
    /// guest is resumed, and a saved one continued, so that the guest can react. Bounded by
    /// `timeout` and a few seconds more for the kill to take effect; for a saved one, by the time
    /// of its start besides.
    fn stop(&self, vm: &VmHandle, timeout: Duration) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Pauses the vCPUs; the guest is not shut down and keeps its memory.
    fn suspend(&self, vm: &VmHandle) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Unpauses the vCPUs.
    fn resume(&self, vm: &VmHandle) -> impl Future<Output = Result<VmHandle>> + Send;

    /// Stops the VM by force if it runs, and removes everything that `prepare` and `start` created.
    ///
    /// Succeeds on a VM that is gone already, and on the remains of an interrupted `prepare`. Fails
    /// with `Busy` only if nothing was removed: the VM is then as it was.
    fn destroy(&self, vm: VmHandle) -> impl Future<Output = Result<()>> + Send;

    /// Returns the VM's real state: asks the hypervisor's process first, then its monitor.
    ///
    /// Changes nothing. Returns `Destroyed` for a VM that was destroyed; `Stopped` for one whose
    /// guest powered itself off, or that was stopped; `Failed` for one that ended in any other way.
    /// Bounded by a second or two: a hypervisor that does not reply is `TimedOut`, never taken for
    /// dead.
    fn state(&self, vm: &VmHandle) -> impl Future<Output = Result<VmState>> + Send;

    /// Returns the address at which the host reaches the guest, determined again at each call.
    ///
    /// # Errors
    /// `InvalidState` unless the VM is running or suspended; `Unsupported` without a network;
    /// `NotFound` while no address is known yet.
    fn guest_ip(&self, vm: &VmHandle) -> impl Future<Output = Result<String>> + Send;

    /// Returns where the VM's console is, from the handle alone.
    ///
    /// Does not look whether the VM runs: connecting to the console of one that does not is an
    /// error of the connection. QEMU's socket serves one client at a time: a second client is
    /// connected, and receives nothing until the first one has gone.
    ///
    /// # Errors
    /// `Record` if the handle belongs to another backend.
    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint>;
}

impl<H: Backend + ?Sized> Hypervisor for Arc<H> {
    fn prepare(&self, spec: &VmSpec) -> impl Future<Output = Result<VmHandle>> + Send {
        (**self).prepare(spec)
    }

    fn start(&self, vm: &VmHandle) -> impl Future<Output = Result<VmHandle>> + Send {
        (**self).start(vm)
    }

    fn stop(&self, vm: &VmHandle, timeout: Duration) -> impl Future<Output = Result<VmHandle>> + Send {
        (**self).stop(vm, timeout)
    }

    fn suspend(&self, vm: &VmHandle) -> impl Future<Output = Result<VmHandle>> + Send {
        (**self).suspend(vm)
    }

    fn resume(&self, vm: &VmHandle) -> impl Future<Output = Result<VmHandle>> + Send {
        (**self).resume(vm)
    }

    fn destroy(&self, vm: VmHandle) -> impl Future<Output = Result<()>> + Send {
        (**self).destroy(vm)
    }

    fn state(&self, vm: &VmHandle) -> impl Future<Output = Result<VmState>> + Send {
        (**self).state(vm)
    }

    fn guest_ip(&self, vm: &VmHandle) -> impl Future<Output = Result<String>> + Send {
        (**self).guest_ip(vm)
    }

    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        (**self).console_endpoint(vm)
    }
}

/// A hypervisor that says whose VMs it runs and what it can do: what
/// [`VmManager`](crate::VmManager) works with, and what a router registers.
pub trait Backend: Hypervisor {
    /// Returns the tag that its handles carry; of a router, the tag of the VMs whose spec names no
    /// backend.
    fn tag(&self) -> BackendTag;

    /// Returns what can be done with the VMs of the backend `tag`.
    ///
    /// A hypervisor with one tag need not look at it. One over several returns
    /// [`Abilities::none`] for a tag that it does not know.
    fn abilities(&self, tag: &BackendTag) -> Abilities<'_>;
}

impl<B: Backend + ?Sized> Backend for Arc<B> {
    fn tag(&self) -> BackendTag {
        (**self).tag()
    }

    fn abilities(&self, tag: &BackendTag) -> Abilities<'_> {
        (**self).abilities(tag)
    }
}

/// Any backend, its type erased; it is a [`Backend`] again.
///
/// # Examples
/// ```
/// use vmkit::{DynHypervisor, Hypervisor, NoopHypervisor, spec::{Kernel, Boot, VmName, VmSpec}};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> vmkit::Result<()> {
/// let hypervisor: DynHypervisor = DynHypervisor::new(NoopHypervisor::new());
/// let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
/// let spec = VmSpec::builder(VmName::new("web")?).boot(Boot::Kernel(kernel)).build()?;
/// let vm = hypervisor.prepare(&spec).await?;
/// assert_eq!(hypervisor.start(&vm).await?.state.name(), "running");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct DynHypervisor(Arc<dyn ErasedHypervisor>);

impl DynHypervisor {
    /// Erases the type of a backend.
    pub fn new(backend: impl Backend + 'static) -> Self {
        Self(Arc::new(backend))
    }
}

impl std::fmt::Debug for DynHypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("DynHypervisor")
    }
}

type BackendFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// The object-safe twin of [`Backend`]; other names, or every call on a backend would be
/// ambiguous.
trait ErasedHypervisor: Send + Sync {
    fn prepare_dyn<'a>(&'a self, spec: &'a VmSpec) -> BackendFuture<'a, VmHandle>;
    fn start_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, VmHandle>;
    fn stop_dyn<'a>(&'a self, vm: &'a VmHandle, timeout: Duration) -> BackendFuture<'a, VmHandle>;
    fn suspend_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, VmHandle>;
    fn resume_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, VmHandle>;
    fn destroy_dyn(&self, vm: VmHandle) -> BackendFuture<'_, ()>;
    fn state_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, VmState>;
    fn guest_ip_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, String>;
    fn console_endpoint_dyn(&self, vm: &VmHandle) -> Result<ConsoleEndpoint>;
    fn tag_dyn(&self) -> BackendTag;
    fn abilities_dyn(&self, tag: &BackendTag) -> Abilities<'_>;
}

impl<H: Backend> ErasedHypervisor for H {
    fn prepare_dyn<'a>(&'a self, spec: &'a VmSpec) -> BackendFuture<'a, VmHandle> {
        Box::pin(self.prepare(spec))
    }
    fn start_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, VmHandle> {
        Box::pin(self.start(vm))
    }
    fn stop_dyn<'a>(&'a self, vm: &'a VmHandle, timeout: Duration) -> BackendFuture<'a, VmHandle> {
        Box::pin(self.stop(vm, timeout))
    }
    fn suspend_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, VmHandle> {
        Box::pin(self.suspend(vm))
    }
    fn resume_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, VmHandle> {
        Box::pin(self.resume(vm))
    }
    fn destroy_dyn(&self, vm: VmHandle) -> BackendFuture<'_, ()> {
        Box::pin(self.destroy(vm))
    }
    fn state_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, VmState> {
        Box::pin(self.state(vm))
    }
    fn guest_ip_dyn<'a>(&'a self, vm: &'a VmHandle) -> BackendFuture<'a, String> {
        Box::pin(self.guest_ip(vm))
    }
    fn console_endpoint_dyn(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        self.console_endpoint(vm)
    }
    fn tag_dyn(&self) -> BackendTag {
        self.tag()
    }
    fn abilities_dyn(&self, tag: &BackendTag) -> Abilities<'_> {
        self.abilities(tag)
    }
}

impl Hypervisor for DynHypervisor {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        self.0.prepare_dyn(spec).await
    }
    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.0.start_dyn(vm).await
    }
    async fn stop(&self, vm: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        self.0.stop_dyn(vm, timeout).await
    }
    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.0.suspend_dyn(vm).await
    }
    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.0.resume_dyn(vm).await
    }
    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        self.0.destroy_dyn(vm).await
    }
    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.0.state_dyn(vm).await
    }
    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        self.0.guest_ip_dyn(vm).await
    }
    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        self.0.console_endpoint_dyn(vm)
    }
}

impl Backend for DynHypervisor {
    fn tag(&self) -> BackendTag {
        self.0.tag_dyn()
    }
    fn abilities(&self, tag: &BackendTag) -> Abilities<'_> {
        self.0.abilities_dyn(tag)
    }
}
