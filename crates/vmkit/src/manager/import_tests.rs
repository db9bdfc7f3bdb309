//! Exports that lie: each is refused by what is wrong with it, and leaves nothing.
//!
//! QEMU is not needed: nothing is started.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::{HostFilePolicy, VmImportOptions, VmManager};
use crate::archive::{ArchiveWriter, ExportHeader, ExportedImage, ListedFile, RECORD, image_entry};
use crate::backend::qemu::QemuHypervisor;
use crate::error::{Error, ErrorKind};
use crate::handle::{BackendDetails, BackendTag, VmHandle};
use crate::image::{
    Digest, DigestAlgorithm, Hasher, ImageFormat, create_blank, create_overlay, inspect, no_progress,
};
use crate::lifecycle::VmState;
use crate::spec::{DataDisk, Mib, RootDisk, VmName, VmSpec};
use crate::store::{Home, VmRecord};

/// Changes the header of an export.
type HeaderLie = fn(&mut ExportHeader);

/// An export by its parts, each of which can be a lie.
struct Crafted {
    dir: tempfile::TempDir,
    state: VmState,
    spec: VmSpec,
    image: (Vec<u8>, ImageFormat),
    files: Vec<(String, Vec<u8>)>,
    /// Changes the header in the end.
    lie: HeaderLie,
}

fn name(text: &str) -> VmName {
    VmName::new(text).unwrap()
}

impl Crafted {
    /// Creates an export in which nothing is wrong: a root disk over a raw image, and a data disk.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.img");
        let mut image = vec![0; 1 << 20];
        image[..4].copy_from_slice(b"base");
        fs::write(&base, &image).unwrap();
        let spec = VmSpec::builder(name("web")).disk(RootDisk { image: base.clone(), size: None });
        let spec = spec.data_disks(vec![DataDisk::Fresh { size: Mib::new(1).unwrap() }]).build().unwrap();
        let mut crafted = Self {
            dir,
            state: VmState::Stopped,
            spec,
            image: (image, ImageFormat::Raw),
            files: Vec::new(),
            lie: |_| {},
        };
        let data = crafted.blank();
        crafted.files = vec![("root.qcow2".to_owned(), crafted.overlay()), ("data-0.qcow2".to_owned(), data)];
        crafted
    }

    fn overlay(&self) -> Vec<u8> {
        self.overlay_of(&self.dir.path().join("base.img"))
    }

    fn overlay_of(&self, base: &Path) -> Vec<u8> {
        let path = self.dir.path().join("overlay");
        let _ = fs::remove_file(&path);
        create_overlay(&inspect(base).unwrap(), &path, None).unwrap();
        fs::read(path).unwrap()
    }

    fn blank(&self) -> Vec<u8> {
        let path = self.dir.path().join("blank");
        let _ = fs::remove_file(&path);
        create_blank(&path, Mib::new(1).unwrap()).unwrap();
        fs::read(path).unwrap()
    }

    fn set(&mut self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.files.retain(|(known, _)| known != name);
        self.files.push((name.to_owned(), bytes.into()));
    }

    fn handle(&self) -> VmHandle {
        let id = Uuid::from_u128(7);
        let vm = VmHandle::preparing(id, BackendTag::Qemu, self.spec.clone().with_id(id));
        let data = serde_json::json!({"media": {"data_formats": [null]}});
        VmHandle { details: BackendDetails { version: 2, data }, ..vm }.in_state(self.state.clone())
    }

    fn archive(&self) -> PathBuf {
        let vm = self.handle();
        let record = VmRecord::settled(vm.clone()).encode().unwrap();
        let digest = Hasher::digest(DigestAlgorithm::Sha256, &self.image.0);
        let image = ExportedImage { digest, format: self.image.1 };
        let state = vm.state.name().to_owned();
        let mut header = ExportHeader::new(vm.name().clone(), vm.id, vm.backend, state);
        let mut files = vec![(RECORD.to_owned(), record)];
        for (name, bytes) in &self.files {
            let name = if name.starts_with("kept/") { name.clone() } else { format!("files/{name}") };
            files.push((name, bytes.clone()));
        }
        files.push((image_entry(&image), self.image.0.clone()));
        header.image = Some(image);
        header.files = files
            .iter()
            .map(|(name, bytes)| ListedFile {
                name: name.clone(),
                bytes: bytes.len() as u64,
                stored_bytes: bytes.len() as u64,
            })
            .collect();
        (self.lie)(&mut header);
        let mut writer = ArchiveWriter::begin(Vec::new(), Path::new("x"), 0, &header).unwrap();
        for (name, bytes) in &files {
            writer.bytes(name, bytes).unwrap();
        }
        let path = self.dir.path().join("web.vmkit");
        fs::write(&path, writer.finish().unwrap().0).unwrap();
        path
    }

    fn manager(&self) -> VmManager<QemuHypervisor> {
        let home = Home::at(self.dir.path().join("home")).unwrap();
        VmManager::new(QemuHypervisor::builder(home.vms(), home.run()).build(), home)
    }

    async fn import(&self, options: &VmImportOptions) -> Result<VmHandle, Error> {
        let (manager, archive) = (self.manager(), self.archive());
        manager.import(&archive, options, &no_progress()).await.map(|imported| imported.vm)
    }

    /// Imports it, which fails, and returns why; checks that nothing is left.
    async fn refusal(&self) -> String {
        let error = self.import(&VmImportOptions::default()).await.unwrap_err();
        let text = error.chain().to_string();
        self.assert_nothing_left(&text);
        let shown = self.dir.path().join("web.vmkit");
        assert!(text.contains(shown.to_str().unwrap()), "{text}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{text}");
        text
    }

    fn assert_nothing_left(&self, after: &str) {
        let home = self.dir.path().join("home");
        for part in ["vms", "images/downloads"] {
            let left: Vec<_> = fs::read_dir(home.join(part)).into_iter().flatten().flatten().collect();
            assert!(left.is_empty(), "{after}: {left:?}");
        }
        let images = fs::read_dir(home.join("images")).into_iter().flatten().flatten();
        let left: Vec<_> =
            images.filter(|it| it.file_name().to_string_lossy().starts_with("sha256")).collect();
        assert!(left.is_empty(), "{after}: {left:?}");
    }
}

#[tokio::test]
async fn an_export_becomes_a_vm_over_an_image_of_its_home() {
    let crafted = Crafted::new();
    let vm = crafted.import(&VmImportOptions::default().with_name(name("other"))).await.unwrap();
    assert_eq!((vm.name().as_str(), vm.id, &vm.state), ("other", Uuid::from_u128(7), &VmState::Stopped));
    let manager = crafted.manager();
    assert_eq!(manager.info(vm.name()).await.unwrap().state, VmState::Stopped);
    let disk = manager.home().vm(vm.name()).join("root.qcow2");
    assert_eq!(fs::metadata(&disk).unwrap().permissions().mode() & 0o777, 0o600);
    let below = crate::image::backing_name(&disk).unwrap().unwrap();
    assert!(below.starts_with("../../images"), "{}", below.display());
    assert_eq!(fs::read(disk.parent().unwrap().join(below)).unwrap(), crafted.image.0);
    let same = crafted.import(&VmImportOptions::default()).await.unwrap_err();
    assert_eq!(same.kind(), ErrorKind::AlreadyExists, "{same}");
    manager.remove(vm.name(), false).await.unwrap();
    // The image is there already.
    crafted.import(&VmImportOptions::default()).await.unwrap();
}

#[tokio::test]
async fn a_disk_leads_to_no_file_outside_the_export() {
    let secret = b"secret".repeat(512);
    // The name of the base image is written again, whatever it was.
    let mut crafted = Crafted::new();
    let other = crafted.dir.path().join("secret.img");
    fs::write(&other, &secret).unwrap();
    crafted.set("root.qcow2", crafted.overlay_of(&other));
    let vm = crafted.import(&VmImportOptions::default()).await.unwrap();
    let disk = crafted.manager().home().vm(vm.name()).join("root.qcow2");
    let below = crate::image::backing_name(&disk).unwrap().unwrap();
    assert_eq!(fs::read(disk.parent().unwrap().join(below)).unwrap(), crafted.image.0);

    let mut crafted = Crafted::new();
    fs::write(crafted.dir.path().join("secret.img"), &secret).unwrap();
    crafted.set("data-0.qcow2", crafted.overlay_of(&crafted.dir.path().join("secret.img")));
    assert!(crafted.refusal().await.contains("data-0.qcow2: it is over"));

    // A raw image with the header of a qcow2, and a disk that says so.
    let mut crafted = Crafted::new();
    let as_qcow2 = crafted.dir.path().join("as.qcow2");
    fs::write(&as_qcow2, crafted.blank()).unwrap();
    crafted.set("root.qcow2", crafted.overlay_of(&as_qcow2));
    assert!(crafted.refusal().await.contains("it names the format \"qcow2\""));

    // A base image that is itself over a file.
    let mut crafted = Crafted::new();
    crafted.image = (crafted.overlay(), ImageFormat::Qcow2);
    assert!(crafted.refusal().await.contains("backing file"));

    let mut crafted = Crafted::new();
    crafted.image.1 = ImageFormat::Qcow2;
    assert!(crafted.refusal().await.contains("its base image is raw, and qcow2 is announced"));
}

#[tokio::test]
async fn a_disk_with_its_data_elsewhere_or_damaged_is_refused() {
    // Source: QEMU, docs/interop/qcow2.txt: incompatible_features at 72, crypt_method at 32.
    for (at, byte, why) in [(79, 4, "in another file"), (79, 2, "marked as damaged"), (35, 1, "encrypted")] {
        let mut crafted = Crafted::new();
        let mut disk = crafted.blank();
        disk[at] = byte;
        crafted.set("data-0.qcow2", disk);
        let text = crafted.refusal().await;
        assert!(text.contains("data-0.qcow2") && text.contains(why), "{text}");
    }
    let mut crafted = Crafted::new();
    crafted.set("data-0.qcow2", "no disk");
    assert!(crafted.refusal().await.contains("data-0.qcow2: this disk is damaged"));
    let mut crafted = Crafted::new();
    let layer = crafted.dir.path().join("root-0123456789ab.qcow2");
    fs::write(&layer, crafted.blank()).unwrap();
    let overlay = crafted.dir.path().join("over");
    crate::image::create_overlay_of_layer(&layer, "root-0123456789ab.qcow2", &overlay).unwrap();
    crafted.set("root.qcow2", fs::read(overlay).unwrap());
    assert!(crafted.refusal().await.contains("the layer below this disk is missing"));
}

#[tokio::test]
async fn files_that_are_not_the_vms_or_missing_are_refused() {
    for (file, why) in [
        ("data-7.qcow2", "the VM has no such file"),
        ("alive", "the VM has no such file"),
        ("owner", "the VM has no such file"),
        ("run.json", "the VM has no such file"),
        ("efivars.fd", "the VM has no such file"),
        ("memory", "saved.json: it is missing"),
        ("snapshots/a.memory", "snapshots/a.json: it is missing"),
        ("snapshots/a.json", "the record of a snapshot can't be read"),
        ("kept/snapshot-a.json", "record of the snapshot `a`"),
    ] {
        let mut crafted = Crafted::new();
        crafted.set(file, "{}");
        let text = crafted.refusal().await;
        assert!(text.contains(why), "{file}: {text}");
    }
    let mut crafted = Crafted::new();
    crafted.files.remove(0);
    assert!(crafted.refusal().await.contains("root.qcow2: it is missing"));
    let mut crafted = Crafted::new();
    crafted.state = VmState::Saved;
    assert!(crafted.refusal().await.contains("announced as saved"));
    let mut crafted = Crafted::new();
    crafted.state = VmState::Running;
    assert!(crafted.refusal().await.contains("in a state in which none is exported"));
}

#[tokio::test]
async fn files_of_the_host_are_read_only_if_that_is_accepted() {
    let mut crafted = Crafted::new();
    let disk = DataDisk::Existing { path: "/etc/shadow".into(), readonly: true };
    let base = crafted.dir.path().join("base.img");
    let spec = VmSpec::builder(name("web")).disk(RootDisk { image: base, size: None });
    let spec = spec.data_disks(vec![DataDisk::Fresh { size: Mib::new(1).unwrap() }, disk]);
    crafted.spec = spec.cdrom("/no/disc.iso".into()).build().unwrap();
    let text = crafted.refusal().await;
    assert!(text.contains("/etc/shadow, /no/disc.iso"), "{text}");
    let options = VmImportOptions::default().with_host_files(HostFilePolicy::Accept);
    let imported = crafted.manager().import(&crafted.archive(), &options, &no_progress()).await.unwrap();
    let problems: Vec<String> = imported.problems.iter().map(ToString::to_string).collect();
    assert!(problems.iter().any(|problem| problem.contains("/no/disc.iso")), "{problems:?}");
}

#[tokio::test]
async fn an_export_that_is_truncated_or_lies_about_itself_leaves_nothing() {
    let crafted = Crafted::new();
    let archive = crafted.archive();
    let whole = fs::read(&archive).unwrap();
    let manager = crafted.manager();
    for length in (0..whole.len()).step_by(40_961).chain([whole.len() - 1, whole.len() - 1024]) {
        fs::write(&archive, &whole[..length]).unwrap();
        let error = manager.import(&archive, &VmImportOptions::default(), &no_progress()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{length}: {error}");
        crafted.assert_nothing_left(&error.to_string());
    }
    let mut damaged = whole.clone();
    let at = whole.windows(4).rposition(|four| four == b"base").unwrap();
    damaged[at + 100] ^= 1;
    fs::write(&archive, &damaged).unwrap();
    let error = manager.import(&archive, &VmImportOptions::default(), &no_progress()).await.unwrap_err();
    assert!(error.to_string().contains("another checksum"), "{error}");
    crafted.assert_nothing_left(&error.to_string());

    let lies: [(HeaderLie, &str); 4] = [
        (|header| header.id = Uuid::from_u128(8), "not that of the VM that it announces"),
        (|header| header.name = name("db"), "not that of the VM that it announces"),
        (
            |header| {
                let digest = Digest::of_hex(&"0".repeat(64)).unwrap();
                header.image.as_mut().unwrap().digest = digest;
            },
            "base image has another checksum",
        ),
        (|header| header.files[1].bytes += 1, "are announced"),
    ];
    for (lie, why) in lies {
        let crafted = Crafted { lie, ..Crafted::new() };
        let text = crafted.refusal().await;
        assert!(text.contains(why), "{text}");
    }
    let huge = Crafted {
        lie: |header| {
            let file = &mut header.files[1];
            (file.bytes, file.stored_bytes) = (1 << 60, 1 << 60);
        },
        ..Crafted::new()
    };
    let error = huge.import(&VmImportOptions::default()).await.unwrap_err();
    assert!(error.kind() == ErrorKind::Host && error.to_string().contains("MiB are free"), "{error}");
    huge.assert_nothing_left("no room");
}

#[tokio::test]
async fn what_a_killed_import_left_is_removed_by_the_next() {
    let crafted = Crafted::new();
    let archive = crafted.archive();
    let manager = crafted.manager();
    // As a kill leaves it: the task is dropped while it waits for a pipe.
    let pipe = crafted.dir.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let most = fs::read(&archive).unwrap();
    let most = most[..most.len() / 2].to_vec();
    let (holds, held) = std::sync::mpsc::channel::<()>();
    let to = pipe.clone();
    let writer = std::thread::spawn(move || {
        let mut to = fs::File::options().write(true).open(to).unwrap();
        // The reader may be gone before it has everything.
        let _ = io::Write::write_all(&mut to, &most);
        assert!(held.recv().is_err());
    });
    let options = VmImportOptions::default();
    let progress = no_progress();
    let mut seen = progress.subscribe();
    {
        let import = manager.import(&pipe, &options, &progress);
        tokio::pin!(import);
        tokio::select! {
            ended = &mut import => panic!("{ended:?}"),
            changed = seen.wait_for(|now| now.done_bytes > 0) => drop(changed.unwrap()),
        }
    }
    drop(holds);
    writer.join().unwrap();
    let listed = manager.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    manager.import(&archive, &options, &no_progress()).await.unwrap();
    assert_eq!(manager.info(&name("web")).await.unwrap().state, VmState::Stopped);
}
