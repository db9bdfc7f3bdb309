//! Resuming a VM, and setting its guest's clock.

use std::time::Duration;

use super::{VmManager, VmRequest};
#[cfg(feature = "ssh")]
use crate::abilities::ClockState;
use crate::abilities::ClockedVm;
use crate::error::Result;
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::span::{operation, within};
use crate::spec::VmName;

impl<H: Backend + 'static> VmManager<H> {
    /// Boots a VM, or continues a saved one and sets the guest's clock as
    /// [`resume`](Self::resume) does; for a running one it succeeds, with the information on that
    /// run.
    ///
    /// # Errors
    /// `InvalidState` for a suspended VM, and those of
    /// [`Hypervisor::start`](crate::Hypervisor::start).
    pub async fn start(&self, name: &VmName) -> Result<VmHandle> {
        let start = async {
            let started = self.operate_on_clock(name, &[VmRequest::Start]).await?;
            #[cfg(feature = "ssh")]
            if started.clock == ClockState::Unknown {
                self.set_clock(&started.vm, None).await;
            }
            Ok(started.vm)
        };
        within(operation!("start", vm = name), start).await
    }

    /// Resumes a VM's vCPUs, and sets the guest's clock, which was stopped: by the guest agent if
    /// one runs, otherwise over SSH if the VM's record has a login. If neither succeeds within
    /// seconds, this logs a warning, and the guest runs on. A saved VM continues from the disk.
    ///
    /// # Errors
    /// `InvalidState` unless it lives or is saved, and those of
    /// [`Hypervisor::resume`](crate::Hypervisor::resume).
    pub async fn resume(&self, name: &VmName) -> Result<VmHandle> {
        let resume = async {
            #[cfg(feature = "ssh")]
            let paused = self.paused_for(name);
            #[cfg(not(feature = "ssh"))]
            let paused = None;
            let resumed = self.operate_on_clock(name, &[VmRequest::Resume(paused)]).await?;
            #[cfg(feature = "ssh")]
            if resumed.clock == ClockState::Unknown {
                self.set_clock(&resumed.vm, paused).await;
            }
            Ok(resumed.vm)
        };
        within(operation!("resume", vm = name), resume).await
    }

    /// Resumes a VM by its backend, which sets the guest's clock if it can.
    pub(super) async fn resume_by_backend(
        &self,
        vm: &VmHandle,
        paused: Option<Duration>,
    ) -> Result<ClockedVm> {
        match self.abilities_of(vm).guest_clock() {
            Some(clock) => clock.resume_and_set_clock(vm, paused).await,
            None => self.hypervisor.resume(vm).await.map(ClockedVm::unknown),
        }
    }
}
