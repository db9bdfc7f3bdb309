//! Hosts for VMs whose Propolis is a fake.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures_util::{FutureExt, SinkExt, StreamExt};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use vmkit::propolis::{PowerOff, PropolisHypervisorBuilder};
use vmkit::spec::{BackendOptions, DataDisk, Mib, NetworkConfig, RootDisk, VmName, VmSpec, VmSpecBuilder};
use vmkit::{ConsoleEndpoint, ErrorKind, Hypervisor, PropolisHypervisor, VmHandle, VmState};
use vmkit_testkit::propolis::illumos::FakeIllumos;
use vmkit_testkit::propolis::{FakePropolis, FaultProxy, Gate, HeldGate, PropolisBehaviour};

const TOOLS: &str = env!("CARGO_BIN_EXE_vmkit-fake-illumos");
const SERVER: &str = env!("CARGO_BIN_EXE_vmkit-fake-propolis");
/// Started as a keeper, this program is one.
const KEEPER: &str = env!("CARGO_BIN_EXE_vmkit-faulty-qemu");

/// The timeout of steps that take a moment, on the slowest of machines.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A host with a pool, an image and a link, on which each VM has a server of its own.
#[derive(Clone)]
pub(crate) struct World {
    dir: Arc<TempDir>,
    host: Arc<FakeIllumos>,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let host =
            Arc::new(FakeIllumos::new(&dir.path().join("host"), TOOLS.as_ref(), SERVER.as_ref()).unwrap());
        for dataset in ["tank", "tank/img", "tank/vm"] {
            host.add_pool(dataset).unwrap();
        }
        host.add_volume("tank/img/debian", &vec![7; 1 << 20]).unwrap();
        host.add_snapshot("tank/img/debian@base").unwrap();
        host.add_link("net0").unwrap();
        Self { dir: Arc::new(dir), host }
    }

    pub(crate) fn host(&self) -> &FakeIllumos {
        &self.host
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn builder(&self) -> PropolisHypervisorBuilder {
        self.builder_at(&self.dir.path().join("vms"))
    }

    /// Builds a hypervisor of this host over another directory.
    pub(crate) fn builder_at(&self, work_root: &Path) -> PropolisHypervisorBuilder {
        PropolisHypervisor::builder(work_root)
            .search_path(self.host.path().as_os_str())
            .bootrom(self.host.bootrom())
            .dataset("tank/vm")
            .dev_vmm(self.host.dev().join("vmm"))
            .keeper(KEEPER)
    }

    /// Returns a hypervisor as a new process would create it.
    pub(crate) fn hypervisor(&self) -> PropolisHypervisor {
        self.builder().build()
    }

    pub(crate) fn bare(&self, name: VmName) -> VmSpecBuilder {
        let disk = RootDisk { image: "zfs:tank/img/debian@base".into(), size: Some(Mib::new(2).unwrap()) };
        let network = NetworkConfig::Vnic { link: "net0".parse().unwrap() };
        VmSpec::builder(name).disk(disk).network(network)
    }

    pub(crate) fn spec(&self, name: VmName) -> VmSpec {
        let mut options = BackendOptions::default();
        options.set("guest-ip", "127.0.0.1").unwrap();
        let fresh = DataDisk::Fresh { size: Mib::new(1).unwrap() };
        self.bare(name).data_disks(vec![fresh]).backend_options(options).build().unwrap()
    }

    /// Returns the number of guests that run for a VM: a VM in the kernel without a server does not
    /// run.
    pub(crate) fn guests(&self, vm: &VmHandle) -> usize {
        let dir = self.dir.path().join("vms").join(vm.name().as_str()).join("server");
        let works_there =
            |entry: &fs::DirEntry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == dir);
        let servers = fs::read_dir("/proc").unwrap().flatten().filter(works_there).count();
        if self.kernel_has(vm) { servers } else { 0 }
    }

    /// Returns whether the kernel has a VM, with or without a server.
    pub(crate) fn kernel_has(&self, vm: &VmHandle) -> bool {
        self.host.dev().join("vmm").join(vm.id.to_string()).exists()
    }

    /// Lists what is left of VMs on the host and in their directory.
    pub(crate) fn left(&self) -> Vec<String> {
        let mut left = self.host.leftovers().unwrap();
        left.extend(files_in(&self.dir.path().join("vms")));
        left
    }

    /// Sets the host's neighbour table to this one guest, as `arp -an` of illumos prints it.
    pub(crate) fn say_neighbour(&self, address: &str, mac: &str) {
        let table = format!("net0   {address}  255.255.255.255          {mac}");
        let program = self.host.path().join("arp");
        let text = format!("#!/bin/sh\n[ \"$*\" = -an ] && echo '{table}'\n");
        vmkit_testkit::write_program(&program, &text).unwrap();
    }

    /// Runs a tool of the host, as another process would.
    pub(crate) fn run(&self, tool: &str, args: &[&str]) {
        let output = Command::new(self.host.path().join(tool)).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A host with a running server behind a network that can fail.
#[derive(Clone)]
pub(crate) struct Remote {
    dir: Arc<TempDir>,
    server: Arc<Mutex<FakePropolis>>,
    pub(crate) proxy: Arc<FaultProxy>,
}

impl Remote {
    pub(crate) fn new() -> Self {
        Self::behaving(PropolisBehaviour::default())
    }

    pub(crate) fn behaving(behaviour: PropolisBehaviour) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk.raw"), vec![7; 1 << 20]).unwrap();
        let server = FakePropolis::spawn(behaviour).unwrap();
        let proxy = FaultProxy::new(server.address()).unwrap();
        Self { dir: Arc::new(dir), server: Arc::new(Mutex::new(server)), proxy: Arc::new(proxy) }
    }

    pub(crate) fn builder(&self) -> PropolisHypervisorBuilder {
        PropolisHypervisor::builder(self.dir.path().join("vms")).search_path("/nonexistent".as_ref())
    }

    pub(crate) fn hypervisor(&self) -> PropolisHypervisor {
        self.builder().build()
    }

    pub(crate) fn bare(&self, name: VmName) -> VmSpecBuilder {
        let disk = DataDisk::Existing { path: self.dir.path().join("disk.raw"), readonly: false };
        VmSpec::builder(name).data_disks(vec![disk]).network(NetworkConfig::None)
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Holds the server at a gate.
    pub(crate) fn hold(&self, gate: Gate) -> HeldGate {
        self.server.lock().unwrap().hold(gate).now_or_never().expect("no other test holds it")
    }

    /// Returns how often the server has accepted the order to run or to stop a VM.
    pub(crate) fn orders(&self) -> usize {
        let log = self.server.lock().unwrap().log();
        let is_taken = |line: &&str| {
            line.contains(r#""uri":"/instance/state""#) && line.contains(r#""response_code":204"#)
        };
        log.lines().filter(is_taken).count()
    }

    /// Waits until a request has reached the gate that is held, after so many orders; there is no
    /// event for it.
    pub(crate) async fn wait_at(&self, gate: Gate, orders: usize) {
        let address = self.server.lock().unwrap().address();
        // At these gates, a VM to be created exists already, and a request to run has been
        // accepted.
        let has_come = || match gate {
            Gate::Ensure => instance_at(address).contains("Creating"),
            Gate::Host => self.kernel_vms().iter().any(|name| name.starts_with("cpuid-gen-")),
            Gate::Pause => self.server.lock().unwrap().is_pausing(),
            _ => self.orders() > orders,
        };
        let came = async {
            while !has_come() {
                // The fake has no event for it.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, came).await.unwrap();
    }

    pub(crate) fn kernel_vms(&self) -> Vec<String> {
        self.server.lock().unwrap().kernel_vms()
    }

    /// Returns the id of the first request that has a line with this text in the log.
    pub(crate) fn request_id_of(&self, what: &str) -> String {
        let log = self.server.lock().unwrap().log();
        let line = log.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{log}"));
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["req_id"].as_str().unwrap().to_owned()
    }

    /// Ends the server; nothing listens at its address afterwards.
    pub(crate) fn end_server(&mut self) {
        self.server.lock().unwrap().kill();
        self.proxy.set(Some(vmkit_testkit::propolis::NetworkFault::Refuse)).unwrap();
    }

    /// Powers the guest off from inside.
    pub(crate) fn power_off(&self) {
        assert!(self.server.lock().unwrap().power_off(), "there is a guest");
    }

    /// Waits until the server has released a VM; there is no event for it.
    pub(crate) async fn wait_for_no_guest(&self, vm: &VmHandle) {
        let gone = async {
            while self.guests(vm) > 0 {
                // The fake has no event for it.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.unwrap();
    }

    pub(crate) fn spec(&self, name: VmName) -> VmSpec {
        let mut options = BackendOptions::default();
        options.set("address", self.proxy.address().to_string()).unwrap();
        options.set("guest-ip", "10.0.0.9").unwrap();
        self.bare(name).backend_options(options).build().unwrap()
    }

    /// Replaces the server by one without a VM, as after a restart.
    pub(crate) fn forget(&self) {
        let fresh = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
        self.proxy.replace(fresh.address()).unwrap();
        self.proxy.cut().unwrap();
        *self.server.lock().unwrap() = fresh;
    }

    pub(crate) fn guests(&self, vm: &VmHandle) -> usize {
        let vms = self.server.lock().unwrap().kernel_vms();
        vms.iter().filter(|name| **name == vm.id.to_string()).count()
    }

    pub(crate) fn left(&self) -> Vec<String> {
        let mut left = files_in(&self.dir.path().join("vms"));
        left.extend(self.server.lock().unwrap().kernel_vms());
        left
    }
}

/// Returns a server's description of its VM.
fn instance_at(server: SocketAddr) -> String {
    let mut stream = TcpStream::connect(server).unwrap();
    let head = "host: x\r\nconnection: close\r\napi-version: 1.0.0";
    write!(stream, "GET /instance HTTP/1.1\r\n{head}\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn files_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().display().to_string()).collect()
}

/// Kills a process that is not a child of this one, and waits until it has ended.
pub(crate) fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

/// Waits until the VM is in a state; there is no event for it.
pub(crate) async fn wait_for_state(propolis: &PropolisHypervisor, vm: &VmHandle, wanted: &VmState) {
    wait_for(propolis, vm, |found| found == wanted).await;
}

/// Waits until the VM is in a state that `is` accepts, and no start is in progress.
pub(crate) async fn wait_for(
    propolis: &PropolisHypervisor,
    vm: &VmHandle,
    wanted: impl Fn(&VmState) -> bool,
) {
    let began = Instant::now();
    loop {
        let found = match propolis.state(vm).await {
            Err(error) if error.kind() == ErrorKind::Busy => None,
            found => Some(found.unwrap()),
        };
        if found.as_ref().is_some_and(&wanted) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "it is {found:?}");
        // The fake has no event for it.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

type Console = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

async fn console(url: &str) -> Console {
    let mut request = format!("{url}?from_start=0").into_client_request().unwrap();
    request.headers_mut().insert("api-version", "1.0.0".parse().unwrap());
    tokio_tungstenite::connect_async(request).await.unwrap().0
}

fn url_of(propolis: &PropolisHypervisor, vm: &VmHandle) -> String {
    match propolis.console_endpoint(vm).unwrap() {
        ConsoleEndpoint::WebSocket(url) => url,
        other => panic!("{other:?}"),
    }
}

/// Waits until the server has read some of the guest's output; no client is at its console.
pub(crate) async fn wait_for_words(propolis: &PropolisHypervisor, vm: &VmHandle, wanted: &str) {
    let console = vmkit::propolis::SerialConsole::at(&url_of(propolis, vm)).unwrap();
    let said = async {
        let all = vmkit::propolis::HistoryRange::Start(0);
        while !String::from_utf8_lossy(&console.history(all).await.unwrap().bytes).contains(wanted) {
            // The fake has no event for it.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, said).await.unwrap();
}

/// Waits until the guest has printed this text.
pub(crate) async fn wait_for_console(propolis: &PropolisHypervisor, vm: &VmHandle, wanted: &str) {
    let mut console = console(&url_of(propolis, vm)).await;
    let mut said = String::new();
    let heard = async {
        while !said.contains(wanted) {
            match console.next().await.expect("the guest lives").unwrap() {
                Message::Binary(bytes) => said.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, heard).await.unwrap();
}

pub(crate) async fn type_at_console(propolis: &PropolisHypervisor, vm: &VmHandle, text: &str) {
    let mut console = console(&url_of(propolis, vm)).await;
    console.send(Message::binary(text.as_bytes().to_vec())).await.unwrap();
    // A client that disconnects at once may lose its input: the guest's echo confirms that it has
    // arrived.
    let _ = tokio::time::timeout(PATIENCE, console.next()).await;
}

/// Powers a guest off by typing at its console.
pub(crate) struct TypesPowerOff;

impl PowerOff for TypesPowerOff {
    fn power_off<'a>(
        &'a self,
        vm: &'a VmHandle,
        _address: IpAddr,
        _timeout: Duration,
    ) -> Pin<Box<dyn Future<Output = vmkit::Result<()>> + Send + 'a>> {
        Box::pin(async move {
            let ConsoleEndpoint::WebSocket(url) = vm.run.clone().unwrap().console else { panic!("{vm:?}") };
            let mut console = console(&url).await;
            // Output right before the end may never leave the port; the words before it do.
            console.send(Message::binary(b"going down\r".to_vec())).await.unwrap();
            let mut said = String::new();
            while !said.contains("going down\r\n") {
                match console.next().await {
                    Some(Ok(Message::Binary(bytes))) => said.push_str(&String::from_utf8_lossy(&bytes)),
                    _ => return Ok(()),
                }
            }
            console.send(Message::binary(b"poweroff\r".to_vec())).await.unwrap();
            let _ = console.next().await;
            Ok(())
        })
    }
}
