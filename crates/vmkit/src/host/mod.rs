//! What this host is like, and what runs on it.

#[cfg(feature = "propolis")]
pub(crate) mod bootrom;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) mod demands;
pub mod doctor;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod facts;
mod foreign_files;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) mod holder;
pub mod inherited;
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) mod ports;
pub(crate) mod process;
#[cfg(all(target_os = "linux", feature = "qemu"))]
mod users;

#[cfg(all(target_os = "linux", feature = "qemu"))]
pub use facts::{DeviceAccess, HostFacts, KvmVerdict, ProbeOptions, QemuProgram, QemuVersion, UefiFirmware};
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) use facts::{TUN, find_program};
pub use foreign_files::ForeignFiles;
