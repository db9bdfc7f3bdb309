//! What a VM boots on: the machine, the firmware or the kernel, and how its code is run.
//!
//! Pure.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The machine the guest sees, by QEMU's name for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum MachineType {
    /// The x86-64 PC with PCI Express.
    #[default]
    Q35,
    /// The small x86-64 machine without PCI; it boots a kernel directly.
    Microvm,
    /// The aarch64 board.
    Virt,
}

/// The instruction set of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// 64-bit x86.
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit Arm.
    Aarch64,
}

impl MachineType {
    /// Returns the instruction set that this machine runs.
    pub fn arch(self) -> Arch {
        match self {
            MachineType::Q35 | MachineType::Microvm => Arch::X86_64,
            MachineType::Virt => Arch::Aarch64,
        }
    }

    /// Returns the firmware that it boots with where none is named.
    pub fn usual_firmware(self) -> Firmware {
        match self {
            MachineType::Q35 | MachineType::Microvm => Firmware::Bios,
            MachineType::Virt => Firmware::Uefi,
        }
    }

    /// Returns QEMU's name of the machine.
    pub fn as_str(self) -> &'static str {
        match self {
            MachineType::Q35 => "q35",
            MachineType::Microvm => "microvm",
            MachineType::Virt => "virt",
        }
    }
}

impl Arch {
    /// Returns the name that QEMU's programs end with, such as `x86_64`.
    pub fn as_str(self) -> &'static str {
        match self {
            Arch::X86_64 => "x86_64",
            Arch::Aarch64 => "aarch64",
        }
    }
}

/// What brings up the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Boot {
    /// The firmware finds a loader on the disk.
    Firmware(Firmware),
    /// QEMU loads a kernel directly.
    Kernel(Kernel),
}

/// The firmware of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS, which comes with QEMU.
    Bios,
    /// OVMF (or AAVMF on aarch64), with a variable store of the VM's own.
    Uefi,
}

/// A kernel to load directly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The kernel image on the host.
    pub path: PathBuf,
    /// The initial ramdisk on the host.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, at most 2048 bytes.
    pub cmdline: String,
}

/// How the guest's code is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Accel {
    /// KVM where it really runs guest code on this host, TCG otherwise.
    #[default]
    Auto,
    /// KVM, or an error that says why it can't be had.
    Kvm,
    /// QEMU's own translator: slow, and works everywhere.
    Tcg,
}

impl Accel {
    /// Returns its name, such as `auto`.
    pub fn as_str(self) -> &'static str {
        match self {
            Accel::Auto => "auto",
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }
}
