//! The resources that the server takes from its host: disks, links, the kernel's VM, the firmware.
//!
//! `vmkit-fake-illumos` stands in for the host's tools; where there is one, its state is used.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tokio::net::UnixStream;
use uuid::Uuid;

use super::illumos::{Illumos, IllumosState};
use super::wire::{
    BlobStorageBackend, Component, FileStorageBackend, InstanceSpec, PciPath, SerialPortNumber,
};

/// The most CPUs one VM may have.
const MOST_CPUS: u8 = 32;
/// The page size; the size of a firmware must be a multiple of it.
const PAGE_BYTES: u64 = 4096;
/// The largest size of a firmware.
const MOST_BOOTROM_BYTES: u64 = 2 << 20;

/// Where the server looks for its resources.
#[derive(Debug, Clone)]
pub(super) struct FakeHost {
    /// The directory that stands for `/dev/vmm`.
    pub(super) vmm: PathBuf,
    /// The state of the stand-ins, if there are any; without it every link exists.
    pub(super) illumos: Option<Illumos>,
    pub(super) bootrom: PathBuf,
    /// The server's working directory.
    pub(super) cwd: PathBuf,
    /// The number of CPUs of the host.
    pub(super) cpus: u8,
    /// Marks the server as running on the stand-ins' host.
    pub(super) _alive: Option<Arc<File>>,
}

/// Why a VM can't be created.
#[derive(Debug)]
pub(super) enum HostRefusal {
    /// The server reports it, in its log only.
    Fails(String),
    /// The server panics, which ends its process.
    Panics(String),
}

impl From<String> for HostRefusal {
    fn from(text: String) -> Self {
        Self::Fails(text)
    }
}

/// What a VM holds of its host.
#[derive(Debug)]
pub(super) struct HeldByVm {
    pub(super) kernel: KernelVm,
    _opened: Vec<File>,
}

impl FakeHost {
    /// Takes what a VM needs, the kernel's VM first.
    ///
    /// As in the real server, a later failure releases everything again, and a panic releases
    /// nothing.
    pub(super) fn take(&self, id: Uuid, spec: &InstanceSpec) -> Result<HeldByVm, HostRefusal> {
        if spec.board.cpus == 0 || spec.board.cpus > MOST_CPUS {
            return Err(format!("failed to set up {} vCPUs: Invalid argument", spec.board.cpus).into());
        }
        if spec.board.cpus > self.cpus {
            return Err("spec requested more CPUs than are online!".to_owned().into());
        }
        let kernel = KernelVm::create(&self.vmm, id)
            .map_err(|error| format!("failed to create kernel VM {id}: {error}"))?;
        match self.take_rest(spec) {
            Ok(opened) => Ok(HeldByVm { kernel, _opened: opened }),
            Err(HostRefusal::Fails(text)) => {
                kernel.destroy().map_err(|error| format!("{text}, and the kernel keeps {id}: {error}"))?;
                Err(HostRefusal::Fails(text))
            }
            Err(panics) => Err(panics),
        }
    }

    /// Creates the kernel VM that is asked for CPUID; an existing VM of that name belongs to
    /// another request and stays.
    pub(super) fn ask_cpuid(&self) -> io::Result<CpuidVm> {
        std::fs::create_dir_all(&self.vmm)?;
        let path = self.vmm.join(format!("cpuid-gen-{}", std::process::id()));
        OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(CpuidVm(path))
    }

    /// Checks the firmware as the server does, whose only report of a bad one is a panic.
    fn map_bootrom(&self) -> Result<(), HostRefusal> {
        let panics = |why: String| {
            HostRefusal::Panics(format!("Cannot open bootrom {}: {why}", self.bootrom.display()))
        };
        let found = File::open(&self.bootrom).and_then(|file| file.metadata());
        let bytes = found.map_err(|error| panics(error.to_string()))?.len();
        match bytes {
            0 => Err(panics("it is empty".to_owned())),
            bytes if bytes > MOST_BOOTROM_BYTES => Err(panics(format!("{bytes} bytes are too many"))),
            bytes if !bytes.is_multiple_of(PAGE_BYTES) => {
                Err(panics(format!("rom length {bytes:x} not aligned to {PAGE_BYTES:x}")))
            }
            _ => Ok(()),
        }
    }

    fn take_rest(&self, spec: &InstanceSpec) -> Result<Vec<File>, HostRefusal> {
        self.map_bootrom()?;
        let com1 = |component: &Component| matches!(component, Component::SerialPort(port) if port.num == SerialPortNumber::Com1);
        if !spec.components.values().any(com1) {
            return Err(HostRefusal::Panics("com1 must be in the spec".to_owned()));
        }
        File::create(self.cwd.join("debug.out"))
            .and_then(|mut file| file.write_all(b"no firmware runs here\n"))
            .map_err(|error| format!("failed to create debug.out: {error}"))?;
        let mut opened = Vec::new();
        for (key, component) in &spec.components {
            if let Some(path) = slot(component)
                && matches!((path.bus, path.device, path.function), (0, 0, 0) | (0, 1, 0 | 3))
            {
                return Err(HostRefusal::Panics(format!("{key} is where the chipset is: {path:?}")));
            }
            match component {
                Component::FileStorageBackend(backend) => opened.push(self.open(backend)?),
                Component::BlobStorageBackend(backend) => check_blob(backend)?,
                Component::CrucibleStorageBackend(_) => {
                    return Err(format!("{key}: this server is a fake and has no Crucible").into());
                }
                Component::VirtioNetworkBackend(backend) => {
                    opened.extend(self.open_link(&backend.vnic_name)?)
                }
                _ => {}
            }
        }
        Ok(opened)
    }

    fn open(&self, backend: &FileStorageBackend) -> Result<File, HostRefusal> {
        let problem = |error: io::Error| format!("failed to open file {}: {error}", backend.path);
        let path = self.here(Path::new(&backend.path));
        let file = OpenOptions::new().read(true).write(!backend.readonly).open(path).map_err(problem)?;
        // Marks it as in use for the stand-in for `zfs`, which holds the lock itself only for the
        // moment of its check.
        flock(&file, FlockOperation::LockShared).map_err(|error| problem(error.into()))?;
        // Any length and any block size is accepted: the number of blocks is computed, and the
        // remainder is unused.
        match backend.block_size {
            0 => Err(HostRefusal::Panics("attempt to divide by zero".to_owned())),
            _ => Ok(file),
        }
    }

    /// Returns the stand-in for a device path of the host.
    fn here(&self, path: &Path) -> PathBuf {
        match (&self.illumos, path.strip_prefix("/dev")) {
            (Some(illumos), Ok(rest)) => illumos.dev().join(rest),
            _ => path.to_owned(),
        }
    }

    /// Opens a link, which marks it as in use for the stand-in for `dladm`.
    fn open_link(&self, name: &str) -> Result<Option<File>, String> {
        let Some(illumos) = &self.illumos else { return Ok(None) };
        let state = IllumosState::load(illumos).map_err(|error| format!("the stand-ins' state: {error}"))?;
        let problem = |error: io::Error| format!("failed to create viona device {name}: {error}");
        if !state.links.contains_key(name) {
            return Err(problem(Errno::NOENT.into()));
        }
        illumos.use_link(name).map(Some).map_err(problem)
    }
}

fn slot(component: &Component) -> Option<PciPath> {
    match component {
        Component::VirtioDisk(disk) => Some(disk.pci_path),
        Component::NvmeDisk(disk) => Some(disk.pci_path),
        Component::VirtioNic(nic) => Some(nic.pci_path),
        Component::PciPciBridge(bridge) => Some(bridge.pci_path),
        Component::VirtioSocket(socket) => Some(socket.pci_path),
        _ => None,
    }
}

fn check_blob(backend: &BlobStorageBackend) -> Result<(), String> {
    let bytes = BASE64_STANDARD
        .decode(&backend.base64)
        .map_err(|error| format!("failed to decode base64 contents of a blob: {error}"))?;
    match bytes.is_empty() || !bytes.len().is_multiple_of(512) {
        true => Err(format!("{} bytes are not whole blocks of 512", bytes.len())),
        false => Ok(()),
    }
}

/// The VM in the kernel that is asked for CPUID.
#[derive(Debug)]
pub(super) struct CpuidVm(PathBuf);

impl CpuidVm {
    pub(super) fn destroy(self) -> io::Result<()> {
        match std::fs::remove_file(self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// A VM in the kernel: an entry in what stands for `/dev/vmm`, which stays when its server dies.
#[derive(Debug)]
pub(super) struct KernelVm {
    path: PathBuf,
    entry: Arc<File>,
    /// Reaches its end as soon as the entry has no name any more.
    alive: UnixStream,
}

impl KernelVm {
    /// Creates a VM, after destroying one of the same name.
    fn create(vmm: &Path, id: Uuid) -> io::Result<Self> {
        std::fs::create_dir_all(vmm)?;
        let path = vmm.join(id.to_string());
        let entry = loop {
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(entry) => break Arc::new(entry),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    match std::fs::remove_file(&path) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                Err(error) => return Err(error),
            }
        };
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // The entry and not the path, which may belong to the next VM of that name.
        let opened = format!("/proc/self/fd/{}", entry.as_raw_fd());
        inotify::add_watch(&changes, opened, WatchFlags::ATTRIB | WatchFlags::DELETE_SELF)?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let watched = Arc::clone(&entry);
        std::thread::spawn(move || until_nameless(&watched, &changes, theirs));
        Ok(Self { path, entry, alive: UnixStream::from_std(ours)? })
    }

    /// Waits until it is destroyed.
    pub(super) async fn gone(&self) {
        // Nothing is ever sent there: it becomes readable at its end.
        let _ = self.alive.readable().await;
    }

    /// Destroys it, unless another process already has.
    pub(super) fn destroy(&self) -> io::Result<()> {
        if is_nameless(&self.entry) {
            return Ok(());
        }
        std::fs::remove_file(&self.path)
    }
}

fn is_nameless(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
}

/// Blocks until a file has no name any more, or until the other end of `held` is closed.
fn until_nameless(file: &File, changes: &OwnedFd, held: std::os::unix::net::UnixStream) {
    while !is_nameless(file) {
        let mut fds = [PollFd::new(changes, PollFlags::IN), PollFd::new(&held, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return,
            Ok(_) if !fds[1].revents().is_empty() => return,
            Ok(_) => {}
        }
        let mut buffer = [std::mem::MaybeUninit::uninit(); 512];
        let mut events = inotify::Reader::new(changes, &mut buffer);
        while events.next().is_ok() {}
    }
}
