//! The manager over Propolis is killed before every step of every operation, its files fail one by
//! one, and so does every command of the host; the host and the server are fakes.

use std::cell::RefCell;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use vmkit::spec::{BackendOptions, DataDisk, Mib, NetworkConfig, RootDisk, VmName, VmSpec};
use vmkit::store::Home;
use vmkit::{ErrorKind, PropolisHypervisor, Result, VmManager};
use vmkit_testkit::crash::{self, FaultDuration, StepFault};
use vmkit_testkit::propolis::illumos::{self, FakeIllumos};
use vmkit_testkit::propolis::{FakePropolis, FakeSetup};

const TOOLS: &str = env!("CARGO_BIN_EXE_vmkit-fake-illumos");
const SERVER: &str = env!("CARGO_BIN_EXE_vmkit-fake-propolis");
/// It becomes a keeper where it is called as one.
const KEEPER: &str = env!("CARGO_BIN_EXE_vmkit-faulty-qemu");

/// What is done before an operation so that it has its full way to go, and the states that it may
/// leave when it is cut.
const LIVES: [(&str, &[&str], &[&str]); 6] = [
    ("create", &[], &["", "failed", "prepared"]),
    // A server that has made its VM and was never told to run it is a start that failed.
    ("start", &["create"], &["prepared", "stopped", "failed", "running"]),
    ("start", &["create", "start", "stop"], &["stopped", "failed", "running"]),
    ("stop", &["create", "start"], &["running", "failed", "stopped"]),
    ("remove", &["create", "start"], &["running", "stopped", "failed", ""]),
    ("remove", &["create"], &["prepared", "stopped", "failed", ""]),
];

/// Where the servers of a world's VMs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Servers {
    /// Each VM has its own.
    Own,
    /// There is one that outlives everything.
    Elsewhere,
}

/// One home and one host below a directory.
struct World {
    dir: PathBuf,
    host: FakeIllumos,
    manager: VmManager<PropolisHypervisor>,
    /// Ends with the world.
    _server: Option<FakePropolis>,
}

impl World {
    /// Opens the world that another process has created.
    fn at(dir: &Path) -> Self {
        Self::over(dir, FakeIllumos::open(&dir.join("host")))
    }

    fn over(dir: &Path, host: FakeIllumos) -> Self {
        let home = Home::at(dir.join("home")).unwrap();
        let propolis = PropolisHypervisor::builder(home.vms())
            .search_path(host.path().as_os_str())
            .bootrom(host.bootrom())
            .dataset("tank/vm")
            .dev_vmm(host.dev().join("vmm"))
            .keeper(KEEPER)
            .build();
        let manager = VmManager::new(propolis, home);
        Self { dir: dir.to_owned(), host, manager, _server: None }
    }

    /// Creates a world in which these operations were done; its servers end with it.
    fn prepared(dir: &Path, servers: Servers, words: &[&str]) -> Self {
        let host = FakeIllumos::new(&dir.join("host"), TOOLS.as_ref(), SERVER.as_ref()).unwrap();
        ["tank", "tank/img", "tank/vm"].into_iter().for_each(|pool| host.add_pool(pool).unwrap());
        host.add_volume("tank/img/debian", &vec![7; 1 << 20]).unwrap();
        host.add_snapshot("tank/img/debian@base").unwrap();
        host.add_link("net0").unwrap();
        let mut world = Self::over(dir, host);
        if servers == Servers::Elsewhere {
            let server = FakeSetup::default().vmm(&world.host.dev().join("vmm")).spawn().unwrap();
            std::fs::write(dir.join("address"), server.address().to_string()).unwrap();
            std::fs::write(dir.join("disk.raw"), vec![7; 1 << 20]).unwrap();
            world._server = Some(server);
        }
        for word in words {
            runtime().block_on(world.operate(word)).unwrap();
        }
        world
    }

    async fn operate(&self, word: &str) -> Result<()> {
        match word {
            "create" => self.manager.create(self.spec()).await.map(drop),
            "start" => self.manager.start(&web()).await.map(drop),
            "stop" => self.manager.stop(&web(), Duration::ZERO).await.map(drop),
            "remove" => self.manager.remove(&web(), true).await,
            _ => panic!("no operation `{word}`"),
        }
    }

    fn spec(&self) -> VmSpec {
        if let Ok(address) = std::fs::read_to_string(self.dir.join("address")) {
            let mut options = BackendOptions::default();
            options.set("address", address).unwrap();
            let disk = DataDisk::Existing { path: self.dir.join("disk.raw"), readonly: false };
            let spec = VmSpec::builder(web()).data_disks(vec![disk]).network(NetworkConfig::None);
            return spec.backend_options(options).build().unwrap();
        }
        let disk = RootDisk { image: "zfs:tank/img/debian@base".into(), size: Some(Mib::new(2).unwrap()) };
        VmSpec::builder(web())
            .disk(disk)
            .data_disks(vec![DataDisk::Fresh { size: Mib::new(1).unwrap() }])
            .network(NetworkConfig::Vnic { link: "net0".parse().unwrap() })
            .build()
            .unwrap()
    }

    /// Returns the state that the list shows; `""` where it shows no VM.
    fn listed(&self) -> &'static str {
        let patience = Instant::now() + Duration::from_secs(20);
        loop {
            let list = runtime().block_on(self.manager.list()).unwrap();
            assert!(list.len() <= 1, "{list:?}");
            let Some(listed) = list.first() else { return "" };
            match &listed.handle {
                Ok(vm) => return vm.state.name(),
                // A keeper that is told nothing has the operation's lock until its exec has closed
                // it: a moment, and no more.
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < patience => {
                    // No event tells.
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("{error:?}"),
            }
        }
    }

    /// Lists the files of VMs and what the host has of them.
    fn remains(&self) -> Vec<String> {
        let files =
            paths_below(&self.dir.join("home/vms")).into_iter().map(|path| path.display().to_string());
        files.chain(self.host.leftovers().unwrap()).collect()
    }

    /// Checks that nothing is left once the VM is removed: no file, volume, VNIC, VM of the kernel
    /// or server.
    fn assert_removable(&self, place: &str) {
        match runtime().block_on(self.manager.remove(&web(), true)) {
            Err(error) if error.kind() != ErrorKind::NotFound => panic!("{place}: {error:?}"),
            _ => {}
        }
        // A keeper that was told nothing ends by itself, a moment after the one who started it.
        let patience = Instant::now() + Duration::from_secs(20);
        while !self.remains().is_empty() {
            assert!(Instant::now() < patience, "{place}: {:?}", self.remains());
            // No event tells.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn go_on(&self, word: &str, state: &str, place: &str) {
        let again = runtime().block_on(self.operate(word));
        let is_done = matches!((word, state), ("create", "prepared") | ("remove", ""));
        match again {
            Err(error) if is_done => {
                let kinds = [ErrorKind::AlreadyExists, ErrorKind::NotFound];
                assert!(kinds.contains(&error.kind()), "{place}: {error:?}");
            }
            again => again.unwrap_or_else(|error| panic!("{place}: {error:?}")),
        }
        let reached = match word {
            "create" => "prepared",
            "start" => "running",
            "stop" => "stopped",
            _ => "",
        };
        assert_eq!(self.listed(), reached, "{place}");
    }
}

fn web() -> VmName {
    VmName::new("web").unwrap()
}

/// One thread, since steps are counted by thread.
fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn paths_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| paths_below(&path).into_iter().chain([path])).collect()
}

/// The test that is killed: with a task it does what the task says, without one a whole life.
#[test]
fn a_whole_life_leaves_nothing() {
    let Some(task) = crash::task() else {
        for servers in [Servers::Own, Servers::Elsewhere] {
            let temp = tempfile::tempdir().unwrap();
            World::prepared(temp.path(), servers, &["create", "start", "stop", "start"])
                .assert_removable("after a whole life");
        }
        return;
    };
    let world = World::at(&task.dir);
    task.arm();
    runtime().block_on(world.operate(&task.scenario)).unwrap();
}

#[test]
fn after_a_kill_the_state_is_true_and_the_vm_can_be_used_or_removed() {
    kill_at_every_step(Servers::Own);
}

#[test]
fn after_a_kill_the_state_at_a_server_elsewhere_is_true_too() {
    kill_at_every_step(Servers::Elsewhere);
}

fn kill_at_every_step(servers: Servers) {
    for (word, before, allowed) in LIVES {
        for goes_on in [true, false] {
            // Kept until the next one is made: a host that is dropped takes its servers along.
            let made = RefCell::new(None);
            let check = |dir: &Path, place: &str| {
                let world = World::at(dir);
                let state = world.listed();
                assert!(allowed.contains(&state), "{place}: {state}");
                if goes_on {
                    world.go_on(word, state, place);
                }
                world.assert_removable(place);
            };
            let prepare = |dir: &Path| drop(made.replace(Some(World::prepared(dir, servers, before))));
            crash::kill_at_every_step("crash_propolis::a_whole_life_leaves_nothing", word, prepare, check);
        }
    }
}

#[test]
fn a_failing_system_never_leaves_an_unfinished_or_a_lost_vm() {
    fail_every_step(Servers::Own);
}

#[test]
fn a_failing_system_never_loses_a_vm_at_a_server_elsewhere_either() {
    fail_every_step(Servers::Elsewhere);
}

fn fail_every_step(servers: Servers) {
    for lasting in [FaultDuration::Once, FaultDuration::FromThenOn] {
        for (word, before, allowed) in LIVES {
            for at in 1.. {
                let temp = tempfile::tempdir().unwrap();
                let world = World::prepared(temp.path(), servers, before);
                let fault = StepFault::at(at, lasting, io::ErrorKind::StorageFull);
                let outcome = runtime().block_on(world.operate(word));
                let failed = fault.failed();
                drop(fault);
                if !judge(&world, (word, allowed), failed, &outcome, &format!("step {at} failed {lasting:?}"))
                {
                    assert!(at > 1, "`{word}` took no step");
                    break;
                }
            }
        }
    }
}

#[test]
fn a_host_whose_commands_fail_is_left_as_it_was() {
    let (stderr, code) = ("the host is out of sorts".to_owned(), 1);
    let faults = [
        illumos::CallFault::Fail { stderr: stderr.clone(), code },
        illumos::CallFault::FailAfterwards { stderr, code },
    ];
    for fault in faults {
        for (word, before, allowed) in LIVES {
            for nth in 1.. {
                let temp = tempfile::tempdir().unwrap();
                let world = World::prepared(temp.path(), Servers::Own, before);
                let calls = world.host.calls().unwrap().len();
                world.host.plan_fault(nth, fault.clone()).unwrap();
                let outcome = runtime().block_on(world.operate(word));
                let called = world.host.calls().unwrap().split_off(calls);
                world.host.forget_faults().unwrap();
                let place = usize::try_from(nth).unwrap() - 1;
                let failed = called.get(place).map(|call| call.join(" "));
                let how = format!("call {nth} met {fault:?}");
                if !judge(&world, (word, allowed), failed.as_deref(), &outcome, &how) {
                    assert!(nth > 1 || word == "stop", "`{word}` called nothing of the host");
                    break;
                }
            }
        }
    }
}

/// Checks what a fault left, and returns whether there was one.
fn judge(
    world: &World,
    (word, allowed): (&str, &[&str]),
    failed: Option<&str>,
    outcome: &Result<()>,
    how: &str,
) -> bool {
    let Some(failed) = failed else {
        outcome.as_ref().unwrap_or_else(|error| panic!("{word} failed without a fault: {error:?}"));
        world.assert_removable(word);
        return false;
    };
    let place = format!("{word}, {how}, `{failed}`: {outcome:?}");
    let state = world.listed();
    assert!(allowed.contains(&state), "{place}: {state}");
    world.assert_removable(&place);
    true
}

#[test]
fn ten_processes_that_start_one_vm_boot_one_guest() {
    let temp: TempDir = tempfile::tempdir().unwrap();
    let world = World::prepared(temp.path(), Servers::Own, &["create"]);
    let begin =
        |_| crash::spawn("crash_propolis::a_whole_life_leaves_nothing", "start", temp.path(), 0).unwrap();
    let children: Vec<_> = (0..10).map(begin).collect();
    for child in children {
        crash::assert_passed(&child.wait_with_output().unwrap());
    }
    assert_eq!(world.listed(), "running");
    let servers = world.host.leftovers().unwrap().into_iter().filter(|left| left.starts_with("server"));
    assert_eq!(servers.count(), 1);
    world.assert_removable("after ten starts");
}
