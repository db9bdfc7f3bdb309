//! From another VM to a copy of it that is ready: [`launch_from`].

use std::time::Duration;

use super::report::StageReporter;
use super::{
    LaunchEvent, LaunchFailed, LaunchNaming, LaunchStage, LaunchUntil, LaunchedVm, TIMEOUT, boot, by_name,
};
use crate::abilities::IdentityPolicy;
use crate::error::Result;
use crate::hypervisor::Backend;
use crate::manager::{Lifetime, VmManager};
use crate::span::{about, operation, within};
use crate::spec::{VmName, VmSource};

/// The options of a launch of a copy.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CopyOptions {
    /// What is copied. A VM that runs, or a snapshot with memory, is forked; anything else is
    /// cloned, and boots.
    pub source: VmSource,
    /// The name of the new VM, or the start of it.
    pub name: VmName,
    /// How that is used.
    pub naming: LaunchNaming,
    /// How far the launch goes.
    pub until: LaunchUntil,
    /// The timeout from the guest's start until it is ready.
    pub timeout: Duration,
    /// Whether the VM is removed with the result's
    /// [`EphemeralGuard`](crate::store::EphemeralGuard).
    pub ephemeral: bool,
    /// What happens if a guest that continues can't be given an identity of its own.
    pub identity: IdentityPolicy,
}

impl CopyOptions {
    /// Returns the options for a copy with the next free number behind its source's name, which is
    /// awaited for 10 minutes, and kept until it is removed.
    pub fn new(source: VmSource) -> Self {
        Self {
            name: source.vm.clone(),
            source,
            naming: LaunchNaming::Numbered,
            until: LaunchUntil::default(),
            timeout: TIMEOUT,
            ephemeral: false,
            identity: IdentityPolicy::default(),
        }
    }
}

/// Creates a copy of a VM, starts it, and waits until it is ready, as far as the options say;
/// `tell` is called at each step. A source without vmkit's login is only started.
///
/// # Cancel safety
/// An existing VM stays, in its present state; an ephemeral one is left without its owner.
///
/// # Errors
/// Those of the steps, with the stage and, if it exists, the VM: [`VmManager::clone_vm`]'s and
/// [`VmManager::fork`]'s, then those of [`launch`](super::launch).
pub async fn launch_from<H: Backend + 'static>(
    manager: &VmManager<H>,
    options: CopyOptions,
    tell: &mut (dyn FnMut(LaunchEvent) + Send),
) -> std::result::Result<LaunchedVm, LaunchFailed> {
    let mut report = StageReporter::new(tell);
    let span = operation!("launch", vm = options.source.vm.as_str());
    let launched = within(span, carry_out(manager, options, &mut report)).await;
    launched.map_err(|error| report.failed(error))
}

async fn carry_out<H: Backend + 'static>(
    manager: &VmManager<H>,
    options: CopyOptions,
    report: &mut StageReporter<'_>,
) -> Result<LaunchedVm> {
    let CopyOptions { source, name, naming, until, timeout, ephemeral, identity } = options;
    let lifetime = if ephemeral { Lifetime::Ephemeral } else { Lifetime::Lasting };
    report.begin(LaunchStage::Disk);
    let create = async |name: &VmName| manager.copy(&source, name, identity, lifetime).await;
    let (vm, owner) = by_name(manager, &name, naming, create).await?;
    report.name(vm.name());
    about(vm.id);
    let image = vm.spec.image_name().map(str::to_owned);
    let has_login = vm.spec.cloud_init().is_some_and(|config| config.access.is_some());
    let until = if until == LaunchUntil::Ready && !has_login { LaunchUntil::Booted } else { until };
    let launched = LaunchedVm { vm, image, session: None, cloud_init: None, owner };
    boot(manager, launched, until, timeout, report).await
}
