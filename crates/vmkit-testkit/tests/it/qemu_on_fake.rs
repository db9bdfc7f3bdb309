//! The QEMU backend on the fake QEMU: it keeps the contract, and it ends well whatever QEMU does.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use uuid::Uuid;
use vmkit::spec::{
    Accel, Boot, CloudInitConfig, DataDisk, Kernel, Mib, NetworkConfig, PortForward, Protocol, RootDisk,
    UserNetwork, VmName, VmSpec, VmSpecBuilder,
};
use vmkit::{Error, ErrorKind, FailureKind, Hypervisor, QemuHypervisor, QemuPlan, VmHandle, VmState};
use vmkit_testkit::fake_qemu::{FakeQemu, QemuBehaviour, QemuFault, StartRefusal, TimedFault};
use vmkit_testkit::{Conformance, conformance, walk};

const FAKE: &str = env!("CARGO_BIN_EXE_vmkit-fake-qemu");

/// A home for VMs whose QEMU is a fake.
struct Home {
    dir: TempDir,
}

impl Home {
    fn new(behaviour: &QemuBehaviour) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("vmlinuz"), vmkit_testkit::paper_kernel()).expect("a file");
        let qemu = FakeQemu::install(FAKE.as_ref(), dir.path()).expect("a link");
        qemu.behave(behaviour).expect("a file");
        Self { dir }
    }

    /// Returns a hypervisor as a new process would make it.
    fn hypervisor(&self) -> QemuHypervisor {
        over(self.dir.path(), Duration::from_secs(30))
    }

    fn spec(&self, name: VmName) -> VmSpec {
        spec(self.dir.path(), name)
    }

    async fn prepared(&self, qemu: &QemuHypervisor) -> VmHandle {
        let name = VmName::new("web").expect("a name");
        qemu.prepare(&self.spec(name)).await.unwrap_or_else(|error| panic!("prepare: {error}"))
    }

    async fn started(&self, qemu: &QemuHypervisor) -> VmHandle {
        let vm = self.prepared(qemu).await;
        qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"))
    }

    /// Destroys a VM and fails unless nothing of it is left.
    async fn clear(&self, qemu: &QemuHypervisor, vm: VmHandle) {
        let id = vm.id.to_string();
        qemu.destroy(vm).await.unwrap_or_else(|error| panic!("destroy: {error}"));
        assert_eq!(guests(&id), 0);
        assert_eq!(left(self.dir.path()), Vec::<String>::new());
    }
}

fn over(dir: &Path, start_limit: Duration) -> QemuHypervisor {
    QemuHypervisor::builder(dir.join("vms"), dir.join("run"))
        .cache_dir(dir.join("cache"))
        .program(dir.join("qemu-system-x86_64"))
        .keeper(FAKE)
        .start_limit(start_limit)
        .build()
}

fn spec(dir: &Path, name: VmName) -> VmSpec {
    let kernel = Kernel { path: dir.join("vmlinuz"), initrd: None, cmdline: String::new() };
    let forward = |protocol| PortForward {
        protocol,
        host_addr: PortForward::LOOPBACK,
        host_port: None,
        guest_port: 22.try_into().expect("not 0"),
    };
    let forwards = vec![forward(Protocol::Tcp), forward(Protocol::Udp)];
    VmSpec::builder(name)
        .boot(Boot::Kernel(kernel))
        .accel(Accel::Tcg)
        .network(NetworkConfig::User(UserNetwork { forwards, ..UserNetwork::default() }))
        .build()
        .expect("a valid spec")
}

/// Counts the QEMUs that run for a VM's id.
fn guests(id: &str) -> usize {
    let runs = |entry: &fs::DirEntry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("qemu-system") && line.contains(id)
    };
    fs::read_dir("/proc").expect("proc").flatten().filter(runs).count()
}

/// Lists what is left of VMs below a home.
fn left(dir: &Path) -> Vec<String> {
    let roots = [dir.join("vms"), dir.join("run")];
    let entries = roots.iter().filter_map(|root| fs::read_dir(root).ok()).flatten().flatten();
    entries.map(|entry| entry.path().display().to_string()).collect()
}

fn kill(vm: &VmHandle, signal: Signal) {
    let pid = vm.run.as_ref().and_then(|run| run.pid).expect("it runs");
    let pid = Pid::from_raw(i32::try_from(pid).expect("a pid")).expect("a pid");
    kill_process(pid, signal).expect("it runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_qemu_backend_keeps_the_contract() {
    let home = Home::new(&QemuBehaviour::default());
    let (specs, vms, leftovers) =
        (home.dir.path().to_owned(), home.dir.path().to_owned(), home.dir.path().to_owned());
    let options = Conformance::new(move |name| spec(&specs, name))
        .breaking(|vm| kill(vm, Signal::KILL))
        .counting_guests(|vm| guests(&vm.id.to_string()))
        .printing(|_| QemuBehaviour::default().console)
        .home(home.dir.path())
        .finding_leftovers(move || left(&leftovers));
    let report = conformance::run(move || over(&vms, Duration::from_secs(30)), options).await;
    report.assert();
    assert_eq!(report.skipped(), 1, "the fake has no `hostfwd_add`: {report}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn the_qemu_backend_keeps_to_the_table_along_any_walk(steps in walk::steps(10)) {
        let home = Home::new(&QemuBehaviour::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let dir = home.dir.path().to_owned();
        let options = Conformance::new(move |name| spec(&dir, name));
        let name = VmName::new("walk").expect("a name");
        let walked = runtime.block_on(walk::along(&home.hypervisor(), &options, name, &steps));
        walked.map_err(TestCaseError::fail)?;
        prop_assert_eq!(left(home.dir.path()), Vec::<String>::new());
    }
}

#[tokio::test]
async fn what_qemu_says_when_it_refuses_to_start_reaches_the_caller() {
    let refusal = StartRefusal { stderr: "qemu: the moon is wrong\n".into(), code: 1 };
    let home = Home::new(&QemuBehaviour { refusal: Some(refusal), ..QemuBehaviour::default() });
    let qemu = home.hypervisor();
    let vm = home.prepared(&qemu).await;
    let error = qemu.start(&vm).await.expect_err("it refuses");
    assert!(matches!(&error, Error::QemuExited { .. }), "{error:?}");
    assert!(error.to_string().contains("the moon is wrong"), "{error}");
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_monitor_that_never_gets_ready_ends_the_start_and_its_qemu() {
    let silent = QemuBehaviour { greet: false, ..QemuBehaviour::default() };
    let stalled = QemuBehaviour { mute: vec!["qmp_capabilities".into()], ..QemuBehaviour::default() };
    for behaviour in [silent, stalled] {
        let home = Home::new(&behaviour);
        let qemu = over(home.dir.path(), Duration::from_millis(700));
        let vm = home.prepared(&qemu).await;
        let error = qemu.start(&vm).await.expect_err("it never gets ready");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert_eq!(guests(&vm.id.to_string()), 0);
        home.clear(&qemu, vm).await;
    }
}

#[tokio::test]
async fn a_monitor_that_speaks_no_json_ends_the_start_and_its_qemu() {
    let home =
        Home::new(&QemuBehaviour { greeting: Some("HTTP/1.1 200 OK".into()), ..QemuBehaviour::default() });
    let qemu = home.hypervisor();
    let vm = home.prepared(&qemu).await;
    let error = qemu.start(&vm).await.expect_err("that is no greeting");
    assert!(error.to_string().contains("HTTP/1.1"), "{error}");
    assert_eq!(guests(&vm.id.to_string()), 0);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_qemu_that_answers_no_more_is_not_taken_for_dead() {
    let home = Home::new(&QemuBehaviour { mute: vec!["query-status".into()], ..QemuBehaviour::default() });
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let asked = Instant::now();
    let error = qemu.state(&vm).await.expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(asked.elapsed() < Duration::from_secs(30), "{:?}", asked.elapsed());
    assert_eq!(guests(&vm.id.to_string()), 1);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_panic_and_an_internal_error_are_failures_that_start_mends() {
    for (signal, kind) in
        [(Signal::USR1, FailureKind::GuestPanic), (Signal::USR2, FailureKind::InternalError)]
    {
        let home = Home::new(&QemuBehaviour::default());
        let qemu = home.hypervisor();
        let vm = home.started(&qemu).await;
        kill(&vm, signal);
        let asked = Instant::now();
        let state = loop {
            // The signal is on its way; the fake takes it between two commands.
            let state = qemu.state(&vm).await.unwrap_or_else(|error| panic!("state: {error}"));
            if state != VmState::Running || asked.elapsed() > Duration::from_secs(20) {
                break state;
            }
        };
        assert!(matches!(&state, VmState::Failed { cause } if cause.kind == kind), "{state:?}");
        let vm = qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
        assert_eq!(guests(&vm.id.to_string()), 1);
        home.clear(&qemu, vm).await;
    }
}

#[tokio::test]
async fn how_qemu_ended_by_itself_is_told() {
    for (what, kind, word) in [
        (QemuFault::Signal(6), FailureKind::HypervisorKilled, "SIGABRT"),
        (QemuFault::Exit(3), FailureKind::HypervisorExited, "3"),
    ] {
        let home = Home::new(&QemuBehaviour {
            fate: Some(TimedFault { after_ms: 300, what }),
            ..QemuBehaviour::default()
        });
        let qemu = home.hypervisor();
        let vm = home.started(&qemu).await;
        let asked = Instant::now();
        while guests(&vm.id.to_string()) > 0 && asked.elapsed() < Duration::from_secs(20) {
            // No child of this process: its end is no event.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let state = qemu.state(&vm).await.unwrap_or_else(|error| panic!("state: {error}"));
        let VmState::Failed { cause } = &state else { panic!("{what:?}: {state:?}") };
        assert_eq!(cause.kind, kind, "{cause}");
        assert!(cause.detail.contains(word), "{cause}");
        home.clear(&qemu, vm).await;
    }
}

#[tokio::test]
async fn a_qemu_that_ignores_everything_is_stopped_by_force() {
    let home = Home::new(&QemuBehaviour {
        ignore_power_down: true,
        ignore_sigterm: true,
        mute: vec!["quit".into()],
        ..QemuBehaviour::default()
    });
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let asked = Instant::now();
    let stopped = qemu.stop(&vm, Duration::from_millis(300)).await;
    let stopped = stopped.unwrap_or_else(|error| panic!("stop: {error}"));
    assert_eq!(stopped.state, VmState::Stopped);
    assert!(asked.elapsed() < Duration::from_secs(60), "{:?}", asked.elapsed());
    assert_eq!(guests(&vm.id.to_string()), 0);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_guest_that_hears_its_button_late_still_ends_by_itself() {
    let home = Home::new(&QemuBehaviour {
        deaf_ms: 1500,
        // Only the guest itself can end it.
        ignore_sigterm: true,
        mute: vec!["quit".into()],
        ..QemuBehaviour::default()
    });
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let asked = Instant::now();
    let stopped = qemu.stop(&vm, Duration::from_secs(60)).await;
    assert_eq!(stopped.unwrap_or_else(|error| panic!("stop: {error}")).state, VmState::Stopped);
    assert!(
        asked.elapsed() < Duration::from_secs(30),
        "the guest listens after 1.5 s: {:?}",
        asked.elapsed()
    );
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_timeout_beyond_all_reckoning_is_as_good_as_never() {
    let home = Home::new(&QemuBehaviour::default());
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let stopped = qemu.stop(&vm, Duration::MAX).await;
    assert_eq!(stopped.unwrap_or_else(|error| panic!("stop: {error}")).state, VmState::Stopped);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn the_ports_that_the_kernel_chose_are_in_the_handle() {
    let home = Home::new(&QemuBehaviour::default());
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let forwards = &vm.run.as_ref().expect("it runs").forwards;
    let found: Vec<_> = forwards.iter().map(|it| (it.protocol, it.guest_port.get())).collect();
    assert_eq!(found, [(Protocol::Tcp, 22), (Protocol::Udp, 22)]);
    let taken = std::net::TcpListener::bind(forwards[0].host).expect_err("the fake holds it");
    assert_eq!(taken.kind(), std::io::ErrorKind::AddrInUse);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_disk_that_shall_be_larger_grows_at_the_start() {
    let home = Home::new(&QemuBehaviour::default());
    let qemu = home.hypervisor();
    let image = home.dir.path().join("base.img");
    fs::File::create(&image).and_then(|file| file.set_len(4 << 20)).expect("an image");
    let sized = |mib: u64| {
        let size = Some(Mib::new(mib).expect("a size"));
        let name = VmName::new("web").expect("a name");
        let spec = VmSpecBuilder::from(home.spec(name)).disk(RootDisk { image: image.clone(), size });
        spec.build().expect("a spec")
    };
    let vm = qemu.prepare(&sized(8)).await.unwrap_or_else(|error| panic!("prepare: {error}"));
    let overlay = home.dir.path().join("vms/web/root.qcow2");
    let bytes = || disk_bytes(&overlay);
    assert_eq!(bytes(), 8 << 20);
    let with_disk = |vm: &VmHandle, mib| VmHandle { spec: sized(mib).with_id(vm.id), ..vm.clone() };
    let vm = qemu.start(&with_disk(&vm, 64)).await.unwrap_or_else(|error| panic!("start: {error}"));
    assert_eq!(bytes(), 64 << 20);
    let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap_or_else(|error| panic!("stop: {error}"));
    let error = qemu.start(&with_disk(&vm, 16)).await.expect_err("it would lose what is behind");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert_eq!(bytes(), 64 << 20);
    let vm = qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
    home.clear(&qemu, vm).await;
}

/// Returns the size of the disk in a qcow2 file. Source: QEMU's docs/interop/qcow2: it is at byte
/// 24, big-endian.
fn disk_bytes(path: &Path) -> u64 {
    let header = fs::read(path).expect("a disk");
    assert_eq!(header[..4], *b"QFI\xfb", "{}", path.display());
    u64::from_be_bytes(header[24..32].try_into().expect("eight bytes"))
}

/// Fails unless a printed step of a plan has been done; returns the file that it is about.
fn done(step: &Value, home: &Path) -> String {
    let path = Path::new(step["path"].as_str().expect("a path"));
    let has =
        |text: &str| fs::read(path).expect("a file").windows(text.len()).any(|at| at == text.as_bytes());
    match step["step"].as_str().expect("a kind") {
        "directory" => {
            let owner = fs::read_to_string(path.join("owner")).expect("the mark");
            assert_eq!(owner.trim(), step["id"]);
            return "owner".to_owned();
        }
        "overlay" => {
            let image = &step["image"];
            assert_eq!(image["path"], home.join("base.img").to_str().expect("UTF-8"));
            assert!(has("../../base.img") && has(image["format"].as_str().expect("a format")));
            assert_eq!(disk_bytes(path), step["size"].as_u64().expect("a size") << 20);
        }
        // The documents may hold secrets: only how long they are is printed.
        "seed" => {
            let documents = step["seed"].as_object().expect("lengths");
            assert!(
                documents.len() == 3 && documents.iter().all(|(name, bytes)| has(name) && bytes.is_u64())
            );
        }
        "disk" | "grow" => assert_eq!(disk_bytes(path), step["size"].as_u64().expect("a size") << 20),
        kind => panic!("{kind}"),
    }
    path.file_name().expect("a name").to_string_lossy().into_owned()
}

fn words(plan: &Value) -> Vec<&str> {
    let args = plan["args"].as_array().expect("arguments");
    std::iter::once(&plan["program"]).chain(args).map(|word| word.as_str().expect("text")).collect()
}

fn command_line(vm: &VmHandle) -> Vec<String> {
    let pid = vm.run.as_ref().and_then(|run| run.pid).expect("it runs");
    let line = fs::read(format!("/proc/{pid}/cmdline")).expect("it runs");
    let line = String::from_utf8(line).expect("UTF-8");
    line.trim_end_matches('\0').split('\0').map(str::to_owned).collect()
}

#[tokio::test]
async fn what_is_done_is_what_the_printed_plan_says() {
    let home = Home::new(&QemuBehaviour::default());
    let (qemu, dir) = (home.hypervisor(), home.dir.path().canonicalize().expect("a directory"));
    fs::File::create(dir.join("base.img")).and_then(|file| file.set_len(4 << 20)).expect("an image");
    let size = |mib: u64| Mib::new(mib).expect("a size");
    let sized = |mib| {
        let disk = RootDisk { image: dir.join("base.img"), size: Some(size(mib)) };
        let spec = VmSpecBuilder::from(home.spec(VmName::new("web").expect("a name"))).disk(disk);
        let data = vec![DataDisk::Fresh { size: size(16) }];
        let spec = spec.id(Uuid::from_u128(7)).data_disks(data).cloud_init(CloudInitConfig::default());
        spec.build().expect("a spec")
    };
    let printed = |plan: QemuPlan| serde_json::to_value(plan).expect("plain data");
    let failed = |error: Error| -> QemuPlan { panic!("plan: {error}") };

    let plan = printed(qemu.plan(&sized(8)).await.unwrap_or_else(failed));
    assert_eq!(left(&dir), Vec::<String>::new());
    let vm = qemu.prepare(&sized(8)).await.unwrap_or_else(|error| panic!("prepare: {error}"));
    let steps = plan["prepare"].as_array().expect("steps").iter();
    let mut files: Vec<String> = steps.map(|step| done(step, &dir)).chain(["alive".to_owned()]).collect();
    let mut there: Vec<String> = fs::read_dir(dir.join("vms/web"))
        .expect("the directory")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    files.sort();
    there.sort();
    assert_eq!((there, plan["update"].as_array().map(Vec::len)), (files, Some(0)));

    // A spec that waits for the next start is the one that is planned.
    let spec = vm.spec.clone().with_cloud_init_again();
    let vm = VmHandle { spec, next_spec: Some(Box::new(sized(64))), ..vm };
    let plan = printed(qemu.plan_start(&vm).await.unwrap_or_else(failed));
    assert_eq!(plan["prepare"].as_array().map(Vec::len), Some(0));
    assert_eq!(disk_bytes(&dir.join("vms/web/root.qcow2")), 8 << 20);
    let vm = qemu.start(&vm.with_next_spec()).await.unwrap_or_else(|error| panic!("start: {error}"));
    let kinds: Vec<_> =
        plan["update"].as_array().expect("steps").iter().map(|step| done(step, &dir)).collect();
    assert_eq!(kinds, ["seed.iso", "root.qcow2"]);
    assert_eq!(command_line(&vm), words(&plan));
    for socket in plan["sockets"].as_array().expect("sockets") {
        assert!(Path::new(socket["path"].as_str().expect("a path")).exists(), "{socket}");
    }
    assert_eq!(vm.run.as_ref().and_then(|run| run.accel), Some(Accel::Tcg));
    let plan = printed(qemu.plan_start(&vm).await.unwrap_or_else(failed));
    assert_eq!(plan["update"].as_array().map(Vec::len), Some(0));
    home.clear(&qemu, vm).await;
}

/// Waits until the VM is in a state that fits.
async fn until(qemu: &QemuHypervisor, vm: &VmHandle, fits: impl Fn(&VmState) -> bool) {
    let began = Instant::now();
    loop {
        let state = qemu.state(vm).await;
        if state.as_ref().is_ok_and(&fits) {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{state:?}");
        // No event tells.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the guest sleeps, which only a monitor tells: to vmkit it runs.
fn sleeps(vm: &VmHandle) {
    let monitor = vm.run.as_ref().and_then(|run| run.monitor.as_ref()).expect("it has a monitor");
    let mut monitor = UnixStream::connect(monitor).expect("it runs");
    let began = Instant::now();
    let mut said = String::new();
    monitor.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").expect("it runs");
    while !said.contains("\"suspended\"") {
        assert!(began.elapsed() < Duration::from_secs(30), "{said}");
        monitor.write_all(b"{\"execute\":\"query-status\"}\n").expect("it runs");
        let mut piece = [0; 1024];
        let read = monitor.read(&mut piece).expect("it answers");
        said.push_str(&String::from_utf8_lossy(&piece[..read]));
    }
}

fn ends_by_itself_only(what: QemuFault) -> QemuBehaviour {
    QemuBehaviour {
        fate: Some(TimedFault { after_ms: 100, what }),
        // Only the guest itself can end it.
        ignore_sigterm: true,
        mute: vec!["quit".into()],
        ..QemuBehaviour::default()
    }
}

#[tokio::test]
async fn a_guest_that_waits_for_room_on_its_disk_goes_on_at_the_next_start_or_stop() {
    let home = Home::new(&ends_by_itself_only(QemuFault::IoError));
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let pid = |vm: &VmHandle| vm.run.as_ref().and_then(|run| run.pid);
    let is_out_of_room =
        |state: &VmState| matches!(state, VmState::Failed { cause } if cause.kind == FailureKind::DiskError);
    until(&qemu, &vm, is_out_of_room).await;
    let again = qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
    assert_eq!((pid(&again), qemu.state(&vm).await.ok()), (pid(&vm), Some(VmState::Running)));
    home.clear(&qemu, again).await;

    let vm = home.started(&qemu).await;
    until(&qemu, &vm, is_out_of_room).await;
    let stopped = qemu.stop(&vm, Duration::from_secs(60)).await;
    assert_eq!(stopped.unwrap_or_else(|error| panic!("stop: {error}")).state, VmState::Stopped);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_guest_that_sleeps_is_woken_to_be_stopped() {
    let home = Home::new(&ends_by_itself_only(QemuFault::Sleep));
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    sleeps(&vm);
    let asked = Instant::now();
    let stopped = qemu.stop(&vm, Duration::from_secs(60)).await;
    assert_eq!(stopped.unwrap_or_else(|error| panic!("stop: {error}")).state, VmState::Stopped);
    assert!(asked.elapsed() < Duration::from_secs(30), "{:?}", asked.elapsed());
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn what_the_program_left_open_for_its_children_does_not_reach_the_hypervisor() {
    let home = Home::new(&QemuBehaviour::default());
    let qemu = home.hypervisor();
    let (read, write) = rustix::pipe::pipe().expect("a pipe, handed on to every child");
    rustix::io::fcntl_setfd(&read, rustix::io::FdFlags::CLOEXEC).expect("a flag");
    let vm = home.started(&qemu).await;
    drop(write);
    // Whatever else is a child by chance lets go of it soon; a guest would have it for as long as
    // it runs.
    let mut waited = [rustix::event::PollFd::new(&read, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut waited, Some(&limit)), Ok(1), "nobody has the other end any more");
    assert_eq!(guests(&vm.id.to_string()), 1);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_start_that_comes_to_nothing_leaves_a_stopped_vm_stopped() {
    let home = Home::new(&QemuBehaviour::default());
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap_or_else(|error| panic!("stop: {error}"));
    let run = home.dir.path().join("run");
    fs::remove_dir(&run).and_then(|()| fs::write(&run, "in the way")).expect("a file");
    qemu.start(&vm).await.expect_err("there is nowhere to put sockets");
    assert_eq!(qemu.state(&vm).await.expect("a state"), VmState::Stopped);
    fs::remove_file(&run).expect("it goes");
    let program = home.dir.path().join("qemu-system-x86_64");
    let hidden = program.with_extension("hidden");
    fs::rename(&program, &hidden).and_then(|()| fs::write(&program, "no program")).expect("a file");
    qemu.start(&vm).await.expect_err("there is nothing to start");
    assert_eq!(qemu.state(&vm).await.expect("a state"), VmState::Stopped);
    fs::rename(&hidden, &program).expect("it comes back");
    let vm = qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_start_that_is_not_heard_of_in_time_leaves_nothing_running() {
    for limit in [1, 5, 20] {
        let home = Home::new(&QemuBehaviour { greet: false, ..QemuBehaviour::default() });
        let qemu = over(home.dir.path(), Duration::from_millis(limit));
        let vm = home.prepared(&qemu).await;
        let error = qemu.start(&vm).await.expect_err("it never greets");
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Busy), "{error}");
        assert_eq!(guests(&vm.id.to_string()), 0, "after {limit} ms: {error}");
        home.clear(&qemu, vm).await;
    }
}

#[tokio::test]
async fn a_vm_is_started_from_a_session_with_another_runtime_directory() {
    let home = Home::new(&QemuBehaviour::default());
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let old = qemu.stop(&vm, Duration::from_secs(20)).await.unwrap_or_else(|error| panic!("stop: {error}"));
    // As a session's directory is after the session: gone, and not to be made again.
    let run = home.dir.path().join("run");
    fs::remove_dir(&run).and_then(|()| fs::write(&run, "in the way")).expect("a file");
    let elsewhere = home.dir.path().join("run2");
    let other = QemuHypervisor::builder(home.dir.path().join("vms"), &elsewhere)
        .cache_dir(home.dir.path().join("cache"))
        .program(home.dir.path().join("qemu-system-x86_64"))
        .keeper(FAKE)
        .build();
    let vm = other.start(&old).await.unwrap_or_else(|error| panic!("start: {error}"));
    let console = vm.run.as_ref().expect("it runs").console.clone();
    assert!(matches!(console, vmkit::ConsoleEndpoint::UnixSocket(path) if path.starts_with(&elsewhere)));
    // Neither the new handle nor the new directory is needed to find it.
    assert_eq!(qemu.state(&old).await.expect("a state"), VmState::Running);
    qemu.suspend(&old).await.unwrap_or_else(|error| panic!("suspend: {error}"));
    qemu.destroy(old).await.unwrap_or_else(|error| panic!("destroy: {error}"));
    assert_eq!(guests(&vm.id.to_string()), 0);
    assert_eq!(fs::read_dir(&elsewhere).map(Iterator::count).unwrap_or(0), 0);
}

#[tokio::test]
async fn a_screen_whose_password_was_never_set_gets_one_from_whoever_comes_next() {
    let home = Home::new(&QemuBehaviour::default());
    let qemu = home.hypervisor();
    let name = VmName::new("web").expect("a name");
    let spec = VmSpecBuilder::from(home.spec(name)).vnc(vmkit::spec::Vnc::Loopback).build().expect("a spec");
    let vm = qemu.prepare(&spec).await.unwrap_or_else(|error| panic!("prepare: {error}"));
    let vm = qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
    let Some(vmkit::VncAddress::Tcp { password_file, .. }) = vm.run.as_ref().and_then(|run| run.vnc.clone())
    else {
        panic!("{:?}", vm.run)
    };
    let first = fs::read_to_string(&password_file).expect("a password");
    assert_eq!(first.len(), 8, "{first:?}");
    for cut in [None, Some("half")] {
        fs::remove_file(&password_file).expect("it goes");
        if let Some(text) = cut {
            fs::write(&password_file, text).expect("a file");
        }
        qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
        let drawn = fs::read_to_string(&password_file).expect("a password");
        assert!(drawn.len() == 8 && drawn != first, "{drawn:?}");
    }
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn relative_paths_are_refused_before_anything_is_made() {
    let home = Home::new(&QemuBehaviour::default());
    let dir = home.dir.path();
    let name = || VmName::new("web").expect("a name");
    for (work, run) in [("vms".into(), dir.join("run")), (dir.join("vms"), "run".into())] {
        let qemu = QemuHypervisor::builder(work, run).keeper(FAKE).build();
        let error = qemu.prepare(&home.spec(name())).await.expect_err("it is relative");
        assert!(error.to_string().contains("must be absolute"), "{error}");
    }
    let qemu = home.hypervisor();
    let kernel = Kernel { path: "vmlinuz".into(), initrd: None, cmdline: String::new() };
    let spec = VmSpecBuilder::from(home.spec(name())).boot(Boot::Kernel(kernel)).build().expect("a spec");
    let error = qemu.prepare(&spec).await.expect_err("it is relative");
    assert!(error.to_string().starts_with("kernel: \"vmlinuz\": the path must be absolute"), "{error}");
    assert_eq!(left(dir), Vec::<String>::new());
}
