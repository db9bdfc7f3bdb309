//! Golden command lines: whole, one argument a line, under `tests/golden`. `UPDATE_GOLDEN=1` writes
//! them again.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::facts::{FirmwareFiles, ImageMedia, QemuFacts};
use super::layout::QemuLayout;
use super::plan::plan;
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

fn line(spec: &VmSpec, accel: Accelerator, version: (u32, u32)) -> String {
    let id = Uuid::from_u128(0x5eed);
    let layout = QemuLayout::of(Path::new("/home/vms"), Path::new("/run/vmkit"), spec.name(), id).unwrap();
    let media = ImageMedia { data_formats: vec![None, Some(ImageFormat::Raw)] };
    let plan = plan(spec, id, &layout, &facts(spec.machine().arch(), accel, version), &media, None);
    let mut text = format!("{}\n", plan.program.display());
    for arg in &plan.args {
        text.push_str(&arg.to_string_lossy());
        text.push('\n');
    }
    text
}

fn check(name: &str, found: &str) -> Option<String> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.argv"));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    (golden != found).then(|| format!("{}:\n{found}", path.display()))
}

#[test]
fn command_lines_are_the_golden_ones() {
    let mut wrong = Vec::new();
    for case in cases::cases(Path::new("/images")) {
        wrong.extend(check(case.name, &line(&case.spec, Accelerator::Tcg, (7, 2))));
    }
    let all = cases::cases(Path::new("/images"));
    let tap = NetworkConfig::Tap { bridge: BridgeName::new("br0").unwrap() };
    let tap =
        VmSpec::builder(VmName::new("tap").unwrap()).disk(all[0].spec.disk().unwrap().clone()).network(tap);
    wrong.extend(check("q35-kvm-tap", &line(&tap.build().unwrap(), Accelerator::Kvm, (7, 2))));
    let other_user = &all.last().unwrap().spec;
    wrong.extend(check("q35-another-user-new-qemu", &line(other_user, Accelerator::Tcg, (10, 0))));
    assert!(wrong.is_empty(), "not as golden (UPDATE_GOLDEN=1 writes them anew):\n{}", wrong.join("\n"));
}
