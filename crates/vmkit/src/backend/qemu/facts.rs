//! What a plan needs to know of the host, and the numbers of the descriptors that QEMU inherits.
//!
//! Pure.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::switch::Accelerator;
use crate::image::ImageFormat;
use crate::spec::Mib;

/// The descriptors that QEMU inherits: high numbers, which don't collide with its own.
pub(crate) mod descriptor {
    use crate::backend::supervise::ALIVE_DESCRIPTOR;

    /// The lock that is held while anything of the VM runs.
    pub(crate) const ALIVE: i32 = ALIVE_DESCRIPTOR;
    /// vmkit's monitor.
    pub(crate) const QMP: i32 = 201;
    /// The monitor for people.
    pub(crate) const MONITOR: i32 = 202;
    /// The guest agent's channel.
    pub(crate) const AGENT: i32 = 203;
    /// The serial console.
    pub(crate) const CONSOLE: i32 = 204;
    /// The pipe for a copy of the console's output.
    pub(crate) const CONSOLE_LOG: i32 = 205;
    /// The tap device.
    pub(crate) const TAP: i32 = 206;
    /// vmkit's monitor if the runtime directory is gone.
    pub(crate) const SPARE: i32 = 207;
    /// The monitor whose events the keeper logs.
    pub(crate) const EVENTS: i32 = 208;
    /// The memory of a saved guest.
    pub(crate) const MEMORY: i32 = 209;
}

/// What a plan needs to know of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct QemuFacts {
    pub(crate) program: PathBuf,
    pub(crate) version: (u32, u32),
    pub(crate) accel: Accelerator,
    pub(crate) firmware: Option<FirmwareFiles>,
    pub(crate) host_memory: Option<Mib>,
}

/// The two files of a UEFI firmware.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirmwareFiles {
    /// The code, shared by all VMs and only read.
    pub code: PathBuf,
    /// The template of the variable store, which is copied for each VM.
    pub vars: PathBuf,
}

/// The formats of the images, as inspected when the VM was prepared.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct ImageMedia {
    /// The format of each data disk, if it is an existing one.
    pub(crate) data_formats: Vec<Option<ImageFormat>>,
}
