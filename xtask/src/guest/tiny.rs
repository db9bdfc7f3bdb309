//! Builds the guest `tiny`: the distribution's cloud kernel, and an initramfs of busybox, the guest
//! agent and inetd.
//!
//! It knows which packages and modules are needed, and what lies where in the initramfs. What the
//! guest does is in `xtask/guests/tiny/init`.

use std::path::{Path, PathBuf};

use super::initramfs::Initramfs;
use super::manifest::Manifest;
use super::modules::{Modules, modules_dep};
use super::{cmdline, only_entry, packages};
use crate::error::{Error, PathContext, Result};
use crate::host::Distribution;
use crate::programs;

const INIT: &str = include_str!("../../guests/tiny/init");
const GREET: &str = include_str!("../../guests/tiny/greet");
const SHUTDOWN: &str = include_str!("../../guests/tiny/shutdown");
const UDHCPC: &str = include_str!("../../guests/tiny/udhcpc");
const INETD_CONF: &str = include_str!("../../guests/tiny/etc/inetd.conf");

/// Everything that decides what the guest is; a change of any of it is another guest.
pub(super) const RECIPE: &[&str] = &[
    INIT,
    GREET,
    SHUTDOWN,
    UDHCPC,
    INETD_CONF,
    include_str!("tiny.rs"),
    include_str!("cmdline.rs"),
    include_str!("initramfs.rs"),
    include_str!("modules.rs"),
    include_str!("packages.rs"),
];

/// Modules that `init` loads, if the kernel doesn't carry them in itself.
const LOADED: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "evdev",
    "button",
    "pvpanic_pci",
    "pvpanic_mmio",
];

/// Modules that are there for `mount` and `modprobe` to find, on kernels that have them.
const AT_HAND: &[&str] = &[
    "virtio_balloon",
    "virtio_scsi",
    "sr_mod",
    "isofs",
    "ext4",
    "vfat",
    "nls_cp437",
    "nls_ascii",
    "nls_utf8",
    "nls_iso8859_1",
];

/// Builds the kernel and the initramfs into `output`, with `scratch` for what is needed on the way.
pub(super) fn build(scratch: &Path, output: &Path) -> Result<Manifest> {
    let distribution = Distribution::of_this_machine()?;
    let root = scratch.join("root");
    let mut wanted = kernel_packages(&distribution)?;
    wanted.push("busybox-static".to_owned());
    wanted.extend(packages::with_libraries(&["qemu-guest-agent", "inetutils-inetd"])?);
    packages::unpack(&wanted, &scratch.join("packages"), &root)?;

    let mut initramfs = Initramfs::new();
    add_system(&mut initramfs, &distribution);
    add_programs(&mut initramfs, &root)?;
    add_modules(&mut initramfs, &root)?;
    // Not compressed: unpacking it under TCG costs more than reading it.
    let initrd = output.join("initrd");
    std::fs::write(&initrd, initramfs.finish()).at("write", &initrd)?;

    let kernel = only_entry(&root.join("boot"), "vmlinuz-")?;
    std::fs::copy(&kernel, output.join("vmlinuz")).at("copy", &kernel)?;
    Ok(manifest(&distribution))
}

fn manifest(distribution: &Distribution) -> Manifest {
    Manifest {
        os: distribution.pretty_name.clone(),
        kernel: PathBuf::from("vmlinuz"),
        initrd: PathBuf::from("initrd"),
        disk: None,
        memory_mib: 256,
        machines: cmdline::machines(&[]),
        ready_line: "vmkit-guest: ready".to_owned(),
    }
}

/// Returns the kernel's packages: the image, and the modules where they are packed apart.
fn kernel_packages(distribution: &Distribution) -> Result<Vec<String>> {
    let mut found = packages::dependencies(&[packages::newest_kernel(distribution)?])?;
    found.retain(|name| name.starts_with("linux-image-"));
    let mut modules = packages::dependencies(&found)?;
    modules.retain(|name| name.starts_with("linux-modules-"));
    found.extend(modules);
    Ok(found)
}

/// Adds what is ours: the scripts, and the few files in /etc that programs insist on.
fn add_system(initramfs: &mut Initramfs, distribution: &Distribution) {
    for directory in ["dev", "mnt", "proc", "root", "run", "sys", "tmp", "var/log"] {
        initramfs.directory(directory);
    }
    // Before devtmpfs is mounted, PID 1 finds its console here.
    initramfs.character_device("dev/console", (5, 1));
    initramfs.symlink("var/run", "../run");
    initramfs.program("init", INIT.as_bytes());
    initramfs.program("sbin/greet", GREET.as_bytes());
    initramfs.program("sbin/shutdown", SHUTDOWN.as_bytes());
    initramfs.program("etc/udhcpc/default.script", UDHCPC.as_bytes());
    initramfs.file("etc/inetd.conf", INETD_CONF.as_bytes());
    initramfs.file("etc/passwd", b"root::0:0:root:/root:/bin/sh\n");
    initramfs.file("etc/group", b"root:x:0:\n");
    initramfs.file("etc/services", b"echo 7/tcp\necho 7/udp\n");
    initramfs.file("etc/protocols", b"tcp 6 TCP\nudp 17 UDP\n");
    let os_release = format!(
        "ID=vmkit-tiny\nNAME=\"vmkit tiny guest\"\nPRETTY_NAME=\"vmkit tiny guest, from {}\"\n",
        distribution.pretty_name
    );
    initramfs.file("etc/os-release", os_release.as_bytes());
}

/// Adds busybox under all its names, and the two programs it has no match for, with their
/// libraries.
fn add_programs(initramfs: &mut Initramfs, root: &Path) -> Result<()> {
    let busybox = first_existing(root, &["bin/busybox", "usr/bin/busybox"])?;
    initramfs.program("bin/busybox", &read(&busybox)?);
    for applet in programs::capture_text(std::process::Command::new(&busybox).arg("--list"))?.lines() {
        if applet != "busybox" {
            initramfs.symlink(&format!("bin/{applet}"), "busybox");
        }
    }
    // Where the kernel looks for it when something needs a module.
    initramfs.symlink("sbin/modprobe", "../bin/busybox");

    let agent = root.join("usr/sbin/qemu-ga");
    let inetd = root.join("usr/sbin/inetutils-inetd");
    initramfs.program("sbin/qemu-ga", &read(&agent)?);
    initramfs.program("sbin/inetd", &read(&inetd)?);
    let mut libraries = shared_libraries(&agent, root)?;
    libraries.extend(shared_libraries(&inetd, root)?);
    libraries.sort();
    libraries.dedup();
    for library in libraries {
        let name = library.file_name().expect("the loader answers files").to_string_lossy().into_owned();
        let directory = if name.starts_with("ld-linux") { "lib64" } else { "lib" };
        initramfs.program(&format!("{directory}/{name}"), &read(&library)?);
    }
    Ok(())
}

/// Asks the unpacked loader, not the host's, which libraries a program would be loaded with.
fn shared_libraries(program: &Path, root: &Path) -> Result<Vec<PathBuf>> {
    let directories =
        ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|directory| root.join(directory));
    let loader = first_existing(&directories[0], &["ld-linux-x86-64.so.2"])
        .or_else(|_| first_existing(&directories[1], &["ld-linux-x86-64.so.2"]))?;
    let path = std::env::join_paths(&directories).map_err(|_| {
        Error::unready(format!("the path {} has a colon, which the loader can't take", root.display()))
    })?;
    let mut command = std::process::Command::new(loader);
    command.arg("--library-path").arg(path).arg("--list").arg(program);
    let text = programs::capture_text(&mut command)?;
    let found = text.lines().filter_map(|line| line.split_once(" => ")).map(|(name, path)| {
        let path = path.split(" (").next().unwrap_or_default();
        let known = path.starts_with(&*root.to_string_lossy());
        if known {
            Ok(PathBuf::from(path))
        } else {
            Err(Error::failed(format!("{}: {} is in no package", program.display(), name.trim())))
        }
    });
    found.collect()
}

fn add_modules(initramfs: &mut Initramfs, root: &Path) -> Result<()> {
    let parent = ["lib/modules", "usr/lib/modules"].map(|directory| root.join(directory));
    let parent = if parent[0].is_dir() { &parent[0] } else { &parent[1] };
    let directory = only_entry(parent, "")?;
    let modules = Modules::scan(&directory)?;
    let loaded: Vec<&str> = LOADED.iter().copied().filter(|name| !modules.is_builtin(name)).collect();
    let at_hand = AT_HAND.iter().copied().filter(|name| modules.has_file(name));
    let wanted: Vec<&str> = loaded.iter().copied().chain(at_hand).collect();
    let closure = modules.closure(&wanted)?;

    let release = directory.file_name().expect("an entry of a directory has a name").to_string_lossy();
    for module in &closure {
        initramfs.file(&format!("lib/modules/{release}/{}.ko", module.name), &module.object);
    }
    initramfs.file(&format!("lib/modules/{release}/modules.dep"), modules_dep(&closure).as_bytes());
    initramfs.file("etc/modules", format!("{}\n", loaded.join(" ")).as_bytes());
    Ok(())
}

fn first_existing(root: &Path, candidates: &[&str]) -> Result<PathBuf> {
    let found = candidates.iter().map(|candidate| root.join(candidate)).find(|path| path.exists());
    found.ok_or_else(|| Error::failed(format!("none of {} in {}", candidates.join(", "), root.display())))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).at("read", path)
}
