//! Directories of VMs that are moved and copied: what belongs to a VM outside of its directory is
//! the original's.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vmkit::spec::{RootDisk, VmName, VmSpec};
use vmkit::{ConsoleEndpoint, ErrorKind, Hypervisor, PropolisHypervisor, VmState};

use super::world::{self, Remote, World};

fn name() -> VmName {
    VmName::new("web").unwrap()
}

/// A VM whose disks are files in its directory, with a VNIC.
fn of_files(world: &World) -> VmSpec {
    let image = world.path().join("debian.raw");
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let fresh = vmkit::spec::DataDisk::Fresh { size: vmkit::spec::Mib::new(1).unwrap() };
    world.bare(name()).disk(RootDisk { image, size: None }).data_disks(vec![fresh]).build().unwrap()
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").args([from, to]).status().unwrap().success());
}

#[tokio::test]
async fn a_directory_that_was_moved_takes_its_vm_along() {
    for spec in [of_files as fn(&World) -> VmSpec, |world| world.spec(name())] {
        let world = World::new();
        let (here, there) = (world.path().join("vms"), world.path().join("moved"));
        let spec = spec(&world);
        let vm = world.hypervisor().prepare(&spec).await.unwrap();
        fs::rename(&here, &there).unwrap();
        let propolis = world.builder_at(&there).build();
        let state = propolis.state(&vm).await.unwrap();
        assert_eq!(state, VmState::Prepared);
        let vm = propolis.start(&vm).await.unwrap();
        assert_eq!(propolis.state(&vm).await.unwrap(), VmState::Running);
        assert_eq!(vm.console_log.as_deref(), Some(there.join("web/console.log").as_path()));
        propolis.stop(&vm, Duration::ZERO).await.unwrap();
        // What was moved is the VM: what is copied back from it is not.
        copy(&there, &here);
        let error = world.hypervisor().start(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        world.hypervisor().destroy(vm.clone()).await.unwrap();
        let vm = propolis.start(&vm).await.unwrap();
        propolis.destroy(vm).await.unwrap();
        assert_eq!(world.left(), Vec::<String>::new());
        assert!(!there.join("web").exists());
    }
}

#[tokio::test]
async fn a_copy_of_a_directory_touches_nothing_of_the_original() {
    for spec in [of_files as fn(&World) -> VmSpec, |world| world.spec(name())] {
        let world = World::new();
        let (here, there) = (world.path().join("vms"), world.path().join("copied"));
        let original = world.hypervisor();
        let vm = original.prepare(&spec(&world)).await.unwrap();
        let running = original.start(&vm).await.unwrap();
        copy(&here, &there);
        let files = || {
            let mut files: Vec<_> =
                fs::read_dir(here.join("web")).unwrap().map(|file| file.unwrap().file_name()).collect();
            files.sort();
            files
        };
        let (before, links) = (files(), world.host().state().unwrap().links.len());

        let copied = world.builder_at(&there).build();
        assert!(!copied.state(&running).await.unwrap().is_live(), "nothing runs for the copy");
        assert!(matches!(copied.console_endpoint(&running).unwrap(), ConsoleEndpoint::None));
        let error = copied.start(&running).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(
            error.to_string().contains(here.join("web").to_str().unwrap()),
            "it names the original: {error}"
        );
        // A VM that never ran here can't be stopped, and is not.
        let _ = copied.stop(&running, Duration::ZERO).await;
        assert_eq!(original.state(&running).await.unwrap(), VmState::Running);
        copied.destroy(running.clone()).await.unwrap();
        assert!(!there.join("web").exists());

        assert_eq!((files(), world.host().state().unwrap().links.len()), (before, links));
        assert_eq!((original.state(&running).await.unwrap(), world.guests(&vm)), (VmState::Running, 1));
        original.stop(&running, Duration::ZERO).await.unwrap();
        let running = original.start(&vm).await.unwrap();
        original.destroy(running).await.unwrap();
        assert_eq!(world.left(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_copy_leaves_the_vm_at_a_server_elsewhere_alone() {
    let remote = Remote::new();
    let (here, there) = (remote.path().join("vms"), remote.path().join("copied"));
    let original = remote.hypervisor();
    let vm = original.prepare(&remote.spec(name())).await.unwrap();
    let vm = original.start(&vm).await.unwrap();
    copy(&here, &there);
    let copied = PropolisHypervisor::builder(&there).search_path("/nonexistent".as_ref()).build();
    assert!(!copied.state(&vm).await.unwrap().is_live());
    let _ = copied.stop(&vm, Duration::ZERO).await;
    copied.destroy(vm.clone()).await.unwrap();
    assert_eq!((original.state(&vm).await.unwrap(), remote.guests(&vm)), (VmState::Running, 1));

    // Moved, it is the VM.
    fs::rename(&here, &there).unwrap();
    assert_eq!(copied.state(&vm).await.unwrap(), VmState::Running);
    copied.stop(&vm, Duration::ZERO).await.unwrap();
    world::wait_for_state(&copied, &vm, &VmState::Stopped).await;
    copied.destroy(vm).await.unwrap();
    assert_eq!(remote.kernel_vms(), Vec::<String>::new());
}
