//! Keeping, importing, checking and removing images.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::cell::Cell;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::rc::Rc;

use super::*;
use crate::backend::noop::NoopHypervisor;
use crate::error::{Error, ErrorKind};
use crate::manager::VmManager;
use crate::spec::{Arch, DataDisk, RootDisk, VmName, VmSpec};
use crate::store::Home;

const ARCH: Arch = Arch::X86_64;

fn store(dir: &Path) -> ImageStore {
    ImageStore::new(&Home::at(dir).unwrap(), Catalogue::built_in())
}

async fn import(store: &ImageStore, dir: &Path, name: &str, content: &[u8]) -> crate::Result<LocalImage> {
    let file = dir.join("import-me");
    fs::write(&file, content).unwrap();
    let import =
        ImportOptions { name: ImageName::new(name).unwrap(), arch: ARCH, user: None, firmware: None };
    store.import(&file, import, &no_progress()).await
}

async fn make_vm(
    dir: &Path,
    name: &str,
    spec: impl FnOnce(crate::spec::VmSpecBuilder) -> crate::spec::VmSpecBuilder,
) {
    let manager = VmManager::new(NoopHypervisor::new(), Home::at(dir).unwrap());
    let builder = spec(VmSpec::builder(VmName::new(name).unwrap()));
    manager.create(builder.build().unwrap()).await.unwrap();
}

#[tokio::test]
async fn an_imported_image_is_found_by_its_name_and_its_identity() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let kept = import(&store, dir.path(), "mine:1", &[7; 5000]).await.unwrap();
    for text in ["mine:1".to_owned(), kept.id.to_string(), kept.id.to_string()[..14].to_owned()] {
        assert_eq!(store.find(&text, None).unwrap()[0].id, kept.id, "{text}");
    }
    let image = "mine:1".parse().unwrap();
    let found = store.resolve(&image, ARCH, PullPolicy::Never, &no_progress()).await.unwrap();
    assert_eq!(found.id, Some(kept.id.clone()));
    assert_eq!(fs::read(&found.facts.path).unwrap(), [7; 5000]);
    assert!(dir.path().join("import-me").exists(), "the file stays the user's");
    // One that the catalogue does not know can't be newer anywhere.
    assert_eq!(store.pull(&image, ARCH, &no_progress()).await.unwrap().id, kept.id);
    for (text, kind) in [("mine:2", ErrorKind::NotFound), ("sha256:00", ErrorKind::InvalidInput)] {
        assert_eq!(store.find(text, None).unwrap_err().kind(), kind, "{text}");
    }
}

/// On one thread: the writer is woken by the progress, and runs before the import goes on.
#[tokio::test(flavor = "current_thread")]
async fn an_import_of_a_file_that_is_being_written_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let path = dir.path().join("growing.img");
    fs::write(&path, vec![7; 4 << 20]).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let import =
        || ImportOptions { name: ImageName::new("ours").unwrap(), arch: ARCH, user: None, firmware: None };
    let (progress, mut seen) = tokio::sync::watch::channel(PullProgress::default());
    let write = async {
        seen.wait_for(|progress| progress.done_bytes > 0).await.unwrap();
        // In place, so that only its time changes.
        fs::File::options().write(true).open(&path).unwrap().write_all(b"x").unwrap();
    };
    let (refused, ()) = tokio::join!(store.import(&path, import(), &progress), write);
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("written to while it was read"), "{error}");
    assert!(store.list().unwrap().0.is_empty());
    store.import(&path, import(), &no_progress()).await.unwrap();
}

#[tokio::test]
async fn an_import_of_what_is_no_disk_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for content in [&b""[..], b"<html>no</html>", b"KDMV and so on"] {
        let error = import(&store, dir.path(), "mine", content).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    assert!(store.list().unwrap().0.is_empty());
    assert!(super::files::entries(&dir.path().join("images/downloads")).unwrap().is_empty());
}

#[tokio::test]
async fn a_name_that_is_given_again_leaves_the_earlier_image_nameless() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let old = import(&store, dir.path(), "mine", &[1; 600]).await.unwrap();
    let new = import(&store, dir.path(), "mine", &[2; 600]).await.unwrap();
    let (images, _) = store.list().unwrap();
    assert_eq!((images[0].id.clone(), images[1].id.clone()), (new.id.clone(), old.id.clone()));
    assert!(images[1].names.is_empty());
    let (count, freed_bytes) = store.prune(false).await.unwrap();
    assert!(count == 1 && freed_bytes > 0, "{count} {freed_bytes}");
    assert_eq!(store.list().unwrap().0.len(), 1);
    assert_eq!(store.prune(true).await.unwrap().0, 1);
    assert!(!old.facts.path.exists() && !new.facts.path.exists());
}

#[tokio::test]
async fn an_image_that_a_vm_hangs_on_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let kept = import(&store, dir.path(), "mine", &[1; 600]).await.unwrap();
    let path = kept.facts.path.clone();
    make_vm(dir.path(), "root", |spec| spec.disk(RootDisk { image: path.clone(), size: None })).await;
    let data = DataDisk::Existing { path, readonly: true };
    make_vm(dir.path(), "data", |spec| {
        let kernel = crate::spec::Kernel { path: "/k".into(), initrd: None, cmdline: String::new() };
        spec.boot(crate::spec::Boot::Kernel(kernel)).data_disks(vec![data])
    })
    .await;
    assert_eq!(store.users(&kept.id).unwrap().len(), 2);
    for text in ["mine".to_owned(), kept.id.to_string()] {
        let error = store.remove(&text, None).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(
            error
                .to_string()
                .contains("image `mine`: it is the backing file of the disks of the VMs `data`, `root`"),
            "{error}"
        );
    }
    assert_eq!(store.prune(true).await.unwrap().0, 0);

    let second = import(&store, dir.path(), "other", &[1; 600]).await.unwrap();
    assert_eq!(second.id, kept.id);
    let removed = store.remove("mine", None).await.unwrap();
    assert_eq!(
        (removed.names, removed.freed_bytes),
        (vec!["mine@x86_64".to_owned()], 0),
        "another name keeps it"
    );

    fs::write(dir.path().join("vms/root/vm.json"), "?").unwrap();
    let error = store.remove("other", None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Record, "a VM that can't be read may be one: {error}");
    for vm in ["root", "data"] {
        fs::remove_dir_all(dir.path().join("vms").join(vm)).unwrap();
    }
    assert!(store.remove("other", None).await.unwrap().freed_bytes > 0);
    assert!(!kept.facts.path.exists());
}

#[tokio::test(start_paused = true)]
async fn an_image_is_not_removed_while_a_vm_is_created_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let kept = import(&store, dir.path(), "mine", &[1; 600]).await.unwrap();
    let image = "mine".parse().unwrap();
    let in_use = store.resolve(&image, ARCH, PullPolicy::Never, &no_progress()).await.unwrap();
    let by_path = kept.facts.path.to_str().unwrap().parse().unwrap();
    let again = store.resolve(&by_path, ARCH, PullPolicy::Never, &no_progress()).await.unwrap();
    drop(in_use);
    assert!(matches!(store.remove("mine", None).await, Err(Error::Busy { .. })), "held by its path as well");
    assert_eq!(store.prune(true).await.unwrap().0, 0);
    // In real time: the thread that waited for the first removal has its turn at the lock before it
    // ends.
    tokio::time::resume();
    drop(again);
    store.remove("mine", None).await.unwrap();
}

#[tokio::test]
async fn a_damaged_image_does_not_hash_to_its_identity() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let kept = import(&store, dir.path(), "mine", &[1; 100_000]).await.unwrap();
    assert_eq!(store.rehash(&kept.id, &no_progress()).await.unwrap(), kept.id);
    fs::set_permissions(&kept.facts.path, fs::Permissions::from_mode(0o600)).unwrap();
    let mut bytes = fs::read(&kept.facts.path).unwrap();
    bytes[50_000] ^= 1;
    fs::write(&kept.facts.path, bytes).unwrap();
    assert_ne!(store.rehash(&kept.id, &no_progress()).await.unwrap(), kept.id);
}

#[tokio::test]
async fn a_failure_at_any_step_leaves_no_half_image_and_the_next_try_succeeds() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for failing in 1.. {
        let taken = Rc::new(Cell::new(0));
        let counter = Rc::clone(&taken);
        crate::set_step_hook(Some(Box::new(move |_| {
            counter.set(counter.get() + 1);
            if counter.get() == failing { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        })));
        let imported = import(&store, dir.path(), "mine", &[failing as u8; 600]).await;
        crate::set_step_hook(None);
        let (images, unreadable) = store.list().unwrap();
        assert!(unreadable.is_empty(), "step {failing}: {unreadable:?}");
        for image in &images {
            assert_eq!(store.rehash(&image.id, &no_progress()).await.unwrap(), image.id, "step {failing}");
        }
        if taken.get() < failing {
            imported.unwrap();
            break;
        }
        let kept = import(&store, dir.path(), "mine", &[failing as u8; 600]).await.unwrap();
        assert!(kept.facts.path.exists(), "step {failing}");
        store.prune(true).await.unwrap();
        assert!(store.list().unwrap().0.is_empty());
    }
}

#[tokio::test]
async fn what_a_killed_writer_left_of_a_record_is_removed_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let kept = import(&store, dir.path(), "mine:1", &[7; 5000]).await.unwrap();
    let images = dir.path().join("images");
    let of_image = images.join(super::kept::dir_name(&kept.id)).join("image.json.4711.new");
    let of_name = images.join("names/mine:2@x86_64.json.4711.new");
    for again in [true, false] {
        fs::write(&of_image, "{").unwrap();
        fs::write(&of_name, "{").unwrap();
        match again {
            true => drop(import(&store, dir.path(), "mine:2", &[7; 5000]).await.unwrap()),
            false => assert_eq!(store.prune(false).await.unwrap().0, 0),
        }
        assert!(!of_image.exists() && !of_name.exists(), "{again}");
    }
    assert_eq!(store.find("mine:2", None).unwrap()[0].id, kept.id);
}

#[tokio::test]
async fn spoilt_records_are_replaced_by_an_import_and_removed_by_rm_and_prune() {
    type Spoil = fn(&ImageStore, &LocalImage);
    let record: Spoil =
        |store, image| fs::write(store.images.dir(&image.id).join("image.json"), "x").unwrap();
    let name: Spoil = |store, _| fs::write(store.images.names_dir().join("mine:1@x86_64.json"), "x").unwrap();
    let name_dir: Spoil = |store, _| {
        let file = store.images.names_dir().join("mine:1@x86_64.json");
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
    };
    let lock_dir: Spoil = |store, image| {
        let lock = store.images.dir(&image.id).join("lock");
        let _ = fs::remove_file(&lock);
        fs::create_dir(&lock).unwrap();
    };
    for (which, spoil) in [record, name, name_dir, lock_dir].into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let spoilt = async || {
            let image = import(&store, dir.path(), "mine:1", &[7; 5000]).await.unwrap();
            spoil(&store, &image);
            image
        };
        spoilt().await;
        let again = import(&store, dir.path(), "mine:1", &[7; 5000]).await.unwrap();
        assert_eq!(store.list().unwrap().0, [again], "{which}");
        spoilt().await;
        store.remove("mine:1", None).await.unwrap_or_else(|error| panic!("{which}: {error}"));
        assert_eq!(
            store.images.names_of(&spoilt().await.id).unwrap().len(),
            usize::from([0, 3].contains(&which))
        );
        store.prune(true).await.unwrap_or_else(|error| panic!("{which}: {error}"));
        let (images, unreadable) = store.list().unwrap();
        assert!(images.is_empty() && unreadable.is_empty(), "{which}: {images:?} {unreadable:?}");
    }
}
