//! What a file of machines comes to: [`Project`] and its parts.
//!
//! Pure: every path is absolute, every default is filled in, and what only the host can tell stays
//! open until a VM is made.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::problem::{VmfileError, VmfileProblem};
use crate::error::{Error, ErrorChain, Result};
use crate::spec::{Blueprint, Boot, HostInputs, Labels, MachineType, NetworkConfig, VmName, VmSpec};

/// The machines that one file describes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Project {
    /// Its name, which the name of each VM begins with.
    pub name: String,
    /// The file, absolute.
    pub file: PathBuf,
    /// The machines, in the order of the file.
    pub machines: Vec<MachineConfig>,
    pub(super) text: Arc<str>,
}

/// One machine: what it shall be, and what shall be done in it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MachineConfig {
    /// Its name in the file.
    pub name: String,
    /// The name of its VM: `PROJECT-MACHINE`.
    pub vm: VmName,
    /// Its image as the file has it, a path made absolute; `None` for a machine that has only a
    /// kernel.
    pub image: Option<String>,
    /// The machines that have to be ready and provisioned before this one is started.
    pub depends_on: Vec<String>,
    /// When it counts as ready.
    pub ready: ReadyProbes,
    /// What is copied into the guest before the steps, in order.
    pub files: Vec<CopySpec>,
    /// What is done in the guest, in order; no two have one name.
    pub steps: Vec<ProvisionStep>,
    /// What its VM is created from.
    pub(super) blueprint: Blueprint,
    /// Where each key stands in the text, by its path in the machine; the machine's own name is the
    /// empty one.
    pub(super) places: BTreeMap<String, Range<usize>>,
}

/// Which machine of which project a VM is, by its labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MachineOrigin<'a> {
    /// The name that the project had when the VM was made: the VM's own begins with it.
    pub project: &'a str,
    /// The machine's name in the file.
    pub machine: &'a str,
    /// Where the file was.
    pub file: &'a Path,
}

impl<'a> MachineOrigin<'a> {
    /// Returns which machine of which project a VM is; `None` for one that is of no project.
    pub fn of(vm: &'a VmSpec) -> Option<Self> {
        let (file, machine) = (vm.labels().get(Project::LABEL)?, vm.labels().get(MachineConfig::LABEL)?);
        let project = vm.name().as_str().strip_suffix(machine)?.strip_suffix('-')?;
        Some(Self { project, machine, file: Path::new(file) })
    }
}

/// When a machine counts as ready: once all of it is true.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadyProbes {
    /// Whether its SSH server has to let vmkit in.
    pub ssh: bool,
    /// Whether cloud-init has to have finished without an error.
    pub cloud_init: bool,
    /// The TCP ports of the guest that have to answer.
    pub tcp: Vec<u16>,
    /// The command that has to succeed in the guest: a text for `/bin/sh -c`, run as root.
    pub command: Option<String>,
    /// How long all of it may take.
    pub timeout: Duration,
}

/// A file or a folder of the host, to be copied into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopySpec {
    /// Where it is on the host, absolute.
    pub from: PathBuf,
    /// Where it is put in the guest, absolute.
    pub to: String,
    /// The permission bits of its files; as on the host where none are given.
    pub mode: Option<u32>,
    /// Whose it is, `USER` or `USER:GROUP`; root's where nobody is named.
    pub owner: Option<String>,
}

/// A provision step.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProvisionStep {
    /// Its name.
    pub name: String,
    /// What it does.
    pub action: StepAction,
    /// When it is run.
    pub run: RunPolicy,
    /// The guest's user that it runs as.
    pub user: String,
    /// Its environment.
    pub env: BTreeMap<String, String>,
    /// The folder of the guest that it runs in; the user's home where none is given.
    pub dir: Option<String>,
    /// How long it may take.
    pub timeout: Duration,
}

impl fmt::Debug for ProvisionStep {
    /// Shows the names of its variables only: what is in them may be a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Step")
            .field("name", &self.name)
            .field("action", &self.action)
            .field("run", &self.run)
            .field("user", &self.user)
            .field("env", &self.env.keys())
            .field("dir", &self.dir)
            .field("timeout", &self.timeout)
            .finish()
    }
}

/// What a provision step does.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StepAction {
    /// Has `/bin/sh -e` run this text.
    Shell(String),
    /// Runs a file of the host, absolute, in the guest.
    Script(PathBuf),
    /// Copies.
    Copy(CopySpec),
}

/// When a provision step is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RunPolicy {
    /// Until it has succeeded once.
    Once,
    /// At every `up`.
    Always,
    /// Until it has succeeded as it is now: again when its text, its files or anything else about
    /// it changes.
    Changed,
}

impl Project {
    /// The label of a VM that says which file it is of: the file's absolute path.
    pub const LABEL: &'static str = "vmkit.project";

    /// Returns the machine with this name.
    pub fn machine(&self, name: &str) -> Option<&MachineConfig> {
        self.machines.iter().find(|machine| machine.name == name)
    }

    /// Returns the machines so that each comes after all that it depends on, and else in the order
    /// of the file.
    pub fn in_order(&self) -> Vec<&MachineConfig> {
        let mut ordered: Vec<&MachineConfig> = Vec::with_capacity(self.machines.len());
        let mut placed = BTreeSet::new();
        while ordered.len() < self.machines.len() {
            let before = ordered.len();
            for machine in &self.machines {
                let is_next = machine.depends_on.iter().all(|name| placed.contains(name.as_str()));
                if is_next && placed.insert(machine.name.as_str()) {
                    ordered.push(machine);
                }
            }
            assert!(ordered.len() > before, "a file with a circle never becomes a project");
        }
        ordered
    }

    /// Creates an error that points at a key of a machine, such as `image` or
    /// `provision[0].script`; at the nearest one around it where the file does not have it.
    pub fn error_at(&self, machine: &MachineConfig, key: &str, problem: VmfileProblem) -> VmfileError {
        let label = problem.place.as_ref().map(|place| place.label.clone()).unwrap_or_default();
        let problem = problem.at(machine.place(key), label);
        VmfileError::new(&self.file, Arc::clone(&self.text), vec![problem])
    }

    /// Returns the same error, pointing into the file where it is about something that this machine
    /// says there.
    pub fn blamed(&self, machine: &MachineConfig, error: Error) -> Error {
        match error {
            Error::Invalid { field, value, expected, source, .. } => {
                let (key, mut message) = machine.blame(&field, &value, &expected);
                // A problem of a file is shown with its place, and has no errors below it.
                if let Some(source) = source {
                    message.push_str(&format!(": {}", ErrorChain::of(&*source)));
                }
                self.error_at(machine, &key, VmfileProblem::new(message)).into()
            }
            error => error,
        }
    }
}

impl MachineConfig {
    /// The label of a VM that says which machine of its project it is.
    pub const LABEL: &'static str = "vmkit.machine";
    /// The label of a VM that keeps [`MachineConfig::image`]: where an image lies may change when it
    /// is pulled again, and that makes no VM another one.
    pub const IMAGE_LABEL: &'static str = Labels::IMAGE;

    /// Returns whether vmkit has to get into the guest: to do something there, or to see whether it
    /// is ready. Where it does not, [`ReadyProbes::tcp`] is asked from the host.
    pub fn is_entered(&self) -> bool {
        let asks = self.ready.ssh || self.ready.cloud_init || self.ready.command.is_some();
        asks || !self.files.is_empty() || !self.steps.is_empty()
    }

    /// Returns whether vmkit can get into the guest: where cloud-init is told whom to let in, and a
    /// network leads there.
    pub fn has_way_in(&self) -> bool {
        self.blueprint.draft().cloud_init().is_some()
            && !matches!(self.blueprint.draft().network(), NetworkConfig::None)
    }

    /// Returns the machine that its guest sees.
    pub fn machine(&self) -> MachineType {
        self.blueprint.draft().machine()
    }

    /// Returns the image of the disc in its CD-ROM drive, where it has one.
    pub fn cdrom(&self) -> Option<&Path> {
        self.blueprint.draft().cdrom()
    }

    /// Returns the network of its guest.
    pub fn network(&self) -> &NetworkConfig {
        self.blueprint.draft().network()
    }

    /// Returns the spec to make this machine's VM from.
    ///
    /// # Errors
    /// `InvalidInput` where what was found does not go with the file, and for a machine with an
    /// image that none was found for.
    pub fn spec(&self, found: HostInputs) -> Result<VmSpec> {
        self.blueprint.fill(found)
    }

    /// Returns what this machine's VM, made from `recorded`, would be now: what only the host can
    /// tell stays as it was.
    ///
    /// What [`changes`](crate::spec::changes) finds between the two is what the file changed.
    ///
    /// # Errors
    /// As [`spec`](Self::spec).
    pub fn spec_over(&self, recorded: &VmSpec) -> Result<VmSpec> {
        let firmware = match recorded.boot() {
            Boot::Firmware(firmware) => Some(*firmware),
            Boot::Kernel(_) => None,
        };
        let spec = self.spec(HostInputs {
            image: recorded
                .disk()
                .and_then(|disk| disk.base().map(Path::to_owned))
                .or_else(|| self.image.as_ref().map(PathBuf::from)),
            firmware,
            access: recorded.cloud_init().and_then(|config| config.access.clone()),
        })?;
        Ok(match recorded.id() {
            Some(id) => spec.with_id(id),
            None => spec,
        })
    }

    /// Returns what its VM is created from.
    #[cfg(all(feature = "images", feature = "ssh"))]
    pub(crate) fn blueprint(&self) -> &Blueprint {
        &self.blueprint
    }

    /// Returns the files of the host that its VM is made from and started with, each with the key
    /// that names it.
    #[cfg(all(feature = "images", feature = "ssh"))]
    pub(crate) fn host_files(&self) -> Vec<(String, PathBuf)> {
        use crate::spec::DataDisk;
        let mut files = Vec::new();
        // A name or an address has no file yet; whether it can be had is for the store of images to
        // say.
        let image = self.image.as_ref().filter(|image| image.starts_with('/'));
        files.extend(image.map(|image| ("image".to_owned(), image.into())));
        if let Boot::Kernel(kernel) = self.blueprint.draft().boot() {
            files.push(("kernel".to_owned(), kernel.path.clone()));
            files.extend(kernel.initrd.clone().map(|initrd| ("initrd".to_owned(), initrd)));
        }
        files.extend(self.blueprint.draft().cdrom().map(|path| ("cdrom".to_owned(), path.to_owned())));
        for (index, disk) in self.blueprint.draft().data_disks().iter().enumerate() {
            if let DataDisk::Existing { path, .. } = disk {
                files.push((format!("data_disks[{index}]"), path.clone()));
            }
        }
        files
    }

    /// Returns where a key stands, or the nearest one around it.
    pub(super) fn place(&self, key: &str) -> Range<usize> {
        place_of(&self.places, key)
    }

    /// Returns which key of the file an error on a spec's field is about, and what to say there.
    pub(super) fn blame(&self, field: &str, value: &str, expected: &str) -> (String, String) {
        blame(field, value, expected)
    }
}

/// Returns where a key of a machine stands, or the nearest one around it; the machine's name at the
/// outermost.
pub(super) fn place_of(places: &BTreeMap<String, Range<usize>>, key: &str) -> Range<usize> {
    let mut key = key;
    loop {
        // A document can lie in a file that is named instead.
        if let Some(place) = places.get(key).or_else(|| places.get(&format!("{key}_file"))) {
            return place.clone();
        }
        key = &key[..key.rfind(['.', '[']).unwrap_or(0)];
    }
}

/// Returns which key of the file an error on a spec's field is about, and what to say there.
pub(super) fn blame(field: &str, value: &str, expected: &str) -> (String, String) {
    let key = match field {
        "forward" => "forwards",
        "network.bridge" => "network",
        "data-disk" => "data_disks",
        "user_data" => "cloud_init.user_data",
        "network_config" => "cloud_init.network_config",
        field => field,
    };
    let message = match value {
        "" => format!("`{key}`: {expected}"),
        value => format!("`{key}`: {value:?}: {expected}"),
    };
    (key.to_owned(), message)
}
