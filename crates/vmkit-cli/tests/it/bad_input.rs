//! Bad input: refused with the field, the value and the bound, exit code 2, and nothing left
//! behind.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::support::{Answer, Host, Transcript, answer};

/// Checks that the refusal has all of these texts, and that the home is unchanged.
fn refused(host: &Host, arguments: &[&str], said: &[&str]) -> Answer {
    let before = host.snapshot();
    let answer = host.vmkit(arguments);
    assert_eq!(answer.code, Some(2), "{arguments:?}: {answer:?}");
    assert_eq!(answer.stdout, "", "{arguments:?}");
    for said in said {
        assert!(answer.stderr.contains(said), "{arguments:?} does not say {said:?}: {}", answer.stderr);
    }
    assert!(answer.stderr.starts_with("error: "), "{}", answer.stderr);
    let after = host.snapshot();
    let left: Vec<_> = after.keys().filter(|path| before.get(*path) != after.get(*path)).collect();
    assert!(before == after, "{arguments:?} left {left:?}");
    answer
}

/// Checks that `create new` with these options is refused beside an existing VM.
fn create_refused(host: &Host, options: &[&str], said: &[&str]) {
    let mut arguments = vec!["create", "new"];
    if !options.iter().any(|option| ["--image", "--kernel"].contains(option)) {
        arguments.extend(["--kernel", "vmlinuz"]);
    }
    if !options.contains(&"--accel") {
        arguments.extend(["--accel", "tcg"]);
    }
    arguments.extend(options);
    refused(host, &arguments, said);
}

fn host() -> Host {
    let host = Host::with_refusing_qemu();
    host.create("old");
    host
}

#[test]
fn names_are_refused_before_they_meet_a_path() {
    let host = host();
    let mut transcript = Transcript::of(&host);
    for name in ["a/b", "../old", "", &"x".repeat(300), "a,b", "Web"] {
        transcript.refused(&["create", name, "--kernel", "vmlinuz"]);
    }
    for verb in ["start", "stop", "restart", "suspend", "resume", "rm", "info", "ip", "console", "logs"] {
        transcript.refused(&[verb, "../old"]);
    }
    transcript.refused(&["wait", "../old", "running"]);
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn a_name_in_use_is_refused() {
    let host = host();
    let mut transcript = Transcript::of(&host);
    for dry_run in [&[][..], &["--dry-run"]] {
        transcript.refused(&[&["create", "old", "--kernel", "vmlinuz", "--accel", "tcg"], dry_run].concat());
    }
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn images_that_are_none_are_refused_by_path() {
    let host = host();
    fs::write(host.file("empty.img"), "").unwrap();
    let corrupt = [b"QFI\xfb".as_slice(), &[0xff; 600]].concat();
    fs::write(host.file("corrupt.qcow2"), corrupt).unwrap();
    fs::create_dir(host.file("dir.img")).unwrap();
    let mut transcript = Transcript::of(&host);
    for path in ["missing.img", "dir.img", "empty.img", "corrupt.qcow2"] {
        transcript.refused(&["create", "new", "--image", path, "--accel", "tcg"]);
        transcript.refused(&["create", "new", "--image", path, "--accel", "tcg", "--dry-run"]);
    }
    transcript.refused(&["create", "new"]);
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn a_disk_that_the_vm_has_twice_is_refused_however_its_path_is_written() {
    let host = host();
    fs::write(host.file("data.img"), vec![1; 4096]).unwrap();
    fs::hard_link(host.file("data.img"), host.file("hard.img")).unwrap();
    std::os::unix::fs::symlink(host.file("base.img"), host.file("link.img")).unwrap();
    for disks in [["data.img", "data.img"], ["data.img", "hard.img:ro"], ["data.img:ro", "./bin/../hard.img"]]
    {
        let named = disks[1].trim_end_matches(":ro").rsplit('/').next().unwrap();
        let disks = ["--data-disk", &host.file(disks[0]), "--data-disk", &host.file(disks[1])];
        let said = ["error: data_disks: \"", named, "the same VM has this disk already"];
        create_refused(&host, &disks, &said);
        create_refused(&host, &[&disks[..], &["--dry-run"]].concat(), &said);
    }
    for disk in ["./base.img", "link.img"] {
        let options = ["--image", "base.img", "--data-disk", disk];
        create_refused(&host, &options, &["error: data_disks: \"", "the image of the same VM"]);
    }
    host.must(["create", "new", "--image", "base.img", "--data-disk", "link.img:ro", "--accel", "tcg"]);
}

#[test]
fn a_disk_that_belongs_to_another_vm_or_to_the_store_is_refused_by_the_name_of_what_has_it() {
    let host = host();
    fs::write(host.file("data.img"), vec![1; 4096]).unwrap();
    fs::hard_link(host.file("base.img"), host.file("hard.img")).unwrap();
    fs::copy(host.file("base.img"), host.file("copy.img")).unwrap();
    let disks = ["--image", "base.img", "--data-disk", "data.img", "--data-disk", "1GiB", "--accel", "tcg"];
    host.must([&["create", "web"][..], &disks].concat());
    create_refused(
        &host,
        &["--data-disk", "hard.img"],
        &["data_disks: \"", "hard.img", "the disk of the VM `web`"],
    );
    create_refused(
        &host,
        &["--image", "data.img"],
        &["image: \"", "data.img", "the VM `web` has this file as a data disk"],
    );
    for own in ["data-1.qcow2", "root.qcow2"] {
        let path = host.home().join("vms/web").join(own).to_str().unwrap().to_owned();
        create_refused(&host, &["--image", &path], &["image: \"", "a file of the VM `web`"]);
        create_refused(&host, &["--data-disk", &path], &["data_disks: \"", "a file of the VM `web`"]);
    }
    host.must(["image", "import", "copy.img", "--name", "ours"]);
    let kept = fs::read_dir(host.home().join("images")).unwrap().flatten();
    let kept = kept.map(|entry| entry.path().join("disk.raw")).find(|path| path.exists()).unwrap();
    let kept = kept.to_str().unwrap();
    create_refused(&host, &["--data-disk", kept], &["data_disks: \"", "a local image"]);
    // A disk that is only read may be shared.
    let options = ["--image", "hard.img", "--data-disk", "base.img:ro", "--data-disk", &format!("{kept}:ro")];
    host.must([&["create", "db", "--accel", "tcg"][..], &options].concat());
    // Two VMs may share a disk that only one of them uses at a time.
    host.must(["create", "cache", "--kernel", "vmlinuz", "--data-disk", "data.img", "--accel", "tcg"]);
}

#[test]
fn an_image_that_changed_under_a_vm_is_refused_at_its_start_with_what_changed() {
    let host = host();
    fs::write(host.file("mine.img"), vec![7; 1 << 20]).unwrap();
    host.must(["create", "web", "--image", "mine.img", "--accel", "tcg"]);
    let starts = || {
        let answer = host.vmkit(["start", "web"]);
        assert_eq!(answer.code, Some(2), "{answer:?}");
        answer.stderr
    };
    let own_qemu = "refused by the test";
    assert!(starts().contains(own_qemu));
    // Written again with the same bytes, and moved away and back.
    fs::write(host.file("mine.img"), vec![7; 1 << 20]).unwrap();
    fs::rename(host.file("mine.img"), host.file("away.img")).unwrap();
    fs::copy(host.file("away.img"), host.file("mine.img")).unwrap();
    assert!(starts().contains(own_qemu));
    let change: [(&str, &dyn Fn()); 4] = [
        ("the size is the same, the content is not", &|| {
            let mut bytes = vec![7; 1 << 20];
            bytes[700_000] = 8;
            fs::write(host.file("mine.img"), bytes).unwrap();
        }),
        ("from 1048576 bytes to 524288", &|| fs::write(host.file("mine.img"), vec![7; 1 << 19]).unwrap()),
        ("no such file", &|| fs::remove_file(host.file("mine.img")).unwrap()),
        ("a directory", &|| fs::create_dir(host.file("mine.img")).unwrap()),
    ];
    for (said, change) in change {
        change();
        let text = starts();
        let first = text.lines().next().unwrap();
        assert!(first.starts_with(&format!("error: image: {:?}: ", host.file("mine.img"))), "{text}");
        assert!(first.contains(said) && first.contains("`web`") && first.contains("restore "), "{text}");
        assert!(!text.contains(own_qemu), "{text}");
    }
    fs::remove_dir(host.file("mine.img")).unwrap();
    fs::rename(host.file("away.img"), host.file("mine.img")).unwrap();
    assert!(starts().contains(own_qemu), "the old image is back");
}

#[test]
fn other_files_that_are_gone_are_named_at_the_start() {
    let host = host();
    for name in ["k", "i", "data.img"] {
        fs::write(host.file(name), vmkit_testkit::paper_kernel()).unwrap();
    }
    let options = ["--kernel", "k", "--initrd", "i", "--data-disk", "data.img", "--accel", "tcg"];
    host.must([&["create", "web"][..], &options].concat());
    for (name, field) in [("data.img", "data_disks"), ("i", "initrd"), ("k", "kernel")] {
        fs::remove_file(host.file(name)).unwrap();
        let answer = host.vmkit(["start", "web"]);
        let said = format!("error: web: {field}: {:?}: there is no such file\n", host.file(name));
        assert_eq!((answer.code, &*answer.stderr), (Some(2), &*said));
    }
    let row = host.must(["ls"]);
    assert!(row.contains("web") && row.lines().all(|line| line.len() < 120), "{row}");
}

/// Writes the header of a qcow2 image, version 2, of 1 MiB, with a backing file.
fn qcow2_over(backing: &str) -> Vec<u8> {
    let mut image = vec![0; 0x40000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &2u32.to_be_bytes());
    put(8, &0x200u64.to_be_bytes());
    put(16, &(backing.len() as u32).to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &(1u64 << 20).to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &0x30000u64.to_be_bytes());
    put(48, &0x10000u64.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(0x200, backing.as_bytes());
    put(0x10000, &0x20000u64.to_be_bytes());
    image
}

#[test]
fn an_image_over_another_file_is_refused_whether_that_is_there_or_not() {
    let host = host();
    let mut transcript = Transcript::of(&host);
    for backing in ["/etc/hostname", "/nowhere/base.img", "base.img"] {
        fs::write(host.file("child.qcow2"), qcow2_over(backing)).unwrap();
        transcript.refused(&["create", "new", "--image", "child.qcow2", "--accel", "tcg"]);
    }
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn sizes_and_counts_are_refused_with_their_bounds() {
    let host = host();
    let mut transcript = Transcript::of(&host);
    for option in [
        ["--cpus", "0"],
        ["--cpus", "10000"],
        ["--cpus", "-1"],
        ["--cpus", "99999999999"],
        ["--memory", "0"],
        ["--memory", "4 GB?"],
        ["--data-disk", "0"],
        ["--network", "tap:no-such-br"],
        ["--network", "tap:a/b"],
        ["--network", "wifi"],
        ["--forward", "0:22"],
        ["--forward", "70000:22"],
        ["--machine", "pc"],
        ["--kernel", "nowhere/vmlinuz"],
        ["--kernel", "bin"],
    ] {
        let kernel: &[&str] = if option[0] == "--kernel" { &[] } else { &["--kernel", "vmlinuz"] };
        transcript.refused(&[&["create", "new", "--accel", "tcg"], kernel, &option].concat());
    }
    transcript.refused(&["create", "new", "--image", "base.img", "--disk", "1MiB", "--accel", "tcg"]);
    transcript.refused(&["stop", "old", "--timeout", "soon"]);
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn a_url_is_refused_where_a_file_is_needed_with_what_fetches_it() {
    let host = host();
    let url = "https://example.org/x";
    let mut transcript = Transcript::of(&host);
    for option in ["--cdrom", "--data-disk", "--kernel", "--cloud-init", "--ssh-key"] {
        let kernel: &[&str] = if option == "--kernel" { &[] } else { &["--kernel", "vmlinuz"] };
        transcript.refused(&[&["create", "new", "--accel", "tcg"], kernel, &[option, url]].concat());
    }
    transcript.refused(&["image", "import", url, "--name", "x"]);
    for verb in ["plan", "up", "down"] {
        transcript.refused(&[verb, "--file", url]);
    }
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn a_file_that_only_this_command_has_open_is_no_image() {
    let host = host();
    fs::write(host.file("disk.raw"), [0; 4096]).unwrap();
    let before = host.snapshot();
    for image in ["/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"] {
        for verb in ["create", "launch"] {
            let mut command = host.command::<&str>([]);
            match verb {
                "create" => command.args([verb, "new", "--image", image, "--accel", "tcg"]),
                _ => command.args([verb, image, "new", "--accel", "tcg"]),
            };
            let answer = answer(command.stdin(File::open(host.file("disk.raw")).unwrap()).output().unwrap());
            assert_eq!(answer.code, Some(2), "{verb} {image}: {answer:?}");
            let said = format!("image: \"{image}\": this is an open file of one process");
            assert!(answer.stderr.contains(&said), "{}", answer.stderr);
            assert!(answer.stderr.contains("name the file itself, /"), "{}", answer.stderr);
        }
    }
    assert!(host.snapshot() == before);
}

#[test]
fn a_variable_that_can_not_be_used_is_refused_by_its_name() {
    let host = host();
    for (name, value, said) in [
        ("VMKIT_MIRROR", "foo", "VMKIT_MIRROR: \"foo\": a mirror is a URL"),
        ("https_proxy", "gopher://me:pw@h", "https_proxy: \"gopher://…\": "),
        ("http_proxy", "h:99999", "http_proxy: \"…\": "),
    ] {
        let refused = answer(host.command(["image", "ls"]).env(name, value).output().unwrap());
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.starts_with(&format!("error: {said}")), "{refused:?}");
    }
}

#[test]
fn a_proxy_that_can_not_be_reached_is_named_with_its_variable() {
    let host = host();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (variable, url) in [
        ("http_proxy", "http://example.invalid/x.img"),
        ("https_proxy", "https://example.invalid/x.img"),
        ("all_proxy", "https://example.invalid/x.img"),
    ] {
        let mut pull = host.command(["image", "pull", url]);
        let refused = answer(pull.env(variable, format!("http://me:secret@{free}")).output().unwrap());
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let said = format!("the server can't be reached through the proxy http://{free} ({variable})\n");
        assert!(refused.stderr.contains(&said) && !refused.stderr.contains("secret"), "{refused:?}");
    }
}

#[test]
fn an_argument_that_is_not_utf_8_is_named() {
    let host = host();
    let mut create = host.command(["create", "new", "--kernel", "vmlinuz", "--data-disk"]);
    let refused = answer(create.arg(OsStr::from_bytes(b"disk\xff.img")).output().unwrap());
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.starts_with("error: argument: \"disk\u{fffd}.img\": "), "{refused:?}");
}

#[test]
fn a_script_of_the_host_that_is_too_long_is_refused_with_both_numbers() {
    let host = host();
    fs::File::create(host.file("long.sh")).unwrap().set_len(1 << 40).unwrap();
    let text = "version = 1\n[machine.a]\nkernel = 'vmlinuz'\ncloud_init = {}\naccel = 'tcg'\n\
                provision = [{ name = 'load', script = 'long.sh' }]\n";
    fs::write(host.file("vmkit.toml"), text).unwrap();
    let plan = host.vmkit(["plan"]);
    assert_eq!(plan.code, Some(2), "{plan:?}");
    for said in ["long.sh\": the script has 1099511627776 bytes\n", "(expected at most 67108864)"] {
        assert!(plan.stderr.contains(said), "{said}: {plan:?}");
    }
}

#[test]
fn what_only_user_networking_can_do_is_refused_elsewhere() {
    let host = host();
    let mut transcript = Transcript::of(&host);
    for options in [
        &["--network", "none", "--forward", "80"][..],
        &["--network", "none", "--restrict"],
        &["--forward", "8080:80", "--forward", "8080:81"],
    ] {
        transcript.refused(&[&["create", "new", "--kernel", "vmlinuz", "--accel", "tcg"], options].concat());
    }
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn a_port_in_use_is_refused_by_number() {
    let host = host();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let forward = format!("{port}:80");
    create_refused(&host, &["--forward", &forward], &[&format!("forward: {forward:?}: "), "in use"]);
}

#[test]
fn user_data_that_is_too_large_or_no_yaml_is_refused_with_its_place() {
    let host = host();
    fs::write(host.file("big"), format!("#cloud-config\n# {}\n", "x".repeat(20 << 20))).unwrap();
    fs::write(host.file("bad.yaml"), "#cloud-config\n{[\"\n").unwrap();
    let mut transcript = Transcript::of(&host);
    for options in [
        ["--cloud-init", "big"],
        ["--cloud-init", "missing"],
        ["--cloud-init", "bad.yaml"],
        ["--ssh-key", "missing"],
    ] {
        transcript
            .refused(&[&["create", "new", "--kernel", "vmlinuz", "--accel", "tcg"][..], &options].concat());
    }
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn kvm_is_refused_where_it_does_not_run_code() {
    let host = host();
    let doctor: String = host.vmkit(["doctor", "--json"]).stdout;
    let checks: Vec<serde_json::Value> = serde_json::from_str(&doctor).unwrap();
    if checks.iter().any(|check| check["name"] == "kvm" && check["status"] == "ok") {
        eprintln!("SKIP: KVM runs code on this host");
        return;
    }
    create_refused(&host, &["--accel", "kvm"], &["accel: \"kvm\": ", "/dev/kvm", "use tcg or auto"]);
}

#[test]
fn a_home_too_long_for_a_socket_is_refused_with_both_numbers() {
    let host = host();
    let long = format!("/tmp/{}", "x".repeat(100));
    let mut transcript = Transcript::of(&host);
    transcript.refused(&["--home", &long, "create", "new", "--kernel", "vmlinuz"]);
    transcript.refused(&["--home", &long, "ls"]);
    insta::assert_snapshot!(transcript.text());
    assert!(!std::path::Path::new(&long).exists());
}

/// Runs the command with its home on a file system of its own, mounted with these options.
fn on_mount(host: &Host, options: &str, arguments: &str) -> Option<Answer> {
    let script = format!(
        "mount -t tmpfs -o {options} tmpfs {home} && exec {vmkit} --home {home} {arguments}",
        home = host.file("mounted"),
        vmkit = env!("CARGO_BIN_EXE_vmkit"),
    );
    fs::create_dir_all(host.file("mounted")).unwrap();
    let isolated = |command: &str| {
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--user", "--map-root-user", "--mount", "sh", "-c", command])
            .current_dir(host.dir.path());
        unshare.output()
    };
    match isolated("mount -t tmpfs tmpfs /mnt") {
        Ok(output) if output.status.success() => Some(answer(isolated(&script).unwrap())),
        _ => {
            eprintln!("SKIP: a mount namespace of its own can't be had");
            None
        }
    }
}

#[test]
fn a_home_that_can_not_be_written_is_a_host_that_can_not_do_it() {
    let host = Host::with_real_qemu();
    for (options, said) in [("size=4k,nr_inodes=3", "No space left"), ("ro", "Read-only file system")] {
        let create = "create new --kernel vmlinuz --accel tcg";
        let Some(answer) = on_mount(&host, options, create) else { return };
        assert_eq!(answer.code, Some(2), "{options}: {answer:?}");
        assert!(answer.stderr.contains(said) && answer.stderr.contains("mounted"), "{}", answer.stderr);
        assert!(answer.stderr.contains("hint: `vmkit doctor`"), "{}", answer.stderr);
    }
}

#[test]
fn records_that_can_not_be_used_are_named_kept_and_hide_only_their_vm() {
    let host = host();
    for (name, content) in [
        ("empty", String::new()),
        ("foreign", "{\"hello\": 1}".to_owned()),
        ("noise", "\u{1b}[2J".to_owned()),
    ] {
        host.create(name);
        fs::write(host.home().join("vms").join(name).join("vm.json"), content).unwrap();
    }
    host.create("future");
    let future = host.home().join("vms/future/vm.json");
    let record: serde_json::Value = serde_json::from_slice(&fs::read(&future).unwrap()).unwrap();
    let mut record = record.as_object().unwrap().clone();
    let version = record.keys().find(|key| ["schema", "version"].contains(&key.as_str())).unwrap().clone();
    record.insert(version, 999.into());
    fs::write(&future, serde_json::to_vec(&record).unwrap()).unwrap();

    for name in ["empty", "foreign", "noise", "future"] {
        let path = host.home().join("vms").join(name).join("vm.json");
        let path = path.to_str().unwrap();
        for verb in ["info", "start", "stop", "suspend", "rm"] {
            refused(&host, &[verb, name], &[path, "hint: the file was not changed"]);
        }
        let listed = host.must(["ls"]);
        let row = listed.lines().find(|line| line.starts_with(name)).unwrap();
        assert!(row.contains("unknown") && row.contains(path) && !row.contains('\u{1b}'), "{row:?}");
    }
    let listed = host.must(["ls"]);
    assert!(listed.lines().any(|line| line.starts_with("old ") && line.contains("prepared")), "{listed}");
    refused(&host, &["info", "future"], &["999"]);
}

#[test]
fn without_qemu_the_error_names_what_to_install() {
    let host = Host::without_qemu();
    let answer = host.vmkit(["create", "new", "--kernel", "vmlinuz", "--accel", "tcg"]);
    assert_eq!(answer.code, Some(2));
    assert!(answer.stderr.contains("qemu-system-x86_64") && answer.stderr.contains("hint: "), "{answer:?}");
    assert!(!host.home().join("vms/new").exists());
}

#[test]
fn a_qemu_that_fails_at_once_is_quoted_and_the_vm_is_still_there() {
    let host = host();
    let answer = host.vmkit(["start", "old"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(
        answer.stderr.contains("refused by the test") && answer.stderr.contains("qemu.log"),
        "{answer:?}"
    );
    let run = host.home().join("run");
    assert!(fs::read_dir(run).unwrap().next().is_none(), "sockets were left");
    host.must(["rm", "old"]);
    assert!(!host.home().join("vms/old").exists());

    let answer = host.vmkit(["create", "new", "--kernel", "vmlinuz", "--accel", "tcg", "--start"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(answer.stderr.starts_with("warning: the VM was created, but did not start"), "{answer:?}");
    host.must(["info", "new"]);
}

#[test]
fn commas_in_paths_are_nothing_special() {
    let host = host();
    for file in ["vmlinuz", "base.img"] {
        fs::copy(host.file(file), host.file(&format!("a,b {file}"))).unwrap();
    }
    let options = ["--image", "a,b base.img", "--data-disk", "./a,b base.img:ro", "--kernel", "a,b vmlinuz"];
    host.must([&["create", "new", "--accel", "tcg"], &options[..]].concat());
    let plan = host.must(["start", "new", "--dry-run"]);
    assert!(plan.contains("a,,b base.img") && plan.contains("a,b vmlinuz"), "{plan}");
}

#[test]
fn more_memory_than_linux_ever_gives_is_refused_before_anything_is_fetched() {
    let host = host();
    if fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap().trim() == "1" {
        eprintln!("SKIP: Linux promises any amount of memory on this host");
        return;
    }
    let said = ["memory: \"921600GiB\": a guest on this host can have at most ", "use less, or add swap"];
    create_refused(&host, &["--memory", "900TiB"], &said);
    // The image server can't be reached.
    let image = ["--image", "http://127.0.0.1:1/none.qcow2"];
    refused(&host, &[&["create", "new"], &image[..], &["--memory", "900TiB"]].concat(), &said);
    refused(&host, &["launch", image[1], "--memory", "900TiB"], &said);
}

#[test]
fn an_unknown_user_is_refused() {
    let host = host();
    let options = ["--run-as", "vmkit-no-such-user"];
    match rustix::process::geteuid().is_root() {
        true => create_refused(
            &host,
            &options,
            &["run_as: \"vmkit-no-such-user\": this host has no such user: use an existing one"],
        ),
        false => create_refused(&host, &options, &["run_as: ", "only root can"]),
    }
}

#[test]
fn what_is_no_kernel_is_refused_as_what_it_is() {
    let host = host();
    fs::write(host.file("empty"), "").unwrap();
    fs::write(host.file("text"), "a kernel\n".repeat(10_000)).unwrap();
    fs::write(host.file("zeros"), vec![0; 100_000]).unwrap();
    let mut transcript = Transcript::of(&host);
    for file in ["empty", "text", "zeros", "bin"] {
        transcript.refused(&["create", "new", "--kernel", file, "--accel", "tcg"]);
    }
    for file in ["empty", "bin"] {
        transcript.refused(&["create", "new", "--kernel", "vmlinuz", "--initrd", file, "--accel", "tcg"]);
    }
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn a_dry_run_changes_nothing() {
    let host = host();
    fs::remove_dir_all(host.home().join("cache")).ok();
    let before = host.snapshot();
    let plan = host.must(["create", "new", "--image", "base.img", "--accel", "tcg", "--dry-run"]);
    assert!(plan.starts_with("create directory ") && plan.contains("-nodefaults"), "{plan}");
    let json = host.must(["start", "old", "--dry-run", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert!(json["args"].is_array() && json["program"].is_string(), "{json}");
    assert_eq!(host.snapshot(), before);
    assert!(!host.home().join("cache").exists());
}

#[test]
fn an_unreadable_kernel_is_refused_by_path() {
    let host = host();
    fs::write(host.file("secret"), "kernel").unwrap();
    fs::set_permissions(host.file("secret"), fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read(host.file("secret")).is_ok() {
        eprintln!("SKIP: this user reads everything");
        return;
    }
    create_refused(&host, &["--kernel", "secret"], &["kernel: ", "secret", "Permission denied"]);
}

#[test]
fn what_this_host_can_never_run_is_refused_with_its_place_in_the_file() {
    let host = host();
    fs::write(host.file("text"), "a kernel\n").unwrap();
    let file = "version = 1\n[project]\nname = 'shop'\n[defaults]\naccel = 'tcg'\nkernel = 'vmlinuz'\n\
        ready = { ssh = false, cloud_init = false }\n[machine.db]\n[machine.web]\nkernel = 'text'\n\
        [machine.worker]\nrun_as = 'vmkit-no-such-user'\n";
    fs::write(host.file("vmkit.toml"), file).unwrap();
    let kernel = ["`kernel`: ", "/text\": this is a text file, not a kernel", "vmkit.toml:10:10"];
    let user = ["`run_as`: \"vmkit-no-such-user\": ", "vmkit.toml:12:10"];
    for command in ["up", "reload", "plan"] {
        let answer = host.vmkit([command]);
        assert_eq!(answer.code, Some(2), "{command}: {answer:?}");
        for said in kernel.iter().chain(&user) {
            assert!(answer.stderr.contains(said), "{command} does not say {said:?}: {}", answer.stderr);
        }
        // Not even the valid machine is created.
        let vms = fs::read_dir(host.home().join("vms")).unwrap();
        assert_eq!(vms.map(|vm| vm.unwrap().file_name()).collect::<Vec<_>>(), ["old"], "{command}");
    }
}
