//! The result of reading a file of machines: [`Project`] and its parts.
//!
//! Pure: every path is absolute, every default is filled in, and facts of the host are left open
//! until a VM is created.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorChain, Result};
use crate::error::{VmfileError, VmfileProblem};
use crate::spec::{Blueprint, Boot, HostInputs, Labels, MachineType, NetworkConfig, VmName, VmSpec};

/// The machines that one file describes.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Project {
    /// The name, which is the prefix of each VM's name.
    pub name: String,
    /// The absolute path of the file.
    pub file: PathBuf,
    /// The machines, in the order of the file.
    pub machines: Vec<MachineConfig>,
    pub(super) text: Arc<str>,
}

/// One machine: its configuration, and its provisioning.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MachineConfig {
    /// The name in the file.
    pub name: String,
    /// The name of its VM: `PROJECT-MACHINE`.
    pub vm: VmName,
    /// The image as in the file, with a path made absolute; `None` for a machine that has only a
    /// kernel.
    pub image: Option<String>,
    /// The machines that have to be ready and provisioned before this one is started.
    pub depends_on: Vec<String>,
    /// When it is ready.
    pub ready: ReadyProbes,
    /// The files copied to the guest before the steps, in order.
    pub files: Vec<CopySpec>,
    /// The provision steps, in order; their names are unique.
    pub steps: Vec<ProvisionStep>,
    /// What its VM is created from.
    pub(super) blueprint: Blueprint,
    /// The position of each key in the text, by its path in the machine; the empty path is the
    /// machine's own name.
    pub(super) places: BTreeMap<String, Range<usize>>,
}

/// The machine and the project of a VM, from its labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MachineOrigin<'a> {
    /// The name of the project when the VM was created: the VM's own name starts with it.
    pub project: &'a str,
    /// The machine's name in the file.
    pub machine: &'a str,
    /// The path of the file at that time.
    pub file: &'a Path,
}

impl<'a> MachineOrigin<'a> {
    /// Returns the machine and the project of a VM; `None` for a VM without a project.
    pub fn of(vm: &'a VmSpec) -> Option<Self> {
        let (file, machine) = (vm.labels().get(Project::LABEL)?, vm.labels().get(MachineConfig::LABEL)?);
        let project = vm.name().as_str().strip_suffix(machine)?.strip_suffix('-')?;
        Some(Self { project, machine, file: Path::new(file) })
    }
}

/// When a machine is ready: once all of these conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadyProbes {
    /// Whether a login over SSH has to work.
    pub ssh: bool,
    /// Whether cloud-init has to have finished without an error.
    pub cloud_init: bool,
    /// The TCP ports of the guest that have to accept connections.
    pub tcp: Vec<u16>,
    /// The command that has to succeed in the guest: a script for `/bin/sh -c`, run as root.
    pub command: Option<String>,
    /// The timeout for all conditions.
    pub timeout: Duration,
}

/// A file or a folder of the host that is copied to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CopySpec {
    /// The absolute path on the host.
    pub from: PathBuf,
    /// The absolute path in the guest.
    pub to: String,
    /// The permission bits of its files; by default those on the host.
    pub mode: Option<u32>,
    /// The owner, `USER` or `USER:GROUP`; by default root.
    pub owner: Option<String>,
}

/// A provision step.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProvisionStep {
    /// The name.
    pub name: String,
    /// The action.
    pub action: StepAction,
    /// When it is run.
    pub run: RunPolicy,
    /// The guest's user that runs it.
    pub user: String,
    /// The environment variables.
    pub env: BTreeMap<String, String>,
    /// The working directory in the guest; by default the user's home.
    pub dir: Option<String>,
    /// The timeout.
    pub timeout: Duration,
}

impl fmt::Debug for ProvisionStep {
    /// Shows only the names of the variables: their values may be passwords.
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

/// The action of a provision step.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StepAction {
    /// Runs this script with `/bin/sh -e`.
    Shell(String),
    /// Runs a file of the host, absolute, in the guest.
    Script(PathBuf),
    /// Copies a file or a folder.
    Copy(CopySpec),
}

/// When a provision step is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RunPolicy {
    /// Until it has succeeded once.
    Once,
    /// At every `up`.
    Always,
    /// Until it has succeeded with its present content: again when its script, its files or
    /// anything else about it changes.
    Changed,
}

impl Project {
    /// The label of a VM with the absolute path of its file of machines.
    pub const LABEL: &'static str = "vmkit.project";

    /// Returns the machine with this name.
    pub fn machine(&self, name: &str) -> Option<&MachineConfig> {
        self.machines.iter().find(|machine| machine.name == name)
    }

    /// Returns the machines sorted so that each comes after its dependencies, and else in the order
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

    /// Returns an error that points to a key of a machine, such as `image` or
    /// `provision[0].script`, or to the nearest parent that the file has.
    pub fn error_at(&self, machine: &MachineConfig, key: &str, problem: VmfileProblem) -> VmfileError {
        let label = problem.place.as_ref().map(|place| place.label.clone()).unwrap_or_default();
        let problem = problem.at(machine.place(key), label);
        VmfileError::new(&self.file, Arc::clone(&self.text), vec![problem])
    }

    /// Returns the same error; if it is about a value of this machine in the file, it points there.
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
    /// The label of a VM with the name of its machine.
    pub const LABEL: &'static str = "vmkit.machine";
    /// The label of a VM with [`MachineConfig::image`]: the path of an image may change when it is
    /// pulled again, which is no change of the VM.
    pub const IMAGE_LABEL: &'static str = Labels::IMAGE;

    /// Returns whether vmkit has to log in to the guest, to provision it or to check whether it is
    /// ready. Otherwise [`ReadyProbes::tcp`] is checked from the host.
    pub fn is_entered(&self) -> bool {
        let asks = self.ready.ssh || self.ready.cloud_init || self.ready.command.is_some();
        asks || !self.files.is_empty() || !self.steps.is_empty()
    }

    /// Returns whether vmkit can log in to the guest: cloud-init creates its user, and the guest
    /// has a network.
    pub fn has_way_in(&self) -> bool {
        self.blueprint.draft().cloud_init().is_some()
            && !matches!(self.blueprint.draft().network(), NetworkConfig::None)
    }

    /// Returns its machine type.
    pub fn machine(&self) -> MachineType {
        self.blueprint.draft().machine()
    }

    /// Returns the disc image in its CD-ROM drive, if it has one.
    pub fn cdrom(&self) -> Option<&Path> {
        self.blueprint.draft().cdrom()
    }

    /// Returns the network of its guest.
    pub fn network(&self) -> &NetworkConfig {
        self.blueprint.draft().network()
    }

    /// Returns the spec of this machine's VM.
    ///
    /// # Errors
    /// `InvalidInput` if the host's facts conflict with the file, and for a machine whose image was
    /// not found.
    pub fn spec(&self, found: HostInputs) -> Result<VmSpec> {
        self.blueprint.fill(found)
    }

    /// Returns the present spec for this machine's VM, created from `recorded`: facts of the host
    /// are unchanged.
    ///
    /// The [`changes`](crate::spec::changes) between the two are those of the file.
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

    /// Returns the files of the host that its VM is created from and started with, each with its
    /// key.
    #[cfg(all(feature = "images", feature = "ssh"))]
    pub(crate) fn host_files(&self) -> Vec<(String, PathBuf)> {
        use crate::spec::DataDisk;
        let mut files = Vec::new();
        // A name or an address has no file yet; the image store checks whether it can be fetched.
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

    /// Returns the position of a key, or of its nearest parent.
    pub(super) fn place(&self, key: &str) -> Range<usize> {
        place_of(&self.places, key)
    }

    /// Returns the key of the file that an error on a spec's field is about, and the message.
    pub(super) fn blame(&self, field: &str, value: &str, expected: &str) -> (String, String) {
        blame(field, value, expected)
    }
}

/// Returns the position of a machine's key, or of its nearest parent; at last the machine's name.
pub(super) fn place_of(places: &BTreeMap<String, Range<usize>>, key: &str) -> Range<usize> {
    let mut key = key;
    loop {
        // The document may be in a file that the machine refers to.
        if let Some(place) = places.get(key).or_else(|| places.get(&format!("{key}_file"))) {
            return place.clone();
        }
        key = &key[..key.rfind(['.', '[']).unwrap_or(0)];
    }
}

/// Returns the key of the file that an error on a spec's field is about, and the message.
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
