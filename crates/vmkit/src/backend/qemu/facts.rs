//! What a plan has to know of the host, and the numbers that both sides of it agree on.
//!
//! Pure.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::switch::Accelerator;
use crate::image::ImageFormat;
use crate::spec::Mib;

/// The numbers that handed-down descriptors have in QEMU: high, so that they meet no other.
pub(crate) mod descriptor {
    use crate::backend::supervise::ALIVE_DESCRIPTOR;

    /// The lock that is held while anything runs.
    pub(crate) const ALIVE: i32 = ALIVE_DESCRIPTOR;
    /// The monitor of vmkit.
    pub(crate) const QMP: i32 = 201;
    /// The monitor for people.
    pub(crate) const MONITOR: i32 = 202;
    /// The guest agent's channel.
    pub(crate) const AGENT: i32 = 203;
    /// The serial console.
    pub(crate) const CONSOLE: i32 = 204;
    /// The pipe that the console's output is copied to.
    pub(crate) const CONSOLE_LOG: i32 = 205;
    /// The tap device.
    pub(crate) const TAP: i32 = 206;
    /// The monitor of vmkit where the runtime directory is gone.
    pub(crate) const SPARE: i32 = 207;
}

/// What a plan has to know of the host.
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
    /// The template of the variable store that each VM has a copy of.
    pub vars: PathBuf,
}

/// What was found out about the images when the VM was prepared.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct ImageMedia {
    /// For each further disk that existed: what it is.
    pub(crate) data_formats: Vec<Option<ImageFormat>>,
}
