//! The operations on VMs, for the command and for any other program: [`VmManager`].
//!
//! It keeps one record for each VM, and one operation at a time works on a VM. Each writes its
//! intent first, so that the next operation after a crash can complete or undo it. The state in a
//! record is only the last known one; the hypervisor reports the real one.
//!
//! ```text
//! lock ─▶ recover what was interrupted ─▶ write the intent ─▶ hypervisor ─▶ write the outcome ─▶ unlock
//! ```

mod ahead;
#[cfg(feature = "ssh")]
mod clock;
mod clone;
mod console;
mod disks;
mod ephemeral;
#[cfg(feature = "images")]
mod export;
mod forward;
#[cfg(feature = "images")]
mod import;
#[cfg(all(test, target_os = "linux", feature = "images", feature = "qemu"))]
mod import_tests;
mod list;
#[cfg(feature = "ssh")]
mod login;
mod probe;
#[cfg(all(feature = "ssh", feature = "images"))]
mod readiness;
mod reconfigure;
mod removal;
mod resume;
mod save;
mod snapshot;
#[cfg(feature = "ssh")]
mod ssh;
mod tail;
mod wait;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::{Instant, timeout};
use tracing::warn;
use uuid::Uuid;

#[cfg(all(feature = "ssh", feature = "images"))]
pub(crate) use clone::Lifetime;
#[cfg(feature = "images")]
pub use export::{VmExportOptions, VmExportSummary};
#[cfg(feature = "images")]
pub use import::{HostFilePolicy, VmImportOptions, VmImportSummary};
pub use list::VmEntry;
#[cfg(all(feature = "ssh", feature = "images"))]
pub(crate) use login::GuestAge;
pub use snapshot::{AutomaticSnapshots, SnapshotSchedule};
pub use wait::WaitCondition;

use crate::abilities::{Abilities, ClockedVm};
use crate::deadline::later;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::handle::{BackendTag, ConsoleEndpoint, VmHandle};
use crate::hypervisor::Backend;
use crate::lifecycle::{FailureKind, InvalidTransition, Operation, VmState};
use crate::span::{about, operation, within};
use crate::spec::{VmName, VmSpec};
use crate::store::{EphemeralGuard, Home, Intent, LockedVm, RecordStore, VmRecord};

/// How long an operation waits for another one on the same VM; a stop may take its own timeout in
/// addition.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a backend has to report a VM's state; the contract gives it a second or two.
const STATE_PATIENCE: Duration = Duration::from_secs(5);

/// Creates, runs, finds and removes VMs that outlive the process, over any hypervisor.
///
/// # Concurrency
/// Any number of managers in any number of processes may work on one home. Operations on one VM
/// wait for each other, 30 s at most (`stop` and `restart`: plus their timeout), and then return
/// `Busy` with the holder's PID. Operations that only read take no lock.
///
/// # Cancel safety
/// A dropped future, like a killed process, leaves a record of the operation. The next operation on
/// the VM completes or undoes it.
///
/// # Examples
/// ```
/// use vmkit::{NoopHypervisor, VmManager, store::Home};
/// # use vmkit::spec::{Boot, Kernel, VmName, VmSpec};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> vmkit::Result<()> {
/// # let temp = tempfile::tempdir().unwrap();
/// # let home = temp.path();
/// # let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
/// # let spec = VmSpec::builder(VmName::new("web")?).boot(Boot::Kernel(kernel)).build()?;
/// let manager = VmManager::new(NoopHypervisor::new(), Home::at(home)?);
/// let vm = manager.create(spec).await?;
/// manager.start(vm.name()).await?;
/// assert_eq!(manager.info(vm.name()).await?.state.name(), "running");
/// manager.remove(vm.name(), true).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct VmManager<H> {
    hypervisor: Arc<H>,
    backend: BackendTag,
    store: RecordStore,
}

impl<H> Clone for VmManager<H> {
    fn clone(&self) -> Self {
        Self {
            hypervisor: Arc::clone(&self.hypervisor),
            backend: self.backend.clone(),
            store: self.store.clone(),
        }
    }
}

/// An operation on an existing VM, with its arguments.
#[derive(Debug, Clone, Copy)]
enum VmRequest {
    Start,
    Stop(Duration),
    Suspend,
    /// After a suspension of this length, if it is known.
    Resume(Option<Duration>),
    Save,
}

impl VmRequest {
    fn operation(self) -> Operation {
        match self {
            VmRequest::Start => Operation::Start,
            VmRequest::Stop(_) => Operation::Stop,
            VmRequest::Suspend => Operation::Suspend,
            VmRequest::Resume(_) => Operation::Resume,
            VmRequest::Save => Operation::Save,
        }
    }
}

#[cfg(all(target_os = "linux", feature = "qemu"))]
impl VmManager<crate::QemuHypervisor> {
    /// Creates a manager of QEMU's VMs in a home, with that home's directories for their files; has
    /// no effects.
    ///
    /// The program's `main` calls [`run_if_keeper`](crate::run_if_keeper) first.
    pub fn qemu(home: Home) -> Self {
        let builder = crate::QemuHypervisor::builder(home.vms(), home.run()).cache_dir(home.cache());
        Self::new(builder.build(), home)
    }
}

impl<H: Backend + 'static> VmManager<H> {
    /// Creates a manager of the VMs in a home; has no effects.
    ///
    /// A VM whose spec names no backend gets the one of the hypervisor's tag: a router's default.
    pub fn new(hypervisor: H, home: Home) -> Self {
        let backend = hypervisor.tag();
        Self { hypervisor: Arc::new(hypervisor), backend, store: RecordStore::new(home) }
    }

    /// Returns the home of the VMs.
    pub fn home(&self) -> &Home {
        self.store.home()
    }

    /// Returns the hypervisor that runs the VMs.
    pub fn hypervisor(&self) -> &H {
        &self.hypervisor
    }

    /// Returns the abilities of this VM's backend beyond the contract.
    fn abilities_of(&self, vm: &VmHandle) -> Abilities<'_> {
        self.hypervisor.abilities(&vm.backend)
    }

    /// Returns the abilities of the backend of a VM with this spec.
    pub(crate) fn abilities_for(&self, spec: &VmSpec) -> Abilities<'_> {
        self.hypervisor.abilities(self.backend_of(spec))
    }

    /// Returns the backend that a VM of this spec gets.
    fn backend_of<'a>(&'a self, spec: &'a VmSpec) -> &'a BackendTag {
        spec.backend().unwrap_or(&self.backend)
    }

    /// Creates a VM and returns it in `Prepared`; nothing runs yet.
    ///
    /// What an interrupted `create` or `remove` left under this name is removed first.
    ///
    /// # Errors
    /// `AlreadyExists` for a name in use; otherwise those of
    /// [`Hypervisor::prepare`](crate::Hypervisor::prepare), and of the home. Nothing is left
    /// behind.
    pub async fn create(&self, spec: VmSpec) -> Result<VmHandle> {
        self.create_owned(spec).await.map(|(vm, _)| vm)
    }

    /// Creates a VM, and its owner if it is ephemeral.
    async fn create_owned(&self, spec: VmSpec) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let span = operation!("create", vm = spec.name());
        within(span, self.create_by(spec, async |spec| self.hypervisor.prepare(spec).await)).await
    }

    /// Creates a VM by a method of the hypervisor.
    async fn create_by(
        &self,
        spec: VmSpec,
        create: impl AsyncFnOnce(&VmSpec) -> Result<VmHandle>,
    ) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        self.check_id(&spec)?;
        let locked = self.lock_free(&spec).await?;
        self.make(locked, spec, create).await
    }

    async fn make(
        &self,
        locked: LockedVm,
        spec: VmSpec,
        create: impl AsyncFnOnce(&VmSpec) -> Result<VmHandle>,
    ) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let id = spec.id().unwrap_or_else(Uuid::new_v4);
        about(id);
        let spec = spec.with_id(id);
        let backend = self.backend_of(&spec).clone();
        let preparing = VmHandle::preparing(id, backend, spec);
        let intending = VmRecord::intending(preparing.clone(), intent(Operation::Prepare));
        // Checked again after the intent is written: of two VMs with the same identity, the later
        // one sees the other.
        let checked = locked.write_made(&intending).and_then(|()| {
            self.check_id(&preparing.spec)?;
            self.check_disks(&preparing.spec)
        });
        if let Err(error) = checked {
            give_up(locked);
            return Err(error);
        }
        let made = self.prepare(&locked, &preparing, create).await;
        match &made {
            // The intent names another backend, so a recovery would ask the wrong one.
            Ok((vm, _)) if vm.backend != preparing.backend => {
                let why =
                    format!("the hypervisor creates VMs of `{}`, so its own tag must be that", vm.backend);
                self.hypervisor.destroy(vm.clone()).await?;
                give_up(locked);
                return Err(Error::invalid("backend", &preparing.backend, why));
            }
            Ok(_) => {}
            Err(_) => match self.hypervisor.destroy(preparing.clone()).await {
                Ok(()) => give_up(locked),
                // The record stays, with its intent: a removal of the VM tries again.
                Err(error) => {
                    warn!(vm = %preparing.name(), %error, "cannot remove what was created before the failure")
                }
            },
        }
        made
    }

    async fn prepare(
        &self,
        locked: &LockedVm,
        wanted: &VmHandle,
        create: impl AsyncFnOnce(&VmSpec) -> Result<VmHandle>,
    ) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let owner = ephemeral::is_ephemeral(&wanted.spec).then(|| locked.own()).transpose()?;
        let vm = create(&wanted.spec).await?;
        locked.write_made(&VmRecord::settled(vm.clone()))?;
        Ok((vm, owner))
    }

    /// Refuses the identity of another VM, existing or being created: undoing a failed `create`
    /// would destroy that one.
    fn check_id(&self, spec: &VmSpec) -> Result<()> {
        let Some(id) = spec.id() else { return Ok(()) };
        for name in self.store.names()? {
            let other = self.store.read(&name);
            if name != *spec.name() && other.is_ok_and(|other| other.handle.id == id) {
                return Err(Error::already_exists(Subject::Vm, id));
            }
        }
        Ok(())
    }

    /// Shuts a VM down, by force when `timeout` has passed; zero is by force at once.
    ///
    /// A running VM is stopped even if `vm.json` is damaged: the runtime record is enough.
    ///
    /// # Errors
    /// Those of [`Hypervisor::stop`](crate::Hypervisor::stop).
    pub async fn stop(&self, name: &VmName, timeout: Duration) -> Result<VmHandle> {
        within(operation!("stop", vm = name), self.operate(name, &[VmRequest::Stop(timeout)])).await
    }

    /// Stops a VM and starts it again, without releasing its lock in between.
    ///
    /// # Errors
    /// Those of [`Hypervisor::stop`](crate::Hypervisor::stop) and
    /// [`Hypervisor::start`](crate::Hypervisor::start).
    pub async fn restart(&self, name: &VmName, timeout: Duration) -> Result<VmHandle> {
        let restart = async {
            // A VM that can't be started again is not stopped.
            if let Ok(record) = self.store.read(name) {
                self.check_restart(&record.handle).await?;
            }
            self.operate(name, &[VmRequest::Stop(timeout), VmRequest::Start]).await
        };
        within(operation!("restart", vm = name), restart).await
    }

    /// Lets cloud-init run again at the VM's next start, as on a new machine: with another
    /// instance-id.
    ///
    /// A running VM is not affected until it is started again, and a VM without cloud-init not at
    /// all.
    ///
    /// # Errors
    /// `NotFound`; `Busy`; `InvalidState` for a VM that can only be removed; `Io` and `Host` if it
    /// can't be recorded.
    pub async fn rerun_cloud_init(&self, name: &VmName) -> Result<VmHandle> {
        let again = async {
            let (locked, mut record) = self.take(name, Instant::now() + PATIENCE).await?;
            // Only to refuse a VM that can only be removed: an existing intent stays for the next
            // operation.
            self.settle(record.clone(), Operation::Start).await?;
            record.handle.spec = record.handle.spec.with_cloud_init_again();
            locked.write_wanted(&record)?;
            Ok(record.handle)
        };
        within(operation!("rerun_cloud_init", vm = name), again).await
    }

    /// Pauses a VM's vCPUs.
    ///
    /// # Errors
    /// `InvalidState` unless it lives, and those of
    /// [`Hypervisor::suspend`](crate::Hypervisor::suspend).
    pub async fn suspend(&self, name: &VmName) -> Result<VmHandle> {
        within(operation!("suspend", vm = name), self.operate(name, &[VmRequest::Suspend])).await
    }

    async fn remove_locked(&self, locked: LockedVm, record: VmRecord, force: bool) -> Result<()> {
        about(record.handle.id);
        let is_unfinished = record.is_unfinished();
        if !is_unfinished || self.is_whole(&record).await.unwrap_or(false) {
            match self.state(&record.handle).await {
                Ok(state) if state.is_live() && !force => {
                    return Err(InvalidTransition { state, operation: Operation::Destroy }.into());
                }
                Ok(_) => {}
                // Force helps with a hypervisor that fails, but not with one that is missing here.
                Err(error) if !force || matches!(error, Error::UnknownBackend { .. }) => return Err(error),
                Err(error) => {
                    warn!(vm = %record.handle.name(), %error, "cannot find out whether the VM lives; removing it by force");
                }
            }
        }
        let vm = record.handle;
        let begun = VmRecord::intending(vm.clone(), intent(Operation::Destroy));
        if let Err(error) = locked.write_since(&begun) {
            // On a full disk, a removal makes room; and an interrupted removal can be repeated
            // anyway.
            warn!(vm = %vm.name(), %error, "cannot record that the VM is being removed");
        }
        match self.hypervisor.destroy(vm.clone()).await {
            Ok(()) => locked.remove(),
            Err(error) => {
                self.take_back_removal(&locked, vm, is_unfinished, &error).await;
                Err(error)
            }
        }
    }

    /// Removes the intent of a removal that has removed nothing. Otherwise the intent stays: parts
    /// of the VM may be missing, and it can only be removed.
    async fn take_back_removal(&self, locked: &LockedVm, vm: VmHandle, was_begun: bool, error: &Error) {
        let state = self.state(&vm).await;
        match state {
            Ok(state) if self.shows_what_is_missing(&vm) && is_usable(&state) => {
                write_outcome(locked, &vm.in_state(state))
            }
            // If the VM is in use, the backend has touched nothing.
            Ok(state) if error.kind() == ErrorKind::Busy && !was_begun && is_usable(&state) => {
                write_outcome(locked, &vm.in_state(state));
            }
            Err(unknown) if error.kind() == ErrorKind::Busy && !was_begun => {
                warn!(vm = %vm.name(), error = %unknown, "unknown state of the VM that could not be removed");
                write_outcome(locked, &vm);
            }
            _ => {}
        }
    }

    /// Returns whether an interrupted removal of the VM has removed nothing yet.
    ///
    /// # Errors
    /// Those of the hypervisor's `state`.
    async fn is_whole(&self, record: &VmRecord) -> Result<bool> {
        // After an interrupted creation the hypervisor is not asked.
        if !self.is_whole_in(record, &VmState::Stopped) {
            return Ok(false);
        }
        Ok(self.is_whole_in(record, &self.state(&record.handle).await?))
    }

    /// Returns a VM with its current state.
    ///
    /// # Errors
    /// `NotFound`; `Record`; `TimedOut` if its hypervisor does not reply.
    pub async fn info(&self, name: &VmName) -> Result<VmHandle> {
        let (record, is_cut_off) = self.store.read_now(name)?;
        let state = match self.look(&record, is_cut_off).await {
            // A monitor serves one client at a time: if many ask at once, the second query gets a
            // reply.
            Err(Error::TimedOut { .. }) => self.look(&record, is_cut_off).await?,
            state => state?,
        };
        Ok(record.handle.in_state(state))
    }

    /// Returns the guest's address as reachable from the host; never cached.
    ///
    /// # Errors
    /// Those of [`Hypervisor::guest_ip`](crate::Hypervisor::guest_ip).
    pub async fn guest_ip(&self, name: &VmName) -> Result<String> {
        self.hypervisor.guest_ip(&self.store.read(name)?.handle).await
    }

    /// Returns the endpoint of the VM's console.
    ///
    /// # Errors
    /// Those of [`Hypervisor::console_endpoint`](crate::Hypervisor::console_endpoint).
    pub fn console_endpoint(&self, name: &VmName) -> Result<ConsoleEndpoint> {
        self.hypervisor.console_endpoint(&self.store.read(name)?.handle)
    }

    /// Returns the file with the output of the guest's serial console.
    ///
    /// # Errors
    /// `NotFound` if the backend has none.
    pub fn console_log(&self, name: &VmName) -> Result<PathBuf> {
        let log = self.store.read(name)?.handle.console_log;
        log.ok_or_else(|| Error::not_found(Subject::ConsoleLog, name))
    }

    /// Returns the file with the output of the hypervisor.
    ///
    /// # Errors
    /// `NotFound` if the backend has none.
    pub fn hypervisor_log(&self, name: &VmName) -> Result<PathBuf> {
        let log = self.store.read(name)?.handle.hypervisor_log;
        log.ok_or_else(|| Error::not_found(Subject::HypervisorLog, name))
    }

    /// Locks a VM and reads its record; removes the remains of a VM without a record.
    ///
    /// # Errors
    /// `NotFound` without a VM of that name; `Busy`; `Record`.
    async fn take(&self, name: &VmName, deadline: Instant) -> Result<(LockedVm, VmRecord)> {
        let locked = self.store.lock(name, deadline).await?;
        match locked.record()? {
            Some(record) => {
                about(record.handle.id);
                Ok((locked, record))
            }
            None => {
                sweep(locked)?;
                Err(Error::not_found(Subject::Vm, name))
            }
        }
    }

    async fn operate(&self, name: &VmName, orders: &[VmRequest]) -> Result<VmHandle> {
        self.operate_on_clock(name, orders).await.map(|done| done.vm)
    }

    /// Does operations on a VM, and returns also whether its guest's clock is right.
    async fn operate_on_clock(&self, name: &VmName, orders: &[VmRequest]) -> Result<ClockedVm> {
        let patience = orders.iter().fold(PATIENCE, |patience, order| match order {
            VmRequest::Stop(timeout) => patience.saturating_add(*timeout),
            _ => patience,
        });
        let locked = self.store.lock(name, later(patience)).await?;
        let only_stops = orders.iter().all(|order| matches!(order, VmRequest::Stop(_)));
        let Some(record) = found(&locked, only_stops)? else {
            sweep(locked)?;
            return Err(Error::not_found(Subject::Vm, name));
        };
        about(record.handle.id);
        let record = self.finish_restore(&locked, record).await?;
        let mut done = ClockedVm::unknown(self.settle(record, orders[0].operation()).await?);
        for order in orders {
            done = self.carry_out(&locked, done.vm, *order).await?;
        }
        Ok(done)
    }

    /// Carries out one operation on a VM whose lock is held: intent, effect, outcome.
    async fn carry_out(&self, locked: &LockedVm, vm: VmHandle, order: VmRequest) -> Result<ClockedVm> {
        let order = match order {
            // It continues as it was saved; another spec waits until it boots again.
            VmRequest::Start if self.is_saved(&vm).await => VmRequest::Resume(None),
            order => order,
        };
        let operation = order.operation();
        let before = vm.clone();
        let vm = match order {
            VmRequest::Start => self.as_it_shall_start(vm).await?,
            _ => vm,
        };
        match locked.write_since(&VmRecord::intending(vm.clone(), intent(operation))) {
            Ok(()) => {}
            // A full disk is no reason to leave a guest running; an interrupted stop needs no
            // recovery.
            Err(error) if operation == Operation::Stop => {
                warn!(vm = %vm.name(), %error, "cannot record that the VM is being stopped")
            }
            Err(error) => return Err(error),
        }
        let done = match order {
            VmRequest::Start => self.hypervisor.start(&vm).await.map(ClockedVm::booted),
            VmRequest::Stop(timeout) => self.hypervisor.stop(&vm, timeout).await.map(ClockedVm::unknown),
            VmRequest::Suspend => self.hypervisor.suspend(&vm).await.map(ClockedVm::unknown),
            VmRequest::Resume(paused) => self.resume_by_backend(&vm, paused).await,
            VmRequest::Save => self.save_by_backend(&vm).await.map(ClockedVm::unknown),
        };
        match done {
            Ok(done) => {
                write_outcome(locked, &done.vm);
                Ok(done)
            }
            // Nothing was done, so there is nothing to recover.
            Err(Error::Transition(refused)) => {
                write_outcome(locked, &before.in_state(refused.state.clone()));
                Err(refused.into())
            }
            // A start that finds the VM in use has touched nothing.
            Err(error) if operation == Operation::Start && error.kind() == ErrorKind::Busy => {
                write_outcome(locked, &before);
                Err(error)
            }
            Err(error) => {
                self.write_truth(locked, vm, operation).await;
                Err(error)
            }
        }
    }

    /// Completes the interrupted operation of a killed process, as far as `order` depends on it.
    ///
    /// After a stop, suspend or resume there is nothing to do: the VM's current state is valid, and
    /// a start and a stop continue from any state. Only an unrecorded start has information that is
    /// recorded nowhere else: that on its run.
    ///
    /// # Errors
    /// `InvalidState` for a VM that can only be removed.
    async fn settle(&self, record: VmRecord, order: Operation) -> Result<VmHandle> {
        if record.is_unfinished() && self.is_whole(&record).await? {
            return Ok(record.handle);
        }
        let VmRecord { handle: vm, intent: begun, .. } = record;
        let state = match begun.map(|intent| intent.operation) {
            Some(Operation::Prepare) => VmState::Preparing,
            Some(Operation::Destroy) => VmState::Destroyed,
            Some(Operation::Start | Operation::Resume)
                if matches!(
                    order,
                    Operation::Suspend | Operation::Resume | Operation::Save | Operation::Snapshot
                ) =>
            {
                return match self.state(&vm).await? {
                    VmState::Running if vm.run.is_none() => self.hypervisor.start(&vm).await,
                    _ => Ok(vm),
                };
            }
            _ => return Ok(vm),
        };
        Err(InvalidTransition { state, operation: order }.into())
    }

    /// Returns the current state; does not wait for a backend that breaks its promise to reply
    /// soon.
    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        timeout(STATE_PATIENCE, self.hypervisor.state(vm)).await.unwrap_or_else(|_| {
            let awaited = format!("the state of the VM `{}`", vm.name());
            Err(Error::timed_out(awaited, STATE_PATIENCE))
        })
    }

    /// Records the current state of a VM after a failed operation.
    async fn write_truth(&self, locked: &LockedVm, vm: VmHandle, failed: Operation) {
        match self.state(&vm).await {
            // The VM runs after all, but the information on the run is lost: the intent stays, so
            // that the next operation recovers it.
            Ok(state) if failed == Operation::Start && state.is_live() => {}
            Ok(state) => write_outcome(locked, &vm.in_state(state)),
            // The state is unknown, so the intent stays.
            Err(error) => warn!(vm = %vm.name(), %error, "unknown state after the failed operation"),
        }
    }

    /// Returns whether this VM's backend reports a VM with a missing part as such: only then is a
    /// VM usable after an interrupted removal, in the states of [`is_usable`].
    fn shows_what_is_missing(&self, vm: &VmHandle) -> bool {
        self.abilities_of(vm).capabilities().notices_missing_parts
    }

    /// Returns whether the VM is whole after an interrupted removal, given its state.
    fn is_whole_in(&self, record: &VmRecord, state: &VmState) -> bool {
        let is_removal = record.intent.as_ref().is_some_and(|intent| intent.operation == Operation::Destroy);
        is_removal && self.shows_what_is_missing(&record.handle) && is_usable(state)
    }

    /// Returns the current state of a record's VM. `is_cut_off` is whether the recorded operation
    /// was interrupted.
    async fn look(&self, record: &VmRecord, is_cut_off: bool) -> Result<VmState> {
        let vm = &record.handle;
        let cut_off = match record.intent.as_ref().map(|intent| intent.operation) {
            Some(Operation::Prepare) => "its creation was interrupted: remove the VM",
            Some(Operation::Destroy) => "its removal was interrupted: remove the VM again",
            _ => "",
        };
        let state = self.state(vm).await?;
        let is_begun = !self.is_whole_in(record, &state);
        if is_cut_off && !cut_off.is_empty() && !state.is_live() && is_begun {
            return Ok(VmState::failed(FailureKind::Interrupted, cut_off));
        }
        // The record exists without a removal: a removal writes its intent first.
        let is_there = || self.store.is_left_alone(record);
        if state == VmState::Destroyed
            && record.intent.is_none()
            && vm.state != VmState::Preparing
            && is_there()
        {
            let missing =
                format!("its record exists, but its files of the backend `{}` are missing", vm.backend);
            return Ok(VmState::failed(FailureKind::Other, missing));
        }
        // During its creation a VM looks more complete than it is.
        let is_making = vm.state == VmState::Preparing;
        Ok(if is_making { VmState::Preparing } else { state })
    }
}

/// Returns whether a VM in this state has all its parts.
fn is_usable(state: &VmState) -> bool {
    match state {
        VmState::Preparing | VmState::Destroyed => false,
        VmState::Failed { cause } => cause.kind != FailureKind::Interrupted,
        _ => true,
    }
}

/// Reads a VM's record. With `in_need`, for what ends a VM, the runtime record is enough.
fn found(locked: &LockedVm, in_need: bool) -> Result<Option<VmRecord>> {
    locked.record().or_else(|error| match error {
        Error::Record { .. } if in_need => locked.last_known().map(Some).ok_or(error),
        error => Err(error),
    })
}

/// Records the result of an operation.
///
/// A failure does not affect the VM, so the operation succeeds nevertheless: a healthy guest is not
/// ended for it. The intent stays, and makes the next operation ask again.
fn write_outcome(locked: &LockedVm, vm: &VmHandle) {
    if let Err(error) = locked.write_since(&VmRecord::settled(vm.clone())) {
        warn!(vm = %vm.name(), state = %vm.state, %error, "the VM is in this state, but that can't be recorded; the next command will");
    }
}

/// Removes the directory of an interrupted `create` or `remove` without a record.
fn sweep(locked: LockedVm) -> Result<()> {
    match locked.stranger()? {
        None => locked.remove(),
        Some(path) => {
            let problem = "the VM's directory has this file and no record of how to remove it";
            Err(Error::record(path, problem))
        }
    }
}

/// Removes the files of a failed `create`.
fn give_up(locked: LockedVm) {
    if let Err(error) = locked.remove() {
        warn!(%error, "cannot remove the directory of a VM that was not created");
    }
}

fn intent(operation: Operation) -> Intent {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Intent { operation, since, pid: std::process::id(), snapshot: None }
}
