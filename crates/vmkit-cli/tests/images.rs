//! `vmkit image`, against a web server on loopback: what a person sees, what is promised to programs, and what a kill leaves.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use support::{Host, answer};

/// Serves one file under every path, in pieces, and tells where each answer began; answers its address.
fn serve(body: Vec<u8>, piece: usize, pause: Duration) -> (String, mpsc::Receiver<usize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (began, starts) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (body, began) = (body.clone(), began.clone());
            // A client that is killed is what a test here is about.
            thread::spawn(move || drop(give(stream.unwrap(), &body, piece, pause, &began)));
        }
    });
    (address, starts)
}

fn give(
    mut stream: TcpStream,
    body: &[u8],
    piece: usize,
    pause: Duration,
    began: &mpsc::Sender<usize>,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
    let range =
        head.lines().find_map(|line| line.strip_prefix("range: bytes=")?.strip_suffix('-')?.parse().ok());
    let from: usize = range.unwrap_or(0);
    // Not every test listens.
    let _ = began.send(from);
    let status = match range {
        Some(from) => format!("206 Partial\r\nContent-Range: bytes {from}-{}/{}", body.len() - 1, body.len()),
        None => "200 OK".to_owned(),
    };
    let length = body.len() - from;
    write!(
        stream,
        "HTTP/1.1 {status}\r\nETag: \"1\"\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    for piece in body[from..].chunks(piece) {
        stream.write_all(piece)?;
        thread::sleep(pause);
    }
    Ok(())
}

fn disk() -> Vec<u8> {
    (0..1_000_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect()
}

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
    assert!(refused.stderr.contains("the disk of VM `web` hangs on it"), "{refused:?}");
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
    let downloads = host.home().join("images/downloads");
    let grown = || {
        let entry = fs::read_dir(&downloads).ok().and_then(|mut entries| entries.next());
        entry
            .and_then(|entry| entry.unwrap().path().join("download").metadata().ok())
            .map_or(0, |file| file.len())
    };
    while grown() < 100_000 {
        thread::sleep(Duration::from_millis(5));
    }
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

#[test]
fn a_full_disk_is_told_and_keeps_nothing() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP: only root can mount a small file system");
        return;
    }
    let host = Host::with_real_qemu();
    fs::create_dir_all(host.home().join("images")).unwrap();
    // Packed, so that what comes fits and what is unpacked does not.
    let packed = host.file("disk.gz");
    let write = format!("head -c 20000000 /dev/urandom | gzip -1 > {packed}");
    assert!(Command::new("sh").args(["-c", &write]).status().unwrap().success());
    for (name, size) in [("whole", "8m"), ("unpacked", "30m")] {
        let script = format!(
            "mount -t tmpfs -o size={size} tmpfs {home}/images && \"$0\" image import {packed} --name x; \
             code=$?; ls {home}/images/downloads; \"$0\" image ls --json; exit $code",
            home = host.home().display()
        );
        let command = host.command::<&str>([]);
        let mut unshared = Command::new("unshare");
        unshared.args(["--mount", "sh", "-c", &script]).arg(command.get_program());
        unshared.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let answer = answer(unshared.output().unwrap());
        if answer.stderr.contains("Operation not permitted") {
            println!("SKIP: this host lets nobody mount");
            return;
        }
        assert_eq!(answer.code, Some(2), "{name}: {answer:?}");
        assert!(answer.stderr.contains("No space left on device"), "{name}: {answer:?}");
        assert_eq!(answer.stdout, "[]\n", "{name}: {answer:?}");
    }
}

#[test]
fn names_that_nobody_knows_are_answered_with_those_that_exist() {
    let host = Host::with_refusing_qemu();
    for (image, code, why) in [
        ("debain:12", 2, "did you mean debian (12, 13)?"),
        ("debian:9", 2, "there is no such version; there are 12, 13"),
        ("ftp://x/y", 2, "begins with https://"),
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
fn a_vm_is_made_of_an_image_by_its_name_and_the_image_is_kept_for_it() {
    let host = Host::with_refusing_qemu();
    host.must(["image", "import", "base.img", "--name", "mine:1"]);
    host.must(["create", "web", "--image", "mine:1", "--accel", "tcg"]);
    let info: serde_json::Value = serde_json::from_str(&host.must(["info", "web", "--json"])).unwrap();
    assert!(info["disk"]["image"].as_str().unwrap().contains("/images/"), "{info}");
    let refused = host.vmkit(["image", "rm", "mine:1"]);
    assert!(refused.code != Some(0) && refused.stderr.contains("web"), "{refused:?}");
    host.must(["rm", "web"]);
    host.must(["image", "rm", "mine:1"]);
}

#[test]
fn a_misspelt_image_makes_no_vm_and_a_dry_run_fetches_none() {
    let host = Host::with_refusing_qemu();
    let misspelt = host.vmkit(["create", "web", "--image", "debain:12"]);
    assert_ne!(misspelt.code, Some(0), "{misspelt:?}");
    assert!(misspelt.stderr.contains("debian"), "{misspelt:?}");
    let dry = host.vmkit(["create", "web", "--image", "debian:12", "--dry-run"]);
    assert_eq!(dry.code, Some(3), "{dry:?}");
    assert!(!host.home().join("vms/web").exists());
}
