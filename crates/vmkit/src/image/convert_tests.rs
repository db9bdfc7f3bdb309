//! Conversions to raw, held against `qemu-img`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::disk::GuestDisk;
use super::tests::qemu_img;
use super::*;
use crate::error::ErrorKind;

/// Returns 3 MiB and a sector of disk: noise, text, zeros, and zeros that are written.
fn content() -> Vec<u8> {
    let mut disk = vec![0; (3 << 20) + 512];
    let mut state = 1_u32;
    for (index, byte) in disk.iter_mut().enumerate() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = match index >> 16 {
            0..8 | 40.. => (state >> 24) as u8,
            8..16 => b'a' + (index % 7) as u8,
            // A part of a cluster only.
            30 if index % 65536 < 3000 => 1,
            _ => 0,
        };
    }
    disk
}

/// A directory with a raw disk `raw` in it.
struct ConvertScene(tempfile::TempDir);

impl ConvertScene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("raw"), content()).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    async fn convert(&self, from: &str, to: &str, existing: OverwritePolicy) -> crate::Result<u64> {
        convert(&inspect(&self.path(from))?, &self.path(to), existing, &no_progress()).await
    }

    fn entries(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

#[tokio::test]
async fn every_form_of_qcow2_converts_to_the_original_disk() {
    let scene = ConvertScene::new();
    for (number, options) in [
        "",
        "-c",
        "-o compat=0.10",
        "-c -o compat=0.10",
        "-c -o compression_type=zstd",
        "-c -o compression_type=zstd,cluster_size=2M",
        "-o cluster_size=512",
        "-c -o cluster_size=4096",
        "-o extended_l2=on",
        "-c -o extended_l2=on,compression_type=zstd",
        "-o preallocation=metadata",
        "-o lazy_refcounts=on",
    ]
    .into_iter()
    .enumerate()
    {
        let image = scene.name(&format!("{number}.qcow2"));
        let raw = scene.name("raw");
        let mut arguments = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
        arguments.extend(options.split_whitespace().chain([raw.as_str(), image.as_str()]));
        if !qemu_img(&arguments) {
            return;
        }
        let bytes =
            scene.convert(&format!("{number}.qcow2"), "new", OverwritePolicy::Replaced).await.unwrap();
        assert_eq!(bytes, content().len() as u64, "{options}");
        assert!(fs::read(scene.path("new")).unwrap() == content(), "{options}");
        assert!(
            fs::metadata(scene.path("new")).unwrap().blocks() * 512 < 2 << 20,
            "{options}: its zeros are holes"
        );
        // Any place by itself, and across every border.
        let mut disk = GuestDisk::open(&inspect(Path::new(&image)).unwrap()).unwrap();
        for (offset, length) in [(0, 1), (65_535, 2), (524_287, 70_000), (1_966_080, 4096), (3_145_000, 5000)]
        {
            let end = content().len().min(offset + length);
            let read = disk.read(offset as u64, length as u64).unwrap();
            assert!(read == content()[offset..end], "{options} {offset}");
        }
    }
}

#[tokio::test]
async fn clusters_over_an_image_or_discarded_ones_read_as_qemu_reads_them() {
    let scene = ConvertScene::new();
    let image = scene.name("image");
    for options in ["extended_l2=on", "extended_l2=off", "compat=0.10"] {
        if !qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, &image, "3M"]) {
            return;
        }
        let io = std::process::Command::new("qemu-io")
            .args([
                "-f",
                "qcow2",
                "-c",
                "write -P 7 1000K 200K",
                "-c",
                "write -P 9 100K 5K",
                "-c",
                "write -z 1040K 30K",
            ])
            .args(["-c", "discard 1M 64K", "-c", "write -c -P 5 2M 64K", &image])
            .output();
        match io {
            Ok(output) => assert!(output.status.success(), "{output:?}"),
            Err(error) => {
                println!("SKIP: qemu-io can't be run: {error}");
                return;
            }
        }
        let expected = scene.name("expected");
        assert!(qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &image, &expected]));
        scene.convert("image", "new", OverwritePolicy::Replaced).await.unwrap();
        assert!(fs::read(scene.path("new")).unwrap() == fs::read(&expected).unwrap(), "{options}");
    }
}

#[tokio::test]
async fn a_raw_file_is_copied_with_its_holes_to_whole_sectors() {
    let scene = ConvertScene::new();
    let file = fs::File::create(scene.path("odd")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[3; 100], 5 << 20).unwrap();
    file.set_len((30 << 20) + 77).unwrap();
    assert_eq!(scene.convert("odd", "new", OverwritePolicy::Stays).await.unwrap(), (30 << 20) + 512);
    let mut expected = fs::read(scene.path("odd")).unwrap();
    expected.resize((30 << 20) + 512, 0);
    assert!(fs::read(scene.path("new")).unwrap() == expected);
    assert!(fs::metadata(scene.path("new")).unwrap().blocks() * 512 < 1 << 20);
    assert_eq!(scene.entries(), ["new", "odd", "raw"]);
}

#[tokio::test]
async fn a_file_that_is_there_stays_unless_it_may_be_replaced() {
    let scene = ConvertScene::new();
    fs::write(scene.path("old"), "mine").unwrap();
    let error = scene.convert("raw", "old", OverwritePolicy::Stays).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::read(scene.path("old")).unwrap(), b"mine");
    // A link to it is led to the file, which is replaced; the link stays one.
    std::os::unix::fs::symlink("old", scene.path("link")).unwrap();
    scene.convert("raw", "link", OverwritePolicy::Replaced).await.unwrap();
    assert!(fs::read(scene.path("old")).unwrap() == content());
    assert!(fs::symlink_metadata(scene.path("link")).unwrap().is_symlink());
    assert_eq!(scene.entries(), ["link", "old", "raw"]);
}

#[tokio::test]
async fn what_is_no_place_for_a_file_is_refused_by_its_path() {
    let scene = ConvertScene::new();
    fs::create_dir(scene.path("dir")).unwrap();
    for (to, why) in [
        ("dir", "this is a directory"),
        ("raw", "this is the image itself"),
        ("none/new", "there is no such directory"),
        ("/dev/null", "a character device"),
        ("..", "not a file name"),
    ] {
        let error = scene.convert("raw", to, OverwritePolicy::Replaced).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{to}: {error}");
        assert!(error.to_string().starts_with("file: ") && error.to_string().contains(why), "{to}: {error}");
    }
    assert_eq!(scene.entries(), ["dir", "raw"]);
}

#[tokio::test]
async fn what_a_killed_writer_left_is_taken_over_and_what_another_writes_is_not() {
    let scene = ConvertScene::new();
    fs::write(scene.path("new.unfinished"), vec![9; 5 << 20]).unwrap();
    let held = fs::File::open(scene.path("new.unfinished")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(
        scene.convert("raw", "new", OverwritePolicy::Stays).await.unwrap_err().kind(),
        ErrorKind::Busy
    );
    // Closing is not enough: a child that another test is just spawning has the file, too.
    rustix::fs::flock(&held, rustix::fs::FlockOperation::Unlock).unwrap();
    scene.convert("raw", "new", OverwritePolicy::Stays).await.unwrap();
    assert!(fs::read(scene.path("new")).unwrap() == content());
    assert_eq!(scene.entries(), ["new", "raw"]);
}

#[tokio::test]
async fn what_stands_in_the_way_of_the_unfinished_file_is_not_followed_or_waited_for() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};

    let scene = ConvertScene::new();
    fs::write(scene.path("precious"), "mine").unwrap();
    std::os::unix::fs::symlink("precious", scene.path("one.unfinished")).unwrap();
    mknodat(CWD, scene.path("two.unfinished"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    for name in ["one", "two"] {
        scene.convert("raw", name, OverwritePolicy::Stays).await.unwrap_err();
    }
    assert_eq!(fs::read(scene.path("precious")).unwrap(), b"mine");
    assert_eq!(scene.entries(), ["one.unfinished", "precious", "raw", "two.unfinished"]);
}

#[tokio::test]
async fn a_damaged_cluster_is_reported_and_leaves_nothing() {
    let scene = ConvertScene::new();
    let (raw, image) = (scene.name("raw"), scene.name("image"));
    // Letters only, so that every cluster is compressed.
    let letters: Vec<u8> = content().iter().map(|byte| b'a' + byte % 16).collect();
    fs::write(&raw, letters).unwrap();
    if !qemu_img(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", &raw, &image]) {
        return;
    }
    let mut bytes = fs::read(&image).unwrap();
    // Compressed data are what lies behind the tables.
    let middle = bytes.len() / 2;
    bytes[middle..middle + 100_000].fill(0xff);
    fs::write(&image, &bytes).unwrap();
    let converted = scene.convert("image", "new", OverwritePolicy::Stays).await;
    let error = converted.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("damaged"), "{error}: {cause}");
    assert_eq!(scene.entries(), ["image", "raw"]);
}

#[tokio::test]
async fn a_failure_at_any_step_leaves_no_file_under_its_name() {
    use std::cell::Cell;
    use std::rc::Rc;

    let scene = ConvertScene::new();
    for failing in 1.. {
        let taken = Rc::new(Cell::new(0));
        let counter = Rc::clone(&taken);
        crate::set_step_hook(Some(Box::new(move |_| {
            counter.set(counter.get() + 1);
            if counter.get() == failing { Err(std::io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        })));
        let converted = scene.convert("raw", "new", OverwritePolicy::Stays).await;
        crate::set_step_hook(None);
        if taken.get() < failing {
            converted.unwrap();
            break;
        }
        assert_eq!(converted.unwrap_err().kind(), ErrorKind::Host);
        assert_eq!(scene.entries(), ["raw"], "step {failing}");
    }
    assert!(fs::read(scene.path("new")).unwrap() == content());
}

#[tokio::test]
async fn a_conversion_that_is_given_up_leaves_nothing() {
    let scene = ConvertScene::new();
    let file = fs::File::create(scene.path("large")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &vec![3; 64 << 20], 0).unwrap();
    let progress = no_progress();
    let mut seen = progress.subscribe();
    let (image, to) = (inspect(&scene.path("large")).unwrap(), scene.path("new"));
    tokio::select! {
        _ = convert(&image, &to, OverwritePolicy::Stays, &progress) => panic!("it was given up before"),
        _ = seen.wait_for(|progress| progress.done_bytes > 0) => {}
    }
    // The one who writes hears of it at the next piece.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while scene.entries() != ["large", "raw"] {
        assert!(std::time::Instant::now() < deadline, "{:?}", scene.entries());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    #[test]
    fn any_damage_of_the_tables_is_an_error_or_some_disk(
        damage in proptest::collection::vec((0_usize..6 * 4096, proptest::prelude::any::<u8>()), 1..40),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        let name = image.to_str().unwrap();
        fs::write(dir.path().join("raw"), vec![7; 100_000]).unwrap();
        let raw = dir.path().join("raw");
        if !qemu_img(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", raw.to_str().unwrap(), name]) {
            return Ok(());
        }
        let mut bytes = fs::read(&image).unwrap();
        for (at, byte) in damage {
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        fs::write(&image, bytes).unwrap();
        if let Ok(facts) = inspect(&image) && facts.virtual_size_bytes < 1 << 30 && let Ok(mut disk) = GuestDisk::open(&facts) {
            let _ = disk.read(0, 1 << 20);
        }
    }
}
