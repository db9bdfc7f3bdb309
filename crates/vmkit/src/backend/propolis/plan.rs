//! What will be done for a VM: [`PropolisPlan`], as data.
//!
//! Pure: from a spec and the facts of the host, without touching either. The golden tests and bug
//! reports print it, and a VM's claim keeps its steps, so that whoever removes the VM undoes what
//! was done and not what would be done today.

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

/// The most CPUs that the server gives a VM.
const MOST_CPUS: u32 = 32;
/// The most disks that have a slot.
const MOST_DISKS: usize = 12;
/// The most bytes of a request's body.
const MOST_BODY_BYTES: usize = 1 << 20;
/// Begins the word that sets a volume's size.
pub(super) const VOLSIZE: &str = "volsize=";
/// The size of a disk's blocks in bytes.
const BLOCK_BYTES: u32 = 512;

/// All that will be done for one VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PropolisPlan {
    /// What `prepare` makes, in order; `destroy` undoes it from the last to the first. Nothing for a
    /// VM that exists.
    pub prepare: Vec<HostStep>,
    /// What `start` changes of what `prepare` made; nothing for a new VM.
    #[serde(skip_serializing_if = "StepDiff::is_empty")]
    pub update: StepDiff,
    /// What `start` runs, or where the server is that runs already.
    pub server: ServerPlan,
    /// The version of the API that is spoken: the lowest that has what the spec needs, for the
    /// widest range of servers.
    pub api_version: &'static str,
    /// What the server is asked for at each start.
    pub request: InstanceEnsureRequest,
}

/// One thing that is made on the host for a VM, with its undo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
#[non_exhaustive]
pub enum HostStep {
    /// Runs a program of the host.
    Command {
        /// The program and its arguments.
        run: Vec<String>,
        /// The program and the arguments that take it away again, where there is anything to take
        /// away.
        undo: Option<Vec<String>>,
        /// Whether it is gone after a reboot, so that each start does it again where it is missing.
        at_every_start: bool,
    },
    /// Copies a raw image to a file of the VM's own.
    Copy {
        /// The image.
        image: PathBuf,
        /// The copy.
        path: PathBuf,
        /// The size the guest sees, where it is not the image's.
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

/// What a start changes of what was done for a VM: from the steps that were done to those that its
/// spec asks for now.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StepDiff {
    /// What is undone first, with what an interrupted start may have left.
    pub going: Vec<HostStep>,
    /// What is done then, in order.
    pub coming: Vec<HostStep>,
    /// What is done again if a reboot has undone it.
    pub again: Vec<HostStep>,
    /// What may be there meanwhile beside what was there before.
    #[serde(skip)]
    pub(super) pending: Vec<HostStep>,
    /// What was done in all, afterwards.
    #[serde(skip)]
    pub(super) steps: Vec<HostStep>,
}

impl StepDiff {
    /// Returns whether a start does nothing to the host.
    pub(super) fn is_empty(&self) -> bool {
        self.is_none() && self.again.is_empty()
    }

    /// Returns whether everything is as it is planned.
    pub(super) fn is_none(&self) -> bool {
        self.going.is_empty() && self.coming.is_empty()
    }
}

/// The server of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ServerPlan {
    /// One that is started for this VM alone.
    Owned {
        /// The program and its arguments.
        run: Vec<String>,
        /// Its working directory.
        work_dir: PathBuf,
    },
    /// One that runs already, with at most one VM.
    Remote {
        /// Where it listens.
        address: SocketAddr,
    },
}

/// What was found out on the host before planning.
#[derive(Debug, Clone, Default)]
pub(super) struct PropolisFacts {
    /// What a server is started by: its program, behind the one that gives it its privileges.
    pub(super) server: Vec<String>,
    /// The firmware's file.
    pub(super) bootrom: PathBuf,
    /// The size of the root disk's image.
    pub(super) image_bytes: u64,
    /// Whether the root disk lies on the host of a server elsewhere, which gets it as it is.
    pub(super) is_image_there: bool,
    /// The volume that carries the cloud-init seed.
    pub(super) seed: Option<Vec<u8>>,
    /// Below what the devices of volumes are.
    pub(super) zvol_dir: PathBuf,
}

/// Refuses what no Propolis can run, before anything of the host is looked at.
///
/// # Errors
/// `InvalidInput` with the field, `Unsupported` for what this backend will never do.
pub(super) fn check(spec: &VmSpec, options: &PropolisOptions) -> Result<()> {
    let never = |what: &str| Error::Unsupported { backend: BackendTag::Propolis, what: what.to_owned() };
    if spec.cpus() > MOST_CPUS {
        let bound = format!("Propolis gives a VM 1 to {MOST_CPUS} CPUs");
        return Err(Error::invalid("cpus", spec.cpus(), bound));
    }
    if spec.machine() != MachineType::Q35 {
        let bound = "Propolis has one machine, a PC: leave it at q35";
        return Err(Error::invalid("machine", spec.machine().as_str(), bound));
    }
    if matches!(spec.boot(), Boot::Kernel(_)) {
        return Err(never("booting a kernel directly: its firmware boots from a disk"));
    }
    if spec.accel() != Accel::Auto {
        let bound = "Propolis runs on bhyve alone: leave it at auto";
        return Err(Error::invalid("accel", format!("{:?}", spec.accel()).to_lowercase(), bound));
    }
    if spec.vnc() == Vnc::Loopback {
        return Err(never("a screen behind a password: its own asks for none"));
    }
    if let Some(user) = spec.run_as() {
        let bound = "a Propolis server runs as whoever runs vmkit, with the privileges of pfexec";
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

/// Refuses what would have to be made on the host of a server elsewhere.
fn check_elsewhere(spec: &VmSpec, address: SocketAddr) -> Result<()> {
    if let Some(disk) = spec.disk()
        && ZfsSnapshot::of(&disk.image)?.is_some()
    {
        let bound = "no volume is made for a server elsewhere: clone it where the server runs, and name its device there, such as \
                     /dev/zvol/rdsk/POOL/NAME";
        return Err(Error::invalid("image", disk.image.display(), bound));
    }
    let fresh = spec.data_disks().iter().find_map(|disk| match disk {
        DataDisk::Fresh { size } => Some(size),
        DataDisk::Existing { .. } => None,
    });
    if let Some(size) = fresh.filter(|_| !address.ip().is_loopback()) {
        let bound =
            "no disk can be made where a server elsewhere runs: make it there, and name it by its path";
        return Err(Error::invalid("data_disks", size, bound));
    }
    Ok(())
}

fn check_network(spec: &VmSpec, options: &PropolisOptions) -> Result<()> {
    let refused = |value: &str| {
        let there = "Propolis has no such network; there are vnic:LINK, a VNIC of the VM's own over a link of the host, \
                     and none";
        Err(Error::invalid("network", value, there))
    };
    match (spec.network(), &options.vnic) {
        (NetworkConfig::Tap { .. }, _) => refused("tap"),
        (NetworkConfig::User(_), None) => refused("user"),
        (NetworkConfig::Vnic { link }, None) if options.address.is_some() => {
            let bound = "no VNIC is made for a server elsewhere: name one that is there by the option vnic";
            Err(Error::invalid("network", format!("vnic:{link}"), bound))
        }
        (NetworkConfig::None, Some(vnic)) => {
            let bound = "the VM has no network card for it with the network none: give it vnic:LINK";
            Err(Error::invalid("backend_options.vnic", vnic, bound))
        }
        _ => Ok(()),
    }
}

/// Returns the dataset below which the volumes of a VM are made; `None` where its disks are files.
///
/// # Errors
/// `InvalidInput` for one in another pool than the image: a clone lies in the pool of its snapshot.
pub(super) fn dataset(spec: &VmSpec, options: &PropolisOptions) -> Result<Option<String>> {
    if options.address.is_some() {
        return Ok(None);
    }
    let snapshot = spec.disk().map(|disk| ZfsSnapshot::of(&disk.image)).transpose()?.flatten();
    match (&snapshot, &options.dataset) {
        (Some(snapshot), Some(dataset)) if snapshot.pool() != pool_of(dataset) => {
            let bound = format!("a clone lies in the pool of its image, `{}`", snapshot.pool());
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
/// Those of [`check`]; `InvalidInput` for a disk smaller than its image, and on `cloud_init` where
/// the request that carries the seed would be longer than the server takes.
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
        cpus: u8::try_from(spec.cpus()).expect("32 at the most, as was checked"),
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

/// Refuses paths that a request, which is text, can't name.
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
        Some((field, path)) => Err(Error::invalid(
            field,
            path.display(),
            "Propolis is told paths as text: name one that is UTF-8",
        )),
        None => Ok(()),
    }
}

fn check_body(request: &InstanceEnsureRequest) -> Result<()> {
    let bytes = serde_json::to_vec(request).expect("a request is plain data of UTF-8 paths").len();
    if bytes <= MOST_BODY_BYTES {
        return Ok(());
    }
    let bound = format!(
        "Propolis takes requests of at most {MOST_BODY_BYTES} bytes, which leaves some 780000 for the documents of \
         cloud-init"
    );
    Err(Error::invalid("cloud_init", format!("a request of {bytes} bytes"), bound))
}

fn server_command(facts: &PropolisFacts) -> Vec<String> {
    let mut run = facts.server.clone();
    run.push("run".to_owned());
    run.push(facts.bootrom.to_string_lossy().into_owned());
    // The port is told in the log. IPv6 would have it look for a control plane, and take longer.
    run.push(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).to_string());
    run
}

/// What the steps make, so far.
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
                let bound = "the disk lies where the server runs, and has its size there: leave it out";
                return Err(Error::invalid("disk", size, bound));
            }
            self.disks.push(("root".to_owned(), disk.image.clone(), false));
            return Ok(());
        }
        if let Some(size) = disk.size.filter(|size| size.bytes() < self.facts.image_bytes) {
            let bound = format!("the image has {} bytes; a disk is never smaller", self.facts.image_bytes);
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

    /// Returns the VNIC that the guest gets, made or found.
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

/// Returns what destroys a volume with its own snapshots; one that somebody has cloned stays, with
/// an error.
fn destroy_of(volume: &str) -> Vec<String> {
    words(&["zfs", "destroy", "-r", volume])
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The slots are those of Oxide's own machines: a guest remembers where its devices were.
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
    // Without it the server panics, and its VM stays in the kernel.
    all.insert("com1".to_owned(), Component::SerialPort { num: "com1".to_owned() });
    all.insert("pvpanic".to_owned(), Component::QemuPvpanic { enable_isa: true });
    all
}

fn slot(device: u8) -> PciPath {
    PciPath { bus: 0, device, function: 0 }
}

fn disk_slot(index: usize) -> u8 {
    let index = u8::try_from(index).expect("12 disks at the most, as was checked");
    if index < 8 { 16 + index } else { 18 + index }
}

impl fmt::Display for PropolisPlan {
    /// Prints the plan as a person reads it, the seed only by its length: it may hold a private
    /// key.
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
        self.update.again.iter().try_for_each(|step| writeln!(f, "{step}, unless it is there"))?;
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
            HostStep::Blank { path, size } => write!(f, "make disk {}, {size}", path.display()),
        }
    }
}
