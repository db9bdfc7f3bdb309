//! What a VM's disks are made of: packed files, files that only UEFI starts.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::process::Command;

use support::{Host, answer};

#[test]
fn a_packed_file_is_refused_with_the_import_that_takes_it() {
    let host = Host::with_refusing_qemu();
    fs::write(host.file("disk"), vec![7; 3 << 20]).unwrap();
    let packed = Command::new("gzip").arg("-c").arg(host.file("disk")).output().unwrap();
    fs::write(host.file("my disk.qcow2.gz"), packed.stdout).unwrap();
    for arguments in
        [&["launch", "./my disk.qcow2.gz"][..], &["create", "web", "--image", "my disk.qcow2.gz"]]
    {
        let refused = host.vmkit(arguments);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.starts_with("error: image: \""), "{refused:?}");
        let hint =
            refused.stderr.split('`').find(|part| part.starts_with("vmkit image import")).unwrap_or_default();
        let words = hint.replace("vmkit ", "\"$0\" ").replace("NAME", "unpacked");
        let mut command = Command::new("sh");
        command.args(["-c", &words, env!("CARGO_BIN_EXE_vmkit")]).env("VMKIT_HOME", host.home());
        let imported = answer(command.current_dir(host.dir.path()).output().unwrap());
        assert_eq!(imported.code, Some(0), "{hint}: {imported:?}");
    }
    host.must(["create", "web", "--image", "unpacked", "--accel", "tcg"]);
}

#[test]
fn a_disk_file_that_only_uefi_can_start_gets_it() {
    let host = Host::with_refusing_qemu();
    let mut bytes = vec![0; 1 << 20];
    bytes[512..520].copy_from_slice(b"EFI PART");
    (bytes[512 + 72], bytes[512 + 80], bytes[512 + 84]) = (2, 4, 128);
    // C12A7328-F81F-11D2-BA4B-00A0C93EC93B, as a partition table has it.
    bytes[1024..1040].copy_from_slice(b"\x28\x73\x2a\xc1\x1f\xf8\xd2\x11\xba\x4b\x00\xa0\xc9\x3e\xc9\x3b");
    (bytes[1024 + 32], bytes[1024 + 41]) = (64, 4);
    fs::write(host.file("uefi.raw"), &bytes).unwrap();
    bytes[0] = 0xfa;
    fs::write(host.file("both.raw"), &bytes).unwrap();
    host.must(["image", "import", "uefi.raw", "--name", "ours", "--arch", "x86_64"]);
    let boots = |name: &str, options: &[&str]| {
        host.must([&["create", name, "--accel", "tcg"][..], options].concat());
        let vm: serde_json::Value = serde_json::from_str(&host.must(["info", name, "--json"])).unwrap();
        vm["boot"]["firmware"].as_str().unwrap().to_owned()
    };
    assert_eq!(boots("a", &["--image", "uefi.raw"]), "uefi");
    assert_eq!(boots("b", &["--image", "both.raw"]), "bios");
    assert_eq!(boots("c", &["--image", "uefi.raw", "--firmware", "bios"]), "bios");
    assert_eq!(boots("d", &["--image", "ours"]), "uefi");
    // Made, and then refused by this QEMU.
    fs::write(
        host.file("vmkit.toml"),
        "version = 1\nproject.name = 'p'\n[machine.e]\nimage = './uefi.raw'\naccel = 'tcg'\n",
    )
    .unwrap();
    assert_eq!(host.vmkit(["up"]).code, Some(2));
    let vm: serde_json::Value = serde_json::from_str(&host.must(["info", "p-e", "--json"])).unwrap();
    assert_eq!(vm["boot"]["firmware"], "uefi");
}
