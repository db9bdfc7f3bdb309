//! The contract's reference: a backend in memory, where nothing runs and which can be told to fail.

mod clones;
mod console;
mod export;
mod snapshots;

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use uuid::Uuid;

use self::console::{ConsoleDir, NoopConsole};
use crate::abilities::{Abilities, PortForwarding, Preflight, SaveToDisk, Snapshot};
use crate::error::{Error, ErrorKind, LiveResource, Result, Subject};
use crate::handle::{ActiveForward, BackendDetails, BackendTag, ConsoleEndpoint, VmHandle};
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
#[derive(Debug, Clone)]
pub struct NoopHypervisor {
    books: Arc<Mutex<VmTable>>,
    consoles: Option<ConsoleDir>,
    guest_ip: Ipv4Addr,
}

#[derive(Debug, Default)]
struct VmTable {
    vms: BTreeMap<Uuid, NoopVm>,
    snapshots: BTreeMap<Uuid, Vec<Snapshot>>,
    failures: VecDeque<(Operation, String)>,
}

#[derive(Debug)]
struct NoopVm {
    name: VmName,
    state: VmState,
    /// There exactly while the VM runs or is suspended, if the backend has consoles.
    console: Option<NoopConsole>,
}

impl Default for NoopHypervisor {
    fn default() -> Self {
        Self { books: Arc::default(), consoles: None, guest_ip: Ipv4Addr::LOCALHOST }
    }
}

impl NoopHypervisor {
    /// Creates one with empty books, whose guests have no console.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives each guest a serial console, with a socket and a log in this directory, which is
    /// created with the first one.
    ///
    /// A guest that is started prints `NAME login: `, and echoes what is typed;
    /// [`print`](Self::print) has it print more. Any number of clients may be attached; one that
    /// leaves output unread for a second is disconnected. The socket is removed with the end of the
    /// VM's run, or with the last clone of this backend; the log by `destroy`.
    ///
    /// # Examples
    /// ```
    /// use std::time::Duration;
    /// use vmkit::{NoopHypervisor, VmManager, store::Home};
    /// # use vmkit::spec::{Boot, Kernel, VmName, VmSpec};
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
    /// # let name = VmName::new("web")?;
    /// # let spec = VmSpec::builder(name.clone()).boot(Boot::Kernel(kernel)).build()?;
    /// let temp = tempfile::tempdir()?;
    /// let noop = NoopHypervisor::new().with_consoles(temp.path().join("consoles"));
    /// let manager = VmManager::new(noop.clone(), Home::at(temp.path())?);
    /// manager.create(spec).await?;
    /// let vm = manager.start(&name).await?;
    /// noop.print(&vm, "the disk is full\r\n")?;
    /// let mut console = manager.attach_console(&name).await?;
    /// console.wait_for("the disk is full", Duration::from_secs(10)).await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn with_consoles(self, dir: impl Into<PathBuf>) -> Self {
        Self { consoles: Some(ConsoleDir(dir.into())), ..self }
    }

    /// Sets the address of the guests; 127.0.0.1 unless set. A server that listens there stands in
    /// for one in a guest.
    #[must_use]
    pub fn with_guest_ip(self, guest_ip: Ipv4Addr) -> Self {
        Self { guest_ip, ..self }
    }

    /// Lets the next call of `operation` fail with this message, the VM unchanged. Calls add up.
    pub fn fail_next(&self, operation: Operation, message: &str) {
        self.books().failures.push_back((operation, message.to_owned()));
    }

    /// Prints on the console of a running VM, as its guest would.
    ///
    /// # Errors
    /// `NotFound` if there is no such VM; `Unsupported` without [consoles](Self::with_consoles);
    /// `InvalidState` unless the VM runs.
    pub fn print(&self, vm: &VmHandle, text: impl AsRef<[u8]>) -> Result<()> {
        let mut books = self.books();
        let found = books.find(vm)?;
        match (&found.console, &found.state) {
            (Some(console), VmState::Running) => console.print(text.as_ref()),
            _ if self.consoles.is_none() => {
                return Err(Error::Unsupported { backend: BackendTag::Noop, what: "a console".to_owned() });
            }
            (_, state) => {
                return Err(Error::NotLive { what: LiveResource::Console, state: state.clone() });
            }
        }
        Ok(())
    }

    /// Sets a VM to failed, as a guest's panic would.
    ///
    /// # Errors
    /// `NotFound` where there is no such VM.
    pub fn break_vm(&self, vm: &VmHandle, cause: FailureCause) -> Result<()> {
        self.books().find(vm)?.end(VmState::Failed { cause });
        Ok(())
    }

    /// Sets a running VM to stopped, as a guest that powers itself off would.
    ///
    /// # Errors
    /// `NotFound` if there is no such VM; `InvalidState` if it does not run.
    pub fn power_off_guest(&self, vm: &VmHandle) -> Result<()> {
        let mut books = self.books();
        let found = books.find(vm)?;
        if found.state != VmState::Running {
            let state = found.state.clone();
            return Err(InvalidTransition { state, operation: Operation::Stop }.into());
        }
        found.end(VmState::Stopped);
        Ok(())
    }

    fn books(&self) -> MutexGuard<'_, VmTable> {
        self.books.lock().expect("nothing panics while it holds the books")
    }

    fn change(&self, vm: &VmHandle, operation: Operation) -> Result<VmHandle> {
        let mut books = self.books();
        books.take_failure(operation)?;
        let found = books.find(vm)?;
        let state = next(&found.state, operation)?;
        if !state.is_live() {
            found.end(state);
        } else {
            if let (None, Some(dir)) = (&found.console, &self.consoles) {
                let console = dir.open(vm)?;
                // A saved guest goes on where it was.
                if found.state != VmState::Saved {
                    console.print(format!("{} login: ", vm.name()).as_bytes());
                }
                found.console = Some(console);
            }
            if let Some(console) = &found.console {
                console.set_paused(state == VmState::Suspended);
            }
            found.state = state;
        }
        Ok(self.handle(vm, found))
    }

    /// Returns the handle of a VM as it is in the books.
    fn handle(&self, vm: &VmHandle, found: &NoopVm) -> VmHandle {
        let mut handle = vm.clone().in_state(found.state.clone());
        if handle.state.is_live() {
            handle.run.get_or_insert_default();
        }
        if let Some(dir) = &self.consoles {
            handle.console_log = Some(dir.log(vm.id));
            if let (Some(console), Some(run)) = (&found.console, &mut handle.run) {
                handle.console_since = Some(console.since());
                run.console = dir.endpoint(vm.id);
            }
        }
        handle
    }
}

impl NoopVm {
    /// Ends the run of a VM, if there is one.
    fn end(&mut self, state: VmState) {
        self.console = None;
        self.state = state;
    }
}

impl VmTable {
    fn find(&mut self, vm: &VmHandle) -> Result<&mut NoopVm> {
        self.vms.get_mut(&vm.id).ok_or_else(|| Error::not_found(Subject::Vm, vm.name()))
    }

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
        if books.vms.iter().any(|(other, vm)| vm.name == *spec.name() || *other == id) {
            return Err(Error::already_exists(Subject::Vm, spec.name()));
        }
        let vm = NoopVm { name: spec.name().clone(), state: VmState::Prepared, console: None };
        let mut handle = VmHandle::preparing(id, BackendTag::Noop, spec.clone().with_id(id));
        handle.details = BackendDetails { version: 1, data: serde_json::Value::Null };
        let handle = self.handle(&handle, &vm);
        books.vms.insert(id, vm);
        Ok(handle)
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
        books.snapshots.remove(&vm.id);
        match &self.consoles {
            Some(dir) => dir.remove_log(vm.id),
            None => Ok(()),
        }
    }

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        Ok(self.books().vms.get(&vm.id).map_or(VmState::Destroyed, |vm| vm.state.clone()))
    }

    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        match self.state(vm).await? {
            VmState::Running | VmState::Suspended => Ok(self.guest_ip.to_string()),
            state => Err(Error::NotLive { what: LiveResource::GuestAddress, state }),
        }
    }

    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        if vm.backend != BackendTag::Noop {
            let problem = format!("the handle belongs to the backend `{}`, not `noop`", vm.backend);
            return Err(Error::record(vm.name().as_str(), problem));
        }
        Ok(self.consoles.as_ref().map_or(ConsoleEndpoint::None, |dir| dir.endpoint(vm.id)))
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
        let state = self.books().find(vm)?.state.clone();
        if !state.is_live() {
            return Err(Error::NotLive { what: LiveResource::ForwardedPort, state });
        }
        let mut handle = vm.clone();
        change(&mut handle.run.get_or_insert_default().forwards);
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

    /// A guest that is not there takes no room.
    async fn saved_bytes(&self, vm: &VmHandle) -> Result<Option<u64>> {
        Ok((self.state(vm).await? == VmState::Saved).then_some(0))
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
        self.books().find(vm).map(drop)
    }
}

impl Backend for NoopHypervisor {
    fn tag(&self) -> BackendTag {
        BackendTag::Noop
    }

    fn abilities(&self, _tag: &BackendTag) -> Abilities<'_> {
        let abilities = Abilities::none()
            .with_suspend()
            .with_graceful_stop()
            .with_guest_ip()
            .with_local_files()
            .with_port_forwarding(self)
            .with_preflight(self)
            .with_save_to_disk(self)
            .with_snapshots(self)
            .with_export(self)
            .with_clones(self);
        match self.consoles {
            Some(_) => abilities.with_shared_console(),
            None => abilities,
        }
    }
}
