//! Builds the guest `debian`: the whole distribution of this machine's release, with cloud-init,
//! SSH and the guest agent.
//!
//! It knows which packages, and how a tree becomes a disk. What is configured inside lies in
//! `xtask/guests/debian`. On Ubuntu the packages, and so the guest, are Ubuntu's.

use std::fs;
use std::path::{Path, PathBuf};

use super::manifest::{Disk, Manifest};
use super::{cmdline, packages};
use crate::error::{PathContext, Result};
use crate::host::Distribution;
use crate::programs;

const CLOUD_CFG: &str = include_str!("../../guests/debian/cloud.cfg");
const INITRAMFS_CONF: &str = include_str!("../../guests/debian/initramfs.conf");
const INITRAMFS_MODULES: &str = include_str!("../../guests/debian/initramfs.modules");
const CUSTOMIZE: &str = include_str!("../../guests/debian/customize.sh");
const IMAGE: &str = include_str!("../../guests/debian/image.sh");

/// Everything that decides what the guest is; a change of any of it is another guest.
pub(super) const RECIPE: &[&str] = &[
    CLOUD_CFG,
    INITRAMFS_CONF,
    INITRAMFS_MODULES,
    CUSTOMIZE,
    IMAGE,
    include_str!("debian.rs"),
    include_str!("cmdline.rs"),
];

/// What is installed besides a minimal system and the kernel.
const PACKAGES: &[&str] = &[
    "systemd-sysv",
    "systemd-resolved",
    "udev",
    "dbus",
    "initramfs-tools",
    "lz4",
    "openssh-server",
    "cloud-init",
    "qemu-guest-agent",
    "iproute2",
    "ca-certificates",
    "sudo",
];

/// Paths that no test reads, and that are a third of the image.
const LEFT_OUT: &[&str] = &["/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*"];

const DISK_BYTES: u64 = 2 << 30;

/// Builds the disk, the kernel and the initrd into `output`, with `scratch` for what is needed on
/// the way.
pub(super) fn build(scratch: &Path, output: &Path) -> Result<Manifest> {
    let distribution = Distribution::of_this_machine()?;
    let tarball = scratch.join("root.tar");
    install(&distribution, scratch, &tarball)?;

    let mut command = as_root("sh")?;
    command.args(["-c", IMAGE, "image.sh"]).arg(&tarball).arg(scratch).arg(format!("{}k", DISK_BYTES >> 10));
    programs::capture(&mut command)?;

    for file in ["vmlinuz", "initrd"] {
        let from = scratch.join(file);
        fs::rename(&from, output.join(file)).at("move", &from)?;
    }
    let mut convert = programs::command("qemu-img")?;
    convert.args(["convert", "-f", "raw", "-O", "qcow2"]);
    programs::capture(convert.arg(scratch.join("disk.raw")).arg(output.join("disk.qcow2")))?;
    Ok(manifest(&distribution))
}

fn manifest(distribution: &Distribution) -> Manifest {
    Manifest {
        os: distribution.pretty_name.clone(),
        kernel: PathBuf::from("vmlinuz"),
        initrd: PathBuf::from("initrd"),
        disk: Some(Disk {
            path: PathBuf::from("disk.qcow2"),
            format: "qcow2".to_owned(),
            virtual_bytes: DISK_BYTES,
        }),
        memory_mib: 512,
        machines: cmdline::machines(&["root=LABEL=root", "ro"]),
        ready_line: "vmkit-guest: ready".to_owned(),
    }
}

/// Installs the packages into a tarball, by mmdebstrap.
fn install(distribution: &Distribution, scratch: &Path, tarball: &Path) -> Result<()> {
    let overlay = write_overlay(&scratch.join("overlay"))?;
    let mut command = programs::command("mmdebstrap")?;
    command.args(["--quiet", "--variant=minbase", "--aptopt=APT::Install-Recommends \"false\""]);
    command.args(LEFT_OUT.iter().map(|path| format!("--dpkgopt=path-exclude={path}")));
    let kernel = packages::newest_kernel(distribution)?;
    command.arg(format!("--include={},{kernel}", PACKAGES.join(",")));
    // Early, so that the initramfs is made once, and as configured.
    command.arg(format!("--essential-hook=sync-in '{}' /", overlay.display()));
    // The text, not a path: without root, the hook runs as a user who can't read our directory.
    command.arg(format!("--customize-hook={CUSTOMIZE}"));
    command.arg(&distribution.codename).arg(tarball).args(package_sources()?);
    programs::capture(&mut command)?;
    Ok(())
}

/// Lays out the files that must be there before the packages are.
fn write_overlay(overlay: &Path) -> Result<PathBuf> {
    let files = [
        ("etc/cloud/cloud.cfg.d/90-vmkit.cfg", CLOUD_CFG),
        ("etc/initramfs-tools/conf.d/vmkit", INITRAMFS_CONF),
        ("usr/share/initramfs-tools/modules.d/vmkit", INITRAMFS_MODULES),
    ];
    for (name, content) in files {
        let path = overlay.join(name);
        let parent = path.parent().expect("the path was just joined");
        fs::create_dir_all(parent).at("create", parent)?;
        fs::write(&path, content).at("write", &path)?;
    }
    Ok(overlay.to_owned())
}

/// Returns the files that say where this machine gets its distribution from; a mirror nearby is in
/// them. Archives of others stay out. When there are none, mmdebstrap takes its default.
fn package_sources() -> Result<Vec<PathBuf>> {
    let candidates = [
        "/etc/apt/sources.list",
        "/etc/apt/sources.list.d/debian.sources",
        "/etc/apt/sources.list.d/ubuntu.sources",
    ];
    let mut found = Vec::new();
    for path in candidates.map(PathBuf::from).into_iter().filter(|path| path.is_file()) {
        let text = fs::read_to_string(&path).at("read", &path)?;
        if text.lines().any(|line| line.starts_with("deb ") || line.starts_with("URIs:")) {
            found.push(path);
        }
    }
    Ok(found)
}

/// Creates a command that may set owners: as root, or else under fakeroot.
fn as_root(program: &str) -> Result<std::process::Command> {
    if rustix::process::geteuid().is_root() {
        return programs::command(program);
    }
    let mut command = programs::command("fakeroot")?;
    command.arg(program);
    Ok(command)
}
