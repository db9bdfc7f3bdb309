//! Disk images: what a file is, and making overlays and empty disks.
//!
//! [`inspect`] looks at an image that came from outside and trusts nothing in it. [`create_overlay`] and
//! [`create_blank`] make the qcow2 files that belong to a VM, [`grow_disk`] makes one of those larger. Nothing here ever
//! writes to an image that is nobody's disk, takes QEMU's image locks, or runs a program; converting and rebasing are left to `qemu-img`.

#[cfg(all(target_os = "linux", feature = "qemu"))]
mod create;
mod inspect;
mod qcow2_header;

#[cfg(all(target_os = "linux", feature = "qemu"))]
pub use create::{MAX_DISK_BYTES, create_blank, create_overlay, grow_disk};
pub use inspect::{ImageFacts, ImageFormat, inspect};

#[cfg(test)]
mod tests {
    use std::process::Command;

    /// Runs the real `qemu-img`, which must succeed; answers false, and says so, where this host has none.
    pub(super) fn qemu_img(arguments: &[&str]) -> bool {
        match Command::new("qemu-img").args(arguments).output() {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
                true
            }
            Err(error) => {
                println!("SKIP: qemu-img can't be run: {error}");
                false
            }
        }
    }

    /// Answers what `qemu-img info` says of a qcow2 image.
    pub(super) fn qemu_img_info(image: &str) -> serde_json::Value {
        let output =
            Command::new("qemu-img").args(["info", "-f", "qcow2", "--output=json", image]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }
}
