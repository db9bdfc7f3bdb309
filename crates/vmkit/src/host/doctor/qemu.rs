//! The requirements of the QEMU backend on a host.

use super::{CheckStatus, DirFacts, HostCheck, bad, ok, places};
use crate::host::facts::{
    DeviceAccess, HostFacts, KvmVerdict, QemuVersion, TUN, firmware_package, qemu_name, qemu_package,
};
use crate::spec::Arch;

/// Checks the host: KVM, QEMU, its tools, the network, and the directories of VMs and their
/// sockets.
///
/// Pure over the given facts. The facts need a probe of KVM, or its check is a warning.
pub fn diagnose(facts: &HostFacts, home: &DirFacts, runtime: &DirFacts) -> Vec<HostCheck> {
    let mut checks = vec![kvm(facts)];
    for arch in [Arch::X86_64, Arch::Aarch64] {
        // QEMU for a foreign architecture is optional.
        if facts.arch == Some(arch) || facts.qemu.iter().any(|program| program.arch == arch) {
            checks.push(qemu(facts, arch));
            checks.push(uefi(facts, arch));
        }
    }
    checks.extend([qemu_img(facts), tun(facts)]);
    checks.extend(places(home, runtime, facts.euid));
    checks
}

fn kvm(facts: &HostFacts) -> HostCheck {
    const SLOW: &str = "until then guests run under TCG, which is many times slower";
    let Some(verdict) = &facts.kvm else {
        return bad("kvm", CheckStatus::Warn, "KVM was not probed", "probe the host with `kvm` set");
    };
    let advice = match verdict {
        KvmVerdict::Usable => return ok("kvm", verdict.to_string()),
        KvmVerdict::Missing => {
            "enable virtualisation in the host's firmware and load kvm_intel or kvm_amd; in a virtual \
             machine, enable nested virtualisation on its host"
        }
        KvmVerdict::Denied { .. } => {
            "add this user to the group kvm (`usermod -aG kvm USER`) and log in again"
        }
        KvmVerdict::Broken { .. } => {
            "this host seems to be a virtual machine itself: enable nested virtualisation on its host, or \
             use another host"
        }
    };
    bad("kvm", CheckStatus::Warn, verdict.to_string(), format!("{advice}; {SLOW}"))
}

fn qemu(facts: &HostFacts, arch: Arch) -> HostCheck {
    let name = qemu_name(arch);
    let install = format!("install {}", qemu_package(arch));
    let Some(program) = facts.qemu.iter().find(|program| program.arch == arch) else {
        return bad(name, CheckStatus::Fail, "not found in the search path", install);
    };
    let path = program.path.display();
    match &program.version {
        Ok(version) if *version >= QemuVersion::OLDEST => ok(name, format!("{path}, version {version}")),
        Ok(version) => bad(
            name,
            CheckStatus::Fail,
            format!("{path}, version {version}"),
            format!("{install} in version {} or later", QemuVersion::OLDEST),
        ),
        Err(problem) => bad(
            name,
            CheckStatus::Fail,
            format!("{path}: {problem}"),
            format!("repair it, or {install} again"),
        ),
    }
}

fn uefi(facts: &HostFacts, arch: Arch) -> HostCheck {
    let name = format!("uefi-{}", arch.as_str());
    match facts.firmware.iter().find(|firmware| firmware.arch == arch) {
        Some(firmware) => ok(name, firmware.code.display().to_string()),
        None => bad(
            name,
            CheckStatus::Warn,
            "no firmware without Secure Boot was found",
            format!("install {} to boot guests with UEFI", firmware_package(arch)),
        ),
    }
}

fn qemu_img(facts: &HostFacts) -> HostCheck {
    match &facts.qemu_img {
        Some(path) => ok("qemu-img", path.display().to_string()),
        None => bad(
            "qemu-img",
            CheckStatus::Warn,
            "not found in the search path",
            "install the package qemu-utils, to convert and check images",
        ),
    }
}

fn tun(facts: &HostFacts) -> HostCheck {
    const OTHERWISE: &str = "user networking works without";
    let (found, advice) = match &facts.tun {
        DeviceAccess::Usable if facts.net_admin => {
            return ok("tun", format!("{TUN} opens, and this user may create network devices"));
        }
        DeviceAccess::Usable => (
            "this user may not create network devices (CAP_NET_ADMIN)".to_owned(),
            "run vmkit as root for VMs on a bridge",
        ),
        DeviceAccess::Missing => (format!("there is no {TUN}"), "load the module tun for VMs on a bridge"),
        DeviceAccess::Denied { problem } => {
            (format!("{TUN} can't be opened: {problem}"), "run vmkit as root for VMs on a bridge")
        }
    };
    bad("tun", CheckStatus::Warn, found, format!("{advice}; {OTHERWISE}"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::dir;
    use super::*;

    fn on(facts: &HostFacts) -> Vec<HostCheck> {
        diagnose(facts, &dir("/home/me/vms"), &dir("/run/user/1000/vmkit"))
    }

    fn named(checks: Vec<HostCheck>, name: &str) -> HostCheck {
        checks.into_iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no check named {name}"))
    }

    #[test]
    fn a_host_that_has_everything_needs_no_advice() {
        for check in on(&HostFacts::example()) {
            assert_eq!((check.status, &check.advice), (CheckStatus::Ok, &None), "{check:?}");
        }
    }

    #[test]
    fn whatever_is_not_right_comes_with_advice() {
        let old = "6.2.0".parse().unwrap();
        let good = HostFacts::example();
        let with_version = |version| {
            let mut facts = good.clone();
            facts.qemu[0].version = version;
            facts
        };
        let with_kvm = |kvm| HostFacts { kvm, ..good.clone() };
        let broken = KvmVerdict::Broken { reason: "KVM_EXIT_INTERNAL_ERROR".to_owned() };
        let denied = KvmVerdict::Denied { problem: "Permission denied".to_owned() };
        for (facts, name, status, found, advice) in [
            (with_kvm(Some(KvmVerdict::Missing)), "kvm", CheckStatus::Warn, "no /dev/kvm", "firmware"),
            (with_kvm(Some(denied)), "kvm", CheckStatus::Warn, "Permission denied", "group kvm"),
            (with_kvm(Some(broken)), "kvm", CheckStatus::Warn, "INTERNAL_ERROR", "nested"),
            (with_kvm(None), "kvm", CheckStatus::Warn, "not probed", "kvm"),
            (
                HostFacts { qemu: Vec::new(), ..good.clone() },
                "qemu-system-x86_64",
                CheckStatus::Fail,
                "not found",
                "qemu-system-x86",
            ),
            (with_version(Ok(old)), "qemu-system-x86_64", CheckStatus::Fail, "6.2.0", "7.2.0 or later"),
            (with_version(Err("no".to_owned())), "qemu-system-x86_64", CheckStatus::Fail, "no", "repair"),
            (
                HostFacts { firmware: Vec::new(), ..good.clone() },
                "uefi-x86_64",
                CheckStatus::Warn,
                "no firmware",
                "ovmf",
            ),
            (
                HostFacts { qemu_img: None, ..good.clone() },
                "qemu-img",
                CheckStatus::Warn,
                "not found",
                "qemu-utils",
            ),
            (
                HostFacts { tun: DeviceAccess::Missing, ..good.clone() },
                "tun",
                CheckStatus::Warn,
                "no /dev/net/tun",
                "module tun",
            ),
            (
                HostFacts { net_admin: false, ..good.clone() },
                "tun",
                CheckStatus::Warn,
                "CAP_NET_ADMIN",
                "root",
            ),
        ] {
            let check = named(on(&facts), name);
            assert_eq!(check.status, status, "{check:?}");
            assert!(check.found.contains(found), "{check:?}");
            assert!(check.advice.as_deref().unwrap_or_default().contains(advice), "{check:?}");
        }
    }

    #[test]
    fn the_qemu_of_a_foreign_instruction_set_is_not_missed() {
        let facts = HostFacts { qemu: Vec::new(), ..HostFacts::example() };
        assert!(on(&facts).iter().all(|check| !check.name.contains("aarch64")));
    }
}
