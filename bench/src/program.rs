//! The program `vmkit` as a user runs it: from exec to exit, with its peak of memory.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio::runtime::{self, Runtime};
use vmkit::spec::{Accel, MachineType, Mib, RootDisk, VmName, VmSpec, VmSpecBuilder};
use vmkit::store::Home;
use vmkit::{QemuHypervisor, VmManager};
use vmkit_testkit::guest;
use wait4::Wait4;

use crate::Result;
use crate::by_hand::ask_all;
use crate::figures::{Figure, Pair, Target};

/// The most memory that any verb may have resident.
const MOST_MIB: f64 = 20.0;
/// The most that a pull may have, which unpacks and hashes on the way; the size of the image is all
/// the same.
const MOST_MIB_OF_PULL: f64 = 64.0;

/// How long firmwares are left alone, until they wait.
const SETTLING: Duration = Duration::from_secs(3);

/// The program, and what it was seen to need.
pub(crate) struct Program {
    path: PathBuf,
    dir: PathBuf,
    /// For each verb: its peak in bytes, and how long it took that time.
    peaks: BTreeMap<String, (u64, Duration)>,
}

impl Program {
    /// Finds the program beside this one; homes are made below `dir`.
    pub(crate) fn new(dir: &Path) -> Result<Self> {
        let path = std::env::current_exe()?.with_file_name("vmkit");
        if !path.is_file() {
            return Err(format!("{} is missing: `cargo xtask bench` builds it", path.display()).into());
        }
        Ok(Self { path, dir: dir.to_owned(), peaks: BTreeMap::new() })
    }

    /// Runs a verb to its end and returns how long it took.
    pub(crate) fn run(&mut self, label: &str, home: &Path, args: &[&str]) -> Result<Duration> {
        let mut command = Command::new(&self.path);
        command.arg("--home").arg(home).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let begin = Instant::now();
        let ended = command.spawn()?.wait4()?;
        let took = begin.elapsed();
        if !ended.status.success() {
            return Err(format!("vmkit {} ended with {}", args.join(" "), ended.status).into());
        }
        let peak = self.peaks.entry(label.to_owned()).or_insert((0, took));
        *peak = (peak.0.max(ended.rusage.maxrss), took.min(peak.1));
        Ok(took)
    }

    /// Forgets what a run needed, since its figures would be another program's.
    pub(crate) fn forget(&mut self, label: &str) {
        self.peaks.remove(label);
    }

    /// Runs every verb once on a VM of its own, for the sake of its memory.
    pub(crate) fn every_verb(&mut self) -> Result<()> {
        let home = self.dir.join("verbs");
        let guest = guest::tiny();
        let path = |path: &Path| path.to_str().map(str::to_owned).ok_or("a path that is not UTF-8");
        let (kernel, initrd) = (path(&guest.kernel)?, path(&guest.initrd)?);
        let cmdline = guest.cmdline(MachineType::Q35);
        let create = ["create", "one", "--accel", "tcg"];
        let create =
            [&create[..], &["--kernel", &kernel, "--initrd", &initrd, "--cmdline", cmdline]].concat();
        // The first time, the program asks QEMU for its version, and what a child needed would
        // count as its own.
        self.run("", &home, &create)?;
        self.run("", &home, &["rm", "one"])?;
        self.peaks.remove("");
        self.run("create", &home, &create)?;
        let began = self.verbs_of_one(&home);
        let removed = self.run("rm", &home, &["rm", "one", "--force"]);
        began.and(removed.map(drop))
    }

    fn verbs_of_one(&mut self, home: &Path) -> Result<()> {
        for args in [
            &["start", "one"][..],
            &["wait", "one", "running", "--timeout", "60"],
            &["ls"],
            &["info", "one"],
            &["ip", "one"],
            &["logs", "one"],
            &["suspend", "one"],
            &["resume", "one"],
            &["restart", "one", "--timeout", "0"],
            &["stop", "one", "--timeout", "0"],
            &["completions", "bash"],
        ] {
            self.run(args[0], home, args)?;
        }
        Ok(())
    }

    /// Returns the peaks as a person reads them.
    pub(crate) fn memory_table(&self) -> String {
        let mut text = String::new();
        for (verb, (bytes, took)) in &self.peaks {
            let mib = *bytes as f64 / f64::from(1 << 20);
            let most = if verb == "image pull" { MOST_MIB_OF_PULL } else { MOST_MIB };
            let verdict = if mib <= most { "holds" } else { "MISSED" };
            let ms = took.as_secs_f64() * 1000.0;
            let _ = writeln!(text, "vmkit {verb:<14}{mib:>8.1} MiB {ms:>8.2} ms   {most} MiB {verdict}");
        }
        text
    }

    /// Measures `vmkit --version` beside `/bin/true`.
    pub(crate) fn version(&mut self, runs: u32) -> Result<Figure> {
        let home = self.dir.join("none");
        Figure::measure("version", Target::MsMore(5.0), runs, &mut Version { program: self, home })
    }

    /// Measures `vmkit ls` of VMs that have all been started and stopped.
    pub(crate) fn ls_500_stopped(&mut self, runs: u32) -> Result<Figure> {
        let guest = guest::tiny();
        let home = Populated::new(&self.dir.join("500"), 500, |name| {
            guest.spec(name.as_str(), MachineType::Q35, "")
        })?;
        for name in &home.names {
            home.runtime.block_on(home.manager.start(name))?;
            home.runtime.block_on(home.manager.stop(name, Duration::ZERO))?;
        }
        home.check(&self.path, "stopped")?;
        let records = home.names.iter().map(|name| home.manager.home().vm(name).join("vm.json")).collect();
        let mut pair = LsStopped { program: self, home: &home, records };
        Figure::measure("ls_500_stopped", Target::Ms(20.0), runs, &mut pair)
    }

    /// Measures `vmkit ls` of running VMs.
    pub(crate) fn ls_20_running(&mut self, runs: u32) -> Result<Figure> {
        let dir = self.dir.join("20");
        let image = self.dir.join("empty.img");
        fs::File::create(&image)?.set_len(1 << 20)?;
        // A firmware that finds nothing to boot is as idle as a guest gets, and is so at once:
        // twenty booting kernels would take a small machine minutes.
        let home = Populated::new(&dir, 20, |name| {
            VmSpec::builder(name).disk(RootDisk { image: image.clone(), size: None }).accel(Accel::Tcg)
        })?;
        let mut monitors = Vec::new();
        for name in &home.names {
            let vm = home.runtime.block_on(home.manager.start(name))?;
            let monitor = vm.run.and_then(|run| run.monitor).ok_or("a running VM without a monitor")?;
            monitors.push(monitor.with_file_name("qmp.sock"));
        }
        std::thread::sleep(SETTLING);
        home.check(&self.path, "running")?;
        let mut pair = LsRunning { program: self, home: &home, monitors };
        Figure::measure("ls_20_running", Target::Ms(30.0), runs, &mut pair)
    }
}

struct Version<'a> {
    program: &'a mut Program,
    home: PathBuf,
}

impl Pair for Version<'_> {
    fn ours(&mut self) -> Result<Duration> {
        self.program.run("--version", &self.home, &["--version"])
    }

    fn bare(&mut self) -> Result<Duration> {
        let mut command = Command::new("/bin/true");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let begin = Instant::now();
        command.spawn()?.wait()?;
        Ok(begin.elapsed())
    }
}

struct LsStopped<'a> {
    program: &'a mut Program,
    home: &'a Populated,
    records: Vec<PathBuf>,
}

impl Pair for LsStopped<'_> {
    fn ours(&mut self) -> Result<Duration> {
        self.program.run("ls (500 stopped)", &self.home.dir, &["ls"])
    }

    /// Reads the bytes of the same records, and does nothing with them.
    fn bare(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        for record in &self.records {
            fs::read(record)?;
        }
        Ok(begin.elapsed())
    }
}

struct LsRunning<'a> {
    program: &'a mut Program,
    home: &'a Populated,
    monitors: Vec<PathBuf>,
}

impl Pair for LsRunning<'_> {
    fn ours(&mut self) -> Result<Duration> {
        self.program.run("ls (20 running)", &self.home.dir, &["ls"])
    }

    fn bare(&mut self) -> Result<Duration> {
        ask_all(&self.monitors)
    }
}

/// A home with VMs in it; they are removed when it is dropped.
struct Populated {
    dir: PathBuf,
    runtime: Runtime,
    manager: VmManager<QemuHypervisor>,
    names: Vec<VmName>,
}

impl Populated {
    fn new(dir: &Path, count: usize, spec: impl Fn(VmName) -> VmSpecBuilder) -> Result<Self> {
        let home = Home::at(dir)?;
        let qemu = QemuHypervisor::builder(home.vms(), home.run());
        let qemu = qemu.cache_dir(home.cache()).build();
        let mut populated = Self {
            dir: dir.to_owned(),
            runtime: runtime::Builder::new_current_thread().enable_all().build()?,
            manager: VmManager::new(qemu, home),
            names: Vec::new(),
        };
        for index in 0..count {
            let spec = spec(VmName::new(format!("vm-{index}"))?).memory(Mib::new(64)?).build()?;
            let vm = populated.runtime.block_on(populated.manager.create(spec))?;
            populated.names.push(vm.name().clone());
        }
        Ok(populated)
    }

    /// Checks that the program lists all VMs in this state: else what is measured is something
    /// else.
    fn check(&self, program: &Path, state: &str) -> Result<()> {
        let output = Command::new(program).arg("--home").arg(&self.dir).args(["ls", "--json"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let listed: serde_json::Value = serde_json::from_str(&text)?;
        let states = listed.as_array().map(|all| all.iter().filter(|vm| vm["state"] == state).count());
        match states {
            Some(count) if count == self.names.len() => Ok(()),
            _ => Err(format!("not all {} VMs are {state}: {text}", self.names.len()).into()),
        }
    }
}

impl Drop for Populated {
    fn drop(&mut self) {
        for name in &self.names {
            // What can't be removed lies in a temporary directory, and its QEMU has been told of by
            // a failure before.
            let _ = self.runtime.block_on(self.manager.remove(name, true));
        }
    }
}
