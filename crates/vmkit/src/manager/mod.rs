//! The operations that the command and any other program call: [`VmManager`].
//!
//! It keeps one record for each VM and lets one operation at a time work on a VM. What it is about
//! to do it writes down first, so that whoever comes next after a crash can finish it or undo it.
//! The state in a record is only what was known; reality is asked of the hypervisor.
//!
//! ```text
//! lock ─▶ settle what was cut off ─▶ write the intent ─▶ hypervisor ─▶ write what came of it ─▶ unlock
//! ```

mod ahead;
#[cfg(feature = "ssh")]
mod clock;
mod console;
mod disks;
mod ephemeral;
mod forward;
mod knock;
mod list;
#[cfg(feature = "ssh")]
mod login;
#[cfg(all(feature = "ssh", feature = "images"))]
mod readiness;
mod reconfigure;
mod removal;
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

pub use list::VmEntry;
#[cfg(all(feature = "ssh", feature = "images"))]
pub(crate) use login::GuestAge;
pub use wait::WaitCondition;

use crate::abilities::Abilities;
use crate::deadline::later;
use crate::error::{Error, ErrorKind, Result, Subject};
use crate::handle::{BackendTag, ConsoleEndpoint, VmHandle};
use crate::hypervisor::Backend;
use crate::lifecycle::{FailureKind, InvalidTransition, Operation, VmState};
use crate::span::{about, operation, within};
use crate::spec::{VmName, VmSpec};
use crate::store::{EphemeralGuard, Home, Intent, LockedVm, RecordStore, VmRecord};

/// How long an operation waits for another one on the same VM; a stop may itself take its timeout.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a backend has to answer where a VM is in its life; the contract gives it a second or
/// two.
const STATE_PATIENCE: Duration = Duration::from_secs(5);

/// Creates, runs, finds and removes VMs that outlive the process, over any hypervisor.
///
/// # Concurrency
/// Any number of managers in any number of processes may work on one home. Operations on one VM
/// wait for each other, 30 s at most (`stop` and `restart`: their timeout more), and answer `Busy`
/// with the holder's PID after that. What only reads waits for nobody.
///
/// # Cancel safety
/// A dropped future, like a killed process, leaves a record of what was being done. The next
/// operation on the VM finishes it or undoes it.
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

/// An operation on a VM that exists, with what it needs.
#[derive(Debug, Clone, Copy)]
enum VmRequest {
    Start,
    Stop(Duration),
    Suspend,
    Resume,
}

impl VmRequest {
    fn operation(self) -> Operation {
        match self {
            VmRequest::Start => Operation::Start,
            VmRequest::Stop(_) => Operation::Stop,
            VmRequest::Suspend => Operation::Suspend,
            VmRequest::Resume => Operation::Resume,
        }
    }
}

#[cfg(all(target_os = "linux", feature = "qemu"))]
impl VmManager<crate::QemuHypervisor> {
    /// Creates a manager of QEMU's VMs in a home, with that home's directories for what they have
    /// beside their records. Touches nothing.
    ///
    /// The program's `main` calls [`run_if_keeper`](crate::run_if_keeper) first.
    pub fn qemu(home: Home) -> Self {
        let builder = crate::QemuHypervisor::builder(home.vms(), home.run()).cache_dir(home.cache());
        Self::new(builder.build(), home)
    }
}

impl<H: Backend + 'static> VmManager<H> {
    /// Creates a manager of the VMs in a home. Touches nothing.
    ///
    /// A VM whose spec names no backend gets the one of the hypervisor's tag: a router's default.
    pub fn new(hypervisor: H, home: Home) -> Self {
        let backend = hypervisor.tag();
        Self { hypervisor: Arc::new(hypervisor), backend, store: RecordStore::new(home) }
    }

    /// Returns where the VMs are kept.
    pub fn home(&self) -> &Home {
        self.store.home()
    }

    /// Returns the hypervisor that runs the VMs.
    pub fn hypervisor(&self) -> &H {
        &self.hypervisor
    }

    /// Returns what can be done with this VM beside the contract.
    fn abilities_of(&self, vm: &VmHandle) -> Abilities<'_> {
        self.hypervisor.abilities(&vm.backend)
    }

    /// Returns what can be done with a VM of this spec beside the contract.
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
    /// `AlreadyExists` for a name in use; otherwise those of [`Hypervisor::prepare`](crate::Hypervisor::prepare), and of the
    /// home. Nothing is left behind.
    pub async fn create(&self, spec: VmSpec) -> Result<VmHandle> {
        self.create_owned(spec).await.map(|(vm, _)| vm)
    }

    /// Creates a VM, and with it its owner if it is one that goes with its owner.
    async fn create_owned(&self, spec: VmSpec) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let span = operation!("create", vm = spec.name());
        within(span, self.create_in_span(spec)).await
    }

    async fn create_in_span(&self, spec: VmSpec) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        self.check_id(&spec)?;
        let locked = self.store.lock_new(spec.name(), Instant::now() + PATIENCE).await?;
        match locked.record()? {
            Some(record) if record.is_unfinished() && !self.is_whole(&record).await? => {
                self.hypervisor.destroy(record.handle).await?
            }
            Some(_) => return Err(Error::already_exists(Subject::Vm, spec.name())),
            None => {}
        }
        if let Some(path) = locked.stranger()? {
            let problem = format!(
                "this lies where the VM `{}` would be kept, and no record says whose it is",
                spec.name()
            );
            return Err(Error::record(path, problem));
        }
        locked.clear()?;
        self.make(locked, spec).await
    }

    async fn make(&self, locked: LockedVm, spec: VmSpec) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let id = spec.id().unwrap_or_else(Uuid::new_v4);
        about(id);
        let spec = spec.with_id(id);
        let backend = self.backend_of(&spec).clone();
        let preparing = VmHandle::preparing(id, backend, spec);
        let intending = VmRecord::intending(preparing.clone(), intent(Operation::Prepare));
        // Once more, since it is written down now: of two who want one identity at once, the later
        // one sees the other.
        let checked = locked.write_made(&intending).and_then(|()| {
            self.check_id(&preparing.spec)?;
            self.check_disks(&preparing.spec)
        });
        if let Err(error) = checked {
            give_up(locked);
            return Err(error);
        }
        let made = self.prepare(&locked, &preparing).await;
        match &made {
            // What was written down first would not have told the next one whom to ask.
            Ok((vm, _)) if vm.backend != preparing.backend => {
                let why =
                    format!("the hypervisor makes VMs of `{}`, so that has to be its own tag", vm.backend);
                self.hypervisor.destroy(vm.clone()).await?;
                give_up(locked);
                return Err(Error::invalid("backend", &preparing.backend, why));
            }
            Ok(_) => {}
            Err(_) => match self.hypervisor.destroy(preparing.clone()).await {
                Ok(()) => give_up(locked),
                // The record stays, with its intent: whoever removes the VM tries again.
                Err(error) => {
                    warn!(vm = %preparing.name(), %error, "cannot remove what was made before the failure")
                }
            },
        }
        made
    }

    async fn prepare(
        &self,
        locked: &LockedVm,
        wanted: &VmHandle,
    ) -> Result<(VmHandle, Option<EphemeralGuard>)> {
        let owner = ephemeral::is_ephemeral(&wanted.spec).then(|| locked.own()).transpose()?;
        let vm = self.hypervisor.prepare(&wanted.spec).await?;
        locked.write_made(&VmRecord::settled(vm.clone()))?;
        Ok((vm, owner))
    }

    /// Refuses an identity that another VM has, or is about to have: undoing a failed `create`
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

    /// Boots a VM; on a running one it succeeds and returns the facts of that run.
    ///
    /// # Errors
    /// `InvalidState` for a suspended VM, and those of [`Hypervisor::start`](crate::Hypervisor::start).
    pub async fn start(&self, name: &VmName) -> Result<VmHandle> {
        within(operation!("start", vm = name), self.operate(name, &[VmRequest::Start])).await
    }

    /// Shuts a VM down, by force once `timeout` has passed; zero is by force at once.
    ///
    /// A VM that runs is stopped even where the record of its making is spoilt: what was written
    /// since tells how.
    ///
    /// # Errors
    /// Those of [`Hypervisor::stop`](crate::Hypervisor::stop).
    pub async fn stop(&self, name: &VmName, timeout: Duration) -> Result<VmHandle> {
        within(operation!("stop", vm = name), self.operate(name, &[VmRequest::Stop(timeout)])).await
    }

    /// Stops a VM and boots it again, with nobody in between.
    ///
    /// # Errors
    /// Those of [`Hypervisor::stop`](crate::Hypervisor::stop) and [`Hypervisor::start`](crate::Hypervisor::start).
    pub async fn restart(&self, name: &VmName, timeout: Duration) -> Result<VmHandle> {
        let restart = async {
            // What can't be started again is not stopped.
            if let Ok(record) = self.store.read(name) {
                self.check_restart(&record.handle).await?;
            }
            self.operate(name, &[VmRequest::Stop(timeout), VmRequest::Start]).await
        };
        within(operation!("restart", vm = name), restart).await
    }

    /// Has cloud-init run again at the VM's next start, as on a new machine: with another
    /// instance-id.
    ///
    /// Changes nothing about a VM that runs until it is started anew, and nothing at all about one
    /// without cloud-init.
    ///
    /// # Errors
    /// `NotFound`; `Busy`; `InvalidState` for a VM that can only be removed; `Io` and `Host` where
    /// it can't be recorded.
    pub async fn rerun_cloud_init(&self, name: &VmName) -> Result<VmHandle> {
        let again = async {
            let (locked, mut record) = self.take(name, Instant::now() + PATIENCE).await?;
            // Only to refuse what can only be removed: an intent that is there stays for the
            // operation that comes next.
            self.settle(record.clone(), VmRequest::Start).await?;
            record.handle.spec = record.handle.spec.with_cloud_init_again();
            locked.write_wanted(&record)?;
            Ok(record.handle)
        };
        within(operation!("rerun_cloud_init", vm = name), again).await
    }

    /// Pauses a VM's vCPUs.
    ///
    /// # Errors
    /// `InvalidState` unless it lives, and those of [`Hypervisor::suspend`](crate::Hypervisor::suspend).
    pub async fn suspend(&self, name: &VmName) -> Result<VmHandle> {
        within(operation!("suspend", vm = name), self.operate(name, &[VmRequest::Suspend])).await
    }

    /// Unpauses a VM's vCPUs, and sets the guest's clock, which stood still meanwhile: by the guest
    /// agent where one runs, else over SSH where the VM's record has a login. Where neither does it
    /// within seconds, that is warned of, and the guest runs on.
    ///
    /// # Errors
    /// `InvalidState` unless it lives, and those of [`Hypervisor::resume`](crate::Hypervisor::resume).
    pub async fn resume(&self, name: &VmName) -> Result<VmHandle> {
        let resume = async {
            #[cfg(feature = "ssh")]
            let paused = self.paused_for(name);
            #[cfg(not(feature = "ssh"))]
            let paused = None;
            let (resumed, _is_settled) =
                crate::clock::resuming(paused, self.operate(name, &[VmRequest::Resume])).await;
            #[cfg(feature = "ssh")]
            if let (Ok(vm), false) = (&resumed, _is_settled) {
                self.set_clock(vm, paused).await;
            }
            resumed
        };
        within(operation!("resume", vm = name), resume).await
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
                // Force is for a hypervisor that is sick, and can do nothing with one that is
                // missing here.
                Err(error) if !force || matches!(error, Error::UnknownBackend { .. }) => return Err(error),
                Err(error) => {
                    warn!(vm = %record.handle.name(), %error, "cannot tell whether the VM lives; removing it by force");
                }
            }
        }
        let vm = record.handle;
        let begun = VmRecord::intending(vm.clone(), intent(Operation::Destroy));
        if let Err(error) = locked.write_since(&begun) {
            // On a full disk this is what makes room, and a removal that is cut off can be begun
            // again in any case.
            warn!(vm = %vm.name(), %error, "cannot write down that the VM is being removed");
        }
        match self.hypervisor.destroy(vm.clone()).await {
            Ok(()) => locked.remove(),
            Err(error) => {
                self.take_back_removal(&locked, vm, is_unfinished, &error).await;
                Err(error)
            }
        }
    }

    /// Takes the intent of a removal back that has removed nothing. Else it stays: what is left may
    /// lack a part, and is fit for nothing but to be removed.
    async fn take_back_removal(&self, locked: &LockedVm, vm: VmHandle, was_begun: bool, error: &Error) {
        let state = self.state(&vm).await;
        match state {
            Ok(state) if self.shows_what_is_missing(&vm) && is_usable(&state) => {
                write_outcome(locked, &vm.in_state(state))
            }
            // Where the VM is in use, a backend has touched nothing.
            Ok(state) if error.kind() == ErrorKind::Busy && !was_begun && is_usable(&state) => {
                write_outcome(locked, &vm.in_state(state));
            }
            Err(unknown) if error.kind() == ErrorKind::Busy && !was_begun => {
                warn!(vm = %vm.name(), error = %unknown, "cannot tell the state of the VM that could not be removed");
                write_outcome(locked, &vm);
            }
            _ => {}
        }
    }

    /// Tells of a VM whose removal was interrupted whether nothing of it has been removed yet.
    ///
    /// # Errors
    /// Those of the hypervisor's `state`.
    async fn is_whole(&self, record: &VmRecord) -> Result<bool> {
        // Of a making that was interrupted, nothing is asked.
        if !self.is_whole_in(record, &VmState::Stopped) {
            return Ok(false);
        }
        Ok(self.is_whole_in(record, &self.state(&record.handle).await?))
    }

    /// Returns a VM with the state that it has now.
    ///
    /// # Errors
    /// `NotFound`; `Record`; `TimedOut` when its hypervisor does not answer.
    pub async fn info(&self, name: &VmName) -> Result<VmHandle> {
        let (record, is_cut_off) = self.store.read_now(name)?;
        let state = match self.look(&record, is_cut_off).await {
            // A monitor serves one client at a time: where many ask at once, the second question is
            // answered.
            Err(Error::TimedOut { .. }) => self.look(&record, is_cut_off).await?,
            state => state?,
        };
        Ok(record.handle.in_state(state))
    }

    /// Returns the address at which the host reaches the guest, asked again.
    ///
    /// # Errors
    /// Those of [`Hypervisor::guest_ip`](crate::Hypervisor::guest_ip).
    pub async fn guest_ip(&self, name: &VmName) -> Result<String> {
        self.hypervisor.guest_ip(&self.store.read(name)?.handle).await
    }

    /// Returns where the VM's console is.
    ///
    /// # Errors
    /// Those of [`Hypervisor::console_endpoint`](crate::Hypervisor::console_endpoint).
    pub fn console_endpoint(&self, name: &VmName) -> Result<ConsoleEndpoint> {
        self.hypervisor.console_endpoint(&self.store.read(name)?.handle)
    }

    /// Returns the file that keeps what the guest's serial console said.
    ///
    /// # Errors
    /// `NotFound` where the backend keeps none.
    pub fn console_log(&self, name: &VmName) -> Result<PathBuf> {
        let log = self.store.read(name)?.handle.console_log;
        log.ok_or_else(|| Error::not_found(Subject::ConsoleLog, name))
    }

    /// Returns the file that keeps what the hypervisor said.
    ///
    /// # Errors
    /// `NotFound` where the backend keeps none.
    pub fn hypervisor_log(&self, name: &VmName) -> Result<PathBuf> {
        let log = self.store.read(name)?.handle.hypervisor_log;
        log.ok_or_else(|| Error::not_found(Subject::HypervisorLog, name))
    }

    /// Locks a VM and reads its record; what is left of one without a record is removed.
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
        let mut vm = self.settle(record, orders[0]).await?;
        for order in orders {
            vm = self.carry_out(&locked, vm, *order).await?;
        }
        Ok(vm)
    }

    /// Does one operation on a VM whose lock is held: intent, effect, outcome.
    async fn carry_out(&self, locked: &LockedVm, vm: VmHandle, order: VmRequest) -> Result<VmHandle> {
        let operation = order.operation();
        let before = vm.clone();
        let vm = match order {
            VmRequest::Start => self.as_it_shall_start(vm).await?,
            _ => vm,
        };
        match locked.write_since(&VmRecord::intending(vm.clone(), intent(operation))) {
            Ok(()) => {}
            // A full disk is no reason to leave a guest running; a stop that is cut off needs no
            // finishing.
            Err(error) if operation == Operation::Stop => {
                warn!(vm = %vm.name(), %error, "cannot write down that the VM is being stopped")
            }
            Err(error) => return Err(error),
        }
        let done = match order {
            VmRequest::Start => self.hypervisor.start(&vm).await,
            VmRequest::Stop(timeout) => self.hypervisor.stop(&vm, timeout).await,
            VmRequest::Suspend => self.hypervisor.suspend(&vm).await,
            VmRequest::Resume => self.hypervisor.resume(&vm).await,
        };
        match done {
            Ok(vm) => {
                write_outcome(locked, &vm);
                Ok(vm)
            }
            // Nothing was done, so nothing was cut off.
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

    /// Finishes what a killed process had begun, as far as `order` builds on it.
    ///
    /// Stop, suspend and resume need nothing: done or not, what the VM is now is true, and a start
    /// and a stop go on from anywhere. Only an unrecorded start has something that nobody else
    /// knows: the facts of the run.
    ///
    /// # Errors
    /// `InvalidState` for a VM that can only be removed.
    async fn settle(&self, record: VmRecord, order: VmRequest) -> Result<VmHandle> {
        if record.is_unfinished() && self.is_whole(&record).await? {
            return Ok(record.handle);
        }
        let VmRecord { handle: vm, intent: begun, .. } = record;
        let state = match begun.map(|intent| intent.operation) {
            Some(Operation::Prepare) => VmState::Preparing,
            Some(Operation::Destroy) => VmState::Destroyed,
            Some(Operation::Start) if matches!(order, VmRequest::Suspend | VmRequest::Resume) => {
                return match self.state(&vm).await? {
                    VmState::Running => self.hypervisor.start(&vm).await,
                    _ => Ok(vm),
                };
            }
            _ => return Ok(vm),
        };
        Err(InvalidTransition { state, operation: order.operation() }.into())
    }

    /// Asks reality; a backend that breaks its promise to answer soon is not waited for.
    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        timeout(STATE_PATIENCE, self.hypervisor.state(vm)).await.unwrap_or_else(|_| {
            let awaited = format!("the state of the VM `{}`", vm.name());
            Err(Error::timed_out(awaited, STATE_PATIENCE))
        })
    }

    /// Records what is true of a VM after an operation on it failed.
    async fn write_truth(&self, locked: &LockedVm, vm: VmHandle, failed: Operation) {
        match self.state(&vm).await {
            // It runs after all, and what is known of the run is lost: the intent stays, for the
            // next one to ask.
            Ok(state) if failed == Operation::Start && state.is_live() => {}
            Ok(state) => write_outcome(locked, &vm.in_state(state)),
            // Nothing is known, so the intent stays.
            Err(error) => warn!(vm = %vm.name(), %error, "cannot tell what the failed operation left"),
        }
    }

    /// Returns whether the state of this VM's backend shows that a part of the VM was removed: only
    /// then is a VM usable whose removal was interrupted, in any state but those that [`is_usable`]
    /// names.
    fn shows_what_is_missing(&self, vm: &VmHandle) -> bool {
        self.abilities_of(vm).capabilities().notices_missing_parts
    }

    /// Tells of a VM whose removal was interrupted whether it is whole, if it is in this state.
    fn is_whole_in(&self, record: &VmRecord, state: &VmState) -> bool {
        let is_removal = record.intent.as_ref().is_some_and(|intent| intent.operation == Operation::Destroy);
        is_removal && self.shows_what_is_missing(&record.handle) && is_usable(state)
    }

    /// Returns the state that the VM of a record has now; `is_cut_off` tells that nobody does what
    /// the record says.
    async fn look(&self, record: &VmRecord, is_cut_off: bool) -> Result<VmState> {
        let vm = &record.handle;
        let cut_off = match record.intent.as_ref().map(|intent| intent.operation) {
            Some(Operation::Prepare) => "its making was interrupted: remove it",
            Some(Operation::Destroy) => "its removal was interrupted: remove it again",
            _ => "",
        };
        let state = self.state(vm).await?;
        let is_begun = !self.is_whole_in(record, &state);
        if is_cut_off && !cut_off.is_empty() && !state.is_live() && is_begun {
            return Ok(VmState::failed(FailureKind::Interrupted, cut_off));
        }
        // Its record is there still, and says nothing of a removal: whoever removes a VM writes
        // that down first.
        let is_there = || self.store.is_left_alone(record);
        if state == VmState::Destroyed
            && record.intent.is_none()
            && vm.state != VmState::Preparing
            && is_there()
        {
            let missing =
                format!("its record is there, and what the backend `{}` keeps of it is not", vm.backend);
            return Ok(VmState::failed(FailureKind::Other, missing));
        }
        // While it is being made, what is there already looks like more than there is.
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

/// Reads a VM's record; for what ends a VM, `in_need`, what was last known of it will do.
fn found(locked: &LockedVm, in_need: bool) -> Result<Option<VmRecord>> {
    locked.record().or_else(|error| match error {
        Error::Record { .. } if in_need => locked.last_known().map(Some).ok_or(error),
        error => Err(error),
    })
}

/// Records what an operation led to.
///
/// Failing to do so changes nothing about the VM, so it is no failure of the operation: least of
/// all is a healthy guest ended for it. The intent that stays makes the next operation ask again.
fn write_outcome(locked: &LockedVm, vm: &VmHandle) {
    if let Err(error) = locked.write_since(&VmRecord::settled(vm.clone())) {
        warn!(vm = %vm.name(), state = %vm.state, %error, "the VM is in this state, but that can't be recorded; the next command will");
    }
}

/// Removes a directory in which a `create` or a `remove` was cut off while there was no record.
fn sweep(locked: LockedVm) -> Result<()> {
    match locked.stranger()? {
        None => locked.remove(),
        Some(path) => {
            let problem = "this lies in a VM's directory without a record, so nobody knows how to remove it";
            Err(Error::record(path, problem))
        }
    }
}

/// Removes what a failed `create` wrote itself.
fn give_up(locked: LockedVm) {
    if let Err(error) = locked.remove() {
        warn!(%error, "cannot remove the directory of a VM that was not made");
    }
}

fn intent(operation: Operation) -> Intent {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    Intent { operation, since, pid: std::process::id() }
}
