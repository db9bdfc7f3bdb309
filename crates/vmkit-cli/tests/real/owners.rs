//! Homes of another user, and removals that could not begin, with the real QEMU.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::Life;
use serde_json::Value;

/// Runs the command as the user `nobody`.
fn as_nobody(life: &Life, line: &str) -> crate::support::Answer {
    let mut command = life.command(line.split(' '));
    crate::support::answer(command.uid(NOBODY).gid(NOBODY).output().unwrap())
}

const NOBODY: u32 = 65534;

/// Creates a home of the user `nobody`, with a VM that runs; `None`, and aloud, where this user may
/// not.
fn home_of_nobody() -> Option<Life> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: only root acts as another user");
        return None;
    }
    let life = Life::new();
    fs::set_permissions(life.dir.path(), Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(life.home()).unwrap();
    chown(life.home(), Some(NOBODY), Some(NOBODY)).unwrap();
    for line in ["create a --image base.img --memory 32MiB --accel tcg", "start a"] {
        let answer = as_nobody(&life, line);
        if answer.code != Some(0) && answer.stderr.contains("cannot start /proc/self/exe") {
            eprintln!("SKIP: another user can't run this build: {answer:?}");
            return None;
        }
        assert_eq!(answer.code, Some(0), "{answer:?}");
    }
    Some(life)
}

/// Returns what below a directory is not this user's.
fn not_of(user: u32, dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found = Vec::new();
    for entry in entries {
        let metadata = entry.path().symlink_metadata().unwrap();
        if metadata.uid() != user {
            found.push(entry.path());
        }
        if metadata.is_dir() {
            found.extend(not_of(user, &entry.path()));
        }
    }
    found
}

#[test]
fn a_command_that_is_run_as_root_takes_no_vm_from_its_user() {
    let Some(life) = home_of_nobody() else { return };
    fs::write(life.file("vmkit.toml"), "version = 1\n[machine.m]\nimage = 'base.img'\n").unwrap();
    for line in [
        "create b --image base.img",
        "start a",
        "stop --timeout 0 a",
        "suspend a",
        "resume a",
        "restart --timeout 0 a",
        "set a --cpus 2",
        "forward a 7",
        "rm --force a",
        "image import base.img --name base",
        "image prune",
        "up",
        "down",
    ] {
        let refused = life.vmkit(line.split(' '));
        assert_eq!(refused.code, Some(2), "{line}: {refused:?}");
        let says = |text: &str| refused.stderr.contains(text);
        assert!(says("nobody (65534)") && says("chown -R") && !says("doctor"), "{line}: {refused:?}");
        assert_eq!(not_of(NOBODY, &life.home()), Vec::<PathBuf>::new(), "{line}: {refused:?}");
    }
    for line in [
        "ls",
        "info a",
        "ip a",
        "logs a",
        "wait a running",
        "image ls",
        "doctor",
        "plan",
        "console a --print-endpoint",
    ] {
        let answer = life.vmkit(line.split(' '));
        assert_eq!(not_of(NOBODY, &life.home()), Vec::<PathBuf>::new(), "{line}: {answer:?}");
    }
    for line in ["suspend a", "resume a", "stop --timeout 0 a", "start a", "rm --force a"] {
        let answer = as_nobody(&life, line);
        assert_eq!(answer.code, Some(0), "{line}: {answer:?}");
    }
}

#[test]
fn what_root_has_left_in_a_home_is_named_with_the_command_that_gives_it_back() {
    let Some(life) = home_of_nobody() else { return };
    assert_eq!(as_nobody(&life, "stop --timeout 0 a").code, Some(0));
    let vm = life.home().join("vms/a");
    for file in ["run.json", "vm.json", "lock", "alive", "qemu.json", "owner"] {
        chown(vm.join(file), Some(0), Some(0)).unwrap();
        let refused = as_nobody(&life, "start a");
        assert_eq!(refused.code, Some(2), "{file}: {refused:?}");
        let repair = format!("sudo chown -R nobody {}", life.home().display());
        let says = |text: &str| refused.stderr.contains(text);
        assert!(says("belongs to user root (0)") && says(&repair) && !says("doctor"), "{file}: {refused:?}");
        let doctor = as_nobody(&life, "doctor");
        assert!(doctor.stdout.contains(file) && doctor.stdout.contains(&repair), "{file}: {doctor:?}");
        chown(vm.join(file), Some(NOBODY), Some(NOBODY)).unwrap();
    }
    assert_eq!(as_nobody(&life, "start a").code, Some(0));
    for (log, line) in [
        ("console.log", "logs a"),
        ("console.log", "logs -f a"),
        ("console.log.1", "logs --tail 1 a"),
        ("qemu.log", "logs --hypervisor a"),
    ] {
        let log = vm.join(log);
        let written = fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        written.set_permissions(Permissions::from_mode(0o600)).unwrap();
        chown(&log, Some(0), Some(0)).unwrap();
        let refused = as_nobody(&life, line);
        assert_eq!(refused.code, Some(2), "{line}: {refused:?}");
        let repair = format!("sudo chown -R nobody {}", life.home().display());
        let says = |text: &str| refused.stderr.contains(text);
        assert!(says("belongs to user root (0)") && says(&repair), "{line}: {refused:?}");
        chown(&log, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    // What can't be removed is not ended for that.
    chown(vm.join("alive"), Some(0), Some(0)).unwrap();
    let refused = as_nobody(&life, "rm --force a");
    assert_eq!(refused.code, Some(2), "{refused:?}");
    chown(vm.join("alive"), Some(NOBODY), Some(NOBODY)).unwrap();
    assert_eq!(life.row("a")["state"], "running");
    let removed = as_nobody(&life, "rm --force a");
    assert_eq!(removed.code, Some(0), "{removed:?}");
}

#[test]
fn a_removal_that_could_not_begin_leaves_a_vm_that_can_be_used() {
    let life = Life::new();
    life.must(["create", "a", "--image", "base.img", "--memory", "32MiB", "--accel", "tcg"]);
    life.must(["start", "a"]);
    let elsewhere = |line: &str| {
        let mut command = Command::new("unshare");
        let vmkit = life.command(line.split(' '));
        command.args(["--pid", "--fork", "--mount-proc"]).arg(vmkit.get_program()).args(vmkit.get_args());
        command.env("VMKIT_HOME", life.home()).current_dir(life.dir.path());
        crate::support::answer(command.output().unwrap())
    };
    let tried = elsewhere("--version");
    if tried.code != Some(0) {
        return eprintln!("SKIP: this user can't make a PID namespace: {tried:?}");
    }
    let started = elsewhere("start a");
    assert_eq!(started.code, Some(6), "{started:?}");
    assert_eq!(life.row("a")["operation"], Value::Null, "a start that has touched nothing is over");
    for line in ["rm --force a", "stop --timeout 0 a"] {
        let refused = elsewhere(line);
        assert_eq!(refused.code, Some(6), "{refused:?}");
        assert!(refused.stderr.contains("in another PID namespace"), "{refused:?}");
        assert_eq!(life.row("a")["state"], "running", "{line}");
        assert_eq!(life.row("a")["operation"], Value::Null, "{line}");
    }
    assert!(!life.home().join("vms/a/stop-asked").exists(), "it was not stopped");
    for line in ["suspend a", "resume a", "stop --timeout 0 a", "start a"] {
        life.must(line.split(' '));
    }
    life.must(["rm", "--force", "a"]);
    life.assert_empty("after rm");
}

#[test]
fn a_vm_that_could_not_start_again_is_not_stopped_for_a_restart() {
    let life = Life::new();
    life.must(["create", "a", "--image", "base.img", "--memory", "32MiB", "--accel", "tcg"]);
    life.must(["start", "a"]);
    let image = life.dir.path().join("base.img");
    fs::write(&image, vec![1; 4 << 20]).unwrap();
    let refused = life.vmkit(["restart", "--timeout", "0", "a"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("the image was changed"), "{refused:?}");
    assert_eq!(life.row("a")["state"], "running");
    life.must(["rm", "--force", "a"]);
}

#[test]
fn a_file_of_another_home_is_no_disk_to_write_to() {
    let life = Life::new();
    let other = life.dir.path().join("other").to_str().unwrap().to_owned();
    life.must(["--home", &other, "image", "import", "base.img", "--name", "st"]);
    life.must(["--home", &other, "create", "b", "--image", "st", "--data-disk", "1MiB", "--accel", "tcg"]);
    let stored = fs::read_dir(format!("{other}/images")).unwrap().flatten().map(|entry| entry.path());
    let stored = stored.map(|dir| dir.join("disk.raw")).find(|disk| disk.is_file()).unwrap();
    for (disk, said) in
        [(stored, "a local image"), (format!("{other}/vms/b/data-0.qcow2").into(), "a file of a VM")]
    {
        let disk = disk.to_str().unwrap();
        let refused =
            life.vmkit(["create", "a", "--image", "base.img", "--data-disk", disk, "--accel", "tcg"]);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains(said) && refused.stderr.contains(disk), "{refused:?}");
    }
    life.must(["--home", &other, "rm", "--force", "b"]);
}
