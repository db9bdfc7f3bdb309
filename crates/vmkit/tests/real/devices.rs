//! The versions of a VM's devices: an earlier one is continued with, and a later one moves nothing.

use std::fs;

use serde_json::{Value, json};
use vmkit::abilities::SaveToDisk;
use vmkit::qemu::DeviceVersion;
use vmkit::spec::{DataDisk, MachineType, Mib, VmSpecBuilder};
use vmkit::{Hypervisor, QemuHypervisor, VmState};
use vmkit_testkit::guest;

use crate::harness::{LONG, Monitor, Place, booted, builder, console_says, run, sh};

fn tiny(name: &str, machine: MachineType) -> VmSpecBuilder {
    let fresh = DataDisk::Fresh { size: Mib::new(8).unwrap() };
    guest::tiny().spec(name, machine, "").data_disks(vec![fresh])
}

/// Returns a hypervisor whose guests boot with the first devices.
fn first(place: &Place) -> QemuHypervisor {
    builder(place.path()).devices(DeviceVersion::V1).build()
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_saved_with_the_first_devices_continues_with_them_and_boots_with_the_newest() {
    let place = Place::new();
    let earlier = first(&place);
    let vm = booted(&earlier, &tiny("old", MachineType::Q35).build().unwrap()).await;
    let work = place.work_dir(&vm);
    // As a vmkit that knew of no versions wrote it.
    let record = fs::read_to_string(work.join("qemu.json")).unwrap();
    assert!(record.contains(",\"devices\":1"), "{record}");
    fs::write(work.join("qemu.json"), record.replace(",\"devices\":1", "")).unwrap();
    sh(&earlier, &vm, "echo kept >/run/memory").await;

    let mut vm = vm;
    let qemu = place.hypervisor();
    for _ in 0..2 {
        let saved = qemu.save(&vm).await.unwrap();
        let record: Value = serde_json::from_slice(&fs::read(work.join("saved.json")).unwrap()).unwrap();
        assert_eq!(record["command_line"], 1);
        let plan = qemu.plan_start(&saved).await.unwrap();
        assert_eq!(plan.devices, DeviceVersion::V1);
        assert!(plan.to_string().contains("devices of version 1\n"), "{plan}");
        vm = qemu.start(&saved).await.unwrap();
        assert_eq!(sh(&qemu, &vm, "cat /run/memory").await, "kept");
        assert!(!Monitor::of(run(&vm)).devices().contains(&"rp0".to_owned()));
    }
    let stopped = qemu.stop(&vm, LONG).await.unwrap();
    assert_eq!(qemu.plan_start(&stopped).await.unwrap().devices, DeviceVersion::NEWEST);
    let vm = qemu.start(&stopped).await.unwrap();
    assert!(Monitor::of(run(&vm)).devices().contains(&"rp0".to_owned()));
    console_says(&vm, "vmkit-guest: ready").await;
    let saved = qemu.save(&vm).await.unwrap();
    let record: Value = serde_json::from_slice(&fs::read(work.join("saved.json")).unwrap()).unwrap();
    assert_eq!(record["command_line"], DeviceVersion::NEWEST.number());
    assert_eq!(qemu.start(&saved).await.unwrap().state, VmState::Running);
    qemu.destroy(saved).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_run_with_the_devices_of_a_newer_vmkit_is_not_saved() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &tiny("new", MachineType::Q35).build().unwrap()).await;
    let path = place.work_dir(&vm).join("qemu.json");
    let (newest, newer) = (DeviceVersion::NEWEST.number(), DeviceVersion::NEWEST.number() + 1);
    let record = fs::read_to_string(&path).unwrap();
    let [known, unknown] = [newest, newer].map(|number| format!("\"devices\":{number}"));
    assert!(record.contains(&known), "{record}");
    fs::write(&path, record.replace(&known, &unknown)).unwrap();
    let error = qemu.save(&vm).await.unwrap_err().to_string();
    let expected = format!(
        "the devices have version {newer} (expected 1 to {newest}): the guest was started by a newer vmkit"
    );
    assert!(error.contains(&expected), "{error}");
    assert_eq!(sh(&qemu, &vm, "echo runs on").await, "runs on");
    qemu.destroy(vm).await.unwrap();
}

/// Prints where the guest has its network and its disk.
const WHERE: &str = "for at in /sys/class/net/*/device /sys/block/vd*/device; do readlink -f $at; done";

#[tokio::test(flavor = "current_thread")]
async fn network_and_disks_have_the_same_place_in_every_version() {
    let place = Place::new();
    for machine in [MachineType::Q35, MachineType::Microvm] {
        let mut places = Vec::new();
        for qemu in [first(&place), place.hypervisor()] {
            let vm = booted(&qemu, &tiny("where", machine).build().unwrap()).await;
            let found = sh(&qemu, &vm, WHERE).await;
            assert_eq!(found.lines().count(), 2, "{found}");
            places.push(found);
            qemu.destroy(vm).await.unwrap();
        }
        assert_eq!(places[0], places[1], "{machine:?}");
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_running_guest_takes_a_device_in_each_root_port_and_gives_it_back() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &tiny("ports", MachineType::Q35).build().unwrap()).await;
    let ports = DeviceVersion::NEWEST.root_ports(MachineType::Q35);
    assert!(ports > 0);
    let mut monitor = Monitor::of(run(&vm));
    for port in 0..ports {
        let node = format!("hot{port}");
        monitor.execute("blockdev-add", json!({ "driver": "null-co", "node-name": node, "size": 1 << 20 }));
        let device = json!({ "driver": "virtio-blk-pci", "id": node, "drive": node, "serial": node, "bus": format!("rp{port}") });
        monitor.execute("device_add", device);
    }
    let wait = |count| {
        format!(
            "until [ $(ls /sys/block | grep -c ^vd) = {count} ]; do sleep 0.1; done; cat /sys/block/vd*/serial"
        )
    };
    let all = sh(&qemu, &vm, &wait(1 + ports)).await;
    for port in 0..ports {
        assert!(all.contains(&format!("hot{port}")), "{all}");
        monitor.execute("device_del", json!({ "id": format!("hot{port}") }));
    }
    assert_eq!(sh(&qemu, &vm, &wait(1)).await, "data0");
    qemu.destroy(vm).await.unwrap();
}
