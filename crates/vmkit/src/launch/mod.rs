//! From an image's name to a guest that is ready: [`launch`].
//!
//! It only puts together what the image store, the manager and SSH have each alone, and tells how
//! far it is as data. What it makes is an ordinary VM: whatever ends a launch half way, `remove`
//! removes it, and a name whose making was cut off can be launched again.
//!
//! ```text
//! image ─▶ disk ─▶ boot ─▶ network ─▶ ssh ─▶ cloud-init
//! ```
//!
//! # Examples
//! ```no_run
//! use vmkit::image::{Catalogue, ImageStore};
//! use vmkit::launch::{Launch, launch};
//! use vmkit::{BackendTag, QemuHypervisor, VmManager};
//!
//! # async fn example() -> vmkit::Result<()> {
//! let home = vmkit::store::Home::at("/var/lib/ci")?;
//! let qemu = QemuHypervisor::builder(home.vms(), home.run()).build();
//! let (store, manager) =
//!     (ImageStore::new(&home, Catalogue::built_in()), VmManager::new(qemu, BackendTag::Qemu, home));
//! let wanted = Launch { ephemeral: true, ..Launch::new("debian:12".parse()?) };
//! let launched = launch(&manager, &store, wanted, &mut |event| println!("{event:?}")).await;
//! let launched = launched.map_err(|failed| failed.error)?;
//! println!("{} is ready", launched.vm.name());
//! # Ok(()) }
//! ```

mod report;

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

pub use report::{LaunchEvent, LaunchFailed, LaunchStage};

use self::report::StageReporter;
use crate::deadline::later;
use crate::error::{Error, ErrorKind, Result};
use crate::handle::VmHandle;
use crate::hypervisor::Hypervisor;
use crate::image::{ImageInUse, ImageRef, ImageStore, PullPolicy, PullProgress};
use crate::manager::{GuestAge, VmManager, console_tail};
use crate::span::{about, operation, within};
use crate::spec::{
    Boot, CloudInitConfig, Firmware, GuestAccess, MachineType, Mib, NetworkConfig, RootDisk, UserName,
    VmName, VmSpec, VmSpecBuilder,
};
use crate::ssh::{CloudInitStatus, Session};
use crate::store::EphemeralGuard;

/// How long a guest may take where nobody says.
const TIMEOUT: Duration = Duration::from_secs(600);

/// What is to be launched.
#[derive(Debug, Clone)]
pub struct LaunchOptions {
    /// The image of the root disk.
    pub image: ImageRef,
    /// Whether the image may be fetched.
    pub pull: PullPolicy,
    /// The name; where none is given, one is made of the image's, such as `debian-1`.
    pub name: Option<VmName>,
    /// The VM. Its name, its machine, its root disk, what it boots and its cloud-init are set by
    /// what stands here beside it.
    pub spec: VmSpecBuilder,
    /// The machine, which decides the architecture of the image.
    pub machine: MachineType,
    /// The size of the root disk; the image's where none is given.
    pub disk: Option<Mib>,
    /// What it boots; where none is given, the image by the firmware that is known to suit it.
    pub boot: Option<Boot>,
    /// What cloud-init is told beside vmkit's own way in.
    pub cloud_init: Option<CloudInitConfig>,
    /// How far the launch goes.
    pub until: LaunchUntil,
    /// How long the guest may take from its start until it is ready.
    pub timeout: Duration,
    /// Whether the VM goes with the answer's [`EphemeralGuard`].
    pub ephemeral: bool,
}

impl LaunchOptions {
    /// Creates the launch of an image with everything else as it is where nobody says: fetched if
    /// need be, the usual machine of [`VmSpec::builder`], waited for until it is ready, 10 minutes
    /// at most, and there until somebody removes it.
    pub fn new(image: ImageRef) -> Self {
        // The name is given once it is known what is free.
        let unnamed = VmName::new("unnamed").expect("it is a name");
        Self {
            image,
            pull: PullPolicy::Missing,
            name: None,
            spec: VmSpec::builder(unnamed),
            machine: MachineType::default(),
            disk: None,
            boot: None,
            cloud_init: None,
            until: LaunchUntil::default(),
            timeout: TIMEOUT,
            ephemeral: false,
        }
    }
}

/// How far a launch goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LaunchUntil {
    /// Until the guest's CPUs run.
    Booted,
    /// Until somebody can log in, and cloud-init is through; a VM without a network is only booted.
    #[default]
    Ready,
}

/// A VM that was launched.
#[derive(Debug)]
#[non_exhaustive]
pub struct LaunchedVm {
    /// The VM.
    pub vm: VmHandle,
    /// The whole name of its image, or its path.
    pub image: String,
    /// A session of vmkit's own user, where the launch went as far.
    pub session: Option<Session>,
    /// What cloud-init did, where it was asked.
    pub cloud_init: Option<CloudInitStatus>,
    /// Keeps an ephemeral VM; dropped, the VM is whoever's who comes next to remove.
    pub owner: Option<EphemeralGuard>,
}

/// Creates a VM of an image, boots it, and waits until it is ready; `tell` hears of each step.
///
/// # Cancel safety
/// What an image's pull has fetched stays. A VM that is there already stays, in whatever state it
/// is; an ephemeral one is left without its owner.
///
/// # Errors
/// Those of the steps, with the stage and, where it is there, the VM: [`ImageStore::resolve`];
/// `AlreadyExists` for a name in use and [`VmManager::create`]'s; [`VmManager::start`]'s;
/// `TimedOut` and `InvalidState` with the console's last lines, or `Guest` with what its SSH server
/// answered or cloud-init's own errors.
pub async fn launch<H: Hypervisor + 'static>(
    manager: &VmManager<H>,
    store: &ImageStore,
    launch: LaunchOptions,
    tell: &mut (dyn FnMut(LaunchEvent) + Send),
) -> std::result::Result<LaunchedVm, LaunchFailed> {
    let mut report = StageReporter::new(tell);
    let span = operation!("launch", vm = launch.name.as_ref().map_or("", |name| name.as_str()));
    let launched = within(span, carry_out(manager, store, launch, &mut report)).await;
    launched.map_err(|error| report.failed(error))
}

async fn carry_out<H: Hypervisor + 'static>(
    manager: &VmManager<H>,
    store: &ImageStore,
    launch: LaunchOptions,
    report: &mut StageReporter<'_>,
) -> Result<LaunchedVm> {
    report.begin(LaunchStage::Image);
    check_ahead(manager, &launch).await?;
    let image = resolve(store, &launch, report).await?;
    report.begin(LaunchStage::Disk);
    let (until, timeout) = (launch.until, launch.timeout);
    let (vm, owner) = create(manager, launch, &image, report).await?;
    about(vm.id);
    let name = vm.name().clone();
    // The VM's own record holds the image from here on.
    let image = image.name.clone();
    report.begin(LaunchStage::Boot);
    let vm = manager.start(&name).await?;
    let mut launched = LaunchedVm { vm, image, session: None, cloud_init: None, owner };
    let has_network = !matches!(launched.vm.spec.network(), NetworkConfig::None);
    if until == LaunchUntil::Ready && has_network {
        let deadline = later(timeout);
        make_ready(manager, &mut launched, deadline, report).await?;
    }
    report.end();
    Ok(launched)
}

/// Refuses what could not be launched whatever its image is, before that is fetched.
async fn check_ahead<H: Hypervisor + 'static>(manager: &VmManager<H>, launch: &LaunchOptions) -> Result<()> {
    if let Some(name) = &launch.name {
        manager.check_free(name).await?;
    }
    // Stands for the image, which nobody looks at here.
    let disk = RootDisk { image: "/".into(), size: launch.disk };
    let boot = launch.boot.clone().unwrap_or(Boot::Firmware(launch.machine.usual_firmware()));
    // The image's own user is not known yet; what the way in can't be joined with is.
    let config = with_access(launch.cloud_init.clone().unwrap_or_default(), None)?;
    let spec =
        launch.spec.clone().machine(launch.machine).disk(disk).boot(boot).cloud_init(config).build()?;
    manager.check_host(&spec).await
}

/// Fetches the image if need be, and tells of its progress.
async fn resolve(
    store: &ImageStore,
    launch: &LaunchOptions,
    report: &mut StageReporter<'_>,
) -> Result<ImageInUse> {
    let (sender, mut progress) = watch::channel(PullProgress::default());
    let resolved = store.resolve(&launch.image, launch.machine.arch(), launch.pull, &sender);
    tokio::pin!(resolved);
    loop {
        tokio::select! {
            // The end first: the last progress is no news then.
            biased;
            image = &mut resolved => return image,
            Ok(()) = progress.changed() => {
                let now = *progress.borrow_and_update();
                report.tell(LaunchEvent::Pulling(now));
            }
        }
    }
}

/// Creates the VM, under the next free name where none was given.
async fn create<H: Hypervisor + 'static>(
    manager: &VmManager<H>,
    launch: LaunchOptions,
    image: &ImageInUse,
    report: &mut StageReporter<'_>,
) -> Result<(VmHandle, Option<EphemeralGuard>)> {
    let usual = match launch.machine.usual_firmware() {
        Firmware::Bios => image.firmware.unwrap_or(Firmware::Bios),
        only => only,
    };
    let disk = RootDisk { image: image.facts.path.clone(), size: launch.disk };
    let boot = launch.boot.unwrap_or(Boot::Firmware(usual));
    let config = with_access(launch.cloud_init.unwrap_or_default(), image.user.as_ref())?;
    let spec = launch.spec.machine(launch.machine).disk(disk).boot(boot).cloud_init(config);
    let mut numbers = 1..=u32::MAX;
    loop {
        let name = match &launch.name {
            Some(name) => name.clone(),
            None => free_name(manager, &image.name, &mut numbers)?,
        };
        let spec = spec.clone().name(name.clone()).build()?.with_image_name(&image.name);
        let made = match launch.ephemeral {
            true => manager.create_ephemeral(spec).await.map(|(vm, owner)| (vm, Some(owner))),
            false => manager.create(spec).await.map(|vm| (vm, None)),
        };
        match made {
            // Somebody else was quicker with this number.
            Err(Error::AlreadyExists { name: taken, .. })
                if launch.name.is_none() && taken == name.as_str() => {}
            Err(error) => return Err(error),
            Ok((vm, owner)) => {
                report.name(vm.name());
                return Ok((vm, owner));
            }
        }
    }
}

/// Adds vmkit's own way in.
fn with_access(mut config: CloudInitConfig, own: Option<&UserName>) -> Result<CloudInitConfig> {
    if config.access.is_none() {
        config.access = Some(GuestAccess::beside(&config, own)?);
    }
    Ok(config)
}

/// Returns the first name after the image's that no VM has, such as `debian-1`.
fn free_name<H: Hypervisor + 'static>(
    manager: &VmManager<H>,
    image: &str,
    numbers: &mut impl Iterator<Item = u32>,
) -> Result<VmName> {
    let stem = stem(image);
    for number in numbers {
        let name = VmName::new(format!("{stem}-{number}"))?;
        if !manager.home().vm(&name).exists() {
            return Ok(name);
        }
    }
    Err(Error::AlreadyExists { what: "VM", name: format!("{stem}-{}", u32::MAX) })
}

/// Returns what VMs of this image are called: the name of the distribution, or of the file.
fn stem(image: &str) -> String {
    let file = image.rsplit('/').find(|part| !part.is_empty()).unwrap_or_default();
    let word = file.split(['.', ':', '@', '#', '?']).next().unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let text: String = word.chars().map(plain).take(32).collect();
    match text.trim_matches('-') {
        "" => "vm".to_owned(),
        stem => stem.to_owned(),
    }
}

/// Waits until the guest is as somebody needs it who wants to log in.
async fn make_ready<H: Hypervisor + 'static>(
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
        Err(error) => return Err(with_console(error, &launched.vm).await),
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
        Err(error) => return Err(with_console(error, &launched.vm).await),
        done => done?,
    };
    launched.vm = manager.info(&name).await?;
    if let Some(why) = done.failure() {
        let message = format!("cloud-init in the VM `{name}` failed: {why}");
        return Err(Error::Backend { message, kind: ErrorKind::Guest, source: None });
    }
    launched.session = Some(session);
    launched.cloud_init = Some(done);
    Ok(())
}

/// Adds the console's last lines to a deadline that passed.
async fn with_console(error: Error, vm: &VmHandle) -> Error {
    match error {
        Error::TimedOut { awaited, after, console } if console.is_empty() => {
            Error::TimedOut { awaited, after, console: console_tail(vm).await }
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_without_a_name_is_called_after_its_image() {
        for (image, expected) in [
            ("debian:12", "debian"),
            ("/srv/images/My_Disk.v2.qcow2", "my-disk"),
            ("https://host/a/b.raw.zst?x=1", "b"),
            ("oci://registry:5000/team/web:v1", "web"),
            ("/", "vm"),
            ("./-.img", "vm"),
        ] {
            assert_eq!(stem(image), expected, "{image}");
            VmName::new(format!("{}-{}", stem(image), u32::MAX)).unwrap();
        }
        VmName::new(format!("{}-{}", stem(&"x".repeat(200)), u32::MAX)).unwrap();
    }
}
