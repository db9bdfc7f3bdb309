//! Disk images: the format of a file, overlays and empty disks, and images by name.
//!
//! [`inspect`] reads an image that came from outside and trusts nothing in it. [`create_overlay`]
//! and [`create_blank`] create the qcow2 files that belong to a VM, [`grow_disk`] grows one of
//! them. Nothing here ever writes to a base image, takes QEMU's image locks, or runs a program;
//! rebasing is left to `qemu-img`.
//!
//! With the feature `images`, [`convert`](fn@convert) writes an image as a raw file, an
//! [`ImageRef`] names an image, a [`Catalogue`] has its address, and an [`ImageStore`] fetches,
//! verifies and stores it:
//!
//! ```text
//! ImageStore (store): a name becomes an address
//!   ├─▶ pull, import ─▶ keep ─▶ local_images: records, names, locks
//!   └─▶ fetcher: checksums, signature ─▶ download (HTTP) ─▶ intake: hash, unpack (threads)
//! ```
//!
//! What is lower in the drawing does not know what is above it.

#[cfg(feature = "images")]
mod arch;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod backing;
#[cfg(feature = "images")]
mod blocks;
#[cfg(feature = "images")]
mod catalogue;
#[cfg(all(test, feature = "images"))]
mod catalogue_tests;
#[cfg(feature = "images")]
mod checksums;
#[cfg(feature = "images")]
mod convert;
#[cfg(all(test, feature = "images"))]
mod convert_tests;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod create;
#[cfg(feature = "images")]
mod credential_helper;
#[cfg(feature = "images")]
mod credentials;
#[cfg(feature = "images")]
mod digest;
mod disc;
#[cfg(feature = "images")]
mod disk;
#[cfg(feature = "images")]
mod download;
#[cfg(all(test, feature = "images", feature = "qemu"))]
mod download_tests;
#[cfg(feature = "images")]
mod downloads;
mod facts;
#[cfg(feature = "images")]
mod fetcher;
#[cfg(feature = "images")]
mod files;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod identity;
#[cfg(feature = "images")]
mod import;
#[cfg(feature = "images")]
mod imported_base;
mod inspect;
#[cfg(feature = "images")]
mod intake;
#[cfg(feature = "images")]
mod keep;
#[cfg(feature = "images")]
mod kept;
#[cfg(feature = "images")]
mod local_images;
#[cfg(feature = "images")]
mod logins;
#[cfg(feature = "images")]
mod packing;
#[cfg(feature = "images")]
mod progress;
#[cfg(feature = "images")]
mod proxy;
#[cfg(feature = "images")]
mod pull;
#[cfg(all(test, feature = "images", feature = "qemu"))]
mod pull_tests;
mod qcow2_header;
#[cfg(feature = "images")]
mod reference;
#[cfg(all(test, feature = "images", feature = "qemu"))]
mod refusal_tests;
#[cfg(feature = "images")]
mod registry;
#[cfg(all(test, feature = "images", feature = "qemu"))]
mod registry_tests;
#[cfg(feature = "images")]
mod remote;
#[cfg(feature = "images")]
mod removal;
#[cfg(feature = "images")]
mod resolver;
#[cfg(feature = "images")]
mod signature;
#[cfg(feature = "images")]
mod source;
#[cfg(feature = "images")]
mod sparse;
#[cfg(feature = "images")]
mod store;
#[cfg(all(test, feature = "images"))]
mod store_tests;
#[cfg(all(test, feature = "images", feature = "qemu"))]
mod test_server;
#[cfg(feature = "images")]
mod watch;

pub use crate::image_format::ImageFormat;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use backing::{
    Backing, backing, backing_name, backing_of_foreign, is_backing_settled, set_backing, settle_backing,
};
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub use create::{MAX_DISK_BYTES, create_blank, create_overlay, grow_disk};
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use create::{create_overlay_at_home, create_overlay_of_layer};
pub use disc::firmware_of_disc;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use disc::{check_disc, refuse_disc};
pub use facts::ImageFacts;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use identity::ImageIdentity;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use inspect::has_qcow2_header;
pub use inspect::inspect;
#[cfg(any(feature = "propolis", all(target_os = "linux", feature = "qemu")))]
pub(crate) use inspect::inspect_for;

#[cfg(feature = "images")]
pub use catalogue::{
    Catalogue, CatalogueEntry, OpenPgpKey, PublicKey, PublishedImage, PublishedSignature, SignatureTarget,
};
#[cfg(feature = "images")]
pub use convert::{OverwritePolicy, convert};
#[cfg(feature = "images")]
pub use credentials::RegistryCredentials;
#[cfg(feature = "images")]
pub(crate) use digest::Hasher;
#[cfg(feature = "images")]
pub use digest::{Digest, DigestAlgorithm};
#[cfg(feature = "images")]
pub use import::ImportOptions;
#[cfg(feature = "images")]
pub(crate) use imported_base::ImportedBase;
#[cfg(feature = "images")]
pub use kept::{LocalImage, LocalName, Verification};
#[cfg(feature = "images")]
pub use local_images::ImageInUse;
#[cfg(feature = "images")]
pub use progress::{PullProgress, PullStage};
#[cfg(feature = "images")]
pub use proxy::Proxies;
#[cfg(feature = "images")]
pub use reference::{ImageName, ImageRef, ImageUrl, OciRef};
#[cfg(feature = "images")]
pub use removal::RemovedImage;
#[cfg(feature = "images")]
pub(crate) use sparse::SparseFile;
#[cfg(feature = "images")]
pub use store::{ImageStore, PullPolicy};
#[cfg(feature = "images")]
pub use watch::{no_progress, watch_progress};

#[cfg(test)]
mod tests {
    use std::process::Command;

    /// Runs the real `qemu-img`, which must succeed; returns false, and says so, if this host has
    /// none.
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

    /// Returns what `qemu-img info` prints of a qcow2 image.
    pub(super) fn qemu_img_info(image: &str) -> serde_json::Value {
        let output =
            Command::new("qemu-img").args(["info", "-f", "qcow2", "--output=json", image]).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    }
}
