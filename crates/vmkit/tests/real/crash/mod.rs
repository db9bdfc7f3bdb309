//! The manager over the real QEMU is killed before every step of every operation, its files fail
//! one by one, and its home is moved, copied, and entered by another user.

mod clones;
mod copied_home;
#[cfg(feature = "images")]
mod exports;
mod foreign_home;
mod moved_home;
mod moved_vm;
mod snapshots;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use vmkit::spec::{
    Accel, Boot, CloudInitConfig, DataDisk, Firmware, MachineType, Mib, PortForward, RootDisk, VmName, VmSpec,
};
use vmkit::store::Home;
use vmkit::{ErrorKind, QemuHypervisor, Result, VmManager};
use vmkit_testkit::crash::{self, FaultDuration, StepFault, StepSample};

/// What is done before an operation so that it has its full way to go, and the states that it may
/// leave when it is cut.
const LIVES: [CrashedLife; 13] = [
    ("create", &[], &["", "failed", "prepared"]),
    ("start", &["create"], &["prepared", "stopped", "running"]),
    ("start", &["create", "start", "stop"], &["stopped", "running"]),
    // While it is being ended, QEMU may pass through any of these.
    ("stop", &["create", "start"], &["running", "stopped"]),
    ("suspend", &["create", "start"], &["running", "suspended"]),
    ("resume", &["create", "start", "suspend"], &["suspended", "running"]),
    ("save", &["create", "start"], &["running", "suspended", "saved"]),
    ("start", &["create", "start", "save"], &["saved", "suspended", "running"]),
    ("stop", &["create", "start", "save"], &["saved", "suspended", "running", "stopped"]),
    ("forward", &["create", "start"], &["running"]),
    ("unforward", &["create", "start", "forward"], &["running"]),
    ("remove", &["create", "start"], &["running", "stopped", "failed", ""]),
    ("remove", &["create"], &["prepared", "stopped", "failed", ""]),
];

/// An operation that is interrupted, those before it, and the states that may be found then.
type CrashedLife = (&'static str, &'static [&'static str], &'static [&'static str]);

/// The files of a home: whose each is, its mode, and its bytes.
type HomeFiles = BTreeMap<PathBuf, (u32, u32, Vec<u8>)>;

/// One home below a directory, over the real QEMU.
struct World {
    dir: PathBuf,
    home: PathBuf,
    manager: VmManager<QemuHypervisor>,
}

/// A test that failed leaves no QEMU.
impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            crate::harness::kill_below(&self.dir);
        }
    }
}

impl World {
    fn at(dir: &Path) -> Self {
        Self::of(dir, "home")
    }

    /// Moves the home to another name, whatever runs in it.
    fn moved(dir: &Path) -> Self {
        if dir.join("home").exists() {
            fs::rename(dir.join("home"), dir.join("moved")).unwrap();
        }
        Self::of(dir, "moved")
    }

    fn of(dir: &Path, name: &str) -> Self {
        let home = Home::at(dir.join(name)).unwrap();
        let qemu = QemuHypervisor::builder(home.vms(), home.run())
            .cache_dir(home.cache())
            .keeper(foreign_home::keeper(dir))
            .build();
        let manager = VmManager::new(qemu, home);
        Self { dir: dir.to_owned(), home: dir.join(name), manager }
    }

    fn prepared(dir: &Path, words: &[&str]) -> Self {
        fs::write(dir.join("base.img"), halting_disk()).unwrap();
        let world = Self::at(dir);
        for word in words {
            runtime().block_on(world.operate(word)).unwrap();
        }
        world
    }

    async fn operate(&self, word: &str) -> Result<()> {
        // The guest ignores the power button: a stop takes the whole way, force included.
        let (name, soon) = (web(), Duration::from_millis(50));
        match word {
            "create" => {
                let disk = RootDisk { image: self.dir.join("base.img"), size: None };
                let fresh = DataDisk::Fresh { size: Mib::new(1)? };
                let spec = VmSpec::builder(web()).machine(MachineType::Q35).accel(Accel::Tcg);
                let spec = spec.boot(Boot::Firmware(Firmware::Bios)).memory(Mib::new(32)?).disk(disk);
                let spec = spec.data_disks(vec![fresh]).cloud_init(CloudInitConfig::default()).build()?;
                self.manager.create(spec).await.map(drop)
            }
            "start" => self.manager.start(&name).await.map(drop),
            "stop" => self.manager.stop(&name, soon).await.map(drop),
            "suspend" => self.manager.suspend(&name).await.map(drop),
            "save" => self.manager.save(&name).await.map(drop),
            "resume" => self.manager.resume(&name).await.map(drop),
            "forward" => self.manager.add_forward(&name, &echo()).await.map(drop),
            "unforward" => self.manager.remove_forward(&name, &echo()).await.map(drop),
            "remove" => self.manager.remove(&name, true).await,
            #[cfg(feature = "images")]
            _ if exports::WORDS.contains(&word) => self.operate_on_exports(word).await,
            _ => self.operate_on_snapshots(word).await,
        }
    }

    /// Returns the state that the list shows; `""` where it shows no VM.
    ///
    /// Another test's thread that is about to start a process has copies of all descriptors between
    /// fork and exec, the lock of this one's VM among them, and so the VM may be in use for that
    /// moment.
    fn listed(&self) -> &'static str {
        let limit = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let list = runtime().block_on(self.manager.list()).unwrap();
            assert!(list.len() <= 1, "{list:?}");
            match list.first().map(|listed| listed.handle.as_ref()) {
                None => return "",
                Some(Ok(vm)) => return vm.state.name(),
                Some(Err(error)) => {
                    let passes = error.kind() == vmkit::ErrorKind::Busy && std::time::Instant::now() < limit;
                    assert!(passes, "{error}");
                    // A keeper that is told nothing holds the lock for a moment.
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    fn remains(&self) -> Vec<PathBuf> {
        ["vms", "run"].iter().flat_map(|part| paths_below(&self.home.join(part))).collect()
    }

    /// Returns the commands of the processes, other than this one, that have anything below the
    /// directory open.
    fn holders(&self) -> Vec<String> {
        let mut holders = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let is_other = |name: &str| name.parse().is_ok_and(|pid: u32| pid != std::process::id());
            if !entry.file_name().to_str().is_some_and(is_other) {
                continue;
            }
            let open = fs::read_dir(entry.path().join("fd")).into_iter().flatten().flatten();
            let ours = |fd: fs::DirEntry| {
                fs::read_link(fd.path()).is_ok_and(|target| target.starts_with(&self.home))
            };
            if open.into_iter().any(ours) {
                let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
                holders.push(String::from_utf8_lossy(&command).replace('\0', " "));
            }
        }
        holders
    }

    /// Returns whether nothing of the VM is gone.
    fn is_whole(&self) -> bool {
        let parts = ["vm.json", "owner", "root.qcow2", "data-0.qcow2"];
        parts.iter().all(|part| self.home.join("vms/web").join(part).exists())
    }

    /// Returns the files of the home, but for the logs, which a guest writes: whose each is, its
    /// mode and its bytes.
    fn files(&self) -> HomeFiles {
        let logs = ["log", "1"].map(Some);
        let is_log = |path: &PathBuf| logs.contains(&path.extension().and_then(|end| end.to_str()));
        let paths = paths_below(&self.home).into_iter().filter(|path| !is_log(path));
        let of = |path: PathBuf| {
            let found = path.symlink_metadata().ok()?;
            let bytes = if found.is_file() { fs::read(&path).unwrap_or_default() } else { Vec::new() };
            Some((path, (found.uid(), found.mode(), bytes)))
        };
        paths.filter_map(of).collect()
    }

    /// Waits until nothing that a killed process left is about to end: a keeper without a QEMU ends
    /// by itself.
    fn settles(&self) {
        let limit = Instant::now() + Duration::from_secs(20);
        while self.qemus() == 0 && !self.holders().is_empty() {
            assert!(Instant::now() < limit, "{:?}", self.holders());
            // No child of this process: its end is no event.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Checks that these files are as they were, while QEMU may have ended that was about to.
    fn assert_untouched(&self, before: &HomeFiles, qemus: usize, place: &str) {
        let mut now = self.files();
        let mut before = before.clone();
        if self.qemus() != qemus {
            // The end of a run is in its run file, and its sockets are gone.
            let lasts =
                |path: &PathBuf| ["vm.json", "run.json", "owner"].iter().any(|end| path.ends_with(end));
            let is_disk = |path: &PathBuf| path.extension().is_some_and(|end| end == "qcow2" || end == "iso");
            let stays = |path: &PathBuf| lasts(path) || is_disk(path);
            before.retain(|path, _| stays(path));
            now.retain(|path, _| stays(path));
        }
        let paths: BTreeSet<&PathBuf> = before.keys().chain(now.keys()).collect();
        let changed: Vec<_> = paths.into_iter().filter(|path| before.get(*path) != now.get(*path)).collect();
        assert!(changed.is_empty(), "{place}: changed in {}: {changed:?}", self.home.display());
    }

    fn qemus(&self) -> usize {
        self.holders().iter().filter(|command| command.contains("qemu-system")).count()
    }

    /// Checks that nothing is left once the VM is removed: no file, no socket, no process.
    fn assert_removable(&self, place: &str) {
        match runtime().block_on(self.manager.remove(&web(), true)) {
            Err(error) if error.kind() != ErrorKind::NotFound => panic!("{place}: {error:?}"),
            _ => assert!(self.remains().is_empty(), "{place}: {:?}", self.remains()),
        }
        // A keeper that was told nothing ends by itself, a moment after the one who started it.
        let patience = Instant::now() + Duration::from_secs(20);
        while !self.holders().is_empty() {
            assert!(Instant::now() < patience, "{place}: {:?}", self.holders());
            // No child of this process: its end is no event.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn go_on(&self, word: &str, state: &str, place: &str) {
        let again = runtime().block_on(self.operate(word));
        let is_done = matches!((word, state), ("create", "prepared") | ("remove", "") | ("unforward", _))
            || snapshots::is_there_once(word)
            || word == "export"
            || (word == "import" && state == "prepared");
        match again {
            Err(error) if is_done => {
                let kinds = [ErrorKind::AlreadyExists, ErrorKind::NotFound];
                assert!(kinds.contains(&error.kind()), "{place}: {error:?}");
            }
            again => again.unwrap_or_else(|error| panic!("{place}: {error:?}")),
        }
        if snapshots::WORDS.contains(&word) {
            return self.assert_snapshots(state, place);
        }
        let (reached, qemus) = match word {
            "create" | "export" | "import" => ("prepared", 0),
            "start" | "resume" | "forward" | "unforward" => ("running", 1),
            "stop" => ("stopped", 0),
            "suspend" => ("suspended", 1),
            "save" => ("saved", 0),
            _ => ("", 0),
        };
        assert_eq!(self.listed(), reached, "{place}");
        #[cfg(feature = "images")]
        if exports::WORDS.contains(&word) {
            self.assert_export_tidy(place);
        }
        assert_eq!(self.qemus(), qemus, "{place}");
        if qemus == 1 {
            let vm = runtime().block_on(self.manager.info(&web())).unwrap();
            let run = vm.run.unwrap_or_else(|| panic!("{place}: the facts of the run are lost"));
            let forwards = run.forwards.iter().filter(|it| it.guest_port == echo().guest_port).count();
            assert_eq!(forwards, usize::from(word == "forward"), "{place}: {:?}", run.forwards);
        }
    }
}

/// A forward to the guest's port 7.
fn echo() -> PortForward {
    "7".parse().unwrap()
}

fn web() -> VmName {
    VmName::new("web").unwrap()
}

/// Returns a disk whose guest halts as soon as it is loaded: hundreds of guests are started here,
/// and with a kernel each would use a CPU and tens of megabytes for as long as it is there.
fn halting_disk() -> Vec<u8> {
    const HALT_AND_JUMP_BACK: [u8; 3] = [0xf4, 0xeb, 0xfd];
    let mut disk = vec![0; 1 << 20];
    disk[..3].copy_from_slice(&HALT_AND_JUMP_BACK);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// One thread, since steps are counted by thread.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn paths_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| paths_below(&path).into_iter().chain([path])).collect()
}

/// The test that is killed: with a task it does what the task says, without one a whole life.
#[test]
fn a_whole_life_leaves_nothing() {
    let Some(task) = crash::task() else {
        let temp = tempfile::tempdir().unwrap();
        let words = ["create", "start", "suspend", "resume", "stop", "start"];
        World::prepared(temp.path(), &words).assert_removable("after a whole life");
        return;
    };
    foreign_home::become_owner(&task.dir);
    let world = World::at(&task.dir);
    task.arm();
    runtime().block_on(world.operate(&task.scenario)).unwrap();
}

#[test]
fn after_a_kill_the_state_is_true_and_the_vm_can_be_used_or_removed() {
    kill_at_every_step_of(&LIVES, true);
}

/// Kills a process at every step of an operation. Then another one goes on or, if `may_move`,
/// removes the VM of the home that was moved: which of the two is drawn for each step.
fn kill_at_every_step_of(lives: &'static [CrashedLife], may_move: bool) {
    let mut sample = StepSample::new();
    for (word, before, allowed) in lives.iter().copied() {
        let check = |dir: &Path, place: &str| {
            // Who removes what is left may find it in another place.
            let goes_on = !may_move || sample.either();
            let world = if goes_on { World::at(dir) } else { World::moved(dir) };
            let state = world.listed();
            assert!(allowed.contains(&state), "{place}: {state}");
            assert!(world.qemus() <= 1, "{place}: {:?}", world.holders());
            if word == "remove" && world.is_whole() {
                let started = runtime().block_on(world.operate("start"));
                started.unwrap_or_else(|error| panic!("{place}: nothing was removed yet: {error}"));
            }
            if goes_on {
                world.go_on(word, state, place);
            }
            world.assert_removable(place);
        };
        let prepare = |dir: &Path| drop(World::prepared(dir, before));
        crash::kill_at_every_step("crash::a_whole_life_leaves_nothing", word, prepare, check);
    }
}

#[test]
fn a_failing_system_never_leaves_an_unfinished_or_a_lost_vm() {
    fail_at_every_step_of(&LIVES);
}

/// Lets every step of an operation fail, alone or with all that follow: which of the two is drawn
/// for each step.
fn fail_at_every_step_of(lives: &'static [CrashedLife]) {
    let mut sample = StepSample::new();
    for (word, before, allowed) in lives {
        let steps = (1..).take_while(|at| {
            let lasting = if sample.either() { FaultDuration::Once } else { FaultDuration::FromThenOn };
            fail_step(word, before, allowed, *at, lasting)
        });
        assert!(steps.count() > 0, "`{word}` took no step");
    }
}

/// Lets a step of an operation fail; returns whether it has so many steps.
fn fail_step(word: &str, before: &[&str], allowed: &[&str], at: u64, lasting: FaultDuration) -> bool {
    let temp = tempfile::tempdir().unwrap();
    let world = World::prepared(temp.path(), before);
    let fault = StepFault::at(at, lasting, io::ErrorKind::StorageFull);
    let outcome = runtime().block_on(world.operate(word));
    let failed = fault.failed();
    drop(fault);
    let Some(step) = failed else {
        outcome.unwrap();
        world.assert_removable(word);
        return false;
    };
    let place = format!("{word}, step {at} `{step}` failed {lasting:?}: {outcome:?}");
    let state = world.listed();
    assert!(allowed.contains(&state), "{place}: {state}");
    assert!(world.qemus() <= 1, "{place}: {:?}", world.holders());
    if ["create", "import"].contains(&word) && lasting == FaultDuration::Once && outcome.is_err() {
        assert!(world.remains().is_empty(), "{place}: {:?}", world.remains());
    }
    world.assert_removable(&place);
    true
}

#[test]
fn twenty_processes_that_start_one_vm_boot_one_qemu() {
    let temp = tempfile::tempdir().unwrap();
    let world = World::prepared(temp.path(), &["create"]);
    let begin = |_| crash::spawn("crash::a_whole_life_leaves_nothing", "start", temp.path(), 0).unwrap();
    let children: Vec<_> = (0..20).map(begin).collect();
    for child in children {
        crash::assert_passed(&child.wait_with_output().unwrap());
    }
    assert_eq!((world.listed(), world.qemus()), ("running", 1));
    world.assert_removable("after twenty starts");
}
