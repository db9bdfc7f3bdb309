//! What a VM's disks are made of: packed files, files that only UEFI starts, discs.

use std::fs;
use std::process::Command;

use crate::support::{Host, answer};

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

/// Writes the image of a disc that has a file system's mark and nothing else.
fn disc(host: &Host, name: &str) -> String {
    let mut bytes = vec![0; 40 * 2048];
    bytes[16 * 2048..16 * 2048 + 7].copy_from_slice(b"\x01CD001\x01");
    bytes[17 * 2048..17 * 2048 + 7].copy_from_slice(b"\xffCD001\x01");
    fs::write(host.file(name), bytes).unwrap();
    host.file(name)
}

fn info(host: &Host, name: &str) -> serde_json::Value {
    serde_json::from_str(&host.must(["info", name, "--json"])).unwrap()
}

#[test]
fn a_cdrom_is_put_in_changed_and_taken_out() {
    let host = Host::with_refusing_qemu();
    let (iso, other) = (disc(&host, "it, 1.iso"), disc(&host, "other.iso"));
    host.must(["create", "web", "--cdrom", "it, 1.iso", "--disk", "2GiB", "--accel", "tcg"]);
    let vm = info(&host, "web");
    assert_eq!(vm["cdrom"], *iso);
    assert_eq!(vm["disk"], serde_json::json!({"image": null, "size_mib": 2048, "readonly": false}));
    // The disc is shared, and a VM needs no disk to boot it.
    host.must(["create", "live", "--cdrom", "it, 1.iso", "--accel", "tcg"]);
    assert_eq!(info(&host, "live")["disk"], serde_json::Value::Null);
    assert!(host.must(["info", "web"]).contains("it, 1.iso"));

    assert_eq!(
        host.must(["set", "web", "--cdrom", "other.iso"]),
        format!("cdrom: {iso} -> {other}, at the next start\n")
    );
    host.must(["set", "web", "--disk", "3GiB"]);
    let refused = host.vmkit(["set", "web", "--cdrom", "missing.iso"]);
    assert_eq!((refused.code, refused.stderr.starts_with("error: cdrom: ")), (Some(2), true), "{refused:?}");
    host.must(["set", "web", "--no-cdrom"]);
    assert_eq!(info(&host, "web")["cdrom"], serde_json::Value::Null);
    let gone = host.vmkit(["start", "live"]);
    assert!(gone.stderr.contains("refused by the test"), "{gone:?}");
    fs::remove_file(&iso).unwrap();
    let gone = host.vmkit(["start", "live"]);
    assert_eq!(gone.code, Some(2));
    assert!(gone.stderr.contains(&format!("cdrom: {iso:?}: there is no such file")), "{gone:?}");
}

#[test]
fn what_is_no_disc_or_has_no_drive_is_refused_by_name() {
    let host = Host::with_refusing_qemu();
    let iso = disc(&host, "x.iso");
    fs::write(host.file("data.img"), vec![1; 4096]).unwrap();
    fs::hard_link(&iso, host.file("hard.iso")).unwrap();
    for (options, said) in [
        (&["--cdrom", "base.img"][..], "error: cdrom: \""),
        (&["--cdrom", "."], "a directory"),
        (
            &["--cdrom", "x.iso", "--machine", "microvm", "--kernel", "vmlinuz"],
            "the microvm machine type has no CD-ROM drive",
        ),
        (&["--cdrom", "x.iso", "--data-disk", "hard.iso"], "error: cdrom: \""),
        (&["--disk", "2GiB"], "error: disk: \"2GiB\": "),
        (&["--disk", "2GiB", "--kernel", "vmlinuz"], "error: disk: \"2GiB\": "),
    ] {
        let refused = host.vmkit([&["create", "new", "--accel", "tcg"][..], options].concat());
        assert_eq!(refused.code, Some(2), "{options:?}: {refused:?}");
        assert!(refused.stderr.contains(said), "{options:?}: {refused:?}");
        assert!(!host.home().join("vms/new").exists());
    }
    // A disc in the place of a disk.
    for arguments in [
        &["launch", "./x.iso"][..],
        &["create", "new", "--image", "x.iso"],
        &["image", "import", "x.iso", "--name", "installer"],
    ] {
        let refused = host.vmkit(arguments);
        assert_eq!(refused.code, Some(2), "{arguments:?}: {refused:?}");
        let hint = refused.stderr.lines().next_back().unwrap_or_default();
        let is_right = hint.contains("--cdrom ") && hint.contains("x.iso --disk 20GiB --start`");
        assert!(refused.stderr.starts_with("error: image: \"") && is_right, "{refused:?}");
    }
}

#[test]
fn a_machine_of_a_file_has_a_cdrom_and_an_empty_disk() {
    let host = Host::with_refusing_qemu();
    let iso = disc(&host, "x.iso");
    let file = |cdrom: &str| {
        let text =
            format!("version = 1\nproject.name = 'p'\n[machine.a]\n{cdrom}\ndisk = '2GiB'\naccel = 'tcg'\n");
        fs::write(host.file("vmkit.toml"), text).unwrap();
    };
    file("cdrom = './x.iso'");
    assert_eq!(host.vmkit(["up"]).code, Some(2), "made, and refused by this QEMU");
    let vm = info(&host, "p-a");
    assert_eq!((&vm["cdrom"], &vm["disk"]["size_mib"]), (&iso.into(), &2048.into()));
    file("cdrom = './missing.iso'");
    let plan = host.vmkit(["plan"]);
    assert!((plan.stdout + &plan.stderr).contains("missing.iso"));
    file("image = './x.iso'");
    let refused = host.vmkit(["up", "--recreate"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("`cdrom`"), "{refused:?}");
}

#[test]
fn a_disk_that_can_not_be_written_is_refused_unless_it_is_only_read() {
    let host = Host::with_refusing_qemu();
    let at = host.dir.path().join("fixed");
    fs::create_dir(&at).unwrap();
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: only root can mount a file system");
        return;
    }
    let script = format!(
        "mount -t tmpfs tmpfs {at} && head -c 4096 /dev/zero >{at}/d && mount -o remount,ro {at} && \
         \"$0\" create a --kernel vmlinuz --accel tcg --data-disk {at}/d:ro && \
         \"$0\" create b --kernel vmlinuz --accel tcg --data-disk {at}/d",
        at = at.display()
    );
    let mut command = Command::new("unshare");
    let own = host.command::<&str>([]);
    command.args(["--mount", "sh", "-c", &script, env!("CARGO_BIN_EXE_vmkit")]).env_clear();
    command.envs(own.get_envs().filter_map(|(key, value)| Some((key, value?))));
    // The shell's own programs as well.
    let path = format!("{}:{}", host.dir.path().join("bin").display(), std::env::var("PATH").unwrap());
    let refused = answer(command.env("PATH", path).current_dir(host.dir.path()).output().unwrap());
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(
        refused.stderr.contains("data_disks: \"") && refused.stderr.contains("read-only: add `:ro`"),
        "{refused:?}"
    );
}

#[test]
fn a_vm_on_a_disk_that_is_not_mounted_is_listed_and_keeps_its_image() {
    let host = Host::with_refusing_qemu();
    host.must(["image", "import", "base.img", "--name", "mine"]);
    host.must(["create", "web", "--image", "mine", "--accel", "tcg"]);
    // One VM, and then all of them, behind a link whose target comes and goes.
    for behind in ["vms/web", "vms"] {
        let (link, disk, mounted) = (host.home().join(behind), host.file("disk"), host.file("mounted"));
        fs::rename(&link, &disk).unwrap();
        std::os::unix::fs::symlink(&mounted, &link).unwrap();
        let said = format!("{}: this link leads to nothing: mount what it leads to", link.display());
        let refused: [&[&str]; 6] = [
            &["info", "web"],
            &["start", "web"],
            &["rm", "--force", "web"],
            &["create", "db", "--image", "mine", "--accel", "tcg"],
            &["image", "rm", "mine"],
            &["image", "prune", "--all"],
        ];
        for arguments in refused {
            if behind == "vms/web" && arguments[0] == "create" {
                // Another VM is none of its business.
                continue;
            }
            let answer = host.vmkit(arguments);
            assert_eq!(answer.code, Some(2), "{arguments:?}: {answer:?}");
            assert!(answer.stderr.contains(&said), "{arguments:?}: {answer:?}");
        }
        let listed = host.vmkit(["ls", "--json"]);
        let is_shown = listed.stdout.contains("this link leads to nothing");
        assert!(is_shown || listed.stderr.contains(&said), "{listed:?}");
        fs::rename(&disk, &mounted).unwrap();
        assert!(host.must(["ls"]).contains("web"));
        fs::remove_file(&link).unwrap();
        fs::rename(&mounted, &link).unwrap();
    }
    assert_eq!(host.vmkit(["image", "rm", "mine"]).code, Some(6));
}
