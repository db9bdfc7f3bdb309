//! What a real VM does to its host: disks, files and who may read them, another user, a full disk,
//! a QEMU that hangs.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use vmkit::spec::{
    Accel, Boot, CloudInitConfig, DataDisk, Firmware, MachineType, Mib, RootDisk, UserName, VmName, VmSpec,
    VmSpecBuilder, Vnc,
};
use vmkit::{ErrorKind, FailureKind, GuestExitStatus, Hypervisor, VmHandle, VmState};
use vmkit_testkit::guest;

use crate::harness::{
    self, LONG, Place, agent, booted, console_says, in_own_namespaces, pid, started, state_becomes,
};

fn tiny(name: &str) -> VmSpecBuilder {
    guest::tiny().spec(name, MachineType::Q35, "")
}

fn mib(mib: u64) -> Mib {
    Mib::new(mib).unwrap()
}

/// Writes an image of bytes that do not repeat, and returns them.
fn write_image(path: &Path, bytes: u32) -> Vec<u8> {
    let image: Vec<u8> =
        (0..bytes / 4).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_le_bytes()).collect();
    fs::write(path, &image).unwrap();
    image
}

/// Runs a line of shell in the guest and returns what it prints.
async fn in_guest(vm: &VmHandle, script: &str) -> String {
    let output = agent(vm).await.exec("sh", &["-ec", script], None, LONG).await.unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.exit, GuestExitStatus::Code(0), "{script}: {stdout}{stderr}");
    stdout.trim().to_owned()
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_writes_to_its_overlay_and_never_to_the_image_below() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let image = place.path().join("base.img");
    let before = write_image(&image, 4 << 20);
    let disk = RootDisk { image: image.clone(), size: Some(mib(16)) };
    let vm = booted(&qemu, &tiny("overlay").disk(disk).build().unwrap()).await;
    let size = in_guest(&vm, "blockdev --getsize64 /dev/vda").await;
    assert_eq!(size, (16 << 20).to_string());
    let sum = Command::new("sha256sum").arg(&image).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap().split(' ').next().unwrap().to_owned();
    let seen = in_guest(&vm, "dd if=/dev/vda bs=1M count=4 2>/dev/null | sha256sum").await;
    assert_eq!(seen.split(' ').next(), Some(&*sum), "the guest sees the image");
    in_guest(&vm, "yes written | head -c 3145728 | dd of=/dev/vda bs=1M conv=fsync 2>/dev/null").await;

    let vm = qemu.stop(&vm, LONG).await.unwrap();
    assert!(fs::read(&image).unwrap() == before, "the image below was written to");
    let vm = qemu.start(&vm).await.unwrap();
    let kept = in_guest(&vm, "dd if=/dev/vda bs=1M count=3 2>/dev/null | uniq -c").await;
    assert!(kept.starts_with(&format!("{} written", (3 << 20) / "written\n".len())), "{kept}");
    qemu.destroy(vm).await.unwrap();
    assert!(fs::read(&image).unwrap() == before, "the image below was written to");
}

#[tokio::test(flavor = "current_thread")]
async fn further_disks_are_there_by_their_serial_with_their_size() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let (fixed, open) = (place.path().join("fixed, with comma.img"), place.path().join("open.img"));
    let before = write_image(&fixed, 2 << 20);
    write_image(&open, 3 << 20);
    let disks = vec![
        DataDisk::Fresh { size: mib(8) },
        DataDisk::Existing { path: fixed.clone(), readonly: true },
        DataDisk::Existing { path: open.clone(), readonly: false },
    ];
    let vm = booted(&qemu, &tiny("disks").data_disks(disks).build().unwrap()).await;
    let listed = in_guest(
        &vm,
        "for disk in /sys/block/vd*; do echo $(cat $disk/serial) $(cat $disk/size) $(cat $disk/ro); done",
    )
    .await;
    let sectors = |mib: u64| mib * 2048;
    let wanted = [("data0", 8, 0), ("data1", 2, 1), ("data2", 3, 0)]
        .map(|(serial, mib, readonly)| format!("{serial} {} {readonly}", sectors(mib)));
    assert_eq!(listed.lines().collect::<Vec<_>>(), wanted);
    in_guest(&vm, "! echo no | dd of=/dev/vdb conv=fsync 2>/dev/null").await;
    in_guest(&vm, "for disk in vda vdc; do echo kept | dd of=/dev/$disk conv=fsync 2>/dev/null; done").await;

    let vm = qemu.stop(&vm, LONG).await.unwrap();
    assert!(fs::read(&fixed).unwrap() == before, "a read-only disk was written to");
    assert!(fs::read(&open).unwrap().starts_with(b"kept\n"), "a disk of the user's is written to");
    let vm = qemu.start(&vm).await.unwrap();
    assert_eq!(in_guest(&vm, "head -c 5 /dev/vda").await, "kept");
    qemu.destroy(vm).await.unwrap();
    assert!(fixed.exists() && open.exists(), "the user's disks stay");
}

#[tokio::test(flavor = "current_thread")]
async fn uefi_runs_and_keeps_its_variables_for_this_vm_alone() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let image = place.path().join("empty.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let uefi = |name: &str| {
        guest::tiny()
            .spec(name, MachineType::Q35, "")
            .boot(Boot::Firmware(Firmware::Uefi))
            .disk(RootDisk { image: image.clone(), size: None })
    };
    let vm = qemu.prepare(&uefi("uefi").build().unwrap()).await.unwrap();
    let other = qemu.prepare(&uefi("other").build().unwrap()).await.unwrap();
    let vars = place.work_dir(&vm).join("efivars.fd");
    let template = fs::read(&vars).unwrap();
    let vm = qemu.start(&vm).await.unwrap();
    // Nothing on the disk can be booted, and OVMF says so on every console that it has.
    harness::console_says(&vm, "BdsDxe: failed to load").await;
    let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
    assert!(fs::read(&vars).unwrap() != template, "OVMF wrote down what it found to boot");
    assert!(fs::read(place.work_dir(&other).join("efivars.fd")).unwrap() == template);
    qemu.destroy(vm).await.unwrap();
    qemu.destroy(other).await.unwrap();
}

/// Checks that this directory and all in it are open to their owner alone, and returns the names of
/// the sockets.
fn check_private(dir: &Path) -> Vec<String> {
    let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(dir), 0o700, "{}", dir.display());
    let mut sockets = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            check_private(&entry.path());
            continue;
        }
        assert_eq!(mode(&entry.path()), 0o600, "{}", entry.path().display());
        if entry.file_type().unwrap().is_socket() {
            sockets.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    sockets.sort();
    sockets
}

#[test]
fn everything_of_a_vm_is_private_even_where_the_umask_is_not() {
    // The mask of file modes is the process's: this one is the test's own.
    in_own_namespaces(async || {
        rustix::process::umask(rustix::fs::Mode::empty());
        let place = Place::new();
        let qemu = place.hypervisor();
        let image = place.path().join("empty.img");
        fs::write(&image, vec![0; 1 << 20]).unwrap();
        let full = |name| {
            tiny(name)
                .boot(Boot::Firmware(Firmware::Uefi))
                .disk(RootDisk { image: image.clone(), size: None })
                .data_disks(vec![DataDisk::Fresh { size: mib(1) }])
                .cloud_init(CloudInitConfig::default())
        };
        let mut vm = started(&qemu, &full("private").build().unwrap()).await;
        let sockets = check_private(&place.run_dir(&vm));
        assert_eq!(sockets, ["agent.sock", "console.sock", "monitor.sock", "qmp.sock", "vnc.sock"]);
        vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
        check_private(&place.path().join("vms"));
        qemu.destroy(vm).await.unwrap();

        let vm = started(&qemu, &full("password").vnc(Vnc::Loopback).build().unwrap()).await;
        check_private(&place.path().join("run"));
        assert!(place.run_dir(&vm).join("vnc.password").exists());
        check_private(&place.path().join("vms"));
        qemu.destroy(vm).await.unwrap();
        assert_eq!(place.leftovers(), Vec::<String>::new());
    });
}

#[tokio::test(flavor = "current_thread")]
async fn a_qemu_of_another_user_is_really_that_user_s_and_writes_its_disk() {
    if !rustix::process::geteuid().is_root() {
        return skip("only root can run QEMU as another user");
    }
    let place = Place::new();
    let qemu = place.hypervisor();
    let image = place.path().join("base.img");
    write_image(&image, 1 << 20);
    let spec = tiny("other-user")
        .disk(RootDisk { image, size: None })
        .run_as(UserName::new("nobody").unwrap())
        .build()
        .unwrap();
    let vm = booted(&qemu, &spec).await;
    let id = |option| {
        let output = Command::new("id").args([option, "nobody"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let status = fs::read_to_string(format!("/proc/{}/status", pid(&vm))).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("Uid:"), vec![id("-u"); 4], "real, effective, saved, file system");
    assert_eq!(field("Gid:"), vec![id("-g"); 4]);
    assert_eq!(field("Groups:"), [id("-G")]);
    for set in ["CapPrm:", "CapEff:"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    in_guest(&vm, "echo kept | dd of=/dev/vda conv=fsync 2>/dev/null").await;
    let vm = qemu.stop(&vm, LONG).await.unwrap();
    let vm = qemu.start(&vm).await.unwrap();
    assert_eq!(in_guest(&vm, "head -c 5 /dev/vda").await, "kept");
    qemu.destroy(vm).await.unwrap();
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

#[test]
fn a_full_disk_of_the_host_s_fails_the_vm_which_starts_again_when_there_is_room() {
    in_own_namespaces(async || {
        let place = Place::new();
        let qemu = place.hypervisor();
        let vms = place.path().join("vms");
        fs::create_dir(&vms).unwrap();
        let mount = |options: &str| {
            let mut mount = Command::new("mount");
            let mount = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&vms);
            assert!(mount.status().unwrap().success(), "mount -o {options}");
        };
        mount("size=8m,mode=700");
        let image = place.path().join("base.img");
        fs::write(&image, vec![0; 32 << 20]).unwrap();
        let vm = booted(&qemu, &tiny("full").disk(RootDisk { image, size: None }).build().unwrap()).await;
        let mut console = harness::console(&qemu, &vm).await;
        console.write_all(b"dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync\n").await.unwrap();
        let VmState::Failed { cause } = state_becomes(&qemu, &vm, |it| *it != VmState::Running).await else {
            panic!("it is not failed");
        };
        assert_eq!(cause.kind, FailureKind::DiskError);
        assert!(cause.detail.contains("full"), "{}", cause.detail);

        let began = Instant::now();
        let vm = qemu.stop(&vm, LONG).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(30), "a guest that can't hear was waited for");
        assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Stopped);
        let error = qemu.start(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Host, "{error}");
        assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Stopped, "a start that failed changes nothing");

        mount("remount,size=64m");
        let vm = qemu.start(&vm).await.unwrap();
        in_guest(&vm, "dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null").await;

        mount("remount,size=24m");
        let mut console = harness::console(&qemu, &vm).await;
        console.write_all(b"dd if=/dev/urandom of=/dev/vda bs=1M count=30 conv=fsync\n").await.unwrap();
        state_becomes(&qemu, &vm, |it| *it != VmState::Running).await;
        mount("remount,size=64m");
        let again = qemu.start(&vm).await.unwrap();
        assert_eq!(pid(&again), pid(&vm), "the same guest goes on, with all that it had in memory");
        assert_eq!(in_guest(&again, "wc -c < /dev/vda").await, (32 << 20).to_string());
        qemu.destroy(again).await.unwrap();
        assert_eq!(place.leftovers(), Vec::<String>::new());
    });
}

#[tokio::test(flavor = "current_thread")]
async fn a_vm_outlives_its_keeper_and_only_the_cause_of_its_end_is_lost() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &tiny("orphan").build().unwrap()).await;
    let process = pid(&vm);
    let keeper = harness::keeper_pid(process);
    rustix::process::kill_process(keeper, Signal::KILL).unwrap();
    harness::gone(keeper).await;
    // More than a pipe holds: a console that is no longer copied must not block the guest.
    in_guest(&vm, "yes | head -c 100000 >/dev/console").await;
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running);
    assert_eq!(harness::run(&qemu.start(&vm).await.unwrap()), harness::run(&vm));
    rustix::process::kill_process(process, Signal::KILL).unwrap();
    harness::gone(process).await;
    let VmState::Failed { cause } = qemu.state(&vm).await.unwrap() else { panic!("it is not failed") };
    assert_eq!(cause.kind, FailureKind::Vanished);

    let vm = qemu.start(&vm).await.unwrap();
    let keeper = harness::keeper_pid(pid(&vm));
    rustix::process::kill_process(keeper, Signal::KILL).unwrap();
    harness::gone(keeper).await;
    let vm = qemu.stop(&vm, LONG).await.unwrap();
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Stopped);
    qemu.destroy(vm).await.unwrap();
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "current_thread")]
async fn vms_whose_ids_begin_alike_do_not_meet() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let one = started(&qemu, &tiny("one").id(uuid::Uuid::from_u128(1)).build().unwrap()).await;
    let two = started(&qemu, &tiny("two").id(uuid::Uuid::from_u128(2)).build().unwrap()).await;
    for vm in [&one, &two] {
        assert_eq!(qemu.state(vm).await.unwrap(), VmState::Running, "{}", vm.name());
    }
    qemu.destroy(one).await.unwrap();
    assert_eq!(qemu.state(&two).await.unwrap(), VmState::Running);
    qemu.destroy(two).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_user_that_the_host_does_not_have_is_named() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let spec = tiny("nobody-there").run_as(UserName::new("no-such-user").unwrap()).build().unwrap();
    let error = qemu.prepare(&spec).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains("no-such-user"), "{error}");
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "current_thread")]
async fn a_qemu_that_hangs_is_not_waited_for_without_end_and_still_stops() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let mut vm = started(&qemu, &tiny("hung").build().unwrap()).await;
    let hang = |vm: &VmHandle| rustix::process::kill_process(pid(vm), Signal::STOP).unwrap();
    hang(&vm);
    let mut began = Instant::now();
    let mut took_at_most = |seconds| {
        assert!(began.elapsed() < Duration::from_secs(seconds), "{:?}", began.elapsed());
        began = Instant::now();
    };
    assert_eq!(qemu.state(&vm).await.unwrap_err().kind(), ErrorKind::TimedOut);
    took_at_most(4);
    assert_eq!(qemu.suspend(&vm).await.unwrap_err().kind(), ErrorKind::TimedOut);
    took_at_most(4);
    assert_eq!(qemu.guest_ip(&vm).await.unwrap_err().kind(), ErrorKind::TimedOut);
    took_at_most(4);
    vm = qemu.stop(&vm, Duration::from_secs(1)).await.unwrap();
    took_at_most(15);
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Stopped);

    vm = qemu.start(&vm).await.unwrap();
    hang(&vm);
    let process = pid(&vm);
    qemu.destroy(vm).await.unwrap();
    assert!(!Path::new(&format!("/proc/{process}/exe")).exists());
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

#[allow(clippy::print_stderr, reason = "a test says aloud what it skips")]
fn skip(why: &str) {
    eprintln!("SKIP: {why}");
}

#[tokio::test(flavor = "current_thread")]
async fn cloud_init_gets_another_instance_id_when_it_is_asked_to_run_again_and_only_then() {
    let place = Place::new();
    let home = vmkit::store::Home::at(place.path()).unwrap();
    let manager = vmkit::VmManager::new(place.hypervisor(), home);
    let vm =
        manager.create(tiny("again").cloud_init(CloudInitConfig::default()).build().unwrap()).await.unwrap();
    let seed = manager.home().vm(vm.name()).join("seed.iso");
    let instance = |run: u32| format!("{}-{run}", vm.id);
    let names = |run: u32| {
        let seed = fs::read(&seed).unwrap();
        let wanted = instance(run);
        seed.windows(wanted.len()).any(|bytes| bytes == wanted.as_bytes())
    };
    for run in [0, 0, 1, 1, 2] {
        if !names(run) {
            manager.rerun_cloud_init(vm.name()).await.unwrap();
        }
        manager.start(vm.name()).await.unwrap();
        assert!(names(run), "run {run}");
        manager.stop(vm.name(), Duration::ZERO).await.unwrap();
    }
    manager.remove(vm.name(), false).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_vm_whose_run_file_is_lost_is_still_found_and_ended() {
    let place = Place::new();
    // Reached through a symbolic link, so that no name of the lock is the one that the kernel
    // shows.
    let link = place.path().join("link");
    std::os::unix::fs::symlink(place.path(), &link).unwrap();
    let qemu = harness::builder(&link).build();
    for spoil in [|path: &Path| fs::write(path, "junk"), |path: &Path| fs::remove_file(path)] {
        let vm = started(&qemu, &tiny("lost").build().unwrap()).await;
        spoil(&place.work_dir(&vm).join("qemu.json")).unwrap();
        assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running);
        let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
        assert!(!qemu.state(&vm).await.unwrap().is_live());
        qemu.destroy(vm).await.unwrap();
    }
}

/// Returns code that a PC's BIOS starts, which prints a word on the first serial port.
///
/// `call` and `pop` find where it lies; `cs lodsb` reads the word from behind the code.
fn boot_code(word: &str) -> Vec<u8> {
    let mut code =
        b"\xe8\x00\x00\x5e\x83\xc6\x13\xba\xf8\x03\x2e\xac\x84\xc0\x74\x03\xee\xeb\xf7\xf4\xeb\xfd".to_vec();
    code.extend(word.as_bytes());
    code.resize(512, 0);
    code
}

/// Writes a disc that boots this code: a primary volume, a boot record, the end of descriptors, a
/// boot catalog, the code.
///
/// Source: the El Torito Bootable CD-ROM Format Specification 1.0.
fn write_boot_disc(path: &Path, word: &str) {
    const SECTOR: usize = 2048;
    let mut disc = vec![0; 40 * SECTOR];
    let mut put = |at: usize, what: &[u8]| disc[at..at + what.len()].copy_from_slice(what);
    put(16 * SECTOR, b"\x01CD001\x01");
    put(17 * SECTOR, b"\0CD001\x01EL TORITO SPECIFICATION");
    put(17 * SECTOR + 0x47, &[19, 0, 0, 0]);
    put(18 * SECTOR, b"\xffCD001\x01");
    // The words of the validation entry add up to nothing.
    put(19 * SECTOR, &[1]);
    put(19 * SECTOR + 28, &[0xaa, 0x55, 0x55, 0xaa]);
    // Bootable, no emulation, four sectors of 512 bytes, from sector 20.
    put(19 * SECTOR + 32, &[0x88, 0, 0, 0, 0, 0, 4, 0, 20, 0, 0, 0]);
    put(20 * SECTOR, &boot_code(word));
    fs::write(path, disc).unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_disc_is_booted_where_the_disk_has_nothing_to_boot_and_not_before_one_that_has() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let (disc, image) = (place.path().join("disc, 1.iso"), place.path().join("disk.img"));
    write_boot_disc(&disc, "from the disc\n");
    let mut sector = boot_code("from the disk\n");
    sector[510..].copy_from_slice(b"\x55\xaa");
    sector.resize(1 << 20, 0);
    fs::write(&image, sector).unwrap();
    let named =
        |name: &str| VmSpec::builder(VmName::new(name).unwrap()).accel(Accel::Tcg).cdrom(disc.clone());
    let empty = named("empty").disk(RootDisk::empty(mib(64))).build().unwrap();
    let full = named("full").disk(RootDisk { image, size: None }).build().unwrap();
    let bare = named("bare").build().unwrap();
    let mut vms = Vec::new();
    // The disc is all three's at once.
    for (spec, word) in [(&empty, "from the disc"), (&full, "from the disk"), (&bare, "from the disc")] {
        let vm = started(&qemu, spec).await;
        console_says(&vm, word).await;
        vms.push(vm);
    }
    for vm in vms {
        qemu.destroy(vm).await.unwrap();
    }
}
