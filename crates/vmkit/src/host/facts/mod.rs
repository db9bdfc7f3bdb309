//! What this host is like to the QEMU backend.
//!
//! [`HostFacts`] is plain data: what follows from it is decided elsewhere, and a test writes down
//! the host that it wants. Facts go stale the moment after they were found, so nothing that is done
//! later may rely on one being still true.

mod cache;
mod firmware;
mod kvm;
mod memory;
mod programs;

use std::fs::OpenOptions;
use std::io;
use std::path::PathBuf;
use std::thread::available_parallelism;

use rustix::process::geteuid;
use rustix::system::{sysinfo, uname};
use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;
use uuid::Uuid;

pub use firmware::UefiFirmware;
pub use kvm::KvmVerdict;
pub(super) use memory::most_promised;
pub(crate) use programs::find as find_program;
pub use programs::{QemuProgram, QemuVersion};

use crate::error::{Error, Result};
use crate::host::process;
use crate::spec::{Arch, Mib};

/// The device that taps are made with.
pub(crate) const TUN: &str = "/dev/net/tun";

/// What to ask of the host, and where to look.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProbeOptions {
    /// Where programs are looked for, in this order; what is not absolute is passed over.
    pub search_path: Vec<PathBuf>,
    /// The QEMU to take, whatever else there is, and the instruction set of its guests.
    pub qemu: Option<(Arch, PathBuf)>,
    /// Where slow results are cached between processes; nowhere if `None`.
    pub cache_dir: Option<PathBuf>,
    /// The instruction sets of the guests that this is about.
    pub archs: Vec<Arch>,
    /// Whether to try KVM by running guest code.
    pub kvm: bool,
    /// Where firmware is described; a file in an earlier directory hides one of the same name in a
    /// later.
    pub firmware_dirs: Vec<PathBuf>,
}

impl ProbeOptions {
    /// Returns options to find programs on this search path, for guests of every instruction set,
    /// without trying KVM.
    pub fn new(search_path: Vec<PathBuf>) -> Self {
        Self {
            search_path,
            qemu: None,
            cache_dir: None,
            archs: vec![Arch::X86_64, Arch::Aarch64],
            kvm: false,
            firmware_dirs: firmware::DESCRIPTOR_DIRS.map(PathBuf::from).to_vec(),
        }
    }
}

/// What this host is like, as far as it was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct HostFacts {
    /// The host's own instruction set, where guests can have it too.
    pub arch: Option<Arch>,
    /// How many CPUs this process may use.
    pub cpus: u32,
    /// The memory of the host.
    pub memory: Mib,
    /// The kernel's release, such as `6.1.0-40-amd64`.
    pub kernel: String,
    /// The id of this boot.
    pub boot_id: Uuid,
    /// The user that this process acts as; 0 is root.
    pub euid: u32,
    /// Whether this process may make network devices.
    pub net_admin: bool,
    /// What taps are made with.
    pub tun: DeviceAccess,
    /// What KVM is good for, where that was asked.
    pub kvm: Option<KvmVerdict>,
    /// The QEMU programs, at most one for an instruction set.
    pub qemu: Vec<QemuProgram>,
    /// The absolute path of `qemu-img`.
    pub qemu_img: Option<PathBuf>,
    /// The UEFI firmware, at most one for an instruction set.
    pub firmware: Vec<UefiFirmware>,
}

/// Whether a device can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DeviceAccess {
    /// It opens.
    Usable,
    /// It is not there.
    Missing,
    /// It does not open.
    Denied {
        /// What the system said.
        problem: String,
    },
}

impl HostFacts {
    /// Finds out what the host is like.
    ///
    /// What is missing is a fact and no error. With a warm cache this takes some tenths of a
    /// millisecond; without, some 20 ms for each QEMU, and up to 500 ms for KVM.
    ///
    /// # Cancel safety
    /// Nothing is left behind.
    ///
    /// # Errors
    /// `Io` or `Host` where `/proc` is not mounted.
    pub async fn probe(options: &ProbeOptions) -> Result<Self> {
        let cache_dir = options.cache_dir.as_deref();
        let boot_id = process::boot_id()?;
        let kernel = uname().release().to_string_lossy().into_owned();
        let kvm = match options.kvm {
            true => Some(kvm::probe(cache_dir, boot_id, &kernel).await),
            false => None,
        };
        let qemu = programs::with_versions(qemu_paths(options)?, cache_dir).await;
        let system = sysinfo();
        let memory_bytes = system.totalram.saturating_mul(system.mem_unit.into());
        Ok(Self {
            arch: host_arch(),
            cpus: available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX)),
            memory: Mib::holding(memory_bytes),
            kernel,
            boot_id,
            euid: geteuid().as_raw(),
            net_admin: capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN)),
            tun: DeviceAccess::of(TUN),
            kvm,
            qemu,
            qemu_img: programs::find("qemu-img", &options.search_path),
            firmware: firmware::find(&options.archs, &options.firmware_dirs),
        })
    }

    /// Returns the QEMU for guests of this instruction set.
    ///
    /// # Errors
    /// `Host`, with what to install, where there is none.
    pub fn qemu(&self, arch: Arch) -> Result<&QemuProgram> {
        self.qemu.iter().find(|program| program.arch == arch).ok_or_else(|| {
            Error::host(
                qemu_name(arch),
                format!("not found in the search path; {} has it", qemu_package(arch)),
            )
        })
    }

    /// Returns the UEFI firmware for guests of this instruction set.
    ///
    /// # Errors
    /// `Host`, with what to install, where there is none.
    pub fn uefi(&self, arch: Arch) -> Result<&UefiFirmware> {
        self.firmware.iter().find(|firmware| firmware.arch == arch).ok_or_else(|| {
            Error::host(
                format!("UEFI firmware for {}", arch.as_str()),
                format!("none without Secure Boot was found; {} has it", firmware_package(arch)),
            )
        })
    }
}

impl DeviceAccess {
    fn of(path: &str) -> Self {
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(_) => DeviceAccess::Usable,
            Err(error) if error.kind() == io::ErrorKind::NotFound => DeviceAccess::Missing,
            Err(error) => DeviceAccess::Denied { problem: error.to_string() },
        }
    }
}

fn host_arch() -> Option<Arch> {
    [Arch::X86_64, Arch::Aarch64].into_iter().find(|arch| arch.as_str() == std::env::consts::ARCH)
}

fn qemu_paths(options: &ProbeOptions) -> Result<Vec<(Arch, PathBuf)>> {
    let mut paths = Vec::new();
    for &arch in &options.archs {
        let path = match &options.qemu {
            Some((of, path)) if *of == arch => {
                Some(std::path::absolute(path).map_err(Error::io("find", path))?)
            }
            _ => programs::find(&qemu_name(arch), &options.search_path),
        };
        paths.extend(path.map(|path| (arch, path)));
    }
    Ok(paths)
}

pub(in crate::host) fn qemu_name(arch: Arch) -> String {
    format!("qemu-system-{}", arch.as_str())
}

/// Returns the package of Debian and Ubuntu that has QEMU.
pub(in crate::host) fn qemu_package(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "the package qemu-system-x86",
        Arch::Aarch64 => "the package qemu-system-arm",
    }
}

/// Returns the package of Debian and Ubuntu that has the firmware.
pub(in crate::host) fn firmware_package(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "the package ovmf",
        Arch::Aarch64 => "the package qemu-efi-aarch64",
    }
}

#[cfg(test)]
impl HostFacts {
    /// Returns a host that has everything, for tests of what follows from facts.
    pub(crate) fn example() -> Self {
        let version = QemuVersion { major: 7, minor: 2, micro: 22 };
        Self {
            arch: Some(Arch::X86_64),
            cpus: 4,
            memory: Mib::new(8192).expect("8 GiB is a size"),
            kernel: "6.1.0-40-amd64".to_owned(),
            boot_id: Uuid::from_u128(7),
            euid: 1000,
            net_admin: true,
            tun: DeviceAccess::Usable,
            kvm: Some(KvmVerdict::Usable),
            qemu: [Arch::X86_64, Arch::Aarch64]
                .map(|arch| QemuProgram {
                    arch,
                    path: format!("/usr/bin/{}", qemu_name(arch)).into(),
                    version: Ok(version),
                })
                .to_vec(),
            qemu_img: Some("/usr/bin/qemu-img".into()),
            firmware: vec![
                UefiFirmware {
                    arch: Arch::X86_64,
                    code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
                    vars: "/usr/share/OVMF/OVMF_VARS_4M.fd".into(),
                },
                UefiFirmware {
                    arch: Arch::Aarch64,
                    code: "/usr/share/AAVMF/AAVMF_CODE.fd".into(),
                    vars: "/usr/share/AAVMF/AAVMF_VARS.fd".into(),
                },
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(cache_dir: &std::path::Path) -> ProbeOptions {
        let path = ["/usr/bin", "/bin", "/usr/local/bin"].map(PathBuf::from).to_vec();
        ProbeOptions { cache_dir: Some(cache_dir.to_owned()), kvm: true, ..ProbeOptions::new(path) }
    }

    #[tokio::test]
    async fn a_second_probe_finds_the_same_host() {
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        let first = HostFacts::probe(&options).await.unwrap();
        assert_eq!(HostFacts::probe(&options).await.unwrap(), first);
        assert!(first.cpus >= 1 && first.memory.mib() > 64, "{first:?}");
        assert!(first.qemu.iter().all(|program| program.path.is_absolute()), "{first:?}");
    }

    #[tokio::test]
    async fn a_host_without_qemu_is_a_fact_and_the_error_names_what_to_install() {
        let facts = HostFacts::probe(&ProbeOptions::new(Vec::new())).await.unwrap();
        assert!(facts.qemu.is_empty() && facts.qemu_img.is_none() && facts.kvm.is_none());
        let error = facts.qemu(Arch::X86_64).unwrap_err().to_string();
        assert!(
            error.starts_with("qemu-system-x86_64: ") && error.contains("qemu-system-x86 has it"),
            "{error}"
        );
        let bare = HostFacts { firmware: Vec::new(), ..HostFacts::example() };
        assert!(bare.uefi(Arch::Aarch64).unwrap_err().to_string().contains("qemu-efi-aarch64"));
    }

    #[tokio::test]
    async fn a_qemu_that_was_named_is_taken_even_if_it_does_not_work() {
        let named = PathBuf::from("/nowhere/qemu");
        let options = ProbeOptions {
            qemu: Some((Arch::X86_64, named.clone())),
            ..ProbeOptions::new(vec!["/usr/bin".into()])
        };
        let facts = HostFacts::probe(&options).await.unwrap();
        let program = facts.qemu(Arch::X86_64).unwrap();
        assert_eq!(program.path, named);
        assert!(program.version.is_err());
    }
}
