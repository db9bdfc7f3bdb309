//! The UEFI firmware for guests that lies on this host.
//!
//! The distributions describe theirs in JSON files, in the format that QEMU's
//! `docs/interop/firmware.json` defines; where there are none, the places are known. Firmware with
//! Secure Boot is passed over: it needs a machine with SMM, and boots only signed loaders.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::spec::Arch;

/// Where descriptors lie. A file in an earlier directory hides one of the same name in a later.
///
/// Source: QEMU's `docs/interop/firmware.json`, at its end.
pub(super) const DESCRIPTOR_DIRS: [&str; 2] = ["/etc/qemu/firmware", "/usr/share/qemu/firmware"];

/// Where the firmware lies on hosts without descriptors; 4 MiB builds first, since the others can't
/// be updated to them.
const KNOWN_PLACES: [(Arch, &str, &str); 6] = [
    (Arch::X86_64, "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    (Arch::X86_64, "/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    (Arch::X86_64, "/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    (Arch::X86_64, "/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    (Arch::Aarch64, "/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
    (
        Arch::Aarch64,
        "/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw",
        "/usr/share/edk2/aarch64/vars-template-pflash.raw",
    ),
];

/// UEFI firmware of two flash images, both raw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct UefiFirmware {
    /// The guests' instruction set.
    pub arch: Arch,
    /// The code, which all VMs share and none writes to.
    pub code: PathBuf,
    /// The empty variable store, of which each VM gets a copy.
    pub vars: PathBuf,
}

/// One descriptor; only what is asked of it here, so that new fields do no harm.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FirmwareDescriptor {
    interface_types: Vec<String>,
    mapping: FirmwareMapping,
    targets: Vec<FirmwareTarget>,
    features: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FirmwareMapping {
    device: String,
    /// `split` where it is missing: that is older than the other modes.
    mode: Option<String>,
    executable: Option<FlashFile>,
    nvram_template: Option<FlashFile>,
}

#[derive(Debug, Deserialize)]
struct FlashFile {
    filename: PathBuf,
    format: String,
}

#[derive(Debug, Deserialize)]
struct FirmwareTarget {
    architecture: String,
    machines: Vec<String>,
}

impl FirmwareDescriptor {
    /// Returns the firmware where this describes one that a plain VM of this instruction set boots
    /// with.
    fn fits(&self, arch: Arch) -> Option<UefiFirmware> {
        const NOT_FOR_US: [&str; 5] =
            ["secure-boot", "requires-smm", "enrolled-keys", "intel-tdx", "amd-sev-snp"];
        let usable = self.interface_types.iter().any(|kind| kind == "uefi")
            && self.mapping.device == "flash"
            && self.mapping.mode.as_deref().unwrap_or("split") == "split"
            && !self.features.iter().any(|feature| NOT_FOR_US.contains(&feature.as_str()));
        let meant = self.targets.iter().any(|target| {
            target.architecture == arch.as_str()
                && target.machines.iter().any(|machine| covers(machine, arch))
        });
        let code = self.mapping.executable.as_ref().filter(|file| file.format == "raw")?;
        let vars = self.mapping.nvram_template.as_ref().filter(|file| file.format == "raw")?;
        let found = UefiFirmware { arch, code: code.filename.clone(), vars: vars.filename.clone() };
        (usable && meant && found.is_there()).then_some(found)
    }
}

impl UefiFirmware {
    fn is_there(&self) -> bool {
        self.code.is_absolute() && self.vars.is_absolute() && self.code.is_file() && self.vars.is_file()
    }
}

/// Returns whether a descriptor's pattern, such as `pc-q35-*`, means the machines that vmkit makes,
/// of whatever version.
fn covers(pattern: &str, arch: Arch) -> bool {
    let family = match arch {
        Arch::X86_64 => "pc-q35-",
        Arch::Aarch64 => "virt-",
    };
    pattern.strip_suffix('*').is_some_and(|prefix| family.starts_with(prefix))
}

/// Returns the best firmware for each of these instruction sets, where there is one.
pub(super) fn find(archs: &[Arch], descriptor_dirs: &[PathBuf]) -> Vec<UefiFirmware> {
    let descriptors = descriptors(descriptor_dirs);
    let described = |arch| descriptors.iter().find_map(|descriptor| descriptor.fits(arch));
    let known = |arch| {
        let places = KNOWN_PLACES.iter().filter(|(of, ..)| *of == arch);
        let places =
            places.map(|(_, code, vars)| UefiFirmware { arch, code: code.into(), vars: vars.into() });
        places.into_iter().find(UefiFirmware::is_there)
    };
    archs.iter().filter_map(|&arch| described(arch).or_else(|| known(arch))).collect()
}

/// Reads all descriptors in the order of their file names, which is their order of preference.
fn descriptors(dirs: &[PathBuf]) -> Vec<FirmwareDescriptor> {
    let mut files: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for dir in dirs {
        // A directory that is not there has no descriptors.
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                files.entry(entry.file_name()).or_insert(path);
            }
        }
    }
    files.values().filter_map(|path| read(path)).collect()
}

fn read(path: &Path) -> Option<FirmwareDescriptor> {
    let text = fs::read(path).ok()?;
    if text.is_empty() {
        // The way to hide a descriptor of a later directory.
        return None;
    }
    match serde_json::from_slice(&text) {
        Ok(descriptor) => Some(descriptor),
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "not a firmware descriptor");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct TestHost {
        dir: tempfile::TempDir,
    }

    impl TestHost {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("etc")).unwrap();
            fs::create_dir(dir.path().join("usr")).unwrap();
            Self { dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        /// Puts a descriptor there, and the firmware that it describes.
        fn describe(&self, file: &str, machine: &str, features: &[&str], format: &str) {
            let code = self.path(&format!("{}.code", file.replace('/', "-")));
            let vars = self.path(&format!("{}.vars", file.replace('/', "-")));
            fs::write(&code, "code").unwrap();
            fs::write(&vars, "vars").unwrap();
            let text = serde_json::json!({
                "description": "UEFI firmware",
                "interface-types": ["uefi"],
                "mapping": {
                    "device": "flash",
                    "executable": { "filename": code, "format": format },
                    "nvram-template": { "filename": vars, "format": format },
                },
                "targets": [{ "architecture": "x86_64", "machines": [machine] }],
                "features": features,
                "tags": [],
            });
            fs::write(self.path(file), text.to_string()).unwrap();
        }

        fn found(&self) -> Option<PathBuf> {
            let found = descriptors(&[self.path("etc"), self.path("usr")]);
            found.iter().find_map(|descriptor| descriptor.fits(Arch::X86_64)).map(|firmware| firmware.code)
        }
    }

    #[test]
    fn the_first_descriptor_without_secure_boot_wins() {
        let host = TestHost::new();
        host.describe("usr/40-secure.json", "pc-q35-*", &["secure-boot", "requires-smm"], "raw");
        host.describe("usr/45-qcow2.json", "pc-q35-*", &[], "qcow2");
        host.describe("usr/46-microvm.json", "microvm", &[], "raw");
        host.describe("usr/70-later.json", "*", &[], "raw");
        assert_eq!(host.found(), Some(host.path("usr-70-later.json.code")));
        host.describe("usr/60-plain.json", "pc-q35-*", &["acpi-s3"], "raw");
        assert_eq!(host.found(), Some(host.path("usr-60-plain.json.code")));
    }

    #[test]
    fn an_administrators_descriptor_hides_the_distributions() {
        let host = TestHost::new();
        host.describe("usr/60-a.json", "pc-q35-*", &[], "raw");
        host.describe("usr/61-b.json", "pc-q35-*", &[], "raw");
        host.describe("etc/61-b.json", "pc-q35-*", &[], "raw");
        fs::write(host.path("etc/60-a.json"), "").unwrap();
        assert_eq!(host.found(), Some(host.path("etc-61-b.json.code")));
    }

    #[test]
    fn a_descriptor_of_missing_files_or_of_rubbish_is_passed_over() {
        let host = TestHost::new();
        host.describe("usr/60-a.json", "pc-q35-*", &[], "raw");
        fs::remove_file(host.path("usr-60-a.json.vars")).unwrap();
        fs::write(host.path("usr/50-b.json"), "{\"mapping\": 7}").unwrap();
        fs::create_dir(host.path("usr/51-c.json")).unwrap();
        assert_eq!(host.found(), None);
    }

    #[test]
    fn the_firmware_of_this_host_is_found_where_it_is_installed() {
        let dirs = DESCRIPTOR_DIRS.map(PathBuf::from);
        let found = find(&[Arch::X86_64, Arch::Aarch64], &dirs);
        if found.is_empty() {
            eprintln!("SKIP: no UEFI firmware is installed here");
        }
        for firmware in found {
            assert!(firmware.is_there(), "{firmware:?}");
            assert!(!firmware.code.to_string_lossy().contains("secboot"), "{firmware:?}");
        }
    }

    proptest! {
        #[test]
        fn any_pattern_is_compared_without_panic(pattern in any::<String>()) {
            prop_assert!(!covers(&pattern, Arch::Aarch64) || pattern.ends_with('*'));
        }
    }
}
