//! What can't be run is refused with its field and what would be right, before anything is made.

use std::fs;

use vmkit::spec::{
    Accel, BackendOptions, Boot, CloudInitConfig, DataDisk, Firmware, Kernel, MachineType, Mib,
    NetworkConfig, RootDisk, UserData, VmName, VmSpec, VmSpecBuilder, Vnc,
};
use vmkit::{Error, ErrorKind, Hypervisor};

use super::world::World;

fn name() -> VmName {
    VmName::new("web").unwrap()
}

fn options(pairs: &[(&str, &str)]) -> BackendOptions {
    let mut options = BackendOptions::default();
    for (key, value) in pairs {
        options.set(*key, *value).unwrap();
    }
    options
}

async fn refusal(world: &World, spec: VmSpecBuilder) -> Error {
    let error = world.hypervisor().prepare(&spec.build().unwrap()).await.unwrap_err();
    assert_eq!(world.left(), Vec::<String>::new(), "{error}");
    error
}

#[tokio::test]
async fn what_propolis_can_not_run_is_refused_with_what_it_can() {
    let world = World::new();
    let bare = || world.bare(name());
    let kernel = Kernel { path: "/boot/vmlinuz".into(), initrd: None, cmdline: String::new() };
    let cases = [
        (bare().cpus(33), ErrorKind::InvalidInput, "1 to 32 CPUs"),
        (bare().network(NetworkConfig::default()), ErrorKind::InvalidInput, "vnic:LINK"),
        (
            bare().machine(MachineType::Virt).boot(Boot::Firmware(Firmware::Uefi)),
            ErrorKind::InvalidInput,
            "q35",
        ),
        (bare().boot(Boot::Kernel(kernel)), ErrorKind::Unsupported, "boots from a disk"),
        (bare().accel(Accel::Tcg), ErrorKind::InvalidInput, "bhyve"),
        (bare().vnc(Vnc::Loopback), ErrorKind::Unsupported, "password"),
        (bare().run_as("nobody".parse().unwrap()), ErrorKind::InvalidInput, "pfexec"),
        (
            bare().data_disks(vec![DataDisk::Fresh { size: Mib::new(1).unwrap() }; 12]),
            ErrorKind::InvalidInput,
            "12 disks",
        ),
        (bare().backend_options(options(&[("pool", "tank")])), ErrorKind::InvalidInput, "no such option"),
        (
            bare().backend_options(options(&[("dataset", "rpool/vm")])),
            ErrorKind::InvalidInput,
            "the pool of its image, `tank`",
        ),
        (
            bare().backend_options(options(&[("bootrom", "/nonexistent/OVMF.fd")])),
            ErrorKind::InvalidInput,
            "no such file",
        ),
    ];
    for (spec, kind, reason) in cases {
        let error = refusal(&world, spec).await;
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    assert!(world.host().calls().unwrap().iter().all(|call| call[..2] == ["zfs", "get"]), "nothing was made");
}

#[tokio::test]
async fn a_bootrom_that_no_server_takes_is_refused_at_create_and_at_start() {
    let world = World::new();
    let rom = world.path().join("rom.fd");
    let spec = || world.bare(name()).backend_options(options(&[("bootrom", rom.to_str().unwrap())]));
    for (bytes, told) in
        [(0, "is empty"), (5000, "5000 bytes"), (4 << 20, "4194304 bytes"), ((2 << 20) + 4096, "2101248")]
    {
        fs::write(&rom, vec![0; bytes]).unwrap();
        let error = refusal(&world, spec()).await;
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        for told in [told, rom.to_str().unwrap(), "2097152", "4096"] {
            assert!(error.to_string().contains(told), "{told}: {error}");
        }
    }
    fs::write(&rom, vec![0; 2 << 20]).unwrap();
    let propolis = world.hypervisor();
    let vm = propolis.prepare(&spec().build().unwrap()).await.unwrap();
    fs::write(&rom, vec![0; 5000]).unwrap();
    let error = propolis.start(&vm).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(!world.kernel_has(&vm), "no server was started");
    fs::write(&rom, vec![0; 4096]).unwrap();
    let vm = propolis.start(&vm).await.unwrap();
    propolis.destroy(vm).await.unwrap();
    assert_eq!(world.left(), Vec::<String>::new());
}

#[tokio::test]
async fn an_image_that_is_not_there_or_is_no_raw_disk_is_refused() {
    let world = World::new();
    let qcow2 = world.path().join("debian.qcow2");
    vmkit::image::create_blank(&qcow2, Mib::new(1).unwrap()).unwrap();
    let disk = |image: &str, size| RootDisk { image: image.into(), size };
    for (image, size, reason) in [
        ("zfs:tank/img/nope@base", None, "does not exist"),
        ("zfs:nopool/img/debian@base", None, "does not exist"),
        ("zfs:tank/img/debian", None, "POOL/DATASET@SNAPSHOT"),
        (qcow2.to_str().unwrap(), None, "a qcow2 image, and the backend `propolis` takes raw ones"),
        ("/nonexistent.raw", None, "no such file"),
    ] {
        let spec = world.bare(name()).disk(disk(image, size)).backend_options(options(&[]));
        let spec = if image.starts_with("zfs:nopool") {
            spec.backend_options(options(&[("dataset", "nopool/vm")]))
        } else {
            spec
        };
        let error = refusal(&world, spec).await;
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(reason), "{error}");
    }
    fs::write(world.path().join("two.raw"), vec![0; 2 << 20]).unwrap();
    let small = disk(world.path().join("two.raw").to_str().unwrap(), Some(Mib::new(1).unwrap()));
    let error = refusal(&world, world.bare(name()).disk(small)).await;
    assert!(error.to_string().contains("can't be smaller"), "{error}");
}

#[tokio::test]
async fn a_seed_too_large_for_a_request_is_refused_before_anything_is_created() {
    let world = World::new();
    let user_data = UserData::Raw(format!("#!/bin/sh\n# {}", "x".repeat(900_000)));
    let config = CloudInitConfig { user_data, ..CloudInitConfig::default() };
    let error = refusal(&world, world.bare(name()).cloud_init(config)).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("at most 1048576 bytes"), "{error}");
}

#[tokio::test]
async fn a_missing_link_is_named_and_what_was_created_before_it_is_removed() {
    let world = World::new();
    let network = NetworkConfig::Vnic { link: "net9".parse().unwrap() };
    let error = refusal(&world, world.bare(name()).network(network)).await;
    assert_eq!(error.kind(), ErrorKind::Host);
    assert!(error.to_string().contains("net9"), "{error}");
    assert!(world.host().calls().unwrap().iter().any(|call| call[1] == "destroy"), "the clone was undone");
}

#[tokio::test]
async fn a_host_without_zfs_is_reported_with_the_missing_program() {
    let world = World::new();
    let propolis = world.builder().search_path("/nonexistent".as_ref()).build();
    let spec: VmSpec = world.spec(name());
    let error = propolis.prepare(&spec).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Host);
    assert!(error.to_string().starts_with("zfs: not found in /nonexistent"), "{error}");
}
