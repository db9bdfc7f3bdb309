//! Snapshots: taken of guests that live and of VMs that do not, restored and removed.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vmkit::abilities::{GuestAgentChannel, MemoryMode, SnapshotKind, Snapshots};
use vmkit::spec::{DataDisk, MachineType, Mib, SnapshotName, VmSpecBuilder};
use vmkit::{ErrorKind, Hypervisor, QemuHypervisor, VmHandle, VmState};
use vmkit_testkit::guest;

use crate::harness::{self, LONG, Place, booted, console_text};

/// Counts in memory and on two disks, the disks first, until `/run/stop` is there.
const COUNT: &str = "i=0; while [ ! -e /run/stop ]; do i=$((i+1)); printf %08d $i >/run/next; \
                     for disk in vda vdb; do \
                     dd if=/run/next of=/dev/$disk conv=notrunc,fsync 2>/dev/null; done; \
                     cp /run/next /run/count; done";

pub(crate) fn tiny(name: &str) -> VmSpecBuilder {
    let fresh = || DataDisk::Fresh { size: Mib::new(8).unwrap() };
    guest::tiny().spec(name, MachineType::Q35, "").data_disks(vec![fresh(), fresh()])
}

pub(crate) fn named(name: &str) -> SnapshotName {
    SnapshotName::new(name).unwrap()
}

pub(crate) async fn sh(qemu: &QemuHypervisor, vm: &VmHandle, script: &str) -> String {
    let output = qemu.agent_exec(vm, "/bin/sh", &["-c", script], LONG).await;
    let output = output.unwrap_or_else(|error| panic!("{script}: {error}; {}", console_text(vm)));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub(crate) async fn write(qemu: &QemuHypervisor, vm: &VmHandle, text: &str) {
    let script = format!(
        "for disk in vda vdb; do printf {text} | dd of=/dev/$disk bs=512 seek=100 conv=sync,notrunc,fsync; done 2>&1"
    );
    sh(qemu, vm, &script).await;
}

/// Returns what the first bytes of both disks are where [`write`] writes.
pub(crate) async fn read(qemu: &QemuHypervisor, vm: &VmHandle) -> String {
    let script = "for disk in vda vdb; do dd if=/dev/$disk bs=512 skip=100 count=1 2>/dev/null | tr -d '\\0'; echo; done";
    let both = sh(qemu, vm, &format!("echo 3 >/proc/sys/vm/drop_caches; {script}")).await;
    let (one, other) = both.split_once('\n').unwrap_or((&both, &both));
    assert_eq!(one, other, "both disks are of one instant");
    one.to_owned()
}

/// Checks that a snapshot's and the VM's own files are what QEMU takes for whole.
pub(crate) fn check(work: &Path) {
    for name in harness::entries(work).into_iter().filter(|name| name.ends_with(".qcow2")) {
        let output =
            Command::new("qemu-img").args(["check", "-q", "-U"]).arg(work.join(&name)).output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

pub(crate) fn layers(work: &Path) -> Vec<String> {
    harness::entries(work).into_iter().filter(|name| name.len() > 20 && name.ends_with(".qcow2")).collect()
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_goes_back_to_a_snapshot_of_its_memory_and_its_disks() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &tiny("back").build().unwrap()).await;
    let work = place.work_dir(&vm);
    sh(&qemu, &vm, &format!("({COUNT}) >/dev/null 2>&1 & until [ -e /run/count ]; do :; done")).await;

    let taken = qemu.create_snapshot(&vm, &named("one"), MemoryMode::Include).await.unwrap();
    assert_eq!((taken.kind, taken.is_current), (SnapshotKind::Memory, true));
    assert!(taken.bytes > 1 << 20, "{taken:?}");
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running);
    let later: u32 = sh(&qemu, &vm, "cat /run/count").await.parse().unwrap();
    sh(&qemu, &vm, &format!("until [ $(cat /run/count) -gt {} ]; do :; done", later + 20)).await;
    let again = qemu.create_snapshot(&vm, &named("one"), MemoryMode::Include).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists, "{again}");

    let saved = qemu.restore_snapshot(&vm, &named("one")).await.unwrap();
    assert_eq!(saved.state, VmState::Saved);
    // As by another program.
    let qemu = place.hypervisor();
    let vm = qemu.start(&saved).await.unwrap();
    let read_both = "touch /run/stop; sleep 1; echo 3 >/proc/sys/vm/drop_caches; \
                     for disk in vda vdb; do head -c 8 /dev/$disk; echo; done; cat /run/count";
    let all = sh(&qemu, &vm, read_both).await;
    let counts: Vec<u32> = all.lines().map(|count| count.trim().parse().unwrap()).collect();
    let [first, second, memory] = counts[..] else { panic!("{all}") };
    assert!(first == second && (first == memory || first == memory + 1), "{all}");
    // A snapshot can be restored again and again.
    let vm = qemu.restore_snapshot(&vm, &named("one")).await.unwrap();
    let vm = qemu.start(&vm).await.unwrap();
    assert_eq!(sh(&qemu, &vm, "ls /run/stop 2>&1 | wc -l; ls /run/stop 2>/dev/null").await, "1");
    check(&work);
    qemu.destroy(vm).await.unwrap();
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "current_thread")]
async fn snapshots_are_a_tree_and_one_in_the_middle_is_removed_without_harm() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &tiny("tree").build().unwrap()).await;
    let work = place.work_dir(&vm);
    for text in ["a", "b", "c"] {
        write(&qemu, &vm, text).await;
        let taken = qemu.create_snapshot(&vm, &named(text), MemoryMode::DisksOnly).await.unwrap();
        assert!(matches!(taken.kind, SnapshotKind::Quiesced | SnapshotKind::CrashConsistent), "{taken:?}");
    }
    write(&qemu, &vm, "now").await;
    let tree = async |qemu: &QemuHypervisor, vm: &VmHandle| {
        let all = qemu.snapshots(vm).await.unwrap();
        let shown = all.iter().map(|it| {
            let parent = it.parent.as_ref().map_or("-", SnapshotName::as_str);
            format!("{parent}>{}{}", it.name, if it.is_current { "*" } else { "" })
        });
        shown.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(tree(&qemu, &vm).await, "->a a>b b>c*");
    // While the VM runs: into a layer, and into the disk that the guest writes to.
    qemu.remove_snapshot(&vm, &named("b")).await.unwrap();
    assert_eq!(tree(&qemu, &vm).await, "->a a>c*");
    assert_eq!(layers(&work).len(), 4, "{:?}", layers(&work));
    qemu.remove_snapshot(&vm, &named("c")).await.unwrap();
    assert_eq!(tree(&qemu, &vm).await, "->a*");
    assert_eq!(layers(&work).len(), 2, "{:?}", layers(&work));
    assert_eq!(read(&qemu, &vm).await, "now");
    let missing = qemu.remove_snapshot(&vm, &named("c")).await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");

    let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
    let taken = qemu.create_snapshot(&vm, &named("d"), MemoryMode::Include).await.unwrap();
    assert_eq!(taken.kind, SnapshotKind::Stopped);
    let vm = qemu.restore_snapshot(&vm, &named("a")).await.unwrap();
    assert_eq!(vm.state, VmState::Stopped);
    let vm = booted_again(&qemu, &vm).await;
    assert_eq!(read(&qemu, &vm).await, "a");
    write(&qemu, &vm, "e").await;
    let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
    qemu.create_snapshot(&vm, &named("e"), MemoryMode::DisksOnly).await.unwrap();
    assert_eq!(tree(&qemu, &vm).await, "->a a>d a>e*");
    // Two are over the one that goes.
    qemu.remove_snapshot(&vm, &named("a")).await.unwrap();
    assert_eq!(tree(&qemu, &vm).await, "->d ->e*");
    check(&work);
    for (name, text) in [("d", "now"), ("e", "e")] {
        let vm = qemu.restore_snapshot(&vm, &named(name)).await.unwrap();
        let vm = booted_again(&qemu, &vm).await;
        assert_eq!(read(&qemu, &vm).await, text, "{name}");
    }
    for name in ["d", "e"] {
        qemu.remove_snapshot(&vm, &named(name)).await.unwrap();
    }
    assert_eq!(layers(&work), Vec::<String>::new());
    let left = harness::entries(&work.join("snapshots"));
    assert_eq!(left, Vec::<String>::new());
    qemu.destroy(vm).await.unwrap();
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

pub(crate) async fn booted_again(qemu: &QemuHypervisor, vm: &VmHandle) -> VmHandle {
    let vm = qemu.start(vm).await.unwrap();
    assert!(qemu.agent_responds(&vm, LONG).await.unwrap(), "{}", console_text(&vm));
    vm
}
