//! What the tests on the real QEMU share: a place to run VMs in that leaves none behind, and ways
//! to wait.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout};
use vmkit::abilities::GuestAgentChannel;
use vmkit::network::MacAddr;
use vmkit::qemu::{GuestAgent, QemuHypervisorBuilder};
use vmkit::spec::{Arch, MachineType, VmSpec};
use vmkit::{ConsoleEndpoint, Hypervisor, QemuHypervisor, RunInfo, VmHandle, VmState, tail_of_log};

/// How long anything may take that an emulated guest does on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(180);

/// Marks the process of a test that runs in its own namespaces.
const INSIDE: &str = "VMKIT_TEST_INSIDE";

/// The lock's number in every QEMU of vmkit's.
const ALIVE: &str = "fd/200";

/// A place to run VMs in; when it is dropped, by a panic too, no QEMU of it is left.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Returns a QEMU hypervisor that keeps everything in here.
    pub(crate) fn hypervisor(&self) -> QemuHypervisor {
        builder(self.path()).build()
    }

    /// Returns a builder of one for guests of this machine.
    pub(crate) fn builder_for(&self, machine: MachineType) -> QemuHypervisorBuilder {
        match machine.arch() {
            Arch::X86_64 => builder(self.path()),
            Arch::Aarch64 => plain_builder(self.path()),
        }
    }

    /// Returns the VM's work directory.
    pub(crate) fn work_dir(&self, vm: &VmHandle) -> PathBuf {
        self.path().join("vms").join(vm.name().as_str())
    }

    /// Returns the VM's runtime directory.
    pub(crate) fn run_dir(&self, vm: &VmHandle) -> PathBuf {
        self.path().join("run").join(short_id(vm))
    }

    /// Returns what is left of VMs on disk.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut left = entries(&self.path().join("vms"));
        left.extend(entries(&self.path().join("run")));
        left
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        kill_below(self.path());
    }
}

/// Kills every QEMU and keeper of the VMs below a directory.
pub(crate) fn kill_below(dir: &Path) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let ours = fs::read_link(entry.path().join(ALIVE)).is_ok_and(|lock| lock.starts_with(dir));
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        if let (true, Some(pid)) = (ours, pid) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// Creates a hypervisor below `dir`, with the QEMU for x86-64 in `$VMKIT_TEST_QEMU` if that is set.
pub(crate) fn builder(dir: &Path) -> QemuHypervisorBuilder {
    match std::env::var_os("VMKIT_TEST_QEMU") {
        Some(program) => plain_builder(dir).program(program),
        None => plain_builder(dir),
    }
}

fn plain_builder(dir: &Path) -> QemuHypervisorBuilder {
    QemuHypervisor::builder(dir.join("vms"), dir.join("run"))
        .cache_dir(dir.join("cache"))
        .keeper(env!("CARGO_BIN_EXE_vmkit-keeper"))
}

/// Runs the test once more in a process with network, mounts and process ids of its own, or says
/// aloud why it is skipped.
///
/// With that process everything in the namespaces ends, however it ends.
pub(crate) fn in_own_namespaces<F: AsyncFnOnce()>(test: F) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(test());
    }
    let apart = |program: &Path| {
        // When this process dies without a word, so does what it began.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--fork"]);
        command.args(["--kill-child", "--mount-proc"]).arg(program);
        command
    };
    let tried = apart(Path::new("true")).output().expect("util-linux is installed");
    if !tried.status.success() {
        let why = String::from_utf8_lossy(&tried.stderr).into_owned();
        return eprintln!("SKIP: namespaces of its own can't be had: {}", why.trim());
    }
    // The closure's type is named after the function that it stands in.
    let name = std::any::type_name::<F>().trim_end_matches("::{{closure}}");
    let name = name.split_once("::").unwrap().1;
    let mut command = apart(&std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(INSIDE, "1");
    let output = command.output().unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && printed.contains("1 passed"), "{name}: {printed}\n{said}");
    for line in said.lines().filter(|line| line.starts_with("SKIP")) {
        eprintln!("{line}");
    }
}

/// Returns the names in a directory, none where there is no directory.
pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).map(|entries| {
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    });
    names.unwrap_or_default()
}

/// Prepares and starts a VM.
pub(crate) async fn started(qemu: &QemuHypervisor, spec: &VmSpec) -> VmHandle {
    let vm = qemu.prepare(spec).await.unwrap_or_else(|error| panic!("prepare: {error}"));
    qemu.start(&vm).await.unwrap_or_else(|error| panic!("start: {error}"))
}

/// Prepares and starts the VM of a test guest, and waits until its userspace is up.
pub(crate) async fn booted(qemu: &QemuHypervisor, spec: &VmSpec) -> VmHandle {
    let vm = started(qemu, spec).await;
    console_says(&vm, "vmkit-guest: ready").await;
    vm
}

pub(crate) fn run(vm: &VmHandle) -> &RunInfo {
    vm.run.as_ref().expect("a running VM has a run")
}

/// Returns what the VM's runtime directory and its tap are named after.
pub(crate) fn short_id(vm: &VmHandle) -> String {
    MacAddr::of_vm(vm.id).to_string().replace(':', "")[2..].to_owned()
}

/// Returns QEMU's process.
pub(crate) fn pid(vm: &VmHandle) -> Pid {
    let pid = run(vm).pid.expect("a running VM has a process");
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

/// Returns the process that keeps this QEMU: its parent.
pub(crate) fn keeper_pid(qemu: Pid) -> Pid {
    let status = fs::read_to_string(format!("/proc/{qemu}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
    Pid::from_raw(parent.trim().parse().unwrap()).unwrap()
}

pub(crate) fn console_text(vm: &VmHandle) -> String {
    let log = vm.console_log.as_ref().expect("a VM has a console log");
    String::from_utf8_lossy(&tail_of_log(log, 1 << 20).unwrap_or_default()).into_owned()
}

/// Waits until these words stand in the console's log.
pub(crate) async fn console_says(vm: &VmHandle, words: &str) {
    let said = async || console_text(vm).contains(words).then_some(());
    if until(LONG, said).await.is_none() {
        panic!("no {words:?} on the console:\n{}", console_text(vm));
    }
}

/// Asks again and again until there is an answer; `None` at the deadline. For what no event tells.
pub(crate) async fn until<T>(limit: Duration, mut ask: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask().await {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        // For what no event tells.
        sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until the VM's state is one that `wanted` accepts, and returns it.
pub(crate) async fn state_becomes(
    qemu: &QemuHypervisor,
    vm: &VmHandle,
    wanted: impl Fn(&VmState) -> bool,
) -> VmState {
    let mut last = None;
    let found = until(LONG, async || {
        let state = qemu.state(vm).await.unwrap();
        let accepted = wanted(&state).then(|| state.clone());
        last = Some(state);
        accepted
    });
    let found = found.await;
    found.unwrap_or_else(|| panic!("it is still {last:?}; the console:\n{}", console_text(vm)))
}

/// Waits until a process is gone.
pub(crate) async fn gone(pid: Pid) {
    let Ok(fd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
        return;
    };
    let wait = tokio::task::spawn_blocking(move || {
        let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: LONG.as_secs().cast_signed(), tv_nsec: 0 };
        rustix::event::poll(&mut polled, Some(&limit)).unwrap()
    });
    assert_eq!(wait.await.unwrap(), 1, "process {pid} is still there after {LONG:?}");
}

/// Runs a script in the guest by its agent, and returns what it prints.
pub(crate) async fn sh(qemu: &QemuHypervisor, vm: &VmHandle, script: &str) -> String {
    let output = qemu.agent_exec(vm, "/bin/sh", &["-c", script], LONG).await;
    let output = output.unwrap_or_else(|error| panic!("{script}: {error}; {}", console_text(vm)));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// The monitor for people, as a program uses it.
pub(crate) struct Monitor(BufReader<std::os::unix::net::UnixStream>);

impl Monitor {
    pub(crate) fn of(run: &RunInfo) -> Self {
        let stream = std::os::unix::net::UnixStream::connect(run.monitor.as_ref().unwrap()).unwrap();
        let mut monitor = Self(BufReader::new(stream));
        monitor.execute("qmp_capabilities", json!({}));
        monitor
    }

    /// Executes a command; events and the greeting come in between.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.0.get_mut(), "{line}").unwrap();
        loop {
            let mut reply = String::new();
            assert_ne!(self.0.read_line(&mut reply).unwrap(), 0, "QEMU ended");
            let mut reply: Value = serde_json::from_str(&reply).unwrap();
            assert_eq!(reply.get("error"), None, "{line}");
            if let Some(found) = reply.get_mut("return") {
                return found.take();
            }
        }
    }

    /// Returns the names of the devices that have one.
    pub(crate) fn devices(&mut self) -> Vec<String> {
        let list = self.execute("qom-list", json!({ "path": "/machine/peripheral" }));
        let names = list.as_array().unwrap().iter().filter_map(|entry| entry["name"].as_str());
        names.filter(|name| *name != "type").map(str::to_owned).collect()
    }
}

/// Connects to the guest's agent.
pub(crate) async fn agent(vm: &VmHandle) -> GuestAgent {
    let path = run(vm).agent.as_ref().expect("a running VM has an agent's channel");
    let agent = GuestAgent::connect(path, LONG).await;
    agent.unwrap_or_else(|error| panic!("{error}; the console:\n{}", console_text(vm)))
}

/// Connects to the guest's console.
pub(crate) async fn console(qemu: &QemuHypervisor, vm: &VmHandle) -> UnixStream {
    match qemu.console_endpoint(vm).unwrap() {
        ConsoleEndpoint::UnixSocket(path) => UnixStream::connect(path).await.unwrap(),
        other => panic!("no Unix socket: {other:?}"),
    }
}

/// Says something to the guest's service on port 7 and returns whether its banner and its echo come
/// back.
///
/// The guest's inetd goes to the background before it listens, so a first call may come too early.
pub(crate) async fn echoes(addr: SocketAddr) -> bool {
    const BANNER: &str = "vmkit-guest: hello\n";
    const SAID: &str = "once more\n";
    let talk = async || {
        let mut stream = TcpStream::connect(addr).await?;
        stream.write_all(SAID.as_bytes()).await?;
        let mut heard = vec![0; BANNER.len() + SAID.len()];
        stream.read_exact(&mut heard).await?;
        std::io::Result::Ok(heard)
    };
    let answer = async || timeout(Duration::from_secs(20), talk()).await.ok()?.ok();
    let heard = until(Duration::from_secs(20), answer).await;
    heard.is_some_and(|heard| heard == format!("{BANNER}{SAID}").as_bytes())
}

/// Writes 64 KiB of one byte to a qcow2 disk that no process has open.
pub(crate) fn write_to_disk(disk: &Path, byte: u8) {
    qemu_io(disk, &format!("write -P {byte} 64k 64k"));
}

/// Checks what [`write_to_disk`] has written.
pub(crate) fn assert_on_disk(disk: &Path, byte: u8) {
    let printed = qemu_io(disk, &format!("read -P {byte} 64k 64k"));
    assert!(!printed.contains("Pattern verification failed"), "{}: {printed}", disk.display());
}

fn qemu_io(disk: &Path, command: &str) -> String {
    let output = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", command])
        .arg(disk)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
