//! A VM whose spec has changed since it was made is what it shall be from its next start on.

use std::fs;
use std::time::Duration;

use vmkit::propolis::StepDiff;
use vmkit::spec::{Mib, NetworkConfig, RootDisk, VmName, VmSpecBuilder};
use vmkit::{ErrorKind, Hypervisor, VmHandle};
use vmkit_testkit::propolis::illumos::CallFault;

use super::world::World;

fn name() -> VmName {
    VmName::new("web").unwrap()
}

fn over(link: &str) -> NetworkConfig {
    NetworkConfig::Vnic { link: link.parse().unwrap() }
}

fn clone_of(mib: u64) -> RootDisk {
    RootDisk { image: "zfs:tank/img/debian@base".into(), size: Some(Mib::new(mib).unwrap()) }
}

/// Returns the VM as a manager would start it once it was reconfigured.
fn reshaped(vm: &VmHandle, spec: VmSpecBuilder) -> VmHandle {
    let mut vm = vm.clone();
    vm.spec = spec.build().unwrap().with_id(vm.id);
    vm
}

/// Returns what lies under the VM's VNIC, where it has one, and how large its root disk is.
fn seen(world: &World, vm: &VmHandle) -> (Option<String>, Option<u64>) {
    let state = world.host().state().unwrap();
    let link = state.links.values().find_map(|link| link.over.clone());
    let volume = state.datasets.get(&format!("tank/vm/{}", vm.id));
    (link, volume.and_then(|volume| volume.volsize).map(|bytes| bytes >> 20))
}

#[tokio::test]
async fn another_network_and_a_larger_disk_come_with_the_next_start() {
    let world = World::new();
    world.host().add_link("net1").unwrap();
    let propolis = world.hypervisor();
    let bare = || world.bare(name());
    let vm = propolis.prepare(&bare().build().unwrap()).await.unwrap();
    for (spec, link, mib, planned) in [
        (bare(), Some("net0"), 2, [0, 0, 1]),
        (bare().disk(clone_of(3)).network(over("net1")), Some("net1"), 3, [1, 2, 0]),
        (bare().disk(clone_of(3)).network(NetworkConfig::None), None, 3, [1, 0, 0]),
        (bare().disk(clone_of(4)).network(over("net0")), Some("net0"), 4, [0, 2, 0]),
    ] {
        let vm = reshaped(&vm, spec);
        let plan = propolis.plan_start(&vm).await.unwrap();
        let StepDiff { going, coming, again, .. } = &plan.update;
        assert_eq!([going.len(), coming.len(), again.len()], planned, "{plan}");
        assert_eq!(plan.prepare, []);
        let vm = propolis.start(&vm).await.unwrap();
        assert_eq!(seen(&world, &vm), (link.map(str::to_owned), Some(mib)));
        propolis.stop(&vm, Duration::ZERO).await.unwrap();
    }
    let smaller = reshaped(&vm, bare().disk(clone_of(3)));
    let error = propolis.start(&smaller).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert_eq!(seen(&world, &vm).1, Some(4), "it would lose what is behind");
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_disk_that_is_a_file_grows_and_keeps_what_is_on_it() {
    let world = World::new();
    let image = world.path().join("debian.raw");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let disk =
        |size: Option<u64>| RootDisk { image: image.clone(), size: size.map(|mib| Mib::new(mib).unwrap()) };
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&world.bare(name()).disk(disk(None)).build().unwrap()).await.unwrap();
    let path = world.path().join("vms/web/root.raw");
    fs::write(&path, vec![8; 1 << 20]).unwrap();
    let vm = reshaped(&vm, world.bare(name()).disk(disk(Some(2))));
    let vm = propolis.start(&vm).await.unwrap();
    let found = fs::read(&path).unwrap();
    assert_eq!((found.len(), found[0]), (2 << 20, 8));
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_reshaping_that_fails_anywhere_is_done_the_next_time_or_removed() {
    for goes_on in [true, false] {
        for nth in 1..8 {
            let world = World::new();
            world.host().add_link("net1").unwrap();
            let propolis = world.hypervisor();
            let vm = propolis.prepare(&world.bare(name()).build().unwrap()).await.unwrap();
            let vm = reshaped(&vm, world.bare(name()).disk(clone_of(3)).network(over("net1")));
            let fault = CallFault::FailAfterwards { stderr: "out of sorts".to_owned(), code: 1 };
            world.host().plan_fault(nth, fault).unwrap();
            let started = propolis.start(&vm).await;
            world.host().forget_faults().unwrap();
            if let Err(error) = &started {
                assert_eq!(error.kind(), ErrorKind::Host, "{error}");
            }
            if goes_on {
                let vm = propolis.start(&vm).await.unwrap();
                assert_eq!(seen(&world, &vm), (Some("net1".to_owned()), Some(3)), "call {nth}");
            }
            propolis.destroy(vm).await.unwrap();
            assert_eq!(world.left(), Vec::<String>::new(), "call {nth}");
        }
    }
}
