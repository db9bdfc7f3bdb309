//! `guest.json`: describes the files of a built guest to the tests that boot it.
//!
//! It is stored beside the guest's files, and its paths are relative to its own directory:
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
//! - `recipe` is a hash that changes with everything the guest is built from.
//! - `disk` is `null` for a guest that runs from its initramfs.
//! - `memory_mib` is what the guest needs.
//! - `machines` has the kernel command line for each machine type the guest supports. For a console
//!   other than `ttyS0`, replace `console=ttyS0`.
//! - `ready_line` is printed on the console, possibly after other text in the same line, once the
//!   guest is ready: `tiny` handles its power button and has started a shell, `debian` has
//!   completed cloud-init.
//!
//! The directory is reached by a symbolic link that the next build replaces. Resolve the link
//! before creating an overlay of `disk`, or the overlay's backing file changes under it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

/// The contents of `guest.json` except for the paths, which the cache adds.
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

/// The guest's root disk. Boot an overlay of it, never the image.
#[derive(Debug, Serialize)]
pub(super) struct Disk {
    pub(super) path: PathBuf,
    pub(super) format: String,
    pub(super) virtual_bytes: u64,
}

/// The settings that depend on the machine type.
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
