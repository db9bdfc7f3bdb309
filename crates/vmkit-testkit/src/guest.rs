//! The small guests that `cargo xtask guest` builds, as tests and demos find them.
//!
//! They lie in `$VMKIT_GUESTS`, or else in `vmkit/guests` below the user's cache directory.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use vmkit::spec::{Accel, Boot, Kernel, MachineType, Mib, RootDisk, VmName, VmSpec, VmSpecBuilder};

/// A guest that was built from distribution packages.
#[derive(Debug, Clone)]
pub struct DebianGuest {
    /// The kernel image.
    pub kernel: PathBuf,
    /// The initial ramdisk.
    pub initrd: PathBuf,
    /// The root disk's image, where it has one.
    pub disk: Option<PathBuf>,
    /// The memory it is comfortable with.
    pub memory: Mib,
    /// What its console prints once userspace is there.
    pub ready_line: String,
    cmdlines: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct GuestFile {
    kernel: PathBuf,
    initrd: PathBuf,
    disk: Option<DiskFile>,
    memory_mib: u64,
    machines: BTreeMap<String, MachineFile>,
    ready_line: String,
}

#[derive(Deserialize)]
struct DiskFile {
    path: PathBuf,
}

#[derive(Deserialize)]
struct MachineFile {
    cmdline: String,
}

impl DebianGuest {
    /// Returns the kernel command line for a machine.
    ///
    /// # Panics
    /// For a machine that the guest was not built for.
    pub fn cmdline(&self, machine: MachineType) -> &str {
        let found = self.cmdlines.get(machine.as_str());
        found.unwrap_or_else(|| panic!("this guest is not for {}", machine.as_str()))
    }

    /// Returns the builder of a spec that boots this guest under TCG, with `extra` added to its
    /// kernel's command line.
    ///
    /// # Panics
    /// For a name that is none, and a machine that the guest was not built for.
    pub fn spec(&self, name: &str, machine: MachineType, extra: &str) -> VmSpecBuilder {
        let cmdline = format!("{} {extra}", self.cmdline(machine));
        let kernel = Kernel { path: self.kernel.clone(), initrd: Some(self.initrd.clone()), cmdline };
        let builder = VmSpec::builder(VmName::new(name).expect("a test's name is a name"))
            .machine(machine)
            .boot(Boot::Kernel(kernel))
            .accel(Accel::Tcg)
            .memory(self.memory);
        match &self.disk {
            Some(image) => builder.disk(RootDisk { image: image.clone(), size: None }),
            None => builder,
        }
    }
}

/// Returns the guest of a cloud kernel and a busybox, which is up in two or three seconds.
///
/// # Panics
/// Where it has not been built: `cargo xtask guest tiny` does.
pub fn tiny() -> DebianGuest {
    load("tiny")
}

/// Returns the Debian guest, with cloud-init and SSH.
///
/// # Panics
/// Where it has not been built: `cargo xtask guest debian` does.
pub fn debian() -> DebianGuest {
    load("debian")
}

fn load(name: &str) -> DebianGuest {
    let link = guests_dir().join(name);
    // The link itself leads to another guest after the next build, and an overlay keeps the path of
    // its image.
    let dir = fs::canonicalize(&link).unwrap_or(link);
    let file = dir.join("guest.json");
    let text = fs::read_to_string(&file)
        .unwrap_or_else(|error| panic!("{}: {error}; `cargo xtask guest {name}` builds it", file.display()));
    let read: GuestFile =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    DebianGuest {
        kernel: dir.join(read.kernel),
        initrd: dir.join(read.initrd),
        disk: read.disk.map(|disk| dir.join(disk.path)),
        memory: Mib::new(read.memory_mib).expect("a guest's memory is a size"),
        ready_line: read.ready_line,
        cmdlines: read.machines.into_iter().map(|(name, machine)| (name, machine.cmdline)).collect(),
    }
}

fn guests_dir() -> PathBuf {
    if let Some(dir) = env::var_os("VMKIT_GUESTS") {
        return dir.into();
    }
    let cache = env::var_os("XDG_CACHE_HOME").filter(|dir| Path::new(dir).is_absolute()).map(PathBuf::from);
    let home = || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cache");
    cache.unwrap_or_else(home).join("vmkit/guests")
}
