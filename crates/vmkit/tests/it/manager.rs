//! The manager with many VMs and many callers, and with what it finds on the disk.

use std::fs;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Counting, FileHypervisor, SOON, World, lock_is_open, named, spec, web};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use uuid::Uuid;
use vmkit::lifecycle::Operation;
use vmkit::spec::{Protocol, VmName};
use vmkit::store::{Home, Intent, VmRecord};
use vmkit::{
    ActiveForward, BackendTag, ErrorKind, Hypervisor, NoopHypervisor, Result, RouterHypervisor, RunInfo,
    VmHandle, VmManager, VmState, WaitCondition,
};

fn name(text: &str) -> VmName {
    VmName::new(text).unwrap()
}

fn noop(temp: &tempfile::TempDir) -> (NoopHypervisor, VmManager<NoopHypervisor>) {
    let hypervisor = NoopHypervisor::new();
    let home = Home::at(temp.path()).unwrap();
    (hypervisor.clone(), VmManager::new(hypervisor, home))
}

#[tokio::test]
async fn an_ephemeral_vm_lives_as_long_as_its_owner_and_may_then_be_removed_by_any_process() {
    let temp = tempfile::tempdir().unwrap();
    let (noop, manager) = noop(&temp);
    let other = VmManager::new(noop, Home::at(temp.path()).unwrap());
    manager.create(named(name("kept"))).await.unwrap();
    let (_, owner) = manager.create_ephemeral(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    assert_eq!(other.remove_orphans().await.unwrap(), []);
    let listed = other.list().await.unwrap();
    assert_eq!(listed.iter().map(|vm| vm.is_ephemeral()).collect::<Vec<_>>(), [false, true]);

    drop(owner);
    let locked = hold(manager.home());
    assert_eq!(other.remove_orphans().await.unwrap(), [], "somebody is at work on it");
    drop(locked);
    assert_eq!(other.remove_orphans().await.unwrap(), [web()]);
    assert!(!temp.path().join("vms/web").exists());
    let (_, owner) = manager.create_ephemeral(spec()).await.unwrap();
    manager.remove(&web(), false).await.unwrap();
    drop(owner);
    manager.create(spec()).await.unwrap();
    assert_eq!(other.remove_orphans().await.unwrap(), [], "the name is another VM's by now");
}

#[tokio::test]
async fn an_owner_waits_for_other_work_on_its_vm_and_gets_the_error_of_a_failed_removal() {
    let temp = tempfile::tempdir().unwrap();
    let (noop, manager) = noop(&temp);
    let (_, owner) = manager.create_ephemeral(spec()).await.unwrap();
    assert!(!manager.remove_orphan(&web()).await.unwrap(), "its owner is there");
    drop(owner);
    noop.fail_next(Operation::Destroy, "a sick backend");
    let error = manager.remove_orphan(&web()).await.unwrap_err();
    assert!(error.to_string().contains("a sick backend"), "{error}");
    let locked = hold(manager.home());
    let other = tokio::spawn({
        let manager = manager.clone();
        async move { manager.remove_orphan(&web()).await }
    });
    lock_is_open(manager.home(), &web(), 2).await;
    assert!(!other.is_finished(), "another operation is at work on the VM");
    drop(locked);
    assert!(timeout(SOON, other).await.unwrap().unwrap().unwrap());
    assert!(!manager.remove_orphan(&web()).await.unwrap(), "it is gone");
    manager.create(spec()).await.unwrap();
    assert!(!manager.remove_orphan(&web()).await.unwrap(), "the name is another VM's by now");
}

#[tokio::test]
async fn an_ephemeral_vm_whose_making_was_cut_off_is_removed_as_well() {
    let temp = tempfile::tempdir().unwrap();
    let (noop, manager) = noop(&temp);
    noop.fail_next(Operation::Prepare, "cut");
    noop.fail_next(Operation::Destroy, "cut");
    assert!(manager.create_ephemeral(spec()).await.is_err());
    assert!(temp.path().join("vms/web").exists(), "its record is there");
    assert_eq!(manager.remove_orphans().await.unwrap(), [web()]);
    assert!(!temp.path().join("vms/web").exists());
}

/// A backend of which one VM's monitor never replies.
struct Sick(FileHypervisor, VmName);

crate::common::backend_as_its_first!(Sick);

impl Hypervisor for Sick {
    crate::common::all_but_state!();

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        if *vm.name() == self.1 {
            std::future::pending::<()>().await;
        }
        self.0.state(vm).await
    }
}

/// A backend on a host that is too busy: it reports a VM's state at the second request, and after
/// four seconds.
struct Slow(NoopHypervisor, Arc<AtomicU32>);

crate::common::backend_as_its_first!(Slow);

impl Hypervisor for Slow {
    crate::common::all_but_state!();

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        match self.1.fetch_add(1, Ordering::Relaxed) {
            0 => std::future::pending::<()>().await,
            // The test's clock is paused.
            _ => sleep(Duration::from_secs(4)).await,
        }
        self.0.state(vm).await
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_never_waits_for_a_sick_vm() {
    let temp = tempfile::tempdir().unwrap();
    let world = World::at(temp.path());
    for vm in ["sick", "well"] {
        world.manager.create(named(name(vm))).await.unwrap();
        world.manager.start(&name(vm)).await.unwrap();
    }
    let sick = Sick(FileHypervisor::new(temp.path().join("fake")), name("sick"));
    let home = world.manager.home().clone();
    let manager = VmManager::new(sick, home.clone());
    let begun = tokio::time::Instant::now();
    let list = manager.list().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let [sick, well] = &list[..] else { panic!("{list:?}") };
    assert_eq!(sick.handle.as_ref().unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(sick.recorded.as_ref().unwrap().state, VmState::Running);
    assert_eq!(sick.path, home.vm(&name("sick")));
    assert_eq!(well.handle.as_ref().unwrap().state, VmState::Running);
    // The hung VM can still be killed and removed.
    manager.stop(&name("sick"), Duration::ZERO).await.unwrap();
    manager.remove(&name("sick"), true).await.unwrap();
}

#[tokio::test]
async fn an_unusable_record_hides_only_its_own_vm_and_is_kept() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    for vm in ["alone", "copied", "cut", "future", "well"] {
        manager.create(named(name(vm))).await.unwrap();
    }
    let path = |vm: &str| manager.home().vm(&name(vm)).join("vm.json");
    let whole = fs::read_to_string(path("cut")).unwrap();
    fs::write(path("cut"), &whole[..100]).unwrap();
    fs::write(path("future"), whole.replace("\"version\": 1,", "\"version\": 9,")).unwrap();
    fs::copy(path("well"), path("copied")).unwrap();
    fs::remove_file(path("alone")).unwrap();
    fs::write(path("alone").with_file_name("disk.qcow2"), "a disk").unwrap();
    fs::create_dir(manager.home().vms().join("empty")).unwrap();
    fs::write(manager.home().vms().join("note"), "not a directory").unwrap();

    let list = manager.list().await.unwrap();
    let shown = list.iter().map(|listed| match &listed.handle {
        Ok(vm) => format!("{} {}", listed.name, vm.state),
        Err(error) => format!("{} {error}", listed.name),
    });
    let shown: Vec<_> = shown.collect();
    let at = |vm: &str| path(vm).display().to_string();
    assert_eq!(
        shown,
        [
            format!(
                "alone {}: the VM's directory has no record",
                at("alone").replace("vm.json", "disk.qcow2")
            ),
            format!(
                "copied {}: this is a copy of the directory of the VM `well`, with the identity of that VM, and \
                 can't be used as another",
                at("copied").trim_end_matches("/vm.json")
            ),
            format!("cut {}: the record is truncated after 100 bytes", at("cut")),
            format!("future {}: the record has version 9, and this vmkit reads version 1", at("future")),
            "well prepared".to_owned(),
        ]
    );
    for vm in ["alone", "copied", "cut", "future"] {
        let before = fs::read(path(vm)).ok();
        for outcome in [
            manager.start(&name(vm)).await.map(drop),
            manager.remove(&name(vm), true).await,
            manager.create(named(name(vm))).await.map(drop),
        ] {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Record, "{vm}");
        }
        assert_eq!(fs::read(path(vm)).ok(), before, "{vm}");
    }
    assert!(path("alone").with_file_name("disk.qcow2").exists());
}

#[tokio::test]
async fn what_a_power_cut_leaves_of_the_later_record_is_as_if_it_were_not_there() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let later = manager.home().vm(&web()).join("run.json");
    for left in ["", "{\"version\": 1, \"han", "\0\0\0\0"] {
        fs::write(&later, left).unwrap();
        assert_eq!(manager.info(&web()).await.unwrap().state, VmState::Running, "{left:?}");
    }
    fs::write(&later, "{\"version\": 2}").unwrap();
    let error = manager.info(&web()).await.unwrap_err().to_string();
    assert!(error.ends_with("run.json: the record has version 2, and this vmkit reads version 1"), "{error}");
}

#[tokio::test]
async fn what_is_left_of_a_vm_is_nothing_to_the_next_one_of_its_name() {
    let temp = tempfile::tempdir().unwrap();
    let (noop, manager) = noop(&temp);
    let dir = manager.home().vm(&web());
    let same = spec().with_id(Uuid::from_u128(7));
    let vm = manager.create(same.clone()).await.unwrap();
    // As an interrupted removal leaves it, while another process records the provisioning of the
    // guest.
    let intent = Intent { operation: Operation::Destroy, since: 1, pid: 1, snapshot: None };
    fs::write(dir.join("run.json"), VmRecord::intending(vm.clone(), intent).encode().unwrap()).unwrap();
    fs::create_dir(dir.join("kept")).unwrap();
    fs::write(dir.join("kept/provision.json"), "{}").unwrap();
    manager.create(same.clone()).await.unwrap();
    assert_eq!(manager.info(&web()).await.unwrap().state, VmState::Prepared);
    assert!(!dir.join("kept").exists() && !dir.join("run.json").exists());
    manager.remove(&web(), false).await.unwrap();

    let intent = Intent { operation: Operation::Destroy, since: 1, pid: 1, snapshot: None };
    for removed_first in [true, false] {
        fs::create_dir_all(dir.join("kept")).unwrap();
        fs::write(dir.join("kept/provision.json"), "{}").unwrap();
        fs::write(dir.join("run.json"), VmRecord::intending(vm.clone(), intent.clone()).encode().unwrap())
            .unwrap();
        assert!(manager.list().await.unwrap().is_empty(), "there is no VM");
        if removed_first {
            manager.remove(&web(), false).await.unwrap();
            assert!(!dir.exists());
        } else {
            manager.create(same.clone()).await.unwrap();
            assert_eq!(manager.info(&web()).await.unwrap().state, VmState::Prepared);
            assert!(!dir.join("kept").exists());
        }
    }
    drop(noop);
}

#[test]
fn a_vm_that_comes_and_goes_is_never_regarded_as_interrupted() {
    let temp = tempfile::tempdir().unwrap();
    let world = World::at(temp.path());
    let manager = world.manager.clone();
    let done = Arc::new(AtomicBool::new(false));
    let is_done = Arc::clone(&done);
    let watcher = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut seen = 0;
        while !is_done.load(Ordering::Relaxed) {
            let Some(listed) = runtime.block_on(manager.find(&web())) else { continue };
            seen += 1;
            assert!(!listed.interrupted, "{listed:?}");
            let failed = matches!(&listed.handle, Ok(vm) if matches!(vm.state, VmState::Failed { .. }));
            assert!(!failed, "{listed:?}");
        }
        seen
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for _ in 0..100 {
        runtime.block_on(world.manager.create(spec())).unwrap();
        runtime.block_on(world.manager.remove(&web(), true)).unwrap();
    }
    done.store(true, Ordering::Relaxed);
    assert!(watcher.join().unwrap() > 0);
}

#[tokio::test(start_paused = true)]
async fn a_query_of_one_vm_waits_longer_than_a_list() {
    let temp = tempfile::tempdir().unwrap();
    let (noop, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    let slow = Slow(noop, Arc::new(AtomicU32::new(0)));
    let asked = Arc::clone(&slow.1);
    let manager = VmManager::new(slow, manager.home().clone());
    let listed = manager.list().await.unwrap();
    assert_eq!(listed[0].handle.as_ref().unwrap_err().kind(), ErrorKind::TimedOut);
    // The first request has no reply within five seconds, the second one takes four.
    asked.store(0, Ordering::Relaxed);
    let found = manager.find(&web()).await.unwrap();
    assert_eq!(found.handle.unwrap().state, VmState::Prepared);
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_vm_that_lives_is_removed_only_by_force() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let error = manager.remove(&web(), false).await.unwrap_err();
    assert_eq!(error.to_string(), "cannot remove a VM that is running: stop it first, or use force");
    manager.remove(&web(), true).await.unwrap();
    assert_eq!(manager.remove(&web(), true).await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(fs::read_dir(manager.home().vms()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_name_or_an_identity_in_use_is_refused_and_its_vm_is_unharmed() {
    let temp = tempfile::tempdir().unwrap();
    let world = World::at(temp.path());
    let id = Uuid::from_u128(7);
    world.manager.create(spec().with_id(id)).await.unwrap();
    world.manager.start(&web()).await.unwrap();
    for twin in [spec(), named(name("twin")).with_id(id)] {
        let error = world.manager.create(twin).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    }
    assert_eq!(world.manager.list().await.unwrap().len(), 1);
    assert_eq!(world.manager.info(&web()).await.unwrap().state, VmState::Running);
}

#[tokio::test]
async fn a_failed_creation_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let (hypervisor, manager) = noop(&temp);
    hypervisor.fail_next(Operation::Prepare, "no more electricity");
    assert_eq!(manager.create(spec()).await.unwrap_err().to_string(), "no more electricity");
    assert_eq!(fs::read_dir(manager.home().vms()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_failed_start_leaves_a_vm_that_starts() {
    let temp = tempfile::tempdir().unwrap();
    let (hypervisor, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    hypervisor.fail_next(Operation::Start, "no more electricity");
    assert_eq!(manager.start(&web()).await.unwrap_err().to_string(), "no more electricity");
    let listed = manager.list().await.unwrap().remove(0);
    assert_eq!((listed.handle.unwrap().state, listed.intent), (VmState::Prepared, None));
    manager.start(&web()).await.unwrap();
}

#[tokio::test]
async fn a_failed_removal_can_only_be_repeated() {
    let temp = tempfile::tempdir().unwrap();
    let (hypervisor, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    hypervisor.fail_next(Operation::Destroy, "no more electricity");
    manager.remove(&web(), false).await.unwrap_err();
    let listed = manager.list().await.unwrap().remove(0);
    let VmState::Failed { cause } = listed.handle.unwrap().state else { panic!("not failed") };
    assert_eq!(cause.detail, "its removal was interrupted: remove the VM again");
    let error = manager.start(&web()).await.unwrap_err().to_string();
    assert_eq!(error, "cannot start a VM that is destroyed: its removal was interrupted; remove it again");
    manager.remove(&web(), false).await.unwrap();
    assert!(manager.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_vm_of_a_missing_backend_is_listed_and_stays_as_it_is() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    let nobody = RouterHypervisor::new(BackendTag::Qemu);
    let elsewhere = VmManager::new(nobody, manager.home().clone());
    let listed = elsewhere.list().await.unwrap().remove(0);
    assert!(listed.handle.unwrap_err().to_string().contains("no backend `noop`"));
    assert_eq!(listed.recorded.unwrap().backend, BackendTag::Noop);
    for force in [false, true] {
        assert_eq!(elsewhere.remove(&web(), force).await.unwrap_err().kind(), ErrorKind::Host);
    }
    assert_eq!(manager.info(&web()).await.unwrap().state, VmState::Prepared);
}

/// Takes the VM's lock as another process would, and returns what holds it.
fn hold(home: &Home) -> HeldLock {
    let lock = fs::OpenOptions::new().write(true).open(home.vm(&web()).join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    HeldLock(lock)
}

/// A lock that is released when it is dropped, even if a child that another test is just spawning
/// has the file.
struct HeldLock(fs::File);

impl Drop for HeldLock {
    fn drop(&mut self) {
        rustix::fs::flock(&self.0, rustix::fs::FlockOperation::Unlock).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_stays_locked_is_busy_and_its_holder_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    let held = hold(manager.home());
    let error = manager.start(&web()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_eq!(error.to_string(), format!("VM `web` is in use by process {}", std::process::id()));
    // A reader waits for no lock.
    assert_eq!(manager.info(&web()).await.unwrap().state, VmState::Prepared);
    assert_eq!(manager.list().await.unwrap().len(), 1);
    drop(held);
}

#[tokio::test]
async fn an_operation_that_waited_for_a_removed_vm_does_not_work_on_it() {
    let temp = tempfile::tempdir().unwrap();
    let World { manager, .. } = World::at(temp.path());
    let first = manager.create(spec()).await.unwrap();
    let held = hold(manager.home());
    let starting = {
        let manager = manager.clone();
        tokio::spawn(async move { manager.start(&web()).await })
    };
    let creating = {
        let manager = manager.clone();
        tokio::spawn(async move { manager.create(spec()).await })
    };
    lock_is_open(manager.home(), &web(), 3).await;
    fs::remove_dir_all(manager.home().vm(&web())).unwrap();
    drop(held);
    let started = timeout(SOON, starting).await.unwrap().unwrap();
    let created = timeout(SOON, creating).await.unwrap().unwrap().unwrap();
    assert_ne!(created.id, first.id);
    match started {
        Ok(vm) => assert_eq!(vm.id, created.id),
        Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound),
    }
}

#[tokio::test]
async fn the_lock_of_a_removed_vm_does_not_open_the_next_one_of_its_name() {
    let temp = tempfile::tempdir().unwrap();
    let World { manager, .. } = World::at(temp.path());
    manager.create(spec()).await.unwrap();
    let first = hold(manager.home());
    let starting = {
        let manager = manager.clone();
        tokio::spawn(async move { manager.start(&web()).await })
    };
    lock_is_open(manager.home(), &web(), 2).await;
    fs::remove_dir_all(manager.home().vm(&web())).unwrap();
    let next = manager.create(spec()).await.unwrap();
    let second = hold(manager.home());
    drop(first);
    // It has the lock of a VM that is removed by now, and waits for the lock of the next VM.
    lock_is_open(manager.home(), &web(), 2).await;
    assert!(!starting.is_finished(), "started under the lock of a VM that is gone");
    drop(second);
    assert_eq!(timeout(SOON, starting).await.unwrap().unwrap().unwrap().id, next.id);
}

#[tokio::test]
async fn twenty_tasks_that_start_one_vm_boot_it_once() {
    let temp = tempfile::tempdir().unwrap();
    let world = World::at(temp.path());
    world.manager.create(spec()).await.unwrap();
    let tasks: Vec<_> = (0..20)
        .map(|_| {
            let manager = world.manager.clone();
            tokio::spawn(async move { manager.start(&web()).await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap().unwrap().state, VmState::Running);
    }
    assert_eq!(world.boots(), 1);
}

#[tokio::test]
async fn an_interrupted_creation_is_shown_refused_and_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(named(name("other"))).await.unwrap();
    let dir = manager.home().vm(&web());
    fs::create_dir(&dir).unwrap();
    let preparing =
        VmHandle::preparing(Uuid::from_u128(9), BackendTag::Noop, spec().with_id(Uuid::from_u128(9)));
    let intent = Intent { operation: Operation::Prepare, since: 1, pid: 1, snapshot: None };
    fs::write(dir.join("vm.json"), VmRecord::intending(preparing, intent).encode().unwrap()).unwrap();

    let listed = manager.list().await.unwrap().remove(1);
    assert!(listed.interrupted);
    let VmState::Failed { cause } = listed.handle.unwrap().state else { panic!("not failed") };
    assert_eq!(cause.detail, "its creation was interrupted: remove the VM");
    let error = manager.start(&web()).await.unwrap_err().to_string();
    assert_eq!(error, "cannot start a VM that is preparing: its creation was interrupted; remove it");
    let vm = manager.create(spec()).await.unwrap();
    assert_ne!(vm.id, Uuid::from_u128(9));
}

#[tokio::test]
async fn a_wait_notices_what_another_manager_does() {
    let temp = tempfile::tempdir().unwrap();
    let hypervisor = Counting::default();
    let manager = VmManager::new(hypervisor.clone(), Home::at(temp.path()).unwrap());
    manager.create(spec()).await.unwrap();
    let mut latencies = Vec::new();
    let turns = [(WaitCondition::Running, true), (WaitCondition::Stopped, false)];
    for (condition, is_start) in turns.into_iter().cycle().take(6) {
        let looks = hypervisor.looks();
        let waiting = {
            let manager = manager.clone();
            tokio::spawn(async move { manager.wait(&web(), condition, SOON).await })
        };
        hypervisor.was_asked_since(looks).await;
        match is_start {
            true => manager.start(&web()).await.unwrap(),
            false => manager.stop(&web(), SOON).await.unwrap(),
        };
        let begun = Instant::now();
        let vm = waiting.await.unwrap().unwrap();
        assert_eq!(vm.state.name(), condition.as_str());
        latencies.push(begun.elapsed());
    }
    // The next poll comes after two seconds. The fastest attempt is used: a busy host delays some.
    let fastest = latencies.iter().min().unwrap();
    assert!(*fastest < Duration::from_secs(1), "heard of at the next look: {latencies:?}");
}

#[tokio::test]
async fn a_wait_ends_at_its_deadline_with_the_consoles_last_lines() {
    let temp = tempfile::tempdir().unwrap();
    let world = World::at(temp.path());
    let vm = world.manager.create(spec()).await.unwrap();
    fs::write(vm.console_log.unwrap(), "first\n\x1b[2Jlast words\r\n").unwrap();
    let error = world.manager.wait(&web(), WaitCondition::Ssh, Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    let expected = "waited 0.3 s for `ssh` of the VM `web`, which is prepared; the console's last lines:\n    first\n    last words";
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn a_wait_ends_at_once_when_the_vm_fails() {
    let temp = tempfile::tempdir().unwrap();
    let (hypervisor, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    let vm = manager.start(&web()).await.unwrap();
    let VmState::Failed { cause } =
        VmState::failed(vmkit::lifecycle::FailureKind::GuestPanic, "the guest panicked")
    else {
        unreachable!()
    };
    hypervisor.break_vm(&vm, cause).unwrap();
    let error = manager.wait(&web(), WaitCondition::Stopped, SOON).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidState);
    assert_eq!(
        error.to_string(),
        "waited for `stopped` of the VM `web`, and it is failed: the guest panicked"
    );
}

#[tokio::test]
async fn waiting_for_an_agent_that_the_backend_has_not_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let error = manager.wait(&web(), WaitCondition::Agent, SOON).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// Creates and starts a VM with these facts of its run.
async fn running(dir: &std::path::Path, run: RunInfo) -> VmManager<FileHypervisor> {
    let hypervisor = FileHypervisor::new(dir.join("fake")).with_run(run);
    let manager = VmManager::new(hypervisor, Home::at(dir.join("home")).unwrap());
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    manager
}

#[tokio::test]
async fn ssh_is_ready_when_the_server_sends_its_banner_not_when_the_host_accepts() {
    let temp = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let SocketAddr::V4(host) = listener.local_addr().unwrap() else { unreachable!() };
    let forward = ActiveForward { protocol: Protocol::Tcp, host, guest_port: NonZeroU16::new(22).unwrap() };
    let manager = running(temp.path(), RunInfo { forwards: vec![forward], ..RunInfo::default() }).await;
    let guest = tokio::spawn(async move {
        // Like slirp while the guest does not listen yet, and like a server that is no SSH server.
        for greeting in ["", "", "220 mail\r\n", "SSH-2.0-test\r\n"] {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(greeting.as_bytes()).await.unwrap();
        }
    });
    manager.wait(&web(), WaitCondition::Ssh, SOON).await.unwrap();
    guest.await.unwrap();
}

#[tokio::test]
async fn a_wait_notices_the_end_of_the_hypervisors_process() {
    let temp = tempfile::tempdir().unwrap();
    let mut child = tokio::process::Command::new("sleep").arg("60").kill_on_drop(true).spawn().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let SocketAddr::V4(host) = listener.local_addr().unwrap() else { unreachable!() };
    let forward = ActiveForward { protocol: Protocol::Tcp, host, guest_port: NonZeroU16::new(22).unwrap() };
    let run = RunInfo { pid: child.id(), forwards: vec![forward], ..RunInfo::default() };
    let manager = running(temp.path(), run).await;
    let vm = manager.info(&web()).await.unwrap();
    let waiting = tokio::spawn(async move { manager.wait(&web(), WaitCondition::Ssh, SOON).await });
    // The host accepts, and nothing is sent: the wait is in the middle of an attempt.
    let silent = listener.accept().await.unwrap();
    let guest = vm.run.unwrap().monitor.unwrap();
    fs::remove_file(guest).unwrap();
    let begun = Instant::now();
    child.kill().await.unwrap();
    let error = waiting.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "waited for `ssh` of the VM `web`, and it is stopped");
    // An attempt ends after ten seconds, and the event comes within milliseconds.
    assert!(begun.elapsed() < Duration::from_secs(8), "heard of at the attempt's end: {:?}", begun.elapsed());
    drop(silent);
}

#[tokio::test]
async fn a_vm_whose_record_is_spoilt_can_still_be_ended() {
    let temp = tempfile::tempdir().unwrap();
    let (hypervisor, manager) = noop(&temp);
    let vm = web();
    manager.create(spec()).await.unwrap();
    let running = manager.start(&vm).await.unwrap();
    let record = manager.home().vm(&vm).join("vm.json");
    fs::write(&record, "{\"version\": 1, \"hand").unwrap();

    // Its state can't be read, and the only valid operation is its removal.
    assert_eq!(manager.info(&vm).await.unwrap_err().kind(), ErrorKind::Record);
    assert_eq!(manager.start(&vm).await.unwrap_err().kind(), ErrorKind::Record);
    assert_eq!(manager.remove(&vm, false).await.unwrap_err().kind(), ErrorKind::Record);
    manager.stop(&vm, Duration::ZERO).await.unwrap();
    assert_eq!(hypervisor.state(&running).await.unwrap(), VmState::Stopped);
    assert_eq!(fs::read_to_string(&record).unwrap(), "{\"version\": 1, \"hand");

    manager.remove(&vm, true).await.unwrap();
    assert_eq!(hypervisor.state(&running).await.unwrap(), VmState::Destroyed);
    assert!(!manager.home().vm(&vm).exists());
}

#[tokio::test]
async fn a_record_of_a_newer_vmkit_is_not_regarded_as_damaged() {
    let temp = tempfile::tempdir().unwrap();
    let (_, manager) = noop(&temp);
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    fs::write(manager.home().vm(&web()).join("vm.json"), "{\"version\": 9, \"vm\": {}}").unwrap();
    assert_eq!(manager.stop(&web(), Duration::ZERO).await.unwrap_err().kind(), ErrorKind::Record);
    assert_eq!(manager.remove(&web(), true).await.unwrap_err().kind(), ErrorKind::Record);
}

/// A backend whose handles carry another tag than its own.
struct Mistagged(NoopHypervisor);

impl Hypervisor for Mistagged {
    crate::common::all_but_state!();

    async fn state(&self, vm: &VmHandle) -> Result<VmState> {
        self.0.state(vm).await
    }
}

impl vmkit::Backend for Mistagged {
    fn tag(&self) -> BackendTag {
        BackendTag::Qemu
    }
    fn abilities(&self, tag: &BackendTag) -> vmkit::Abilities<'_> {
        self.0.abilities(tag)
    }
}

#[tokio::test]
async fn a_hypervisor_whose_handles_have_another_tag_creates_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let manager = VmManager::new(Mistagged(NoopHypervisor::new()), Home::at(temp.path()).unwrap());
    let error = manager.create(spec()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("VMs of `noop`"), "{error}");
    assert!(!manager.home().vm(spec().name()).join("vm.json").exists());
}
