//! QEMU's abilities beside the contract: checks before anything is created, the guest agent, the
//! guest's clock and the events of resets. Forwards are in `forward.rs`.

use std::path::Path;
use std::time::Duration;

use super::agent::GuestAgent;
use super::qmp::client::QmpClient;
use super::{
    PAUSE_LIMIT, QemuDetails, QemuHypervisor, clock, disks, events, recovery, renewal, save, saved, status,
};
use crate::abilities::{ClockState, ClockedVm, GuestAgentChannel, GuestClock, Preflight, ResetEvents};
use crate::deadline::{later, left};
use crate::error::{Error, Peer, Result};
use crate::handle::VmHandle;
use crate::host::demands;
use crate::image::check_disc;
use crate::input_file::InputFile;
use crate::kernel_file::{check_initrd, check_kernel};
use crate::lifecycle::{Operation, VmState};
use crate::network::check_bridge;
use crate::program::ProgramOutput;
use crate::spec::{Boot, DataDisk, NetworkConfig, VmSpec};

impl Preflight for QemuHypervisor {
    /// Checks the files but the root disk's image, the memory, the user and the bridge.
    async fn check_spec(&self, spec: &VmSpec) -> Result<()> {
        if let Boot::Kernel(kernel) = spec.boot() {
            check_kernel(&kernel.path, spec.machine().arch())?;
            kernel.initrd.as_deref().map_or(Ok(()), check_initrd)?;
        }
        for disk in spec.data_disks() {
            if let DataDisk::Existing { path, readonly } = disk {
                InputFile::data_disk(path, *readonly)?;
            }
        }
        spec.cdrom().map_or(Ok(()), check_disc)?;
        demands::check(spec).await?;
        match spec.network() {
            NetworkConfig::Tap { bridge } => check_bridge(bridge).await,
            _ => Ok(()),
        }
    }

    async fn check_restart(&self, vm: &VmHandle) -> Result<()> {
        disks::check_restart(vm, &self.details(vm)?.layout).await
    }
}

impl GuestAgentChannel for QemuHypervisor {
    async fn agent_responds(&self, vm: &VmHandle, limit: Duration) -> Result<bool> {
        let deadline = later(limit);
        match GuestAgent::connect(channel(vm)?, limit).await {
            Ok(mut agent) => Ok(agent.ping(left(deadline)).await.is_ok()),
            Err(_) => Ok(false),
        }
    }

    async fn agent_exec(
        &self,
        vm: &VmHandle,
        program: &str,
        args: &[&str],
        limit: Duration,
    ) -> Result<ProgramOutput> {
        let deadline = later(limit);
        let mut agent = GuestAgent::connect(channel(vm)?, limit).await?;
        tokio::select! {
            ran = agent.exec(program, args, None, left(deadline)) => ran,
            Ok(()) = self.guest_reset(vm) => {
                let problem = format!("the end of `{program}` is not known: the guest was restarted");
                Err(Error::protocol(Peer::GuestAgent, problem))
            }
        }
    }
}

impl ResetEvents for QemuHypervisor {
    async fn guest_reset(&self, vm: &VmHandle) -> Result<()> {
        events::reset(&self.details(vm)?.layout).await
    }
}

impl GuestClock for QemuHypervisor {
    /// Sets the clock by the guest agent. How long this process had suspended the guest goes before
    /// what the caller knows.
    async fn resume_and_set_clock(&self, vm: &VmHandle, paused: Option<Duration>) -> Result<ClockedVm> {
        match self.allowed(vm, Operation::Resume).await? {
            VmState::Saved => self.start_and_set_clock(vm).await,
            VmState::Suspended => self.unpause(vm, paused).await,
            to => {
                let layout = self.details(vm)?.layout;
                recovery::recover_running(vm, &layout).await?;
                let vm = Self::handle(vm, to, &layout, None);
                Ok(ClockedVm { vm, clock: ClockState::Right })
            }
        }
    }
}

impl QemuHypervisor {
    /// Resumes a paused guest, also one whose save was interrupted, and sets its clock.
    pub(super) async fn unpause(&self, vm: &VmHandle, paused: Option<Duration>) -> Result<ClockedVm> {
        let QemuDetails { layout, .. } = self.details(vm)?;
        if saved::was_begun(&layout) {
            save::give_up(&layout, false).await?;
        }
        recovery::recover_running(vm, &layout).await?;
        let limit = later(PAUSE_LIMIT);
        let mut qmp = QmpClient::connect(&status::monitor(&layout), limit).await?;
        qmp.cont(limit).await?;
        if let Err(error) = renewal::settle(&vm.spec, &layout, &mut qmp).await {
            // It must not run with the identity of another.
            qmp.pause(later(PAUSE_LIMIT)).await?;
            return Err(error);
        }
        let here = self.paused().remove(&vm.id).map(|since| since.elapsed());
        let clock = clock::keep_right(&mut qmp, &layout.agent_socket(), here.or(paused)).await;
        drop(qmp);
        let vm = match &vm.run {
            Some(_) => Self::handle(vm, VmState::Running, &layout, None),
            // A start that was interrupted before it could record the run.
            None => self.adopted(vm, later(PAUSE_LIMIT)).await?.vm,
        };
        Ok(ClockedVm { vm, clock })
    }
}

/// Returns the socket of the VM's guest agent.
fn channel(vm: &VmHandle) -> Result<&Path> {
    let socket = vm.run.as_ref().and_then(|run| run.agent.as_deref());
    socket.ok_or_else(|| Error::Unsupported {
        backend: vm.backend.clone(),
        what: format!("a guest agent in the VM `{}`", vm.name()),
    })
}
