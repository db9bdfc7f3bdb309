//! What will be done for a VM: [`PropolisPlan`], as data.
//!
//! Pure: from a spec and the facts of the host, without touching either. The golden tests and bug
//! reports print it. A VM's claim keeps its steps, so that a removal undoes what was done, and not
//! what would be done today.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::instance_spec::{
    Blob, Board, BootOrderEntry, Chipset, Component, InitializationMethod, InstanceEnsureRequest,
    InstanceMetadata, InstanceProperties, InstanceSpec, PciPath, Smbios,
};
use super::layout::{PropolisLayout, data_volume, root_volume, vnic_of};
use super::options::{PropolisOptions, ZfsSnapshot, pool_of};
use crate::error::{Error, Result};
use crate::handle::BackendTag;
use crate::network::MacAddr;
use crate::spec::{Accel, Boot, DataDisk, MachineType, Mib, NetworkConfig, VmSpec, Vnc};

/// The maximum number of CPUs that the server gives a VM.
const MOST_CPUS: u32 = 32;
/// The number of slots for disks.
const MOST_DISKS: usize = 12;
/// The maximum size of a request's body.
const MOST_BODY_BYTES: usize = 1 << 20;
/// The start of the argument that sets a volume's size.
pub(super) const VOLSIZE: &str = "volsize=";
/// The size of a disk's blocks in bytes.
const BLOCK_BYTES: u32 = 512;

/// Everything that will be done for one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PropolisPlan {
    /// What `prepare` does, in order; `destroy` undoes it in reverse order. Empty for a VM that
    /// exists.
    pub prepare: Vec<HostStep>,
    /// What `start` changes of what `prepare` did; empty for a new VM.
    #[serde(skip_serializing_if = "StepDiff::is_empty")]
    pub update: StepDiff,
    /// What `start` runs, or where the running server listens.
    pub server: ServerPlan,
    /// The version of the API to use: the lowest that has what the spec needs, so that most servers
    /// have it.
    pub api_version: &'static str,
    /// The request for the VM, sent at each start.
    pub request: InstanceEnsureRequest,
}

/// One thing that is done on the host for a VM, with its undo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
#[non_exhaustive]
pub enum HostStep {
    /// Runs a program of the host.
    Command {
        /// The program and its arguments.
        run: Vec<String>,
        /// The program and the arguments that undo it, if there is anything to undo.
        undo: Option<Vec<String>>,
        /// Whether a reboot undoes it, so that each start does it again if necessary.
        at_every_start: bool,
    },
    /// Copies a raw image to the VM's own file.
    Copy {
        /// The image.
        image: PathBuf,
        /// The copy.
        path: PathBuf,
        /// The size that the guest sees, if it differs from the image's.
        size: Option<Mib>,
    },
    /// Creates a file for an empty disk.
    Blank {
        /// Where.
        path: PathBuf,
        /// Its size.
        size: Mib,
    },
}

/// The difference between the steps that were done for a VM and those that its spec asks for now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StepDiff {
    /// What is undone first, including what an interrupted start may have left.
    pub going: Vec<HostStep>,
    /// What is done then, in order.
    pub coming: Vec<HostStep>,
    /// What is done again if a reboot has undone it.
    pub again: Vec<HostStep>,
    /// What may exist in the meantime in addition to what existed before.
    #[serde(skip)]
    pub(super) pending: Vec<HostStep>,
    /// All steps afterwards.
    #[serde(skip)]
    pub(super) steps: Vec<HostStep>,
}

impl StepDiff {
    /// Returns whether a start does nothing to the host.
    pub(super) fn is_empty(&self) -> bool {
        self.is_none() && self.again.is_empty()
    }

    /// Returns whether everything is as planned.
    pub(super) fn is_none(&self) -> bool {
        self.going.is_empty() && self.coming.is_empty()
    }
}

/// The server of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ServerPlan {
    /// A server of this VM alone.
    Owned {
        /// The program and its arguments.
        run: Vec<String>,
        /// Its working directory.
        work_dir: PathBuf,
    },
    /// A running server, with at most one VM.
    Remote {
        /// Where it listens.
        address: SocketAddr,
    },
}

/// What the plan needs to know of the host.
#[derive(Debug, Clone, Default)]
pub(super) struct PropolisFacts {
    /// The command line that starts a server, without its arguments: `pfexec` if configured, and
    /// the program.
    pub(super) server: Vec<String>,
    /// The firmware's file.
    pub(super) bootrom: PathBuf,
    /// The size of the root disk's image.
    pub(super) image_bytes: u64,
    /// Whether the root disk is on the host of a server elsewhere, which gets its path as it is.
    pub(super) is_image_there: bool,
    /// The volume that carries the cloud-init seed.
    pub(super) seed: Option<Vec<u8>>,
    /// The directory with the devices of volumes.
    pub(super) zvol_dir: PathBuf,
}

/// Refuses what Propolis can't run, before looking at the host.
///
/// # Errors
/// `InvalidInput` with the field, `Unsupported` for what this backend never supports.
pub(super) fn check(spec: &VmSpec, options: &PropolisOptions) -> Result<()> {
    let never = |what: &str| Error::Unsupported { backend: BackendTag::Propolis, what: what.to_owned() };
    if spec.cpus() > MOST_CPUS {
        let bound = format!("Propolis gives a VM 1 to {MOST_CPUS} CPUs");
        return Err(Error::invalid("cpus", spec.cpus(), bound));
    }
    if spec.machine() != MachineType::Q35 {
        let bound = "Propolis has one machine type, a PC (expected q35)";
        return Err(Error::invalid("machine", spec.machine().as_str(), bound));
    }
    if matches!(spec.boot(), Boot::Kernel(_)) {
        return Err(never("booting a kernel directly: its firmware boots from a disk"));
    }
    if spec.accel() != Accel::Auto {
        let bound = "Propolis always uses bhyve (expected auto)";
        return Err(Error::invalid("accel", format!("{:?}", spec.accel()).to_lowercase(), bound));
    }
    if spec.vnc() == Vnc::Loopback {
        return Err(never("a VNC password: the server's own VNC has none"));
    }
    if let Some(user) = spec.run_as() {
        let bound = "a Propolis server runs as the user of vmkit, with the privileges of pfexec";
        return Err(Error::invalid("run_as", user, bound));
    }
    if spec.cdrom().is_some() {
        return Err(never("a CD-ROM drive (`cdrom`): give the file as a data disk with `:ro`"));
    }
    if spec.disk().is_some_and(|disk| disk.base().is_none()) {
        return Err(never("an empty root disk: give an `image`, or the size as a data disk"));
    }
    let disks = usize::from(spec.disk().is_some()) + spec.data_disks().len();
    if disks > MOST_DISKS {
        return Err(Error::invalid(
            "data_disks",
            disks,
            format!("there are slots for {MOST_DISKS} disks in all"),
        ));
    }
    if let Some(address) = options.address {
        check_elsewhere(spec, address)?;
    }
    check_network(spec, options)
}

/// Refuses what would have to be created on the host of a server elsewhere.
fn check_elsewhere(spec: &VmSpec, address: SocketAddr) -> Result<()> {
    if let Some(disk) = spec.disk()
        && ZfsSnapshot::of(&disk.image)?.is_some()
    {
        let bound = "vmkit creates no volumes for a server elsewhere: clone it on that host, and pass its device there, such as \
                     /dev/zvol/rdsk/POOL/NAME";
        return Err(Error::invalid("image", disk.image.display(), bound));
    }
    let fresh = spec.data_disks().iter().find_map(|disk| match disk {
        DataDisk::Fresh { size } => Some(size),
        DataDisk::Existing { .. } => None,
    });
    if let Some(size) = fresh.filter(|_| !address.ip().is_loopback()) {
        let bound =
            "vmkit creates no disks for a server elsewhere: create it on that host, and pass its path there";
        return Err(Error::invalid("data_disks", size, bound));
    }
    Ok(())
}

fn check_network(spec: &VmSpec, options: &PropolisOptions) -> Result<()> {
    let refused = |value: &str| {
        let there = "not supported by Propolis (expected vnic:LINK, a VNIC of the VM's own over a link of the host, \
                     or none)";
        Err(Error::invalid("network", value, there))
    };
    match (spec.network(), &options.vnic) {
        (NetworkConfig::Tap { .. }, _) => refused("tap"),
        (NetworkConfig::User(_), None) => refused("user"),
        (NetworkConfig::Vnic { link }, None) if options.address.is_some() => {
            let bound =
                "vmkit creates no VNICs for a server elsewhere: name an existing one by the option vnic";
            Err(Error::invalid("network", format!("vnic:{link}"), bound))
        }
        (NetworkConfig::None, Some(vnic)) => {
            let bound = "with the network `none` the VM has no network card (expected vnic:LINK)";
            Err(Error::invalid("backend_options.vnic", vnic, bound))
        }
        _ => Ok(()),
    }
}

/// Returns the dataset of a VM's volumes; `None` if its disks are files.
///
/// # Errors
/// `InvalidInput` if it is in another pool than the image: a clone is in the pool of its snapshot.
pub(super) fn dataset(spec: &VmSpec, options: &PropolisOptions) -> Result<Option<String>> {
    if options.address.is_some() {
        return Ok(None);
    }
    let snapshot = spec.disk().map(|disk| ZfsSnapshot::of(&disk.image)).transpose()?.flatten();
    match (&snapshot, &options.dataset) {
        (Some(snapshot), Some(dataset)) if snapshot.pool() != pool_of(dataset) => {
            let bound = format!("a clone is in the pool of its image, `{}`", snapshot.pool());
            Err(Error::invalid("backend_options.dataset", dataset, bound))
        }
        (_, Some(dataset)) => Ok(Some(dataset.clone())),
        (Some(snapshot), None) => Ok(Some(format!("{}/vmkit", snapshot.pool()))),
        (None, None) => Ok(None),
    }
}

/// Returns the lowest version of the API that a VM needs: 2 has SMBIOS.
pub(super) fn api_version(options: &PropolisOptions) -> &'static str {
    if options.serial_number.is_some() { "2.0.0" } else { "1.0.0" }
}

/// Plans a VM.
///
/// # Errors
/// Those of [`check`]; `InvalidInput` for a disk smaller than its image, and on `cloud_init` if the
/// request with the seed would be longer than the server accepts.
pub(super) fn plan(
    spec: &VmSpec,
    id: Uuid,
    options: &PropolisOptions,
    layout: &PropolisLayout,
    facts: &PropolisFacts,
) -> Result<PropolisPlan> {
    check(spec, options)?;
    check_text(spec, options, layout, facts)?;
    let dataset = dataset(spec, options)?;
    let mut made = PlannedBackends { prepare: Vec::new(), disks: Vec::new(), dataset, id, facts };
    made.root(spec, layout)?;
    made.data(spec, layout);
    let vnic = made.vnic(spec, options);
    let PlannedBackends { prepare, disks, .. } = made;
    let server = match options.address {
        Some(address) => ServerPlan::Remote { address },
        None => ServerPlan::Owned { run: server_command(facts), work_dir: layout.server_dir() },
    };
    let smbios = options.serial_number.as_ref().map(|serial| Smbios {
        manufacturer: "vmkit".to_owned(),
        product_name: "bhyve".to_owned(),
        serial_number: serial.clone(),
        version: 1,
    });
    let components = components(&disks, facts.seed.as_deref(), vnic);
    let board = Board {
        cpus: u8::try_from(spec.cpus()).expect("at most 32, as was checked"),
        memory_mb: spec.memory().mib(),
        chipset: Chipset::I440Fx { enable_pcie: false },
    };
    let request = InstanceEnsureRequest {
        properties: InstanceProperties {
            id,
            name: spec.name().to_string(),
            description: "made by vmkit".to_owned(),
            metadata: InstanceMetadata::default(),
        },
        init: InitializationMethod::Spec { spec: InstanceSpec { board, components, smbios } },
    };
    check_body(&request)?;
    let update = StepDiff::default();
    Ok(PropolisPlan { prepare, update, server, api_version: api_version(options), request })
}

/// Refuses paths that a request can't contain, since it is text.
fn check_text(
    spec: &VmSpec,
    options: &PropolisOptions,
    layout: &PropolisLayout,
    facts: &PropolisFacts,
) -> Result<()> {
    let mut paths: Vec<(&'static str, &Path)> = vec![
        ("home", &layout.work),
        ("bootrom", &facts.bootrom),
        ("the directory of volumes", &facts.zvol_dir),
    ];
    paths.extend(options.program.iter().map(|path| ("program", path.as_path())));
    paths.extend(spec.disk().iter().map(|disk| ("image", disk.image.as_path())));
    paths.extend(spec.data_disks().iter().filter_map(|disk| match disk {
        DataDisk::Existing { path, .. } => Some(("data-disk", path.as_path())),
        DataDisk::Fresh { .. } => None,
    }));
    match paths.into_iter().find(|(_, path)| path.to_str().is_none()) {
        Some((field, path)) => Err(Error::invalid(field, path.display(), "Propolis only takes UTF-8 paths")),
        None => Ok(()),
    }
}

fn check_body(request: &InstanceEnsureRequest) -> Result<()> {
    let bytes = serde_json::to_vec(request).expect("a request is plain data of UTF-8 paths").len();
    if bytes <= MOST_BODY_BYTES {
        return Ok(());
    }
    let bound = format!(
        "a request to Propolis has at most {MOST_BODY_BYTES} bytes, so about 780000 for the documents of \
         cloud-init"
    );
    Err(Error::invalid("cloud_init", format!("a request of {bytes} bytes"), bound))
}

fn server_command(facts: &PropolisFacts) -> Vec<String> {
    let mut run = facts.server.clone();
    run.push("run".to_owned());
    run.push(facts.bootrom.to_string_lossy().into_owned());
    // The log contains the port. With IPv6 the server would look for a control plane, which takes
    // longer.
    run.push(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).to_string());
    run
}

/// What the steps so far create.
struct PlannedBackends<'a> {
    prepare: Vec<HostStep>,
    disks: Vec<(String, PathBuf, bool)>,
    dataset: Option<String>,
    id: Uuid,
    facts: &'a PropolisFacts,
}

impl PlannedBackends<'_> {
    fn root(&mut self, spec: &VmSpec, layout: &PropolisLayout) -> Result<()> {
        let Some(disk) = spec.disk() else { return Ok(()) };
        if self.facts.is_image_there {
            if let Some(size) = disk.size {
                let bound = "the disk is on the server's host, and has its size there: omit the size";
                return Err(Error::invalid("disk", size, bound));
            }
            self.disks.push(("root".to_owned(), disk.image.clone(), false));
            return Ok(());
        }
        if let Some(size) = disk.size.filter(|size| size.bytes() < self.facts.image_bytes) {
            let bound = format!(
                "the disk can't be smaller than its image, which has {} bytes",
                self.facts.image_bytes
            );
            return Err(Error::invalid("disk", size, bound));
        }
        let path = match (ZfsSnapshot::of(&disk.image)?, &self.dataset) {
            (Some(snapshot), Some(dataset)) => {
                let volume = root_volume(dataset, self.id);
                self.command(&["zfs", "clone", "-p", snapshot.as_str(), &volume], Some(destroy_of(&volume)));
                if let Some(size) = disk.size.filter(|size| size.bytes() > self.facts.image_bytes) {
                    let volsize = format!("{VOLSIZE}{}", size.bytes());
                    self.command(&["zfs", "set", &volsize, &volume], None);
                }
                self.facts.zvol_dir.join(volume)
            }
            _ => {
                let path = layout.root_disk();
                let image = disk.image.clone();
                self.prepare.push(HostStep::Copy { image, path: path.clone(), size: disk.size });
                path
            }
        };
        self.disks.push(("root".to_owned(), path, false));
        Ok(())
    }

    fn data(&mut self, spec: &VmSpec, layout: &PropolisLayout) {
        for (index, disk) in spec.data_disks().iter().enumerate() {
            let key = format!("data-{index}");
            match (disk, &self.dataset) {
                (DataDisk::Existing { path, readonly }, _) => self.disks.push((key, path.clone(), *readonly)),
                (DataDisk::Fresh { size }, Some(dataset)) => {
                    let volume = data_volume(dataset, self.id, index);
                    let bytes = size.bytes().to_string();
                    self.command(&["zfs", "create", "-p", "-V", &bytes, &volume], Some(destroy_of(&volume)));
                    self.disks.push((key, self.facts.zvol_dir.join(volume), false));
                }
                (DataDisk::Fresh { size }, None) => {
                    let path = layout.data_disk(index);
                    self.prepare.push(HostStep::Blank { path: path.clone(), size: *size });
                    self.disks.push((key, path, false));
                }
            }
        }
    }

    /// Returns the guest's VNIC, a new or an existing one.
    fn vnic(&mut self, spec: &VmSpec, options: &PropolisOptions) -> Option<String> {
        match (spec.network(), &options.vnic) {
            (NetworkConfig::None, _) => None,
            (_, Some(vnic)) => Some(vnic.to_string()),
            (NetworkConfig::Vnic { link }, None) => {
                let (vnic, mac) = (vnic_of(self.id), MacAddr::of_vm(self.id).to_string());
                self.prepare.push(HostStep::Command {
                    run: words(&["dladm", "create-vnic", "-t", "-l", link.as_str(), "-m", &mac, &vnic]),
                    undo: Some(words(&["dladm", "delete-vnic", &vnic])),
                    at_every_start: true,
                });
                Some(vnic)
            }
            (NetworkConfig::User(_) | NetworkConfig::Tap { .. }, None) => None,
        }
    }

    fn command(&mut self, run: &[&str], undo: Option<Vec<String>>) {
        self.prepare.push(HostStep::Command { run: words(run), undo, at_every_start: false });
    }
}

/// Returns the command that destroys a volume with its snapshots; it fails if one of them has a
/// clone.
fn destroy_of(volume: &str) -> Vec<String> {
    words(&["zfs", "destroy", "-r", volume])
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Returns the components, in the slots of Oxide's own machines: a guest remembers where its
/// devices were.
fn components(
    disks: &[(String, PathBuf, bool)],
    seed: Option<&[u8]>,
    vnic: Option<String>,
) -> BTreeMap<String, Component> {
    const NIC: u8 = 8;
    const CLOUD_INIT: u8 = 24;
    let mut all = BTreeMap::new();
    let mut disk = |key: &str, device: u8, backend: Component| {
        let backend_id = format!("{key}-backend");
        all.insert(backend_id.clone(), backend);
        all.insert(key.to_owned(), Component::VirtioDisk { backend_id, pci_path: slot(device) });
    };
    for (index, (key, path, readonly)) in disks.iter().enumerate() {
        let file = Component::FileStorageBackend {
            path: path.clone(),
            readonly: *readonly,
            block_size: BLOCK_BYTES,
        };
        disk(key, disk_slot(index), file);
    }
    if let Some(seed) = seed {
        let blob = Blob { base64: BASE64.encode(seed), readonly: true };
        disk("cloud-init", CLOUD_INIT, Component::BlobStorageBackend(blob));
    }
    if let Some(vnic_name) = vnic {
        let backend_id = "net-backend".to_owned();
        all.insert(backend_id.clone(), Component::VirtioNetworkBackend { vnic_name });
        let nic = Component::VirtioNic { backend_id, interface_id: Uuid::nil(), pci_path: slot(NIC) };
        all.insert("net".to_owned(), nic);
    }
    if let Some((first, ..)) = disks.first() {
        let order = vec![BootOrderEntry { id: first.clone() }];
        all.insert("boot".to_owned(), Component::BootSettings { order });
    }
    // Without a serial port the server panics, and its VM stays in the kernel.
    all.insert("com1".to_owned(), Component::SerialPort { num: "com1".to_owned() });
    all.insert("pvpanic".to_owned(), Component::QemuPvpanic { enable_isa: true });
    all
}

fn slot(device: u8) -> PciPath {
    PciPath { bus: 0, device, function: 0 }
}

fn disk_slot(index: usize) -> u8 {
    let index = u8::try_from(index).expect("at most 12 disks, as was checked");
    if index < 8 { 16 + index } else { 18 + index }
}

impl fmt::Display for PropolisPlan {
    /// Prints the plan for people; the seed only by its length, as it may contain a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.update.going {
            match step {
                HostStep::Command { undo, .. } => {
                    undo.iter().try_for_each(|undo| writeln!(f, "run {}", undo.join(" ")))?;
                }
                HostStep::Copy { path, .. } | HostStep::Blank { path, .. } => {
                    writeln!(f, "remove {}", path.display())?;
                }
            }
        }
        self.prepare.iter().try_for_each(|step| writeln!(f, "{step}"))?;
        for step in &self.update.coming {
            match step {
                HostStep::Copy { path, size: Some(size), .. } => {
                    writeln!(f, "grow disk {} to {size}", path.display())?;
                }
                step => writeln!(f, "{step}")?,
            }
        }
        self.update.again.iter().try_for_each(|step| writeln!(f, "{step}, unless it exists"))?;
        match &self.server {
            ServerPlan::Owned { run, work_dir } => {
                writeln!(f, "in {} run {}", work_dir.display(), run.join(" "))?;
            }
            ServerPlan::Remote { address } => writeln!(f, "use the server at {address}")?,
        }
        let mut shown = self.request.clone();
        let InitializationMethod::Spec { spec } = &mut shown.init;
        for component in spec.components.values_mut() {
            if let Component::BlobStorageBackend(blob) = component {
                blob.base64 = format!("({} bytes)", blob.base64.len());
            }
        }
        let body = serde_json::to_string_pretty(&shown).map_err(|_| fmt::Error)?;
        writeln!(f, "PUT /instance, api-version {}:\n{body}", self.api_version)
    }
}

impl fmt::Display for HostStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostStep::Command { run, .. } => write!(f, "run {}", run.join(" ")),
            HostStep::Copy { image, path, size } => {
                write!(f, "copy {} to {}", image.display(), path.display())?;
                size.map_or(Ok(()), |size| write!(f, ", {size}"))
            }
            HostStep::Blank { path, size } => write!(f, "create disk {}, {size}", path.display()),
        }
    }
}
