//! What is said of a file or a download that is no image, and what heals a kept one that was
//! damaged.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::pull_tests::{ARCH, PullScene, disk, packed, sha256};
use super::test_server::ServedFile;
use super::*;
use crate::error::ErrorKind;

async fn import(scene: &PullScene, file: &Path) -> crate::Result<LocalImage> {
    let import =
        ImportOptions { name: ImageName::new("mine").unwrap(), arch: ARCH, user: None, firmware: None };
    scene.store.import(file, import, &no_progress()).await
}

/// Returns a qcow2 of a disk of zeros, spoilt by `spoil`.
fn qcow2(dir: &Path, spoil: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let path = dir.join("made");
    create_blank(&path, crate::spec::Mib::new(1).unwrap()).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    spoil(&mut bytes);
    bytes
}

/// Returns the files that are refused, each with what is said of it.
fn refused(dir: &Path) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let marked = |mark: &[u8]| [mark, &[0; 5000]].concat();
    let (base, overlay) = (dir.join("base.raw"), dir.join("overlay"));
    fs::write(&base, vec![1; 1 << 20]).unwrap();
    create_overlay(&inspect(&base).unwrap(), &overlay, None).unwrap();
    // Its name is written as one beside the image, as `qemu-img` writes it that was given such a
    // one.
    let mut backed = fs::read(&overlay).unwrap();
    let at = usize::try_from(u64::from_be_bytes(backed[8..16].try_into().unwrap())).unwrap();
    backed[at..at + 8].copy_from_slice(b"base.raw");
    backed[16..20].copy_from_slice(&8_u32.to_be_bytes());
    vec![
        ("backed.qcow2", backed.clone(), "only the difference to \"base.raw\" (raw)"),
        ("backed.qcow2.gz", packed("gz", &backed), "only the difference to \"base.raw\" (raw)"),
        ("encrypted.qcow2", qcow2(dir, |bytes| bytes[35] = 2), "an encrypted qcow2"),
        ("corrupt.qcow2", qcow2(dir, |bytes| bytes[79] = 2), "marked corrupt"),
        ("data.qcow2", qcow2(dir, |bytes| bytes[79] = 4), "data is in another file"),
        ("short.qcow2", qcow2(dir, |bytes| bytes.truncate(5000)), "can't be used"),
        ("a.vmdk", marked(b"KDMV"), "VMDK"),
        ("a.vhdx", marked(b"vhdxfile"), "VHDX"),
        ("a.vdi", [&[0; 64][..], b"\x7f\x10\xda\xbe", &[0; 5000]].concat(), "VDI"),
        ("a.zip", marked(b"PK\x03\x04"), "unzip"),
        ("a.7z", marked(b"7z\xbc\xaf\x27\x1c"), "7z x"),
        ("a.tar", [&[0; 257][..], b"ustar", &[0; 5000]].concat(), "tar -x"),
        ("a.lzma", [&b"\x5d\0\0\x80\0"[..], &[255; 8], &[7; 5000]].concat(), "unlzma"),
        ("vmlinux", marked(b"\x7fELF"), "an ELF file"),
        ("empty.img", Vec::new(), "the file is empty"),
        ("cut.gz", packed("gz", &self::disk(300_000))[..100_000].to_vec(), "can't be decompressed as gzip"),
        ("cut.xz", packed("xz", &self::disk(300_000))[..100_000].to_vec(), "can't be decompressed as xz"),
        ("page.img", b"<!DOCTYPE html><p>no</p>".repeat(50), "a web page"),
        ("comment.img", b"<!-- so -->\n<html>no</html>".to_vec(), "a web page"),
        ("page.img.gz", packed("gz", &b"<!DOCTYPE html><p>no</p>".repeat(50)), "a web page"),
        ("error.json", br#"{"errors": [{"code": "DENIED"}]}"#.to_vec(), "JSON, not an image"),
    ]
}

#[tokio::test]
async fn a_refused_import_or_download_is_named_as_the_user_knows_it() {
    let scene = PullScene::new().await;
    let dir = scene.dir.path().join("here");
    fs::create_dir(&dir).unwrap();
    for (name, content, why) in refused(&dir) {
        let file = dir.join(name);
        fs::write(&file, &content).unwrap();
        let error = import(&scene, &file).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        let expected = format!("image: {:?}: ", file.to_str().unwrap());
        let text = error.to_string();
        assert!(text.starts_with(&expected) && text.contains(why), "{name}: {text}");
        assert!(!text.contains("which is missing"), "{name}: {text}");

        let path = format!("/{name}");
        scene.server.put(&path, ServedFile::new(content));
        let url = scene.server.url(&path);
        let text = scene.pull(&format!("{url}?sig=secret")).await.unwrap_err().to_string();
        let expected = format!("image: {:?}: ", format!("{url}?…"));
        assert!(text.starts_with(&expected) && text.contains(why), "{name}: {text}");
        assert!(!text.contains("which is missing"), "{name}: {text}");
        scene.assert_nothing_kept();
    }
    fs::remove_file(dir.join("base.raw")).unwrap();
    let text = import(&scene, &dir.join("backed.qcow2")).await.unwrap_err().to_string();
    assert!(text.contains("to \"base.raw\" (raw), which is missing"), "{text}");
}

#[tokio::test]
async fn zeros_behind_the_end_of_gzip_are_padding_and_other_bytes_are_not() {
    let scene = PullScene::new().await;
    let (disk, file) = (disk(300_000), scene.dir.path().join("disk.gz"));
    let (first, second) = disk.split_at(123_456);
    let members = [packed("gz", first), packed("gz", second)].concat();
    for zeros in [0, 1, 512, 1 << 20] {
        fs::write(&file, [&members[..], &vec![0; zeros]].concat()).unwrap();
        assert_eq!(import(&scene, &file).await.unwrap().id.hex(), sha256(&disk), "{zeros}");
    }
    for behind in [&b"\0\0x"[..], b"x", &packed("gz", b"y")[..9]] {
        fs::write(&file, [&members[..], behind].concat()).unwrap();
        let error = import(&scene, &file).await.unwrap_err().to_string();
        assert!(error.contains("can't be decompressed as gzip"), "{error}");
    }
}

/// Changes a local image on the disk, with its length or without.
fn damage(image: &LocalImage, content: &[u8]) {
    fs::set_permissions(&image.facts.path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(&image.facts.path, content).unwrap();
}

#[tokio::test]
async fn a_damaged_image_is_healed_by_a_pull() {
    let mut scene = PullScene::new().await;
    let disk = disk(100_000);
    scene.server.put("/test.img", ServedFile::new(disk.clone()));
    scene.server.put("/SUMS", ServedFile::new(format!("{}  test.img\n", sha256(&disk))));
    scene.publish("checksums = \"SUMS\"");
    let kept = scene.pull("test:1").await.unwrap();
    let whole = || fs::read(&kept.facts.path).unwrap() == disk;
    let marker = kept.facts.path.with_file_name("damaged");
    for (content, is_verified) in [(vec![9; 100_000], true), (vec![9; 99_000], false), (vec![], false)] {
        damage(&kept, &content);
        let open = fs::File::open(&kept.facts.path).unwrap();
        if is_verified {
            assert_ne!(scene.store.rehash(&kept.id, &no_progress()).await.unwrap(), kept.id);
            assert!(marker.exists());
        }
        let again = scene.pull("test:1").await.unwrap();
        assert!(whole() && !marker.exists());
        assert_eq!((&again.id, again.kept_at), (&kept.id, kept.kept_at));
        assert_eq!(fs::metadata(&kept.facts.path).unwrap().permissions().mode() & 0o777, 0o444);
        // Who had the damaged one open has that still.
        assert_eq!(open.metadata().unwrap().len(), content.len() as u64);
        assert_eq!(scene.store.rehash(&kept.id, &no_progress()).await.unwrap(), kept.id);
    }
    assert_eq!(scene.server.asked("/test.img").len(), 4);
    scene.pull("test:1").await.unwrap();
    assert_eq!(scene.server.asked("/test.img").len(), 4, "a whole one is not fetched again");
    // A disk that is gone is as good as damaged.
    fs::remove_file(&kept.facts.path).unwrap();
    scene.pull("test:1").await.unwrap();
    assert!(whole());
}

#[tokio::test]
async fn what_has_just_come_under_the_same_digest_takes_a_damaged_ones_place() {
    let scene = PullScene::new().await;
    let disk = disk(100_000);
    let file = scene.dir.path().join("disk.raw");
    fs::write(&file, &disk).unwrap();
    let kept = import(&scene, &file).await.unwrap();
    // Of the same length, and not found out yet.
    damage(&kept, &vec![9; 100_000]);
    import(&scene, &file).await.unwrap();
    assert!(fs::read(&kept.facts.path).unwrap() == disk);
    // What was marked is whole again, and says so.
    fs::write(kept.facts.path.with_file_name("damaged"), "").unwrap();
    assert_eq!(scene.store.rehash(&kept.id, &no_progress()).await.unwrap(), kept.id);
    assert!(!kept.facts.path.with_file_name("damaged").exists());
    scene.store.remove("mine", None).await.unwrap();
    assert!(!kept.facts.path.parent().unwrap().exists());
}
