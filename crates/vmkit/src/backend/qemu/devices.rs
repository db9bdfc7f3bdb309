//! The versions of the devices that a VM has in QEMU.
//!
//! Pure. A saved guest continues only with the devices that it was saved with, in their slots. So a
//! version never changes once it was released: a later one appends devices behind those of the
//! earlier ones, which keep their slots, and the guest's names for its network and disks.

use serde::{Deserialize, Serialize};

use crate::spec::MachineType;

/// The version of a VM's devices. A guest boots with the newest, and a saved one continues with its
/// own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "u32", try_from = "u32")]
#[non_exhaustive]
pub enum DeviceVersion {
    /// Console, guest agent, random numbers, disks, network and screen.
    V1,
    /// Besides, on `q35`: a generation ID; on `q35` and `virt`: PCIe root ports; on all: a memory
    /// balloon.
    V2,
}

impl DeviceVersion {
    /// The version that guests boot with.
    pub const NEWEST: Self = Self::V2;

    /// Returns the version's number, from 1.
    pub fn number(self) -> u32 {
        match self {
            DeviceVersion::V1 => 1,
            DeviceVersion::V2 => 2,
        }
    }

    /// Returns whether the guest has a generation ID, by which it notices that it continues as a
    /// copy, or from an earlier instant: the ID is new in each process, and Linux with
    /// `CONFIG_VMGENID` reseeds its random numbers then.
    ///
    /// Source: QEMU, docs/specs/vmgenid.
    pub fn has_generation_id(self, machine: MachineType) -> bool {
        // Only the ACPI tables of a PC name it.
        self >= DeviceVersion::V2 && machine == MachineType::Q35
    }

    /// Returns how many PCIe devices can be added while the guest runs: the root bus itself takes
    /// none.
    pub fn root_ports(self, machine: MachineType) -> u8 {
        match (self, machine) {
            (DeviceVersion::V1, _) | (_, MachineType::Microvm) => 0,
            (DeviceVersion::V2, MachineType::Q35 | MachineType::Virt) => ROOT_PORTS,
        }
    }

    /// Returns whether the guest's memory can be reclaimed while it runs.
    pub fn has_balloon(self) -> bool {
        self >= DeviceVersion::V2
    }
}

/// One for a controller of any number of disks, one for a network, one for a shared folder. Each is
/// half a millisecond of a start (seen with 7.2.22: 3.3 of 112 million instructions).
const ROOT_PORTS: u8 = 3;

impl From<DeviceVersion> for u32 {
    fn from(version: DeviceVersion) -> Self {
        version.number()
    }
}

impl TryFrom<u32> for DeviceVersion {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, String> {
        match number {
            1 => Ok(DeviceVersion::V1),
            2 => Ok(DeviceVersion::V2),
            _ => Err(format!(
                "the devices have version {number} (expected 1 to {})",
                DeviceVersion::NEWEST.number()
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_is_found_by_its_number_and_no_other_is() {
        for number in 1..=DeviceVersion::NEWEST.number() {
            assert_eq!(DeviceVersion::try_from(number).unwrap().number(), number);
        }
        for number in [0, DeviceVersion::NEWEST.number() + 1, u32::MAX] {
            let error = DeviceVersion::try_from(number).unwrap_err();
            assert!(error.contains(&format!("version {number} (expected 1 to")), "{error}");
        }
    }

    #[test]
    fn the_first_version_has_nothing_of_the_second() {
        for machine in [MachineType::Q35, MachineType::Microvm, MachineType::Virt] {
            let first = DeviceVersion::V1;
            assert!(!first.has_generation_id(machine) && !first.has_balloon());
            assert_eq!(first.root_ports(machine), 0);
        }
        assert!(DeviceVersion::NEWEST.has_generation_id(MachineType::Q35));
        assert!(!DeviceVersion::NEWEST.has_generation_id(MachineType::Virt));
    }
}
