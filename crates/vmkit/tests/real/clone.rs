//! Clones: of VMs that do not run and of snapshots, linked and full.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use uuid::Uuid;
use vmkit::abilities::{CloneMode, CloneRequest, Clones, IdentityPolicy, MemoryMode, Snapshots};
use vmkit::spec::SnapshotName;
use vmkit::{ErrorKind, Hypervisor, QemuHypervisor, VmHandle, VmState};

use crate::harness::{self, Place, booted};
use crate::snapshot::{booted_again, check, layers, named, read, sh, tiny, write};

fn request(name: &str, snapshot: Option<SnapshotName>, mode: CloneMode) -> CloneRequest {
    let mut request = CloneRequest::new(tiny(name).build().unwrap().with_id(Uuid::new_v4()));
    request.snapshot = snapshot;
    request.mode = mode;
    request
}

/// Boots a VM, and returns what [`write`] has written to its disks.
async fn content(qemu: &QemuHypervisor, vm: &VmHandle) -> (VmHandle, String) {
    let vm = booted_again(qemu, vm).await;
    let found = read(qemu, &vm).await;
    (vm, found)
}

fn links(path: &Path) -> u64 {
    fs::metadata(path).unwrap().nlink()
}

#[tokio::test(flavor = "current_thread")]
async fn clones_start_with_the_disks_of_their_source_and_then_go_their_own_ways() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let source = booted(&qemu, &tiny("source").build().unwrap()).await;
    write(&qemu, &source, "a").await;
    let refused = qemu.create_clone(&source, &request("early", None, CloneMode::Linked)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidState, "{refused}");
    qemu.create_snapshot(&source, &named("then"), MemoryMode::DisksOnly).await.unwrap();
    write(&qemu, &source, "b").await;
    // Of a snapshot, while the source runs.
    let then = request("then", Some(named("then")), CloneMode::Linked);
    let then = qemu.create_clone(&source, &then).await.unwrap();
    let copied = request("copied", Some(named("then")), CloneMode::Full);
    let copied = qemu.create_clone(&source, &copied).await.unwrap();
    let source = qemu.stop(&source, Duration::ZERO).await.unwrap();

    let linked = qemu.create_clone(&source, &request("linked", None, CloneMode::Linked)).await.unwrap();
    assert_eq!(linked.state, VmState::Prepared);
    let frozen = layers(&place.work_dir(&source));
    // Nothing was written in between.
    let second = qemu.create_clone(&source, &request("second", None, CloneMode::Linked)).await.unwrap();
    assert_eq!(layers(&place.work_dir(&source)), frozen);
    let full = qemu.create_clone(&source, &request("full", None, CloneMode::Full)).await.unwrap();
    assert_eq!(layers(&place.work_dir(&source)), frozen);
    assert_eq!(layers(&place.work_dir(&full)), Vec::<String>::new());
    for disk in ["data-0.qcow2", "data-1.qcow2"] {
        assert_eq!(links(&place.work_dir(&full).join(disk)), 1);
    }
    let taken = qemu.create_clone(&source, &request("full", None, CloneMode::Full)).await.unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists, "{taken}");

    let (linked, found) = content(&qemu, &linked).await;
    assert_eq!(found, "b");
    write(&qemu, &linked, "c").await;
    let (source, found) = content(&qemu, &source).await;
    assert_eq!(found, "b");
    write(&qemu, &source, "d").await;
    // A layer of the source that others have, too, is merged without them.
    qemu.remove_snapshot(&source, &named("then")).await.unwrap();
    assert_eq!(read(&qemu, &source).await, "d");
    let source = qemu.stop(&source, Duration::ZERO).await.unwrap();
    check(&place.work_dir(&source));
    qemu.destroy(source).await.unwrap();

    assert_eq!(read(&qemu, &linked).await, "c");
    for (clone, expected) in [(then, "a"), (copied, "a"), (second, "b"), (full, "b"), (linked, "c")] {
        let clone = qemu.stop(&clone, Duration::ZERO).await.unwrap();
        let (clone, found) = content(&qemu, &clone).await;
        assert_eq!(found, expected, "{}", clone.name());
        let clone = qemu.stop(&clone, Duration::ZERO).await.unwrap();
        check(&place.work_dir(&clone));
        qemu.destroy(clone).await.unwrap();
    }
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "current_thread")]
async fn a_chain_of_clones_stays_short() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let source = qemu.prepare(&tiny("source").build().unwrap()).await.unwrap();
    let disks = ["data-0.qcow2", "data-1.qcow2"].map(|disk| place.work_dir(&source).join(disk));
    let mut clones = Vec::new();
    for number in 0..40_u8 {
        for disk in &disks {
            harness::write_to_disk(disk, number);
        }
        let request = request(&format!("clone-{number}"), None, CloneMode::Linked);
        clones.push((number, qemu.create_clone(&source, &request).await.unwrap()));
    }
    let depth = layers(&place.work_dir(&source)).len() / disks.len();
    assert!(depth <= 17, "{depth} layers");
    for (number, clone) in clones {
        for disk in ["data-0.qcow2", "data-1.qcow2"] {
            harness::assert_on_disk(&place.work_dir(&clone).join(disk), number);
        }
        qemu.destroy(clone).await.unwrap();
    }
    for disk in &disks {
        harness::assert_on_disk(disk, 39);
    }
    check(&place.work_dir(&source));
    qemu.destroy(source).await.unwrap();
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

/// Draws random numbers into `/run/drawn`, one after the other; how many is on the disk before
/// each.
const DRAW: &str = "i=0; while :; do i=$((i+1)); printf %08d $i | \
                    dd of=/dev/vda conv=notrunc,fsync 2>/dev/null; \
                    head -c 8 /dev/urandom | od -An -tx1 >>/run/drawn; done";

/// Returns what [`DRAW`] had written to the disk when a layer of it was made.
fn count_in(layer: &Path) -> usize {
    let raw = layer.with_extension("raw");
    let convert = std::process::Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .args([layer, raw.as_path()])
        .status();
    assert!(convert.unwrap().success());
    let text = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    std::str::from_utf8(&text[..8]).unwrap().parse().unwrap()
}

/// Clones of a guest draw from the same state of its kernel. A program that runs before it is
/// renewed draws the same numbers in all of them: 1 to 22 before this was prevented.
#[tokio::test(flavor = "current_thread")]
async fn no_two_forks_draw_the_same_random_number() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let source = booted(&qemu, &tiny("source").build().unwrap()).await;
    let begin = format!("({DRAW}) >/dev/null 2>&1 & until [ -e /run/drawn ]; do :; done");
    sh(&qemu, &source, &begin).await;
    qemu.create_snapshot(&source, &named("plain"), MemoryMode::Include).await.unwrap();
    qemu.create_snapshot(&source, &named("point"), MemoryMode::ForClones).await.unwrap();
    let layer = layers(&place.work_dir(&source)).into_iter().filter(|name| name.starts_with("data-0"));
    let counts = layer.map(|name| count_in(&place.work_dir(&source).join(name)));
    let history = counts.max().unwrap();

    let continuing = |name: &str, snapshot: &str| {
        let mut request = request(name, Some(named(snapshot)), CloneMode::Linked);
        request.memory = MemoryMode::Include;
        request
    };
    let unfit = qemu.create_clone(&source, &continuing("unfit", "plain")).await.unwrap_err();
    assert_eq!(unfit.kind(), ErrorKind::InvalidInput, "{unfit}");
    let mut drawn = Vec::new();
    let mut forks = Vec::new();
    for name in ["one", "two", "three", "four"] {
        let fork = qemu.create_clone(&source, &continuing(name, "point")).await.unwrap();
        assert_eq!(fork.state, VmState::Saved);
        let fork = qemu.start(&fork).await.unwrap();
        let look = format!(
            "until [ $(wc -l </run/drawn) -gt {} ]; do :; done; \
             cat /proc/sys/kernel/hostname /run/drawn",
            history + 5
        );
        let shown = sh(&qemu, &fork, &look).await;
        let (host_name, numbers) = shown.split_once('\n').unwrap();
        assert_eq!(host_name, name);
        drawn.push(numbers.lines().map(str::to_owned).collect::<Vec<_>>());
        forks.push(fork);
    }
    for (index, one) in drawn.iter().enumerate() {
        for other in &drawn[index + 1..] {
            let common = one.iter().zip(other).take_while(|(one, other)| one == other).count();
            assert!(common <= history, "{common} numbers in common, of which {history} are the source's");
            assert!(common + 1 >= history, "{common} of {history}");
            assert!(one[common..].iter().all(|number| !other.contains(number)));
        }
    }
    // Nor does the source stand still any longer.
    let count = sh(&qemu, &source, "wc -l </run/drawn").await;
    sh(&qemu, &source, &format!("until [ $(wc -l </run/drawn) -gt {count} ]; do :; done")).await;
    // One that may share its identity is given it all the same.
    let mut shared = continuing("shared", "plain");
    shared.identity = IdentityPolicy::MayShare;
    let shared = qemu.create_clone(&source, &shared).await.unwrap();
    let shared = qemu.start(&shared).await.unwrap();
    assert_eq!(sh(&qemu, &shared, "cat /proc/sys/kernel/hostname").await, "shared");
    qemu.destroy(source).await.unwrap();
    for fork in forks.into_iter().chain([shared]) {
        assert_eq!(qemu.state(&fork).await.unwrap(), VmState::Running);
        qemu.destroy(fork).await.unwrap();
    }
    assert_eq!(place.leftovers(), Vec::<String>::new());
}
