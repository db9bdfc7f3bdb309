//! Guests that are saved to disk and continue from there.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;
use vmkit::abilities::{GuestAgentChannel, SaveToDisk};
use vmkit::spec::{DataDisk, MachineType, Mib, NetworkConfig, UserNetwork, VmSpecBuilder};
use vmkit::{Error, ErrorKind, Hypervisor, VmState};
use vmkit_testkit::guest;

use crate::harness::{self, LONG, Monitor, Place, booted, console_text, echoes, pid, run, sh, started};

/// Counts in memory and on the disk, the disk first, until `/run/stop` is there.
const COUNT: &str = "i=0; while [ ! -e /run/stop ]; do i=$((i+1)); printf %08d $i >/run/next; \
                     dd if=/run/next of=/dev/vda conv=notrunc,fsync 2>/dev/null; cp /run/next /run/count; done";

fn tiny(name: &str) -> VmSpecBuilder {
    let fresh = DataDisk::Fresh { size: Mib::new(8).unwrap() };
    let network = UserNetwork { forwards: vec!["7".parse().unwrap()], restrict: false };
    guest::tiny()
        .spec(name, MachineType::Q35, "")
        .network(NetworkConfig::User(network))
        .data_disks(vec![fresh])
}

#[tokio::test(flavor = "current_thread")]
async fn a_saved_guest_continues_with_its_memory_its_disk_and_the_right_time() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &tiny("kept").build().unwrap()).await;
    let work = place.work_dir(&vm);
    let old = pid(&vm);
    sh(&qemu, &vm, &format!("({COUNT}) >/dev/null 2>&1 & until [ -e /run/count ]; do :; done")).await;

    let mut vm = vm;
    for round in 1..=2 {
        let saved = qemu.save(&vm).await.unwrap();
        assert_eq!((&saved.state, &saved.run), (&VmState::Saved, &None));
        assert_eq!(qemu.save(&saved).await.unwrap().state, VmState::Saved, "again is success");
        harness::gone(old).await;
        let memory = fs::metadata(work.join("memory")).unwrap();
        assert_eq!(memory.permissions().mode() & 0o777, 0o600);
        assert!(memory.len() < 200 << 20, "{} bytes: pages of zeros are not written", memory.len());
        // As by another program, after a reboot of the host.
        let qemu = place.hypervisor();
        assert_eq!(qemu.state(&saved).await.unwrap(), VmState::Saved);
        let plan = qemu.plan_start(&saved).await.unwrap().to_string();
        assert!(
            plan.contains("continue the guest saved in") && plan.contains("-S \\\n    -incoming defer"),
            "{plan}"
        );
        vm = qemu.resume(&saved).await.unwrap();
        assert_eq!(vm.state, VmState::Running);
        assert!(!work.join("memory").exists() && !work.join("saved.json").exists());
        let counts: u32 = sh(&qemu, &vm, "cat /run/count").await.parse().unwrap();
        assert!(counts > 0, "round {round}");
        let host = run(&vm).forwards[0].host.into();
        assert!(echoes(host).await, "round {round}: the forward leads into the guest");
    }
    // What the disk has is what the memory knows, or one step ahead of it.
    let read = "touch /run/stop; sleep 1; echo 3 >/proc/sys/vm/drop_caches; head -c 8 /dev/vda; echo; cat /run/count";
    let both = sh(&qemu, &vm, read).await;
    let (disk, memory) = both.split_once('\n').unwrap();
    let [disk, memory]: [u32; 2] = [disk, memory].map(|count| count.trim().parse().unwrap());
    assert!(disk == memory || disk == memory + 1, "{both}");
    // As if it had been saved for years.
    sh(&qemu, &vm, "date -s @1000000000").await;
    let saved = qemu.save(&vm).await.unwrap();
    let vm = qemu.start(&saved).await.unwrap();
    let asked = Instant::now();
    let guest: u64 = sh(&qemu, &vm, "date +%s").await.parse().unwrap();
    let host = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let off = Duration::from_secs(guest.abs_diff(host));
    assert!(off <= asked.elapsed() + Duration::from_secs(2), "the guest's clock is off by {off:?}");
    qemu.destroy(vm).await.unwrap();
    assert_eq!(place.leftovers(), Vec::<String>::new());
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_ran_while_it_was_saved_is_paused_until_vmkit_resumes_it() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &tiny("awake").build().unwrap()).await;
    let running = run(&vm).clone();
    let at = |place: &'static str, command: &'static str| {
        let (sender, reply) = std::sync::mpsc::channel();
        let running = running.clone();
        vmkit::set_step_hook(Some(Box::new(move |name| {
            if name == place {
                sender.send(Monitor::of(&running).execute(command, json!({}))).unwrap();
            }
            Ok(())
        })));
        reply
    };
    let reply = at("save: write the memory", "cont");
    let saved = qemu.save(&vm).await.unwrap();
    reply.try_recv().expect("it was resumed before its memory was written");
    let reply = at("restore: resume", "query-status");
    let vm = qemu.start(&saved).await.unwrap();
    vmkit::set_step_hook(None);
    assert_eq!(reply.try_recv().unwrap()["status"], "paused");
    assert!(qemu.agent_responds(&vm, LONG).await.unwrap(), "the guest runs");
    qemu.destroy(vm).await.unwrap();
}

/// Changes a file, looks, and puts it back as it was, its time included.
async fn with_changed(path: &Path, change: impl FnOnce(&Path), check: impl AsyncFnOnce()) {
    let (before, time) = (fs::read(path).unwrap(), fs::metadata(path).unwrap().modified().unwrap());
    change(path);
    check().await;
    fs::write(path, before).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn what_does_not_fit_a_saved_guest_is_refused_by_name_and_it_stays_saved() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = started(&qemu, &tiny("strict").build().unwrap()).await;
    let vm = qemu.save(&vm).await.unwrap();
    let work = place.work_dir(&vm);
    let (memory, record) = (work.join("memory"), work.join("saved.json"));
    let refused = async |kind: ErrorKind, words: &str| {
        for error in [qemu.start(&vm).await.unwrap_err(), qemu.resume(&vm).await.unwrap_err()] {
            assert_eq!(error.kind(), kind, "{error}");
            assert!(matches!(error, Error::NotContinued { .. }), "{error:?}");
            let said = error.chain().to_string();
            assert!(said.contains(words), "{words:?} is not in {said:?}");
        }
        assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Saved, "{words}");
    };
    let edit = |from: &str, to: &str| {
        let text = fs::read_to_string(&record).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(&record, text.replace(from, to)).unwrap();
    };
    let flip = |path: &Path| {
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 100_000).unwrap();
        file.write_all_at(&[!byte[0]], 100_000).unwrap();
    };
    with_changed(&memory, flip, async || refused(ErrorKind::Record, "is damaged").await).await;
    let cut = |path: &Path| fs::File::options().write(true).open(path).unwrap().set_len(4096).unwrap();
    with_changed(&memory, cut, async || refused(ErrorKind::Record, "4096 bytes, and").await).await;
    with_changed(
        &memory,
        |path| fs::remove_file(path).unwrap(),
        async || {
            refused(ErrorKind::Record, "the memory of the saved guest is missing").await;
        },
    )
    .await;
    let touch =
        |path: &Path| fs::File::options().write(true).open(path).unwrap().write_all_at(b"Q", 0).unwrap();
    with_changed(&work.join("data-0.qcow2"), touch, async || {
        refused(ErrorKind::InvalidInput, "data0").await;
    })
    .await;
    for (from, to, kind, words) in [
        ("\"version\": 1", "\"version\": 2", ErrorKind::Record, "by a newer vmkit (format 2"),
        ("\"version\": 1", "\"version\": 1,", ErrorKind::Record, "the record of a saved guest can't be read"),
        ("\"command_line\": 2", "\"command_line\": 99", ErrorKind::Host, "a newer vmkit: the devices"),
        ("\"qemu\": [\n    ", "\"qemu\": [\n    9", ErrorKind::Host, "or newer: this is"),
        ("\"tcg\"", "\"kvm\"", ErrorKind::Host, "the accelerator kvm: the VM would run by tcg"),
    ] {
        with_changed(&record, |_| edit(from, to), async || refused(kind, words).await).await;
    }
    let vm = qemu.start(&vm).await.unwrap();
    let vm = qemu.save(&vm).await.unwrap();
    let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Stopped);
    assert!(!memory.exists() && !record.exists(), "the memory was discarded");
    let vm = booted(&qemu, &tiny("other").build().unwrap()).await;
    let saved = qemu.save(&vm).await.unwrap();
    let stopped = qemu.stop(&saved, LONG).await.unwrap();
    assert_eq!(stopped.state, VmState::Stopped);
    assert!(console_text(&vm).contains("Power down"), "it shut itself down:\n{}", console_text(&vm));
    qemu.destroy(stopped).await.unwrap();
}

#[test]
fn a_guest_for_which_there_is_no_room_runs_on() {
    harness::in_own_namespaces(async || {
        let place = Place::new();
        let vms = place.path().join("vms");
        fs::create_dir(&vms).unwrap();
        let mount = |options: &str| {
            let mut mount = Command::new("mount");
            let mount = mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&vms);
            assert!(mount.status().unwrap().success(), "mount -o {options}");
        };
        mount("size=16m,mode=700");
        let qemu = place.hypervisor();
        let vm = booted(&qemu, &tiny("full").build().unwrap()).await;
        let runs_on = async |error: vmkit::Error, words: &str| {
            assert!(error.chain().to_string().contains(words), "{}", error.chain());
            assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running);
            assert!(qemu.agent_responds(&vm, LONG).await.unwrap(), "the guest runs");
            let left: Vec<_> = harness::entries(&place.work_dir(&vm));
            assert!(
                !left.iter().any(|name| name.starts_with("memory") || name.starts_with("saved")),
                "{left:?}"
            );
        };
        let error = qemu.save(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Host, "{error}");
        runs_on(error, "the memory of `full` may need").await;
        // The room is gone once the estimate was made.
        mount("remount,size=1g");
        let filler = vms.join("filler");
        let fill = filler.clone();
        vmkit::set_step_hook(Some(Box::new(move |name| {
            if name == "save: write the memory" {
                let file = fs::File::create(&fill)?;
                let _ = rustix::fs::fallocate(
                    &file,
                    rustix::fs::FallocateFlags::empty(),
                    0,
                    (1 << 30) - (24 << 20),
                );
            }
            Ok(())
        })));
        let error = qemu.save(&vm).await.unwrap_err();
        vmkit::set_step_hook(None);
        runs_on(error, "could not save or load the memory").await;
        fs::remove_file(&filler).unwrap();
        let saved = qemu.save(&vm).await.unwrap();
        assert_eq!(saved.state, VmState::Saved);
        qemu.destroy(saved).await.unwrap();
    });
}
