//! Runs virtual machines.
//!
//! The heart is one trait, [`Hypervisor`]: prepare, start, stop, suspend, resume, destroy, state,
//! guest_ip, console_endpoint. [`QemuHypervisor`] implements it on Linux, [`NoopHypervisor`] in
//! memory, [`RouterHypervisor`] over several, and your own backend beside them. [`VmManager`] adds
//! what outlives a process: a record, a lock and an intent for each VM.
//!
//! What is wanted is a [`spec::VmSpec`], which is valid once it is built. What exists is a
//! [`VmHandle`], which is plain data. The state of a VM is asked of its process each time, and
//! [`lifecycle::next`] alone says which operation is legal in it.
//!
//! The library prints nothing, reads no environment variable and keeps no global state. It runs on
//! any tokio runtime with I/O and time enabled.
//!
//! # Tracing
//! What goes wrong beside an operation is reported by events of [`tracing`]. Each operation of a
//! [`VmManager`] that changes something is a span: `create`, `start`, `stop`, `restart`, `suspend`,
//! `resume`, `remove`, `reconfigure`, `add_forward`, `remove_forward` and `rerun_cloud_init`; and
//! so are `launch`, `pull` of an image, and `up` of a machine. A `launch` contains the others.
//! Target: `vmkit::operation`; level: `INFO`; fields:
//!
//! | field | content |
//! | --- | --- |
//! | `vm` | the VM's name; empty for a `launch` that chooses one |
//! | `id` | the VM's id, once known; for a `pull`, the checksum of the disk |
//! | `outcome` | `done`, or the [`ErrorKind`] of the failure; absent if the operation was dropped |
//! | `machine` | for `up`: the machine's name in the file |
//! | `image` | for `pull`: a name or a reference in a registry; empty for other addresses, which may contain a token |
//!
//! No field contains a secret or the text of an error. Without a subscriber at that level, a span
//! costs one atomic load.
//!
//! # Cargo features
//! | feature | adds |
//! | --- | --- |
//! | `qemu` (default) | the QEMU backend, on Linux |
//! | `cloud-init` (default) | the seed that cloud-init reads; without it, a spec that asks for one is refused |
//! | `propolis` | the Propolis backend and its console |
//! | `ssh` | programs, files and forwards in a guest, over SSH |
//! | `images` | images by name or address: downloads, checksums, signatures, registries |
//! | `vmfile` | files that describe machines (`vmkit.toml`) |
//!
//! The module `launch` needs `ssh` and `images`; `project` needs `vmfile` as well.
//!
//! # Examples
//! A VM's whole life, on the backend that runs nothing. With QEMU the hypervisor is a
//! [`QemuHypervisor`], and `main` calls [`run_if_keeper`] first.
//! ```
//! use std::time::Duration;
//! use vmkit::spec::{Boot, Kernel, VmName, VmSpec};
//! use vmkit::{Hypervisor, NoopHypervisor, VmState};
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> vmkit::Result<()> {
//! let hypervisor = NoopHypervisor::new();
//! let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: "console=ttyS0".into() };
//! let spec = VmSpec::builder(VmName::new("job-17")?).boot(Boot::Kernel(kernel)).cpus(2).build()?;
//! let vm = hypervisor.prepare(&spec).await?;
//! let vm = hypervisor.start(&vm).await?;
//! assert_eq!(hypervisor.state(&vm).await?, VmState::Running);
//! let vm = hypervisor.stop(&vm, Duration::from_secs(30)).await?;
//! hypervisor.destroy(vm).await
//! # }
//! ```

pub mod abilities;
#[cfg(feature = "images")]
mod archive;
mod backend;
mod backend_tag;
mod blocking;
mod boundedlog;
#[cfg(any(feature = "ssh", all(target_os = "linux", feature = "qemu")))]
mod clock;
pub mod cloud_init;
pub mod console;
mod deadline;
mod disk_files;
pub mod error;
mod flock;
mod handle;
pub mod host;
mod hypervisor;
pub mod image;
mod image_format;
mod input_file;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod kernel_file;
#[cfg(all(feature = "images", feature = "ssh"))]
pub mod launch;
pub mod lifecycle;
mod log_position;
mod logreader;
mod manager;
mod misplacement;
pub mod network;
#[cfg(feature = "images")]
mod output_file;
mod program;
#[cfg(all(feature = "images", feature = "ssh", feature = "vmfile"))]
pub mod project;
#[cfg(feature = "propolis")]
pub mod propolis;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub mod qemu;
#[cfg(any(feature = "images", all(target_os = "linux", feature = "qemu")))]
mod room;
mod span;
pub mod spec;
#[cfg(feature = "ssh")]
pub mod ssh;
mod steps;
pub mod store;
mod sys;
#[cfg(feature = "vmfile")]
pub mod vmfile;

pub use abilities::{Abilities, Capabilities, PortForwarding};
pub use backend::noop::NoopHypervisor;
#[cfg(feature = "propolis")]
pub use backend::propolis::PropolisHypervisor;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub use backend::qemu::QemuHypervisor;
pub use backend::router::RouterHypervisor;
pub use backend::supervise::keeper::run_if_keeper;
pub use boundedlog::{BoundedLog, tail_of_log, tail_of_log_since};
pub use error::{Error, ErrorKind, LiveResource, LoginPart, Peer, Result, Subject};
pub use handle::{
    ActiveForward, BackendDetails, BackendTag, ConsoleEndpoint, CustomTag, RunInfo, VmHandle, VncAddress,
};
pub use hypervisor::{Backend, DynHypervisor, Hypervisor};
pub use lifecycle::{FailureCause, FailureKind, VmState};
pub use log_position::LogPosition;
pub use logreader::LogReader;
pub use manager::{AutomaticSnapshots, SnapshotSchedule, VmEntry, VmManager, WaitCondition};
#[cfg(feature = "images")]
pub use manager::{HostFilePolicy, VmExportOptions, VmExportSummary, VmImportOptions, VmImportSummary};
pub use program::{GuestExitStatus, ProgramOutput};
#[doc(hidden)]
pub use steps::set_step_hook;
