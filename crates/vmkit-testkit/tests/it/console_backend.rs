//! Backends over the no-op one whose consoles differ from its own, and whose guests have an SSH
//! server: `VmManager` serves them as it does QEMU's.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmkit::spec::{Boot, Kernel, VmName, VmSpec};
use vmkit::store::Home;
use vmkit::{
    Abilities, Backend, BackendTag, ConsoleEndpoint, Error, Hypervisor, NoopHypervisor, Result, VmHandle,
    VmManager, VmState,
};
use vmkit_testkit::{Conformance, conformance, paper_spec};

use crate::sshd::Daemon;

/// The no-op backend with consoles of another kind.
#[derive(Clone)]
struct Talking {
    noop: NoopHypervisor,
    dir: PathBuf,
    is_shared: bool,
    /// Whether the handles say where a run begins in the log.
    tells_runs_apart: bool,
}

impl Talking {
    fn below(dir: &Path) -> Self {
        let noop = NoopHypervisor::new().with_consoles(dir.join("consoles")).with_guest_ip(GUEST);
        Self { noop, dir: dir.to_owned(), is_shared: false, tells_runs_apart: true }
    }

    fn print(&self, vm: &VmHandle, line: &str) {
        self.noop.print(vm, line).unwrap();
    }
}

impl Hypervisor for Talking {
    async fn prepare(&self, spec: &VmSpec) -> Result<VmHandle> {
        self.noop.prepare(spec).await
    }
    async fn start(&self, vm: &VmHandle) -> Result<VmHandle> {
        let mut vm = self.noop.start(vm).await?;
        if !self.tells_runs_apart {
            vm.console_since = None;
        }
        Ok(vm)
    }
    async fn stop(&self, vm: &VmHandle, timeout: Duration) -> Result<VmHandle> {
        self.noop.stop(vm, timeout).await
    }
    async fn suspend(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.noop.suspend(vm).await
    }
    async fn resume(&self, vm: &VmHandle) -> Result<VmHandle> {
        self.noop.resume(vm).await
    }
    async fn destroy(&self, vm: VmHandle) -> Result<()> {
        self.noop.destroy(vm).await
    }
    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.noop.state(vm).await
    }
    async fn guest_ip(&self, vm: &VmHandle) -> Result<String> {
        self.noop.guest_ip(vm).await
    }
    fn console_endpoint(&self, vm: &VmHandle) -> Result<ConsoleEndpoint> {
        self.noop.console_endpoint(vm)
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

/// Starts an SSH server at the guests' port 22; fails if this user may not listen there.
fn serve_ssh() -> std::io::Result<Daemon> {
    let address = SocketAddr::from((GUEST, 22));
    TcpListener::bind(address)?;
    Ok(Daemon::at(address, ""))
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

/// Both, one after the other, at one SSH server.
#[tokio::test]
async fn backends_whose_guests_have_an_ssh_server_keep_the_contract() {
    let temp = tempfile::tempdir().unwrap();
    let server = serve_ssh();
    if let Err(error) = &server {
        println!("SKIP: no SSH server at {GUEST}: {error}");
    }
    let talking = Talking::below(&temp.path().join("talking"));
    let noop = NoopHypervisor::new().with_consoles(temp.path().join("noop")).with_guest_ip(GUEST);
    let options = |noop: &NoopHypervisor| {
        let printing = noop.clone();
        let options = Conformance::new(on_a_network).printing(move |vm| {
            printing.print(vm, "guest: ready\n").unwrap();
            "guest: ready".to_owned()
        });
        if server.is_ok() { options.serving_ssh() } else { options }
    };
    let with_noop = options(&noop);
    let with_talking = options(&talking.noop);
    for report in [
        conformance::run(move || talking.clone(), with_talking).await,
        conformance::run(move || noop.clone(), with_noop).await,
    ] {
        report.assert();
        let text = report.to_string();
        assert!(text.contains("passed   a line printed before attaching is heard"), "{text}");
        let is_served = text.contains("passed   ssh is found by what the backend says");
        assert_eq!(is_served, server.is_ok(), "{text}");
    }
}

#[tokio::test]
async fn output_from_before_attaching_is_read_and_shown() {
    let temp = tempfile::tempdir().unwrap();
    for tells_runs_apart in [true, false] {
        let dir = temp.path().join(tells_runs_apart.to_string());
        fs::create_dir(&dir).unwrap();
        let talking = Talking { tells_runs_apart, ..Talking::below(&dir) };
        let (manager, name) = second_run(&talking, "guest: ready\n").await;
        let mut console = manager.attach_console(&name).await.unwrap();
        let heard = console.wait_for("ready", Duration::from_secs(20)).await.unwrap();
        let heard = String::from_utf8(heard).unwrap();
        assert_eq!(heard.contains("the first run"), !tells_runs_apart, "{heard}");
        drop(console);
        // What was awaited did not come: the error shows what did.
        let mut console = manager.attach_console(&name).await.unwrap();
        let error = console.wait_for("password: ", Duration::from_millis(50)).await.unwrap_err();
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
        let talking = Talking { is_shared, ..Talking::below(&dir) };
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
