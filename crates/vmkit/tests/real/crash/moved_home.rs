//! Homes that are moved, copied, and reached by another name, with the real QEMU.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use vmkit::image::{create_overlay, inspect};
use vmkit::spec::{DataDisk, MachineType, RootDisk};
use vmkit::store::Home;
use vmkit::{Error, ErrorKind, QemuHypervisor, Result, VmManager};
use vmkit_testkit::guest;

use super::{paths_below, runtime, web};

/// The image of the store of images that records of commit c2c6b0a name.
const STORED: &str =
    "images/sha256-30e14955ebf1352266dc2ff8067e68104607e750abb9d3b36582b8af909fcb58/disk.raw";

/// A home, and what is done to its one VM.
pub(super) struct Place {
    pub(super) home: PathBuf,
    pub(super) manager: VmManager<QemuHypervisor>,
}

impl Place {
    pub(super) fn at(home: &Path) -> Self {
        Self::with(home, Home::at(home).unwrap())
    }

    /// A home whose sockets lie in a directory that others may use, too.
    fn sharing(home: &Path, run: &Path) -> Self {
        Self::with(home, Home::split(home, run, home.join("cache")).unwrap())
    }

    fn with(root: &Path, home: Home) -> Self {
        let qemu = QemuHypervisor::builder(home.vms(), home.run())
            .cache_dir(home.cache())
            .keeper(env!("CARGO_BIN_EXE_vmkit-keeper"))
            .build();
        Self { home: root.to_owned(), manager: VmManager::new(qemu, home) }
    }

    /// Creates a VM whose image and second disk lie in the home.
    pub(super) fn create(&self) {
        let image = self.home.join(STORED);
        fs::create_dir_all(image.parent().unwrap()).unwrap();
        for file in [&image, &self.home.join("data.raw")] {
            fs::write(file, vec![0; 1 << 20]).unwrap();
        }
        let data = DataDisk::Existing { path: self.home.join("data.raw"), readonly: false };
        let spec = guest::tiny().spec("web", MachineType::Q35, "").disk(RootDisk { image, size: None });
        runtime().block_on(self.manager.create(spec.data_disks(vec![data]).build().unwrap())).unwrap();
    }

    pub(super) fn operate(&self, word: &str) -> Result<()> {
        let (name, manager) = (web(), &self.manager);
        runtime().block_on(async {
            match word {
                "start" => manager.start(&name).await.map(drop),
                "stop" => manager.stop(&name, Duration::ZERO).await.map(drop),
                "suspend" => manager.suspend(&name).await.map(drop),
                "resume" => manager.resume(&name).await.map(drop),
                "remove" => manager.remove(&name, true).await,
                _ => panic!("no operation `{word}`"),
            }
        })
    }

    pub(super) fn does(&self, word: &str) {
        self.operate(word).unwrap_or_else(|error| panic!("{word} in {}: {error}", self.home.display()));
    }

    pub(super) fn state(&self) -> &'static str {
        let listed = runtime().block_on(self.manager.list()).unwrap();
        listed[0].handle.as_ref().unwrap_or_else(|error| panic!("{error}")).state.name()
    }

    pub(super) fn pid(&self) -> Option<u32> {
        runtime().block_on(self.manager.info(&web())).unwrap().run.and_then(|run| run.pid)
    }

    /// Returns the records of the VM as text.
    fn records(&self) -> String {
        let of = |name: &str| fs::read_to_string(self.home.join("vms/web").join(name)).unwrap_or_default();
        ["vm.json", "run.json", "qemu.json"].map(of).concat()
    }
}

pub(super) fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

#[test]
fn a_vm_of_a_home_that_was_renamed_goes_on_with_its_own_disks() {
    let temp = tempfile::tempdir().unwrap();
    let (old, new) = (temp.path().join("old"), temp.path().join("a-new-name"));
    let place = Place::at(&old);
    place.create();
    place.does("start");
    assert!(!place.records().contains(old.to_str().unwrap()), "{}", place.records());
    place.does("stop");
    fs::rename(&old, &new).unwrap();
    let place = Place::at(&new);
    assert_eq!(place.state(), "stopped");
    place.does("start");
    assert_eq!(place.state(), "running");
    // While it runs, too: its sockets and its disks go along.
    fs::rename(&new, &old).unwrap();
    let place = Place::at(&old);
    assert_eq!(place.state(), "running");
    place.does("suspend");
    place.does("resume");
    place.does("stop");
    place.does("remove");
    assert!(paths_below(&old.join("vms")).is_empty() && !new.exists(), "{:?}", paths_below(temp.path()));
}

#[test]
fn a_copy_of_a_home_never_touches_its_original() {
    for is_shared in [false, true] {
        let temp = tempfile::tempdir().unwrap();
        let (old, new, run) = (temp.path().join("old"), temp.path().join("new"), temp.path().join("run"));
        let at = |home: &Path| if is_shared { Place::sharing(home, &run) } else { Place::at(home) };
        let original = at(&old);
        original.create();
        original.does("start");
        let pid = original.pid();
        copy(&old, &new);
        let copied = at(&new);
        assert_eq!(copied.state(), "stopped", "shared: {is_shared}");
        assert_eq!(copied.operate("suspend").unwrap_err().kind(), ErrorKind::InvalidState);
        copied.does("stop");
        let refused = copied.operate("start").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Busy);
        let Error::SameVm { other: Some(other), .. } = &refused else { panic!("{refused:?}") };
        assert_eq!(*other, old.join("vms/web"));
        assert_eq!((original.state(), original.pid()), ("running", pid), "shared: {is_shared}");
        copied.does("remove");
        assert_eq!((original.state(), original.pid()), ("running", pid), "shared: {is_shared}");
        original.does("suspend");
        original.does("resume");
        original.does("stop");
        original.does("start");
        original.does("remove");
    }
}

#[test]
fn a_copy_and_its_original_run_in_turn_each_with_its_own_disks() {
    let temp = tempfile::tempdir().unwrap();
    let (old, new) = (temp.path().join("old"), temp.path().join("new"));
    let original = Place::at(&old);
    original.create();
    copy(&old, &new);
    let copied = Place::at(&new);
    copied.does("start");
    let Err(Error::SameVm { other: Some(other), .. }) = original.operate("start") else {
        panic!("both run");
    };
    assert_eq!((other, copied.state()), (new.join("vms/web"), "running"));
    copied.does("stop");
    original.does("start");
    original.does("stop");
    // The copy needs nothing of the original.
    fs::remove_dir_all(&old).unwrap();
    copied.does("start");
    let open = fs::read_dir(format!("/proc/{}/fd", copied.pid().unwrap())).unwrap().flatten();
    let open: Vec<PathBuf> = open.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
    for own in [STORED, "data.raw", "vms/web/root.qcow2"] {
        assert!(open.contains(&new.join(own)), "{open:?}");
    }
    copied.does("remove");
}

#[test]
fn a_home_is_one_by_whatever_name_it_is_reached() {
    let temp = tempfile::tempdir().unwrap();
    let (real, link) = (temp.path().join("real"), temp.path().join("link"));
    fs::create_dir(&real).unwrap();
    symlink(&real, &link).unwrap();
    let (by_name, by_link) = (Place::at(&real), Place::at(&link));
    by_link.create();
    by_link.does("start");
    assert_eq!((by_name.state(), by_name.pid()), ("running", by_link.pid()));
    by_name.does("start");
    by_name.does("suspend");
    assert_eq!(by_link.state(), "suspended");
    by_link.does("resume");
    by_name.does("stop");
    by_name.does("start");
    assert!(!by_name.records().contains(temp.path().to_str().unwrap()), "{}", by_name.records());
    by_link.does("stop");
    by_name.does("remove");
    assert!(paths_below(&real.join("vms")).is_empty());
}

#[test]
fn records_of_the_first_release_are_read_with_the_present_home() {
    let temp = tempfile::tempdir().unwrap();
    let (old, new) = (temp.path().join("old"), temp.path().join("new"));
    let records = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/records/c2c6b0a");
    for home in [&old, &new] {
        let (work, image) = (home.join("vms/a"), home.join(STORED));
        fs::create_dir_all(image.parent().unwrap()).unwrap();
        fs::create_dir_all(&work).unwrap();
        fs::write(&image, vec![0; 1 << 20]).unwrap();
        for name in ["vm.json", "run.json", "qemu.json", "owner"] {
            let text = fs::read_to_string(records.join(name)).unwrap();
            fs::write(work.join(name), text.replace("/old/vmkit", old.to_str().unwrap())).unwrap();
        }
        // What a stop leaves.
        fs::write(work.join("stop-asked"), "").unwrap();
        create_overlay(&inspect(&old.join(STORED)).unwrap(), &work.join("root.qcow2"), None).unwrap();
    }
    let name = vmkit::spec::VmName::new("a").unwrap();
    let copied = Place::at(&new);
    let info = |place: &Place| runtime().block_on(place.manager.info(&name)).unwrap();
    assert_eq!(info(&copied).state.name(), "stopped");
    assert_eq!(info(&copied).console_log, Some(new.join("vms/a/console.log")));
    let image = |place: &Place| info(place).spec.disk().unwrap().image.clone();
    assert_eq!(image(&copied), new.join(STORED));
    // The original is not needed, and not touched.
    let before = paths_below(&old);
    runtime().block_on(copied.manager.start(&name)).unwrap();
    runtime().block_on(copied.manager.stop(&name, Duration::ZERO)).unwrap();
    let written = fs::read_to_string(new.join("vms/a/run.json")).unwrap();
    assert!(!written.contains(temp.path().to_str().unwrap()), "{written}");
    runtime().block_on(copied.manager.remove(&name, false)).unwrap();
    assert_eq!(paths_below(&old), before);
    let original = Place::at(&old);
    assert_eq!(info(&original).state.name(), "stopped");
    runtime().block_on(original.manager.start(&name)).unwrap();
    runtime().block_on(original.manager.remove(&name, true)).unwrap();
}

#[test]
fn a_backup_that_is_restored_over_a_vm_that_runs_hides_nothing_of_it() {
    let temp = tempfile::tempdir().unwrap();
    let place = Place::at(&temp.path().join("home"));
    place.create();
    place.does("start");
    let pid = place.pid().unwrap();
    // As an archiver does: the file is removed and written again.
    let alive = place.home.join("vms/web/alive");
    fs::remove_file(&alive).unwrap();
    fs::write(&alive, "").unwrap();
    assert_eq!((place.state(), place.pid()), ("running", Some(pid)));
    place.does("start");
    assert_eq!(place.pid(), Some(pid));
    place.does("remove");
    assert!(!Path::new("/proc").join(pid.to_string()).join("exe").exists());
    assert!(!place.home.join("vms/web").exists());
}

#[test]
fn a_vm_whose_directory_was_moved_behind_a_link_is_removed_with_the_link() {
    let temp = tempfile::tempdir().unwrap();
    let place = Place::at(&temp.path().join("home"));
    place.create();
    let (work, moved) = (place.home.join("vms/web"), temp.path().join("larger-disk"));
    fs::rename(&work, &moved).unwrap();
    symlink(&moved, &work).unwrap();
    place.does("start");
    place.does("remove");
    assert!(fs::symlink_metadata(&work).is_err() && !moved.exists());
}
