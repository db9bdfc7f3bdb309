//! Golden plans, whole, under `tests/golden/propolis`; `UPDATE_GOLDEN=1` writes them again. What
//! each asks of the server is held against the published description of its API.

use std::path::{Path, PathBuf};

use uuid::Uuid;
use vmkit_testkit::propolis::check_ensure_request;

use super::layout::PropolisLayout;
use super::options::{OptionDefaults, PropolisOptions};
use super::plan::{PropolisFacts, PropolisPlan, plan};
use crate::error::Result;
use crate::spec::{
    BackendOptions, DataDisk, LinkName, Mib, NetworkConfig, RootDisk, VmName, VmSpec, VmSpecBuilder,
};

fn options(pairs: &[(&str, &str)]) -> BackendOptions {
    let mut options = BackendOptions::default();
    pairs.iter().for_each(|(key, value)| options.set(*key, *value).unwrap());
    options
}

fn vm(image: &str) -> VmSpecBuilder {
    VmSpec::builder(VmName::new("web").unwrap())
        .disk(RootDisk { image: image.into(), size: None })
        .network(NetworkConfig::None)
}

fn vnic() -> NetworkConfig {
    NetworkConfig::Vnic { link: LinkName::new("igb0").unwrap() }
}

fn planned(spec: &VmSpec, seed: Option<Vec<u8>>) -> Result<PropolisPlan> {
    let defaults = OptionDefaults { bootrom: Some("/fw/OVMF_CODE.fd".into()), ..OptionDefaults::default() };
    let options = PropolisOptions::of(spec, &defaults)?;
    let facts = PropolisFacts {
        server: ["/usr/bin/pfexec", "/opt/propolis/bin/propolis-server"].map(str::to_owned).to_vec(),
        bootrom: "/fw/OVMF_CODE.fd".into(),
        image_bytes: 2 << 30,
        is_image_there: options.address.is_some(),
        seed,
        zvol_dir: "/dev/zvol/rdsk".into(),
    };
    let layout = PropolisLayout::of(Path::new("/home/vms"), spec.name());
    plan(spec, Uuid::from_u128(0x5eed), &options, &layout, &facts)
}

fn size(mib: u64) -> Mib {
    Mib::new(mib).unwrap()
}

/// The plans that are kept: a name, a spec, and whether cloud-init is told something.
fn cases() -> Vec<(&'static str, VmSpecBuilder, bool)> {
    let fresh = DataDisk::Fresh { size: size(64) };
    let existing = DataDisk::Existing { path: "/dev/zvol/rdsk/tank/shared".into(), readonly: true };
    let grown = RootDisk { image: "zfs:tank/img/debian@base".into(), size: Some(size(4096)) };
    vec![
        ("raw-image-alone", vm("/images/debian.raw"), false),
        ("clone-vnic-cloud-init", vm("zfs:tank/img/debian@base").network(vnic()), true),
        (
            "everything",
            vm("/unused")
                .disk(grown)
                .cpus(32)
                .memory(size(8192))
                .data_disks(vec![fresh.clone(), existing.clone()])
                .network(vnic())
                .backend_options(options(&[("dataset", "tank/vm"), ("serial-number", "rack-7")])),
            true,
        ),
        ("files-without-zfs", vm("/images/debian.raw").data_disks(vec![fresh; 11]), true),
        (
            "server-elsewhere",
            vm("/dev/zvol/rdsk/tank/web")
                .data_disks(vec![existing])
                .network(vnic())
                .backend_options(options(&[("address", "192.0.2.7:12400"), ("vnic", "web0")])),
            false,
        ),
    ]
}

#[test]
fn plans_are_the_golden_ones_and_the_server_would_understand_them() {
    let mut wrong = Vec::new();
    for (name, spec, cloud_init) in cases() {
        let plan = planned(&spec.build().unwrap(), cloud_init.then(|| vec![0; 512])).unwrap();
        check_ensure_request(&serde_json::to_value(&plan.request).unwrap())
            .unwrap_or_else(|problem| panic!("{name}: {problem}"));
        let found = format!("{}\n", serde_json::to_string_pretty(&plan).unwrap());
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/propolis")
            .join(format!("{name}.json"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &found).unwrap();
        }
        if std::fs::read_to_string(&path).unwrap_or_default() != found {
            wrong.push(format!("{}:\n{found}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "not as recorded:\n{}", wrong.join("\n"));
}

#[test]
fn a_path_that_is_no_text_is_refused_by_its_field() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let odd = PathBuf::from(OsStr::from_bytes(b"/images/\xff.raw"));
    let image = RootDisk { image: odd.clone(), size: None };
    let disk = DataDisk::Existing { path: odd, readonly: false };
    for (spec, field) in
        [(vm("/x").disk(image), "image"), (vm("/images/debian.raw").data_disks(vec![disk]), "data-disk")]
    {
        let error = planned(&spec.build().unwrap(), None).unwrap_err();
        assert_eq!(error.kind(), crate::error::ErrorKind::InvalidInput);
        assert!(error.to_string().starts_with(&format!("{field}: ")), "{error}");
    }
}

#[test]
fn only_a_serial_number_asks_for_more_than_the_first_version_of_the_api() {
    let version = |builder: VmSpecBuilder| planned(&builder.build().unwrap(), None).unwrap().api_version;
    assert_eq!(version(vm("/images/debian.raw")), "1.0.0");
    let named = vm("/images/debian.raw").backend_options(options(&[("serial-number", "7")]));
    assert_eq!(version(named), "2.0.0");
}

#[test]
fn a_seed_too_large_for_a_request_is_refused_before_anything_is_created() {
    let spec = vm("/images/debian.raw").build().unwrap();
    planned(&spec, Some(vec![0; 760 << 10])).unwrap();
    let error = planned(&spec, Some(vec![0; 1 << 20])).unwrap_err().to_string();
    assert!(error.starts_with("cloud_init: ") && error.contains("at most 1048576 bytes"), "{error}");
}

#[test]
fn what_a_propolis_can_not_have_is_refused_by_field_value_and_bound() {
    let refusal = |builder: VmSpecBuilder| planned(&builder.build().unwrap(), None).unwrap_err().to_string();
    let raw = || vm("/images/debian.raw");
    assert_eq!(refusal(raw().cpus(33)), "cpus: \"33\": Propolis gives a VM 1 to 32 CPUs");
    let user = refusal(raw().network(NetworkConfig::default()));
    assert!(user.starts_with("network: \"user\"") && user.contains("vnic:LINK"), "{user}");
    let small = RootDisk { image: "zfs:tank/img/debian@base".into(), size: Some(size(1024)) };
    assert!(
        refusal(raw().disk(small)).starts_with(
            "disk: \"1GiB\": the disk can't be smaller than its image, which has 2147483648 bytes"
        )
    );
    let elsewhere = vm("zfs:tank/img/debian@base").backend_options(options(&[("dataset", "other/vm")]));
    assert!(refusal(elsewhere).contains("a clone is in the pool of its image, `tank`"));
    let there = |pairs: &[(&str, &str)], network| {
        let mut all = vec![("address", "192.0.2.7:12400")];
        all.extend(pairs);
        vm("/there.raw").network(network).backend_options(options(&all))
    };
    let no_vnic = refusal(there(&[], vnic()));
    assert!(no_vnic.starts_with("network: \"vnic:igb0\"") && no_vnic.contains("option vnic"), "{no_vnic}");
    let no_card = refusal(there(&[("vnic", "web0")], NetworkConfig::None));
    assert!(
        no_card.starts_with("backend_options.vnic: \"web0\"") && no_card.contains("vnic:LINK"),
        "{no_card}"
    );
    let sized = RootDisk { image: "/there.raw".into(), size: Some(size(1024)) };
    assert!(refusal(there(&[], NetworkConfig::None).disk(sized)).starts_with("disk: \"1GiB\""));
    let zfs = RootDisk { image: "zfs:tank/img/debian@base".into(), size: None };
    assert!(refusal(there(&[], NetworkConfig::None).disk(zfs)).contains("/dev/zvol/rdsk/POOL/NAME"));
    let fresh = there(&[], NetworkConfig::None).data_disks(vec![DataDisk::Fresh { size: size(64) }]);
    assert!(refusal(fresh).starts_with("data_disks: \"64MiB\""));
    let disc = refusal(raw().cdrom("/images/installer.iso".into()));
    assert_eq!(
        disc,
        "the backend `propolis` does not support a CD-ROM drive (`cdrom`): give the file as a data disk with `:ro`"
    );
    let empty = refusal(raw().disk(RootDisk::empty(size(1024))));
    assert!(empty.contains("does not support an empty root disk"), "{empty}");
    for name in ["x".repeat(31) + "0", "igb".to_owned(), "0".to_owned(), "a b0".to_owned()] {
        assert!(LinkName::new(&name).is_err(), "{name}");
    }
}
