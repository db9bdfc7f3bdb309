//! From a [`Blueprint`] to a VM, and on to a guest that is ready: [`launch`].
//!
//! It combines the image store, the manager and SSH, and reports its progress as data. The result
//! is an ordinary VM: `remove` removes what an interrupted launch has left, and another launch of
//! the name replaces it.
//!
//! ```text
//! image ─▶ disk ─▶ boot ─▶ network ─▶ ssh ─▶ cloud-init
//! ```
//!
//! The first two stages are the only code that creates VMs from images: a project's machines use
//! them as well.
//!
//! # Examples
//! ```no_run
//! use vmkit::image::{Catalogue, ImageStore};
//! use vmkit::launch::{LaunchOptions, launch};
//! use vmkit::{BackendTag, QemuHypervisor, VmManager};
//!
//! # async fn example() -> vmkit::Result<()> {
//! let home = vmkit::store::Home::at("/var/lib/ci")?;
//! let qemu = QemuHypervisor::builder(home.vms(), home.run()).build();
//! let (store, manager) =
//!     (ImageStore::new(&home, Catalogue::built_in()), VmManager::new(qemu, home));
//! let mut options = LaunchOptions::of_image(&"debian:12".parse()?)?;
//! options.ephemeral = true;
//! let launched = launch(&manager, &store, options, &mut |event| println!("{event:?}")).await;
//! let launched = launched.map_err(|failed| failed.error)?;
//! println!("{} is ready", launched.vm.name());
//! # Ok(()) }
//! ```

mod from;
mod report;
mod resolve;

use std::time::Duration;

use tokio::time::Instant;

pub use from::{CopyOptions, launch_from};
pub use report::{LaunchEvent, LaunchFailed, LaunchStage};
pub use resolve::ResolvedVm;

use self::report::StageReporter;
use crate::deadline::later;
use crate::error::{Error, Result, Subject};
use crate::handle::VmHandle;
use crate::hypervisor::Backend;
use crate::image::{ImageRef, ImageStore, PullPolicy};
use crate::manager::{GuestAge, VmManager};
use crate::span::{about, operation, within};
use crate::spec::{Blueprint, NetworkConfig, VmName, VmSpec};
use crate::ssh::{CloudInitStatus, Session};
use crate::store::EphemeralGuard;

/// The default timeout of a guest's readiness.
const TIMEOUT: Duration = Duration::from_secs(600);

/// The options of a launch.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LaunchOptions {
    /// What the VM is created from. A login needs [`Blueprint::with_access`].
    pub blueprint: Blueprint,
    /// How the blueprint's name is used.
    pub naming: LaunchNaming,
    /// Whether the image may be fetched.
    pub pull: PullPolicy,
    /// How far the launch goes.
    pub until: LaunchUntil,
    /// The timeout from the guest's start until it is ready.
    pub timeout: Duration,
    /// Whether the VM is removed with the result's [`EphemeralGuard`].
    pub ephemeral: bool,
}

impl LaunchOptions {
    /// Returns the options for a launch that fetches the image if needed, waits up to 10 minutes
    /// until the VM is ready, and keeps it until it is removed.
    pub fn new(blueprint: Blueprint) -> Self {
        Self {
            blueprint,
            naming: LaunchNaming::default(),
            pull: PullPolicy::default(),
            until: LaunchUntil::default(),
            timeout: TIMEOUT,
            ephemeral: false,
        }
    }

    /// Returns the options for a launch of an image on the default machine of [`VmSpec::builder`],
    /// under the next free name, with a login.
    ///
    /// # Errors
    /// `InvalidInput` for an image whose path is empty.
    pub fn of_image(image: &ImageRef) -> Result<Self> {
        let spec = VmSpec::builder(name_stem(image)).disk(image.root_disk(None));
        let blueprint = Blueprint::new(spec)?.with_access();
        Ok(Self { naming: LaunchNaming::Numbered, ..Self::new(blueprint) })
    }
}

/// How the name in a blueprint is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LaunchNaming {
    /// It is the VM's name.
    #[default]
    Exact,
    /// The next free number is appended: `debian` becomes `debian-1`.
    Numbered,
}

/// How far a launch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LaunchUntil {
    /// Until the VM exists; it is not started.
    Created,
    /// Until the guest's CPUs run.
    Booted,
    /// Until a login works and cloud-init has ended; a VM without a network is only booted.
    #[default]
    Ready,
}

/// A launched VM.
#[derive(Debug)]
#[non_exhaustive]
pub struct LaunchedVm {
    /// The VM.
    pub vm: VmHandle,
    /// The full name of its image, or its path.
    pub image: Option<String>,
    /// A session of vmkit's own user, if the launch waited for the guest.
    pub session: Option<Session>,
    /// The result of cloud-init, if the launch waited for the guest.
    pub cloud_init: Option<CloudInitStatus>,
    /// The owner of an ephemeral VM; once this is dropped, the next `remove_orphans` removes the
    /// VM.
    pub owner: Option<EphemeralGuard>,
}

/// Creates a VM, boots it, and waits until it is ready, as far as the options say; `tell` is called
/// at each step.
///
/// # Cancel safety
/// A partial download of the image stays. An existing VM stays, in its present state; an ephemeral
/// one is left without its owner.
///
/// # Errors
/// Those of the steps, with the stage and, if it exists, the VM: [`Blueprint::check`] and
/// [`Blueprint::resolve`]; `AlreadyExists` for a name in use and [`VmManager::create`]'s;
/// [`VmManager::start`]'s; `TimedOut` and `InvalidState` with the console's last lines, or `Guest`
/// with the reply of its SSH server or the errors of cloud-init.
pub async fn launch<H: Backend + 'static>(
    manager: &VmManager<H>,
    store: &ImageStore,
    launch: LaunchOptions,
    tell: &mut (dyn FnMut(LaunchEvent) + Send),
) -> std::result::Result<LaunchedVm, LaunchFailed> {
    let mut report = StageReporter::new(tell);
    let name = Some(launch.blueprint.draft().name()).filter(|_| launch.naming == LaunchNaming::Exact);
    let span = operation!("launch", vm = name.map_or("", VmName::as_str));
    let launched = within(span, carry_out(manager, store, launch, &mut report)).await;
    launched.map_err(|error| report.failed(error))
}

async fn carry_out<H: Backend + 'static>(
    manager: &VmManager<H>,
    store: &ImageStore,
    launch: LaunchOptions,
    report: &mut StageReporter<'_>,
) -> Result<LaunchedVm> {
    let LaunchOptions { blueprint, naming, pull, until, timeout, ephemeral } = launch;
    report.begin(LaunchStage::Image);
    if naming == LaunchNaming::Exact {
        manager.check_free(blueprint.draft().name()).await?;
    }
    blueprint.check(manager).await?;
    let mut on_progress = |now| report.tell(LaunchEvent::Pulling(now));
    let resolved = blueprint.resolve(manager, store, pull, &mut on_progress).await?;
    let image = resolved.image_name.clone();
    report.begin(LaunchStage::Disk);
    let (vm, owner) = create(manager, resolved, naming, ephemeral, report).await?;
    about(vm.id);
    let launched = LaunchedVm { vm, image, session: None, cloud_init: None, owner };
    boot(manager, launched, until, timeout, report).await
}

/// Starts a VM that was created, and waits for it, as far as `until` says.
async fn boot<H: Backend + 'static>(
    manager: &VmManager<H>,
    mut launched: LaunchedVm,
    until: LaunchUntil,
    timeout: Duration,
    report: &mut StageReporter<'_>,
) -> Result<LaunchedVm> {
    if until != LaunchUntil::Created {
        report.begin(LaunchStage::Boot);
        launched.vm = manager.start(&launched.vm.name().clone()).await?;
    }
    let has_network = !matches!(launched.vm.spec.network(), NetworkConfig::None);
    if until == LaunchUntil::Ready && has_network {
        let deadline = later(timeout);
        make_ready(manager, &mut launched, deadline, report).await?;
    }
    report.end();
    Ok(launched)
}

/// Creates the VM; from then on its record keeps the image from being removed.
async fn create<H: Backend + 'static>(
    manager: &VmManager<H>,
    resolved: ResolvedVm,
    naming: LaunchNaming,
    ephemeral: bool,
    report: &mut StageReporter<'_>,
) -> Result<(VmHandle, Option<EphemeralGuard>)> {
    let create = async |name: &VmName| {
        let spec = resolved.spec.clone().with_name(name.clone());
        match ephemeral {
            true => manager.create_ephemeral(spec).await.map(|(vm, owner)| (vm, Some(owner))),
            false => manager.create(spec).await.map(|vm| (vm, None)),
        }
    };
    let created = by_name(manager, resolved.spec.name(), naming, create).await?;
    report.name(created.0.name());
    Ok(created)
}

/// Creates a VM by this name, or by it with the next free number.
async fn by_name<H: Backend + 'static, T>(
    manager: &VmManager<H>,
    stem: &VmName,
    naming: LaunchNaming,
    create: impl AsyncFn(&VmName) -> Result<T>,
) -> Result<T> {
    for number in 1..=u32::MAX {
        let name = match naming {
            LaunchNaming::Exact => stem.clone(),
            LaunchNaming::Numbered => VmName::new(format!("{stem}-{number}"))?,
        };
        if naming == LaunchNaming::Numbered && manager.home().vm(&name).exists() {
            continue;
        }
        match create(&name).await {
            // Another process took this number first.
            Err(Error::AlreadyExists { name: taken, .. })
                if naming == LaunchNaming::Numbered && taken == name.as_str() => {}
            created => return created,
        }
    }
    Err(Error::already_exists(Subject::Vm, format!("{stem}-{}", u32::MAX)))
}

/// Returns the name of VMs of this image without their number, such as `debian`: the name of the
/// distribution, or of the file.
pub fn name_stem(image: &ImageRef) -> VmName {
    let image = image.to_string();
    let file = image.rsplit('/').find(|part| !part.is_empty()).unwrap_or_default();
    let word = file.split(['.', ':', '@', '#', '?']).next().unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let text: String = word.chars().map(plain).take(32).collect();
    let stem = Some(text.trim_matches('-')).filter(|stem| !stem.is_empty()).unwrap_or("vm");
    VmName::new(stem).expect("it is 1 to 32 letters, digits and dashes, no dash at an end")
}

/// Waits until the guest is ready for a user's login.
async fn make_ready<H: Backend + 'static>(
    manager: &VmManager<H>,
    launched: &mut LaunchedVm,
    deadline: Instant,
    report: &mut StageReporter<'_>,
) -> Result<()> {
    let name = launched.vm.name().clone();
    report.begin(LaunchStage::Network);
    manager.address_known(&launched.vm, deadline).await;
    report.begin(LaunchStage::Ssh);
    let mut notice = |text| report.tell(LaunchEvent::Notice(text));
    let session = match manager.enter(&name, deadline, GuestAge::New, &mut notice).await {
        Err(error) => return Err(with_console(manager, error, &launched.vm).await),
        session => session?,
    };
    report.begin(LaunchStage::CloudInit);
    let mut stage = None;
    let done = manager.cloud_init_through(&name, Some(session), deadline, |now| {
        if now.stage.is_some() && now.stage != stage {
            stage.clone_from(&now.stage);
            report.tell(LaunchEvent::CloudInit(now.stage.clone().unwrap_or_default()));
        }
    });
    let (session, done) = match done.await {
        Err(error) => return Err(with_console(manager, error, &launched.vm).await),
        done => done?,
    };
    launched.vm = manager.info(&name).await?;
    if let Some(why) = done.failure() {
        return Err(Error::CloudInit { vm: name, is_locked: false, problem: why });
    }
    launched.session = Some(session);
    launched.cloud_init = Some(done);
    Ok(())
}

/// Adds the console's last lines to a timeout.
async fn with_console<H: Backend + 'static>(manager: &VmManager<H>, error: Error, vm: &VmHandle) -> Error {
    match error {
        Error::TimedOut { awaited, after, console: None } => {
            Error::TimedOut { awaited, after, console: manager.console_tail(vm).await }
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::noop::NoopHypervisor;
    use crate::image::Catalogue;
    use crate::lifecycle::VmState;
    use crate::store::Home;

    #[tokio::test]
    async fn a_launch_until_created_starts_nothing_and_takes_the_next_number() {
        let dir = tempfile::tempdir().unwrap();
        let (home, disk) = (Home::at(dir.path().join("home")).unwrap(), dir.path().join("disk.raw"));
        std::fs::write(&disk, [1; 512]).unwrap();
        let store = ImageStore::new(&home, Catalogue::built_in());
        let manager = VmManager::new(NoopHypervisor::new(), home);
        for name in ["disk-1", "disk-2"] {
            let mut options = LaunchOptions::of_image(&ImageRef::Path(disk.clone())).unwrap();
            options.until = LaunchUntil::Created;
            let mut stages = Vec::new();
            let mut on_event = |event| {
                if let LaunchEvent::Ended(stage, _) = event {
                    stages.push(stage);
                }
            };
            let vm = launch(&manager, &store, options, &mut on_event).await.unwrap().vm;
            assert_eq!((vm.name().as_str(), &vm.state), (name, &VmState::Prepared));
            assert_eq!(stages, [LaunchStage::Image, LaunchStage::Disk]);
            assert_eq!(vm.spec.image_name(), disk.to_str());
            assert!(vm.spec.cloud_init().unwrap().access.is_some());
        }
    }

    #[test]
    fn a_vm_without_a_name_is_called_after_its_image() {
        let stem = |image: &str| name_stem(&image.parse().unwrap());
        for (image, expected) in [
            ("debian:12", "debian"),
            ("/srv/images/My_Disk.v2.qcow2", "my-disk"),
            ("https://host/a/b.raw.zst?x=1", "b"),
            ("oci://registry:5000/team/web:v1", "web"),
            ("/", "vm"),
            ("./-.img", "vm"),
        ] {
            assert_eq!(stem(image).as_str(), expected, "{image}");
        }
        VmName::new(format!("{}-{}", stem(&format!("/{}", "x".repeat(200))), u32::MAX)).unwrap();
    }
}
