//! What is refused leaves nothing behind, and says what would be right.

use std::fs;
use std::os::unix::fs::symlink;

use crate::common::{FileHypervisor, SOON, spec, web};
use tokio::time::timeout;
use uuid::Uuid;
use vmkit::lifecycle::Operation;
use vmkit::spec::{VmName, VmSpecBuilder};
use vmkit::store::{Home, Intent, VmRecord};
use vmkit::{BackendTag, ErrorKind, NoopHypervisor, RunInfo, VmHandle, VmManager, VmState, WaitCondition};

#[tokio::test]
async fn a_start_that_is_refused_is_no_start_that_was_cut_off() {
    let temp = tempfile::tempdir().unwrap();
    let manager = VmManager::new(NoopHypervisor::new(), Home::at(temp.path()).unwrap());
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    manager.suspend(&web()).await.unwrap();
    let refused = manager.start(&web()).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidState);
    let listed = manager.list().await.unwrap().remove(0);
    assert_eq!(listed.handle.as_ref().unwrap().state, VmState::Suspended);
    assert!(listed.intent.is_none(), "{listed:?}");
    assert_eq!(manager.resume(&web()).await.unwrap().state, VmState::Running);
}

#[tokio::test]
async fn a_name_that_something_else_than_a_directory_has_is_refused_at_once() {
    let temp = tempfile::tempdir().unwrap();
    let manager = VmManager::new(NoopHypervisor::new(), Home::at(temp.path()).unwrap());
    let place = manager.home().vms().join("web");
    fs::create_dir_all(manager.home().vms()).unwrap();
    for is_link in [true, false] {
        match is_link {
            true => symlink(temp.path().join("not mounted"), &place).unwrap(),
            false => fs::write(&place, "a note").unwrap(),
        }
        let error = timeout(SOON, manager.create(spec())).await.expect("it is told at once").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Record, "{error}");
        assert!(error.to_string().starts_with(&format!("{}: ", place.display())), "{error}");
        fs::remove_file(&place).unwrap();
    }
    manager.create(spec()).await.unwrap();
}

/// The removal of an interrupted one would remove the other as well.
#[tokio::test]
async fn the_identity_of_a_vm_whose_making_was_cut_off_is_in_use_for_all_other_names() {
    let temp = tempfile::tempdir().unwrap();
    let manager = VmManager::new(NoopHypervisor::new(), Home::at(temp.path()).unwrap());
    let (id, half) = (Uuid::from_u128(8), VmName::new("half").unwrap());
    let named = |name: &VmName| VmSpecBuilder::from(spec()).name(name.clone()).id(id).build().unwrap();
    let begun = VmHandle::preparing(id, BackendTag::Noop, named(&half));
    let intent = Intent { operation: Operation::Prepare, since: 1, pid: 1, snapshot: None };
    let dir = manager.home().vms().join("half");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("vm.json"), VmRecord::intending(begun, intent).encode().unwrap()).unwrap();
    let error = manager.create(named(&web())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    manager.create(named(&half)).await.expect("it is its own");
}

#[tokio::test]
async fn without_a_forward_no_wait_for_ssh_uses_the_port_of_this_host() {
    let temp = tempfile::tempdir().unwrap();
    let hypervisor = FileHypervisor::new(temp.path().join("fake")).with_run(RunInfo::default());
    let manager = VmManager::new(hypervisor, Home::at(temp.path().join("home")).unwrap());
    manager.create(spec()).await.unwrap();
    manager.start(&web()).await.unwrap();
    let error = manager.wait(&web(), WaitCondition::Ssh, SOON).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "refused without a wait until the timeout: {error}");
    assert!(error.to_string().contains("no forward to its SSH server is known for the VM `web`"), "{error}");
}

#[tokio::test]
async fn an_ephemeral_vm_of_a_copied_home_is_kept_since_nothing_shows_that_its_owner_has_ended() {
    let temp = tempfile::tempdir().unwrap();
    let (noop, manager) = {
        let noop = NoopHypervisor::new();
        let home = Home::at(temp.path().join("home")).unwrap();
        (noop.clone(), VmManager::new(noop, home))
    };
    let (_, owner) = manager.create_ephemeral(spec()).await.unwrap();
    let copied = temp.path().join("copied");
    for option in ["-a", "-al"] {
        let _ = fs::remove_dir_all(&copied);
        let copy =
            std::process::Command::new("cp").arg(option).arg(temp.path().join("home")).arg(&copied).status();
        assert!(copy.unwrap().success());
        let copy = VmManager::new(noop.clone(), Home::at(&copied).unwrap());
        assert!(copy.remove_orphans().await.unwrap().is_empty(), "{option}");
        assert!(copied.join("vms/web/vm.json").exists(), "{option}");
    }
    drop(owner);
    let copy = VmManager::new(noop, Home::at(&copied).unwrap());
    assert!(copy.remove_orphans().await.unwrap().is_empty());
    assert!(copied.join("vms/web/vm.json").exists());
    // A home that was renamed is the same.
    fs::rename(temp.path().join("home"), temp.path().join("moved")).unwrap();
    let moved = VmManager::new(NoopHypervisor::new(), Home::at(temp.path().join("moved")).unwrap());
    assert_eq!(moved.remove_orphans().await.unwrap(), [web()]);
}
