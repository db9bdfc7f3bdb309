//! `guest.json`: the files of a built guest, for the tests that boot it.
//!
//! It lies beside the guest's files, and paths in it are relative to its own directory. This is its
//! shape:
//!
//! ```json
//! {
//!   "schema": 1,
//!   "name": "debian",
//!   "recipe": "9f0c6e1d2b3a4857",
//!   "os": "Debian GNU/Linux 12 (bookworm)",
//!   "kernel": "vmlinuz",
//!   "initrd": "initrd",
//!   "disk": { "path": "disk.qcow2", "format": "qcow2", "virtual_bytes": 3221225472 },
//!   "memory_mib": 512,
//!   "machines": {
//!     "microvm": { "cmdline": "root=LABEL=root ro console=ttyS0 tsc_early_khz=2600000" },
//!     "q35": { "cmdline": "root=LABEL=root ro console=ttyS0 no_timer_check" }
//!   },
//!   "ready_line": "vmkit-guest: ready"
//! }
//! ```
//!
//! - `recipe` changes whenever the guest could.
//! - `disk` is `null` for a guest that lives in its initramfs.
//! - `memory_mib` is enough memory.
//! - `machines` names each QEMU machine the guest was made for, with its kernel command line. A
//!   console other than `ttyS0` works: replace the word `console=ttyS0`.
//! - `ready_line` is text that appears on the console, perhaps with something before it in its
//!   line, when the guest does what its recipe promises: `tiny` listens to its power button and
//!   gives a shell, `debian` is through with cloud-init.
//!
//! The directory is reached by a link that the next build replaces. Whoever makes an overlay of
//! `disk` resolves the link first, or the overlay's backing file changes under it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

/// The contents of `guest.json`, but for what only the cache knows.
#[derive(Debug, Serialize)]
pub(super) struct Manifest {
    pub(super) os: String,
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) disk: Option<Disk>,
    pub(super) memory_mib: u32,
    pub(super) machines: BTreeMap<String, Machine>,
    pub(super) ready_line: String,
}

/// The image a guest has its root file system on. Boot an overlay of it, never the image.
#[derive(Debug, Serialize)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) format: String,
    pub(super) virtual_bytes: u64,
}

/// What depends on the machine type.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) cmdline: String,
}

/// The whole file.
#[derive(Debug, Serialize)]
pub(super) struct GuestFile<'a> {
    pub(super) schema: u32,
    pub(super) name: &'a str,
    pub(super) recipe: &'a str,
    #[serde(flatten)]
    pub(super) manifest: &'a Manifest,
}
