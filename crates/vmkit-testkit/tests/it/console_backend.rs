//! A custom backend with a console and a log, made of what the library exports: `VmManager` serves
//! it as it does QEMU's.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use uuid::Uuid;
use vmkit::spec::{Boot, Kernel, VmName, VmSpec};
use vmkit::store::Home;
use vmkit::{
    Abilities, Backend, BackendTag, BoundedLog, ConsoleEndpoint, Error, Hypervisor, NoopHypervisor, Result,
    VmHandle, VmManager, VmState,
};
use vmkit_testkit::{Conformance, conformance, paper_spec};

/// The no-op backend with guests that print.
#[derive(Clone)]
struct Talking {
    noop: NoopHypervisor,
    dir: PathBuf,
    is_shared: bool,
    /// Whether the handles say where a run begins in the log.
    tells_runs_apart: bool,
    guests: Arc<Mutex<BTreeMap<Uuid, Arc<Mutex<Guest>>>>>,
}

/// The console of a guest that runs.
struct Guest {
    log: BoundedLog,
    clients: Vec<UnixStream>,
}

impl Guest {
    /// Prints a line, as the contract of a Unix socket has it: to the clients first, then to the
    /// log.
    fn print(&mut self, line: &str) {
        self.clients.retain_mut(|client| client.write_all(line.as_bytes()).is_ok());
        self.log.append(line.as_bytes());
    }
}

impl Talking {
    fn over(noop: &NoopHypervisor, dir: &Path) -> Self {
        let guests = Arc::default();
        Self { noop: noop.clone(), dir: dir.to_owned(), is_shared: false, tells_runs_apart: true, guests }
    }

    fn log(&self, vm: &VmHandle) -> PathBuf {
        self.dir.join(format!("{}.log", vm.id))
    }

    fn socket(&self, vm: &VmHandle) -> PathBuf {
        self.dir.join(format!("{}.sock", vm.id))
    }

    fn print(&self, vm: &VmHandle, line: &str) {
        let guest = Arc::clone(&self.guests.lock().unwrap()[&vm.id]);
        guest.lock().unwrap().print(line);
    }

    fn end(&self, vm: &VmHandle) {
        self.guests.lock().unwrap().remove(&vm.id);
        let _ = fs::remove_file(self.socket(vm));
    }
}

impl Hypervisor for Talking {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        self.noop.prepare(spec).await
    }
    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        let mut vm = self.noop.start(vm).await?;
        let mut guests = self.guests.lock().unwrap();
        if let Entry::Vacant(place) = guests.entry(vm.id) {
            let path = self.log(&vm);
            let log = BoundedLog::open(&path, 1 << 20).map_err(Error::io("open", &path))?;
            let since = log.position().map_err(Error::io("look at", &path))?;
            vm.console_since = self.tells_runs_apart.then_some(since);
            let guest = Arc::new(Mutex::new(Guest { log, clients: Vec::new() }));
            let _ = fs::remove_file(self.socket(&vm));
            let listener =
                UnixListener::bind(self.socket(&vm)).map_err(Error::io("listen at", self.socket(&vm)))?;
            let weak = Arc::downgrade(&guest);
            std::thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    let Some(guest) = weak.upgrade() else { return };
                    guest.lock().unwrap().clients.push(client);
                }
            });
            place.insert(guest);
        }
        vm.console_log = Some(self.log(&vm));
        let console = ConsoleEndpoint::UnixSocket(self.socket(&vm));
        vm.run.get_or_insert_default().console = console;
        Ok(vm)
    }
    async fn stop(&self, vm: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        let stopped = self.noop.stop(vm, timeout).await?;
        self.end(vm);
        Ok(stopped)
    }
    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.noop.suspend(vm).await
    }
    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.noop.resume(vm).await
    }
    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        self.end(&vm);
        let _ = fs::remove_file(self.log(&vm));
        self.noop.destroy(vm).await
    }
    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.noop.state(vm).await
    }
    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        self.noop.guest_ip(vm).await.map(|_| GUEST.to_string())
    }
    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        self.noop.console_endpoint(vm).map(|_| ConsoleEndpoint::UnixSocket(self.socket(vm)))
    }
}

impl Backend for Talking {
    fn tag(&self) -> BackendTag {
        self.noop.tag()
    }
    fn abilities(&self, _tag: &BackendTag) -> Abilities<'_> {
        let abilities = Abilities::none().with_suspend().with_guest_ip().with_console();
        if self.is_shared { abilities.with_shared_console() } else { abilities }
    }
}

/// The address of the guests: one of loopback that nothing else listens at.
const GUEST: Ipv4Addr = Ipv4Addr::new(127, 0, 77, 1);

/// Returns a spec without user networking, whose guest is reached at its address.
fn on_a_network(name: VmName) -> VmSpec {
    let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
    let network = "vnic:net0".parse().unwrap();
    VmSpec::builder(name).boot(Boot::Kernel(kernel)).network(network).build().unwrap()
}

/// Sends an SSH server's banner to each client of the guests' port 22; returns false if this user
/// may not listen there.
fn serve_ssh() -> bool {
    let Ok(listener) = TcpListener::bind((GUEST, 22)) else { return false };
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            let _ = client.write_all(b"SSH-2.0-test\r\n");
        }
    });
    true
}

/// Runs two VMs one after the other under one name, and returns the manager of the second run, in
/// which the guest has printed `line`.
async fn second_run(talking: &Talking, line: &str) -> (VmManager<Talking>, VmName) {
    let manager = VmManager::new(talking.clone(), Home::at(talking.dir.join("home")).unwrap());
    let vm = manager.create(paper_spec(VmName::new("web").unwrap())).await.unwrap();
    let name = vm.name().clone();
    talking.print(&manager.start(&name).await.unwrap(), "the first run\n");
    manager.stop(&name, Duration::ZERO).await.unwrap();
    talking.print(&manager.start(&name).await.unwrap(), line);
    (manager, name)
}

#[tokio::test]
async fn a_custom_backend_with_a_console_keeps_the_contract() {
    let temp = tempfile::tempdir().unwrap();
    let talking = Talking::over(&NoopHypervisor::new(), temp.path());
    let printing = talking.clone();
    let is_served = serve_ssh();
    if !is_served {
        println!("SKIP: this user may not listen at port 22 of {GUEST}");
    }
    let options = Conformance::new(on_a_network);
    let options = if is_served { options.serving_ssh() } else { options };
    let options = options.printing(move |vm| {
        printing.print(vm, "guest: ready\n");
        "guest: ready".to_owned()
    });
    let report = conformance::run(move || talking.clone(), options).await;
    report.assert();
    let text = report.to_string();
    assert!(text.contains("passed   a line printed before attaching is heard"), "{text}");
    assert_eq!(text.contains("passed   ssh is found by what the backend says"), is_served, "{text}");
}

#[tokio::test]
async fn what_a_custom_backends_guest_printed_before_attaching_is_heard_and_shown() {
    let temp = tempfile::tempdir().unwrap();
    for tells_runs_apart in [true, false] {
        let dir = temp.path().join(tells_runs_apart.to_string());
        fs::create_dir(&dir).unwrap();
        let talking = Talking { tells_runs_apart, ..Talking::over(&NoopHypervisor::new(), &dir) };
        let (manager, name) = second_run(&talking, "guest: ready\n").await;
        let mut console = manager.attach_console(&name).await.unwrap();
        let heard = console.wait_for("ready", Duration::from_secs(20)).await.unwrap();
        let heard = String::from_utf8(heard).unwrap();
        assert_eq!(heard.contains("the first run"), !tells_runs_apart, "{heard}");
        drop(console);
        // What was awaited did not come: the error shows what did.
        let mut console = manager.attach_console(&name).await.unwrap();
        let error = console.wait_for("login: ", Duration::from_millis(50)).await.unwrap_err();
        let Error::TimedOut { console: Some(shown), .. } = &error else { panic!("{error}") };
        assert!(shown.as_str().ends_with("guest: ready"), "{}", shown.as_str());
    }
}

#[tokio::test]
async fn a_console_that_serves_many_is_attached_by_many() {
    let temp = tempfile::tempdir().unwrap();
    for is_shared in [true, false] {
        let dir = temp.path().join(is_shared.to_string());
        fs::create_dir(&dir).unwrap();
        let talking = Talking { is_shared, ..Talking::over(&NoopHypervisor::new(), &dir) };
        let (manager, name) = second_run(&talking, "guest: ready\n").await;
        let mut first = manager.attach_console(&name).await.unwrap();
        match manager.attach_console(&name).await {
            Ok(mut second) if is_shared => {
                let vm = manager.info(&name).await.unwrap();
                talking.print(&vm, "and more\n");
                for console in [&mut first, &mut second] {
                    console.wait_for("ready\nand more", Duration::from_secs(20)).await.unwrap();
                }
            }
            Err(Error::Busy { holder, .. }) if !is_shared => assert_eq!(holder, Some(std::process::id())),
            other => panic!("shared: {is_shared}, {other:?}"),
        }
    }
}
