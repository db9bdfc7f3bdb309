//! The contract's reference: a backend in memory, where nothing runs and which can be told to fail.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddrV4;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use uuid::Uuid;

use crate::abilities::{Abilities, PortForwarding, Preflight, SaveToDisk};
use crate::error::{Error, ErrorKind, LiveResource, Result, Subject};
use crate::handle::{ActiveForward, BackendDetails, BackendTag, ConsoleEndpoint, RunInfo, VmHandle};
use crate::hypervisor::{Backend, Hypervisor};
use crate::lifecycle::{FailureCause, InvalidTransition, Operation, VmState, next};
use crate::spec::{PortForward, VmName, VmSpec};

/// A hypervisor that only keeps the books; clones share them.
///
/// # Examples
/// ```
/// use vmkit::{Hypervisor, NoopHypervisor, lifecycle::Operation};
/// # use vmkit::spec::{Boot, Kernel, VmName, VmSpec};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> vmkit::Result<()> {
/// # let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
/// # let spec = VmSpec::builder(VmName::new("web")?).boot(Boot::Kernel(kernel)).build()?;
/// let hypervisor = NoopHypervisor::new();
/// hypervisor.fail_next(Operation::Start, "no more electricity");
/// let vm = hypervisor.prepare(&spec).await?;
/// assert!(hypervisor.start(&vm).await.is_err());
/// assert_eq!(hypervisor.state(&vm).await?.name(), "prepared");
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default)]
pub struct NoopHypervisor {
    books: Arc<Mutex<VmTable>>,
}

#[derive(Debug, Default)]
struct VmTable {
    vms: BTreeMap<Uuid, (VmName, VmState)>,
    failures: VecDeque<(Operation, String)>,
}

impl NoopHypervisor {
    /// Creates one with empty books.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the next call of `operation` fail with this message, the VM unchanged. Calls add up.
    pub fn fail_next(&self, operation: Operation, message: &str) {
        self.books().failures.push_back((operation, message.to_owned()));
    }

    /// Sets a VM to failed, as a guest's panic would.
    ///
    /// # Errors
    /// `NotFound` where there is no such VM.
    pub fn break_vm(&self, vm: &VmHandle, cause: FailureCause) -> Result<()> {
        match self.books().vms.get_mut(&vm.id) {
            Some((_, state)) => *state = VmState::Failed { cause },
            None => return Err(missing(vm)),
        }
        Ok(())
    }

    /// Sets a running VM to stopped, as a guest that powers itself off would.
    ///
    /// # Errors
    /// `NotFound` if there is no such VM; `InvalidState` if it does not run.
    pub fn power_off_guest(&self, vm: &VmHandle) -> Result<()> {
        match self.books().vms.get_mut(&vm.id) {
            Some((_, state @ VmState::Running)) => *state = VmState::Stopped,
            Some((_, state)) => {
                return Err(InvalidTransition { state: state.clone(), operation: Operation::Stop }.into());
            }
            None => return Err(missing(vm)),
        }
        Ok(())
    }

    fn books(&self) -> MutexGuard<'_, VmTable> {
        self.books.lock().expect("nothing panics while it holds the books")
    }

    fn change(&self, vm: &VmHandle, operation: Operation) -> Result<VmHandle> {
        let mut books = self.books();
        books.take_failure(operation)?;
        let (_, state) = books.vms.get_mut(&vm.id).ok_or_else(|| missing(vm))?;
        *state = next(state, operation)?;
        let state = state.clone();
        drop(books);
        let mut handle = vm.clone().in_state(state);
        if handle.state.is_live() {
            handle.run.get_or_insert_with(RunInfo::default);
        }
        Ok(handle)
    }
}

impl VmTable {
    fn take_failure(&mut self, operation: Operation) -> Result<()> {
        let Some(at) = self.failures.iter().position(|(planned, _)| *planned == operation) else {
            return Ok(());
        };
        let message = self.failures.remove(at).map(|(_, message)| message).unwrap_or_default();
        Err(Error::Backend { message, kind: ErrorKind::Hypervisor, source: None })
    }
}

impl Hypervisor for NoopHypervisor {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        let id = spec.id().unwrap_or_else(Uuid::new_v4);
        let mut books = self.books();
        books.take_failure(Operation::Prepare)?;
        if books.vms.iter().any(|(other, (name, _))| name == spec.name() || *other == id) {
            return Err(Error::already_exists(Subject::Vm, spec.name()));
        }
        books.vms.insert(id, (spec.name().clone(), VmState::Prepared));
        drop(books);
        let mut handle = VmHandle::preparing(id, BackendTag::Noop, spec.clone().with_id(id));
        handle.details = BackendDetails { version: 1, data: serde_json::Value::Null };
        Ok(handle.in_state(VmState::Prepared))
    }

    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.change(vm, Operation::Start)
    }

    async fn stop(&self, vm: &VmHandle, _timeout: Duration) -> Result<VmHandle> {
        self.change(vm, Operation::Stop)
    }

    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.change(vm, Operation::Suspend)
    }

    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.change(vm, Operation::Resume)
    }

    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        let mut books = self.books();
        books.take_failure(Operation::Destroy)?;
        books.vms.remove(&vm.id);
        Ok(())
    }

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        Ok(self.books().vms.get(&vm.id).map_or(VmState::Destroyed, |(_, state)| state.clone()))
    }

    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        match self.state(vm).await? {
            VmState::Running | VmState::Suspended => Ok("127.0.0.1".to_owned()),
            state => Err(Error::NotLive { what: LiveResource::GuestAddress, state }),
        }
    }

    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        if vm.backend != BackendTag::Noop {
            let problem = format!("the handle belongs to the backend `{}`, not `noop`", vm.backend);
            return Err(Error::record(vm.name().as_str(), problem));
        }
        Ok(ConsoleEndpoint::None)
    }
}

/// Nothing listens: a forward is in the handle's `run` and nowhere else, and the port that a kernel
/// would have chosen is the guest's.
impl PortForwarding for NoopHypervisor {
    async fn add_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        self.forwarding(vm, |active| {
            let added = pretended(forward);
            if !active.contains(&added) {
                active.push(added);
            }
        })
    }

    async fn remove_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        self.forwarding(vm, |active| active.retain(|it| *it != pretended(forward)))
    }
}

impl NoopHypervisor {
    fn forwarding(&self, vm: &VmHandle, change: impl FnOnce(&mut Vec<ActiveForward>)) -> Result<VmHandle> {
        let state =
            self.books().vms.get(&vm.id).map(|(_, state)| state.clone()).ok_or_else(|| missing(vm))?;
        if !state.is_live() {
            return Err(Error::NotLive { what: LiveResource::ForwardedPort, state });
        }
        let mut handle = vm.clone();
        change(&mut handle.run.get_or_insert_with(RunInfo::default).forwards);
        Ok(handle)
    }
}

fn pretended(forward: &PortForward) -> ActiveForward {
    let port = forward.host_port.unwrap_or(forward.guest_port).get();
    let host = SocketAddrV4::new(forward.host_addr, port);
    ActiveForward { protocol: forward.protocol, host, guest_port: forward.guest_port }
}

impl SaveToDisk for NoopHypervisor {
    async fn save(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.change(vm, Operation::Save)
    }
}

/// What `prepare` takes is all right, and so is every VM that is there.
impl Preflight for NoopHypervisor {
    async fn check_spec(&self, spec: &VmSpec) -> Result<()> {
        match spec.backend() {
            Some(other) if *other != BackendTag::Noop => {
                Err(Error::invalid("backend", other, "this backend runs VMs of `noop`"))
            }
            _ => Ok(()),
        }
    }

    async fn check_restart(&self, vm: &VmHandle) -> Result<()> {
        self.books().vms.get(&vm.id).map(drop).ok_or_else(|| missing(vm))
    }
}

impl Backend for NoopHypervisor {
    fn tag(&self) -> BackendTag {
        BackendTag::Noop
    }

    fn abilities(&self, _tag: &BackendTag) -> Abilities<'_> {
        Abilities::none()
            .with_suspend()
            .with_graceful_stop()
            .with_guest_ip()
            .with_local_files()
            .with_port_forwarding(self)
            .with_preflight(self)
            .with_save_to_disk(self)
    }
}

fn missing(vm: &VmHandle) -> Error {
    Error::not_found(Subject::Vm, vm.name())
}
