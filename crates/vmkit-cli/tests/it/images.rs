//! `vmkit image`, against a web server on loopback: its output for people and for programs, and
//! what a kill leaves.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::web::{self, disk, serve};
use crate::support::{Answer, Host, answer};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

#[test]
fn an_image_is_pulled_listed_inspected_verified_and_removed() {
    let host = Host::with_refusing_qemu();
    let (address, _) = serve(disk(), 1 << 20, Duration::ZERO);
    let url = format!("{address}/disk.raw");
    let pulled: serde_json::Value =
        serde_json::from_str(&host.must(["image", "pull", &url, "--json"])).unwrap();
    assert_eq!(pulled["format"], "raw");
    assert_eq!(
        (&pulled["names"][0]["verified"], &pulled["vms"]),
        (&"nothing".into(), &serde_json::Value::Null)
    );
    let id = pulled["id"].as_str().unwrap();
    assert!(host.must(["image", "ls"]).contains("not verified"));
    let shown: serde_json::Value =
        serde_json::from_str(&host.must(["image", "inspect", &url, "--json"])).unwrap();
    assert_eq!((shown[0]["id"].as_str(), &shown[0]["vms"]), (Some(id), &serde_json::json!([])));
    assert!(host.must(["image", "verify"]).contains("good"));
    let path = shown[0]["path"].as_str().unwrap();
    host.must(["create", "web", "--image", path, "--accel", "tcg"]);
    let refused = host.vmkit(["image", "rm", id]);
    assert_eq!(refused.code, Some(6), "{refused:?}");
    assert!(refused.stderr.contains("it is the backing file of the disk of the VM `web`"), "{refused:?}");
    host.must(["rm", "web"]);
    host.must(["image", "rm", &url]);
    assert_eq!(host.must(["image", "ls", "--json"]), "[]\n");
}

#[test]
fn a_pull_that_was_killed_goes_on_where_it_was() {
    let host = Host::with_refusing_qemu();
    let (address, starts) = serve(disk(), 4096, Duration::from_millis(10));
    let url = format!("{address}/disk.raw");
    let mut killed = host.command(["image", "pull", &url]).spawn().unwrap();
    assert_eq!(starts.recv().unwrap(), 0);
    web::wait_for_download(&host.home(), 100_000);
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert_eq!(host.must(["image", "ls", "--json"]), "[]\n", "half an image has no name");
    host.must(["image", "pull", &url]);
    let from = starts.recv().unwrap();
    assert!(from >= 100_000, "it went on from {from}");
    let shown: serde_json::Value =
        serde_json::from_str(&host.must(["image", "inspect", &url, "--json"])).unwrap();
    assert!(fs::read(shown[0]["path"].as_str().unwrap()).unwrap() == disk());
}

/// Runs a script with a file system of this size mounted at a directory, `$0` being the command;
/// returns `None`, and reports a skip, if mounting is not permitted.
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn on_a_small_disk(host: &Host, at: &Path, size: &str, script: &str) -> Option<Answer> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: only root can mount a small file system");
        return None;
    }
    fs::create_dir_all(at).unwrap();
    let script = format!("mount -t tmpfs -o size={size} tmpfs {} && {{ {script}; }}", at.display());
    let command = host.command::<&str>([]);
    let mut unshared = Command::new("unshare");
    unshared.args(["--mount", "sh", "-c", &script]).arg(command.get_program());
    unshared.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let answer = answer(unshared.output().unwrap());
    if answer.stderr.contains("Operation not permitted") {
        println!("SKIP: this host lets nobody mount");
        return None;
    }
    Some(answer)
}

/// Returns 20 MB of noise, compressed, so that the download fits and the unpacked image does not.
fn packed_noise(host: &Host) -> String {
    let packed = host.file("disk.gz");
    let write = format!("head -c 20000000 /dev/urandom | gzip -1 > {packed}");
    assert!(Command::new("sh").args(["-c", &write]).status().unwrap().success());
    packed
}

#[test]
fn a_full_disk_is_reported_and_nothing_is_kept() {
    let host = Host::with_real_qemu();
    let packed = packed_noise(&host);
    let images = host.home().join("images");
    let (address, _) = serve(fs::read(&packed).unwrap(), 1 << 20, Duration::ZERO);
    for (command, size, why) in [
        (format!("import {packed} --name x"), "8m", "No space left on device"),
        (format!("import {packed} --name x"), "30m", "No space left on device"),
        // Once known before the first byte, and once found while unpacking.
        (format!("pull {address}/disk.gz"), "8m", "are still to come"),
        (format!("pull {address}/disk.gz"), "30m", "No space left on device"),
    ] {
        let script = format!(
            "\"$0\" image {command}; code=$?; ls {}/downloads; \"$0\" image ls --json; exit $code",
            images.display()
        );
        let Some(answer) = on_a_small_disk(&host, &images, size, &script) else { return };
        assert_eq!(answer.code, Some(2), "{command} {size}: {answer:?}");
        assert!(answer.stderr.contains(why), "{command} {size}: {answer:?}");
        assert_eq!(answer.stdout, "[]\n", "{command} {size}: {answer:?}");
    }
}

#[test]
fn an_image_is_converted_to_a_raw_file_which_nothing_overwrites_by_chance() {
    let host = Host::with_refusing_qemu();
    let (address, _) = serve(disk(), 1 << 20, Duration::ZERO);
    let url = format!("{address}/disk.raw");
    // A multiple of the sector size, as a guest sees whole sectors only.
    let mut expected = disk();
    expected.resize(disk().len().next_multiple_of(512), 0);
    let answer: serde_json::Value =
        serde_json::from_str(&host.must(["image", "convert", &url, "new.raw", "--json"])).unwrap();
    let new = host.file("new.raw");
    assert_eq!(answer, serde_json::json!({"path": new, "format": "raw", "bytes": expected.len()}));
    assert!(fs::read(&new).unwrap() == expected);
    // Reported before anything is fetched: no server listens at the second address.
    for image in [url.as_str(), "http://127.0.0.1:1/disk.raw"] {
        let refused = host.vmkit(["image", "convert", image, "new.raw"]);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(
            refused.stderr.contains("already exists") && refused.stderr.contains("--force"),
            "{refused:?}"
        );
    }
    fs::write(&new, "old").unwrap();
    let kept: serde_json::Value = serde_json::from_str(&host.must(["image", "ls", "--json"])).unwrap();
    for image in [&url, kept[0]["id"].as_str().unwrap(), kept[0]["path"].as_str().unwrap()] {
        host.must(["image", "convert", image, "new.raw", "--force"]);
        assert!(fs::read(&new).unwrap() == expected, "{image}");
        fs::write(&new, "old").unwrap();
    }
    for (image, file, why) in [
        ("debain:12", "other.raw", "did you mean debian"),
        ("sha256:000000", "other.raw", "does not exist"),
        ("base.img", "none/other.raw", "there is no such directory"),
        ("base.img", "base.img", "this is the image itself"),
    ] {
        let refused = host.vmkit(["image", "convert", image, file, "--force"]);
        assert_ne!(refused.code, Some(0), "{refused:?}");
        assert!(refused.stderr.contains(why), "{image} {file}: {refused:?}");
    }
    assert!(!Path::new(&host.file("other.raw")).exists());
}

#[test]
fn a_conversion_that_fills_the_disk_reports_that_and_leaves_nothing() {
    let host = Host::with_real_qemu();
    let noise = host.file("noise.raw");
    let write = format!("head -c 20000000 /dev/urandom > {noise}");
    assert!(Command::new("sh").args(["-c", &write]).status().unwrap().success());
    let small = host.dir.path().join("small");
    let script =
        format!("\"$0\" image convert {noise} {0}/new.raw; code=$?; ls {0}; exit $code", small.display());
    let Some(answer) = on_a_small_disk(&host, &small, "8m", &script) else { return };
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{answer:?}");
    assert!(answer.stderr.contains("new.raw") && answer.stderr.contains("No space left"), "{answer:?}");
}

#[test]
fn a_conversion_that_was_killed_is_done_by_the_next() {
    let host = Host::with_refusing_qemu();
    let large = fs::File::create(host.file("large.raw")).unwrap();
    for place in 0..64 {
        std::os::unix::fs::FileExt::write_all_at(&large, &vec![place + 1; 4 << 20], u64::from(place) << 22)
            .unwrap();
    }
    let mut killed = host.command(["image", "convert", "large.raw", "new.raw"]).spawn().unwrap();
    let unfinished = host.file("new.raw.unfinished");
    while fs::metadata(&unfinished).map_or(0, |file| file.len()) == 0
        && !Path::new(&host.file("new.raw")).exists()
    {
        // There is no event for the command's progress.
        thread::sleep(Duration::from_millis(1));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    if !Path::new(&host.file("new.raw")).exists() {
        host.must(["image", "convert", "large.raw", "new.raw"]);
    }
    assert!(fs::read(host.file("new.raw")).unwrap() == fs::read(host.file("large.raw")).unwrap());
    assert!(!Path::new(&unfinished).exists());
}

#[test]
fn a_block_device_is_written_where_it_is_if_the_disk_fits() {
    let host = Host::with_real_qemu();
    let (store, image) = (host.file("store"), host.file("image.raw"));
    fs::write(&store, vec![0xaa; 4 << 20]).unwrap();
    let mut content = vec![0; 2 << 20];
    content[..70_000].fill(5);
    fs::write(&image, &content).unwrap();
    fs::write(host.file("large"), vec![1; 5 << 20]).unwrap();
    let attached = Command::new("losetup").args(["--find", "--show", &store]).output();
    let device = match &attached {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => {
            println!("SKIP: there is no loop device to be had: {attached:?}");
            return;
        }
    };
    let answers = [
        host.vmkit(["image", "convert", "image.raw", &device]),
        host.vmkit(["image", "convert", "image.raw", &device, "--force"]),
        host.vmkit(["image", "convert", "./large", &device, "--force"]),
    ];
    assert!(Command::new("losetup").args(["--detach", &device]).status().unwrap().success());
    let [refused, written, too_small] = answers;
    assert!(refused.code == Some(2) && refused.stderr.contains("already exists"), "{refused:?}");
    assert_eq!(written.code, Some(0), "{written:?}");
    assert!(too_small.stderr.contains("this device has 4194304 bytes"), "{too_small:?}");
    let found = fs::read(&store).unwrap();
    assert!(found[..2 << 20] == content && found[2 << 20..].iter().all(|byte| *byte == 0xaa));
}

#[test]
fn a_foreign_login_file_does_not_prevent_a_pull_without_login() {
    let host = Host::with_refusing_qemu();
    let (address, _) = serve(disk(), 1 << 20, Duration::ZERO);
    let docker = host.dir.path().join("user/.docker");
    fs::create_dir_all(&docker).unwrap();
    fs::write(docker.join("config.json"), r#"{"auths": ["odd"]}"#).unwrap();
    let vmkit = |arguments: &[&str]| {
        let mut command = host.command(arguments);
        answer(command.env("HOME", host.dir.path().join("user")).output().unwrap())
    };
    for arguments in [&["image", "ls"][..], &["image", "pull", &format!("{address}/disk.raw")]] {
        let answer = vmkit(arguments);
        assert_eq!(answer.code, Some(0), "{arguments:?}: {answer:?}");
    }
    // The helper runs only if a registry asks for a login.
    let registry = TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("oci://{}/disks/web:1", registry.local_addr().unwrap());
    thread::spawn(move || {
        for stream in registry.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 4096];
            let _ = stream.read(&mut head);
            let refusal = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\n\
                Content-Length: 0\r\nConnection: close\r\n\r\n";
            let _ = stream.write_all(refusal.as_bytes());
        }
    });
    let refused = vmkit(&["image", "pull", &image]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains(".docker/config.json, line 1"), "{refused:?}");
}

#[test]
fn a_login_that_a_helper_keeps_is_shown_to_its_registry() {
    let host = Host::with_refusing_qemu();
    let registry = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = registry.local_addr().unwrap();
    let (heard, hears) = mpsc::channel();
    thread::spawn(move || {
        for stream in registry.incoming() {
            let mut stream = stream.unwrap();
            let mut head = [0; 4096];
            let read = stream.read(&mut head).unwrap();
            let head = String::from_utf8_lossy(&head[..read]).to_ascii_lowercase();
            let shown = head.lines().find_map(|line| line.strip_prefix("authorization: ")).map(str::to_owned);
            let status = if shown.is_some() { "404 Not Found" } else { "401 Unauthorized" };
            let refusal = format!(
                "HTTP/1.1 {status}\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\
                 Connection: close\r\n\r\n"
            );
            heard.send(shown).unwrap();
            stream.write_all(refusal.as_bytes()).unwrap();
        }
    });
    fs::write(host.file("config.json"), format!(r#"{{"credHelpers": {{"{address}": "test"}}}}"#)).unwrap();
    let pull = || {
        let mut command = host.command(["image", "pull", &format!("oci://{address}/disks/web:1")]);
        answer(command.env("DOCKER_CONFIG", host.dir.path()).output().unwrap())
    };
    let missing = pull();
    // A missing helper does not matter without a login; here the registry requires one.
    assert_eq!(missing.code, Some(1), "{missing:?}");
    assert!(missing.stderr.contains("docker-credential-test: it stores the login for"), "{missing:?}");
    assert!(missing.stderr.contains("the server refuses it without a login"), "{missing:?}");
    let script = r#"read registry; echo "{\"ServerURL\":\"$registry\",\"Username\":\"u\",\"Secret\":\"p\"}""#;
    let helper = host.dir.path().join("bin/docker-credential-test");
    vmkit_testkit::write_program(&helper, &format!("#!/bin/sh\n{script}\n")).unwrap();
    let shown = pull();
    assert_eq!(shown.code, Some(3), "{shown:?}");
    let heard: Vec<_> = hears.try_iter().collect();
    assert_eq!(heard, [None, None, Some("basic dtpw".to_owned())]);
}

#[test]
fn a_helper_that_hangs_does_not_outlive_a_command_that_is_killed() {
    let host = Host::with_refusing_qemu();
    // It runs only for a registry that requires a login.
    let registry = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = registry.local_addr().unwrap();
    thread::spawn(move || {
        for stream in registry.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            let refusal = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\n\
                           Connection: close\r\n\r\n";
            stream.write_all(refusal.as_bytes()).unwrap();
        }
    });
    fs::write(host.file("config.json"), format!(r#"{{"credHelpers": {{"{address}": "test"}}}}"#)).unwrap();
    let helper = host.dir.path().join("bin/docker-credential-test");
    let (told, new) = (host.file("pid"), host.file("pid.new"));
    let sleep = "PATH=/usr/bin:/bin exec sleep 1000";
    let script = format!("#!/bin/sh\necho $$ > {new}; PATH=/usr/bin:/bin mv {new} {told}; {sleep}\n");
    vmkit_testkit::write_program(&helper, &script).unwrap();
    let mut command = host.command(["image", "pull", &format!("oci://{address}/disks/web:1")]);
    command.env("DOCKER_CONFIG", host.dir.path()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut vmkit = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !Path::new(&told).exists() {
        assert!(Instant::now() < deadline, "the helper was not asked");
        // The helper reports its run by a file.
        thread::sleep(Duration::from_millis(10));
    }
    let pid: i32 = fs::read_to_string(&told).unwrap().trim().parse().unwrap();
    let helper = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    let ended = |limit: i64| {
        let mut fds = [PollFd::new(&helper, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: limit, tv_nsec: 0 })).unwrap() == 1
    };
    assert!(!ended(0), "the helper hangs");
    vmkit.kill().unwrap();
    vmkit.wait().unwrap();
    let has_ended = ended(20);
    if !has_ended {
        pidfd_send_signal(&helper, Signal::KILL).unwrap();
    }
    assert!(has_ended, "the helper lives on");
}

#[test]
fn a_file_for_another_architecture_is_refused_and_a_directory_is_no_image() {
    let host = Host::with_refusing_qemu();
    // A GPT with a root partition of aarch64.
    let mut disk = vec![0; 1 << 20];
    disk[512..520].copy_from_slice(b"EFI PART");
    (disk[512 + 72], disk[512 + 80], disk[512 + 84]) = (2, 1, 128);
    let kind = "45b021b9f01dc341af444c6f280d3fae";
    for (at, byte) in (0..16).map(|at| (at, u8::from_str_radix(&kind[2 * at..2 * at + 2], 16).unwrap())) {
        disk[1024 + at] = byte;
    }
    (disk[1056], disk[1064]) = (64, 128);
    fs::write(host.file("arm.img"), disk).unwrap();
    let refused = host.vmkit(["create", "web", "--image", "arm.img", "--accel", "tcg"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("an image for aarch64, and x86_64 was requested"), "{refused:?}");
    // A name refers to the store, whatever file of that name is in the directory.
    fs::create_dir(host.file("debian")).unwrap();
    let refused = host.vmkit(["create", "web", "--image", "debian", "--dry-run"]);
    assert!(refused.stderr.contains("image `debian:13` does not exist"), "{refused:?}");
    // The message names the image that failed.
    let refused = host.vmkit(["create", "web", "--image", "base.img", "--data-disk", "./none.img"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("data_disks: ") && refused.stderr.contains("none.img"), "{refused:?}");
}

#[test]
fn a_text_is_taken_as_a_disk_and_warned_of() {
    let host = Host::with_refusing_qemu();
    fs::write(host.file("notes.txt"), "to do: buy milk\n").unwrap();
    fs::write(host.file("disk.img"), [&[0; 510][..], b"\x55\xaa"].concat()).unwrap();
    for (file, is_told) in [("notes.txt", true), ("disk.img", false)] {
        let answer = host.vmkit(["image", "import", file, "--name", "x"]);
        assert_eq!(answer.code, Some(0), "{answer:?}");
        let warning = format!("{file} is a text file, and is used as a raw disk");
        assert_eq!(answer.stderr.contains(&warning), is_told, "{answer:?}");
        host.must(["image", "rm", "x"]);
    }
}

#[test]
fn what_is_no_disk_is_refused_by_the_file_that_was_named() {
    let host = Host::with_refusing_qemu();
    fs::write(host.file("page.img"), "<!-- 404 -->\n<html>no</html>").unwrap();
    fs::write(host.file("vmlinux"), [&b"\x7fELF"[..], &[0; 600]].concat()).unwrap();
    fs::write(host.file("error.json"), "{\"error\": \"denied\"}").unwrap();
    for (file, why) in
        [("page.img", "a web page"), ("vmlinux", "an ELF file"), ("error.json", "JSON, not an image")]
    {
        let refused = host.vmkit(["image", "import", file, "--name", "x"]);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        let expected = format!("error: image: {file:?}: {why}");
        assert!(refused.stderr.starts_with(&expected), "{refused:?}");
        let refused = host.vmkit(["create", "web", "--image", &host.file(file)]);
        assert!(refused.code == Some(2) && refused.stderr.contains(why), "{refused:?}");
    }
}

#[test]
fn the_address_of_a_file_stands_wherever_its_path_may() {
    let host = Host::with_refusing_qemu();
    let url = format!("file://{}", host.file("base.img"));
    host.must(["image", "import", &url, "--name", "mine"]);
    host.must(["create", "web", "--image", &url, "--data-disk", &format!("{url}:ro"), "--accel", "tcg"]);
    let info = host.must(["info", "web", "--json"]);
    assert!(info.contains(&host.file("base.img")) && !info.contains("file:"), "{info}");
    host.must(["image", "convert", &url, &format!("file://{}", host.file("new.raw"))]);
    assert!(Path::new(&host.file("new.raw")).exists());
    let refused = host.vmkit(["image", "import", "file:///%zz", "--name", "x"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("two hexadecimal digits"), "{refused:?}");
}

#[test]
fn a_damaged_image_is_reported_with_its_remedy() {
    let host = Host::with_refusing_qemu();
    let (address, _) = serve(disk(), 1 << 20, Duration::ZERO);
    let url = format!("{address}/disk.raw#sha256={}", sha256(&disk()));
    host.must(["image", "pull", &url]);
    host.must(["image", "import", "base.img", "--name", "mine"]);
    let listed: serde_json::Value = serde_json::from_str(&host.must(["image", "ls", "--json"])).unwrap();
    for image in listed.as_array().unwrap() {
        let path = image["path"].as_str().unwrap();
        let length = fs::metadata(path).unwrap().len();
        fs::remove_file(path).unwrap();
        fs::write(path, vec![9; usize::try_from(length).unwrap()]).unwrap();
    }
    let damaged = host.vmkit(["image", "verify"]);
    assert_eq!(damaged.code, Some(2), "{damaged:?}");
    assert_eq!(damaged.stdout.matches("damaged: its checksum is").count(), 2, "{damaged:?}");
    let (pull, import) =
        (format!("vmkit image pull {url}"), format!("vmkit image import {}", host.file("base.img")));
    assert!(damaged.stderr.contains(&pull) && damaged.stderr.contains(&import), "{damaged:?}");
    host.must(["image", "pull", &url]);
    host.must(["image", "import", "base.img", "--name", "mine"]);
    assert_eq!(host.must(["image", "verify"]).matches("good").count(), 2);
}

/// Returns what `sha256sum` says of these bytes.
fn sha256(bytes: &[u8]) -> String {
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    sum.stdin.take().unwrap().write_all(bytes).unwrap();
    String::from_utf8(sum.wait_with_output().unwrap().stdout).unwrap()[..64].to_owned()
}

#[test]
fn unknown_names_are_refused_with_those_that_exist() {
    let host = Host::with_refusing_qemu();
    for (image, code, why) in [
        ("debain:12", 2, "did you mean debian (12, 13)?"),
        ("debian:9", 2, "there is no such version; there are 12, 13"),
        ("ftp://x/y", 2, "starts with https://"),
        ("./disk.img", 2, "image import"),
        ("http://127.0.0.1:1/x", 1, "the server can't be reached"),
    ] {
        let mut command = host.command(["image", "pull", image]);
        let answer = answer(command.output().unwrap());
        assert_eq!(answer.code, Some(code), "{image}: {answer:?}");
        assert!(answer.stderr.contains(why), "{image}: {answer:?}");
    }
    let missing = host.vmkit(["image", "rm", "debian:12"]);
    assert_eq!(missing.code, Some(3), "{missing:?}");
    assert!(host.must(["image", "ls", "--available"]).contains("debian:13"));
}

#[test]
fn of_an_image_that_was_not_pulled_the_entry_of_the_catalogue_is_shown() {
    let host = Host::with_refusing_qemu();
    let text = host.must(["image", "inspect", "ubuntu:24.04", "--arch", "aarch64"]);
    for line in [
        "name:           ubuntu:24.04 for aarch64\n",
        "`vmkit image pull --arch aarch64 ubuntu:24.04` fetches it\n",
        "source:         https://cloud-images.ubuntu.com/",
        "signed:         the checksums, in https://",
        "user:           ubuntu\n",
        "firmware:       uefi\n",
    ] {
        assert!(text.contains(line), "{line}: {text}");
    }
    let debian = host.must(["image", "inspect", "debian"]);
    assert!(
        debian.contains("debian:13 for x86_64\n") && debian.contains("debian:13 for aarch64\n"),
        "{debian}"
    );
    assert!(debian.contains("signed:         no\n"), "{debian}");

    let json = |image: &str| -> serde_json::Value {
        serde_json::from_str(&host.must(["image", "inspect", "--json", image])).unwrap()
    };
    let shown = json("ubuntu:noble");
    assert_eq!(shown.as_array().unwrap().len(), 2, "one for each architecture: {shown}");
    let one = &shown[0];
    let null = &serde_json::Value::Null;
    assert_eq!(
        (&one["id"], &one["path"], &one["format"], &one["kept_at"]),
        (null, null, null, null),
        "{one}"
    );
    assert_eq!(
        (&one["arch"], &one["names"], &one["vms"]),
        (&"x86_64".into(), &[0; 0].into(), &[0; 0].into())
    );
    let known = &one["catalogue"];
    assert_eq!((&known["name"], &known["user"]), (&"ubuntu:24.04".into(), &"ubuntu".into()), "{known}");
    assert_eq!(known["signature"]["over"], "checksums", "{known}");
    assert_eq!(known["signature"]["fingerprints"][0].as_str().unwrap().len(), 40, "{known}");
    host.must(["image", "import", "base.img", "--name", "ubuntu:24.04"]);
    assert_eq!(json("ubuntu:noble")[0]["catalogue"], *null, "a kept one is told of itself");

    for (arguments, code, why) in [
        (&["debain:12"][..], 2, "did you mean debian (12, 13)?"),
        (&["debian:9"], 2, "there is no such version; there are 12, 13"),
        (&["omnios", "--arch", "aarch64"], 2, "it does not exist for aarch64"),
        (&["https://host/x.img"], 3, "does not exist"),
        (&["sha256:012345"], 3, "does not exist"),
    ] {
        let answer = host.vmkit([&["image", "inspect"], arguments].concat());
        assert_eq!(answer.code, Some(code), "{arguments:?}: {answer:?}");
        assert!(answer.stderr.contains(why), "{arguments:?}: {answer:?}");
    }
}

#[test]
fn a_misspelt_name_is_compared_with_those_that_are_kept() {
    let host = Host::with_refusing_qemu();
    for name in ["mydb:1", "mydb:2", "tool"] {
        host.must(["image", "import", "base.img", "--name", name]);
    }
    host.must(["image", "import", "base.img", "--name", "arm:1", "--arch", "aarch64"]);
    for (image, why) in [
        ("mydb", "did you mean mydb (1, 2)?"),
        ("mydp:1", "did you mean mydb (1, 2)?"),
        ("tool:1", "did you mean tool?"),
        ("arn:1", "did you mean arm:1?"),
        ("somethingelse", "debian, fedora, freebsd, mydb, omnios"),
        ("arm:1", "it is stored for aarch64, and x86_64 was requested"),
    ] {
        for arguments in [&["launch", image][..], &["create", "web", "--image", image, "--dry-run"]] {
            let refused = host.vmkit(arguments);
            assert_eq!(refused.code, Some(2), "{refused:?}");
            assert!(refused.stderr.contains(why), "{image}: {refused:?}");
            let told = refused.stderr.contains("`vmkit image ls` lists the local images");
            assert_eq!(told, image != "arm:1", "{refused:?}");
        }
    }
}

#[test]
fn what_is_missing_is_reported_before_an_image_is_fetched() {
    let host = Host::with_refusing_qemu();
    host.create("taken");
    let (address, starts) = serve(disk(), 1 << 20, Duration::ZERO);
    let url = format!("{address}/disk.raw");
    for (options, code, why) in [
        (&["--kernel", "./none"][..], 2, "none\": there is no such file"),
        (&["--kernel", "vmlinuz", "--initrd", "./none"], 2, "initrd: "),
        (&["--data-disk", "./none"], 2, "data_disks: "),
        (&["--cloud-init", "./none"], 2, "user_data: "),
        (&["--ssh-key", "./none"], 2, "ssh-key: "),
        (&["--cpus", "1000"], 2, "1 to 255 CPUs"),
    ] {
        for begin in [&["launch", &url][..], &["create", "web", "--image", &url]] {
            let refused = host.vmkit([begin, options].concat());
            assert_eq!(refused.code, Some(code), "{begin:?} {options:?}: {refused:?}");
            assert!(refused.stderr.contains(why), "{begin:?} {options:?}: {refused:?}");
        }
    }
    for arguments in [&["launch", &url, "taken"][..], &["create", "taken", "--image", &url]] {
        let refused = host.vmkit(arguments);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains("VM `taken` already exists"), "{refused:?}");
    }
    assert_eq!(starts.try_iter().count(), 0, "nothing was asked of the server");
}

#[test]
fn what_was_done_is_printed_on_standard_error() {
    let host = Host::with_refusing_qemu();
    let (address, _) = serve(disk(), 1 << 20, Duration::ZERO);
    let url = format!("{address}/disk.raw");
    for (arguments, expected) in [
        (&["image", "import", "base.img", "--name", "a:1"][..], "a:1: here, a raw disk of 4.00 MiB\n"),
        (&["image", "import", "base.img", "--name", "b"], "b: here, a raw disk of 4.00 MiB\n"),
        (&["image", "pull", &url], &format!("{url}: here, a raw disk of 977.00 KiB, not verified\n")),
        (&["image", "convert", "b", "/dev/null/x"], "error: "),
        (&["image", "rm", "b"], "b: removed; the image has other names, and stays\n"),
        (&["image", "rm", "a:1"], "a:1: removed, "),
        (&["image", "prune"], "nothing to remove\n"),
        (&["image", "prune", "--all"], "1 image removed, "),
    ] {
        let answer = host.vmkit(arguments);
        assert_eq!(answer.stdout, "", "{arguments:?}: {answer:?}");
        assert!(answer.stderr.starts_with(expected), "{arguments:?}: {answer:?}");
    }
    let made = host.vmkit(["image", "convert", "./base.img", "new.raw"]);
    assert_eq!(made.stderr, format!("{}: here, a raw disk of 4.00 MiB\n", host.file("new.raw")));
    let json = host.vmkit(["image", "import", "base.img", "--name", "a:1", "--json"]);
    assert!(json.stderr.is_empty() && json.stdout.starts_with('{'), "{json:?}");
}

#[test]
fn an_own_catalogue_and_a_mirror_are_taken_from_the_environment() {
    let host = Host::with_refusing_qemu();
    let (address, _) = serve(disk(), 1 << 20, Duration::ZERO);
    let config = host.dir.path().join("config/vmkit");
    fs::create_dir_all(&config).unwrap();
    let text = "version = 1\n[image.ours.release.1]\nx86_64 = { url = \"https://never.invalid/a.raw\" }\n";
    fs::write(config.join("images.toml"), text).unwrap();
    let pull = |image: &str| {
        let mut command = host.command(["image", "pull", image, "--arch", "x86_64"]);
        command.env("XDG_CONFIG_HOME", host.dir.path().join("config")).env("VMKIT_MIRROR", &address);
        answer(command.output().unwrap())
    };
    assert_eq!(pull("ours").code, Some(0));
    assert!(host.must(["image", "ls"]).contains("ours:1"));
    fs::write(config.join("images.toml"), "version = 1\n[image.ours]\nusr = 1\n").unwrap();
    let refused = pull("ours");
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("images.toml: line 3, column 1: unknown field `usr`"), "{refused:?}");
}

#[test]
fn a_vm_is_created_from_a_named_image_and_the_image_is_kept_for_it() {
    let host = Host::with_refusing_qemu();
    host.must(["image", "import", "base.img", "--name", "mine:1"]);
    host.must(["create", "web", "--image", "mine:1", "--accel", "tcg"]);
    let info: serde_json::Value = serde_json::from_str(&host.must(["info", "web", "--json"])).unwrap();
    assert!(info["disk"]["image"].as_str().unwrap().contains("/images/"), "{info}");
    let refused = host.vmkit(["image", "rm", "mine:1"]);
    assert_eq!(refused.code, Some(6), "{refused:?}");
    let expected = "error: image `mine:1`: it is the backing file of the disk of the VM `web`\n\
        hint: `vmkit rm web` removes the VM with its disk\n";
    assert_eq!(refused.stderr, expected);
    // By any of its names.
    host.must(["image", "import", "base.img", "--name", "mine:2"]);
    host.must(["create", "db", "--image", "mine:2", "--accel", "tcg"]);
    host.must(["image", "rm", "mine:2"]);
    host.must(["image", "import", "base.img", "--name", "again"]);
    let listed: serde_json::Value = serde_json::from_str(&host.must(["image", "ls", "--json"])).unwrap();
    let refused = host.vmkit(["image", "rm", listed[0]["id"].as_str().unwrap()]);
    let expected = "error: image `again`, also called `mine:1`: \
        it is the backing file of the disks of the VMs `db`, `web`\n\
        hint: `vmkit rm db web` removes the VMs with their disks\n";
    assert_eq!(refused.stderr, expected);
    host.must(["rm", "web", "db"]);
    host.must(["image", "rm", "mine:1", "again"]);
}

#[test]
fn a_misspelt_image_creates_no_vm_and_a_dry_run_fetches_none() {
    let host = Host::with_refusing_qemu();
    let misspelt = host.vmkit(["create", "web", "--image", "debain:12"]);
    assert_ne!(misspelt.code, Some(0), "{misspelt:?}");
    assert!(misspelt.stderr.contains("debian"), "{misspelt:?}");
    let dry = host.vmkit(["create", "web", "--image", "debian:12", "--dry-run"]);
    assert_eq!(dry.code, Some(3), "{dry:?}");
    assert!(!host.home().join("vms/web").exists());
}

#[test]
fn an_image_comes_through_the_proxy_of_its_scheme_and_no_other() {
    let host = Host::with_refusing_qemu();
    // A proxy replies to every request, as one for http:// does.
    let (proxy, asked) = serve(disk(), 1 << 20, Duration::ZERO);
    let pull = |variables: &[(&str, &str)]| {
        let mut command = host.command(["image", "pull", "http://images.invalid/disk.raw"]);
        answer(command.envs(variables.iter().copied()).output().unwrap())
    };
    for (variables, through) in [
        (vec![("https_proxy", proxy.as_str())], false),
        (vec![("HTTP_PROXY", proxy.as_str())], false),
        (vec![("http_proxy", proxy.as_str()), ("no_proxy", "a.org, .invalid")], false),
        (vec![("http_proxy", proxy.as_str()), ("no_proxy", "a.org nvalid")], true),
        (vec![("ALL_PROXY", proxy.as_str())], true),
    ] {
        let answer = pull(&variables);
        assert_eq!(answer.code == Some(0), through, "{variables:?}: {answer:?}");
        assert_eq!(asked.try_iter().count() > 0, through, "{variables:?}: {answer:?}");
        host.vmkit(["image", "rm", "http://images.invalid/disk.raw"]);
    }
}
