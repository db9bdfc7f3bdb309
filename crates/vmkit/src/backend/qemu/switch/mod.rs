//! QEMU's switches, one type a family, named as QEMU names them.
//!
//! Pure. Conventions: a value that QEMU reads as a property list (`-device`, `-blockdev`,
//! `-netdev`, …) is a [`PropertyList`], which doubles every comma of a value and keeps the order in
//! which properties were added. Exceptions, which QEMU takes as they are: `-kernel`, `-initrd`,
//! `-append`, `-m`, `-uuid`. Nothing else in the crate writes a comma.
//!
//! Source: QEMU's `qemu-options.hx`; `docs/system/invocation`.

mod chardev;
mod device;
mod machine;
mod netdev;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

pub(crate) use chardev::{Chardev, EventChannel, Monitor, VncServer};
pub(crate) use device::{Blockdev, DeviceSwitch, Rng};
pub use machine::Accelerator;
pub(crate) use machine::{Cpu, DirectKernel, MachineSwitch, Sandbox};
pub(crate) use netdev::{Netdev, hostfwd};

/// The arguments of one QEMU, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct QemuArgs(Vec<OsString>);

impl QemuArgs {
    /// Adds a switch without a value.
    pub(crate) fn flag(&mut self, switch: &str) {
        self.0.push(switch.into());
    }

    /// Adds a switch and its value as it is.
    pub(crate) fn plain(&mut self, switch: &str, value: impl AsRef<OsStr>) {
        self.0.push(switch.into());
        self.0.push(value.as_ref().to_owned());
    }

    /// Adds a switch and its property list.
    pub(crate) fn props(&mut self, switch: &str, props: PropertyList) {
        self.0.push(switch.into());
        self.0.push(props.0);
    }

    /// Returns the arguments.
    pub(crate) fn into_vec(self) -> Vec<OsString> {
        self.0
    }
}

/// A property list: a head, then `key=value` each, with the commas in values doubled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PropertyList(OsString);

impl PropertyList {
    /// Creates a list with its implied first value, such as a driver's name.
    pub(crate) fn new(head: impl AsRef<OsStr>) -> Self {
        Self(doubled_commas(head.as_ref()))
    }

    /// Creates a list that has no implied first value.
    pub(crate) fn first(key: &str, value: impl AsRef<OsStr>) -> Self {
        let mut list = OsString::from(key);
        list.push("=");
        list.push(doubled_commas(value.as_ref()));
        Self(list)
    }

    /// Adds a property.
    #[must_use]
    pub(crate) fn with(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.push(",");
        self.0.push(key);
        self.0.push("=");
        self.0.push(doubled_commas(value.as_ref()));
        self
    }

    /// Adds a property where there is a value.
    #[must_use]
    pub(crate) fn with_some(self, key: &str, value: Option<impl AsRef<OsStr>>) -> Self {
        match value {
            Some(value) => self.with(key, value),
            None => self,
        }
    }
}

/// Doubles every comma, which is how QEMU's option parser takes one in a value.
fn doubled_commas(value: &OsStr) -> OsString {
    let mut bytes = Vec::with_capacity(value.len());
    for byte in value.as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_values_are_doubled_and_those_between_are_not() {
        let props = PropertyList::new("file").with("filename", "/a,b/c,,d").with("x", "1");
        assert_eq!(props.0, "file,filename=/a,,b/c,,,,d,x=1");
    }
}
