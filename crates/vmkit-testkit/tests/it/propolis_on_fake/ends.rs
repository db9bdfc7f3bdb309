//! Ends of VMs that are reliable even with servers and networks that fail.

use std::fs;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vmkit::spec::{BackendOptions, DataDisk, NetworkConfig, RootDisk, VmName};
use vmkit::store::Home;
use vmkit::{
    ErrorKind, FailureKind, Hypervisor, PropolisHypervisor, VmHandle, VmManager, VmState, WaitCondition,
};
use vmkit_testkit::propolis::illumos::CallFault;
use vmkit_testkit::propolis::{Gate, NetworkFault, PropolisBehaviour};

use super::world::{self, Remote, World};

fn name() -> VmName {
    VmName::new("web").unwrap()
}

fn failing() -> PropolisBehaviour {
    PropolisBehaviour { start_fails: true, ..PropolisBehaviour::default() }
}

#[tokio::test]
async fn a_network_that_fails_is_no_reason_to_forget_a_guest_that_runs() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    for fault in [NetworkFault::DropAfter(0), NetworkFault::Html] {
        remote.proxy.set(Some(fault.clone())).unwrap();
        let error = propolis.state(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Hypervisor, "{fault:?}: {error}");
        let error = propolis.destroy(vm.clone()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Hypervisor, "{fault:?}: {error}");
        assert_eq!(remote.guests(&vm), 1, "{fault:?}");
    }
    remote.proxy.set(None).unwrap();
    assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Running);
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_vm_that_can_not_be_started_leaves_its_server_free() {
    let remote = Remote::behaving(failing());
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    for _ in 0..2 {
        let error = propolis.start(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Hypervisor, "{error}");
        assert_eq!(remote.guests(&vm), 0, "{error}");
        assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Stopped);
    }
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());

    let world = World::new();
    world.host().behave(&failing()).unwrap();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let error = propolis.start(&vm).await.unwrap_err();
    assert!(error.to_string().contains("Failed"), "{error}");
    assert!(!world.kernel_has(&vm));
    world.host().behave(&PropolisBehaviour::default()).unwrap();
    propolis.start(&vm).await.unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

/// Starts a VM, drops the start once the server has reached `gate`, and releases the server.
async fn cut_off(remote: &Remote, propolis: &PropolisHypervisor, vm: &VmHandle, gate: Gate) {
    let (held, orders) = (remote.hold(gate), remote.orders());
    let start = propolis.start(vm);
    tokio::select! {
        started = start => panic!("{started:?}"),
        () = remote.wait_at(gate, orders) => {}
    }
    drop(held);
}

#[tokio::test]
async fn what_a_start_that_was_cut_off_left_is_ended_by_stop_start_and_destroy() {
    // At the first gate the VM is left as `Creating`, at the second as `Failed`, with its resources
    // released already.
    for (gate, behaviour) in [(Gate::Ensure, PropolisBehaviour::default()), (Gate::Event, failing())] {
        let remote = Remote::behaving(behaviour);
        let propolis = remote.hypervisor();
        let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
        cut_off(&remote, &propolis, &vm, gate).await;
        world::wait_for(&propolis, &vm, |state| matches!(state, VmState::Failed { .. })).await;
        assert_eq!(remote.guests(&vm), usize::from(gate == Gate::Ensure), "{gate:?}");
        propolis.stop(&vm, Duration::ZERO).await.unwrap();
        assert_eq!(remote.guests(&vm), 0, "{gate:?}");
        assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Stopped);

        cut_off(&remote, &propolis, &vm, gate).await;
        world::wait_for(&propolis, &vm, |state| matches!(state, VmState::Failed { .. })).await;
        match (gate, propolis.start(&vm).await) {
            (Gate::Ensure, started) => assert_eq!(started.unwrap().state, VmState::Running),
            (_, started) => assert_eq!(started.unwrap_err().kind(), ErrorKind::Hypervisor),
        }
        propolis.stop(&vm, Duration::ZERO).await.unwrap();

        cut_off(&remote, &propolis, &vm, gate).await;
        propolis.destroy(vm).await.unwrap();
        assert_eq!(remote.left(), Vec::<String>::new(), "{gate:?}");
    }
}

#[tokio::test]
async fn a_start_in_progress_is_never_reported_as_interrupted() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let held = remote.hold(Gate::Ensure);
    let watching = async {
        remote.wait_at(Gate::Ensure, 0).await;
        let error = propolis.state(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
        drop(held);
        loop {
            match propolis.state(&vm).await {
                Ok(VmState::Running) => return,
                Ok(other) => panic!("{other:?}"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Busy, "{error}"),
            }
        }
    };
    let (started, ()) = tokio::join!(propolis.start(&vm), watching);
    propolis.destroy(started.unwrap()).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_guest_that_was_seen_to_end_has_stopped_whatever_its_server_does_then() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let one = propolis.prepare(&remote.spec(name())).await.unwrap();
    let two = propolis.prepare(&remote.spec(VmName::new("other").unwrap())).await.unwrap();
    let one = propolis.start(&one).await.unwrap();
    world::type_at_console(&propolis, &one, "poweroff\r").await;
    world::wait_for_state(&propolis, &one, &VmState::Stopped).await;
    remote.wait_for_no_guest(&one).await;
    assert_eq!(propolis.state(&one).await.unwrap(), VmState::Stopped);

    propolis.start(&two).await.unwrap();
    assert_eq!(propolis.state(&one).await.unwrap(), VmState::Stopped);
    remote.proxy.set(Some(NetworkFault::DropAfter(0))).unwrap();
    assert_eq!(propolis.state(&one).await.unwrap(), VmState::Stopped);
    remote.proxy.set(None).unwrap();
    propolis.destroy(one).await.unwrap();
    assert_eq!(remote.guests(&two), 1, "it is another's");

    // This VM ended unobserved.
    remote.forget();
    let state = propolis.state(&two).await.unwrap();
    let VmState::Failed { cause } = &state else { panic!("{state:?}") };
    assert_eq!(cause.kind, FailureKind::Vanished);
    propolis.destroy(two).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_slow_server_is_stopped_as_gracefully_as_any() {
    let remote = Remote::new();
    let propolis = remote.builder().with_power_off(world::TypesPowerOff).build();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    world::wait_for_console(&propolis, &vm, "login: ").await;
    remote.proxy.set(Some(NetworkFault::Slow(Duration::from_millis(1500)))).unwrap();
    propolis.stop(&vm, Duration::from_secs(60)).await.unwrap();
    let log = fs::read_to_string(vm.console_log.as_ref().unwrap()).unwrap();
    assert!(log.contains("login: going down\r\n"), "{log}");
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_stands_still_for_a_while_is_not_killed_for_it() {
    let world = World::new();
    let propolis = world.builder().with_power_off(world::TypesPowerOff).build();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    world::wait_for_console(&propolis, &vm, "login: ").await;
    let pid = Pid::from_raw(i32::try_from(vm.run.as_ref().unwrap().pid.unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let goes_on = std::thread::spawn(move || {
        // The server is held for this long.
        std::thread::sleep(Duration::from_millis(2500));
        kill_process(pid, Signal::CONT).unwrap();
    });
    let began = std::time::Instant::now();
    propolis.stop(&vm, Duration::from_secs(60)).await.unwrap();
    let log = fs::read_to_string(vm.console_log.as_ref().unwrap()).unwrap();
    assert!(log.contains("going down"), "it was ended by force after {:?}: {log}", began.elapsed());
    goes_on.join().unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_hard_stop_of_a_server_that_hangs_does_not_wait_for_it() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let pid = Pid::from_raw(i32::try_from(vm.run.as_ref().unwrap().pid.unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    // The server never replies, so a stop that waits for it does not end.
    let stop = propolis.stop(&vm, Duration::ZERO);
    let stopped = tokio::time::timeout(world::PATIENCE, stop).await.unwrap().unwrap();
    assert_eq!(propolis.state(&stopped).await.unwrap(), VmState::Stopped);
    assert!(!world.kernel_has(&vm));
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_timeout_beyond_all_reckoning_is_as_good_as_never() {
    let world = World::new();
    let propolis = world.builder().with_power_off(world::TypesPowerOff).build();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    world::wait_for_console(&propolis, &vm, "login: ").await;
    propolis.stop(&vm, Duration::MAX).await.unwrap();
    propolis.destroy(vm).await.unwrap();
}

#[tokio::test]
async fn a_program_that_takes_too_long_is_dead_before_its_work_is_undone() {
    let world = World::new();
    let propolis = world.builder().program_limit(Duration::from_secs(2)).build();
    // The first call reads the size of the image, the second one clones it.
    world.host().plan_fault(2, CallFault::Late { millis: 4000 }).unwrap();
    let error = propolis.prepare(&world.spec(name())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("zfs clone"), "{error}");
    // By now the program would have completed, were it still running.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(world.left(), Vec::<String>::new());
    world.host().forget_faults().unwrap();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();

    // A call that hangs while it removes something is killed, too, and the next attempt removes the
    // rest.
    world.host().plan_fault(1, CallFault::Hang).unwrap();
    let error = propolis.destroy(vm.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    world.host().forget_faults().unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_vm_whose_removal_has_begun_can_only_be_removed() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    propolis.stop(&vm, Duration::ZERO).await.unwrap();
    // The first call removes the VNIC, the next ones the volumes.
    world.host().plan_fault(2, CallFault::Fail { stderr: "out of sorts".to_owned(), code: 1 }).unwrap();
    let error = propolis.destroy(vm.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Host, "{error}");
    world.host().forget_faults().unwrap();
    let state = propolis.state(&vm).await.unwrap();
    let VmState::Failed { cause } = &state else { panic!("a part of it is gone: {state:?}") };
    assert_eq!(cause.kind, FailureKind::Interrupted, "{cause}");
    let error = propolis.start(&vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}");
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn with_pfexec_before_everything_a_vm_lives_and_a_program_that_hangs_is_killed() {
    let world = World::new();
    // `kill` is the system's; pfexec executes the command in its place.
    let path = std::env::join_paths([world.host().path(), "/bin".into()]).unwrap();
    let builder = world.builder().search_path(&path).pfexec(true);
    let propolis = builder.program_limit(Duration::from_secs(2)).build();
    let plan = propolis.plan(&world.spec(name())).await.unwrap().to_string();
    assert!(plan.contains(&format!("run {}", world.host().path().join("pfexec").display())), "{plan}");
    world.host().plan_fault(2, CallFault::Hang).unwrap();
    let error = propolis.prepare(&world.spec(name())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert_eq!(world.left(), Vec::<String>::new());
    world.host().forget_faults().unwrap();

    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    assert_eq!(world.guests(&vm), 1);
    propolis.stop(&vm, Duration::ZERO).await.unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn what_a_server_has_left_in_its_directory_goes_with_the_vm() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let dir = world.path().join("vms/web/server");
    fs::write(dir.join("core.propolis-server.17"), b"a dump").unwrap();
    fs::create_dir(dir.join("more")).unwrap();
    fs::write(dir.join("more/of-it"), b"").unwrap();
    propolis.stop(&vm, Duration::ZERO).await.unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_is_too_old_is_called_so() {
    let remote = Remote::behaving(PropolisBehaviour {
        latest_version: Some("1.0.0".to_owned()),
        ..PropolisBehaviour::default()
    });
    let propolis = remote.hypervisor();
    let mut options = BackendOptions::default();
    options.set("address", remote.proxy.address().to_string()).unwrap();
    options.set("serial-number", "rack-7").unwrap();
    let spec = remote.bare(name()).backend_options(options).build().unwrap();
    let vm = propolis.prepare(&spec).await.unwrap();
    let error = propolis.start(&vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Hypervisor);
    assert!(error.to_string().contains("too old") && error.to_string().contains("2.0.0"), "{error}");
    propolis.destroy(vm).await.unwrap();

    // A spec that needs only the first version runs there.
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_failure_is_read_from_the_log_when_its_copy_was_lost() {
    let world = World::new();
    let ensure_fails = Some("no such VNIC under the moon".to_owned());
    world
        .host()
        .behave(&PropolisBehaviour { ensure_fails, chatter: 20_000, ..PropolisBehaviour::default() })
        .unwrap();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let error = propolis.start(&vm).await.unwrap_err();
    assert!(error.to_string().contains("under the moon"), "{error}");
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_takes_its_time_to_let_go_is_waited_for() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    for _ in 0..2 {
        propolis.start(&vm).await.unwrap();
        let (held, orders) = (remote.hold(Gate::Release), remote.orders());
        let mut stop = std::pin::pin!(propolis.stop(&vm, Duration::ZERO));
        let asked = async {
            remote.wait_at(Gate::Release, orders).await;
            // A stop that doesn't wait would end after one more reply of the server.
            for _ in 0..10 {
                let _ = propolis.state(&vm).await;
            }
        };
        tokio::select! {
            stopped = &mut stop => panic!("the server has not let go: {stopped:?}"),
            () = asked => assert_eq!(remote.guests(&vm), 1),
        }
        drop(held);
        stop.await.unwrap();
        assert_eq!(remote.guests(&vm), 0);
    }
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_vm_created_after_its_start_was_given_up_is_ended_then() {
    let remote = Remote::new();
    let propolis = remote.builder().start_limit(Duration::from_secs(1)).build();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let held = remote.hold(Gate::Ensure);
    let makes_it = async {
        // Past the timeout of the start, for which there is no event.
        tokio::time::sleep(Duration::from_secs(2)).await;
        drop(held);
    };
    let (started, ()) = tokio::join!(propolis.start(&vm), makes_it);
    assert_eq!(started.unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(remote.left().len(), 1, "no guest is left: {:?}", remote.left());
    assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Stopped);
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_wait_for_a_vm_that_is_being_started_ends_with_its_console_output() {
    let remote = Remote::new();
    let home = Home::at(remote.path().join("home")).unwrap();
    let propolis = PropolisHypervisor::builder(home.vms()).search_path("/nonexistent".as_ref()).build();
    let manager = VmManager::new(propolis, home);
    manager.create(remote.spec(name())).await.unwrap();
    let web = name();
    let held = remote.hold(Gate::Ensure);
    let goes_on = async {
        remote.wait_at(Gate::Ensure, 0).await;
        // Meanwhile the wait polls the state more than once; the server does not report requests.
        tokio::time::sleep(Duration::from_millis(300)).await;
        drop(held);
    };
    let waited = manager.wait(&web, WaitCondition::Running, Duration::from_secs(60));
    let (started, waited, ()) = tokio::join!(manager.start(&web), waited, goes_on);
    started.unwrap();
    let vm = waited.unwrap();
    assert_eq!(vm.state, VmState::Running);
    world::wait_for_console(manager.hypervisor(), &vm, "login: ").await;

    let error = manager.wait(&web, WaitCondition::Stopped, Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("login:"), "{error}");
    manager.remove(&web, true).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_program_at_the_console_reads_earlier_output_and_the_end_of_the_vm() {
    let remote = Remote::new();
    let home = Home::at(remote.path().join("home")).unwrap();
    let propolis = PropolisHypervisor::builder(home.vms()).search_path("/nonexistent".as_ref()).build();
    let manager = VmManager::new(propolis, home);
    manager.create(remote.spec(name())).await.unwrap();
    let (web, soon) = (name(), || Duration::from_secs(60));
    let vm = manager.start(&web).await.unwrap();
    // No client is at the console, so the server sends its last chunk to the first one again.
    world::wait_for_words(manager.hypervisor(), &vm, "login: ").await;
    let mut console = manager.attach_console(&web).await.unwrap();
    console.wait_for("login: ", soon()).await.unwrap();
    // The fake's guest prints what a test orders, and accepts any number of clients.
    let mut other = manager.attach_console(&web).await.unwrap();
    console.send("hello\r", soon()).await.unwrap();
    assert_eq!(console.wait_for("hello", soon()).await.unwrap(), b"hello");
    let said = other.wait_for("login: hello", soon()).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&said), "no guest runs here\r\nlogin: hello");
    let shortly = Duration::from_millis(300);
    let stale = console.wait_for("login: ", shortly).await.unwrap_err();
    assert_eq!(stale.kind(), ErrorKind::TimedOut, "earlier output does not match: {stale}");
    manager.stop(&web, Duration::ZERO).await.unwrap();
    let ended = console.wait_for("never said", soon()).await.unwrap_err();
    assert_eq!(ended.kind(), ErrorKind::InvalidState, "{ended}");
    manager.remove(&web, true).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn disks_of_a_server_elsewhere_are_named_and_not_searched_here() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let mut options = BackendOptions::default();
    options.set("address", "192.0.2.7:12400").unwrap();
    options.set("vnic", "web0").unwrap();
    let shared = DataDisk::Existing { path: "/dev/zvol/rdsk/tank/shared".into(), readonly: true };
    let spec = remote
        .bare(name())
        .disk(RootDisk { image: "/dev/zvol/rdsk/tank/web".into(), size: None })
        .data_disks(vec![shared])
        .network(NetworkConfig::Vnic { link: "net0".parse().unwrap() })
        .backend_options(options)
        .build()
        .unwrap();
    let plan = propolis.plan(&spec).await.unwrap();
    assert_eq!(plan.prepare, [], "nothing is made here");
    let request = serde_json::to_string(&plan.request).unwrap();
    for named in ["/dev/zvol/rdsk/tank/web", "/dev/zvol/rdsk/tank/shared", "web0"] {
        assert!(request.contains(named), "{request}");
    }
    // It was never started, so no server has to be asked.
    let vm = propolis.prepare(&spec).await.unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}
