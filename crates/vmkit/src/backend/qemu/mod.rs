//! QEMU on Linux: [`QemuHypervisor`].
//!
//! It reads like the contract: facts and spec make a plan, the plan is applied, and the result is a
//! handle.
//!
//! ```text
//! HostFacts ─┐
//! VmSpec ────┴▶ plan() ─▶ QemuPlan ─▶ prepare: files        start: sockets, keeper ─▶ QEMU
//!               (pure: plan, argv, switch)     state: run file ─▶ process ─▶ QMP
//! ```
//!
//! Nothing of a VM is kept in this process: a handle, the work directory and the kernel have
//! everything, so any number of programs may hold a `QemuHypervisor` over the same directories, and
//! any of them may be killed.

mod abilities;
mod accel;
pub(crate) mod agent;
mod argv;
#[cfg(test)]
mod argv_tests;
mod clock;
mod clone;
mod devices;
mod disks;
mod elsewhere;
mod events;
mod export;
mod facts;
mod forward;
pub(crate) mod identity;
mod import;
mod layers;
mod layout;
mod merge;
mod parking;
mod parts;
mod plan;
mod plans;
mod prepare;
pub(crate) mod qmp;
mod recovery;
mod renewal;
mod save;
mod saved;
mod snapshot;
mod snapshot_files;
mod snapshot_live;
mod start;
mod status;
mod stop;
mod switch;
mod words;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

pub use devices::DeviceVersion;
pub use facts::FirmwareFiles;
pub use plan::{PrepareStep, QemuPlan, RestoreStep, SeedStep, SocketPlan, UpdateStep};
pub use switch::Accelerator;

use self::accel::{accelerator, wants_kvm};
use self::elsewhere::{recorded_run_dir, run_dir};
use self::facts::{ImageMedia, QemuFacts};
use self::layout::QemuLayout;
use self::qmp::client::QmpClient;
use crate::abilities::{Abilities, GuestClock};
use crate::backend::supervise::process::{self, ProcessState};
use crate::backend::supervise::runfile::{self, ProcessEnd};
use crate::backend::supervise::{alive, spawn};
use crate::deadline::{later, left};
use crate::error::{Error, ErrorKind, LiveResource, Result, Subject};
use crate::handle::{BackendDetails, BackendTag, ConsoleEndpoint, RunInfo, VmHandle};
use crate::host::{HostFacts, ProbeOptions, demands};
use crate::hypervisor::{Backend, Hypervisor};
use crate::image::ImageIdentity;
use crate::lifecycle::{FailureKind, Operation, VmState, next};
use crate::network::{MacAddr, addresses_of, default_lease_files};
use crate::spec::{Boot, Firmware, Mib, NetworkConfig, PortForward, VmSpec};
use crate::store::refuse_other_user;

/// The default timeout of QEMU from its start to its greeting. A quiet host needs 30 ms.
const START_LIMIT: Duration = Duration::from_secs(30);
/// The timeout of a query to a monitor or an agent.
const ASK_LIMIT: Duration = Duration::from_secs(1);
/// The timeout of pausing or resuming a guest: QEMU completes the pending writes of its disks
/// first.
const PAUSE_LIMIT: Duration = Duration::from_secs(30);
/// How long to wait for the guest agent's address if another one is known.
const AGENT_GRACE: Duration = Duration::from_millis(30);
/// How long a QEMU that doesn't reply has to end, before it is regarded as hanging.
const ENDING_LIMIT: Duration = Duration::from_millis(500);
/// The default search path for programs.
const SYSTEM_PATH: [&str; 4] = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/libexec"];
/// The version of the format of [`QemuDetails`]. Version 1 had the full paths of the VM's
/// directories, which are not read any more: a VM is where its record was found.
const DETAILS_VERSION: u32 = 2;

/// Runs VMs in QEMU.
///
/// Every VM has a directory `NAME` below the work root, which exists from `prepare` to `destroy`,
/// and while it runs one below the runtime root for its sockets. Both are private to the user.
///
/// # Examples
/// ```no_run
/// use std::time::Duration;
/// use vmkit::spec::{RootDisk, VmName, VmSpec};
/// use vmkit::{Hypervisor, QemuHypervisor};
///
/// fn main() -> vmkit::Result<()> {
///     vmkit::run_if_keeper(); // first: this program is also started as the parent of each QEMU
///     run()
/// }
///
/// #[tokio::main]
/// async fn run() -> vmkit::Result<()> {
///     let qemu = QemuHypervisor::builder("/var/lib/ci/vms", "/run/ci").build();
///     let disk = RootDisk { image: "/images/debian-12.qcow2".into(), size: None };
///     let spec = VmSpec::builder(VmName::new("job-17")?).disk(disk).cpus(2).build()?;
///     let vm = qemu.prepare(&spec).await?;
///     let vm = qemu.start(&vm).await?;
///     println!("console: {:?}", qemu.console_endpoint(&vm)?);
///     let vm = qemu.stop(&vm, Duration::from_secs(30)).await?;
///     qemu.destroy(vm).await
/// }
/// ```
#[derive(Debug, Clone)]
pub struct QemuHypervisor(Arc<QemuSettings>);

#[derive(Debug)]
struct QemuSettings {
    work_root: PathBuf,
    run_root: PathBuf,
    search_path: Vec<PathBuf>,
    program: Option<PathBuf>,
    cache_dir: Option<PathBuf>,
    keeper: Option<PathBuf>,
    start_limit: Duration,
    lease_files: Vec<PathBuf>,
    /// The devices that guests boot with.
    devices: DeviceVersion,
    /// A lock for each VM: the second start in this process finds the first one's guest.
    starting: Mutex<BTreeMap<Uuid, Arc<tokio::sync::Mutex<()>>>>,
    /// When this process paused which VM: after a short pause the clock is still right.
    paused: Mutex<BTreeMap<Uuid, Instant>>,
}

/// Sets up a [`QemuHypervisor`].
#[derive(Debug)]
#[must_use]
pub struct QemuHypervisorBuilder(QemuSettings);

impl QemuHypervisorBuilder {
    /// Sets the directories where programs are looked for, as in `PATH`. The default is the usual
    /// system directories.
    pub fn search_path(mut self, path: &OsStr) -> Self {
        self.0.search_path = std::env::split_paths(path).collect();
        self
    }

    /// Sets the QEMU program, for every architecture, instead of the search path.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.program = Some(path.into());
        self
    }

    /// Sets the directory that caches facts of the host. Without it, they are probed each time.
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.0.cache_dir = Some(dir.into());
        self
    }

    /// Sets the program that becomes each VM's keeper.
    ///
    /// Default: this program if it called [`run_if_keeper`](crate::run_if_keeper), otherwise
    /// `vmkit-keeper` in the same directory.
    pub fn keeper(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.keeper = Some(path.into());
        self
    }

    /// Sets the timeout of QEMU from its start to its greeting; the default is 30 s.
    pub fn start_limit(mut self, limit: Duration) -> Self {
        self.0.start_limit = limit;
        self
    }

    /// Sets the lease files of dnsmasq that have the address of a guest on a tap, instead of the
    /// usual ones.
    pub fn lease_files(mut self, files: Vec<PathBuf>) -> Self {
        self.0.lease_files = files;
        self
    }

    /// Sets the version of the devices that guests boot with, instead of the newest: a guest that
    /// is saved with them can also be continued by the vmkit that had them first.
    pub fn devices(mut self, devices: DeviceVersion) -> Self {
        self.0.devices = devices;
        self
    }

    /// Returns the hypervisor; has no effects.
    pub fn build(self) -> QemuHypervisor {
        QemuHypervisor(Arc::new(self.0))
    }
}

/// This backend's data in a handle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct QemuDetails {
    /// The VM's paths, from the backend's directories: a home may have been moved, or be a copy.
    #[serde(skip)]
    layout: QemuLayout,
    media: ImageMedia,
    /// The run of cloud-init that the seed on disk asks for.
    #[serde(default)]
    seed_run: u32,
    /// The size that the root disk was created with or grown to, if one was requested.
    #[serde(default)]
    disk: Option<Mib>,
    /// The base image of the root disk at the last start, or at the VM's creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<ImageIdentity>,
}

impl QemuDetails {
    fn keep_in(&self, vm: &mut VmHandle) {
        let data = serde_json::to_value(self).expect("these are plain data");
        vm.details = BackendDetails { version: DETAILS_VERSION, data };
    }
}

/// Returns the run of cloud-init that a spec asks for.
fn wanted_run(spec: &VmSpec) -> u32 {
    spec.cloud_init().map_or(0, |config| config.run)
}

/// Returns the size that a spec asks for.
fn wanted_disk(spec: &VmSpec) -> Option<Mib> {
    spec.disk().and_then(|disk| disk.size)
}

impl QemuHypervisor {
    /// Builds a hypervisor over these two directories, which are created when they are needed.
    ///
    /// The runtime root has to be short: a Unix socket's path has at most 107 bytes.
    pub fn builder(work_root: impl Into<PathBuf>, run_root: impl Into<PathBuf>) -> QemuHypervisorBuilder {
        QemuHypervisorBuilder(QemuSettings {
            work_root: work_root.into(),
            run_root: run_root.into(),
            search_path: SYSTEM_PATH.map(PathBuf::from).to_vec(),
            program: None,
            cache_dir: None,
            keeper: None,
            start_limit: START_LIMIT,
            lease_files: Vec::new(),
            devices: DeviceVersion::NEWEST,
            starting: Mutex::default(),
            paused: Mutex::default(),
        })
    }

    fn layout(&self, spec: &VmSpec, id: Uuid) -> Result<QemuLayout> {
        QemuLayout::of(&self.0.work_root, &self.0.run_root, spec.name(), id)
    }

    /// Returns the handle's details; empty after an interrupted `prepare`.
    fn details(&self, vm: &VmHandle) -> Result<QemuDetails> {
        let foreign = |problem: String| Error::record(self.0.work_root.join(vm.name().as_str()), problem);
        if vm.backend != BackendTag::Qemu {
            return Err(foreign(format!("the handle belongs to the backend `{}`, not `qemu`", vm.backend)));
        }
        match vm.details.version {
            0 => Ok(QemuDetails {
                layout: self.layout(&vm.spec, vm.id)?,
                media: ImageMedia::default(),
                seed_run: 0,
                disk: None,
                base: None,
            }),
            1 | DETAILS_VERSION => {
                let mut details = QemuDetails::deserialize(&vm.details.data).map_err(|error| {
                    foreign("the handle's details can't be read".to_owned()).with_source(error)
                })?;
                details.layout = self.layout(&vm.spec, vm.id)?;
                details.layout.run = run_dir(&details.layout);
                Ok(details)
            }
            version => Err(foreign(format!(
                "the handle's details have version {version}; this program knows {DETAILS_VERSION}"
            ))),
        }
    }

    /// Selects the facts of the host that this spec needs, and refuses what the host does not
    /// support.
    async fn facts(&self, spec: &VmSpec) -> Result<QemuFacts> {
        let arch = spec.machine().arch();
        let uefi = matches!(spec.boot(), Boot::Firmware(Firmware::Uefi));
        let mut options = ProbeOptions::new(self.0.search_path.clone());
        options.qemu = self.0.program.clone().map(|path| (arch, path));
        options.cache_dir = self.0.cache_dir.clone();
        options.archs = vec![arch];
        options.kvm = wants_kvm(spec)?;
        if !uefi {
            options.firmware_dirs.clear();
        }
        let host = HostFacts::probe(&options).await?;
        demands::check(spec).await?;
        let program = host.qemu(arch)?;
        let version = program
            .version
            .clone()
            .map_err(|problem| Error::host(program.path.display().to_string(), problem))?;
        let firmware = if uefi {
            let found = host.uefi(arch)?;
            Some(FirmwareFiles { code: found.code.clone(), vars: found.vars.clone() })
        } else {
            None
        };
        Ok(QemuFacts {
            program: program.path.clone(),
            version: (version.major, version.minor),
            accel: accelerator(spec, host.kvm.as_ref())?,
            firmware,
            host_memory: Some(host.memory),
        })
    }

    fn lease_files(&self) -> Vec<PathBuf> {
        if self.0.lease_files.is_empty() { default_lease_files() } else { self.0.lease_files.clone() }
    }

    fn start_lock(&self, id: Uuid) -> Arc<tokio::sync::Mutex<()>> {
        let mut starting = self.0.starting.lock().expect("nothing panics while it holds the map");
        Arc::clone(starting.entry(id).or_default())
    }

    fn paused(&self) -> std::sync::MutexGuard<'_, BTreeMap<Uuid, Instant>> {
        self.0.paused.lock().expect("nothing panics while it holds the map")
    }

    /// Determines the state, and refuses an operation that is illegal in it.
    async fn allowed(&self, vm: &VmHandle, operation: Operation) -> Result<VmState> {
        let state = self.state(vm).await?;
        if state == VmState::Destroyed {
            elsewhere::check_owner(vm, &self.details(vm)?.layout, operation)?;
        }
        next(&state, operation)?;
        Ok(state)
    }

    /// Removes the sockets of a start, whether its keeper recorded it or not, and those of another
    /// session.
    fn remove_sockets(&self, vm: &VmHandle) -> Result<()> {
        match self.layout(&vm.spec, vm.id) {
            Ok(layout) => {
                let recorded = recorded_run_dir(&layout).filter(|run| *run != layout.run);
                prepare::remove_run_dir(&layout)?;
                recorded.map_or(Ok(()), |run| prepare::remove_run_dir(&QemuLayout { run, ..layout }))
            }
            // Nothing can have been started in a directory that is refused.
            Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Returns the state of a VM that does not run; `failed` if a part of it is missing.
    fn at_rest(vm: &VmHandle, layout: &QemuLayout, state: VmState) -> VmState {
        if layout.restore_mark().exists() {
            let detail = "the restore of a snapshot was interrupted: repeat it";
            return VmState::failed(FailureKind::Other, detail);
        }
        match parts::missing_part(&vm.spec, layout) {
            Some(part) => VmState::failed(
                FailureKind::Interrupted,
                format!("a part of the VM is missing: {}", part.display()),
            ),
            None => state,
        }
    }

    fn handle(vm: &VmHandle, state: VmState, layout: &QemuLayout, run: Option<RunInfo>) -> VmHandle {
        let mut handle = vm.clone().in_state(state);
        if run.is_some() {
            handle.run = run;
            let file = runfile::read(&layout.run_file()).ok().flatten();
            handle.console_since = file.and_then(|file| file.console);
        }
        handle.console_log = Some(layout.console_log());
        handle.hypervisor_log = Some(layout.qemu_log());
        handle
    }
}

impl Hypervisor for QemuHypervisor {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        let id = spec.id().unwrap_or_else(Uuid::new_v4);
        let spec = spec.clone().with_id(id);
        let layout = self.layout(&spec, id)?;
        if parts::owner(&layout)?.is_some() {
            return Err(Error::already_exists(Subject::Vm, spec.name()));
        }
        // A VM that could never be started is not prepared.
        spawn::keeper_program(self.0.keeper.as_deref())?;
        let (plan, media) = self.plan_new(&spec, id).await?;
        for warning in &plan.warnings {
            tracing::warn!(vm = %spec.name(), "{warning}");
        }
        let base = disks::identity_of_base(&spec).await?;
        prepare::apply(&plan)?;
        let details = QemuDetails {
            layout: layout.clone(),
            media,
            seed_run: wanted_run(&spec),
            disk: wanted_disk(&spec),
            base,
        };
        let mut vm = VmHandle::preparing(id, BackendTag::Qemu, spec);
        details.keep_in(&mut vm);
        Ok(Self::handle(&vm, VmState::Prepared, &layout, None))
    }

    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.start_and_set_clock(vm).await.map(|started| started.vm)
    }

    async fn stop(&self, vm: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        let QemuDetails { layout, .. } = self.details(vm)?;
        refuse_other_user(&layout.work)?;
        if !elsewhere::runs_here(vm, &layout).await? {
            elsewhere::check_owner(vm, &layout, Operation::Stop)?;
        }
        match saved::is_saved(&layout) {
            // The guest shall shut itself down.
            true if !timeout.is_zero() => {
                self.start_and_set_clock(vm).await?;
            }
            true => saved::discard(&layout)?,
            false if saved::was_begun(&layout) => {
                if let Err(error) = save::give_up(&layout, false).await {
                    tracing::debug!(%error, "an interrupted save can't be undone");
                }
            }
            false => {}
        }
        let QemuDetails { layout, .. } = self.details(vm)?;
        stop::stop(vm, &layout, timeout).await?;
        if let Err(error) = saved::remove_leftovers(&layout) {
            tracing::warn!(vm = %vm.name(), %error, "cannot remove the rest of an interrupted save; the next start will");
        }
        Ok(Self::handle(vm, VmState::Stopped, &layout, None))
    }

    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        let QemuDetails { layout, .. } = self.details(vm)?;
        let to = VmState::Suspended;
        if self.allowed(vm, Operation::Suspend).await? != to {
            let limit = Instant::now() + PAUSE_LIMIT;
            QmpClient::connect(&status::monitor(&layout), limit).await?.pause(limit).await?;
            self.paused().insert(vm.id, Instant::now());
        }
        Ok(Self::handle(vm, to, &layout, None))
    }

    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.resume_and_set_clock(vm, None).await.map(|resumed| resumed.vm)
    }

    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        let QemuDetails { layout, .. } = self.details(&vm)?;
        prepare::refuse_other_users(&layout)?;
        match parts::owner(&layout)? {
            // The name belongs to another VM by now: this one is gone.
            Some(owner) if owner != vm.id => return Ok(()),
            _ => {}
        }
        if layout.work.exists() {
            elsewhere::leave_linked(&layout)?;
            let _still =
                alive::take_and_silence(&layout.place(), Instant::now() + self.0.start_limit).await?;
            // Read again with the lock held: the directory may be another VM's by now.
            if parts::owner(&layout)?.is_none_or(|owner| owner == vm.id) {
                self.remove_sockets(&vm)?;
                prepare::remove(&layout, vm.spec.data_disks().len())?;
            }
        } else {
            self.remove_sockets(&vm)?;
            prepare::remove_run_dir(&layout)?;
        }
        self.0.starting.lock().expect("nothing panics while it holds the map").remove(&vm.id);
        self.paused().remove(&vm.id);
        Ok(())
    }

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        let QemuDetails { layout, .. } = self.details(vm)?;
        match parts::owner(&layout)? {
            Some(owner) if owner == vm.id => {}
            None if elsewhere::runs_here(vm, &layout).await? => {}
            _ => return Ok(VmState::Destroyed),
        }
        if vm.details.version == 0 {
            return Ok(VmState::Preparing);
        }
        if saved::is_saved(&layout) {
            return Ok(Self::at_rest(vm, &layout, VmState::Saved));
        }
        let found = match process::look(&layout.place()).await? {
            // The sockets were bound before the keeper started: the greeting is the event that it
            // has started QEMU.
            ProcessState::Launching | ProcessState::Starting(_) => match status::ask(vm, &layout).await {
                Ok(state) => return Ok(state),
                Err(_) => process::look(&layout.place()).await?,
            },
            found => found,
        };
        let at_rest = |state| Ok(Self::at_rest(vm, &layout, state));
        match found {
            ProcessState::Nothing if layout.stop_mark().exists() => at_rest(VmState::Stopped),
            ProcessState::Nothing => at_rest(VmState::Prepared),
            ProcessState::Rebooted | ProcessState::Copied => at_rest(VmState::Stopped),
            ProcessState::Launching | ProcessState::Starting(_) => {
                Err(Error::Busy { what: format!("VM `{}`", vm.name()), holder: None })
            }
            // A QEMU that is ending removes its sockets first. Otherwise nothing can be queried,
            // though the guest may still be reachable: report the last known state.
            ProcessState::Live(process) if !status::monitor(&layout).exists() => {
                match process.wait(Instant::now() + ENDING_LIMIT).await? {
                    true => ended_now(&layout).await,
                    false => Ok(status::recorded(vm)),
                }
            }
            ProcessState::Live(process) => match status::ask(vm, &layout).await {
                Ok(state) => Ok(state),
                // A QEMU that is ending closes its monitor first: the state depends on how it ends.
                Err(error) => match process.wait(Instant::now() + ENDING_LIMIT).await? {
                    true => ended_now(&layout).await,
                    false => Err(error),
                },
            },
            ProcessState::Ended(ended) => at_rest(ended_state(&layout, ended)),
        }
    }

    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        let QemuDetails { layout, .. } = self.details(vm)?;
        let state = self.state(vm).await?;
        let unknown = || Error::not_found(Subject::VmAddress, vm.name());
        match (vm.spec.network(), state.is_live()) {
            (NetworkConfig::Vnic { .. } | NetworkConfig::None, _) => Err(Error::Unsupported {
                backend: BackendTag::Qemu,
                what: "an address without a network".to_owned(),
            }),
            (_, false) => Err(Error::NotLive { what: LiveResource::GuestAddress, state }),
            (NetworkConfig::User(_), true) => Ok(PortForward::LOOPBACK.to_string()),
            (NetworkConfig::Tap { bridge }, true) => {
                let mac = MacAddr::of_vm(vm.id);
                let leases = self.lease_files();
                let found = addresses_of(mac, bridge, &leases).await;
                // The agent is the best source, but most guests have none: if the host knows an
                // address, wait only a moment for it.
                let is_known = found.as_ref().is_ok_and(|found| !found.is_empty());
                let patience = if is_known { AGENT_GRACE } else { ASK_LIMIT };
                if let Ok(Some(addr)) = timeout(patience, agent_address(&layout, mac)).await {
                    return Ok(addr);
                }
                found?.first().map(ToString::to_string).ok_or_else(unknown)
            }
        }
    }

    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        Ok(ConsoleEndpoint::UnixSocket(self.details(vm)?.layout.console_socket()))
    }
}

impl Backend for QemuHypervisor {
    fn tag(&self) -> BackendTag {
        BackendTag::Qemu
    }

    fn abilities(&self, _tag: &BackendTag) -> Abilities<'_> {
        Abilities::none()
            .with_suspend()
            .with_graceful_stop()
            .with_console()
            .with_guest_ip()
            .with_local_files()
            .with_vm_as_directory()
            .with_missing_parts_noticed()
            .with_port_forwarding(self)
            .with_preflight(self)
            .with_guest_agent(self)
            .with_reset_events(self)
            .with_guest_clock(self)
            .with_save_to_disk(self)
            .with_snapshots(self)
            .with_export(self)
            .with_clones(self)
    }
}

/// Returns the state after a run that has just ended.
async fn ended_now(layout: &QemuLayout) -> Result<VmState> {
    process::settled(&layout.place()).await?;
    match process::look(&layout.place()).await? {
        ProcessState::Ended(ended) => Ok(ended_state(layout, ended)),
        _ => Ok(ended_state(layout, None)),
    }
}

/// Returns the state after a run: `Stopped` if the end was requested or clean, otherwise `Failed`
/// with the cause.
fn ended_state(layout: &QemuLayout, ended: Option<ProcessEnd>) -> VmState {
    let clean = ended.is_some_and(|ended| ended.code == Some(0));
    if clean || layout.stop_mark().exists() {
        return VmState::Stopped;
    }
    let Some(ended) = ended else {
        let vanished = "QEMU is gone, and its keeper was killed before it could record why";
        return VmState::failed(FailureKind::Vanished, vanished);
    };
    let words = words::in_short(&start::last_words(layout));
    let colon = if words.is_empty() { "" } else { ": " };
    let kind =
        if ended.signal.is_some() { FailureKind::HypervisorKilled } else { FailureKind::HypervisorExited };
    VmState::failed(kind, format!("QEMU ended, {ended}{colon}{words}"))
}

/// Returns the address of the device with this MAC, from the guest agent; `None` without a reply.
async fn agent_address(layout: &QemuLayout, mac: MacAddr) -> Option<String> {
    let limit = later(ASK_LIMIT);
    let mac = mac.to_string();
    let mut agent = agent::GuestAgent::connect(&layout.agent_socket(), ASK_LIMIT).await.ok()?;
    let interfaces = agent.interfaces(left(limit)).await.ok()?;
    let ours = interfaces.into_iter().find(|interface| interface.mac.as_deref() == Some(mac.as_str()))?;
    let usable = |addr: &&std::net::IpAddr| match addr {
        std::net::IpAddr::V4(addr) => !addr.is_link_local() && !addr.is_loopback(),
        std::net::IpAddr::V6(addr) => !addr.is_loopback() && !addr.is_unicast_link_local(),
    };
    let found = ours.addrs.iter().find(|addr| addr.is_ipv4() && usable(addr));
    found.or_else(|| ours.addrs.iter().find(usable)).map(ToString::to_string)
}
