//! Pulls from a server that does all that servers do.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::digest::{DigestAlgorithm, Hasher};
use super::remote::RemoteTimeouts;
use super::test_server::{ServedFile, TestServer};
use super::*;
use crate::error::{Error, ErrorKind};
use crate::spec::Arch;
use crate::store::Home;

pub(super) const ARCH: Arch = Arch::X86_64;

/// A server, and a store that is patient for a moment only.
pub(super) struct PullScene {
    pub(super) dir: tempfile::TempDir,
    pub(super) server: TestServer,
    pub(super) store: ImageStore,
}

impl PullScene {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let server = TestServer::new().await;
        let mut store = ImageStore::new(&Home::at(dir.path()).unwrap(), Catalogue::built_in());
        store.fetcher.remote.patience = RemoteTimeouts {
            connect: Duration::from_secs(20),
            idle: Duration::from_secs(20),
            tries: 2,
            pause: Duration::from_millis(1),
        };
        Self { dir, server, store }
    }

    /// Adds an image `test:1` to the catalogue, which lies on the server.
    pub(super) fn publish(&mut self, release: &str) {
        let text = format!(
            "version = 1\n[image.test.release.1]\n{release}\nx86_64 = {{ url = \"{}\" }}\n",
            self.server.url("/test.img")
        );
        self.store.catalogue = self.store.catalogue.clone().extended(&text, Path::new("test.toml")).unwrap();
    }

    pub(super) async fn pull(&self, image: &str) -> crate::Result<LocalImage> {
        self.store.pull(&image.parse().unwrap(), ARCH, &no_progress()).await
    }

    pub(super) async fn pull_url(&self, path: &str) -> crate::Result<LocalImage> {
        self.pull(&self.server.url(path)).await
    }

    pub(super) fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    /// Asserts that no image has come to be, and that nothing of a download is left.
    pub(super) fn assert_nothing_kept(&self) {
        let (images, unreadable) = self.store.list().unwrap();
        assert!(images.is_empty() && unreadable.is_empty(), "{images:?} {unreadable:?}");
        let left = files::entries(&self.images().join("downloads")).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// Returns a disk with something in it, holes among it.
pub(super) fn disk(bytes: usize) -> Vec<u8> {
    let mut disk = vec![0; bytes];
    let mut state = 1_u32;
    for (index, byte) in disk.iter_mut().enumerate() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Every other 128 KiB is a hole.
        if index >> 17 & 1 == 0 {
            *byte = (state >> 24) as u8;
        }
    }
    disk
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    Hasher::digest(DigestAlgorithm::Sha256, bytes).hex().to_owned()
}

pub(super) fn packed(kind: &str, disk: &[u8]) -> Vec<u8> {
    use std::io::{Read, Write};
    let mut packed = Vec::new();
    match kind {
        "gz" => {
            let mut encoder = flate2::write::GzEncoder::new(&mut packed, flate2::Compression::fast());
            encoder.write_all(disk).unwrap();
            encoder.finish().unwrap();
        }
        "xz" => drop(liblzma::read::XzEncoder::new(disk, 1).read_to_end(&mut packed).unwrap()),
        "bz2" => {
            let mut encoder = bzip2::read::BzEncoder::new(disk, bzip2::Compression::fast());
            encoder.read_to_end(&mut packed).unwrap();
        }
        _ => packed = zstd::stream::encode_all(disk, 1).unwrap(),
    }
    packed
}

#[tokio::test]
async fn a_pulled_image_is_the_disk_whatever_it_was_packed_with() {
    let scene = PullScene::new().await;
    let disk = disk(900_001);
    for kind in ["gz", "xz", "bz2", "zst", ""] {
        let path = format!("/disk.{kind}");
        let body = if kind.is_empty() { disk.clone() } else { packed(kind, &disk) };
        scene.server.put(&path, ServedFile::new(body));
        let kept = scene.pull_url(&path).await.unwrap();
        assert_eq!(fs::read(&kept.facts.path).unwrap(), disk, "{kind}");
        assert_eq!(kept.id.hex(), sha256(&disk));
        assert_eq!(kept.facts.format, ImageFormat::Raw);
    }
    let (images, _) = scene.store.list().unwrap();
    assert_eq!((images.len(), images[0].names.len()), (1, 5), "one disk with five names is kept once");
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let metadata = fs::metadata(&images[0].facts.path).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o444);
    assert!(metadata.blocks() * 512 < 600_000, "the holes are holes: {} blocks", metadata.blocks());
}

#[tokio::test]
async fn a_download_that_is_cut_off_at_any_place_goes_on_from_there() {
    let mut scene = PullScene::new().await;
    for kind in ["", "zst"] {
        let disk = disk(700_000);
        let body = if kind.is_empty() { disk.clone() } else { packed(kind, &disk) };
        let cuts: Vec<usize> = vec![0, 1, 5, 511, 512, 4096, 65_535, 65_536, 100_000, 0, 1];
        let page = ServedFile { cuts: cuts.clone(), ..ServedFile::new(body.clone()) };
        scene.server.put("/test.img", page);
        scene.server.put("/SUMS", ServedFile::new(format!("{}  test.img\n", sha256(&body))));
        scene.publish("checksums = \"SUMS\"");
        let kept = scene.pull("test:1").await.unwrap();
        assert_eq!(fs::read(&kept.facts.path).unwrap(), disk);
        let asked = scene.server.asked("/test.img");
        let ranges: Vec<&str> =
            asked.iter().filter_map(|asked| asked.headers.get("range").map(String::as_str)).collect();
        assert!(ranges.contains(&"bytes=1-") && ranges.contains(&"bytes=6-"), "{ranges:?}");
        assert!(asked.last().unwrap().headers.contains_key("if-range"));
        scene.store.remove("test:1", None).await.unwrap();
    }
}

#[tokio::test]
async fn a_pull_that_was_given_up_goes_on_in_another_one() {
    let scene = PullScene::new().await;
    let disk = disk(2_000_000);
    let body = packed("zst", &disk);
    scene.server.put("/d.zst", ServedFile { cuts: vec![300_000], stalls: true, ..ServedFile::new(body) });
    let progress = no_progress();
    let mut seen = progress.subscribe();
    let image = scene.server.url("/d.zst").parse().unwrap();
    tokio::select! {
        _ = scene.store.pull(&image, ARCH, &progress) => panic!("the server has fallen silent"),
        _ = seen.wait_for(|progress| progress.done_bytes == 300_000) => {}
    }
    let kept = scene.pull_url("/d.zst").await.unwrap();
    assert!(fs::read(&kept.facts.path).unwrap() == disk, "what is kept is another disk");
    let asked = scene.server.asked("/d.zst");
    let from: usize =
        asked[1].headers["range"].strip_prefix("bytes=").unwrap().trim_end_matches('-').parse().unwrap();
    assert!(from > 0 && from <= 300_000, "it went on from {from}");
}

#[tokio::test]
async fn a_server_without_ranges_or_with_another_file_by_now_is_asked_for_the_whole() {
    let scene = PullScene::new().await;
    let disk = disk(300_000);
    scene.server.put("/a", ServedFile { etag: None, cuts: vec![100_000], ..ServedFile::new(disk.clone()) });
    let kept = scene.pull_url("/a").await.unwrap();
    assert_eq!(kept.id.hex(), sha256(&disk));

    // Half of one file is here when the other takes its place.
    let first = ServedFile { cuts: vec![100_000, 0, 0, 0], ..ServedFile::new(vec![7; 300_000]) };
    scene.server.put("/b", first);
    scene.pull_url("/b").await.unwrap_err();
    scene.server.put("/b", ServedFile { etag: Some("\"two\"".into()), ..ServedFile::new(disk.clone()) });
    assert_eq!(scene.pull_url("/b").await.unwrap().id.hex(), sha256(&disk));
}

#[tokio::test]
async fn a_body_of_unknown_length_is_taken_to_its_end() {
    let scene = PullScene::new().await;
    let disk = disk(200_000);
    scene.server.put("/d", ServedFile { tells_length: false, ..ServedFile::new(disk.clone()) });
    assert_eq!(scene.pull_url("/d").await.unwrap().id.hex(), sha256(&disk));
}

#[tokio::test]
async fn a_wrong_checksum_keeps_nothing() {
    let mut scene = PullScene::new().await;
    scene.server.put("/test.img", ServedFile::new(disk(100_000)));
    scene.server.put("/SUMS", ServedFile::new(format!("{}  test.img\n", "0".repeat(64))));
    scene.publish("checksums = \"SUMS\"");
    let error = scene.pull("test:1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Remote);
    let text = error.to_string();
    assert!(text.contains(&sha256(&disk(100_000))) && text.contains(&"0".repeat(64)), "{text}");
    scene.assert_nothing_kept();

    let url = format!("{}#sha256={}", scene.server.url("/test.img"), "0".repeat(64));
    assert!(matches!(scene.pull(&url).await, Err(Error::Untrusted { .. })));
    scene.assert_nothing_kept();
}

#[tokio::test]
async fn a_checksum_that_is_missing_is_no_reason_to_trust() {
    let mut scene = PullScene::new().await;
    scene.server.put("/test.img", ServedFile::new(disk(100_000)));
    scene.server.put("/SUMS", ServedFile::new(format!("{}  other.img\n", "0".repeat(64))));
    scene.publish("checksums = \"SUMS\"");
    let text = scene.pull("test:1").await.unwrap_err().to_string();
    assert!(text.contains("no SHA-256 or SHA-512 checksum of test.img"), "{text}");
    assert!(scene.server.asked("/test.img").is_empty(), "the image is not even fetched");
    scene.server.put("/SUMS", ServedFile::status("404 Not Found"));
    assert_eq!(scene.pull("test:1").await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn what_an_earlier_try_spoilt_is_fetched_once_more() {
    let mut scene = PullScene::new().await;
    let disk = disk(400_000);
    scene
        .server
        .put("/test.img", ServedFile { cuts: vec![200_000, 0, 0, 0], ..ServedFile::new(disk.clone()) });
    scene.server.put("/SUMS", ServedFile::new(format!("{}  test.img\n", sha256(&disk))));
    scene.publish("checksums = \"SUMS\"");
    scene.pull("test:1").await.unwrap_err();
    let downloads = scene.images().join("downloads");
    let dir = downloads.join(&files::entries(&downloads).unwrap()[0]);
    fs::write(dir.join("download"), vec![9; 150_000]).unwrap();
    assert_eq!(fs::read(scene.pull("test:1").await.unwrap().facts.path).unwrap(), disk);
}

/// Leaves the whole of a download behind, as one does who is killed while it is unpacked, and
/// returns its directory.
async fn left_whole(scene: &PullScene, disk: &[u8]) -> PathBuf {
    scene
        .server
        .put("/d", ServedFile { cuts: vec![disk.len() / 2, 0, 0, 0], ..ServedFile::new(disk.to_vec()) });
    scene.pull_url("/d").await.unwrap_err();
    let downloads = scene.images().join("downloads");
    let dir = downloads.join(&files::entries(&downloads).unwrap()[0]);
    fs::write(dir.join("download"), disk).unwrap();
    scene.server.put("/d", ServedFile::new(disk.to_vec()));
    dir
}

#[tokio::test]
async fn a_complete_download_left_behind_is_used_if_the_server_still_has_the_same_file() {
    let scene = PullScene::new().await;
    let (old, new) = (disk(400_000), disk(300_000));
    left_whole(&scene, &old).await;
    let before = scene.server.asked("/d").len();
    assert_eq!(scene.pull_url("/d").await.unwrap().id.hex(), sha256(&old));
    let asked = scene.server.asked("/d").split_off(before);
    assert_eq!((asked.len(), asked[0].headers["range"].as_str()), (1, "bytes=399999-"));

    let scene = PullScene::new().await;
    left_whole(&scene, &old).await;
    scene.server.put("/d", ServedFile { etag: Some("\"two\"".into()), ..ServedFile::new(new.clone()) });
    assert_eq!(scene.pull_url("/d").await.unwrap().id.hex(), sha256(&new));
}

#[tokio::test]
async fn what_another_run_of_the_host_left_of_an_unchecked_download_is_not_built_upon() {
    let scene = PullScene::new().await;
    let disk = disk(400_000);
    let dir = left_whole(&scene, &disk).await;
    // As after a power cut: the length is there, and what was written is not.
    fs::write(dir.join("download"), vec![0; 200_000]).unwrap();
    let state = fs::read_to_string(dir.join("state.json")).unwrap();
    let boot = crate::host::process::boot_id().unwrap().to_string();
    assert!(state.contains(&boot), "{state}");
    fs::write(dir.join("state.json"), state.replace(&boot, &uuid::Uuid::new_v4().to_string())).unwrap();
    assert_eq!(scene.pull_url("/d").await.unwrap().id.hex(), sha256(&disk));
}

#[tokio::test]
async fn what_is_no_image_is_refused_and_not_kept() {
    let scene = PullScene::new().await;
    let html = "<!DOCTYPE html><html>Please log in</html>".repeat(50);
    let headers = vec![("Content-Type".to_owned(), "text/html; charset=utf-8".to_owned())];
    scene.server.put("/told", ServedFile { headers, ..ServedFile::new(html.clone()) });
    scene.server.put("/untold", ServedFile::new(html));
    scene.server.put("/empty", ServedFile::new(""));
    scene.server.put("/vmdk", ServedFile::new([&b"KDMV"[..], &[0; 5000]].concat()));
    scene.server.put("/short.gz", ServedFile::new(&packed("gz", &disk(300_000))[..100_000]));
    for (path, why) in [
        ("/told", "a web page"),
        ("/untold", "a web page"),
        ("/empty", "the file is empty"),
        ("/vmdk", "VMDK"),
        ("/short.gz", "can't be decompressed as gzip"),
        ("/missing", "no such file on the server"),
    ] {
        let text = scene.pull_url(path).await.unwrap_err().to_string();
        assert!(text.contains(why), "{path}: {text}");
        scene.assert_nothing_kept();
    }
}

#[tokio::test]
async fn a_qcow2_that_hangs_on_another_file_is_refused() {
    let scene = PullScene::new().await;
    let (base, overlay) = (scene.dir.path().join("base"), scene.dir.path().join("overlay"));
    fs::write(&base, vec![1; 1 << 20]).unwrap();
    create_overlay(&inspect(&base).unwrap(), &overlay, None).unwrap();
    scene.server.put("/o.qcow2", ServedFile::new(fs::read(&overlay).unwrap()));
    let text = scene.pull_url("/o.qcow2").await.unwrap_err().to_string();
    assert!(text.contains("only the difference to"), "{text}");
    scene.assert_nothing_kept();
}

#[tokio::test]
async fn redirects_are_followed_but_not_for_ever() {
    let scene = PullScene::new().await;
    let to = |path: &str| {
        let headers = vec![("Location".to_owned(), scene.server.url(path))];
        ServedFile { headers, ..ServedFile::status("302 Found") }
    };
    let disk = disk(50_000);
    scene.server.put("/disk", ServedFile { cuts: vec![10_000], ..ServedFile::new(disk.clone()) });
    scene.server.put("/there", to("/disk"));
    scene.server.put("/here", to("/there"));
    assert_eq!(scene.pull_url("/here").await.unwrap().id.hex(), sha256(&disk));
    scene.server.put("/round", to("/round"));
    let error = scene.pull_url("/round").await.unwrap_err();
    assert!(error.to_string().contains("redirects to a URL"), "{error}");
    assert!(scene.server.asked("/round").len() <= 12);
}

#[tokio::test]
async fn a_server_that_falls_silent_is_given_up_after_its_tries() {
    let mut scene = PullScene::new().await;
    scene.store.fetcher.remote.patience.idle = Duration::from_millis(100);
    let page = ServedFile { cuts: vec![1000, 0, 0, 0], stalls: true, ..ServedFile::new(disk(100_000)) };
    scene.server.put("/d", page);
    let error = scene.pull_url("/d").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert!(error.to_string().contains("to send the next byte"), "{error}");
    assert!(scene.store.list().unwrap().0.is_empty());
}

#[tokio::test]
async fn a_slow_server_is_waited_for() {
    let mut scene = PullScene::new().await;
    scene.store.fetcher.remote.patience.idle = Duration::from_secs(5);
    let disk = disk(40_000);
    scene.server.put("/d", ServedFile { pause: Duration::from_millis(20), ..ServedFile::new(disk.clone()) });
    assert_eq!(scene.pull_url("/d").await.unwrap().id.hex(), sha256(&disk));
}

#[tokio::test]
async fn an_overloaded_server_is_asked_again_and_a_forbidden_file_is_not() {
    let scene = PullScene::new().await;
    scene.server.put("/busy", ServedFile::status("503 Service Unavailable"));
    let error = scene.pull_url("/busy").await.unwrap_err();
    assert!(error.to_string().contains("503"), "{error}");
    assert_eq!(scene.server.asked("/busy").len(), 3);
    scene.server.put("/closed", ServedFile::status("403 Forbidden"));
    assert_eq!(scene.pull_url("/closed").await.unwrap_err().kind(), ErrorKind::Remote);
    assert_eq!(scene.server.asked("/closed").len(), 1);
}

#[tokio::test]
async fn what_came_outlives_a_server_that_refuses_for_a_while() {
    let scene = PullScene::new().await;
    let disk = disk(400_000);
    let html = || vec![("Content-Type".to_owned(), "text/html".to_owned())];
    for (index, refusal) in [
        ServedFile::status("503 Service Unavailable"),
        ServedFile::status("429 Too Many Requests"),
        ServedFile::status("403 Forbidden"),
        ServedFile::status("401 Unauthorized"),
        // The page of a network that wants a login first.
        ServedFile { headers: html(), etag: None, ..ServedFile::new("<html>Please log in</html>") },
    ]
    .into_iter()
    .enumerate()
    {
        let path = format!("/{index}");
        scene.server.put(&path, ServedFile { cuts: vec![300_000, 0, 0, 0], ..ServedFile::new(disk.clone()) });
        scene.pull_url(&path).await.unwrap_err();
        let status = refusal.status;
        scene.server.put(&path, refusal);
        scene.pull_url(&path).await.unwrap_err();
        scene.server.put(&path, ServedFile::new(disk.clone()));
        assert_eq!(scene.pull_url(&path).await.unwrap().id.hex(), sha256(&disk));
        let asked = scene.server.asked(&path);
        let range = asked.last().unwrap().headers.get("range").map(String::as_str);
        assert_eq!(range, Some("bytes=300000-"), "{status}: {asked:?}");
    }
}

#[tokio::test]
async fn what_came_of_a_file_that_is_gone_is_removed() {
    let scene = PullScene::new().await;
    scene.server.put("/d", ServedFile { cuts: vec![300_000, 0, 0, 0], ..ServedFile::new(disk(400_000)) });
    scene.pull_url("/d").await.unwrap_err();
    scene.server.put("/d", ServedFile::status("404 Not Found"));
    assert_eq!(scene.pull_url("/d").await.unwrap_err().kind(), ErrorKind::NotFound);
    scene.assert_nothing_kept();
}

#[tokio::test]
async fn a_window_that_would_take_too_much_memory_is_refused() {
    use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
    use std::io::{Read, Write};

    let scene = PullScene::new().await;
    let disk = disk(300_000);
    let xz = |dictionary: u32| {
        let mut options = LzmaOptions::new_preset(0).unwrap();
        let mut filters = Filters::new();
        filters.lzma2(options.dict_size(dictionary));
        let stream = Stream::new_stream_encoder(&filters, Check::Crc32).unwrap();
        let mut packed = Vec::new();
        liblzma::read::XzEncoder::new_stream(&disk[..], stream).read_to_end(&mut packed).unwrap();
        packed
    };
    let zst = |window_log: u32| {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(window_log).unwrap();
        encoder.write_all(&disk).unwrap();
        encoder.finish().unwrap()
    };
    // The largest that `xz -9` and `zstd --ultra` write.
    for (path, body) in [("/xz-9", xz(64 << 20)), ("/zst-ultra", zst(27))] {
        scene.server.put(path, ServedFile::new(body));
        assert_eq!(scene.pull_url(path).await.unwrap().id.hex(), sha256(&disk));
    }
    for (path, body) in [("/xz", xz(256 << 20)), ("/zst", zst(28))] {
        scene.server.put(path, ServedFile::new(body));
        let error = scene.pull_url(path).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains("more than 128 MiB of memory"), "{path}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_of_one_image_at_once_share_one_download() {
    let scene = PullScene::new().await;
    let disk = disk(200_000);
    scene.server.put("/d", ServedFile { pause: Duration::from_millis(5), ..ServedFile::new(disk.clone()) });
    let url = scene.server.url("/d");
    let pulls = (0..4).map(|_| {
        // Each a store of its own, as in processes of their own.
        let store = ImageStore::new(&Home::at(scene.dir.path()).unwrap(), Catalogue::built_in());
        let image = url.parse().unwrap();
        tokio::spawn(async move { store.pull(&image, ARCH, &no_progress()).await })
    });
    let pulls: Vec<_> = pulls.collect();
    for pull in pulls {
        assert_eq!(pull.await.unwrap().unwrap().id.hex(), sha256(&disk));
    }
    assert_eq!(scene.server.asked("/d").len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_process_sees_the_lock_released_and_takes_it() {
    let scene = PullScene::new().await;
    let disk = disk(300_000);
    scene.server.put("/d", ServedFile { cuts: vec![100_000], stalls: true, ..ServedFile::new(disk.clone()) });
    let (store, image) = (scene.store.clone(), scene.server.url("/d").parse().unwrap());
    let first_progress = no_progress();
    let mut first_seen = first_progress.subscribe();
    let first = tokio::spawn(async move { store.pull(&image, ARCH, &first_progress).await });
    first_seen.wait_for(|progress| progress.done_bytes == 100_000).await.unwrap();
    let progress = no_progress();
    let mut seen = progress.subscribe();
    let (store, image) = (scene.store.clone(), scene.server.url("/d").parse().unwrap());
    let second = tokio::spawn(async move { store.pull(&image, ARCH, &progress).await });
    seen.wait_for(|progress| progress.stage == PullStage::Waiting && progress.done_bytes > 0).await.unwrap();
    first.abort();
    assert_eq!(second.await.unwrap().unwrap().id.hex(), sha256(&disk));
    assert_eq!(scene.server.asked("/d").len(), 2);
}

#[tokio::test]
async fn a_kept_image_is_found_without_the_network_and_not_fetched_twice() {
    let mut scene = PullScene::new().await;
    let disk = disk(100_000);
    scene.server.put("/test.img", ServedFile::new(disk.clone()));
    scene.server.put("/SUMS", ServedFile::new(format!("{}  test.img\n", sha256(&disk))));
    scene.publish("checksums = \"SUMS\"");
    let image: ImageRef = "test".parse().unwrap();
    let missing = scene.store.resolve(&image, ARCH, PullPolicy::Never, &no_progress()).await.unwrap_err();
    assert_eq!(missing.to_string(), "image `test:1` does not exist");
    for policy in [PullPolicy::Missing, PullPolicy::Missing, PullPolicy::Newer, PullPolicy::Never] {
        let found = scene.store.resolve(&image, ARCH, policy, &no_progress()).await.unwrap();
        assert_eq!((found.name.as_str(), found.facts.virtual_size_bytes), ("test:1", 100_352));
    }
    assert_eq!(scene.server.asked("/test.img").len(), 1);
    assert_eq!(scene.server.asked("/SUMS").len(), 2, "once for each time it may be newer");
    let other = scene.store.resolve(&image, Arch::Aarch64, PullPolicy::Missing, &no_progress()).await;
    assert!(other.unwrap_err().to_string().contains("does not exist for aarch64, only for x86_64"));
}

#[tokio::test]
async fn an_image_for_another_architecture_is_refused() {
    let scene = PullScene::new().await;
    let mut disk = vec![0; 1 << 20];
    disk[512..520].copy_from_slice(b"EFI PART");
    (disk[512 + 72], disk[512 + 80], disk[512 + 84]) = (2, 1, 128);
    let kind: uuid::Uuid = "b921b045-1df0-41c3-af44-4c6f280d3fae".parse().unwrap();
    disk[1024..1040].copy_from_slice(&kind.to_bytes_le());
    (disk[1056], disk[1064]) = (64, 128);
    scene.server.put("/d", ServedFile::new(disk));
    let text = scene.pull_url("/d").await.unwrap_err().to_string();
    assert!(text.contains("an image for aarch64, and x86_64 was requested"), "{text}");
    scene.assert_nothing_kept();
}

#[tokio::test]
async fn a_mirror_stands_in_for_the_publisher() {
    let mut scene = PullScene::new().await;
    let disk = disk(10_000);
    let mirror = format!("https://never.invalid/={}", scene.server.url("/mirror/"));
    let text = "version = 1\n[image.test.release.1]\nchecksums = \"SUMS\"\n\
        x86_64 = { url = \"https://never.invalid/a/test.img\" }\n";
    let catalogue = Catalogue::built_in().extended(text, Path::new("t")).unwrap();
    scene.store.catalogue = catalogue.with_mirrors(&mirror).unwrap();
    scene.server.put("/mirror/a/test.img", ServedFile::new(disk.clone()));
    scene.server.put("/mirror/a/SUMS", ServedFile::new(format!("{}  test.img\n", sha256(&disk))));
    assert_eq!(scene.pull("test").await.unwrap().id.hex(), sha256(&disk));
}

/// Of the key `one` that the tests of signatures have: what it is, and a file that it signed, which
/// stands in for an image.
const ONE: &str = "5A88DABF613BE576F30FF9839CE137947B24AC90";
const SIGNED: &[u8] = include_bytes!("../../tests/signatures/SUMS");
const SIGNATURE: &[u8] = include_bytes!("../../tests/signatures/one.sig");

impl PullScene {
    /// Publishes an image `test:1` with this release, and knows the key `one`.
    fn publish_signed(&mut self, release: &str) {
        let public = include_str!("../../tests/signatures/one.pub");
        let key = format!("version = 1\n[key.one]\nfingerprint = \"{ONE}\"\npublic = '''\n{public}'''\n");
        self.store.catalogue = self.store.catalogue.clone().extended(&key, Path::new("k")).unwrap();
        self.publish(release);
    }
}

const OF_IMAGE: &str = "signed = \"image\"\nsignature = \"{file}.sig\"\nkeys = [\"one\"]";

#[tokio::test]
async fn a_key_from_elsewhere_is_accepted_only_by_its_fingerprint() {
    let mut scene = PullScene::new().await;
    let url = scene.server.url("/keys/one.asc");
    let key = format!("version = 1\n[key.one]\nfingerprint = \"{ONE}\"\nurl = \"{url}\"\n");
    scene.store.catalogue = scene.store.catalogue.clone().extended(&key, Path::new("k")).unwrap();
    scene.publish(OF_IMAGE);
    scene.server.put("/test.img", ServedFile::new(SIGNED));
    scene.server.put("/test.img.sig", ServedFile::new(SIGNATURE));
    for (page, why) in [
        (ServedFile::status("404 Not Found"), "no such file on the server"),
        (ServedFile::new(&b"sign in"[..]), "can't be read"),
        (
            ServedFile::new(&include_bytes!("../../tests/signatures/two.pub")[..]),
            "has another fingerprint, 019F3568",
        ),
    ] {
        scene.server.put("/keys/one.asc", page);
        let error = scene.pull("test:1").await.unwrap_err().to_string();
        assert!(error.contains(&url) && error.contains(why), "{error}");
        assert!(scene.server.asked("/test.img").is_empty(), "without the key, nothing is fetched");
        scene.assert_nothing_kept();
    }
    scene.server.put("/keys/one.asc", ServedFile::new(&include_bytes!("../../tests/signatures/one.pub")[..]));
    let kept = scene.pull("test:1").await.unwrap();
    assert_eq!(kept.names[0].verified, Verification::Signature { fingerprint: ONE.to_owned() });
}

#[tokio::test]
async fn a_signature_of_the_image_is_asked_for_before_the_image() {
    let mut scene = PullScene::new().await;
    scene.publish_signed(OF_IMAGE);
    scene.server.put("/test.img", ServedFile::new(SIGNED));
    assert_eq!(scene.pull("test:1").await.unwrap_err().kind(), ErrorKind::NotFound);
    scene.server.put("/test.img.sig", ServedFile::status("503 Service Unavailable"));
    scene.pull("test:1").await.unwrap_err();
    assert!(scene.server.asked("/test.img").is_empty(), "without it, nothing is fetched");
}

#[tokio::test]
async fn a_kept_image_gets_a_signed_name_only_by_its_signature() {
    let mut scene = PullScene::new().await;
    scene.publish_signed(&format!("checksums = \"SUMS\"\n{OF_IMAGE}"));
    scene.server.put("/test.img.sig", ServedFile::new(SIGNATURE));
    // Here already by an address, verified by no key.
    scene.server.put("/test.img", ServedFile::new(SIGNED));
    scene.server.put("/SUMS", ServedFile::new(format!("{}  test.img\n", sha256(SIGNED))));
    scene.pull_url("/test.img").await.unwrap();
    for _ in 0..2 {
        let kept = scene.pull("test:1").await.unwrap();
        let name = kept.names.iter().find(|name| name.name == "test:1").unwrap();
        assert_eq!(name.verified, Verification::Signature { fingerprint: ONE.to_owned() });
        assert_eq!(scene.server.asked("/test.img").len(), 1, "what was signed is here");
    }
    // What is kept of this one is unpacked, and can't tell whether what it came as was signed: it
    // is fetched once more.
    let other = packed("gz", b"another disk");
    scene.server.put("/test.img", ServedFile::new(other.clone()));
    scene.server.put("/SUMS", ServedFile::new(format!("{}  test.img\n", sha256(&other))));
    scene.server.put("/other", ServedFile::new(other));
    scene.pull_url("/other").await.unwrap();
    let error = scene.pull("test:1").await.unwrap_err();
    assert!(error.to_string().contains("no valid signature by 5A88DABF"), "{error}");
    assert_eq!(scene.server.asked("/test.img").len(), 2);
}

#[tokio::test]
async fn a_signature_over_checksums_or_the_image_is_verified() {
    let mut scene = PullScene::new().await;
    scene.publish_signed(OF_IMAGE);
    scene.server.put("/test.img", ServedFile::new(SIGNED));
    scene.server.put("/test.img.sig", ServedFile::new(SIGNATURE));
    let kept = scene.pull("test:1").await.unwrap();
    assert_eq!(kept.names[0].verified, Verification::Signature { fingerprint: ONE.to_owned() });
    scene.store.remove("test:1", None).await.unwrap();

    scene.server.put("/test.img", ServedFile::new(&b"another"[..]));
    let error = scene.pull("test:1").await.unwrap_err();
    assert!(error.to_string().contains("no valid signature by 5A88DABF"), "{error}");
    scene.assert_nothing_kept();

    scene.publish("checksums = \"SUMS\"\nsigned = \"checksums\"\nsignature = \"SUMS.sig\"\nkeys = [\"one\"]");
    scene.server.put("/SUMS", ServedFile::new(format!("{}  test.img\n", sha256(b"another"))));
    scene.server.put("/SUMS.sig", ServedFile::new(SIGNATURE));
    let error = scene.pull("test:1").await.unwrap_err();
    assert!(matches!(error, Error::Untrusted { .. }), "{error}");
    scene.server.put("/SUMS", ServedFile::new(SIGNED));
    let error = scene.pull("test:1").await.unwrap_err();
    assert!(error.to_string().contains("expected sha256:aaaa"), "the signature is good: {error}");

    scene.publish("checksums = \"CHECKSUM\"\nsigned = \"inline\"\nkeys = [\"one\"]");
    scene
        .server
        .put("/CHECKSUM", ServedFile::new(&include_bytes!("../../tests/signatures/CHECKSUM.inline")[..]));
    let error = scene.pull("test:1").await.unwrap_err();
    assert!(error.to_string().contains("expected sha256:aaaa"), "the signature is good: {error}");
    scene.assert_nothing_kept();
}
