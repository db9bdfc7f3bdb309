//! The machine itself: `-machine`, `-accel`, `-cpu`, `-smp`, `-m`, `-kernel`, `-sandbox`.
//!
//! Pure.

use serde::{Deserialize, Serialize};

use super::{PropertyList, QemuArgs};
use crate::spec::{Kernel, MachineType, Mib};

/// `-machine`: the board, and the flash nodes of its firmware.
pub(crate) struct MachineSwitch<'a> {
    pub(crate) machine: MachineType,
    /// The machine's name with its version, for a guest that was saved in it.
    pub(crate) versioned: Option<&'a str>,
    /// Whether the firmware lies in two flash nodes, `code` and `vars`.
    pub(crate) flash: bool,
}

impl MachineSwitch<'_> {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        let mut props = PropertyList::new(self.versioned.unwrap_or(self.machine.as_str()));
        props = match self.machine {
            MachineType::Q35 => props,
            // ACPI brings the power button, and devices without a word on the kernel's command
            // line.
            MachineType::Microvm => props.with("acpi", "on"),
            // `max` is the newest interrupt controller that the accelerator offers.
            MachineType::Virt => props.with("gic-version", "max"),
        };
        if self.flash {
            props = props.with("pflash0", "code").with("pflash1", "vars");
        }
        args.props("-machine", props);
    }
}

/// `-accel`: what runs the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The kernel, on the CPU itself.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accelerator {
    pub(crate) fn add_to(self, args: &mut QemuArgs) {
        args.plain("-accel", self.as_str());
    }

    /// Returns QEMU's name for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg",
        }
    }
}

/// `-cpu`, `-smp` and `-m`.
pub(crate) struct Cpu {
    pub(crate) machine: MachineType,
    pub(crate) accel: Accelerator,
    pub(crate) cpus: u32,
    pub(crate) memory: Mib,
}

impl Cpu {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        let model = match (self.accel, self.machine) {
            (Accelerator::Kvm, _) => PropertyList::new("host"),
            // Five-level page tables cost an emulated CPU one load more a walk, and buy nothing
            // below 64 TiB.
            (Accelerator::Tcg, MachineType::Q35 | MachineType::Microvm) => {
                PropertyList::new("max").with("la57", "off")
            }
            // Pointer authentication with the architecture's own cipher takes most of an emulated
            // boot.
            (Accelerator::Tcg, MachineType::Virt) => PropertyList::new("max").with("pauth-impdef", "on"),
        };
        args.props("-cpu", model);
        // One socket with all the cores: some guests are limited, or licensed, by the socket.
        let cpus = self.cpus.to_string();
        args.props(
            "-smp",
            PropertyList::new(&cpus).with("sockets", "1").with("cores", &cpus).with("threads", "1"),
        );
        args.plain("-m", format!("{}M", self.memory.mib()));
    }
}

/// `-kernel`, `-initrd`, `-append`: a kernel that QEMU loads itself.
pub(crate) struct DirectKernel<'a>(pub(crate) &'a Kernel);

impl DirectKernel<'_> {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        args.plain("-kernel", &self.0.path);
        if let Some(initrd) = &self.0.initrd {
            args.plain("-initrd", initrd);
        }
        if !self.0.cmdline.is_empty() {
            args.plain("-append", &self.0.cmdline);
        }
    }
}

/// `-sandbox`: the system calls that QEMU gives up for good.
pub(crate) struct Sandbox {
    /// Whether QEMU has to become another user first.
    pub(crate) run_as: bool,
}

impl Sandbox {
    pub(crate) fn add_to(&self, args: &mut QemuArgs) {
        // With `deny` and with `children`, `-runas` itself dies of SIGSYS (seen with 7.2.22). Once
        // it has stepped down, a process that is not root can't step up again without exec, and
        // `spawn` denies that.
        let elevate = if self.run_as { "allow" } else { "deny" };
        let props = PropertyList::new("on").with("obsolete", "deny").with("elevateprivileges", elevate);
        args.props("-sandbox", props.with("spawn", "deny").with("resourcecontrol", "deny"));
    }
}
