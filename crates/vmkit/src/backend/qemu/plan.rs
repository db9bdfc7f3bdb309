//! What will be done for a VM: [`QemuPlan`], as data.
//!
//! Pure: from a spec and the facts of the host, without touching either. `prepare` and `start`
//! apply a plan and look at nothing else; `--dry-run`, the golden tests and bug reports print it.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use uuid::Uuid;

use super::argv::argv;
use super::devices::DeviceVersion;
use super::facts::{ImageMedia, QemuFacts, descriptor};
use super::layout::QemuLayout;
use super::switch::Accelerator;
use crate::cloud_init::Seed;
use crate::image::ImageFacts;
use crate::spec::{Boot, BridgeName, DataDisk, Firmware, Mib, NetworkConfig, VmSpec, Vnc};

/// All that will be done for one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct QemuPlan {
    /// What `prepare` creates, in order; nothing for a VM that exists.
    pub prepare: Vec<PrepareStep>,
    /// What `start` changes on disk before QEMU runs, in order; nothing for a new VM.
    pub update: Vec<UpdateStep>,
    /// The saved guest that continues, instead of booting.
    pub restore: Option<RestoreStep>,
    /// The program that `start` runs.
    pub program: PathBuf,
    /// The version of the devices in its arguments.
    pub devices: DeviceVersion,
    /// Its arguments.
    #[serde(serialize_with = "lossy")]
    pub args: Vec<OsString>,
    /// The sockets that are bound before it runs, and the number each has in it.
    pub sockets: Vec<SocketPlan>,
    /// The bridge that a tap is attached to.
    pub bridge: Option<BridgeName>,
    /// What runs the guest's code.
    pub accel: Accelerator,
    /// What is legal, and probably not what was meant.
    pub warnings: Vec<String>,
    /// Where everything of the VM lies.
    #[serde(skip)]
    pub(super) layout: QemuLayout,
}

/// One thing that `prepare` creates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
#[non_exhaustive]
pub enum PrepareStep {
    /// The VM's directory, of this user alone, with a mark that names the VM.
    Directory {
        /// Where.
        path: PathBuf,
        /// The VM's identity.
        id: Uuid,
    },
    /// The root disk: a qcow2 overlay.
    Overlay {
        /// The image below.
        image: ImageFacts,
        /// The overlay.
        path: PathBuf,
        /// The size the guest sees, where it is not the image's.
        size: Option<Mib>,
    },
    /// An empty qcow2 disk.
    Disk {
        /// Where.
        path: PathBuf,
        /// Its size.
        size: Mib,
    },
    /// A layer that another VM has, too.
    Layer {
        /// The other VM's name for it.
        source: PathBuf,
        /// This VM's.
        path: PathBuf,
    },
    /// A disk: a qcow2 overlay over a layer in the same directory.
    LayerOverlay {
        /// The layer.
        layer: PathBuf,
        /// The overlay.
        path: PathBuf,
    },
    /// A UEFI variable store.
    FirmwareVariables {
        /// What it is a copy of.
        template: PathBuf,
        /// Where.
        path: PathBuf,
    },
    /// The cloud-init seed.
    Seed(SeedStep),
}

/// One thing that `start` changes on disk, since the spec or the host is another than it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
#[non_exhaustive]
pub enum UpdateStep {
    /// Writes the cloud-init seed again.
    Seed(SeedStep),
    /// Corrects where the root disk says that its image is.
    BackingFile {
        /// The root disk.
        path: PathBuf,
        /// The image.
        image: PathBuf,
    },
    /// Grows the root disk.
    Grow {
        /// The root disk.
        path: PathBuf,
        /// Its size from now on.
        size: Mib,
    },
}

/// A saved guest that `start` continues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoreStep {
    /// Its memory and the state of its devices.
    pub memory: PathBuf,
    /// The machine that it was saved in, with the version, such as `pc-q35-7.2`.
    pub machine: String,
    /// The length of `memory` in bytes.
    pub bytes: u64,
}

/// A cloud-init seed to be written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SeedStep {
    /// Where.
    pub path: PathBuf,
    /// What is in it. Plans are printed with the documents' lengths only: they may hold secrets.
    #[serde(serialize_with = "lengths")]
    pub seed: Seed,
}

/// A socket that is bound for QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SocketPlan {
    /// Its path.
    pub path: PathBuf,
    /// Its number in QEMU.
    pub descriptor: i32,
}

/// Plans a run of a VM with these devices.
pub(crate) fn plan(
    spec: &VmSpec,
    id: Uuid,
    layout: &QemuLayout,
    facts: &QemuFacts,
    media: &ImageMedia,
    devices: DeviceVersion,
    restore: Option<RestoreStep>,
) -> QemuPlan {
    let socket = |path, descriptor| SocketPlan { path, descriptor };
    QemuPlan {
        prepare: Vec::new(),
        update: Vec::new(),
        program: facts.program.clone(),
        devices,
        args: argv(spec, id, layout, facts, media, devices, restore.as_ref().map(|it| it.machine.as_str())),
        restore,
        sockets: vec![
            socket(layout.qmp_socket(), descriptor::QMP),
            socket(layout.monitor_socket(), descriptor::MONITOR),
            socket(layout.spare_socket(), descriptor::SPARE),
            socket(layout.agent_socket(), descriptor::AGENT),
            socket(layout.console_socket(), descriptor::CONSOLE),
        ],
        bridge: match spec.network() {
            NetworkConfig::Tap { bridge } => Some(bridge.clone()),
            NetworkConfig::User(_) | NetworkConfig::Vnic { .. } | NetworkConfig::None => None,
        },
        accel: facts.accel,
        warnings: warnings(spec, facts),
        layout: layout.clone(),
    }
}

/// Plans what a VM is created of; `image` is what was found out about its root disk's, if it has
/// one.
pub(super) fn prepare_steps(
    spec: &VmSpec,
    id: Uuid,
    layout: &QemuLayout,
    facts: &QemuFacts,
    image: Option<ImageFacts>,
    seed: Option<SeedStep>,
) -> Vec<PrepareStep> {
    let mut steps = vec![PrepareStep::Directory { path: layout.work.clone(), id }];
    let (path, size) = (layout.root_disk(), spec.disk().and_then(|disk| disk.size));
    match (image, size) {
        (Some(image), size) => steps.push(PrepareStep::Overlay { image, path, size }),
        (None, Some(size)) => steps.push(PrepareStep::Disk { path, size }),
        (None, None) => {}
    }
    for (index, disk) in spec.data_disks().iter().enumerate() {
        if let DataDisk::Fresh { size } = disk {
            steps.push(PrepareStep::Disk { path: layout.data_disk(index), size: *size });
        }
    }
    if let (Boot::Firmware(Firmware::Uefi), Some(firmware)) = (spec.boot(), &facts.firmware) {
        let template = firmware.vars.clone();
        steps.push(PrepareStep::FirmwareVariables { template, path: layout.efi_vars() });
    }
    steps.extend(seed.map(PrepareStep::Seed));
    steps
}

fn warnings(spec: &VmSpec, facts: &QemuFacts) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(host) = facts.host_memory.filter(|host| spec.memory() > *host) {
        warnings.push(format!("memory: {} is more than this host has ({host})", spec.memory()));
    }
    if spec.machine() == crate::spec::MachineType::Microvm && spec.vnc() == Vnc::Loopback {
        warnings.push("vnc: the microvm machine type has no screen".to_owned());
    }
    warnings
}

fn lengths<S: serde::Serializer>(seed: &Seed, serializer: S) -> Result<S::Ok, S::Error> {
    let lengths = seed.documents().map(|(name, text)| (name, text.len()));
    serializer.collect_map(lengths)
}

fn lossy<S: serde::Serializer>(args: &[OsString], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(args.iter().map(|arg| arg.to_string_lossy()))
}

impl fmt::Display for QemuPlan {
    /// Prints the plan as a person reads it: steps, then a command line that a shell would take.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.prepare.iter().try_for_each(|step| writeln!(f, "{step}"))?;
        self.update.iter().try_for_each(|step| writeln!(f, "{step}"))?;
        if let Some(restore) = &self.restore {
            let RestoreStep { memory, machine, bytes } = restore;
            let mib = bytes.div_ceil(1 << 20);
            writeln!(f, "continue the guest saved in {} ({mib} MiB, {machine})", memory.display())?;
        }
        for socket in &self.sockets {
            writeln!(f, "listen on {} (descriptor {})", socket.path.display(), socket.descriptor)?;
        }
        if let Some(bridge) = &self.bridge {
            writeln!(f, "create a tap on bridge {bridge} (descriptor {})", descriptor::TAP)?;
        }
        writeln!(f, "devices of version {}", self.devices.number())?;
        write!(f, "run {}", quoted(&self.program.to_string_lossy()))?;
        for arg in &self.args {
            let text = arg.to_string_lossy();
            let switch = text.starts_with('-') && text.len() > 1;
            write!(f, "{}{}", if switch { " \\\n    " } else { " " }, quoted(&text))?;
        }
        writeln!(f)
    }
}

impl fmt::Display for PrepareStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PrepareStep::Directory { path, id } => {
                write!(f, "create directory {} of the VM {id}", path.display())
            }
            PrepareStep::Overlay { image, path, size } => {
                let (path, over) = (path.display(), image.path.display());
                write!(f, "create overlay {path} over {over} ({})", image.format)?;
                size.map_or(Ok(()), |size| write!(f, ", {size}"))
            }
            PrepareStep::Disk { path, size } => write!(f, "create disk {}, {size}", path.display()),
            PrepareStep::Layer { source, path } => {
                write!(f, "link {} to {}", path.display(), source.display())
            }
            PrepareStep::LayerOverlay { layer, path } => {
                write!(f, "create overlay {} over {} (qcow2)", path.display(), layer.display())
            }
            PrepareStep::FirmwareVariables { template, path } => {
                write!(f, "copy {} to {}", template.display(), path.display())
            }
            PrepareStep::Seed(seed) => seed.fmt(f),
        }
    }
}

impl fmt::Display for UpdateStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UpdateStep::Seed(seed) => seed.fmt(f),
            UpdateStep::BackingFile { path, image } => {
                write!(f, "set the backing file of {} to {}", path.display(), image.display())
            }
            UpdateStep::Grow { path, size } => write!(f, "grow disk {} to {size}", path.display()),
        }
    }
}

impl fmt::Display for SeedStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "write cloud-init seed {}", self.path.display())?;
        self.seed
            .documents()
            .into_iter()
            .try_for_each(|(name, text)| write!(f, ", {name} of {} bytes", text.len()))
    }
}

/// Quotes a word for a shell, where it needs it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}
