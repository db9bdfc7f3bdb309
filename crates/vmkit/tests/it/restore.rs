//! Restores of snapshots over the manager.

use vmkit::abilities::MemoryMode;
use vmkit::lifecycle::{FailureCause, FailureKind, Operation};
use vmkit::spec::{Boot, Kernel, SnapshotName, VmName, VmSpec};
use vmkit::store::Home;
use vmkit::{NoopHypervisor, VmManager, VmState};

#[tokio::test]
async fn a_restore_that_failed_at_once_is_not_repeated_by_the_next_start() {
    let temp = tempfile::tempdir().unwrap();
    let noop = NoopHypervisor::new();
    let manager = VmManager::new(noop.clone(), Home::at(temp.path()).unwrap());
    let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
    let name = VmName::new("web").unwrap();
    let spec = VmSpec::builder(name.clone()).boot(Boot::Kernel(kernel));
    manager.create(spec.build().unwrap()).await.unwrap();
    let [one, two] = ["one", "two"].map(|name| SnapshotName::new(name).unwrap());
    for snapshot in [&one, &two] {
        manager.create_snapshot(&name, snapshot, MemoryMode::Include).await.unwrap();
    }
    let vm = manager.start(&name).await.unwrap();
    let cause = FailureCause { kind: FailureKind::HypervisorExited, detail: "it broke".to_owned() };
    noop.break_vm(&vm, cause).unwrap();
    noop.fail_next(Operation::Restore, "no room");
    manager.restore_snapshot(&name, &one).await.unwrap_err();
    assert_eq!(manager.start(&name).await.unwrap().state, VmState::Running);
    let current = manager.snapshots(&name).await.unwrap().into_iter().find(|it| it.is_current).unwrap();
    assert_eq!(current.name, two, "the start restored nothing");
}
