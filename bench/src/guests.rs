//! Where the measurements happen: a temporary home, one runtime, and guests of both kinds.

use std::path::Path;
use std::time::{Duration, Instant};

use tokio::runtime::{self, Runtime};
use uuid::Uuid;
use vmkit::abilities::SaveToDisk;
use vmkit::spec::{MachineType, VmSpec};
use vmkit::{ConsoleEndpoint, Hypervisor, QemuHypervisor, VmHandle};
use vmkit_testkit::guest::{self, DebianGuest};

use crate::Result;
use crate::by_hand::{ByHand, Console, Outfit};

/// How long a guest that says that it is ready is left alone, until it is idle.
const SETTLING: Duration = Duration::from_millis(500);

/// What all measurements of the library share.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    pub(crate) runtime: Runtime,
    pub(crate) qemu: QemuHypervisor,
    guest: DebianGuest,
}

/// A VM of vmkit; destroyed when dropped.
pub(crate) struct Ours<'a> {
    bench: &'a Bench,
    pub(crate) vm: VmHandle,
}

impl Bench {
    /// Creates the home and the runtime, and finds the guest.
    pub(crate) fn new() -> Result<Self> {
        // Short, since sockets lie below it.
        let dir = tempfile::Builder::new().prefix("vmkit-bench-").tempdir()?;
        let qemu = QemuHypervisor::builder(dir.path().join("vms"), dir.path().join("run"));
        Ok(Self {
            qemu: qemu.cache_dir(dir.path().join("cache")).build(),
            runtime: runtime::Builder::new_current_thread().enable_all().build()?,
            guest: guest::tiny(),
            dir,
        })
    }

    /// Returns the temporary directory of this run.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Returns the spec of a small guest.
    pub(crate) fn spec(&self, name: &str) -> Result<VmSpec> {
        Ok(self.guest.spec(name, MachineType::Q35, "").id(Uuid::new_v4()).build()?)
    }

    /// Prepares a VM.
    pub(crate) fn prepare(&self, spec: &VmSpec) -> Result<Ours<'_>> {
        Ok(Ours { bench: self, vm: self.runtime.block_on(self.qemu.prepare(spec))? })
    }

    /// Gets everything ready to execute the command line of a spec by hand.
    pub(crate) fn outfit(&self, spec: &VmSpec) -> Result<Outfit> {
        let plan = self.runtime.block_on(self.qemu.plan(spec))?;
        Outfit::of(&plan, &self.dir().join("by-hand.log"))
    }

    /// Boots a guest by vmkit and one by hand, and waits until both are idle.
    pub(crate) fn idle_guests(&self) -> Result<(Ours<'_>, ByHand)> {
        self.idle_guests_of_spec().map(|(ours, bare, _)| (ours, bare))
    }

    /// As [`idle_guests`](Self::idle_guests), with the spec of the one by hand.
    pub(crate) fn idle_guests_of_spec(&self) -> Result<(Ours<'_>, ByHand, VmSpec)> {
        let mut ours = self.prepare(&self.spec("ours")?)?;
        let spec = self.spec("bare")?;
        let bare = self.outfit(&spec)?.spawn()?;
        let console = bare.console()?;
        ours.start()?;
        ours.console()?.says(&self.guest.ready_line)?;
        console.says(&self.guest.ready_line)?;
        std::thread::sleep(SETTLING);
        Ok((ours, bare, spec))
    }
}

impl Ours<'_> {
    /// Starts the VM and returns how long that took.
    pub(crate) fn start(&mut self) -> Result<Duration> {
        self.timed(async |qemu, vm| qemu.start(vm).await)
    }

    /// Stops the VM, by force once the timeout has passed, and returns how long that took.
    pub(crate) fn stop(&mut self, timeout: Duration) -> Result<Duration> {
        self.timed(async |qemu, vm| qemu.stop(vm, timeout).await)
    }

    /// Suspends the VM and returns how long that took.
    pub(crate) fn suspend(&mut self) -> Result<Duration> {
        self.timed(async |qemu, vm| qemu.suspend(vm).await)
    }

    /// Resumes the VM and returns how long that took.
    pub(crate) fn resume(&mut self) -> Result<Duration> {
        self.timed(async |qemu, vm| qemu.resume(vm).await)
    }

    /// Saves the VM's guest to disk and returns how long that took.
    pub(crate) fn save(&mut self) -> Result<Duration> {
        self.timed(async |qemu, vm| qemu.save(vm).await)
    }

    fn timed(
        &mut self,
        operation: impl AsyncFnOnce(&QemuHypervisor, &VmHandle) -> vmkit::Result<VmHandle>,
    ) -> Result<Duration> {
        let begin = Instant::now();
        let vm = self.bench.runtime.block_on(operation(&self.bench.qemu, &self.vm))?;
        let took = begin.elapsed();
        self.vm = vm;
        Ok(took)
    }

    fn console(&self) -> Result<Console> {
        match self.bench.qemu.console_endpoint(&self.vm)? {
            ConsoleEndpoint::UnixSocket(path) => Console::connect(&path),
            other => Err(format!("a console that is no socket: {other:?}").into()),
        }
    }
}

impl Drop for Ours<'_> {
    fn drop(&mut self) {
        // What can't be destroyed has been told by the operation that failed.
        let _ = self.bench.runtime.block_on(self.bench.qemu.destroy(self.vm.clone()));
    }
}
