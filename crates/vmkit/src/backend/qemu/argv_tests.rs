//! Golden command lines: whole, one argument a line, under `tests/golden/devices-N` for each
//! version of the devices. `UPDATE_GOLDEN=1` writes them again.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::devices::DeviceVersion;
use super::facts::{FirmwareFiles, ImageMedia, QemuFacts};
use super::layout::QemuLayout;
use super::plan::{RestoreStep, plan};
use super::switch::Accelerator;
use crate::image::ImageFormat;
use crate::spec::{self, Arch, BridgeName, NetworkConfig, VmName, VmSpec};

#[path = "../../../tests/real/qemu/cases.rs"]
mod cases;

fn facts(arch: Arch, accel: Accelerator, version: (u32, u32)) -> QemuFacts {
    QemuFacts {
        program: PathBuf::from(format!("/usr/bin/qemu-system-{}", arch.as_str())),
        version,
        accel,
        firmware: Some(FirmwareFiles { code: "/fw/CODE.fd".into(), vars: "/fw/VARS.fd".into() }),
        host_memory: None,
    }
}

fn line(spec: &VmSpec, accel: Accelerator, version: (u32, u32), run: &GuestRun) -> String {
    let id = Uuid::from_u128(0x5eed);
    let layout = QemuLayout::of(Path::new("/home/vms"), Path::new("/run/vmkit"), spec.name(), id).unwrap();
    let media = ImageMedia { data_formats: vec![None, Some(ImageFormat::Raw)] };
    let facts = facts(spec.machine().arch(), accel, version);
    let plan = plan(spec, id, &layout, &facts, &media, run.devices, run.restore.clone());
    assert!(plan.to_string().contains(&format!("devices of version {}\n", run.devices.number())));
    let mut text = format!("{}\n", plan.program.display());
    for arg in &plan.args {
        text.push_str(&arg.to_string_lossy());
        text.push('\n');
    }
    text
}

/// What differs between the runs of one spec.
struct GuestRun {
    devices: DeviceVersion,
    restore: Option<RestoreStep>,
}

impl GuestRun {
    fn check(&self, name: &str, spec: &VmSpec, accel: Accelerator, version: (u32, u32)) -> Option<String> {
        let dir = format!("tests/golden/devices-{}", self.devices.number());
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(dir).join(format!("{name}.argv"));
        let found = line(spec, accel, version, self);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, &found).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap_or_default();
        (golden != found).then(|| format!("{}:\n{found}", path.display()))
    }
}

fn check_all(devices: DeviceVersion) {
    let all = cases::cases(Path::new("/images"));
    let boots = GuestRun { devices, restore: None };
    let mut wrong: Vec<_> =
        all.iter().filter_map(|case| boots.check(case.name, &case.spec, Accelerator::Tcg, (7, 2))).collect();
    let tap = NetworkConfig::Tap { bridge: BridgeName::new("br0").unwrap() };
    let tap =
        VmSpec::builder(VmName::new("tap").unwrap()).disk(all[0].spec.disk().unwrap().clone()).network(tap);
    wrong.extend(boots.check("q35-kvm-tap", &tap.build().unwrap(), Accelerator::Kvm, (7, 2)));
    let other_user = &all.last().unwrap().spec;
    wrong.extend(boots.check("q35-another-user-new-qemu", other_user, Accelerator::Tcg, (10, 0)));
    let (memory, machine) = ("/home/vms/a/memory".into(), "pc-q35-7.2".to_owned());
    let continues = GuestRun { devices, restore: Some(RestoreStep { memory, machine, bytes: 1 }) };
    wrong.extend(continues.check("q35-saved", &all[0].spec, Accelerator::Tcg, (10, 0)));
    assert!(wrong.is_empty(), "not as golden (UPDATE_GOLDEN=1 writes them anew):\n{}", wrong.join("\n"));
}

#[test]
fn command_lines_are_the_golden_ones() {
    check_all(DeviceVersion::V2);
}

#[test]
fn command_lines_of_guests_with_the_first_devices_never_change() {
    check_all(DeviceVersion::V1);
}

/// A PCI device's slot is its place in the line.
#[test]
fn later_devices_stand_behind_the_earlier_ones() {
    for case in cases::cases(Path::new("/images")) {
        let [first, second] = [DeviceVersion::V1, DeviceVersion::V2]
            .map(|devices| line(&case.spec, Accelerator::Tcg, (7, 2), &GuestRun { devices, restore: None }));
        assert!(second.starts_with(&first) && second.len() > first.len(), "{}", case.name);
    }
}
