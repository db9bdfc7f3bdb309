//! Real VMs through the command: a host for each test that leaves nothing running, and ways to
//! listen and to wait.

use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use vmkit::spec::MachineType;
use vmkit_testkit::guest::{self, DebianGuest};

use crate::support::{Answer, Host, answer};

/// How long anything may take that an emulated guest does on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(180);

/// Marks the process of a test that runs in its own namespaces.
const INSIDE: &str = "VMKIT_TEST_INSIDE";

/// A host with the real QEMU; when it is dropped, by a panic too, nothing that was started on it is
/// left.
pub(crate) struct Life(Host);

impl Deref for Life {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.0
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        for process in self.processes() {
            let _ = kill_process(process.pid, Signal::KILL);
        }
        if std::env::var_os(INSIDE).is_some() {
            // What is mounted on the home ends with the namespace, but the directory below it is to
            // be removed now.
            while umount(&self.home()) {}
        }
    }
}

/// A process that has something of the host's home open, or on its command line.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    pub(crate) cmdline: String,
}

impl Life {
    pub(crate) fn new() -> Self {
        Self(Host::with_real_qemu())
    }

    /// Creates a VM of the tiny guest, with these words added to its kernel's command line.
    pub(crate) fn make(&self, name: &str, words: &str) {
        self.must(create_arguments(&guest::tiny(), name, words));
    }

    /// Creates a VM of the tiny guest and waits until its shell is there.
    pub(crate) fn boot(&self, name: &str, words: &str) {
        self.make(name, words);
        self.must(["start", name]);
        self.says(name, "vmkit-guest# ");
    }

    pub(crate) fn info(&self, name: &str) -> Value {
        serde_json::from_str(&self.must(["info", name, "--json"])).unwrap()
    }

    pub(crate) fn state(&self, name: &str) -> String {
        self.info(name)["state"].as_str().unwrap().to_owned()
    }

    /// Returns the VM's row in `ls --json`.
    pub(crate) fn row(&self, name: &str) -> Value {
        let rows: Vec<Value> = serde_json::from_str(&self.must(["ls", "--json"])).unwrap();
        rows.into_iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no VM {name} in the list"))
    }

    /// Returns QEMU's process.
    pub(crate) fn qemu(&self, name: &str) -> Pid {
        let pid = self.info(name)["run"]["pid"].as_i64().expect("a running VM has a process");
        Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }

    /// Resets the guest from outside, by the monitor for people.
    pub(crate) fn reset(&self, name: &str) {
        let socket = self.info(name)["run"]["monitor"].as_str().unwrap().to_owned();
        let mut monitor = UnixStream::connect(socket).unwrap();
        monitor.write_all(b"{\"execute\":\"qmp_capabilities\"}{\"execute\":\"system_reset\"}").unwrap();
        let (mut said, mut line) = (BufReader::new(monitor), String::new());
        while !line.contains("RESET") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "QEMU has closed the monitor");
        }
    }

    /// Waits until these words stand in the console's log.
    pub(crate) fn says(&self, name: &str, words: &str) {
        let log = self.home().join("vms").join(name).join("console.log");
        let text = || String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
        if !until(LONG, || text().contains(words)) {
            panic!("no {words:?} on the console:\n{}", text());
        }
    }

    /// Runs the command to its end, and returns how long that took as well.
    pub(crate) fn timed(&self, arguments: &[&str]) -> (Answer, Duration) {
        let began = Instant::now();
        (self.vmkit(arguments), began.elapsed())
    }

    /// Starts the command.
    pub(crate) fn begin(&self, arguments: &[&str]) -> Begun {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Begun::of(&mut command)
    }

    /// Returns the processes that are at work on this home.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let home = self.home();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let Some(pid) = pid else { continue };
            let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
            let opened = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
            let mut opened = opened.filter_map(|fd| fs::read_link(fd.path()).ok());
            if cmdline.contains(home.to_str().unwrap()) || opened.any(|path| path.starts_with(&home)) {
                found.push(Process { pid, cmdline });
            }
        }
        found
    }

    /// Returns the QEMUs that run in this home.
    pub(crate) fn qemus(&self) -> Vec<Process> {
        let mut found = self.processes();
        found.retain(|process| process.cmdline.contains("qemu-system"));
        found
    }

    /// Returns what lies in this home of any VM.
    pub(crate) fn files(&self) -> Vec<PathBuf> {
        let in_dir = |name: &str| fs::read_dir(self.home().join(name)).into_iter().flatten().flatten();
        in_dir("vms").chain(in_dir("run")).map(|entry| entry.path()).collect()
    }

    /// Checks that all VMs were removed without a trace. A keeper ends a moment after its QEMU.
    pub(crate) fn assert_empty(&self, after: &str) {
        until(Duration::from_secs(5), || self.processes().is_empty());
        let processes = self.processes();
        assert!(processes.is_empty(), "{after}: {processes:?}");
        let files = self.files();
        assert!(files.is_empty(), "{after}: {files:?}");
    }
}

/// Returns the arguments that make a VM of this guest.
pub(crate) fn create_arguments(guest: &DebianGuest, name: &str, words: &str) -> Vec<String> {
    let cmdline = format!("{} {words}", guest.cmdline(MachineType::Q35));
    let (kernel, initrd) = (guest.kernel.to_str().unwrap(), guest.initrd.to_str().unwrap());
    let memory = guest.memory.to_string();
    let mut arguments = vec!["create", name, "--accel", "tcg", "--memory", &memory];
    arguments.extend(["--kernel", kernel, "--initrd", initrd, "--cmdline", &cmdline]);
    if let Some(disk) = &guest.disk {
        arguments.extend(["--image", disk.to_str().unwrap()]);
    }
    arguments.into_iter().map(str::to_owned).collect()
}

/// A command at work; it is killed when it is dropped.
pub(crate) struct Begun(Option<Child>);

impl Begun {
    pub(crate) fn of(command: &mut Command) -> Self {
        Self(Some(command.spawn().unwrap()))
    }

    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("only the last method takes it")
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(self.0.as_ref().expect("only the last method takes it"))
    }

    /// Returns whether it waits for changes in a directory: it has an inotify descriptor.
    pub(crate) fn watches(&self) -> bool {
        let files = fs::read_dir(format!("/proc/{}/fd", self.pid())).into_iter().flatten().flatten();
        files
            .filter_map(|file| fs::read_link(file.path()).ok())
            .any(|file| file == Path::new("anon_inode:inotify"))
    }

    /// Takes its standard input; dropped, it has ended.
    pub(crate) fn input(&mut self) -> ChildStdin {
        self.child().stdin.take().unwrap()
    }

    /// Takes its standard output to listen to.
    pub(crate) fn output(&mut self) -> Ear {
        Ear::new(File::from(OwnedFd::from(self.child().stdout.take().unwrap())))
    }

    /// Waits until it has ended, and returns what it said.
    #[track_caller]
    pub(crate) fn ended(mut self, limit: Duration) -> Answer {
        let pid = self.pid();
        let child = self.0.take().expect("it was not taken before");
        let reader = thread::spawn(|| answer(child.wait_with_output().unwrap()));
        let in_time = has_ended(pid, limit);
        if !in_time {
            let _ = kill_process(pid, Signal::KILL);
        }
        let answer = reader.join().unwrap();
        assert!(in_time, "a command was still at work after {limit:?}: {answer:?}");
        answer
    }

    /// Kills it where it stands.
    pub(crate) fn kill(mut self) {
        self.child().kill().unwrap();
        self.child().wait().unwrap();
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Moments that a seed gives. The seed is printed, and `VMKIT_TEST_SEED` repeats it.
pub(crate) struct Moments(u64);

impl Moments {
    pub(crate) fn new() -> Self {
        let seed = match std::env::var("VMKIT_TEST_SEED") {
            Ok(seed) => seed.parse().expect("VMKIT_TEST_SEED is a whole number"),
            Err(_) => RandomState::new().hash_one(0),
        };
        eprintln!("to repeat it: VMKIT_TEST_SEED={seed}");
        Self(seed)
    }

    /// Returns a moment within a duration: the next step of SplitMix64.
    fn next(&mut self, within: Duration) -> Duration {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        within * u32::try_from((mixed ^ (mixed >> 31)) % 1000).unwrap() / 1000
    }

    /// Kills a command some time after it began, at most `within`, and returns when.
    pub(crate) fn kill(&mut self, life: &Life, arguments: &[&str], within: Duration) -> Duration {
        let after = self.next(within);
        let begun = life.begin(arguments);
        // The moment is the test.
        sleep(after);
        begun.kill();
        after
    }
}

/// Listens to a pipe or a terminal.
pub(crate) struct Ear {
    file: File,
    pub(crate) heard: String,
}

impl Ear {
    pub(crate) fn new(file: File) -> Self {
        Self { file, heard: String::new() }
    }

    /// Listens until these words were heard.
    pub(crate) fn hears(&mut self, words: &str) {
        let deadline = Instant::now() + LONG;
        while !self.heard.contains(words) {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(&self.file, PollFlags::IN)];
            let ready = poll(&mut polled, Some(&Timespec::try_from(left).unwrap())).unwrap();
            assert!(ready > 0, "not heard: {words:?}, but {:?}", self.heard);
            let mut bytes = [0; 4096];
            let count = self.file.read(&mut bytes).unwrap_or(0);
            assert!(count > 0, "at its end not heard: {words:?}, but {:?}", self.heard);
            self.heard.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    }

    /// Listens to the end, and returns all that was heard.
    pub(crate) fn rest(&mut self) -> String {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes).unwrap();
        self.heard.push_str(&String::from_utf8_lossy(&bytes));
        self.heard.clone()
    }

    /// Types something, where this is a terminal.
    pub(crate) fn types(&mut self, text: &str) {
        self.file.write_all(text.as_bytes()).unwrap();
    }
}

/// Waits until a process has ended, be it reaped or not.
pub(crate) fn has_ended(pid: Pid, limit: Duration) -> bool {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    let mut polled = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::try_from(limit).unwrap())).unwrap() > 0
}

/// Asks again and again until it is so; for what no event tells.
pub(crate) fn until(limit: Duration, mut is_so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    while !is_so() {
        if Instant::now() >= deadline {
            return false;
        }
        // For what no event tells.
        sleep(Duration::from_millis(20));
    }
    true
}

/// Runs the test once more in a process with mounts and process ids of its own, or says aloud why
/// it is skipped.
///
/// With that process everything in the namespaces ends, however it ends.
pub(crate) fn in_own_mounts<F: Fn()>(test: F) {
    if std::env::var_os(INSIDE).is_some() {
        return test();
    }
    let apart = |program: &Path| {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]);
        if !rustix::process::geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.arg("--mount-proc").arg(program);
        command
    };
    let mut mount = apart(Path::new("mount"));
    let tried = mount.args(["-t", "tmpfs", "none", "/mnt"]).output().expect("util-linux is installed");
    if !tried.status.success() {
        let why = String::from_utf8_lossy(&tried.stderr).into_owned();
        return eprintln!("SKIP: no file system can be mounted for a test: {}", why.trim());
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
}

/// Runs `mount` with these arguments.
pub(crate) fn mount(arguments: &[&str], at: &Path) {
    let output = Command::new("mount").args(arguments).arg(at).output().unwrap();
    assert!(output.status.success(), "mount {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn umount(at: &Path) -> bool {
    Command::new("umount")
        .arg("--lazy")
        .arg(at)
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}
