//! Whether this host is fit to run VMs, and what to do where it is not.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, StatVfsMountFlags, access, statvfs};
use serde::Serialize;

use crate::host::{
    DeviceAccess, HostFacts, KvmVerdict, QemuVersion, TUN, firmware_package, qemu_name, qemu_package,
};
use crate::spec::Arch;

/// Less room than this for VMs is worth a warning.
const LITTLE_ROOM_BYTES: u64 = 2 << 30;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// What it is about, such as `kvm`.
    pub name: String,
    /// How it stands.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do about it, where there is something to do.
    pub advice: Option<String>,
}

/// How a thing that was looked at stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// VMs run, and something is slower or can't be had.
    Warn,
    /// VMs don't run.
    Fail,
}

/// What a directory that vmkit keeps its things in is like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DirFacts {
    /// The directory.
    pub path: PathBuf,
    /// Its owner and permission bits, where it is there already.
    pub present: Option<Ownership>,
    /// Why nothing can be made in it, or in the directory that it would be made in.
    pub unwritable: Option<String>,
    /// The room on its file system that this user may fill, in bytes.
    pub free_bytes: Option<u64>,
}

/// Whose a directory is and who else may use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Ownership {
    /// The owner's user id.
    pub uid: u32,
    /// The permission bits.
    pub mode: u32,
}

impl DirFacts {
    /// Looks at a directory; where it is not there yet, at the nearest one above, which it would be made in.
    pub fn probe(path: &Path) -> Self {
        let mut unwritable = None;
        let mut free_bytes = None;
        match path.ancestors().find(|above| above.symlink_metadata().is_ok()) {
            None => unwritable = Some("nothing of this path exists".to_owned()),
            Some(above) if !above.is_dir() => {
                unwritable = Some(format!("{} is not a directory", above.display()))
            }
            Some(above) => {
                if let Err(errno) = access(above, Access::WRITE_OK | Access::EXEC_OK) {
                    unwritable = Some(format!("{}: {}", above.display(), std::io::Error::from(errno)));
                }
                if let Ok(found) = statvfs(above) {
                    free_bytes = Some(found.f_bavail.saturating_mul(found.f_frsize));
                    // Root may write everywhere but here.
                    if found.f_flag.contains(StatVfsMountFlags::RDONLY) {
                        unwritable = Some(format!("{} is on a read-only file system", above.display()));
                    }
                }
            }
        }
        let present = fs::metadata(path).ok();
        let present = present.map(|found| Ownership { uid: found.uid(), mode: found.mode() & 0o7777 });
        Self { path: path.to_owned(), present, unwritable, free_bytes }
    }
}

/// Judges the host: KVM, QEMU, its tools, the network, and the two directories in which VMs are kept and run.
///
/// Pure over what was found. Ask for KVM in the facts, or its check says that nobody tried.
pub fn diagnose(facts: &HostFacts, home: &DirFacts, runtime: &DirFacts) -> Vec<Check> {
    let mut checks = vec![kvm(facts)];
    for arch in [Arch::X86_64, Arch::Aarch64] {
        // QEMU for a foreign instruction set is nothing that anybody has to have.
        if facts.arch == Some(arch) || facts.qemu.iter().any(|program| program.arch == arch) {
            checks.push(qemu(facts, arch));
            checks.push(uefi(facts, arch));
        }
    }
    checks.extend([qemu_img(facts), tun(facts), writable("home", home), private(facts, runtime), room(home)]);
    checks
}

fn ok(name: impl Into<String>, found: impl Into<String>) -> Check {
    Check { name: name.into(), status: Status::Ok, found: found.into(), advice: None }
}

fn bad(
    name: impl Into<String>,
    status: Status,
    found: impl Into<String>,
    advice: impl Into<String>,
) -> Check {
    Check { name: name.into(), status, found: found.into(), advice: Some(advice.into()) }
}

fn kvm(facts: &HostFacts) -> Check {
    const SLOW: &str = "until then guests run under TCG, which is many times slower";
    let Some(verdict) = &facts.kvm else {
        return bad("kvm", Status::Warn, "nobody tried it", "probe the host with `kvm` set");
    };
    let advice = match verdict {
        KvmVerdict::Usable => return ok("kvm", verdict.to_string()),
        KvmVerdict::Missing => {
            "switch on virtualisation in the host's firmware and load kvm_intel or kvm_amd; in a virtual machine, have nested \
             virtualisation switched on outside"
        }
        KvmVerdict::Denied { .. } => {
            "add this user to the group kvm (`usermod -aG kvm USER`) and log in again"
        }
        KvmVerdict::Broken { .. } => {
            "this host seems to be a virtual machine itself: have nested virtualisation switched on outside, or take a host \
             that has it"
        }
    };
    bad("kvm", Status::Warn, verdict.to_string(), format!("{advice}; {SLOW}"))
}

fn qemu(facts: &HostFacts, arch: Arch) -> Check {
    let name = qemu_name(arch);
    let install = format!("install {}", qemu_package(arch));
    let Some(program) = facts.qemu.iter().find(|program| program.arch == arch) else {
        return bad(name, Status::Fail, "not found in the search path", install);
    };
    let path = program.path.display();
    match &program.version {
        Ok(version) if *version >= QemuVersion::OLDEST => ok(name, format!("{path}, version {version}")),
        Ok(version) => bad(
            name,
            Status::Fail,
            format!("{path}, version {version}"),
            format!("{install} in version {} or later", QemuVersion::OLDEST),
        ),
        Err(problem) => {
            bad(name, Status::Fail, format!("{path}: {problem}"), format!("repair it, or {install} again"))
        }
    }
}

fn uefi(facts: &HostFacts, arch: Arch) -> Check {
    let name = format!("uefi-{}", arch.as_str());
    match facts.firmware.iter().find(|firmware| firmware.arch == arch) {
        Some(firmware) => ok(name, firmware.code.display().to_string()),
        None => bad(
            name,
            Status::Warn,
            "no firmware without Secure Boot was found",
            format!("install {}, if guests shall boot by UEFI", firmware_package(arch)),
        ),
    }
}

fn qemu_img(facts: &HostFacts) -> Check {
    match &facts.qemu_img {
        Some(path) => ok("qemu-img", path.display().to_string()),
        None => bad(
            "qemu-img",
            Status::Warn,
            "not found in the search path",
            "install the package qemu-utils, to convert and check images",
        ),
    }
}

fn tun(facts: &HostFacts) -> Check {
    const OTHERWISE: &str = "user networking works without";
    let (found, advice) = match &facts.tun {
        DeviceAccess::Usable if facts.net_admin => {
            return ok("tun", format!("{TUN} opens, and this user may make network devices"));
        }
        DeviceAccess::Usable => (
            "this user may not make network devices (CAP_NET_ADMIN)".to_owned(),
            "run vmkit as root for VMs on a bridge",
        ),
        DeviceAccess::Missing => (format!("there is no {TUN}"), "load the module tun for VMs on a bridge"),
        DeviceAccess::Denied { problem } => {
            (format!("{TUN} can't be opened: {problem}"), "run vmkit as root for VMs on a bridge")
        }
    };
    bad("tun", Status::Warn, found, format!("{advice}; {OTHERWISE}"))
}

fn writable(name: &str, dir: &DirFacts) -> Check {
    let path = dir.path.display();
    match &dir.unwritable {
        None if dir.present.is_some() => ok(name, format!("{path} is writable")),
        None => ok(name, format!("{path} is not there yet and can be made")),
        Some(problem) => bad(
            name,
            Status::Fail,
            format!("{path} can't be written to: {problem}"),
            "give this user the directory, or choose another",
        ),
    }
}

/// Sockets lie there that are as good as a root shell in the guest, so nobody else may come in.
fn private(facts: &HostFacts, dir: &DirFacts) -> Check {
    let check = writable("runtime", dir);
    let Some(Ownership { uid, mode }) = dir.present else { return check };
    let path = dir.path.display();
    if uid != facts.euid {
        return bad(
            "runtime",
            Status::Fail,
            format!("{path} belongs to user {uid}, not to user {}", facts.euid),
            "remove it or choose another",
        );
    }
    if mode & 0o077 != 0 {
        return bad(
            "runtime",
            Status::Fail,
            format!("{path} is open to others (mode {mode:04o})"),
            format!("run `chmod 0700 {path}`"),
        );
    }
    check
}

fn room(home: &DirFacts) -> Check {
    let path = home.path.display();
    let Some(free) = home.free_bytes else {
        return bad("room", Status::Warn, format!("the free room of {path} is not known"), "look with `df`");
    };
    let found = format!("{:.1} GiB free for {path}", free as f64 / (1u64 << 30) as f64);
    if free < LITTLE_ROOM_BYTES {
        return bad("room", Status::Warn, found, "make room: disks of guests grow as they are written to");
    }
    ok("room", found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    fn dir(path: &str) -> DirFacts {
        DirFacts {
            path: path.into(),
            present: Some(Ownership { uid: 1000, mode: 0o700 }),
            unwritable: None,
            free_bytes: Some(LITTLE_ROOM_BYTES),
        }
    }

    fn on(facts: &HostFacts) -> Vec<Check> {
        diagnose(facts, &dir("/home/me/vms"), &dir("/run/user/1000/vmkit"))
    }

    fn named(checks: Vec<Check>, name: &str) -> Check {
        checks.into_iter().find(|check| check.name == name).unwrap_or_else(|| panic!("no check named {name}"))
    }

    #[test]
    fn a_host_that_has_everything_needs_no_advice() {
        for check in on(&HostFacts::example()) {
            assert_eq!((check.status, &check.advice), (Status::Ok, &None), "{check:?}");
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
            (with_kvm(Some(KvmVerdict::Missing)), "kvm", Status::Warn, "no /dev/kvm", "firmware"),
            (with_kvm(Some(denied)), "kvm", Status::Warn, "Permission denied", "group kvm"),
            (with_kvm(Some(broken)), "kvm", Status::Warn, "INTERNAL_ERROR", "nested"),
            (with_kvm(None), "kvm", Status::Warn, "nobody tried", "kvm"),
            (
                HostFacts { qemu: Vec::new(), ..good.clone() },
                "qemu-system-x86_64",
                Status::Fail,
                "not found",
                "qemu-system-x86",
            ),
            (with_version(Ok(old)), "qemu-system-x86_64", Status::Fail, "6.2.0", "7.2.0 or later"),
            (with_version(Err("no".to_owned())), "qemu-system-x86_64", Status::Fail, "no", "repair"),
            (
                HostFacts { firmware: Vec::new(), ..good.clone() },
                "uefi-x86_64",
                Status::Warn,
                "no firmware",
                "ovmf",
            ),
            (
                HostFacts { qemu_img: None, ..good.clone() },
                "qemu-img",
                Status::Warn,
                "not found",
                "qemu-utils",
            ),
            (
                HostFacts { tun: DeviceAccess::Missing, ..good.clone() },
                "tun",
                Status::Warn,
                "no /dev/net/tun",
                "module tun",
            ),
            (HostFacts { net_admin: false, ..good.clone() }, "tun", Status::Warn, "CAP_NET_ADMIN", "root"),
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

    #[test]
    fn directories_that_are_foreign_open_full_or_unwritable_are_named() {
        let facts = HostFacts::example();
        let good = dir("/d");
        let foreign = DirFacts { present: Some(Ownership { uid: 0, mode: 0o700 }), ..good.clone() };
        let open = DirFacts { present: Some(Ownership { uid: 1000, mode: 0o755 }), ..good.clone() };
        let sealed = DirFacts { unwritable: Some("read-only".to_owned()), ..good.clone() };
        let full = DirFacts { free_bytes: Some(LITTLE_ROOM_BYTES - 1), ..good.clone() };
        for (home, runtime, name, status, found) in [
            (&good, &foreign, "runtime", Status::Fail, "belongs to user 0"),
            (&good, &open, "runtime", Status::Fail, "mode 0755"),
            (&good, &sealed, "runtime", Status::Fail, "read-only"),
            (&sealed, &good, "home", Status::Fail, "read-only"),
            (&full, &good, "room", Status::Warn, "2.0 GiB free"),
        ] {
            let check = named(diagnose(&facts, home, runtime), name);
            assert!(check.status == status && check.found.contains(found), "{check:?}");
            assert!(check.advice.is_some(), "{check:?}");
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_judged_by_the_one_above() {
        let above = tempfile::tempdir().unwrap();
        let facts = DirFacts::probe(&above.path().join("a/b/c"));
        assert_eq!((facts.present, facts.unwritable), (None, None));
        assert!(facts.free_bytes.is_some());
        fs::write(above.path().join("file"), "").unwrap();
        let facts = DirFacts::probe(&above.path().join("file/vms"));
        assert!(facts.unwritable.unwrap().contains("file is not a directory"));
    }

    #[test]
    fn the_owner_and_the_mode_of_a_directory_are_seen() {
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), Permissions::from_mode(0o750)).unwrap();
        let present = DirFacts::probe(home.path()).present.unwrap();
        assert_eq!(present, Ownership { uid: rustix::process::geteuid().as_raw(), mode: 0o750 });
    }
}
