//! Specs that together use every switch: the golden lines are made from them, and the real QEMU
//! starts each.

use std::path::{Path, PathBuf};

use super::spec::{
    Accel, Boot, CloudInitConfig, DataDisk, Firmware, Kernel, MachineType, Mib, NetworkConfig, RootDisk,
    UserName, UserNetwork, VmName, VmSpec, VmSpecBuilder, Vnc,
};

/// A named spec.
pub(crate) struct Case {
    /// The golden file's name.
    pub(crate) name: &'static str,
    /// What is wanted.
    pub(crate) spec: VmSpec,
}

fn mib(mib: u64) -> Mib {
    Mib::new(mib).expect("a test's size is a size")
}

fn named(name: &str) -> VmSpecBuilder {
    VmSpec::builder(VmName::new(name).expect("a test's name is a name"))
        .id(uuid::Uuid::from_u128(0x5eed))
        .accel(Accel::Tcg)
}

fn kernel(dir: &Path) -> Boot {
    Boot::Kernel(Kernel {
        path: dir.join("vmlinuz"),
        initrd: Some(dir.join("initrd")),
        cmdline: "console=ttyS0 x=a,b".into(),
    })
}

fn disk(dir: &Path) -> RootDisk {
    RootDisk { image: dir.join("base.img"), size: Some(mib(64)) }
}

/// Returns all cases; `dir` has `base.img`, `extra, with comma.img`, `disc, with comma.iso`,
/// `vmlinuz` and `initrd`.
pub(crate) fn cases(dir: &Path) -> Vec<Case> {
    let existing: PathBuf = dir.join("extra, with comma.img");
    let forwards = ["127.0.0.1:18080:80", "5353/udp", "22"].map(|text| text.parse().expect("a forward"));
    let user = UserNetwork { forwards: forwards.into(), restrict: true };
    let all = [
        ("q35-bios-disk", named("a").disk(disk(dir))),
        (
            "q35-uefi-everything",
            named("b")
                .disk(disk(dir))
                .boot(Boot::Firmware(Firmware::Uefi))
                .cpus(3)
                .memory(mib(96))
                .data_disks(vec![
                    DataDisk::Fresh { size: mib(8) },
                    DataDisk::Existing { path: existing, readonly: true },
                ])
                .cloud_init(CloudInitConfig::default())
                .network(NetworkConfig::User(user)),
        ),
        ("q35-kernel-no-network", named("c").boot(kernel(dir)).network(NetworkConfig::None).vnc(Vnc::Off)),
        ("q35-kernel-vnc-loopback", named("d").boot(kernel(dir)).vnc(Vnc::Loopback)),
        ("microvm-kernel-disk", named("e").boot(kernel(dir)).machine(MachineType::Microvm).disk(disk(dir))),
        ("virt-kernel", named("f").boot(kernel(dir)).machine(MachineType::Virt).disk(disk(dir))),
        (
            "virt-uefi",
            named("g").boot(Boot::Firmware(Firmware::Uefi)).machine(MachineType::Virt).disk(disk(dir)),
        ),
        (
            "q35-cdrom",
            named("i")
                .disk(RootDisk::empty(mib(64)))
                .cdrom(dir.join("disc, with comma.iso"))
                .cloud_init(CloudInitConfig::default()),
        ),
        ("q35-kernel-cdrom", named("j").boot(kernel(dir)).cdrom(dir.join("disc, with comma.iso"))),
        (
            "virt-cdrom",
            named("k")
                .boot(Boot::Firmware(Firmware::Uefi))
                .machine(MachineType::Virt)
                .disk(RootDisk::empty(mib(64)))
                .cdrom(dir.join("disc, with comma.iso")),
        ),
        ("q35-another-user", named("h").boot(kernel(dir)).run_as(UserName::new("nobody").expect("a user"))),
    ];
    all.map(|(name, builder)| Case { name, spec: builder.build().expect("a test's spec is valid") }).into()
}
