//! A whole Debian converted to raw, as it is and compressed, and compared with the image by
//! `qemu-img`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use vmkit::image::{OverwritePolicy, convert, inspect, no_progress};
use vmkit_testkit::guest;

/// Runs the real `qemu-img`, which must succeed; returns false, and says so, if this host has none.
fn qemu_img(arguments: &[&str]) -> bool {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            assert!(output.status.success(), "qemu-img {arguments:?}: {output:?}");
            true
        }
        Err(error) => {
            println!("SKIP: qemu-img can't be run: {error}");
            false
        }
    }
}

#[tokio::test]
async fn a_whole_debian_becomes_the_raw_disk_that_qemu_sees() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let image = guest::debian().disk.unwrap().to_str().unwrap().to_owned();
    let (compressed, raw) = (path("compressed.qcow2"), path("raw"));
    let options = ["-c", "-W", "-o", "compression_type=zstd", "-f", "qcow2", "-O", "qcow2"];
    if !qemu_img(&[&["convert"][..], &options, &[&image, &compressed]].concat()) {
        return;
    }
    for image in [&image, &compressed] {
        let facts = inspect(Path::new(image)).unwrap();
        let bytes =
            convert(&facts, Path::new(&raw), OverwritePolicy::Replaced, &no_progress()).await.unwrap();
        let metadata = std::fs::metadata(&raw).unwrap();
        assert_eq!((bytes, metadata.len()), (facts.virtual_size_bytes, facts.virtual_size_bytes));
        assert!(metadata.blocks() * 512 < bytes / 2, "{image}: what is not there takes no room");
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", image, &raw]);
    }
}
