//! The Propolis backend on a fake server and on stand-ins for the tools of illumos: it keeps the
//! contract, and cleans up even if they fail.

mod bad_input;
mod ends;
mod homes;
mod late;
mod reshapes;
mod world;
mod wrong;

use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use vmkit::spec::VmName;
use vmkit::{ConsoleEndpoint, FailureKind, Hypervisor, VmState};
use vmkit_testkit::{Conformance, conformance, walk};

use world::{Remote, World};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_for_each_vm_keeps_the_contract() {
    let world = World::new();
    let (specs, vms, guests, left) = (world.clone(), world.clone(), world.clone(), world.clone());
    let (off, typing) = (world.clone(), world.hypervisor());
    let options = Conformance::new(move |name| specs.spec(name))
        .powering_off(
            move |name| off.spec(name),
            move |vm| {
                let typed = world::type_at_console(&typing, vm, "poweroff\r");
                tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(typed));
            },
        )
        .breaking(|vm| world::kill(vm.run.as_ref().unwrap().pid.unwrap()))
        .counting_guests(move |vm| guests.guests(vm))
        .finding_leftovers(move || left.left());
    let report = conformance::run(move || vms.hypervisor(), options).await;
    report.assert();
    println!("{report}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_runs_already_keeps_the_contract_one_vm_after_the_other() {
    let remote = Remote::new();
    let (specs, vms, breaking, guests, left) =
        (remote.clone(), remote.clone(), remote.clone(), remote.clone(), remote.clone());
    let (off, ending) = (remote.clone(), remote.clone());
    let options = Conformance::new(move |name| specs.spec(name))
        .powering_off(move |name| off.spec(name), move |_| ending.power_off())
        .breaking(move |_| breaking.forget())
        .counting_guests(move |vm| guests.guests(vm))
        .finding_leftovers(move || left.left());
    let report = conformance::run(move || vms.hypervisor(), options).await;
    report.assert();
    println!("{report}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, ..ProptestConfig::default() })]
    #[test]
    fn any_walk_keeps_to_the_table(steps in walk::steps(8)) {
        let world = World::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let specs = world.clone();
        let options = Conformance::new(move |name| specs.spec(name));
        let name = VmName::new("walk").unwrap();
        let walked = runtime.block_on(walk::along(&world.hypervisor(), &options, name, &steps));
        walked.map_err(TestCaseError::fail)?;
        prop_assert_eq!(world.left(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn what_prepare_does_to_the_host_destroy_undoes_in_the_order_that_leaks_nothing() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(VmName::new("web").unwrap())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let ConsoleEndpoint::WebSocket(url) = propolis.console_endpoint(&vm).unwrap() else { panic!("{vm:?}") };
    assert!(url.starts_with("ws://127.0.0.1:") && url.ends_with("/instance/serial"), "{url}");
    let id = vm.id;
    propolis.destroy(vm).await.unwrap();
    let calls: Vec<String> = world.host().calls().unwrap().iter().map(|call| call.join(" ")).collect();
    let changes: Vec<&str> = calls.iter().map(String::as_str).collect();
    let of = |word: &str| changes.iter().position(|call| call.starts_with(word)).unwrap_or(usize::MAX);
    assert!(of("zfs clone") < of("zfs set volsize="), "{changes:?}");
    assert!(of("bhyvectl --destroy") < of("dladm delete-vnic"), "{changes:?}");
    assert!(of("dladm delete-vnic") < of("zfs destroy"), "{changes:?}");
    assert!(changes.iter().any(|call| call.ends_with(&format!("tank/vm/{id}"))), "{changes:?}");
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn the_console_is_kept_when_the_vm_is_stopped() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(VmName::new("web").unwrap())).await.unwrap();
    for run in 1..=2 {
        let vm = propolis.start(&vm).await.unwrap();
        // No client is at the console, so the server sends its last chunk to vmkit again.
        world::wait_for_words(&propolis, &vm, "login: ").await;
        propolis.stop(&vm, Duration::ZERO).await.unwrap();
        let log = std::fs::read_to_string(vm.console_log.as_ref().unwrap()).unwrap();
        assert_eq!(log, "no guest runs here\r\nlogin: ".repeat(run));
    }
    propolis.destroy(vm).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_powers_itself_off_has_stopped_and_starts_again_on_the_same_disk() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(VmName::new("web").unwrap())).await.unwrap();
    let running = propolis.start(&vm).await.unwrap();
    world::type_at_console(&propolis, &running, "poweroff\r").await;
    world::wait_for_state(&propolis, &running, &VmState::Stopped).await;
    // A lookup that finds the server gone but the VM in the kernel ends the VM.
    let server = running.run.as_ref().unwrap().pid.unwrap();
    while Path::new(&format!("/proc/{server}")).exists() {
        world::wait_for_state(&propolis, &running, &VmState::Stopped).await;
    }
    assert!(!world.kernel_has(&running));
    world::wait_for_state(&propolis, &running, &VmState::Stopped).await;
    let again = propolis.start(&running).await.unwrap();
    assert_ne!(again.run.as_ref().unwrap().pid, running.run.unwrap().pid);
    assert_eq!(world.guests(&again), 1);
    propolis.destroy(again).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_graceful_stop_asks_the_guest_by_any_channel() {
    let world = World::new();
    let propolis = world.builder().with_power_off(world::TypesPowerOff).build();
    let vm = propolis.prepare(&world.spec(VmName::new("web").unwrap())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    world::wait_for_console(&propolis, &vm, "login: ").await;
    let stopped = propolis.stop(&vm, Duration::from_secs(60)).await.unwrap();
    assert_eq!(stopped.state, VmState::Stopped);
    let log = std::fs::read_to_string(vm.console_log.as_ref().unwrap()).unwrap();
    assert!(log.contains("login: going down\r\n"), "what the guest said while it went down is kept: {log}");
    propolis.destroy(stopped).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_killed_server_is_a_failure_that_start_and_stop_clear_of_the_kernels_half() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(VmName::new("web").unwrap())).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    world::kill(vm.run.as_ref().unwrap().pid.unwrap());
    let state = propolis.state(&vm).await.unwrap();
    let VmState::Failed { cause } = &state else { panic!("{state:?}") };
    assert_eq!(cause.kind, FailureKind::HypervisorKilled, "{cause}");
    assert!(cause.detail.contains("SIGKILL") && cause.detail.contains("still in the kernel"), "{cause}");
    let vm = propolis.start(&vm).await.unwrap();
    assert_eq!(world.guests(&vm), 1);
    world::kill(vm.run.as_ref().unwrap().pid.unwrap());
    propolis.stop(&vm, Duration::ZERO).await.unwrap();
    assert!(!world.kernel_has(&vm));
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_vnic_that_a_reboot_took_is_created_again() {
    let world = World::new();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.spec(VmName::new("web").unwrap())).await.unwrap();
    let state = world.host().state().unwrap();
    let vnic = state.links.iter().find(|(_, link)| link.over.is_some()).unwrap().0.clone();
    world.run("dladm", &["delete-vnic", &vnic]);
    let vm = propolis.start(&vm).await.unwrap();
    assert!(world.host().state().unwrap().links.contains_key(&vnic));
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_guest_at_a_foreign_vnic_is_found_by_the_address_of_the_vnic() {
    let world = World::new();
    world.run("dladm", &["create-vnic", "-t", "-l", "net0", "-m", "2:8:20:0:0:9", "theirs0"]);
    let propolis = world.builder().lease_files(Vec::new()).build();
    let mut options = vmkit::spec::BackendOptions::default();
    options.set("vnic", "theirs0").unwrap();
    let spec = world.bare(VmName::new("web").unwrap()).backend_options(options).build().unwrap();
    let vm = propolis.prepare(&spec).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    assert_eq!(propolis.guest_ip(&vm).await.unwrap_err().kind(), vmkit::ErrorKind::NotFound);
    world.say_neighbour("10.0.0.9", "2:8:20:0:0:9");
    assert_eq!(propolis.guest_ip(&vm).await.unwrap(), "10.0.0.9");
    propolis.destroy(vm).await.unwrap();
    assert!(world.host().state().unwrap().links.contains_key("theirs0"), "it is not vmkit's to remove");
}

#[tokio::test]
async fn a_guest_is_found_by_the_neighbour_table_or_else_by_its_lease() {
    let world = World::new();
    let leases = world.path().join("dnsmasq.leases");
    let propolis = world.builder().lease_files(vec![leases.clone()]).build();
    let spec = world.bare(VmName::new("web").unwrap()).build().unwrap();
    let vm = propolis.prepare(&spec).await.unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    let mac = vmkit::network::MacAddr::of_vm(vm.id).to_string();
    assert_eq!(propolis.guest_ip(&vm).await.unwrap_err().kind(), vmkit::ErrorKind::NotFound);

    std::fs::write(&leases, format!("0 {mac} 10.0.0.7 web *\n")).unwrap();
    assert_eq!(propolis.guest_ip(&vm).await.unwrap(), "10.0.0.7");

    // The kernel's neighbour table takes precedence over old leases.
    world.say_neighbour("10.0.0.9", &mac);
    assert_eq!(propolis.guest_ip(&vm).await.unwrap(), "10.0.0.9");
    propolis.destroy(vm).await.unwrap();
}
