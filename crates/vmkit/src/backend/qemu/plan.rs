//! What will be done for a VM: [`QemuPlan`], as data.
//!
//! Pure: from a spec and the facts of the host, without touching either. `--dry-run`, the golden
//! tests and bug reports print it.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;
use uuid::Uuid;

use super::argv::argv;
use super::facts::{ImageMedia, QemuFacts, descriptor};
use super::layout::QemuLayout;
use super::switch::Accelerator;
use crate::spec::{Boot, BridgeName, DataDisk, Firmware, Mib, NetworkConfig, VmSpec, Vnc};

/// All that will be done for one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct QemuPlan {
    /// What `prepare` makes, in order.
    pub prepare: Vec<PrepareStep>,
    /// The program that `start` runs.
    pub program: PathBuf,
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
}

/// One thing that `prepare` makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
#[non_exhaustive]
pub enum PrepareStep {
    /// A directory of this user alone.
    Directory {
        /// Where.
        path: PathBuf,
    },
    /// The root disk: a qcow2 overlay.
    Overlay {
        /// The image below.
        image: PathBuf,
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
    /// A UEFI variable store.
    FirmwareVariables {
        /// What it is a copy of.
        template: PathBuf,
        /// Where.
        path: PathBuf,
    },
    /// The cloud-init seed.
    Seed {
        /// Where.
        path: PathBuf,
    },
}

/// A socket that is bound for QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SocketPlan {
    /// Its path.
    pub path: PathBuf,
    /// Its number in QEMU.
    pub descriptor: i32,
}

/// Plans a VM.
pub(crate) fn plan(
    spec: &VmSpec,
    id: Uuid,
    layout: &QemuLayout,
    facts: &QemuFacts,
    media: &ImageMedia,
) -> QemuPlan {
    let socket = |path, descriptor| SocketPlan { path, descriptor };
    QemuPlan {
        prepare: prepare_steps(spec, layout, facts),
        program: facts.program.clone(),
        args: argv(spec, id, layout, facts, media),
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
    }
}

fn prepare_steps(spec: &VmSpec, layout: &QemuLayout, facts: &QemuFacts) -> Vec<PrepareStep> {
    let mut steps = vec![PrepareStep::Directory { path: layout.work.clone() }];
    if let Some(disk) = spec.disk() {
        let path = layout.root_disk();
        match (disk.base(), disk.size) {
            (None, Some(size)) => steps.push(PrepareStep::Disk { path, size }),
            _ => steps.push(PrepareStep::Overlay { image: disk.image.clone(), path, size: disk.size }),
        }
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
    if spec.cloud_init().is_some() {
        steps.push(PrepareStep::Seed { path: layout.seed() });
    }
    steps
}

fn warnings(spec: &VmSpec, facts: &QemuFacts) -> Vec<String> {
    let mut warnings = Vec::new();
    if let Some(host) = facts.host_memory.filter(|host| spec.memory() > *host) {
        warnings.push(format!("memory: {} is more than this host has ({host})", spec.memory()));
    }
    if spec.machine() == crate::spec::MachineType::Microvm && spec.vnc() == Vnc::Loopback {
        warnings.push("vnc: the microvm machine has no screen".to_owned());
    }
    warnings
}

fn lossy<S: serde::Serializer>(args: &[OsString], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(args.iter().map(|arg| arg.to_string_lossy()))
}

impl fmt::Display for QemuPlan {
    /// Prints the plan as a person reads it: steps, then a command line that a shell would take.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.prepare {
            match step {
                PrepareStep::Directory { path } => writeln!(f, "make directory {}", path.display())?,
                PrepareStep::Overlay { image, path, size } => {
                    write!(f, "make overlay {} over {}", path.display(), image.display())?;
                    match size {
                        Some(size) => writeln!(f, ", {size}")?,
                        None => writeln!(f)?,
                    }
                }
                PrepareStep::Disk { path, size } => writeln!(f, "make disk {}, {size}", path.display())?,
                PrepareStep::FirmwareVariables { template, path } => {
                    writeln!(f, "copy {} to {}", template.display(), path.display())?;
                }
                PrepareStep::Seed { path } => writeln!(f, "write cloud-init seed {}", path.display())?,
            }
        }
        for socket in &self.sockets {
            writeln!(f, "listen on {} (descriptor {})", socket.path.display(), socket.descriptor)?;
        }
        if let Some(bridge) = &self.bridge {
            writeln!(f, "make a tap on bridge {bridge} (descriptor {})", descriptor::TAP)?;
        }
        write!(f, "run {}", quoted(&self.program.to_string_lossy()))?;
        for arg in &self.args {
            let text = arg.to_string_lossy();
            let switch = text.starts_with('-') && text.len() > 1;
            write!(f, "{}{}", if switch { " \\\n    " } else { " " }, quoted(&text))?;
        }
        writeln!(f)
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
