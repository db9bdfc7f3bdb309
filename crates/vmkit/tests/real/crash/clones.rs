//! Clones, interrupted at every step: the source keeps its content, and a clone is whole or it can
//! be created again.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use vmkit::abilities::CloneMode;
use vmkit::spec::VmName;
use vmkit::{ErrorKind, Result};
use vmkit_testkit::crash::{self, FaultDuration, StepFault};

use super::{World, paths_below, runtime, web};

const SCENARIOS: [&str; 2] = ["linked", "full"];

fn copy() -> VmName {
    VmName::new("copy").unwrap()
}

impl World {
    async fn clone_by(&self, scenario: &str) -> Result<()> {
        let mode = if scenario == "full" { CloneMode::Full } else { CloneMode::Linked };
        self.manager.clone_vm(&web().into(), &copy(), mode).await.map(drop)
    }

    fn assert_content(&self, vm: &VmName, place: &str) {
        for disk in ["root.qcow2", "data-0.qcow2"] {
            let disk = self.home.join("vms").join(vm.as_str()).join(disk);
            let read = ["-r", "-f", "qcow2", "-c", "read -P 17 64k 64k"];
            let output = Command::new("qemu-io").args(read).arg(&disk).output().unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let is_right = output.status.success() && !said.contains("Pattern verification failed");
            assert!(
                is_right,
                "{place}: {}: {said}{}",
                disk.display(),
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }

    /// Checks that the clone can be created, if it is not there, and that both have the content.
    fn assert_cloned(&self, scenario: &str, place: &str) {
        self.assert_content(&web(), place);
        match runtime().block_on(self.clone_by(scenario)) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            again => again.unwrap_or_else(|error| panic!("{place}: {error:?}")),
        }
        for vm in [web(), copy()] {
            self.assert_content(&vm, place);
            let info = runtime().block_on(self.manager.info(&vm)).unwrap();
            assert_eq!(info.state.name(), "prepared", "{place}: {vm}");
        }
        let disks = paths_below(&self.home.join("vms")).into_iter();
        for disk in disks.filter(|path| path.extension().is_some_and(|end| end == "qcow2")) {
            let check = Command::new("qemu-img").args(["check", "-q"]).arg(&disk).output().unwrap();
            let said = String::from_utf8_lossy(&check.stderr).into_owned();
            assert!(check.status.success(), "{place}: {}: {said}", disk.display());
        }
        runtime().block_on(self.manager.remove(&copy(), false)).unwrap();
        self.assert_content(&web(), place);
        self.assert_removable(place);
    }
}

/// The test that is killed.
#[test]
fn a_clone_and_its_source_can_be_removed() {
    let Some(task) = crash::task() else {
        for scenario in SCENARIOS {
            let temp = tempfile::tempdir().unwrap();
            World::prepared(temp.path(), &["create", "mark one"]).assert_cloned(scenario, "at once");
        }
        return;
    };
    let world = World::at(&task.dir);
    task.arm();
    runtime().block_on(world.clone_by(&task.scenario)).unwrap();
}

#[test]
fn a_kill_at_any_step_of_a_clone_loses_nothing() {
    for scenario in SCENARIOS {
        let prepare = |dir: &Path| drop(World::prepared(dir, &["create", "mark one"]));
        let check = |dir: &Path, place: &str| World::at(dir).assert_cloned(scenario, place);
        let test = "crash::clones::a_clone_and_its_source_can_be_removed";
        crash::kill_at_every_step(test, scenario, prepare, check);
    }
}

#[test]
fn a_fault_at_any_step_of_a_clone_leaves_a_clone_or_nothing_of_it() {
    for (scenario, lasting) in SCENARIOS.into_iter().zip([FaultDuration::Once, FaultDuration::FromThenOn]) {
        for at in 1.. {
            let temp = tempfile::tempdir().unwrap();
            let world = World::prepared(temp.path(), &["create", "mark one"]);
            let fault = StepFault::at(at, lasting, io::ErrorKind::StorageFull);
            let outcome = runtime().block_on(world.clone_by(scenario));
            let failed = fault.failed();
            drop(fault);
            let Some(step) = failed else {
                assert!(at > 1, "`{scenario}` took no step");
                outcome.unwrap();
                break;
            };
            let place = format!("{scenario}, step {at} `{step}` failed {lasting:?}: {outcome:?}");
            if lasting == FaultDuration::Once && outcome.is_err() {
                assert!(!fs::exists(world.home.join("vms/copy")).unwrap(), "{place}");
            }
            world.assert_cloned(scenario, &place);
        }
    }
}
