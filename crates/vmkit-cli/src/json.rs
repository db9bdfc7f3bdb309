//! The shapes that `--json` prints. They are stable: `docs/json.md` describes them, and a test
//! compares.
//!
//! They are not the records on disk, which may change, and they leave out secrets: keys, and the
//! user-data, which may have some.

use std::net::SocketAddrV4;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use vmkit::launch::LaunchStage;
use vmkit::lifecycle::{FailureCause, Operation, VmState};
use vmkit::spec::{
    Accel, Boot, DataDisk, Firmware, Labels, MachineType, NetworkConfig, Protocol, SpecChange, Vnc, changes,
};
use vmkit::vmfile::MachineOrigin;
use vmkit::{ActiveForward, BackendTag, ConsoleEndpoint, ErrorKind, RunInfo, VmEntry, VmHandle, VncAddress};

/// A VM with all its properties: the output of `info`, `create`, `start` and others.
#[derive(Serialize)]
pub(crate) struct VmView<'a> {
    name: &'a str,
    id: String,
    backend: &'a str,
    state: &'static str,
    cause: Option<&'a FailureCause>,
    cpus: u32,
    memory_mib: u64,
    saved_mib: Option<u64>,
    machine: MachineType,
    accel: &'static str,
    boot: BootWay<'a>,
    disk: Option<DiskView<'a>>,
    data_disks: Vec<DiskView<'a>>,
    cdrom: Option<&'a Path>,
    network: NetworkView<'a>,
    cloud_init: bool,
    vnc: Vnc,
    run_as: Option<&'a str>,
    labels: &'a Labels,
    next_start: Vec<NextStart>,
    run: Option<RunView<'a>>,
    console_log: Option<&'a Path>,
    hypervisor_log: Option<&'a Path>,
}

/// A VM that was launched.
#[derive(Serialize)]
pub(crate) struct LaunchedView<'a> {
    vm: VmView<'a>,
    image: &'a str,
    /// How long each stage took, in seconds.
    stages: Vec<StageView>,
}

#[derive(Serialize)]
struct StageView {
    stage: &'static str,
    seconds: f64,
}

impl<'a> LaunchedView<'a> {
    /// Returns the view of a launched VM, its image, and the duration of each stage.
    pub(crate) fn of(vm: &'a VmHandle, image: &'a str, stages: &[(LaunchStage, Duration)]) -> Self {
        let stage = |(stage, took): &(LaunchStage, Duration)| StageView {
            stage: stage.as_str(),
            seconds: took.as_secs_f64(),
        };
        Self { vm: VmView::of(vm), image, stages: stages.iter().map(stage).collect() }
    }
}

/// The changes that wait for the next start.
#[derive(Serialize)]
struct NextStart {
    field: &'static str,
    from: String,
    to: String,
}

impl NextStart {
    fn of(change: SpecChange) -> Self {
        Self { field: change.field, from: change.from, to: change.to }
    }
}

#[derive(Serialize)]
struct BootWay<'a> {
    firmware: Option<Firmware>,
    kernel: Option<&'a Path>,
    initrd: Option<&'a Path>,
    cmdline: Option<&'a str>,
}

#[derive(Serialize)]
struct DiskView<'a> {
    image: Option<&'a Path>,
    size_mib: Option<u64>,
    readonly: bool,
}

#[derive(Serialize)]
struct NetworkView<'a> {
    mode: &'static str,
    bridge: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<&'a str>,
    restrict: bool,
    forwards: Vec<String>,
}

#[derive(Serialize)]
struct RunView<'a> {
    pid: Option<u32>,
    accel: Option<Accel>,
    console: ConsoleView<'a>,
    agent: Option<&'a Path>,
    monitor: Option<&'a Path>,
    vnc: Option<VncView<'a>>,
    forwards: Vec<ForwardView>,
}

/// The address of a console.
#[derive(Serialize)]
pub(crate) struct ConsoleView<'a> {
    kind: &'static str,
    path: Option<&'a Path>,
    url: Option<&'a str>,
}

#[derive(Serialize)]
struct VncView<'a> {
    kind: &'static str,
    path: Option<&'a Path>,
    address: Option<SocketAddrV4>,
    password_file: Option<&'a Path>,
}

/// A forward that is in force.
#[derive(Serialize)]
pub(crate) struct ForwardView {
    protocol: Protocol,
    host: SocketAddrV4,
    guest_port: u16,
}

/// The address at which the host reaches the guest.
#[derive(Serialize)]
pub(crate) struct AddressView<'a> {
    pub(crate) name: &'a str,
    pub(crate) address: String,
    pub(crate) forwards: Vec<ForwardView>,
}

/// A VM in a list, or the entry in its place.
#[derive(Serialize)]
pub(crate) struct RowView<'a> {
    name: &'a str,
    /// `unknown` if the state can't be read.
    state: &'static str,
    cause: Option<&'a FailureCause>,
    cpus: Option<u32>,
    memory_mib: Option<u64>,
    backend: Option<&'a str>,
    pid: Option<u32>,
    forwards: Vec<ForwardView>,
    bridge: Option<&'a str>,
    image: Option<&'a str>,
    project: Option<&'a str>,
    project_file: Option<&'a Path>,
    machine: Option<&'a str>,
    operation: Option<OperationView>,
    error: Option<ErrorView>,
    path: &'a Path,
}

/// The operation on a VM that runs or was interrupted.
#[derive(Serialize)]
struct OperationView {
    operation: Operation,
    /// Seconds since 1970.
    since: u64,
    pid: u32,
    interrupted: bool,
}

/// An error, with what caused it at the end of its message.
#[derive(Serialize)]
pub(crate) struct ErrorView {
    kind: &'static str,
    message: String,
}

impl ErrorView {
    /// Returns the view of an error.
    pub(crate) fn of(error: &vmkit::Error) -> Self {
        Self { kind: kind(error.kind()), message: error.chain().to_string() }
    }
}

impl<'a> VmView<'a> {
    /// Returns the view of a VM.
    pub(crate) fn of(vm: &'a VmHandle) -> Self {
        let spec = &vm.spec;
        // The backend leaves no choice here, so the spec's value has no effect.
        let is_bhyve = vm.backend == BackendTag::Propolis;
        Self {
            name: vm.name().as_str(),
            id: vm.id.to_string(),
            backend: vm.backend.as_str(),
            state: vm.state.name(),
            cause: cause(&vm.state),
            cpus: spec.cpus(),
            memory_mib: spec.memory().mib(),
            saved_mib: None,
            machine: spec.machine(),
            accel: if is_bhyve { "bhyve" } else { spec.accel().as_str() },
            boot: if is_bhyve { boot(&Boot::Firmware(Firmware::Uefi)) } else { boot(spec.boot()) },
            disk: spec.disk().map(|disk| DiskView {
                image: disk.base(),
                size_mib: disk.size.map(|size| size.mib()),
                readonly: false,
            }),
            data_disks: spec.data_disks().iter().map(data_disk).collect(),
            cdrom: spec.cdrom(),
            network: network(spec.network()),
            cloud_init: spec.cloud_init().is_some(),
            vnc: spec.vnc(),
            run_as: spec.run_as().map(|user| user.as_str()),
            labels: spec.labels(),
            next_start: vm
                .next_spec
                .iter()
                .flat_map(|next| changes(spec, next, false))
                .map(NextStart::of)
                .collect(),
            run: vm.run.as_ref().map(run),
            console_log: vm.console_log.as_deref(),
            hypervisor_log: vm.hypervisor_log.as_deref(),
        }
    }

    /// Adds the room that the memory of a saved guest takes on disk.
    pub(crate) fn with_saved_mib(self, saved_mib: Option<u64>) -> Self {
        Self { saved_mib, ..self }
    }
}

impl<'a> RowView<'a> {
    /// Returns the view of a VM in a list.
    pub(crate) fn of(listed: &'a VmEntry) -> Self {
        let known = listed.handle.as_ref().ok();
        let vm = known.or(listed.recorded.as_ref());
        let origin = vm.and_then(|vm| MachineOrigin::of(&vm.spec));
        Self {
            name: listed.name.as_str(),
            state: known.map_or("unknown", |vm| vm.state.name()),
            cause: known.and_then(|vm| cause(&vm.state)),
            cpus: vm.map(|vm| vm.spec.cpus()),
            memory_mib: vm.map(|vm| vm.spec.memory().mib()),
            backend: vm.map(|vm| vm.backend.as_str()),
            pid: known.and_then(|vm| vm.run.as_ref()?.pid),
            forwards: known.map(forwards).unwrap_or_default(),
            bridge: vm.and_then(|vm| bridge(vm.spec.network())),
            image: vm.and_then(|vm| vm.spec.image_name()),
            project: origin.map(|origin| origin.project),
            project_file: origin.map(|origin| origin.file),
            machine: origin.map(|origin| origin.machine),
            operation: listed.intent.as_ref().map(|intent| OperationView {
                operation: intent.operation,
                since: intent.since,
                pid: intent.pid,
                interrupted: listed.interrupted,
            }),
            error: listed.handle.as_ref().err().map(ErrorView::of),
            path: &listed.path,
        }
    }
}

impl<'a> ConsoleView<'a> {
    /// Returns the view of a console.
    pub(crate) fn of(endpoint: &'a ConsoleEndpoint) -> Self {
        match endpoint {
            ConsoleEndpoint::UnixSocket(path) => Self { kind: "unix-socket", path: Some(path), url: None },
            ConsoleEndpoint::WebSocket(url) => Self { kind: "web-socket", path: None, url: Some(url) },
            ConsoleEndpoint::None => Self { kind: "none", path: None, url: None },
        }
    }
}

impl ForwardView {
    fn of(forward: &ActiveForward) -> Self {
        Self { protocol: forward.protocol, host: forward.host, guest_port: forward.guest_port.get() }
    }
}

/// Returns the forwards that are in force.
pub(crate) fn forwards(vm: &VmHandle) -> Vec<ForwardView> {
    vm.run.iter().flat_map(|run| &run.forwards).map(ForwardView::of).collect()
}

/// Returns the bridge that the VM is attached to.
pub(crate) fn bridge(network: &NetworkConfig) -> Option<&str> {
    match network {
        NetworkConfig::Tap { bridge } => Some(bridge.as_str()),
        _ => None,
    }
}

fn cause(state: &VmState) -> Option<&FailureCause> {
    match state {
        VmState::Failed { cause } => Some(cause),
        _ => None,
    }
}

fn boot(boot: &Boot) -> BootWay<'_> {
    match boot {
        Boot::Kernel(kernel) => BootWay {
            firmware: None,
            kernel: Some(&kernel.path),
            initrd: kernel.initrd.as_deref(),
            cmdline: Some(&kernel.cmdline),
        },
        Boot::Firmware(firmware) => {
            BootWay { firmware: Some(*firmware), kernel: None, initrd: None, cmdline: None }
        }
        _ => BootWay { firmware: None, kernel: None, initrd: None, cmdline: None },
    }
}

fn data_disk(disk: &DataDisk) -> DiskView<'_> {
    match disk {
        DataDisk::Fresh { size } => DiskView { image: None, size_mib: Some(size.mib()), readonly: false },
        DataDisk::Existing { path, readonly } => {
            DiskView { image: Some(path), size_mib: None, readonly: *readonly }
        }
        _ => DiskView { image: None, size_mib: None, readonly: false },
    }
}

fn network(network: &NetworkConfig) -> NetworkView<'_> {
    let none = NetworkView { mode: "none", bridge: None, link: None, restrict: false, forwards: Vec::new() };
    match network {
        NetworkConfig::User(user) => NetworkView {
            mode: "user",
            bridge: None,
            link: None,
            restrict: user.restrict,
            forwards: user.forwards.iter().map(ToString::to_string).collect(),
        },
        NetworkConfig::Tap { bridge } => NetworkView { mode: "tap", bridge: Some(bridge.as_str()), ..none },
        NetworkConfig::Vnic { link } => NetworkView { mode: "vnic", link: Some(link.as_str()), ..none },
        _ => none,
    }
}

fn run(run: &RunInfo) -> RunView<'_> {
    RunView {
        pid: run.pid,
        accel: run.accel,
        console: ConsoleView::of(&run.console),
        agent: run.agent.as_deref(),
        monitor: run.monitor.as_deref(),
        vnc: run.vnc.as_ref().and_then(screen),
        forwards: run.forwards.iter().map(ForwardView::of).collect(),
    }
}

fn screen(vnc: &VncAddress) -> Option<VncView<'_>> {
    match vnc {
        VncAddress::Unix(path) => {
            Some(VncView { kind: "unix-socket", path: Some(path), address: None, password_file: None })
        }
        VncAddress::Tcp { addr, password_file } => Some(VncView {
            kind: "tcp",
            path: None,
            address: Some(*addr),
            password_file: Some(password_file),
        }),
        _ => None,
    }
}

/// Returns the name of a kind of error in JSON.
fn kind(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::InvalidInput => "invalid-input",
        ErrorKind::AlreadyExists => "already-exists",
        ErrorKind::NotFound => "not-found",
        ErrorKind::InvalidState => "invalid-state",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::Busy => "busy",
        ErrorKind::TimedOut => "timed-out",
        ErrorKind::Record => "record",
        ErrorKind::Host => "host",
        ErrorKind::Remote => "remote",
        ErrorKind::Hypervisor => "hypervisor",
        ErrorKind::Guest => "guest",
        ErrorKind::Io => "io",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmkit::BackendTag;
    use vmkit::lifecycle::FailureKind;
    use vmkit::spec::{BridgeName, Kernel, UserName, VmName, VmSpec};

    fn assert_golden(name: &str, vm: &VmHandle) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        let found = format!("{}\n", serde_json::to_string(&VmView::of(vm)).unwrap());
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &found).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap_or_default(), found, "{}", path.display());
    }

    fn vm(network: NetworkConfig) -> VmHandle {
        let kernel = Kernel {
            path: "/boot/vmlinuz".into(),
            initrd: Some("/boot/initrd".into()),
            cmdline: "console=ttyS0".into(),
        };
        let id = "5f0c2b1e-0000-4000-8000-000000000001".parse().unwrap();
        let spec = VmSpec::builder(VmName::new("web").unwrap())
            .id(id)
            .boot(Boot::Kernel(kernel))
            .network(network)
            .run_as(UserName::new("nobody").unwrap())
            .vnc(Vnc::Loopback)
            .build()
            .unwrap();
        VmHandle::preparing(id, BackendTag::Qemu, spec)
    }

    #[test]
    fn a_running_vm_has_the_promised_shape() {
        let mut vm = vm(NetworkConfig::default()).in_state(VmState::Running);
        vm.run = Some(RunInfo {
            pid: Some(4242),
            accel: Some(Accel::Tcg),
            console: ConsoleEndpoint::UnixSocket("/run/5f0c2b1e/console.sock".into()),
            agent: Some("/run/5f0c2b1e/agent.sock".into()),
            monitor: Some("/run/5f0c2b1e/monitor.sock".into()),
            vnc: Some(VncAddress::Tcp {
                addr: "127.0.0.1:5901".parse().unwrap(),
                password_file: "/run/5f0c2b1e/vnc.password".into(),
            }),
            forwards: vec![ActiveForward {
                protocol: Protocol::Tcp,
                host: "127.0.0.1:40001".parse().unwrap(),
                guest_port: 22.try_into().unwrap(),
            }],
        });
        assert_golden("vm-running.json", &vm);
    }

    #[test]
    fn a_failed_vm_has_the_promised_shape() {
        let bridge = BridgeName::new("br0").unwrap();
        let state = VmState::failed(FailureKind::GuestPanic, "the guest's kernel panicked");
        assert_golden("vm-failed.json", &vm(NetworkConfig::Tap { bridge }).in_state(state));
    }
}

/// A block of `ssh-config`.
#[derive(Serialize)]
pub(crate) struct SshConfigView<'a> {
    host: &'a str,
    address: std::net::SocketAddr,
    user: &'a str,
    identity_file: &'a Path,
    known_hosts: &'a Path,
    host_key_alias: &'a str,
}

impl<'a> SshConfigView<'a> {
    pub(crate) fn of(block: &'a vmkit::ssh::SshConfig) -> Self {
        Self {
            host: block.host.as_str(),
            address: block.address,
            user: &block.user,
            identity_file: &block.identity_file,
            known_hosts: &block.known_hosts,
            host_key_alias: &block.host_key_alias,
        }
    }
}
