//! The VM of a server, from the request that creates it to its last state, which clients can still
//! read.
//!
//! ```text
//! NoVm ──ensure──▶ WaitingForInit ──▶ Active ──stop──▶ Rundown ──▶ RundownComplete
//!                        │              └──failed start──▶┘              │  ▲
//!                        └────────────────── failed ────────────────────▶┘  │
//!                        ▲────────────────── ensure ─────────────────────┘──┘
//! ```
//!
//! Before it creates a VM, the server asks its host for CPUID, by a kernel VM of its own; no VM
//! exists for clients meanwhile.
//!
//! One task drives a VM: it creates it, handles requests and the guest's events one by one, and
//! publishes each state with a generation that grows by one. Clients see only the latest state; one
//! that polls rarely misses states.
//!
//! Source: propolis-server's `vm` module.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use slog::{Logger, error, info};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;

use super::behaviour::{DeathPoint, Gate, PropolisBehaviour};
use super::gates::MachineGates;
use super::guest::{self, GuestEvent, GuestOrder};
use super::host::{FakeHost, HeldByVm, HostRefusal};
use super::queue::{InstanceChange, RequestDenied, RequestQueue};
use super::serial::{SerialHandle, SerialTask, UART_BYTES};
use super::wire::{
    Cpuid, CpuidEntry, CpuidVendor, InstanceEnsureRequest, InstanceInitializationMethod,
    InstanceMigrateInitiateResponse, InstanceMigrateStatusResponse, InstanceMigrationStatus,
    InstanceProperties, InstanceSpec, InstanceSpecGetResponse, InstanceSpecStatus, InstanceState,
    InstanceStateMonitorResponse, InstanceStateRequested, MigrationState,
};

/// Ends the server as a panic does, without any cleanup.
pub(super) type DieHook = Arc<dyn Fn(&str) + Send + Sync>;

/// The server's one VM, if it has one.
pub(super) struct PropolisMachine {
    log: Logger,
    host: FakeHost,
    behaviour: PropolisBehaviour,
    die: DieHook,
    gates: MachineGates,
    now: Mutex<MachineNow>,
    /// The VM's devices; the driver has exclusive access while it pauses them.
    objects: tokio::sync::RwLock<()>,
}

#[derive(Debug, Default)]
struct MachineNow {
    stage: VmStage,
    vm: Option<VmInfo>,
    active: Option<ActiveVm>,
    /// The states of a VM that was never created; kept so that clients that wait for its next state
    /// keep waiting.
    failed: Option<StatePublisher>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum VmStage {
    #[default]
    NoVm,
    WaitingForInit,
    Active,
    Rundown,
    RundownComplete,
}

/// The published properties of a VM.
#[derive(Debug)]
struct VmInfo {
    properties: InstanceProperties,
    spec: InstanceSpecStatus,
    states: watch::Receiver<InstanceStateMonitorResponse>,
}

/// The handles to an active VM.
#[derive(Debug)]
struct ActiveVm {
    queue: RequestQueue,
    events: mpsc::UnboundedSender<DriverEvent>,
    orders: mpsc::UnboundedSender<GuestOrder>,
    serial: SerialHandle,
}

#[derive(Debug)]
enum DriverEvent {
    Request(InstanceStateRequested),
    Guest(GuestEvent),
}

/// Why no VM was created.
#[derive(Debug)]
pub(super) enum EnsureError {
    /// There is one already.
    Taken,
    /// The creation failed; only the log has the reason.
    Failed(String),
    /// The driver has panicked.
    Dropped,
}

#[derive(Debug)]
struct StatePublisher(watch::Sender<InstanceStateMonitorResponse>);

impl StatePublisher {
    fn publish(&self, state: InstanceState) {
        self.0.send_modify(|now| {
            now.r#gen += 1;
            now.state = state;
        });
    }
}

impl PropolisMachine {
    pub(super) fn new(
        log: Logger,
        host: FakeHost,
        behaviour: PropolisBehaviour,
        die: DieHook,
        gates: MachineGates,
    ) -> Arc<Self> {
        let objects = tokio::sync::RwLock::default();
        Arc::new(Self { log, host, behaviour, die, gates, now: Mutex::default(), objects })
    }

    fn now(&self) -> MutexGuard<'_, MachineNow> {
        self.now.lock().expect("no holder panics")
    }

    /// Asks the host for CPUID, which the server does for a spec without CPUID; and a DNS server
    /// for Nexus.
    ///
    /// # Errors
    /// Fails if the kernel has a VM of that name already: another request is asking at this moment.
    pub(super) async fn ask_host(&self) -> io::Result<()> {
        let asking = self.host.ask_cpuid()?;
        self.gates.pass(Gate::Host).await;
        sleep(Duration::from_millis(self.behaviour.asks_host_millis)).await;
        // Explicitly, not in a drop: a server that is killed meanwhile leaves it behind.
        asking.destroy()
    }

    /// Creates a VM, and returns once it exists or can't be created.
    pub(super) async fn ensure(
        self: &Arc<Self>,
        request: InstanceEnsureRequest,
    ) -> Result<Option<InstanceMigrateInitiateResponse>, EnsureError> {
        let InstanceEnsureRequest { properties, init } = request;
        let migration_id = match &init {
            InstanceInitializationMethod::Spec { .. } => None,
            InstanceInitializationMethod::MigrationTarget { migration_id, .. } => Some(*migration_id),
        };
        let first = InstanceStateMonitorResponse {
            r#gen: 1,
            state: migration_id.map_or(InstanceState::Creating, |_| InstanceState::Migrating),
            migration: InstanceMigrateStatusResponse {
                migration_in: migration_id
                    .map(|id| InstanceMigrationStatus { id, state: MigrationState::Sync }),
                migration_out: None,
            },
        };
        let (states, seen) = watch::channel(first);
        let (answer, answered) = oneshot::channel();
        {
            let mut now = self.now();
            if !matches!(now.stage, VmStage::NoVm | VmStage::RundownComplete) {
                return Err(EnsureError::Taken);
            }
            let spec = match &init {
                InstanceInitializationMethod::Spec { spec } => InstanceSpecStatus::Present(filled_in(spec)),
                InstanceInitializationMethod::MigrationTarget { .. } => {
                    InstanceSpecStatus::WaitingForMigrationSource
                }
            };
            now.stage = VmStage::WaitingForInit;
            now.failed = None;
            now.vm = Some(VmInfo { properties: properties.clone(), spec, states: seen });
            let driver = VmDriver { machine: Arc::clone(self), states: StatePublisher(states) };
            tokio::spawn(driver.run(properties, init, answer));
        }
        match answered.await {
            Ok(Ok(())) => {
                Ok(migration_id.map(|migration_id| InstanceMigrateInitiateResponse { migration_id }))
            }
            Ok(Err(text)) => Err(EnsureError::Failed(text)),
            Err(_) => Err(EnsureError::Dropped),
        }
    }

    /// Returns the current or last VM, waiting while its devices are being paused.
    pub(super) async fn get(&self) -> Option<InstanceSpecGetResponse> {
        let _shared = self.objects.read().await;
        let now = self.now();
        let vm = now.vm.as_ref()?;
        let state = vm.states.borrow().state;
        Some(InstanceSpecGetResponse { properties: vm.properties.clone(), state, spec: vm.spec.clone() })
    }

    /// Returns whether the driver has exclusive access to the devices.
    pub(super) fn is_pausing(&self) -> bool {
        self.objects.try_read().is_err()
    }

    /// Returns a receiver of the states of the current or last VM.
    pub(super) fn states(&self) -> Option<watch::Receiver<InstanceStateMonitorResponse>> {
        Some(self.now().vm.as_ref()?.states.clone())
    }

    /// Queues a request, or returns `None` if no VM is active.
    pub(super) fn request(&self, request: InstanceStateRequested) -> Option<Result<(), RequestDenied>> {
        let mut now = self.now();
        let active = now.active.as_mut()?;
        let queued = active.queue.ask(request).map(|do_it| {
            if do_it {
                // Its driver receives events for as long as a VM is active.
                let _ = active.events.send(DriverEvent::Request(request));
            }
        });
        Some(queued)
    }

    /// Returns the first serial port of the active VM.
    pub(super) fn serial(&self) -> Option<SerialHandle> {
        Some(self.now().active.as_ref()?.serial.clone())
    }

    /// Sends an order to the guest of the active VM; returns whether there is one.
    pub(super) fn order(&self, order: GuestOrder) -> bool {
        self.now().active.as_ref().is_some_and(|active| active.orders.send(order).is_ok())
    }
}

/// Returns the spec as the server reports it: with the CPUID of the host.
fn filled_in(spec: &InstanceSpec) -> InstanceSpec {
    let mut spec = spec.clone();
    let leaf = |leaf, eax, ebx, ecx, edx| CpuidEntry { leaf, subleaf: None, eax, ebx, ecx, edx };
    spec.board.cpuid.get_or_insert_with(|| Cpuid {
        vendor: CpuidVendor::Amd,
        entries: vec![
            leaf(0, 1, 0x6874_7541, 0x444D_4163, 0x6974_6E65),
            leaf(1, 0x00A0_0F11, 0, 0, 0x178B_FBFF),
            leaf(0x8000_0000, 0x8000_0000, 0x6874_7541, 0x444D_4163, 0x6974_6E65),
        ],
    });
    spec
}

/// Drives one VM.
struct VmDriver {
    machine: Arc<PropolisMachine>,
    states: StatePublisher,
}

impl VmDriver {
    async fn run(
        self,
        properties: InstanceProperties,
        init: InstanceInitializationMethod,
        answer: oneshot::Sender<Result<(), String>>,
    ) {
        let machine = Arc::clone(&self.machine);
        machine.gates.pass(Gate::Ensure).await;
        let made = match init {
            InstanceInitializationMethod::Spec { spec } => self.take(properties.id, &spec).await,
            InstanceInitializationMethod::MigrationTarget { src_addr, .. } => {
                Err(format!("this server is a fake and takes no VM over from {src_addr}"))
            }
        };
        let held = match made {
            Ok(held) => held,
            Err(text) => {
                error!(machine.log, "failed to create VM objects"; "error" => &text);
                self.states.publish(InstanceState::Failed);
                let mut now = machine.now();
                now.stage = VmStage::RundownComplete;
                now.failed = Some(self.states);
                drop(now);
                let _ = answer.send(Err(text));
                return;
            }
        };
        if machine.behaviour.dies == Some(DeathPoint::Ensure) {
            self.die("asked to die at ensure").await;
        }
        let (events, received) = mpsc::unbounded_channel();
        let (ours, theirs) = tokio::io::duplex(UART_BYTES);
        let (orders, taken) = mpsc::unbounded_channel();
        let raised = events.clone();
        let raise = move |event| drop(raised.send(DriverEvent::Guest(event)));
        tokio::spawn(guest::run(theirs, taken, raise, machine.behaviour.clone()));
        let (serial, serial_task) = SerialHandle::serve(ours, machine.gates.clone());
        {
            let mut now = machine.now();
            now.stage = VmStage::Active;
            now.active =
                Some(ActiveVm { queue: RequestQueue::new(), events, orders: orders.clone(), serial });
        }
        let _ = answer.send(Ok(()));
        let last = self.drive(&held, received, &orders).await;
        self.run_down(held, serial_task, last).await;
    }

    /// Takes the VM's resources from the host, in a thread that may block.
    async fn take(&self, id: uuid::Uuid, spec: &InstanceSpec) -> Result<HeldByVm, String> {
        for line in 0..self.machine.behaviour.chatter {
            info!(self.machine.log, "so much to tell before there is a VM"; "line" => line);
        }
        if let Some(text) = &self.machine.behaviour.ensure_fails {
            return Err(text.clone());
        }
        let (machine, spec) = (Arc::clone(&self.machine), spec.clone());
        let taken = tokio::task::spawn_blocking(move || machine.host.take(id, &spec)).await;
        match taken {
            Ok(Ok(held)) => Ok(held),
            Ok(Err(HostRefusal::Fails(text))) => Err(text),
            Ok(Err(HostRefusal::Panics(text))) => self.die(&text).await,
            Err(error) => Err(error.to_string()),
        }
    }

    /// Ends the server, or only this task where panics unwind; it never returns.
    async fn die(&self, why: &str) -> ! {
        assert!(!self.machine.behaviour.unwinds, "{why}");
        (self.machine.die)(why);
        std::future::pending().await
    }

    fn tell(&self, change: InstanceChange) {
        if let Some(active) = &mut self.machine.now().active {
            active.queue.tell(change);
        }
    }

    /// Handles events until the VM has stopped or can't be started, and returns what its last state
    /// will be.
    async fn drive(
        &self,
        held: &HeldByVm,
        mut events: mpsc::UnboundedReceiver<DriverEvent>,
        orders: &mpsc::UnboundedSender<GuestOrder>,
    ) -> InstanceState {
        let machine = &self.machine;
        let mut has_cpus = false;
        loop {
            let event = tokio::select! {
                biased;
                () = held.kernel.gone(), if has_cpus => {
                    self.die("vCPU 0: Unhandled vCPU error: No such device or address (os error 6)").await
                }
                Some(event) = events.recv() => event,
            };
            machine.gates.pass(Gate::Event).await;
            info!(machine.log, "state driver handling event"; "event" => ?event);
            match event {
                DriverEvent::Request(InstanceStateRequested::Run) => {
                    if !self.start(orders).await {
                        return InstanceState::Failed;
                    }
                    has_cpus = true;
                }
                DriverEvent::Request(InstanceStateRequested::Reboot)
                | DriverEvent::Guest(GuestEvent::Reset) => {
                    self.states.publish(InstanceState::Rebooting);
                    self.pause().await;
                    let _ = orders.send(GuestOrder::Boot);
                    self.tell(InstanceChange::Rebooted);
                    self.states.publish(InstanceState::Running);
                }
                DriverEvent::Request(InstanceStateRequested::Stop) | DriverEvent::Guest(GuestEvent::Halt) => {
                    self.states.publish(InstanceState::Stopping);
                    if machine.behaviour.dies == Some(DeathPoint::Stop) {
                        self.die("asked to die at stop").await;
                    }
                    self.pause().await;
                    let _ = orders.send(GuestOrder::Halt);
                    self.tell(InstanceChange::Stopped);
                    self.states.publish(InstanceState::Stopped);
                    return InstanceState::Destroyed;
                }
            }
        }
    }

    /// Waits for the VM's devices to pause; meanwhile requests for the VM wait, requests for its
    /// state do not.
    async fn pause(&self) {
        let _exclusive = self.machine.objects.write().await;
        self.machine.gates.pass(Gate::Pause).await;
        sleep(Duration::from_millis(self.machine.behaviour.pause_millis)).await;
    }

    /// Starts the guest, and returns whether it runs.
    async fn start(&self, orders: &mpsc::UnboundedSender<GuestOrder>) -> bool {
        self.states.publish(InstanceState::Starting);
        if self.machine.behaviour.dies == Some(DeathPoint::Start) {
            self.die("asked to die at start").await;
        }
        if self.machine.behaviour.start_fails {
            error!(self.machine.log, "failed to start devices"; "error" => "asked to fail");
            self.tell(InstanceChange::Failed);
            return false;
        }
        let _ = orders.send(GuestOrder::Boot);
        self.tell(InstanceChange::Running);
        self.states.publish(InstanceState::Running);
        true
    }

    /// Releases everything, and only then publishes that the VM is destroyed or has failed.
    async fn run_down(self, held: HeldByVm, serial: SerialTask, last: InstanceState) {
        let machine = &self.machine;
        {
            let mut now = machine.now();
            now.stage = VmStage::Rundown;
            now.active = None;
        }
        serial.stop().await;
        machine.gates.pass(Gate::Release).await;
        if let Err(error) = held.kernel.destroy() {
            error!(machine.log, "failed to destroy the kernel VM"; "error" => %error);
        }
        drop(held);
        machine.now().stage = VmStage::RundownComplete;
        self.states.publish(last);
    }
}
