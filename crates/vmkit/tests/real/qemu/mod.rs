//! The QEMU backend on the real QEMU: every kind of command line is accepted, and the tiny guest
//! lives its whole life.

mod cases;

use std::path::Path;
use std::time::Duration;

use vmkit::abilities::Preflight;
use vmkit::error::PartProblem;
use vmkit::qemu::DeviceVersion;
use vmkit::spec::{self, Arch, Boot, CloudInitConfig, DataDisk, Firmware, MachineType, Mib, RootDisk};
use vmkit::{Error, ErrorKind, FailureKind, Hypervisor, VmHandle, VmState, tail_of_log};
use vmkit_testkit::{Conformance, conformance, guest};

use crate::harness::{Place, console_says, entries, gone, pid, state_becomes};

#[tokio::test(flavor = "current_thread")]
async fn the_real_qemu_accepts_every_golden_command_line() {
    let dir = Place::new();
    let mut disc = vec![0; 1 << 20];
    disc[16 * 2048..16 * 2048 + 6].copy_from_slice(b"\x01CD001");
    std::fs::write(dir.path().join("disc, with comma.iso"), disc).unwrap();
    for (name, bytes) in [("base.img", 8 << 20), ("extra, with comma.img", 1 << 20), ("initrd", 512)] {
        std::fs::write(dir.path().join(name), vec![0x90; bytes]).unwrap();
    }
    let guest = guest::tiny();
    for case in cases::cases(dir.path()) {
        // A kernel for x86 has a header that QEMU reads; on aarch64 anything is run as machine
        // code.
        let kernel = match case.spec.machine().arch() {
            Arch::X86_64 => std::fs::read(&guest.kernel).unwrap(),
            Arch::Aarch64 => vec![0x90; 1 << 20],
        };
        std::fs::write(dir.path().join("vmlinuz"), kernel).unwrap();
        for devices in [DeviceVersion::V1, DeviceVersion::V2] {
            let name = format!("{}, {devices:?}", case.name);
            let qemu = dir.builder_for(case.spec.machine()).devices(devices).build();
            let vm = qemu.prepare(&case.spec).await;
            let vm = vm.unwrap_or_else(|error| panic!("{name}: prepare: {error}"));
            let vm = qemu.start(&vm).await.unwrap_or_else(|error| panic!("{name}: start: {error}"));
            assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running, "{name}");
            qemu.destroy(vm).await.unwrap_or_else(|error| panic!("{name}: destroy: {error}"));
            assert_eq!(entries(&dir.path().join("vms")), Vec::<String>::new(), "{name}");
            assert_eq!(entries(&dir.path().join("run")), Vec::<String>::new(), "{name}");
        }
    }
}

fn qemu_processes(vm: &VmHandle) -> usize {
    let id = vm.id.to_string();
    let running = |entry: &std::fs::DirEntry| {
        let cmdline = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&cmdline).into_owned();
        cmdline.contains("qemu-system") && cmdline.contains(&id)
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter(running).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_real_qemu_keeps_the_contract() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    let tiny = guest::tiny();
    let roots = [dir.path().join("vms"), dir.path().join("run")];
    let options = Conformance::new(move |name| {
        // With a disk, so that snapshots are a tree.
        let disk = DataDisk::Fresh { size: Mib::new(1).unwrap() };
        let builder = tiny.spec(name.as_str(), MachineType::Q35, "").data_disks(vec![disk]);
        builder.build().expect("the tiny guest's spec is valid")
    })
    .polls(40)
    .counting_guests(qemu_processes)
    .breaking(|vm| {
        // From outside, as an operator's mistake or the kernel's out-of-memory killer would.
        let pid = vm.run.as_ref().and_then(|run| run.pid).expect("a running VM has a process");
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    })
    .printing(|_| guest::tiny().ready_line.clone())
    .powering_off(
        |name| guest::tiny().spec(name.as_str(), MachineType::Q35, "vmkit.poweroff").build().unwrap(),
        |_| {},
    )
    .home(dir.path())
    .forwarding("4711".parse().unwrap())
    .finding_leftovers(move || roots.iter().flat_map(|root| entries(root)).collect());
    conformance::run(move || qemu.clone(), options).await.assert();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_powers_itself_off_is_stopped() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    for machine in [MachineType::Q35, MachineType::Microvm] {
        let spec = guest::tiny().spec("off", machine, "vmkit.poweroff").build().unwrap();
        let vm = qemu.start(&qemu.prepare(&spec).await.unwrap()).await.unwrap();
        gone(pid(&vm)).await;
        assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Stopped, "{machine:?}");
        qemu.destroy(vm).await.unwrap();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_panicked_guest_is_failed_and_starts_again() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    let spec = guest::tiny().spec("panic", MachineType::Q35, "vmkit.panic").build().unwrap();
    let vm = qemu.start(&qemu.prepare(&spec).await.unwrap()).await.unwrap();
    console_says(&vm, "Kernel panic").await;
    let VmState::Failed { cause } = state_becomes(&qemu, &vm, |state| *state != VmState::Running).await
    else {
        panic!("a panicked guest is not failed");
    };
    assert_eq!(cause.kind, FailureKind::GuestPanic);
    let again = qemu.start(&vm).await.unwrap();
    assert_ne!(again.run.as_ref().unwrap().pid, vm.run.as_ref().unwrap().pid);
    qemu.destroy(again).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_qemu_killed_from_outside_is_failed_with_the_signal() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    let spec = guest::tiny().spec("shot", MachineType::Q35, "").build().unwrap();
    let vm = qemu.start(&qemu.prepare(&spec).await.unwrap()).await.unwrap();
    rustix::process::kill_process(pid(&vm), rustix::process::Signal::KILL).unwrap();
    let VmState::Failed { cause } = state_becomes(&qemu, &vm, |state| *state != VmState::Running).await
    else {
        panic!("a killed QEMU is not failed");
    };
    assert_eq!(cause.kind, FailureKind::HypervisorKilled);
    assert!(cause.detail.contains("signal 9 (SIGKILL)"), "{}", cause.detail);
    assert!(!dir.run_dir(&vm).exists(), "the keeper removed the sockets");
    let vm = qemu.start(&vm).await.unwrap();
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running);
    qemu.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_stop_right_after_a_start_reaches_a_guest_that_is_still_booting() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    for machine in [MachineType::Q35, MachineType::Microvm] {
        let spec = guest::tiny().spec("early", machine, "").build().unwrap();
        let vm = qemu.start(&qemu.prepare(&spec).await.unwrap()).await.unwrap();
        // However long the deadline is.
        let vm = qemu.stop(&vm, Duration::MAX).await.unwrap();
        let log = tail_of_log(vm.console_log.as_ref().unwrap(), 1 << 20).unwrap();
        let log = String::from_utf8_lossy(&log);
        assert!(log.contains("powering off: power button"), "{machine:?}: it was not asked:\n{log}");
        qemu.destroy(vm).await.unwrap();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_deaf_to_its_button_ends_soon_after_the_deadline() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    let spec = guest::tiny().spec("deaf", MachineType::Q35, "vmkit.nobutton").build().unwrap();
    let vm = qemu.start(&qemu.prepare(&spec).await.unwrap()).await.unwrap();
    let began = std::time::Instant::now();
    let vm = qemu.stop(&vm, Duration::from_secs(2)).await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Stopped);
    qemu.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_chattering_guest_does_not_outgrow_its_log() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    let bound = vmkit::spec::Mib::new(1).unwrap();
    let spec = guest::tiny().spec("spam", MachineType::Q35, "vmkit.spam").console_log(bound).build().unwrap();
    let vm = qemu.start(&qemu.prepare(&spec).await.unwrap()).await.unwrap();
    let log = vm.console_log.clone().unwrap();
    let older = log.with_extension("log.1");
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |meta| meta.len());
    for _ in 0..6000 {
        assert!(size(&log) + size(&older) <= bound.bytes());
        if size(&older) > 0 {
            qemu.destroy(vm).await.unwrap();
            return;
        }
        // No event tells.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("the guest wrote only {} bytes in two minutes", size(&log));
}

#[tokio::test(flavor = "current_thread")]
async fn a_kernel_that_qemu_refuses_is_reported_with_the_message_of_qemu() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    let junk = dir.path().join("junk");
    // The beginning of an ELF file for x86-64, and nothing of what it announces.
    let mut elf = vec![0; 64];
    elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    elf[18] = 62;
    std::fs::write(&junk, elf).unwrap();
    let kernel = spec::Kernel { path: junk, initrd: None, cmdline: String::new() };
    let name = spec::VmName::new("junk").unwrap();
    let spec =
        spec::VmSpec::builder(name).boot(spec::Boot::Kernel(kernel)).accel(spec::Accel::Tcg).build().unwrap();
    let vm = qemu.prepare(&spec).await.unwrap();
    let error = qemu.start(&vm).await.unwrap_err().to_string();
    assert!(error.contains("exit code 1") && error.contains("kernel"), "{error}");
    qemu.destroy(vm).await.unwrap();
}

/// One file after the other is gone, or not what it was; none of these VMs runs a guest.
#[tokio::test(flavor = "current_thread")]
async fn a_start_names_the_file_of_the_vm_that_is_missing_or_damaged_and_what_to_do() {
    let dir = Place::new();
    let qemu = dir.hypervisor();
    let base = dir.path().join("base.img");
    std::fs::write(&base, vec![0; 1 << 20]).unwrap();
    let builder = guest::tiny().spec("parts", MachineType::Q35, "").boot(Boot::Firmware(Firmware::Uefi));
    let fresh = DataDisk::Fresh { size: Mib::new(8).unwrap() };
    let builder = builder.disk(RootDisk { image: base, size: None }).data_disks(vec![fresh]);
    let spec = builder.cloud_init(CloudInitConfig::default()).build().unwrap();
    let vm = qemu.prepare(&spec).await.unwrap();
    let work = dir.work_dir(&vm);
    let refused = async |part: &Path, problem: PartProblem| {
        let errors = [
            qemu.start(&vm).await.map(drop).unwrap_err(),
            qemu.plan_start(&vm).await.map(drop).unwrap_err(),
            qemu.check_restart(&vm).await.unwrap_err(),
        ];
        for error in errors {
            let expected =
                format!("this part of the VM {problem}: restore it from a backup, or remove the VM");
            assert_eq!(error.to_string(), format!("{}: {expected}", part.display()));
            assert!(matches!(error, Error::VmPart { .. }) && error.kind() == ErrorKind::Record, "{error:?}");
        }
    };
    let aside = dir.path().join("aside");
    for name in ["root.qcow2", "data-0.qcow2", "efivars.fd"] {
        let part = work.join(name);
        std::fs::rename(&part, &aside).unwrap();
        refused(&part, PartProblem::Missing).await;
        std::os::unix::fs::symlink("/nowhere/at/all", &part).unwrap();
        refused(&part, PartProblem::Missing).await;
        std::fs::remove_file(&part).unwrap();
        std::fs::create_dir(&part).unwrap();
        refused(&part, PartProblem::NotAFile).await;
        std::fs::remove_dir(&part).unwrap();
        std::fs::write(&part, "").unwrap();
        refused(&part, PartProblem::Empty).await;
        let head = std::fs::read(&aside).unwrap();
        for content in [&head[..100], &[b'x'; 4096]] {
            std::fs::write(&part, content).unwrap();
            if name != "efivars.fd" {
                refused(&part, PartProblem::NotQcow2).await;
            }
        }
        std::fs::rename(&aside, &part).unwrap();
    }
    // The seed is written again.
    std::fs::remove_file(work.join("seed.iso")).unwrap();
    let vm = qemu.start(&vm).await.unwrap();
    assert!(work.join("seed.iso").is_file());
    qemu.destroy(vm).await.unwrap();
}
