//! Exports and imports of QEMU's VMs: with snapshots and memory, on a full disk, and two at once.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use vmkit::abilities::{GuestAgentChannel, MemoryMode};
use vmkit::image::{OverwritePolicy, no_progress};
use vmkit::spec::{DataDisk, MachineType, Mib, RootDisk, SnapshotName, VmName};
use vmkit::store::Home;
use vmkit::{
    ErrorKind, HostFilePolicy, QemuHypervisor, Result, VmExportOptions, VmExportSummary, VmHandle,
    VmImportOptions, VmImportSummary, VmManager, VmState,
};
use vmkit_testkit::guest;

use crate::harness::{self, LONG, Place, console_says, console_text, in_own_namespaces};

type Manager = VmManager<QemuHypervisor>;

/// The size of the base image, most of which is a hole.
const IMAGE_BYTES: u64 = 64 << 20;

/// Returns a manager of a home of its own.
fn manager(dir: &Path) -> Manager {
    let home = Home::at(dir).unwrap();
    VmManager::new(harness::builder(dir).build(), home)
}

fn named(name: &str) -> SnapshotName {
    SnapshotName::new(name).unwrap()
}

fn web() -> VmName {
    VmName::new("web").unwrap()
}

/// Creates a VM over a sparse image that begins with `base`.
async fn created(manager: &Manager, place: &Place) -> VmHandle {
    let image = place.path().join("base.img");
    fs::write(&image, "base").unwrap();
    fs::File::options().write(true).open(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    let fresh = DataDisk::Fresh { size: Mib::new(8).unwrap() };
    let spec = guest::tiny().spec("web", MachineType::Q35, "").disk(RootDisk { image, size: None });
    manager.create(spec.data_disks(vec![fresh]).build().unwrap()).await.unwrap()
}

async fn export(manager: &Manager, to: &Path) -> Result<VmExportSummary> {
    manager.export(&web(), to, &VmExportOptions::default(), &no_progress()).await
}

async fn import(manager: &Manager, from: &Path) -> Result<VmImportSummary> {
    let options = VmImportOptions::default().with_host_files(HostFilePolicy::Accept);
    manager.import(from, &options, &no_progress()).await
}

async fn sh(manager: &Manager, vm: &VmHandle, script: &str) -> String {
    let output = manager.hypervisor().agent_exec(vm, "/bin/sh", &["-c", script], LONG).await;
    let output = output.unwrap_or_else(|error| panic!("{script}: {error}; {}", console_text(vm)));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Writes a text to both disks and into memory.
async fn write(manager: &Manager, vm: &VmHandle, text: &str) {
    let script = format!(
        "for disk in vda vdb; do printf {text} | dd of=/dev/$disk bs=512 seek=100 conv=sync,notrunc,fsync; done \
         2>/dev/null; echo {text} >/run/text"
    );
    sh(manager, vm, &script).await;
}

/// Returns what both disks and the memory have, and how the base image begins.
async fn read(manager: &Manager, vm: &VmHandle) -> String {
    let script = "echo 3 >/proc/sys/vm/drop_caches; for disk in vda vdb; do \
                  dd if=/dev/$disk bs=512 skip=100 count=1 2>/dev/null | tr -d '\\0'; echo; done; \
                  cat /run/text 2>/dev/null || echo none; head -c 4 /dev/vda";
    sh(manager, vm, script).await.replace('\n', " ")
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

fn check_disks(dir: &Path) {
    for disk in files_below(dir).iter().filter(|path| path.extension().is_some_and(|end| end == "qcow2")) {
        let output = Command::new("qemu-img").args(["check", "-q", "-U"]).arg(disk).output().unwrap();
        assert!(output.status.success(), "{}: {output:?}", disk.display());
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_saved_vm_continues_in_another_home_and_has_its_snapshots_there() {
    let place = Place::new();
    let (here, there) = (manager(&place.path().join("here")), manager(&place.path().join("there")));
    let vm = created(&here, &place).await;
    here.create_snapshot(&web(), &named("empty"), MemoryMode::Include).await.unwrap();
    let vm = { here.start(vm.name()).await.unwrap() };
    console_says(&vm, "vmkit-guest: ready").await;
    write(&here, &vm, "one").await;
    here.create_snapshot(&web(), &named("live"), MemoryMode::Include).await.unwrap();
    write(&here, &vm, "two").await;
    let file = place.path().join("web.vmkit");
    let running = export(&here, &file).await.unwrap_err();
    assert_eq!(running.kind(), ErrorKind::InvalidState, "{running}");
    assert!(running.to_string().contains("stop it, or save it to disk"), "{running}");
    here.save(&web()).await.unwrap();

    let written = export(&here, &file).await.unwrap();
    assert_eq!(written.vm.state, VmState::Saved);
    assert!(written.needs.iter().all(|needed| needed.starts_with("QEMU ")), "{:?}", written.needs);
    let found = fs::metadata(&file).unwrap();
    assert_eq!((found.len(), found.permissions().mode() & 0o777), (written.bytes, 0o600));
    let again = export(&here, &file).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists, "{again}");
    let disks = place.path().join("disks.vmkit");
    let options = VmExportOptions::default().with_memory(MemoryMode::DisksOnly);
    let options = options.with_existing(OverwritePolicy::Replaced);
    let smaller = here.export(&web(), &disks, &options, &no_progress()).await.unwrap();
    assert_eq!(smaller.vm.state, VmState::Stopped);
    assert!(smaller.bytes < written.bytes / 4 && smaller.bytes < IMAGE_BYTES / 4, "{smaller:?}");
    here.remove(&web(), true).await.unwrap();
    fs::remove_file(place.path().join("base.img")).unwrap();

    let imported = import(&there, &file).await.unwrap();
    assert!(imported.problems.is_empty(), "{:?}", imported.problems);
    assert_eq!((imported.vm.id, &imported.vm.state), (vm.id, &VmState::Saved));
    check_disks(&place.path().join("there/vms"));
    let image = imported.vm.spec.disk().unwrap().image.clone();
    assert!(image.starts_with(place.path().join("there/images")), "{}", image.display());
    let found = fs::metadata(&image).unwrap();
    assert!(found.len() == IMAGE_BYTES && found.blocks() * 512 < IMAGE_BYTES / 4, "{found:?}");
    let vm = there.start(&web()).await.unwrap();
    assert_eq!(read(&there, &vm).await, "two two two base");
    let all = there.snapshots(&web()).await.unwrap();
    assert_eq!(all.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["empty", "live"]);
    there.restore_snapshot(&web(), &named("live")).await.unwrap();
    let vm = there.start(&web()).await.unwrap();
    assert_eq!(read(&there, &vm).await, "one one one base");
    there.restore_snapshot(&web(), &named("empty")).await.unwrap();
    there.remove(&web(), true).await.unwrap();

    let imported = import(&there, &disks).await.unwrap();
    assert_eq!(imported.vm.state, VmState::Stopped);
    there.restore_snapshot(&web(), &named("live")).await.unwrap();
    let vm = there.start(&web()).await.unwrap();
    console_says(&vm, "vmkit-guest: ready").await;
    assert_eq!(read(&there, &vm).await, "one one none base");
    there.remove(&web(), true).await.unwrap();
    for manager in [&here, &there] {
        assert!(files_below(manager.home().vms()).is_empty());
        assert!(files_below(&manager.home().images().join("downloads")).is_empty());
    }
}

#[tokio::test(flavor = "current_thread")]
async fn two_imports_at_once_make_one_vm() {
    let place = Place::new();
    let (here, there) = (manager(&place.path().join("here")), manager(&place.path().join("there")));
    created(&here, &place).await;
    let file = place.path().join("web.vmkit");
    export(&here, &file).await.unwrap();
    let (one, two) = tokio::join!(import(&there, &file), import(&there, &file));
    let refused = match (one, two) {
        (Ok(_), Err(refused)) | (Err(refused), Ok(_)) => refused,
        both => panic!("{both:?}"),
    };
    assert_eq!(refused.kind(), ErrorKind::AlreadyExists, "{refused}");
    let other = VmImportOptions::default().with_host_files(HostFilePolicy::Accept);
    let other = other.with_name(VmName::new("other").unwrap());
    let same = there.import(&file, &other, &no_progress()).await.unwrap_err();
    assert_eq!(same.kind(), ErrorKind::AlreadyExists, "{same}");
    assert!(!place.path().join("there/vms/other").exists());
    there.remove(&web(), true).await.unwrap();
    let renamed = there.import(&file, &other, &no_progress()).await.unwrap();
    assert_eq!(renamed.vm.name().as_str(), "other");
    let started = there.start(renamed.vm.name()).await.unwrap();
    there.stop(started.name(), Duration::ZERO).await.unwrap();
    there.remove(started.name(), true).await.unwrap();
}

#[test]
fn an_export_that_finds_no_room_leaves_nothing_on_either_side() {
    in_own_namespaces(async || {
        let place = Place::new();
        let here = manager(&place.path().join("here"));
        created(&here, &place).await;
        let file = place.path().join("web.vmkit");
        let bytes = export(&here, &file).await.unwrap().bytes;
        let small = place.path().join("small");
        fs::create_dir(&small).unwrap();
        let there = || manager(&small.join("home"));
        let assert_empty = |after: &str| {
            let parts = ["vms", "run", "images"].map(|part| files_below(&small.join("home").join(part)));
            assert_eq!(parts.concat(), Vec::<PathBuf>::new(), "{after}");
        };
        mount(&format!("size={},mode=700", bytes / 2), &small);
        let refused = import(&there(), &file).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Host, "{refused}");
        assert!(refused.to_string().contains("MiB are free"), "{refused}");
        assert_empty("an import that was too large");
        let refused = export(&here, &small.join("web.vmkit")).await.unwrap_err();
        assert!(refused.to_string().contains("MiB are free"), "{refused}");
        assert!(!harness::entries(&small).iter().any(|name| name.starts_with("web")));

        // The room is gone once the estimate was made.
        mount("remount,size=64m", &small);
        for (step, done) in [("import: claim", "import"), ("export: write the file", "export")] {
            let filler = small.join("filler");
            let fill = filler.clone();
            vmkit::set_step_hook(Some(Box::new(move |name| {
                if name == step {
                    let file = fs::File::create(&fill)?;
                    let most = fill.parent().map(rustix::fs::statvfs).unwrap()?;
                    let bytes = most.f_bavail * most.f_frsize - (64 << 10);
                    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
                }
                Ok(())
            })));
            let refused = match done {
                "import" => import(&there(), &file).await.map(drop),
                _ => export(&here, &small.join("web.vmkit")).await.map(drop),
            };
            vmkit::set_step_hook(None);
            let refused = refused.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Host, "{done}: {refused}");
            assert!(refused.chain().to_string().contains("No space left"), "{done}: {}", refused.chain());
            fs::remove_file(&filler).unwrap();
            assert_empty(done);
            assert!(!harness::entries(&small).iter().any(|name| name.starts_with("web")));
        }
        import(&there(), &file).await.unwrap();
        assert!(Command::new("umount").arg("-l").arg(&small).status().unwrap().success());
    });
}

fn mount(options: &str, at: &Path) {
    let output = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(at).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
