//! Snapshots, interrupted at every step: each is there or it is not, and what can be restored is
//! what the disks were.

use std::fs;
use std::process::Command;
use std::time::Duration;

use vmkit::abilities::MemoryMode;
use vmkit::spec::SnapshotName;
use vmkit::{Result, VmManager};

use super::{CrashedLife, World, fail_at_every_step_of, kill_at_every_step_of, paths_below, runtime, web};

/// The operations on snapshots.
pub(super) const WORDS: [&str; 4] = ["snapshot", "snapshot of disks", "restore", "merge"];

const LIVES: [CrashedLife; 6] = [
    ("snapshot", &["create", "mark one"], &["prepared"]),
    ("snapshot", &["create", "mark one", "start"], &["running", "suspended"]),
    ("snapshot of disks", &["create", "mark one", "start"], &["running"]),
    ("restore", &["create", "mark one", "snapshot", "mark two"], &["prepared", "stopped", "failed"]),
    ("restore", &["create", "mark one", "start", "snapshot"], &["running", "stopped", "saved", "failed"]),
    ("merge", &["create", "mark one", "snapshot", "mark two", "start", "snapshot of disks"], &["running"]),
];

/// Bytes that the disks have when the snapshot `one` is taken.
const ONE: u8 = 0x11;
/// Bytes that the disks have later.
const TWO: u8 = 0x22;

/// Returns whether an operation may fail when it is repeated, since it was complete.
pub(super) fn is_there_once(word: &str) -> bool {
    WORDS.contains(&word) && word != "restore"
}

#[test]
fn a_kill_at_any_step_of_a_snapshot_loses_nothing() {
    kill_at_every_step_of(&LIVES, false);
}

#[test]
fn a_fault_at_any_step_of_a_snapshot_loses_nothing() {
    fail_at_every_step_of(&LIVES);
}

fn named(name: &str) -> SnapshotName {
    SnapshotName::new(name).unwrap()
}

impl World {
    pub(super) async fn operate_on_snapshots(&self, word: &str) -> Result<()> {
        let Self { manager, .. } = self;
        match word {
            "mark one" => self.mark(ONE),
            "mark two" => self.mark(TWO),
            "snapshot" => take(manager, "one", MemoryMode::Include).await?,
            "snapshot of disks" => take(manager, "two", MemoryMode::DisksOnly).await?,
            "restore" => drop(manager.restore_snapshot(&web(), &named("one")).await?),
            "merge" => manager.remove_snapshot(&web(), &named("one")).await?,
            _ => panic!("no operation `{word}`"),
        }
        Ok(())
    }

    /// Runs `qemu-io` on the disks of a VM that does not run, and returns what it printed.
    fn on_disks(&self, command: &str) -> String {
        let mut printed = String::new();
        for disk in ["root.qcow2", "data-0.qcow2"] {
            let disk = self.home.join("vms/web").join(disk);
            let output =
                Command::new("qemu-io").args(["-f", "qcow2", "-c", command]).arg(disk).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            printed += &String::from_utf8_lossy(&output.stdout);
        }
        printed
    }

    fn mark(&self, mark: u8) {
        self.on_disks(&format!("write -P {mark} 64k 64k"));
        fs::write(self.dir.join(format!("marked-{mark}")), "").unwrap();
    }

    /// Checks that the disks are whole, and that each snapshot can be restored, started, and has
    /// the bytes that were there when it was taken.
    pub(super) fn assert_snapshots(&self, state: &str, place: &str) {
        let listed = self.listed();
        assert!(listed == state || ["stopped", "saved"].contains(&listed), "{place}: {state}, then {listed}");
        let all = runtime().block_on(self.manager.snapshots(&web()));
        for taken in all.unwrap_or_else(|error| panic!("{place}: {error:?}")) {
            let life = async {
                self.manager.restore_snapshot(&web(), &taken.name).await?;
                self.manager.start(&web()).await?;
                self.manager.stop(&web(), Duration::ZERO).await
            };
            let ended = runtime().block_on(life);
            ended.unwrap_or_else(|error| panic!("{place}: {taken:?}: {error:?}"));
            let is_two = taken.name.as_str() == "two" && self.dir.join(format!("marked-{TWO}")).exists();
            let mark = if is_two { TWO } else { ONE };
            let found = self.on_disks(&format!("read -P {mark} 64k 64k"));
            assert!(!found.contains("Pattern verification failed"), "{place}: {taken:?}: {found}");
        }
        let disks = paths_below(&self.home.join("vms")).into_iter();
        for disk in disks.filter(|path| path.extension().is_some_and(|end| end == "qcow2")) {
            let check = Command::new("qemu-img").args(["check", "-q", "-U"]).arg(&disk).output().unwrap();
            let said = String::from_utf8_lossy(&check.stderr).into_owned();
            assert!(check.status.success(), "{place}: {}: {said}", disk.display());
        }
    }
}

async fn take(manager: &VmManager<vmkit::QemuHypervisor>, name: &str, memory: MemoryMode) -> Result<()> {
    manager.create_snapshot(&web(), &named(name), memory).await.map(drop)
}
