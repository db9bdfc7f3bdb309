//! The QEMU backend where QEMU misbehaves, and what else needs no guest.
//!
//! QEMU is the real one; its guest halts at once.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use uuid::Uuid;
use vmkit::qemu::QemuPlan;
use vmkit::spec::{
    Accel, Boot, CloudInitConfig, DataDisk, Kernel, Mib, NetworkConfig, PortForward, Protocol, RootDisk,
    UserNetwork, VmName, VmSpec, VmSpecBuilder,
};
use vmkit::{Error, ErrorKind, FailureKind, Hypervisor, QemuHypervisor, VmHandle, VmState};
use vmkit_testkit::faulty_qemu::{FaultyQemu, QemuFaults};
use vmkit_testkit::{Conformance, walk};

const QEMU: &str = "qemu-system-x86_64";
const FAULTY: &str = env!("CARGO_BIN_EXE_vmkit-faulty-qemu");

/// A home for VMs, and the QEMU that runs them.
struct Home {
    dir: TempDir,
    faulty: FaultyQemu,
}

impl Home {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("vmlinuz"), vmkit_testkit::paper_kernel()).expect("a file");
        let faulty = FaultyQemu::install(FAULTY.as_ref(), dir.path()).expect("a link");
        Self { dir, faulty }
    }

    fn with(faults: QemuFaults) -> Self {
        let home = Self::new();
        home.faulty.set(faults);
        home
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
        assert_eq!(guests(&id).len(), 0);
        assert_eq!(left(self.dir.path()), Vec::<String>::new());
    }
}

impl Drop for Home {
    /// Ends what a test that fails has left running.
    fn drop(&mut self) {
        for guest in guests(&self.dir.path().to_string_lossy()) {
            let _ = kill_process(guest, Signal::KILL);
        }
    }
}

fn over(dir: &Path, start_limit: Duration) -> QemuHypervisor {
    QemuHypervisor::builder(dir.join("vms"), dir.join("run"))
        .cache_dir(dir.join("cache"))
        .program(dir.join(QEMU))
        .keeper(FAULTY)
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

/// Lists the QEMUs whose command lines have this in them, such as a VM's ID.
fn guests(id: &str) -> Vec<Pid> {
    let runs = |entry: &fs::DirEntry| {
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let program = line.split(|&byte| byte == 0).next().unwrap_or_default();
        program.ends_with(QEMU.as_bytes()) && line.windows(id.len()).any(|part| part == id.as_bytes())
    };
    let pid = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw);
    fs::read_dir("/proc").expect("proc").flatten().filter(runs).filter_map(pid).collect()
}

/// Lists what is left of VMs below a home.
fn left(dir: &Path) -> Vec<String> {
    let roots = [dir.join("vms"), dir.join("run")];
    let entries = roots.iter().filter_map(|root| fs::read_dir(root).ok()).flatten().flatten();
    entries.map(|entry| entry.path().display().to_string()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]
    #[test]
    fn the_qemu_backend_keeps_to_the_table_along_any_walk(steps in walk::steps(10)) {
        let home = Home::new();
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
async fn a_monitor_that_never_gets_ready_ends_the_start_and_its_qemu() {
    let silent = QemuFaults { is_silent: true, ..QemuFaults::default() };
    let stalled = QemuFaults { mute: vec!["qmp_capabilities"], ..QemuFaults::default() };
    for faults in [silent, stalled] {
        let home = Home::with(faults);
        let qemu = over(home.dir.path(), Duration::from_millis(700));
        let vm = home.prepared(&qemu).await;
        let error = qemu.start(&vm).await.expect_err("it never gets ready");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        assert_eq!(guests(&vm.id.to_string()).len(), 0);
        home.clear(&qemu, vm).await;
    }
}

#[tokio::test]
async fn a_monitor_that_sends_no_json_ends_the_start_and_its_qemu() {
    let home = Home::with(QemuFaults { greeting: Some("HTTP/1.1 200 OK"), ..QemuFaults::default() });
    let qemu = home.hypervisor();
    let vm = home.prepared(&qemu).await;
    let error = qemu.start(&vm).await.expect_err("that is no greeting");
    assert!(error.to_string().contains("HTTP/1.1"), "{error}");
    assert_eq!(guests(&vm.id.to_string()).len(), 0);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_qemu_that_no_longer_replies_is_not_regarded_as_dead() {
    let home = Home::with(QemuFaults { mute: vec!["query-status"], ..QemuFaults::default() });
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let asked = Instant::now();
    let error = qemu.state(&vm).await.expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(asked.elapsed() < Duration::from_secs(30), "{:?}", asked.elapsed());
    assert_eq!(guests(&vm.id.to_string()).len(), 1);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn an_internal_error_is_a_failure_that_a_start_ends() {
    let home = Home::new();
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    home.faulty.set(QemuFaults { status: Some(("internal-error", "quit")), ..QemuFaults::default() });
    let state = qemu.state(&vm).await.unwrap_or_else(|error| panic!("state: {error}"));
    assert!(
        matches!(&state, VmState::Failed { cause } if cause.kind == FailureKind::InternalError),
        "{state:?}"
    );
    home.faulty.set(QemuFaults::default());
    let again = qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
    assert_eq!(guests(&vm.id.to_string()).len(), 1);
    home.clear(&qemu, again).await;
}

#[tokio::test]
async fn the_exit_code_of_a_qemu_that_ended_is_reported() {
    let home = Home::new();
    fs::remove_file(home.faulty.program()).expect("it is there");
    let script =
        format!("#!/bin/sh\n[ \"$1\" = --version ] && exec {QEMU} --version\n{QEMU} \"$@\"\nexit 3\n");
    vmkit_testkit::write_program(home.faulty.program(), &script).expect("a program");
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let [guest] = guests(&vm.id.to_string())[..] else { panic!("one runs") };
    kill_process(guest, Signal::TERM).expect("it runs");
    let asked = Instant::now();
    let cause = loop {
        match qemu.state(&vm).await {
            Ok(VmState::Failed { cause }) => break cause,
            state => assert!(asked.elapsed() < Duration::from_secs(30), "{state:?}"),
        }
        // No child of this process: its end is no event.
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(cause.kind, FailureKind::HypervisorExited, "{cause}");
    assert!(cause.detail.contains('3'), "{cause}");
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_qemu_that_ignores_everything_is_stopped_by_force() {
    let home = Home::with(QemuFaults { ignore_signals: true, mute: vec!["quit"], ..QemuFaults::default() });
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let asked = Instant::now();
    let stopped = qemu.stop(&vm, Duration::from_millis(300)).await;
    let stopped = stopped.unwrap_or_else(|error| panic!("stop: {error}"));
    assert_eq!(stopped.state, VmState::Stopped);
    assert!(asked.elapsed() < Duration::from_secs(60), "{:?}", asked.elapsed());
    assert_eq!(guests(&vm.id.to_string()).len(), 0);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_disk_that_shall_be_larger_grows_at_the_start() {
    let home = Home::new();
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
async fn what_is_done_is_the_printed_plan() {
    let home = Home::new();
    let (qemu, dir) = (home.hypervisor(), home.dir.path().canonicalize().expect("a directory"));
    let path = std::env::var_os("PATH").expect("a path");
    let real = std::env::split_paths(&path).map(|dir| dir.join(QEMU)).find(|program| program.exists());
    fs::remove_file(home.faulty.program()).expect("it is there");
    symlink(real.expect("QEMU (cargo xtask setup)"), home.faulty.program()).expect("a link");
    fs::File::create(dir.join("base.img")).and_then(|file| file.set_len(4 << 20)).expect("an image");
    let size = |mib: u64| Mib::new(mib).expect("a size");
    let id = Uuid::new_v4();
    let sized = |mib| {
        let disk = RootDisk { image: dir.join("base.img"), size: Some(size(mib)) };
        let spec = VmSpecBuilder::from(home.spec(VmName::new("web").expect("a name"))).disk(disk);
        let data = vec![DataDisk::Fresh { size: size(16) }];
        let spec = spec.id(id).data_disks(data).cloud_init(CloudInitConfig::default());
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

/// Returns which of `commands` QEMU was sent, in order.
fn sent(home: &Home, commands: &[&str]) -> Vec<String> {
    home.faulty.commands().into_iter().filter(|command| commands.contains(&command.as_str())).collect()
}

#[tokio::test]
async fn a_guest_that_waits_for_room_on_its_disk_continues_at_the_next_start_or_stop() {
    let home = Home::new();
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let pid = |vm: &VmHandle| vm.run.as_ref().and_then(|run| run.pid);
    let out_of_room = || QemuFaults { status: Some(("io-error", "cont")), ..QemuFaults::default() };
    home.faulty.set(out_of_room());
    let state = qemu.state(&vm).await.unwrap_or_else(|error| panic!("state: {error}"));
    assert!(matches!(&state, VmState::Failed { cause } if cause.kind == FailureKind::DiskError), "{state:?}");
    let again = qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
    assert_eq!((pid(&again), qemu.state(&vm).await.ok()), (pid(&vm), Some(VmState::Running)));

    home.faulty.set(out_of_room());
    let before = home.faulty.commands().len();
    let stopped = qemu.stop(&again, Duration::from_millis(300)).await;
    assert_eq!(stopped.unwrap_or_else(|error| panic!("stop: {error}")).state, VmState::Stopped);
    let commands = &home.faulty.commands()[before..];
    let at = |name: &str| commands.iter().position(|command| command == name);
    assert!(at("cont").is_some() && at("cont") < at("system_powerdown"), "{commands:?}");
    home.clear(&qemu, again).await;
}

#[tokio::test]
async fn a_guest_that_sleeps_is_woken_to_be_stopped() {
    let home = Home::new();
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    home.faulty.set(QemuFaults { status: Some(("suspended", "system_wakeup")), ..QemuFaults::default() });
    assert_eq!(qemu.state(&vm).await.ok(), Some(VmState::Running));
    let stopped = qemu.stop(&vm, Duration::from_millis(300)).await;
    assert_eq!(stopped.unwrap_or_else(|error| panic!("stop: {error}")).state, VmState::Stopped);
    let commands = sent(&home, &["system_wakeup", "system_powerdown"]);
    assert_eq!(commands.first().map(String::as_str), Some("system_wakeup"), "{commands:?}");
    assert!(commands.iter().any(|command| command == "system_powerdown"), "{commands:?}");
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn what_the_program_left_open_for_its_children_does_not_reach_the_hypervisor() {
    let home = Home::new();
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
    assert_eq!(guests(&vm.id.to_string()).len(), 1);
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_start_that_comes_to_nothing_leaves_a_stopped_vm_stopped() {
    let home = Home::new();
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap_or_else(|error| panic!("stop: {error}"));
    let run = home.dir.path().join("run");
    fs::remove_dir(&run).and_then(|()| fs::write(&run, "in the way")).expect("a file");
    qemu.start(&vm).await.expect_err("there is nowhere to put sockets");
    assert_eq!(qemu.state(&vm).await.expect("a state"), VmState::Stopped);
    fs::remove_file(&run).expect("it goes");
    let program = home.dir.path().join(QEMU);
    let hidden = program.with_extension("hidden");
    fs::rename(&program, &hidden).and_then(|()| fs::write(&program, "no program")).expect("a file");
    qemu.start(&vm).await.expect_err("there is nothing to start");
    assert_eq!(qemu.state(&vm).await.expect("a state"), VmState::Stopped);
    fs::rename(&hidden, &program).expect("it comes back");
    let vm = qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"));
    home.clear(&qemu, vm).await;
}

#[tokio::test]
async fn a_start_without_a_reply_in_time_leaves_nothing_running() {
    for limit in [1, 5, 20] {
        let home = Home::with(QemuFaults { is_silent: true, ..QemuFaults::default() });
        let qemu = over(home.dir.path(), Duration::from_millis(limit));
        let vm = home.prepared(&qemu).await;
        let error = qemu.start(&vm).await.expect_err("it never greets");
        assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Busy), "{error}");
        assert_eq!(guests(&vm.id.to_string()).len(), 0, "after {limit} ms: {error}");
        home.clear(&qemu, vm).await;
    }
}

#[tokio::test]
async fn a_vm_is_started_from_a_session_with_another_runtime_directory() {
    let home = Home::new();
    let qemu = home.hypervisor();
    let vm = home.started(&qemu).await;
    let old = qemu.stop(&vm, Duration::ZERO).await.unwrap_or_else(|error| panic!("stop: {error}"));
    // As a session's directory is after the session: gone, and not to be made again.
    let run = home.dir.path().join("run");
    fs::remove_dir(&run).and_then(|()| fs::write(&run, "in the way")).expect("a file");
    let elsewhere = home.dir.path().join("run2");
    let other = QemuHypervisor::builder(home.dir.path().join("vms"), &elsewhere)
        .cache_dir(home.dir.path().join("cache"))
        .program(home.dir.path().join(QEMU))
        .keeper(FAULTY)
        .build();
    let vm = other.start(&old).await.unwrap_or_else(|error| panic!("start: {error}"));
    let console = vm.run.as_ref().expect("it runs").console.clone();
    assert!(matches!(console, vmkit::ConsoleEndpoint::UnixSocket(path) if path.starts_with(&elsewhere)));
    // Neither the new handle nor the new directory is needed to find it.
    assert_eq!(qemu.state(&old).await.expect("a state"), VmState::Running);
    qemu.suspend(&old).await.unwrap_or_else(|error| panic!("suspend: {error}"));
    qemu.destroy(old).await.unwrap_or_else(|error| panic!("destroy: {error}"));
    assert_eq!(guests(&vm.id.to_string()).len(), 0);
    assert_eq!(fs::read_dir(&elsewhere).map(Iterator::count).unwrap_or(0), 0);
}

#[tokio::test]
async fn a_screen_whose_password_was_never_set_gets_one_from_the_next_operation() {
    let home = Home::new();
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
async fn relative_paths_are_refused_before_anything_is_created() {
    let home = Home::new();
    let dir = home.dir.path();
    let name = || VmName::new("web").expect("a name");
    for (work, run) in [("vms".into(), dir.join("run")), (dir.join("vms"), "run".into())] {
        let qemu = QemuHypervisor::builder(work, run).keeper(FAULTY).build();
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
