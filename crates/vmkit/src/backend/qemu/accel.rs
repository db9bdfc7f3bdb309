//! What runs the guest's code: KVM where it was requested, or is of use, and else QEMU's
//! translator.

use super::switch::Accelerator;
use crate::error::{Error, Result};
use crate::host::KvmVerdict;
use crate::spec::{Accel, VmSpec};

/// Returns whether KVM has to be tried for this spec.
pub(super) fn wants_kvm(spec: &VmSpec) -> Result<bool> {
    let guest = spec.machine().arch().as_str();
    let same_arch = guest == std::env::consts::ARCH;
    match spec.accel() {
        Accel::Tcg => Ok(false),
        Accel::Auto => Ok(same_arch),
        Accel::Kvm if same_arch => Ok(true),
        Accel::Kvm => {
            let why = format!(
                "KVM runs guests of the host's own architecture, {}, not {guest}",
                std::env::consts::ARCH
            );
            Err(Error::invalid("accel", "kvm", why))
        }
    }
}

pub(super) fn accelerator(spec: &VmSpec, verdict: Option<&KvmVerdict>) -> Result<Accelerator> {
    match (verdict, spec.accel()) {
        (Some(verdict), _) if verdict.is_usable() => Ok(Accelerator::Kvm),
        (Some(verdict), Accel::Kvm) => {
            Err(Error::invalid("accel", "kvm", format!("{verdict}; use tcg or auto")))
        }
        _ => Ok(Accelerator::Tcg),
    }
}
