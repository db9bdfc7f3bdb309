//! Servers that handle a request late, or are silent meanwhile.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use vmkit::spec::VmName;
use vmkit::{ErrorKind, Hypervisor, PropolisHypervisor, VmHandle, VmState};
use vmkit_testkit::propolis::{DeathPoint, Gate, PropolisBehaviour};

use super::world::{self, Remote, World};

fn name() -> VmName {
    VmName::new("web").unwrap()
}

/// Starts a VM, and ends it as the kill of its process does, once the server asks its host for
/// CPUID.
async fn kill_while_the_host_is_asked(remote: &Remote, propolis: &PropolisHypervisor, vm: &VmHandle) {
    let (end, ended) = channel::<()>();
    let starting = {
        let (propolis, vm) = (propolis.clone(), vm.clone());
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            let start = runtime.spawn(async move { propolis.start(&vm).await });
            ended.recv().unwrap();
            assert!(!start.is_finished());
            // The runtime with all of its tasks, and their locks.
            drop(runtime);
        })
    };
    remote.wait_at(Gate::Host, 0).await;
    end.send(()).unwrap();
    starting.join().unwrap();
}

/// Returns the state of a VM whose operation was killed. A child that another test's thread is just
/// spawning has a copy of the operation's lock for a moment.
async fn settled(propolis: &PropolisHypervisor, vm: &VmHandle) -> VmState {
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        match propolis.state(vm).await {
            Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < limit => {
                // The end of a copy is no event.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            state => return state.unwrap(),
        }
    }
}

#[tokio::test]
async fn a_vm_that_comes_after_its_start_was_killed_is_ended_by_stop_start_and_destroy() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    // In the first round the server has had no VM yet, afterwards it reports the state of the last
    // one.
    for operation in ["stop", "start", "stop", "destroy"] {
        let held = remote.hold(Gate::Host);
        kill_while_the_host_is_asked(&remote, &propolis, &vm).await;
        let state = settled(&propolis, &vm).await;
        assert!(matches!(state, VmState::Failed { .. }), "{operation}: a start was interrupted: {state:?}");
        let comes_late = async {
            // Meanwhile the operation finds no VM; one that appears sooner is ended as well.
            tokio::time::sleep(Duration::from_millis(700)).await;
            drop(held);
        };
        let operate = async {
            match operation {
                "stop" => drop(propolis.stop(&vm, Duration::ZERO).await.unwrap()),
                "start" => {
                    propolis.start(&vm).await.unwrap();
                    assert_eq!(remote.guests(&vm), 1);
                    drop(propolis.stop(&vm, Duration::ZERO).await.unwrap());
                }
                _ => propolis.destroy(vm.clone()).await.unwrap(),
            }
        };
        tokio::join!(operate, comes_late);
        assert_eq!(remote.kernel_vms(), Vec::<String>::new(), "{operation}");
        let expected = if operation == "destroy" { VmState::Destroyed } else { VmState::Stopped };
        assert_eq!(propolis.state(&vm).await.unwrap(), expected, "{operation}");
    }
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_vm_that_comes_after_its_start_was_given_up_is_ended() {
    let remote = Remote::new();
    let propolis = remote.builder().start_limit(Duration::from_secs(1)).build();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let held = remote.hold(Gate::Host);
    let comes_late = async {
        // Past the timeout of the start, for which there is no event.
        tokio::time::sleep(Duration::from_secs(3)).await;
        drop(held);
    };
    let (started, ()) = tokio::join!(propolis.start(&vm), comes_late);
    assert_eq!(started.unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(remote.kernel_vms(), Vec::<String>::new());

    // A VM that appears when the start no longer waits is still this VM's: the next operation ends
    // it.
    let held = remote.hold(Gate::Host);
    assert_eq!(propolis.start(&vm).await.unwrap_err().kind(), ErrorKind::TimedOut);
    assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Stopped);
    drop(held);
    while remote.guests(&vm) == 0 {
        // The fake has no event for it.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_is_killed_while_it_asks_the_host_leaves_nothing_in_the_kernel() {
    let world = World::new();
    world
        .host()
        .behave(&PropolisBehaviour { asks_host_millis: 600_000, ..PropolisBehaviour::default() })
        .unwrap();
    let propolis = world.builder().start_limit(Duration::from_secs(4)).build();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    assert_eq!(propolis.start(&vm).await.unwrap_err().kind(), ErrorKind::TimedOut);
    let left = world.left();
    assert!(!left.iter().any(|left| left.contains("kernel VM") || left.contains("server ")), "{left:?}");
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_is_silent_while_it_pauses_a_vm_is_asked_for_the_state_alone() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let held = remote.hold(Gate::Pause);
    remote.power_off();
    remote.wait_at(Gate::Pause, 0).await;
    assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Running, "it is on its way out");
    assert_eq!(propolis.guest_ip(&vm).await.unwrap(), "10.0.0.9");
    drop(held);
    world::wait_for_state(&propolis, &vm, &VmState::Stopped).await;
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_halt_at_a_server_elsewhere_is_waited_for_however_slow_its_disks_are() {
    let remote = Remote::behaving(PropolisBehaviour { pause_millis: 14_000, ..PropolisBehaviour::default() });
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let second = async {
        // A concurrent stop waits for the same end.
        remote.wait_at(Gate::Pause, 0).await;
        propolis.stop(&vm, Duration::ZERO).await
    };
    let (stopped, again) = tokio::join!(propolis.stop(&vm, Duration::ZERO), second);
    assert_eq!((stopped.unwrap().state, again.unwrap().state), (VmState::Stopped, VmState::Stopped));
    assert_eq!(remote.guests(&vm), 0);
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_creates_a_vm_forever_is_reported_at_the_deadline() {
    let unwinds =
        PropolisBehaviour { dies: Some(DeathPoint::Ensure), unwinds: true, ..PropolisBehaviour::default() };
    let mut remote = Remote::behaving(unwinds);
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let began = Instant::now();
    let error = propolis.start(&vm).await.unwrap_err();
    let took = began.elapsed();
    assert_eq!(error.kind(), ErrorKind::Hypervisor, "{error}");
    let id = remote.request_id_of("response_code\":500");
    assert!(error.to_string().contains(&id), "its log has the reason by the request {id}: {error}");
    assert!(took < Duration::from_secs(30), "it had answered that it can't: {took:?}");

    let error = propolis.destroy(vm.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    for told in ["`Creating`", "until it is ended"] {
        assert!(error.to_string().contains(told), "{error}");
    }
    remote.end_server();
    propolis.destroy(vm).await.unwrap();
    assert!(!remote.path().join("vms/web").exists());
}

#[tokio::test]
async fn a_start_that_fails_elsewhere_reports_no_more_than_is_known() {
    let remote = Remote::behaving(PropolisBehaviour { start_fails: true, ..PropolisBehaviour::default() });
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let error = propolis.start(&vm).await.unwrap_err().to_string();
    assert!(error.ends_with("its server reports Failed"), "{error}");
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}
