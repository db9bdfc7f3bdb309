//! A backend whose VMs are files, so that they outlive the process that made them, as real ones do.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::timeout;
use uuid::Uuid;
use vmkit::error::Peer;
use vmkit::lifecycle::{Operation, next};
#[cfg(all(target_os = "linux", feature = "qemu"))]
use vmkit::qemu::GuestAgent;
use vmkit::spec::{Boot, Kernel, PortForward, VmName, VmSpec, VmSpecBuilder};
use vmkit::store::Home;
use vmkit::{
    Abilities, Backend, BackendTag, ConsoleEndpoint, Error, Hypervisor, NoopHypervisor, PortForwarding,
    Result, RunInfo, VmHandle, VmManager, VmState,
};
use vmkit::{ProgramOutput, abilities::GuestAgentChannel};
use vmkit_testkit::crash::step;

/// More than anything takes here, even on a busy host.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Hands all of [`Hypervisor`] but its `state` on to the backend in the first field.
macro_rules! all_but_state {
    () => {
        async fn prepare(&self, spec: &vmkit::spec::VmSpec) -> vmkit::Result<vmkit::VmHandle> {
            self.0.prepare(spec).await
        }
        async fn start(&self, vm: &vmkit::VmHandle) -> vmkit::Result<vmkit::VmHandle> {
            self.0.start(vm).await
        }
        async fn stop(
            &self,
            vm: &vmkit::VmHandle,
            timeout: std::time::Duration,
        ) -> vmkit::Result<vmkit::VmHandle> {
            self.0.stop(vm, timeout).await
        }
        async fn suspend(&self, vm: &vmkit::VmHandle) -> vmkit::Result<vmkit::VmHandle> {
            self.0.suspend(vm).await
        }
        async fn resume(&self, vm: &vmkit::VmHandle) -> vmkit::Result<vmkit::VmHandle> {
            self.0.resume(vm).await
        }
        async fn destroy(&self, vm: vmkit::VmHandle) -> vmkit::Result<()> {
            self.0.destroy(vm).await
        }
        async fn guest_ip(&self, vm: &vmkit::VmHandle) -> vmkit::Result<String> {
            self.0.guest_ip(vm).await
        }
        fn console_endpoint(&self, vm: &vmkit::VmHandle) -> vmkit::Result<vmkit::ConsoleEndpoint> {
            self.0.console_endpoint(vm)
        }
    };
}

pub(crate) use all_but_state;

/// A backend as its first field is one.
macro_rules! backend_as_its_first {
    ($wrapper:ty) => {
        impl vmkit::Backend for $wrapper {
            fn tag(&self) -> vmkit::BackendTag {
                self.0.tag()
            }
            fn abilities(&self, tag: &vmkit::BackendTag) -> vmkit::Abilities<'_> {
                self.0.abilities(tag)
            }
        }
    };
}
pub(crate) use backend_as_its_first;

/// A hypervisor that counts how often it is asked for a VM's state.
#[derive(Clone, Default)]
pub(crate) struct Counting(pub(crate) NoopHypervisor, Arc<AtomicU32>);

impl Counting {
    pub(crate) fn looks(&self) -> u32 {
        self.1.load(Ordering::Relaxed)
    }

    /// Waits until it was asked more often than this.
    ///
    /// On a runtime of one thread, a wait that has looked is waiting for an event by then.
    pub(crate) async fn was_asked_since(&self, looks: u32) {
        let asked = async {
            while self.looks() <= looks {
                yield_now().await;
            }
        };
        timeout(SOON, asked).await.expect("the state is asked for before anything is waited for");
    }
}

backend_as_its_first!(Counting);

impl Hypervisor for Counting {
    all_but_state!();

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.state(vm).await
    }
}

/// Waits until this many open files of this process are the VM's lock: its holder's, and one of
/// each operation that waits for it.
///
/// On a runtime of one thread, an operation that has opened the file stands in the queue: it does
/// not await anything in between.
pub(crate) async fn lock_is_open(home: &Home, vm: &VmName, files: usize) {
    let path = home.vm(vm).join("lock");
    let is_lock = |file: &fs::DirEntry| fs::read_link(file.path()).is_ok_and(|open| open == path);
    let open = || fs::read_dir("/proc/self/fd").unwrap().flatten().filter(is_lock).count();
    let opened = async {
        while open() < files {
            yield_now().await;
        }
    };
    let in_time = timeout(SOON, opened).await.is_ok();
    assert!(in_time, "{} is open {} times, not {files}", path.display(), open());
}

/// Keeps one directory for each VM. There, `disk` says that it was prepared, `guest` that it lives,
/// `paused` that its vCPUs stand still, `ran` that it was started once; `boots` has a line for each
/// start.
#[derive(Debug, Clone)]
pub(crate) struct FileHypervisor {
    root: PathBuf,
    run: RunInfo,
}

impl FileHypervisor {
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), run: RunInfo::default() }
    }

    /// Gives every run these facts, for who waits for a guest.
    pub(crate) fn with_run(self, run: RunInfo) -> Self {
        Self { run, ..self }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    fn dir(&self, id: Uuid) -> PathBuf {
        self.root.join(id.to_string())
    }

    fn truth(&self, id: Uuid) -> VmState {
        let dir = self.dir(id);
        let is = |name: &str| dir.join(name).exists();
        match () {
            () if !is("disk") => VmState::Destroyed,
            () if is("guest") && is("paused") => VmState::Suspended,
            () if is("guest") => VmState::Running,
            () if is("ran") => VmState::Stopped,
            () => VmState::Prepared,
        }
    }

    fn handle(&self, vm: &VmHandle) -> Result<VmHandle> {
        let mut vm = vm.clone().in_state(self.truth(vm.id));
        if vm.state.is_live() && vm.run.is_none() {
            // As with QEMU, only a start learns these.
            return Err(Error::protocol(Peer::Hypervisor, "the facts of the run are lost"));
        }
        vm.console_log = Some(self.dir(vm.id).join("console.log"));
        Ok(vm)
    }

    fn effects(&self, vm: &VmHandle, operation: Operation) -> io::Result<()> {
        let dir = self.dir(vm.id);
        match operation {
            Operation::Start => {
                remove(&dir.join("paused"))?;
                create(&dir.join("ran"))?;
                step("boot the guest")?;
                // Fails where there is a guest already: two on one disk are what must never be.
                File::create_new(dir.join("guest"))?;
                let mut boots = OpenOptions::new().append(true).create(true).open(dir.join("boots"))?;
                writeln!(boots, "boot")
            }
            Operation::Stop => remove(&dir.join("guest")).and_then(|()| create(&dir.join("ran"))),
            Operation::Suspend => create(&dir.join("paused")),
            _ => remove(&dir.join("paused")),
        }
    }

    fn change(&self, vm: &VmHandle, operation: Operation) -> Result<VmHandle> {
        let (from, dir) = (self.truth(vm.id), self.dir(vm.id));
        let to = next(&from, operation)?;
        if to != from {
            self.effects(vm, operation).map_err(Error::io("change", &dir))?;
        }
        let mut vm = vm.clone();
        if operation == Operation::Start {
            vm.run = Some(RunInfo { monitor: Some(dir.join("guest")), ..self.run.clone() });
        }
        self.handle(&vm)
    }
}

fn create(path: &Path) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    step("create a file of the fake")?;
    File::create(path).map(drop)
}

fn remove(path: &Path) -> io::Result<()> {
    if !path.exists() {
        return Ok(());
    }
    step("remove a file of the fake")?;
    fs::remove_file(path)
}

impl Hypervisor for FileHypervisor {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        let id = spec.id().expect("the manager chooses the identity");
        let dir = self.dir(id);
        let made = step("create the fake's directory")
            .and_then(|()| fs::create_dir_all(&dir))
            .and_then(|()| create(&dir.join("seed")))
            .and_then(|()| create(&dir.join("disk")));
        let vm = VmHandle::preparing(id, BackendTag::Noop, spec.clone()).in_state(VmState::Prepared);
        match made {
            Ok(()) => self.handle(&vm),
            Err(error) => Err(Error::io("make", dir)(error)),
        }
    }

    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.change(vm, Operation::Start)
    }

    async fn stop(&self, vm: &VmHandle, _timeout: Duration) -> Result<VmHandle> {
        self.change(vm, Operation::Stop)
    }

    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.change(vm, Operation::Suspend)
    }

    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.change(vm, Operation::Resume)
    }

    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        let dir = self.dir(vm.id);
        let removed = ["guest", "paused", "ran", "boots", "seed", "disk", "console.log"]
            .into_iter()
            .try_for_each(|name| remove(&dir.join(name)))
            .and_then(|()| step("remove the fake's directory"))
            .and_then(|()| if dir.exists() { fs::remove_dir(&dir) } else { Ok(()) });
        removed.map_err(Error::io("remove", &dir))
    }

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        Ok(self.truth(vm.id))
    }

    async fn guest_ip(&self, _vm: &VmHandle) -> Result<String> {
        Ok("127.0.0.1".to_owned())
    }

    fn console_endpoint(&self, _vm: &VmHandle) -> Result<ConsoleEndpoint> {
        Ok(ConsoleEndpoint::None)
    }
}

/// A port of the host is a file beside the VMs: only one of them can have it.
impl PortForwarding for FileHypervisor {
    async fn add_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        let path = port(self, forward);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        match fs::File::create_new(&path) {
            Ok(_) => Ok(vm.clone()),
            Err(_) => Err(Error::invalid("forward", forward, "the port is in use")),
        }
    }

    async fn remove_forward(&self, vm: &VmHandle, forward: &PortForward) -> Result<VmHandle> {
        let _ = fs::remove_file(port(self, forward));
        Ok(vm.clone())
    }
}

fn port(hypervisor: &FileHypervisor, forward: &PortForward) -> PathBuf {
    hypervisor.root().with_file_name("ports").join(forward.to_string().replace('/', "-"))
}

/// The agent is QEMU's, or a test's that speaks as it does.
#[cfg(all(target_os = "linux", feature = "qemu"))]
impl GuestAgentChannel for FileHypervisor {
    async fn agent_responds(&self, vm: &VmHandle, limit: Duration) -> Result<bool> {
        match GuestAgent::connect(agent_of(vm)?, limit).await {
            Ok(mut agent) => Ok(agent.ping(limit).await.is_ok()),
            Err(_) => Ok(false),
        }
    }
    async fn agent_exec(
        &self,
        vm: &VmHandle,
        program: &str,
        args: &[&str],
        limit: Duration,
    ) -> Result<ProgramOutput> {
        GuestAgent::connect(agent_of(vm)?, limit).await?.exec(program, args, None, limit).await
    }
}

#[cfg(all(target_os = "linux", feature = "qemu"))]
fn agent_of(vm: &VmHandle) -> Result<&Path> {
    let socket = vm.run.as_ref().and_then(|run| run.agent.as_deref());
    socket.ok_or_else(|| Error::Unsupported { backend: vm.backend.clone(), what: "a guest agent".to_owned() })
}

impl Backend for FileHypervisor {
    fn tag(&self) -> BackendTag {
        BackendTag::Noop
    }

    fn abilities(&self, _tag: &BackendTag) -> Abilities<'_> {
        let abilities = Abilities::none()
            .with_suspend()
            .with_graceful_stop()
            .with_console()
            .with_guest_ip()
            .with_local_files()
            .with_port_forwarding(self);
        #[cfg(all(target_os = "linux", feature = "qemu"))]
        let abilities = abilities.with_guest_agent(self);
        abilities
    }
}

/// One home below `dir`, over VMs that are files below it, too.
pub(crate) struct World {
    pub(crate) dir: PathBuf,
    pub(crate) manager: VmManager<FileHypervisor>,
}

impl World {
    pub(crate) fn at(dir: &Path) -> Self {
        let home = Home::at(dir.join("home")).unwrap();
        let manager = VmManager::new(FileHypervisor::new(dir.join("fake")), home);
        Self { dir: dir.to_owned(), manager }
    }

    /// Returns everything that is left of any VM, for a message.
    pub(crate) fn remains(&self) -> Vec<PathBuf> {
        ["home/vms", "home/run", "fake"].iter().flat_map(|part| paths_below(&self.dir.join(part))).collect()
    }

    /// Returns how often the one VM was booted.
    pub(crate) fn boots(&self) -> usize {
        let logs = paths_below(&self.dir.join("fake"));
        let logs = logs.iter().filter(|path| path.ends_with("boots"));
        logs.map(|log| fs::read_to_string(log).unwrap().lines().count()).sum()
    }

    /// Returns the files that were being written when their writer was interrupted.
    pub(crate) fn temporaries(&self) -> Vec<PathBuf> {
        let mut left = paths_below(&self.dir.join("home"));
        left.retain(|path| path.extension().is_some_and(|extension| extension == "new"));
        left
    }
}

fn paths_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| paths_below(&path).into_iter().chain([path])).collect()
}

pub(crate) fn web() -> VmName {
    VmName::new("web").unwrap()
}

pub(crate) fn spec() -> VmSpec {
    named(web())
}

pub(crate) fn named(name: VmName) -> VmSpec {
    let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
    VmSpec::builder(name).boot(Boot::Kernel(kernel)).build().unwrap()
}

/// Does one operation by its word.
pub(crate) async fn operate(manager: &VmManager<FileHypervisor>, word: &str) -> Result<()> {
    let (name, soon) = (web(), Duration::from_secs(5));
    match word {
        "create" => manager.create(spec()).await.map(drop),
        "start" => manager.start(&name).await.map(drop),
        "stop" => manager.stop(&name, soon).await.map(drop),
        "restart" => manager.restart(&name, soon).await.map(drop),
        "suspend" => manager.suspend(&name).await.map(drop),
        "resume" => manager.resume(&name).await.map(drop),
        "reconfigure" => {
            let spec = VmSpecBuilder::from(spec()).cpus(2).build()?;
            manager.reconfigure(&name, spec).await.map(drop)
        }
        "remove" => manager.remove(&name, true).await,
        _ => panic!("no operation `{word}`"),
    }
}

/// What is done before an operation so that it has its full way to go, and the states that it may
/// leave when it is cut.
pub(crate) const LIVES: [(&str, &[&str], &[&str]); 10] = [
    ("create", &[], &["", "failed", "prepared"]),
    ("start", &["create"], &["prepared", "stopped", "running"]),
    ("start", &["create", "start", "suspend", "stop"], &["stopped", "running"]),
    ("stop", &["create", "start"], &["running", "stopped"]),
    ("restart", &["create", "start"], &["running", "stopped"]),
    ("suspend", &["create", "start"], &["running", "suspended"]),
    ("resume", &["create", "start", "suspend"], &["suspended", "running"]),
    ("reconfigure", &["create", "start"], &["running"]),
    ("remove", &["create", "start"], &["running", "failed", ""]),
    ("remove", &["create"], &["prepared", "failed", ""]),
];
