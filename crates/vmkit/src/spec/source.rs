//! Where a VM comes from that is a copy of another: [`VmSource`].
//!
//! Pure.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;
use crate::spec::{SnapshotName, VmName};

/// A VM, or a snapshot of it, that others are created from: `VM` or `VM:SNAPSHOT`.
///
/// # Examples
/// ```
/// let source: vmkit::spec::VmSource = "web:ready".parse()?;
/// assert_eq!(source.snapshot.unwrap().as_str(), "ready");
/// # Ok::<(), vmkit::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSource {
    /// The VM.
    pub vm: VmName,
    /// The snapshot; without one, the VM as it is.
    pub snapshot: Option<SnapshotName>,
}

impl From<VmName> for VmSource {
    fn from(vm: VmName) -> Self {
        Self { vm, snapshot: None }
    }
}

impl FromStr for VmSource {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (vm, snapshot) = match text.split_once(':') {
            Some((vm, snapshot)) => (vm, Some(snapshot)),
            None => (text, None),
        };
        let snapshot = snapshot.map(SnapshotName::new).transpose()?;
        Ok(Self { vm: VmName::new(vm)?, snapshot })
    }
}

impl fmt::Display for VmSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.vm.fmt(f)?;
        self.snapshot.as_ref().map_or(Ok(()), |snapshot| write!(f, ":{snapshot}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_vm_or_a_snapshot_of_it() {
        let source: VmSource = "web:ready".parse().unwrap();
        assert_eq!((source.vm.as_str(), source.to_string().as_str()), ("web", "web:ready"));
        assert_eq!(source.snapshot.unwrap().as_str(), "ready");
        assert_eq!("web".parse::<VmSource>().unwrap().snapshot, None);
        for text in ["", ":ready", "web:", "web:a:b", "../web", "web:../a"] {
            assert!(text.parse::<VmSource>().is_err(), "{text}");
        }
    }
}
