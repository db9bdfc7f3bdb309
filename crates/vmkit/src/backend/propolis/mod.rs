//! Propolis (bhyve) on illumos: [`PropolisHypervisor`].
//!
//! It reads like the contract: options and spec make a plan, the plan is applied, and the result is
//! a handle.
//!
//! ```text
//! options ─┐
//! VmSpec ──┴▶ plan() ─▶ PropolisPlan ─▶ prepare: zfs, dladm, files     start: keeper ─▶ propolis-server ─▶ PUT /instance, Run
//!             (pure: plan, instance_spec)      state: run file ─▶ process ─▶ GET /instance ─▶ /dev/vmm
//! ```
//!
//! Every VM has a server of its own, which lives from `start` to `stop`; or it runs at a server
//! that exists, named by an address. The host's programs are data of the plan and found on a search
//! path, so all of this is the same code on every OS.
//!
//! Nothing of a VM is kept in this process: the claim in its directory, the kernel and the server
//! have everything. Every change is made with the VM's lock held, see [`hold`].
//!
//! It was never run on illumos by this project. Source: the sources of Propolis, and of the agents
//! that drive it.

mod builder;
pub(crate) mod client;
pub(crate) mod console;
mod context;
mod end;
mod end_server;
mod files;
mod hold;
mod host;
pub mod instance_spec;
mod layout;
mod log;
mod monitor;
mod neighbours;
mod options;
mod plan;
#[cfg(test)]
mod plan_tests;
mod plans;
mod prepare;
mod reshape;
mod start;
mod state;
mod stop;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, timeout};
use uuid::Uuid;

pub use builder::{PowerOff, PropolisHypervisorBuilder};
pub use plan::{HostStep, PropolisPlan, ServerPlan, StepDiff};

use self::builder::PropolisSettings;
use self::client::PropolisClient;
use self::context::{VmContext, absolute};
use self::files::OwnerClaim;
use self::hold::OperationLock;
use self::layout::PropolisLayout;
use self::options::PropolisOptions;
use self::plan::PropolisFacts;
use self::prepare::NotMade;
use self::state::{ASK_LIMIT, LOOK_LIMIT, StateCaller, observe};
use crate::abilities::Abilities;
use crate::backend::supervise::files::make_private_dir;
use crate::backend::supervise::process::{self, ProcessState};
use crate::backend::supervise::spawn;
use crate::cloud_init::SeedOf;
use crate::deadline::later;
use crate::error::{Error, ErrorKind, LiveResource, Result, Subject};
use crate::handle::{BackendDetails, BackendTag, ConsoleEndpoint, RunInfo, VmHandle};
use crate::host::bootrom;
use crate::hypervisor::{Backend, Hypervisor};
use crate::input_file::InputFile;
use crate::lifecycle::{InvalidTransition, Operation, VmState, next};
use crate::network::{MacAddr, default_lease_files, leased_to};
use crate::spec::{NetworkConfig, VmSpec};

/// The version of the format of [`PropolisDetails`].
const DETAILS_VERSION: u32 = 1;
/// The server's program, if none is named.
const PROGRAM: &str = "propolis-server";
/// The firmware, if none is named.
///
/// Source: where falcon puts it.
const BOOTROM: &str = "/var/ovmf/OVMF_CODE.fd";
/// How long an operation waits for another one on the same VM, in addition to that one's own
/// timeout.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs VMs in Propolis.
///
/// Every VM has a directory `NAME` below the work root, kept from `prepare` to `destroy`. What a VM
/// asks for by itself is in its [`backend_options`](VmSpec::backend_options): `address` of a
/// running server, `bootrom`, `dataset`, `guest-ip`, `program`, `serial-number` and `vnic`. For the
/// rest, the builder's values at its creation apply.
///
/// A VM's root disk is a clone if its image is named `zfs:POOL/DATASET@SNAPSHOT`, and a copy of a
/// raw file otherwise. Its network is [`NetworkConfig::Vnic`] or none. Its firmware is the bootrom,
/// which is UEFI, whatever the spec says.
///
/// It can't suspend. `stop` is graceful only with a [`PowerOff`].
///
/// # Examples
/// ```no_run
/// use std::time::Duration;
/// use vmkit::spec::{NetworkConfig, RootDisk, VmName, VmSpec};
/// use vmkit::{Hypervisor, PropolisHypervisor};
///
/// #[tokio::main(flavor = "current_thread")]
/// async fn main() -> vmkit::Result<()> {
///     let propolis = PropolisHypervisor::builder("/var/lib/ci/vms").pfexec(true).build();
///     let disk = RootDisk { image: "zfs:tank/img/debian-12@base".into(), size: None };
///     let network = NetworkConfig::Vnic { link: "net0".parse()? };
///     let spec = VmSpec::builder(VmName::new("job-17")?).disk(disk).network(network).build()?;
///     let vm = propolis.prepare(&spec).await?;
///     let vm = propolis.start(&vm).await?;
///     println!("console: {:?}", propolis.console_endpoint(&vm)?);
///     let vm = propolis.stop(&vm, Duration::from_secs(30)).await?;
///     propolis.destroy(vm).await
/// }
/// ```
#[derive(Debug, Clone)]
pub struct PropolisHypervisor(Arc<PropolisSettings>);

/// This backend's data in a handle; the rest is in the VM's claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PropolisDetails {
    layout: PropolisLayout,
}

impl PropolisHypervisorBuilder {
    /// Returns the hypervisor. Touches nothing.
    pub fn build(self) -> PropolisHypervisor {
        PropolisHypervisor(Arc::new(self.0))
    }
}

impl VmContext<'_> {
    /// Returns the VM's handle in a state, with the information on its run.
    fn handle(&self, state: VmState, run: Option<RunInfo>) -> VmHandle {
        PropolisHypervisor::handle(self.vm, state, &self.layout, &self.claim.options, run)
    }

    /// Returns the information on the run, from its process and its server.
    async fn run_info(&self) -> Result<RunInfo> {
        let busy = || Error::Busy { what: format!("VM `{}`", self.vm.name()), holder: None };
        let client = self.server()?.ok_or_else(busy)?;
        if self.claim.options.address.is_some() {
            return Ok(start::run_info(&client));
        }
        match process::look(&self.place()).await? {
            ProcessState::Live(process) => {
                Ok(RunInfo { pid: Some(process.id().pid), ..start::run_info(&client) })
            }
            _ => Err(busy()),
        }
    }
}

impl PropolisSettings {
    /// Returns the guest's address.
    ///
    /// # Errors
    /// `Unsupported` without a network, `NotFound` while no address is known.
    async fn guest_address(&self, vm: &VmHandle, claim: &OwnerClaim) -> Result<IpAddr> {
        if let Some(address) = claim.options.guest_ip {
            return Ok(address);
        }
        if matches!(vm.spec.network(), NetworkConfig::None) {
            let what = "an address without a network".to_owned();
            return Err(Error::Unsupported { backend: BackendTag::Propolis, what });
        }
        if claim.options.address.is_some_and(|address| !address.ip().is_loopback()) {
            let what =
                "the address of a guest at a server elsewhere: set it by the option guest-ip".to_owned();
            return Err(Error::Unsupported { backend: BackendTag::Propolis, what });
        }
        let mac = self.mac(vm, claim).await?;
        let words = neighbours::COMMAND.map(str::to_owned);
        let found = match self.host.ask(&neighbours::COMMAND).await.and_then(|done| done.well(&words)) {
            Ok(table) => neighbours::addresses_of(mac, &table),
            Err(error) => {
                tracing::debug!(%error, "the host's neighbour table can't be read");
                Vec::new()
            }
        };
        if let Some(address) = found.first() {
            return Ok(*address);
        }
        // The host has not communicated with the guest recently: the DHCP server may know the
        // address.
        let files = self.lease_files.clone().unwrap_or_else(default_lease_files);
        let leased = leased_to(mac, &files)?;
        leased.first().copied().ok_or_else(|| Error::not_found(Subject::VmAddress, vm.name()))
    }

    /// Returns the MAC address of the guest's card; an existing VNIC has its own.
    async fn mac(&self, vm: &VmHandle, claim: &OwnerClaim) -> Result<MacAddr> {
        let Some(vnic) = &claim.options.vnic else { return Ok(MacAddr::of_vm(vm.id)) };
        let words = ["dladm", "show-vnic", "-p", "-o", "macaddress", vnic.as_str()];
        let said = self.host.ask(&words).await?.well(&words.map(str::to_owned))?;
        neighbours::ethernet_of(said.trim()).ok_or_else(|| {
            Error::host(format!("the address of the VNIC {vnic}"), format!("dladm printed {:?}", said.trim()))
        })
    }

    /// Collects what a plan needs to know of the host; the claim of a prepared VM has the image's
    /// place.
    async fn facts(
        &self,
        spec: &VmSpec,
        id: Uuid,
        options: &PropolisOptions,
        claim: Option<&OwnerClaim>,
    ) -> Result<PropolisFacts> {
        let (image_bytes, is_image_there) = match claim {
            Some(claim) => (claim.image_bytes, options.address.is_some() && !claim.has_copy()),
            None => {
                let is_there = spec.disk().is_some_and(|disk| prepare::is_there(&disk.image, options));
                (prepare::image_bytes(spec, options, &self.host).await?, is_there)
            }
        };
        prepare::check_disks(spec, options)?;
        let bootrom = options.bootrom.clone().unwrap_or_else(|| BOOTROM.into());
        let server = match options.address {
            Some(_) => Vec::new(),
            None => {
                // A server without its firmware panics, and leaves its VM in the kernel.
                let file = InputFile::open("bootrom", &bootrom)?;
                if let Some(problem) = bootrom::problem(file.bytes) {
                    return Err(Error::invalid("bootrom", bootrom.display(), problem));
                }
                let program = options.program.as_ref().map(|path| path.to_string_lossy().into_owned());
                self.host.line(&[program.unwrap_or_else(|| PROGRAM.to_owned())])?
            }
        };
        let seed = spec.cloud_init().map(|config| {
            let mac = (*spec.network() != NetworkConfig::None && options.vnic.is_none())
                .then(|| MacAddr::of_vm(id));
            SeedOf { config, name: spec.name(), id, mac }.fat_volume()
        });
        Ok(PropolisFacts {
            server,
            bootrom,
            image_bytes,
            is_image_there,
            seed: seed.transpose()?,
            zvol_dir: self.zvol_dir.clone(),
        })
    }
}

impl PropolisHypervisor {
    /// Builds a hypervisor over this directory, which is created when it is needed.
    pub fn builder(work_root: impl Into<PathBuf>) -> PropolisHypervisorBuilder {
        PropolisHypervisorBuilder::new(work_root.into())
    }

    /// Returns the paths of a VM's files, below the work root, wherever they were at its creation.
    ///
    /// # Errors
    /// `Record` for a handle that is not this backend's.
    fn layout(&self, vm: &VmHandle) -> Result<PropolisLayout> {
        self.recorded(vm).map(|_| PropolisLayout::of(&self.0.work_root, vm.name()))
    }

    /// Returns the VM's directory at its creation; `None` after an interrupted `prepare`.
    fn recorded(&self, vm: &VmHandle) -> Result<Option<PathBuf>> {
        let foreign = |problem: String| Error::record(self.0.work_root.join(vm.name().as_str()), problem);
        if vm.backend != BackendTag::Propolis {
            return Err(foreign(format!(
                "the handle belongs to the backend `{}`, not `propolis`",
                vm.backend
            )));
        }
        match vm.details.version {
            0 => Ok(None),
            DETAILS_VERSION => PropolisDetails::deserialize(&vm.details.data)
                .map(|details| Some(details.layout.work))
                .map_err(|error| foreign("the handle's details can't be read".to_owned()).with_source(error)),
            version => Err(foreign(format!(
                "the handle's details have version {version}; this program knows {DETAILS_VERSION}"
            ))),
        }
    }

    /// Returns the context of a VM; `None` if its directory has no owner, or another one.
    fn site<'a>(&'a self, vm: &'a VmHandle) -> Result<Option<VmContext<'a>>> {
        let layout = self.layout(vm)?;
        let claim = files::claim(&layout)?.filter(|claim| claim.id == vm.id);
        claim.map(|claim| self.site_of(vm, layout, claim)).transpose()
    }

    fn site_of<'a>(
        &'a self,
        vm: &'a VmHandle,
        layout: PropolisLayout,
        claim: OwnerClaim,
    ) -> Result<VmContext<'a>> {
        let original = claim.original(&layout, self.recorded(vm)?)?;
        Ok(VmContext { settings: &self.0, vm, layout, claim, original })
    }

    /// Takes the VM's lock for an operation, and looks at the VM only then.
    async fn work_on<'a>(
        &'a self,
        vm: &'a VmHandle,
        operation: Operation,
        patience: Duration,
    ) -> Result<(VmContext<'a>, OperationLock)> {
        let gone = || Error::from(InvalidTransition { state: VmState::Destroyed, operation });
        let layout = self.layout(vm)?;
        if !layout.work.exists() {
            return Err(gone());
        }
        let deadline = later(patience);
        let hold = OperationLock::take(&layout.operation_lock(), deadline).await?.ok_or_else(gone)?;
        let site = self.site(vm)?;
        if site.is_none() && files::claim(&layout)?.is_none() {
            // The lock's file is a new one of ours, created for a VM that is gone.
            prepare::remove_files(&vm.spec, &layout)?;
        }
        let mut site = site.ok_or_else(gone)?;
        site.settle_down()?;
        if vm.details.version == 0 {
            return Err(InvalidTransition { state: VmState::Preparing, operation }.into());
        }
        Ok((site, hold))
    }

    /// Ends the VM's own server if its guest has ended by itself: the server has released the VM,
    /// and nothing more will be asked of it. An operation that is at work on the VM ends it itself.
    async fn end_idle_server(&self, site: &VmContext<'_>) {
        let is_idle = || {
            let server = files::server(&site.layout).ok().flatten();
            server.is_some_and(|server| files::has_ended(&site.layout, &server))
        };
        if site.claim.options.address.is_some() || site.original.is_some() || !is_idle() {
            return;
        }
        let end = async {
            let lives = matches!(process::look(&site.place()).await?, ProcessState::Live(_));
            if !lives || hold::is_held(&site.layout.operation_lock())? {
                return Ok(());
            }
            let hold = OperationLock::take(&site.layout.operation_lock(), Instant::now()).await?;
            match hold.filter(|_| is_idle()) {
                Some(hold) => end_server::end_server(site, &self.0.host, &hold).await,
                None => Ok(()),
            }
        };
        if let Ok(Err(error)) = timeout(LOOK_LIMIT, end).await {
            tracing::debug!(%error, "could not end a server whose guest has ended; the next operation will");
        }
    }

    /// Ends everything that runs for a VM, and removes what was created for it outside of its
    /// directory.
    async fn end_and_undo(&self, site: &VmContext<'_>, hold: &OperationLock) -> Result<()> {
        match site.claim.options.address {
            Some(address) => stop::clear_elsewhere(site, &site.client(address)).await?,
            None => end_server::end_server(site, &self.0.host, hold).await?,
        }
        // From here on parts of the VM may be missing, and only this records it.
        let going = OwnerClaim { is_going: true, ..site.claim.clone() };
        if let Err(error) = files::write_synced(&site.layout.claim(), &going) {
            // On a full disk, a removal is what makes room.
            tracing::warn!(%error, "cannot record that the VM is being removed");
        }
        let made = [&site.claim.steps[..], &site.claim.pending].concat();
        prepare::undo(&self.0.host, &made, hold).await
    }

    fn handle(
        vm: &VmHandle,
        state: VmState,
        layout: &PropolisLayout,
        options: &PropolisOptions,
        run: Option<RunInfo>,
    ) -> VmHandle {
        let mut handle = vm.clone().in_state(state);
        if run.is_some() {
            handle.run = run;
        }
        handle.console_log = Some(layout.console_log());
        // The log of a server elsewhere is on its host.
        handle.hypervisor_log = options.address.is_none().then(|| layout.server_log());
        handle
    }

    /// Refuses an operation that this backend never supports; if the state doesn't permit it
    /// either, the error is about the state.
    async fn never(&self, vm: &VmHandle, operation: Operation) -> Result<VmHandle> {
        next(&self.state(vm).await?, operation)?;
        let what = format!("{operation}: a VM of Propolis can't be paused");
        Err(Error::Unsupported { backend: BackendTag::Propolis, what })
    }
}

impl Hypervisor for PropolisHypervisor {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        let id = spec.id().unwrap_or_else(Uuid::new_v4);
        let spec = spec.clone().with_id(id);
        let layout = PropolisLayout::of(&self.0.work_root, spec.name());
        let taken = || Error::already_exists(Subject::Vm, spec.name());
        if files::claim(&layout)?.is_some() {
            return Err(taken());
        }
        let work = Some(absolute(&layout)?);
        let (options, plan, image_bytes) = self.planned(&spec, id).await?;
        make_private_dir(&layout.work)?;
        let hold = match OperationLock::take(&layout.operation_lock(), Instant::now() + PATIENCE).await {
            Ok(Some(hold)) => hold,
            Ok(None) => {
                let what = format!("the directory of VM `{}`", spec.name());
                return Err(Error::Busy { what, holder: None });
            }
            Err(error) => {
                prepare::remove_unclaimed(&layout);
                return Err(error);
            }
        };
        if files::claim(&layout)?.is_some() {
            return Err(taken());
        }
        let steps = plan.prepare;
        let claim =
            OwnerClaim { id, options, steps, pending: Vec::new(), image_bytes, work, is_going: false };
        // What is created next survives a power cut, and so must the claim that it is found by.
        let made = match files::write_synced(&layout.claim(), &claim) {
            Ok(()) => prepare::make(&self.0.host, &claim, &hold).await,
            Err(error) => Err(NotMade { error, is_undone: true }),
        };
        if let Err(NotMade { error, is_undone }) = made {
            // Without the claim, the rest would not be found.
            if is_undone {
                prepare::give_up(&spec, &layout);
            }
            return Err(error);
        }
        let data = serde_json::to_value(PropolisDetails { layout: layout.clone() })
            .map_err(|_| Error::invalid("path", layout.work.display(), "the path of a VM must be UTF-8"))?;
        let mut vm = VmHandle::preparing(id, BackendTag::Propolis, spec);
        vm.details = BackendDetails { version: DETAILS_VERSION, data };
        Ok(Self::handle(&vm, VmState::Prepared, &layout, &claim.options, None))
    }

    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        let (site, hold) =
            self.work_on(vm, Operation::Start, self.0.start_limit.saturating_add(PATIENCE)).await?;
        if let Some(original) = &site.original {
            let why = format!(
                "a copy of the VM in {}, which owns the disks, the network and the id: remove this copy, which \
                 does not affect the original, or remove the original first",
                original.display()
            );
            return Err(Error::invalid("path", site.layout.work.display(), why));
        }
        if site.claim.is_going {
            return Err(InvalidTransition { state: VmState::Destroyed, operation: Operation::Start }.into());
        }
        let deadline = later(self.0.start_limit);
        let state = observe(&site, StateCaller::Operation, ASK_LIMIT).await?;
        let to = next(&state, Operation::Start)?;
        if state == to {
            let run = site.run_info().await?;
            return Ok(site.handle(to, Some(run)));
        }
        let plan = site.plan().await?;
        let run = match site.claim.options.address {
            Some(address) => start::elsewhere(&site, &site.client(address), &plan, &hold, deadline).await?,
            None => {
                let keeper = spawn::keeper_program(self.0.keeper.as_deref())?;
                start::owned(&site, &plan, &keeper, &hold, deadline).await?
            }
        };
        Ok(site.handle(to, Some(run)))
    }

    async fn stop(&self, vm: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        let patience = self.0.start_limit.saturating_add(PATIENCE);
        let (site, hold) = self.work_on(vm, Operation::Stop, patience).await?;
        // A caller with a short timeout does not wait for long here.
        let limit = timeout.clamp(LOOK_LIMIT, ASK_LIMIT);
        let state = match observe(&site, StateCaller::Operation, limit).await {
            // The server may be slow, or the network bad: the guest is asked anyway, and ended by
            // force after that.
            Err(error) if matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Hypervisor) => {
                tracing::warn!(%error, "cannot get the server's state; stopping it as if its guest runs");
                VmState::Running
            }
            state => state?,
        };
        next(&state, Operation::Stop)?;
        if site.original.is_some() {
            return Ok(site.handle(VmState::Stopped, None));
        }
        if state == VmState::Running
            && let Some(client) = site.server()?
        {
            stop::stop_guest(&site, &client, timeout).await?;
        }
        stop::clear(&site, &hold).await?;
        Ok(site.handle(VmState::Stopped, None))
    }

    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.never(vm, Operation::Suspend).await
    }

    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.never(vm, Operation::Resume).await
    }

    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        let layout = self.layout(&vm)?;
        if !layout.work.exists() || files::claim(&layout)?.is_some_and(|claim| claim.id != vm.id) {
            return Ok(());
        }
        let deadline = later(self.0.start_limit.saturating_add(PATIENCE));
        let Some(hold) = OperationLock::take(&layout.operation_lock(), deadline).await? else {
            return Ok(());
        };
        // Read again with the lock held: another process may have removed the VM, and another VM
        // have its name.
        let claim = files::claim(&layout)?;
        if claim.as_ref().is_some_and(|claim| claim.id != vm.id) {
            return Ok(());
        }
        if let Some(claim) = claim {
            let site = self.site_of(&vm, layout.clone(), claim)?;
            match &site.original {
                Some(original) => {
                    let (copy, original) = (layout.work.display(), original.display());
                    tracing::warn!(%copy, %original, "the directory is a copy of a VM: only its files are removed, \
                        since everything else belongs to the original");
                }
                None => self.end_and_undo(&site, &hold).await?,
            }
        }
        prepare::remove_files(&vm.spec, &layout)
    }

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        let Some(site) = self.site(vm)? else { return Ok(VmState::Destroyed) };
        if vm.details.version == 0 {
            return Ok(VmState::Preparing);
        }
        let state = observe(&site, StateCaller::Anybody, LOOK_LIMIT).await?;
        if state == VmState::Stopped {
            self.end_idle_server(&site).await;
        }
        Ok(state)
    }

    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        let state = self.state(vm).await?;
        match self.site(vm)? {
            Some(site) if state.is_live() => {
                self.0.guest_address(vm, &site.claim).await.map(|address| address.to_string())
            }
            _ => Err(Error::NotLive { what: LiveResource::GuestAddress, state }),
        }
    }

    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        let layout = self.layout(vm)?;
        if self.site(vm)?.is_some_and(|site| site.original.is_some()) {
            return Ok(ConsoleEndpoint::None);
        }
        if let Some(run) = &vm.run {
            return Ok(run.console.clone());
        }
        // The handle may be older than the run.
        let server = files::server(&layout)?;
        Ok(server.map_or(ConsoleEndpoint::None, |server| {
            let client = PropolisClient { address: server.address, version: "1.0.0" };
            ConsoleEndpoint::WebSocket(client.console_url())
        }))
    }
}

impl Backend for PropolisHypervisor {
    fn tag(&self) -> BackendTag {
        BackendTag::Propolis
    }

    fn abilities(&self, _tag: &BackendTag) -> Abilities<'_> {
        let abilities = Abilities::none()
            .with_console()
            .with_guest_ip()
            .with_missing_parts_noticed()
            .with_console_history(self);
        match self.0.power_off {
            Some(_) => abilities.with_graceful_stop(),
            None => abilities,
        }
    }
}
