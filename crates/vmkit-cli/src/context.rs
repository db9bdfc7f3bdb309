//! The environment of a command: the home, the manager over all backends of this host, and the
//! runtime, each created on first use.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use vmkit::QemuHypervisor;
use vmkit::image::ImageStore;
#[cfg(target_os = "linux")]
use vmkit::qemu::QemuHypervisorBuilder;
use vmkit::spec::VmName;
use vmkit::store::Home;
use vmkit::{BackendTag, Error, PropolisHypervisor, RouterHypervisor, VmManager};

use crate::failure::Failure;
use crate::{images, places, propolis, threads};

/// The backend of a new VM without `--backend`.
pub(crate) const DEFAULT_BACKEND: BackendTag =
    if cfg!(target_os = "illumos") { BackendTag::Propolis } else { BackendTag::Qemu };

/// How many threads look up many VMs. They read files in memory, so more threads cost more than
/// they save.
const THREADS: usize = 2;

/// Longer than any command runs.
const FOR_EVER: Duration = Duration::from_secs(1 << 30);

/// The manager of this program.
pub(crate) type CliManager = VmManager<RouterHypervisor>;

/// The environment of a command.
#[derive(Debug)]
pub(crate) struct CommandContext {
    named_home: Option<PathBuf>,
}

impl CommandContext {
    /// Creates a context; nothing is read or written before it is used.
    pub(crate) fn new(named_home: Option<PathBuf>) -> Self {
        Self { named_home }
    }

    /// Returns the directory of the VMs.
    pub(crate) fn home(&self) -> Result<Home, Error> {
        places::home(self.named_home.clone())
    }

    /// Returns why the runtime directory of the environment is not used, if so.
    pub(crate) fn refused_runtime(&self) -> Option<String> {
        places::refused_runtime(self.named_home.clone())
    }

    /// Returns the manager of the VMs, of all backends that this host can have.
    pub(crate) fn manager(&self) -> Result<CliManager, Error> {
        let home = self.home()?;
        let propolis = self.propolis()?;
        #[cfg(target_os = "linux")]
        let router =
            RouterHypervisor::of_this_host(qemu(&home).cache_dir(home.cache()).build()).with(propolis);
        #[cfg(not(target_os = "linux"))]
        let router = RouterHypervisor::new(DEFAULT_BACKEND).with(propolis);
        Ok(VmManager::new(router, home))
    }

    /// Returns the store of images.
    pub(crate) fn images(&self) -> Result<ImageStore, Error> {
        images::store(&self.home()?)
    }

    /// Returns QEMU for planning; it has no cache, so that planning writes nothing.
    #[cfg(target_os = "linux")]
    pub(crate) fn qemu_planner(&self) -> Result<QemuHypervisor, Error> {
        Ok(qemu(&self.home()?).build())
    }

    /// Returns Propolis, configured from the environment.
    pub(crate) fn propolis(&self) -> Result<PropolisHypervisor, Error> {
        propolis::hypervisor(&self.home()?)
    }

    /// Returns the directories in which programs are searched.
    pub(crate) fn search_path(&self) -> Vec<PathBuf> {
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default()
    }

    /// Runs a future to its end on this thread.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        event_loop(Builder::new_current_thread())?.block_on(future)
    }

    /// Runs a future to its end on this thread, or drops it at Ctrl-C and returns `None`, without
    /// waiting for the threads that read files for it.
    pub(crate) fn block_on_until_interrupted<T>(
        &self,
        future: impl Future<Output = Result<T, Failure>>,
    ) -> Result<Option<T>, Failure> {
        let runtime = event_loop(Builder::new_current_thread())?;
        let done = runtime.block_on(async {
            // Registered before any work starts.
            let mut interrupts =
                signal(SignalKind::interrupt()).map_err(Error::io("wait for", "an interrupt"))?;
            tokio::select! {
                done = future => done.map(Some),
                _ = interrupts.recv() => Ok(None),
            }
        });
        runtime.shutdown_background();
        done
    }

    /// Runs a future to its end, with worker threads for what it spawns: worth their start for a
    /// lookup of many VMs.
    pub(crate) fn block_on_threads<T>(
        &self,
        future: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(THREADS);
        event_loop(builder)?.block_on(future)
    }
}

/// Returns whether the hypervisor of a VM has written a log here: that of a server elsewhere is
/// there.
pub(crate) fn has_hypervisor_log(manager: &CliManager, vm: &VmName) -> bool {
    let has_text = |path: &Path| path.metadata().is_ok_and(|log| log.len() > 0);
    manager.hypervisor_log(vm).is_ok_and(|log| has_text(&log) || has_text(&log.with_added_extension("1")))
}

/// Creates an event loop with a thread for blocking calls, which stays: Tokio panics if it needs
/// its first one later and can't create it.
fn event_loop(mut builder: Builder) -> Result<Runtime, Error> {
    threads::check()?;
    let runtime = builder.enable_all().thread_keep_alive(FOR_EVER).build();
    let runtime = runtime.map_err(Error::io("make", "the event loop"))?;
    drop(runtime.spawn_blocking(|| {}));
    Ok(runtime)
}

#[cfg(target_os = "linux")]
fn qemu(home: &Home) -> QemuHypervisorBuilder {
    let qemu = QemuHypervisor::builder(home.vms(), home.run());
    match env::var_os("PATH") {
        Some(path) => qemu.search_path(&path),
        None => qemu,
    }
}
