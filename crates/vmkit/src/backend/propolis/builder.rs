//! Setting up a hypervisor, and what it is set up with.

use std::ffi::OsStr;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::host::{self, HostPrograms};
use super::options::OptionDefaults;
use crate::error::Result;
use crate::handle::VmHandle;

/// How long a server may take from its start until its guest runs, unless set otherwise.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Where programs are looked for unless set otherwise.
const SYSTEM_PATH: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/opt/oxide/propolis-server/bin"];

/// Asks a guest to power itself off, which Propolis has no button for.
///
/// Set by [`PropolisHypervisorBuilder::with_power_off`]; without one, `stop` is hard at once.
pub trait PowerOff: Send + Sync {
    /// Asks once, for example by a program in the guest, and returns when the guest has the
    /// request; `timeout` is the rest of the stop's.
    ///
    /// It need not wait for the guest's end; the backend does. On an error it is called again while
    /// time is left, since a guest that is still booting can be asked only later.
    ///
    /// # Errors
    /// `Unsupported` where this guest can never be asked: then `stop` is hard at once. Anything
    /// else, where it could not be asked this time.
    fn power_off<'a>(
        &'a self,
        vm: &'a VmHandle,
        address: IpAddr,
        timeout: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;
}

/// What a hypervisor was set up with.
pub(super) struct PropolisSettings {
    pub(super) work_root: PathBuf,
    pub(super) host: HostPrograms,
    pub(super) defaults: OptionDefaults,
    pub(super) dev_vmm: PathBuf,
    pub(super) zvol_dir: PathBuf,
    pub(super) keeper: Option<PathBuf>,
    pub(super) start_limit: Duration,
    pub(super) power_off: Option<Arc<dyn PowerOff>>,
    pub(super) lease_files: Option<Vec<PathBuf>>,
}

impl fmt::Debug for PropolisSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("work_root", &self.work_root)
            .field("host", &self.host)
            .field("defaults", &self.defaults)
            .field("start_limit", &self.start_limit)
            .field("graceful_stop", &self.power_off.is_some())
            .finish_non_exhaustive()
    }
}

/// Sets up a [`PropolisHypervisor`](super::PropolisHypervisor).
#[derive(Debug)]
#[must_use]
pub struct PropolisHypervisorBuilder(pub(super) PropolisSettings);

impl PropolisHypervisorBuilder {
    pub(super) fn new(work_root: PathBuf) -> Self {
        Self(PropolisSettings {
            work_root,
            host: HostPrograms {
                search_path: SYSTEM_PATH.map(PathBuf::from).to_vec(),
                pfexec: false,
                limit: host::LIMIT,
            },
            defaults: OptionDefaults::default(),
            dev_vmm: "/dev/vmm".into(),
            zvol_dir: "/dev/zvol/rdsk".into(),
            keeper: None,
            start_limit: START_LIMIT,
            power_off: None,
            lease_files: None,
        })
    }

    /// Sets the directories that programs are looked for in, as `PATH` has them. Without it: the
    /// usual system ones.
    pub fn search_path(mut self, path: &OsStr) -> Self {
        self.0.host.search_path = std::env::split_paths(path).collect();
        self
    }

    /// Sets whether programs of the host are run by `pfexec`, which gives them the privileges of
    /// the user's profiles.
    pub fn pfexec(mut self, wanted: bool) -> Self {
        self.0.host.pfexec = wanted;
        self
    }

    /// Sets how long a program of the host may take, such as `zfs`; 120 s without it. One that
    /// takes longer is killed.
    pub fn program_limit(mut self, limit: Duration) -> Self {
        self.0.host.limit = limit;
        self
    }

    /// Names the server's program; without it `propolis-server` is looked for. A VM's option
    /// `program` goes before.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.defaults.program = Some(path.into());
        self
    }

    /// Names the firmware's file; without it `/var/ovmf/OVMF_CODE.fd`. A VM's option `bootrom` goes
    /// before.
    pub fn bootrom(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.defaults.bootrom = Some(path.into());
        self
    }

    /// Names the dataset below which volumes are made; without it `POOL/vmkit`, in the pool of the
    /// VM's image. A VM's option `dataset` goes before.
    pub fn dataset(mut self, name: impl Into<String>) -> Self {
        self.0.defaults.dataset = Some(name.into());
        self
    }

    /// Sets the address of a running server that VMs run at, one at a time. A VM's option `address`
    /// overrides it.
    pub fn address(mut self, address: SocketAddr) -> Self {
        self.0.defaults.address = Some(address);
        self
    }

    /// Names the directory in which the kernel's VMs are seen; `/dev/vmm` without it.
    pub fn dev_vmm(mut self, dir: impl Into<PathBuf>) -> Self {
        self.0.dev_vmm = dir.into();
        self
    }

    /// Names the directory of the devices of ZFS volumes; `/dev/zvol/rdsk` without it.
    pub fn zvol_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.0.zvol_dir = dir.into();
        self
    }

    /// Names the program that becomes each server's keeper; see
    /// [`QemuHypervisorBuilder::keeper`](crate::qemu::QemuHypervisorBuilder::keeper).
    pub fn keeper(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.keeper = Some(path.into());
        self
    }

    /// Sets how long a server may take from its start until its guest runs; 30 s without it.
    pub fn start_limit(mut self, limit: Duration) -> Self {
        self.0.start_limit = limit;
        self
    }

    /// Sets the lease files of dnsmasq that are asked for a guest's address where the neighbour
    /// table does not know it, instead of the usual ones.
    pub fn lease_files(mut self, files: Vec<PathBuf>) -> Self {
        self.0.lease_files = Some(files);
        self
    }

    /// Names who asks guests to power themselves off, so that `stop` can be graceful.
    pub fn with_power_off(mut self, power_off: impl PowerOff + 'static) -> Self {
        self.0.power_off = Some(Arc::new(power_off));
        self
    }
}
