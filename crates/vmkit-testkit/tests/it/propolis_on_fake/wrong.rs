//! Servers and networks that misbehave.

use std::time::{Duration, Instant};

use vmkit::spec::VmName;
use vmkit::{ErrorKind, FailureKind, Hypervisor, VmState};
use vmkit_testkit::propolis::{DeathPoint, NetworkFault, PropolisBehaviour};

use super::world::{self, Remote, World};

fn name() -> VmName {
    VmName::new("web").unwrap()
}

#[tokio::test]
async fn a_failure_that_the_server_hides_is_read_from_its_log() {
    let world = World::new();
    let fails = Some("no such VNIC under the moon".to_owned());
    world.host().behave(&PropolisBehaviour { ensure_fails: fails, ..PropolisBehaviour::default() }).unwrap();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let error = propolis.start(&vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Hypervisor);
    assert!(error.to_string().contains("under the moon"), "{error}");
    assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Stopped);
    world.host().behave(&PropolisBehaviour::default()).unwrap();
    propolis.start(&vm).await.unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_dies_at_any_point_leaves_nothing_and_its_message_is_reported() {
    for dies in [DeathPoint::Ensure, DeathPoint::Start] {
        let world = World::new();
        world.host().behave(&PropolisBehaviour { dies: Some(dies), ..PropolisBehaviour::default() }).unwrap();
        let propolis = world.hypervisor();
        let vm = propolis.prepare(&world.spec(name())).await.unwrap();
        let error = propolis.start(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Hypervisor, "{dies:?}: {error}");
        if dies == DeathPoint::Ensure {
            let told = error.to_string();
            assert!(told.contains("asked to die at ensure"), "{told}");
            assert!(!told.contains("note: run with") && !told.contains("\":"), "{told}");
        }
        assert!(!world.kernel_has(&vm), "{dies:?}: its half in the kernel is gone");
        world.host().behave(&PropolisBehaviour::default()).unwrap();
        propolis.start(&vm).await.unwrap();
        propolis.destroy(vm).await.unwrap();
        assert_eq!(world.left(), Vec::<String>::new(), "{dies:?}");
    }
}

#[tokio::test]
async fn a_panic_that_a_server_survived_is_reported_with_its_consequence() {
    let world = World::new();
    let unwinds =
        PropolisBehaviour { dies: Some(DeathPoint::Ensure), unwinds: true, ..PropolisBehaviour::default() };
    world.host().behave(&unwinds).unwrap();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let error = propolis.start(&vm).await.unwrap_err();
    for told in ["dropped result channel", "asked to die at ensure"] {
        assert!(error.to_string().contains(told), "{told}: {error}");
    }
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_panic_is_reported_as_the_cause_of_the_end_of_a_server() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    world.run("bhyvectl", &["--destroy", &format!("--vm={}", vm.id)]);
    world::wait_for(&propolis, &vm, |state| matches!(state, VmState::Failed { .. })).await;
    let VmState::Failed { cause } = propolis.state(&vm).await.unwrap() else { panic!("it has failed") };
    assert_eq!(cause.kind, FailureKind::HypervisorKilled, "{cause}");
    assert!(
        cause.detail.contains("SIGABRT") && cause.detail.contains("No such device or address"),
        "{cause}"
    );
    assert!(!cause.detail.contains("RUST_BACKTRACE") && !cause.detail.contains("\":"), "{cause}");
    propolis.start(&vm).await.unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_that_dies_while_it_stops_its_vm_is_cleared_away_all_the_same() {
    let world = World::new();
    world
        .host()
        .behave(&PropolisBehaviour { dies: Some(DeathPoint::Stop), ..PropolisBehaviour::default() })
        .unwrap();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let stopped = propolis.stop(&vm, Duration::ZERO).await.unwrap();
    assert_eq!(propolis.state(&stopped).await.unwrap(), VmState::Stopped);
    assert!(!world.kernel_has(&vm));
    propolis.destroy(stopped).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn the_message_of_a_server_that_refuses_to_run_reaches_the_caller() {
    let world = World::new();
    let refusal = Some("viona is too old".to_owned());
    world.host().behave(&PropolisBehaviour { refusal, ..PropolisBehaviour::default() }).unwrap();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(name())).await.unwrap();
    let error = propolis.start(&vm).await.unwrap_err();
    assert!(error.to_string().contains("viona is too old"), "{error}");
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn an_address_without_a_server_or_with_another_one_is_reported() {
    for (fault, kind, reason) in [
        (NetworkFault::Refuse, ErrorKind::Hypervisor, "nothing listens"),
        (NetworkFault::Html, ErrorKind::Hypervisor, "not a Propolis server"),
        (NetworkFault::Junk(b"SSH-2.0-OpenSSH\r\n".to_vec()), ErrorKind::Hypervisor, "not HTTP"),
        (NetworkFault::DropAfter(10), ErrorKind::Hypervisor, ""),
    ] {
        let remote = Remote::new();
        let propolis = remote.hypervisor();
        let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
        remote.proxy.set(Some(fault.clone())).unwrap();
        let error = propolis.start(&vm).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{fault:?}: {error}");
        assert!(error.to_string().contains(reason), "{fault:?}: {error}");
        remote.proxy.set(None).unwrap();
        propolis.destroy(vm).await.unwrap();
        assert_eq!(remote.left(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_server_that_stalls_is_not_regarded_as_dead() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    remote.proxy.set(Some(NetworkFault::Stall)).unwrap();
    let asked = Instant::now();
    let error = propolis.state(&vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(asked.elapsed() < Duration::from_secs(10));
    remote.proxy.set(None).unwrap();
    assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Running);
    propolis.destroy(vm).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_gone_or_has_forgotten_its_vm_is_a_failure_with_its_cause() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let vm = propolis.prepare(&remote.spec(name())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    remote.proxy.set(Some(NetworkFault::Refuse)).unwrap();
    for reason in ["nothing listens", "has no such VM"] {
        let state = propolis.state(&vm).await.unwrap();
        let VmState::Failed { cause } = &state else { panic!("{state:?}") };
        assert_eq!(cause.kind, FailureKind::Vanished);
        assert!(cause.detail.contains(reason), "{cause}");
        remote.proxy.set(None).unwrap();
        remote.forget();
    }
    assert_eq!(propolis.start(&vm).await.unwrap().state, VmState::Running);
    propolis.destroy(vm).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_server_elsewhere_has_one_vm_and_names_it() {
    let remote = Remote::new();
    let propolis = remote.hypervisor();
    let one = propolis.prepare(&remote.spec(name())).await.unwrap();
    let two = propolis.prepare(&remote.spec(VmName::new("other").unwrap())).await.unwrap();
    propolis.start(&one).await.unwrap();
    let error = propolis.start(&two).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains(&one.id.to_string()), "{error}");
    propolis.destroy(two).await.unwrap();
    assert_eq!(propolis.state(&one).await.unwrap(), VmState::Running);
    propolis.destroy(one).await.unwrap();
    assert_eq!(remote.left(), Vec::<String>::new());
}
