//! Runs virtual machines.
//!
//! The heart is one trait, [`Hypervisor`]: prepare, start, stop, suspend, resume, destroy, state, guest_ip, console_endpoint.
//! [`QemuHypervisor`] implements it on Linux, [`NoopHypervisor`] in memory, [`RouterHypervisor`] over several, and anybody's
//! own backend beside them. [`VmManager`] adds what outlives a process: a record, a lock and an intent for each VM.
//!
//! What is wanted is a [`spec::VmSpec`], which is valid once it is built. What exists is a [`VmHandle`], which is plain data.
//! Where a VM is in its life is asked of reality, and [`lifecycle::next`] alone says what is legal there.
//!
//! The library prints nothing, reads no environment and keeps no state of its own. It runs on any tokio runtime with I/O
//! and time enabled.
//!
//! # Tracing
//! What goes wrong beside an operation is told by events of [`tracing`], and each operation of a [`VmManager`] that changes something is a
//! span: `create`, `start`, `stop`, `restart`, `suspend`, `resume`, `remove`, `reconfigure`, `add_forward`, `remove_forward` and
//! `rerun_cloud_init`; so are `launch`, `pull` of an image, and `up` of a machine of a file. A `launch` has the others in it. Their target is
//! `vmkit::operation`, their level `INFO`, and their fields:
//!
//! | field | what it is |
//! | --- | --- |
//! | `vm` | the VM's name; empty for a `launch` that chooses one |
//! | `id` | the VM's identity, once that is known; of a `pull`, what the disk hashes to |
//! | `outcome` | `done`, or the [`ErrorKind`] of the failure; nothing where the operation was dropped |
//! | `machine` | of `up`: its name in the file |
//! | `image` | of `pull`: a name or a place in a registry; empty for another address, which may have a token in it |
//!
//! No field has a secret, or the text of an error. Where nobody listens at that level, a span costs a look at an atomic number.
//!
//! # Cargo features
//! `qemu` and `cloud-init` are there unless left out; `propolis`, `ssh`, `images` and `vmfile` when asked for. The module `launch` takes `ssh` and
//! `images`, `project` takes `vmfile` as well. Without `cloud-init` a spec that asks for it is refused.
//!
//! # Examples
//! A VM's whole life, on the backend that runs nothing. For QEMU another hypervisor is made, and [`run_if_keeper`] called first in
//! `main`: see [`QemuHypervisor`].
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

mod backend;
mod boundedlog;
pub mod cloud_init;
pub mod console;
mod deadline;
mod error;
mod flock;
mod forwarding;
mod handle;
pub mod host;
mod hypervisor;
pub mod image;
mod input_file;
mod kernel_file;
#[cfg(all(feature = "images", feature = "ssh"))]
pub mod launch;
pub mod lifecycle;
mod manager;
pub mod network;
#[cfg(all(feature = "images", feature = "ssh", feature = "vmfile"))]
pub mod project;
mod span;
pub mod spec;
#[cfg(feature = "ssh")]
pub mod ssh;
mod steps;
pub mod store;
mod sys;
#[cfg(feature = "vmfile")]
pub mod vmfile;

pub use backend::noop::NoopHypervisor;
#[cfg(feature = "propolis")]
pub use backend::propolis::{
    HostStep, PowerOff, PropolisHypervisor, PropolisHypervisorBuilder, PropolisPlan, ServerPlan,
    instance_spec,
};
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub use backend::qemu::agent::{ExecOutput, GuestAgent, GuestExit, GuestInterface, ShutdownMode};
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub use backend::qemu::{
    Accelerator, FirmwareFiles, PrepareStep, QemuHypervisor, QemuHypervisorBuilder, QemuPlan, SocketPlan,
};
pub use backend::router::RouterHypervisor;
pub use backend::supervise::keeper::run_if_keeper;
pub use boundedlog::{LogMark, tail_of_log, tail_of_log_since};
pub use error::{Error, ErrorKind, LoginPart, Result};
pub use forwarding::PortForwarding;
pub use handle::{
    ActiveForward, BackendDetails, BackendTag, ConsoleEndpoint, CustomTag, RunInfo, VmHandle, VncAddress,
};
pub use hypervisor::{Backend, Capabilities, DynHypervisor, Hypervisor};
pub use lifecycle::{FailureCause, FailureKind, VmState};
pub use manager::{Condition, Listed, VmManager};
#[doc(hidden)]
pub use steps::set_step_hook;
