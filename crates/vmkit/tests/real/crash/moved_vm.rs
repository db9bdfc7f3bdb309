//! Directories of VMs that were copied, renamed or linked by hand, and records that can't be read,
//! with the real QEMU.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use vmkit::spec::VmName;
use vmkit::store::Misplacement;
use vmkit::{Error, ErrorKind, Result, VmState};

use super::moved_home::{Place, copy};
use super::{paths_below, runtime};

fn name(text: &str) -> VmName {
    VmName::new(text).unwrap()
}

fn link_all(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-al").args([from, to]).status().unwrap().success());
}

/// A home with a VM, and what is asked of another one beside it.
fn home(temp: &tempfile::TempDir) -> Place {
    let place = Place::at(&temp.path().join("home"));
    place.create();
    place
}

fn remove(place: &Place, vm: &str, force: bool) -> Result<()> {
    runtime().block_on(place.manager.remove(&name(vm), force))
}

fn start(place: &Place, vm: &str) -> Error {
    runtime().block_on(place.manager.start(&name(vm))).unwrap_err()
}

/// Returns the state or the error that a VM is listed with.
fn listed(place: &Place, vm: &str) -> std::result::Result<VmState, Misplacement> {
    let list = runtime().block_on(place.manager.list()).unwrap();
    let found = list.into_iter().find(|listed| listed.name.as_str() == vm).unwrap();
    match found.handle {
        Ok(vm) => Ok(vm.state),
        Err(Error::Misplaced { how, .. }) => Err(how),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_directory_that_was_copied_or_linked_within_a_home_is_removed_and_nothing_of_its_original() {
    let temp = tempfile::tempdir().unwrap();
    let place = home(&temp);
    place.does("start");
    let pid = place.pid();
    let vms = place.home.join("vms");
    copy(&vms.join("web"), &vms.join("copied"));
    link_all(&vms.join("web"), &vms.join("linked"));
    symlink("web", vms.join("link")).unwrap();
    let before = paths_below(&vms.join("web"));
    for (vm, how) in
        [("copied", Misplacement::Copy), ("linked", Misplacement::Copy), ("link", Misplacement::Link)]
    {
        assert_eq!(listed(&place, vm), Err(how), "{vm}");
        assert_eq!(start(&place, vm).kind(), ErrorKind::Record, "{vm}");
        assert_eq!(
            runtime().block_on(place.manager.stop(&name(vm), super::Duration::ZERO)).unwrap_err().kind(),
            ErrorKind::Record
        );
        remove(&place, vm, true).unwrap_or_else(|error| panic!("{vm}: {error}"));
        assert!(fs::symlink_metadata(vms.join(vm)).is_err(), "{vm}");
        assert_eq!((listed(&place, "web"), place.pid()), (Ok(VmState::Running), pid), "{vm}");
        assert_eq!(paths_below(&vms.join("web")), before, "{vm}");
    }
    place.does("stop");
    place.does("start");
    place.does("remove");
}

#[test]
fn a_directory_renamed_within_a_home_is_reported_with_its_remedy() {
    let temp = tempfile::tempdir().unwrap();
    let place = home(&temp);
    let (old, new) = (place.home.join("vms/web"), place.home.join("vms/it's"));
    place.does("start");
    fs::rename(&old, new.with_file_name("other")).unwrap();
    let error = start(&place, "other");
    assert_eq!(listed(&place, "other"), Err(Misplacement::Renamed));
    assert_eq!(remove(&place, "other", false).unwrap_err().kind(), ErrorKind::InvalidState, "it runs");
    let text = error.to_string();
    let command = text.split('`').find(|part| part.starts_with("mv ")).unwrap();
    assert!(Command::new("sh").args(["-c", command]).status().unwrap().success(), "{command}");
    assert_eq!(place.state(), "running");
    place.does("stop");
    // Another VM has the name by now: each is removed alone.
    fs::rename(&old, old.with_file_name("other")).unwrap();
    place.create();
    place.does("start");
    assert_eq!(listed(&place, "other"), Err(Misplacement::Replaced));
    remove(&place, "other", false).unwrap();
    assert_eq!(place.state(), "running");
    place.does("remove");
    assert!(paths_below(&place.home.join("vms")).is_empty());
}

#[test]
fn a_home_that_was_copied_by_hard_links_never_touches_its_original() {
    let temp = tempfile::tempdir().unwrap();
    let original = home(&temp);
    for is_running in [true, false] {
        let linked = Place::at(&temp.path().join(if is_running { "running" } else { "stopped" }));
        match is_running {
            true => original.does("start"),
            false => original.does("stop"),
        }
        link_all(&original.home, &linked.home);
        if !is_running {
            original.does("start");
        }
        let pid = original.pid();
        assert_eq!(linked.state(), "stopped", "{is_running}");
        let refused = linked.operate("start").unwrap_err();
        let Error::SameVm { other: Some(other), .. } = &refused else { panic!("{refused:?}") };
        assert_eq!(*other, original.home.join("vms/web"));
        linked.does("stop");
        linked.does("remove");
        assert_eq!((original.state(), original.pid()), ("running", pid), "{is_running}");
    }
    original.does("stop");
    original.does("start");
    original.does("remove");
}

#[test]
fn a_copy_is_not_started_while_its_original_runs_whose_directory_was_removed() {
    let temp = tempfile::tempdir().unwrap();
    let original = home(&temp);
    original.does("start");
    let pid = original.pid();
    let copied = Place::at(&temp.path().join("copied"));
    copy(&original.home, &copied.home);
    fs::remove_dir_all(&original.home).unwrap();
    let refused = copied.operate("start").unwrap_err();
    let Error::SameVm { pid: found, .. } = &refused else { panic!("{refused:?}") };
    assert_eq!(*found, pid);
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid.unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    while copied.operate("start").is_err() {
        std::thread::yield_now();
    }
    copied.does("remove");
}

#[test]
fn a_vm_whose_record_can_not_be_read_is_removed_by_force_once_nothing_of_it_runs() {
    let temp = tempfile::tempdir().unwrap();
    let place = home(&temp);
    place.does("start");
    let pid = place.pid().unwrap();
    let work = place.home.join("vms/web");
    for record in ["vm.json", "run.json"] {
        let text = fs::read_to_string(work.join(record)).unwrap();
        fs::write(work.join(record), text.replace("\"version\": 1,", "\"version\": 9,")).unwrap();
    }
    assert_eq!(remove(&place, "web", false).unwrap_err().kind(), ErrorKind::Record);
    assert_eq!(remove(&place, "web", true).unwrap_err().kind(), ErrorKind::Busy);
    assert!(work.join("root.qcow2").exists());
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    while remove(&place, "web", true).is_err() {
        std::thread::yield_now();
    }
    assert!(!work.exists());
    let spoil: [fn(&Path); 4] = [
        |record| fs::write(record, "").unwrap(),
        |record| fs::write(record, [0xff; 100]).unwrap(),
        |record| fs::create_dir(record).unwrap(),
        |record| symlink("nowhere", record).unwrap(),
    ];
    for (index, spoil) in spoil.into_iter().enumerate() {
        place.create();
        fs::remove_file(work.join("vm.json")).unwrap();
        spoil(&work.join("vm.json"));
        assert_eq!(remove(&place, "web", false).unwrap_err().kind(), ErrorKind::Record, "{index}");
        remove(&place, "web", true).unwrap_or_else(|error| panic!("{index}: {error}"));
        assert!(!work.exists(), "{index}");
    }
}

#[test]
fn what_took_the_place_of_a_file_of_a_vm_is_neither_waited_for_nor_in_the_way_of_its_removal() {
    let temp = tempfile::tempdir().unwrap();
    let place = home(&temp);
    let work = place.home.join("vms/web");
    let replace: [fn(&Path); 2] = [
        |file| assert!(Command::new("mkfifo").arg(file).status().unwrap().success()),
        |file| fs::create_dir(file).unwrap(),
    ];
    for file in ["qemu.json", "owner", "lock", "alive", "run.json"] {
        for (index, replace) in replace.iter().enumerate() {
            if !work.exists() {
                place.create();
            }
            place.does("start");
            place.does("stop");
            let _ = fs::remove_file(work.join(file));
            replace(&work.join(file));
            let began = std::time::Instant::now();
            let listed = runtime().block_on(place.manager.list()).unwrap();
            assert_eq!(listed.len(), 1, "{file} {index}");
            // A directory in the place of a run's lock is for the user to remove.
            if index == 1 && file == "alive" {
                remove(&place, "web", true).unwrap_err();
                fs::remove_dir(work.join(file)).unwrap();
            }
            remove(&place, "web", true).unwrap_or_else(|error| panic!("{file} {index}: {error}"));
            assert!(!work.exists(), "{file} {index}");
            assert!(began.elapsed() < super::Duration::from_secs(20), "{file} {index}");
        }
    }
}

#[test]
fn a_vm_that_runs_is_stopped_though_the_mark_of_its_directory_was_lost() {
    let temp = tempfile::tempdir().unwrap();
    let place = home(&temp);
    let mark = place.home.join("vms/web/owner");
    let id = fs::read(&mark).unwrap();
    for lost in [false, true] {
        place.does("start");
        match lost {
            true => fs::remove_file(&mark).unwrap(),
            false => fs::write(&mark, "").unwrap(),
        }
        assert_eq!(place.state(), "running");
        place.does("suspend");
        place.does("resume");
        place.does("stop");
        assert_eq!(place.operate("start").unwrap_err().kind(), ErrorKind::Record);
        fs::write(&mark, &id).unwrap();
    }
    place.does("start");
    place.does("remove");
}
