//! Pulls that are cut, from servers that answer to `Range` in their own ways.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::time::{Duration, Instant};

use super::pull_tests::{PullScene, disk, sha256};
use super::test_server::{RangeFault, ServedFile};
use super::*;
use crate::error::Error;

/// Returns where each request for a path began.
fn starts(scene: &PullScene, path: &str) -> Vec<usize> {
    let start = |range: &String| range["bytes=".len()..].trim_end_matches('-').parse().unwrap();
    scene.server.asked(path).iter().map(|asked| asked.headers.get("range").map_or(0, start)).collect()
}

/// Returns a page that is interrupted once, in its middle, and then replies oddly.
fn cut(disk: &[u8], oddity: RangeFault) -> ServedFile {
    ServedFile { cuts: vec![disk.len() / 2], oddity, ..ServedFile::new(disk) }
}

#[tokio::test]
async fn a_part_that_is_shorter_than_what_was_asked_for_is_not_the_end() {
    let scene = PullScene::new().await;
    let disk = disk(400_000);
    for (path, oddity) in
        [("/told", RangeFault::ShortParts(70_000)), ("/untold", RangeFault::ShortPartsOfSome(70_000))]
    {
        scene.server.put(path, cut(&disk, oddity));
        let kept = scene.pull_url(path).await.unwrap();
        assert_eq!((kept.id.hex(), kept.facts.file_bytes), (&*sha256(&disk), 400_000), "{path}");
        assert_eq!(starts(&scene, path), [0, 200_000, 270_000, 340_000], "{path}");
    }
    // The first answer tells no length, so that only the server can say that there is no more.
    let page = ServedFile { tells_length: false, ..cut(&disk, RangeFault::ShortPartsOfSome(70_000)) };
    scene.server.put("/never", ServedFile { stalls: true, ..page });
    let mut store = scene.store.clone();
    store.fetcher.remote.patience.idle = Duration::from_millis(300);
    let image = scene.server.url("/never").parse().unwrap();
    assert_eq!(store.pull(&image, pull_tests::ARCH, &no_progress()).await.unwrap().id.hex(), sha256(&disk));
    assert_eq!(starts(&scene, "/never"), [0, 200_000, 270_000, 340_000, 400_000]);
}

#[tokio::test]
async fn two_files_are_never_joined_whatever_the_server_does_with_if_range() {
    for (oddity, bytes) in [
        (RangeFault::NoIfRange, 400_000),
        (RangeFault::NoIfRange, 500_000),
        (RangeFault::NoIfRangeNorEtag, 500_000),
    ] {
        let scene = PullScene::new().await;
        let (old, new) = (vec![7; 400_000], disk(bytes));
        scene.server.put("/d", ServedFile { cuts: vec![200_000, 0, 0, 0], ..ServedFile::new(old) });
        scene.pull_url("/d").await.unwrap_err();
        scene
            .server
            .put("/d", ServedFile { etag: Some("\"two\"".into()), oddity, ..ServedFile::new(new.clone()) });
        assert_eq!(scene.pull_url("/d").await.unwrap().id.hex(), sha256(&new), "{oddity:?} {bytes}");
        assert_eq!(starts(&scene, "/d")[4..], [200_000, 0], "{oddity:?} {bytes}");
    }
}

#[tokio::test]
async fn a_download_without_validators_restarts_unless_a_checksum_identifies_it() {
    let scene = PullScene::new().await;
    let disk = disk(400_000);
    scene.server.put("/d", cut(&disk, RangeFault::NoEtag));
    assert_eq!(scene.pull_url("/d").await.unwrap().id.hex(), sha256(&disk));
    assert_eq!(starts(&scene, "/d"), [0, 0]);

    let scene = PullScene::new().await;
    scene.server.put("/d", cut(&disk, RangeFault::NoEtag));
    let url = format!("{}#sha256={}", scene.server.url("/d"), sha256(&disk));
    assert_eq!(scene.pull(&url).await.unwrap().id.hex(), sha256(&disk));
    assert_eq!(starts(&scene, "/d"), [0, 200_000]);

    // A server that never gets further than that is given up, though each time something comes.
    scene.server.put("/e", ServedFile { cuts: vec![200_000; 9], ..cut(&disk, RangeFault::NoEtag) });
    scene.pull_url("/e").await.unwrap_err();
    assert_eq!(starts(&scene, "/e"), [0, 0, 0, 0]);
}

#[tokio::test]
async fn a_wrong_checksum_after_a_cut_is_tried_once_more_from_the_beginning() {
    let scene = PullScene::new().await;
    let (old, new) = (vec![7; 400_000], disk(400_000));
    // Interrupted in the old file; the rest is of the new one, and nothing shows it.
    scene.server.put("/d", ServedFile { stalls: true, ..cut(&old, RangeFault::NoEtag) });
    let mut store = scene.store.clone();
    store.fetcher.remote.patience.idle = Duration::from_millis(500);
    let image = format!("{}#sha256={}", scene.server.url("/d"), sha256(&new)).parse().unwrap();
    let progress = no_progress();
    let mut seen = progress.subscribe();
    let (kept, ()) = tokio::join!(store.pull(&image, pull_tests::ARCH, &progress), async {
        seen.wait_for(|progress| progress.done_bytes == 200_000).await.unwrap();
        scene.server.put("/d", ServedFile { oddity: RangeFault::NoEtag, ..ServedFile::new(new.clone()) });
    });
    assert!(fs::read(kept.unwrap().facts.path).unwrap() == new);
    assert_eq!(starts(&scene, "/d"), [0, 200_000, 0]);

    scene.server.put("/e", cut(&old, RangeFault::None));
    let url = format!("{}#sha256={}", scene.server.url("/e"), "0".repeat(64));
    assert!(matches!(scene.pull(&url).await, Err(Error::Untrusted { .. })));
    assert_eq!(starts(&scene, "/e"), [0, 200_000, 0], "once, and not for ever");
}

#[tokio::test]
async fn after_a_cut_it_goes_on_at_once_if_something_had_come() {
    let mut scene = PullScene::new().await;
    let disk = disk(100_000);
    scene.store.fetcher.remote.patience.pause = Duration::from_secs(3);
    scene.server.put("/d", ServedFile { cuts: vec![10_000; 8], ..ServedFile::new(disk.clone()) });
    let begun = Instant::now();
    assert_eq!(scene.pull_url("/d").await.unwrap().id.hex(), sha256(&disk));
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());

    scene.store.fetcher.remote.patience.pause = Duration::from_millis(300);
    scene.server.put("/e", ServedFile { cuts: vec![10_000, 0], ..ServedFile::new(disk.clone()) });
    let begun = Instant::now();
    assert_eq!(scene.pull_url("/e").await.unwrap().id.hex(), sha256(&disk));
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
}
