//! The commands for a file of machines, as far as they need no QEMU that runs: what would be done,
//! and what is refused.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use crate::support::Host;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const SHOP: &str = "version = 1
[project]
name = 'shop'

[machine.db]
kernel = 'vmlinuz'
cloud_init = {}
accel = 'tcg'
provision = [{ name = 'install', shell = 'true' }, { name = 'load', script = 'load.sh' }]

[machine.web]
image = 'base.img'
depends_on = ['db']
";

fn shop() -> Host {
    let host = Host::with_refusing_qemu();
    write(&host, SHOP);
    fs::write(host.file("load.sh"), "echo loaded").unwrap();
    host
}

fn write(host: &Host, text: &str) {
    fs::write(host.file("vmkit.toml"), text).unwrap();
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_plan_shows_what_is_missing_and_changes_nothing() {
    let host = shop();
    let text = host.must(["plan"]);
    assert_eq!(
        text,
        "db   create and start\n       run `install`: new\n       run `load`: new\nweb  create and start\n"
    );
    assert!(!host.home().join("vms").exists() && !host.home().join("projects").exists());
    let plan = json(&host.must(["plan", "--json", "db"]));
    assert_eq!((plan["project"].as_str(), plan["machines"].as_array().unwrap().len()), (Some("shop"), 1));
    let db = &plan["machines"][0];
    assert_eq!(
        (db["vm"].as_str(), db["action"].as_str(), &db["state"]),
        (Some("shop-db"), Some("make"), &Value::Null)
    );
    assert_eq!(db["steps"][1]["why"], "new");
}

#[test]
fn the_file_is_found_from_below_or_named() {
    let host = shop();
    let below = host.dir.path().join("a/b");
    fs::create_dir_all(&below).unwrap();
    let from = |arguments: &[&str]| {
        let output = host.command(arguments).current_dir(&below).output().unwrap();
        crate::support::answer(output)
    };
    assert_eq!(
        from(&["plan", "web"]).stdout,
        "db   create and start\n       run `install`: new\n       run `load`: new\nweb  create and start\n"
    );
    assert_eq!(from(&["plan", "-f", "../../vmkit.toml", "db"]).code, Some(0));
    let missing = from(&["plan", "-f", "other.toml"]);
    let path = fs::canonicalize(&below).unwrap().join("other.toml");
    let said = format!("error: {} can't be read: there is no such file\n", path.display());
    assert_eq!((missing.code, missing.stderr), (Some(2), said));
    fs::remove_file(host.file("vmkit.toml")).unwrap();
    let nowhere = from(&["up"]);
    assert_eq!(nowhere.code, Some(2), "{nowhere:?}");
    for words in ["vmkit.toml", below.to_str().unwrap(), "any directory above", "--file FILE"] {
        assert!(nowhere.stderr.contains(words), "{words}: {nowhere:?}");
    }
}

#[test]
fn a_wish_that_can_not_be_fulfilled_is_shown_where_it_stands() {
    let host = shop();
    write(&host, &SHOP.replace("base.img", "no-such.img").replace("depends_on = ['db']", ""));
    let answer = host.vmkit(["up", "web"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    for words in ["vmkit.toml", "no-such.img", "image = "] {
        assert!(answer.stderr.contains(words), "{answer:?}");
    }
    fs::remove_file(host.file("load.sh")).unwrap();
    let answer = host.vmkit(["plan", "db"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(
        answer.stderr.contains("script = 'load.sh'") && answer.stderr.contains("can't be read"),
        "{answer:?}"
    );
}

#[test]
fn an_unknown_machine_or_step_is_named() {
    let host = shop();
    for arguments in
        [&["up", "wep"][..], &["down", "wep"], &["status", "wep"], &["provision", "--step", "lode"]]
    {
        let answer = host.vmkit(arguments);
        assert_eq!(answer.code, Some(3), "{answer:?}");
        assert!(answer.stderr.contains("does not exist"), "{answer:?}");
    }
    let said = |arguments: &[&str]| host.vmkit(arguments).stderr;
    assert_eq!(
        said(&["up", "wep"]),
        "error: machine `wep` does not exist; there are `db`, `web`: did you mean `web`?\n"
    );
    assert_eq!(said(&["down", "mail"]), "error: machine `mail` does not exist; there are `db`, `web`\n");
    assert_eq!(
        said(&["provision", "--step", "laod"]),
        "error: step `laod` does not exist; there are `install`, `load`: did you mean `load`?\n"
    );
    assert_eq!(said(&["provision", "web", "--step", "x"]), "error: step `x` does not exist; there is none\n");
}

#[test]
fn a_machine_named_like_a_vm_is_reported_with_its_vm() {
    let host = shop();
    let file = fs::canonicalize(host.dir.path()).unwrap().join("vmkit.toml");
    for arguments in [
        &["shell", "web"][..],
        &["exec", "web", "--", "true"],
        &["cp", "web:/a", "b"],
        &["stop", "web"],
        &["info", "web"],
        &["ip", "web"],
        &["logs", "web"],
        &["console", "web"],
        &["wait", "web", "ssh"],
        &["rm", "web", "db"],
    ] {
        let answer = host.vmkit(arguments);
        assert_eq!(answer.code, Some(3), "{arguments:?}: {answer:?}");
        let hint = format!("hint: the VM of the machine `web` in {} is called `shop-web`\n", file.display());
        assert!(answer.stderr.contains(&hint), "{arguments:?}: {answer:?}");
    }
    let unmade = host.vmkit(["shell", "shop-web"]).stderr;
    assert!(unmade.contains("`vmkit up web` creates it"), "{unmade}");
    // Whose name it is not, and a file that is not right, are not spoken of.
    assert!(!host.vmkit(["info", "mail"]).stderr.contains("vmkit.toml"));
    write(&host, "version = 1\nnonsense = 1\n");
    assert!(!host.vmkit(["info", "web"]).stderr.contains("vmkit.toml"));
}

#[test]
fn missing_files_are_reported_before_anything_is_created() {
    let host = shop();
    write(&host, &SHOP.replace("'vmlinuz'", "'vmlinux'").replace("'base.img'", "'bass.img'"));
    fs::remove_file(host.file("load.sh")).unwrap();
    let answer = host.vmkit(["up"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(answer.stderr.contains("vmkit.toml has 3 errors"), "{answer:?}");
    for place in ["vmlinux", "load.sh", "bass.img"] {
        assert!(answer.stderr.contains(place), "{place}: {answer:?}");
    }
    for place in ["vmkit.toml:6:10]", "vmkit.toml:9:", "vmkit.toml:12:9]"] {
        assert!(answer.stderr.contains(place), "{place}: {answer:?}");
    }
    assert!(host.snapshot().keys().all(|path| !path.starts_with(host.home().join("vms"))));
}

/// A folder with a file that not even root may read.
const UNREADABLE: &str = "/proc/sys/net/ipv4/route";

#[test]
fn what_a_copy_leaves_out_or_cannot_read_is_shown_by_the_plan() {
    let host = Host::with_refusing_qemu();
    let machine = "version = 1\n[machine.db]\nkernel = 'vmlinuz'\ncloud_init = {}\naccel = 'tcg'\n";
    fs::create_dir_all(host.file("site/.git")).unwrap();
    let socket = host.file("site/.git/fsmonitor--daemon.ipc");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    write(&host, &format!("{machine}files = [{{ from = 'site', to = '/srv' }}]\n"));
    let planned = host.vmkit(["plan"]);
    assert_eq!(planned.code, Some(0), "{planned:?}");
    assert!(planned.stderr.starts_with("warning: db: `copy to /srv` skips "), "{planned:?}");
    assert!(planned.stderr.contains("fsmonitor--daemon.ipc: it is neither a file"), "{planned:?}");
    let plan = json(&host.vmkit(["plan", "--json"]).stdout);
    let left_out = &plan["machines"][0]["steps"][0]["left_out"];
    assert!(left_out[0].as_str().unwrap().ends_with("fsmonitor--daemon.ipc"), "{plan}");

    write(
        &host,
        &format!("{machine}files = [{{ from = 'site/.git/fsmonitor--daemon.ipc', to = '/srv' }}]\n"),
    );
    let refused = host.vmkit(["plan"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("neither a file, a directory nor a link"), "{refused:?}");

    if fs::read_dir(UNREADABLE).is_err() || fs::File::open(format!("{UNREADABLE}/flush")).is_ok() {
        println!("SKIP: {UNREADABLE} has no file that may not be read");
        return;
    }
    write(&host, &format!("{machine}files = [{{ from = '{UNREADABLE}', to = '/srv' }}]\n"));
    for command in ["plan", "up"] {
        let refused = host.vmkit([command]);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains("route/flush") && refused.stderr.contains("denied"), "{refused:?}");
        assert!(!host.home().join("vms").exists(), "{command} made something");
    }
}

#[test]
fn a_file_to_begin_with_is_planned_at_once_and_never_written_over() {
    let host = Host::with_refusing_qemu();
    let folder = host.dir.path().join("blog");
    fs::create_dir(&folder).unwrap();
    fs::copy(host.file("base.img"), folder.join("disk one.img")).unwrap();
    let vmkit = |arguments: &[&str]| {
        crate::support::answer(host.command(arguments).current_dir(&folder).output().unwrap())
    };
    let file = folder.join("vmkit.toml");
    for (image, code, said) in [
        ("debain:12", 2, "did you mean debian (12, 13)?"),
        ("missing.img", 2, "missing.img"),
        ("a\nb", 2, "control characters"),
    ] {
        let refused = vmkit(&["init", image]);
        assert_eq!(refused.code, Some(code), "{refused:?}");
        assert!(refused.stderr.contains(said) && !file.exists(), "{refused:?}");
    }
    for (arguments, image) in [(&["init"][..], "debian:12"), (&["init", "disk one.img"], "disk one.img")] {
        let written = vmkit(arguments);
        assert_eq!((written.code, written.stdout.as_str()), (Some(0), ""), "{written:?}");
        assert!(written.stderr.contains("the machine `blog`; `vmkit plan` shows"), "{written:?}");
        assert!(fs::read_to_string(&file).unwrap().contains(&format!("\nimage = {image:?}\n")));
        let planned = vmkit(&["plan"]);
        assert_eq!(
            (planned.code, planned.stdout.as_str()),
            (Some(0), "blog  create and start\n"),
            "{planned:?}"
        );
        let again = vmkit(arguments);
        assert_eq!(again.code, Some(2), "{again:?}");
        assert!(again.stderr.contains("vmkit.toml` already exists"), "{again:?}");
        fs::remove_file(&file).unwrap();
    }
    let names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["disk one.img"], "nothing half written is left");
}

#[test]
fn an_unknown_image_is_reported_before_anything_is_created() {
    let host = shop();
    write(&host, &SHOP.replace("'base.img'", "'debain:12'"));
    for command in ["plan", "up"] {
        let answer = host.vmkit([command]);
        assert_eq!(answer.code, Some(2), "{answer:?}");
        for words in ["vmkit.toml:12:9]", "no image has this name; did you mean debian (12, 13)?"] {
            assert!(answer.stderr.contains(words), "{words}: {answer:?}");
        }
    }
    assert!(host.snapshot().keys().all(|path| !path.starts_with(host.home().join("vms"))));
    let plan = json(&host.vmkit(["plan", "--json"]).stdout);
    assert_eq!(plan["machines"][1]["error"]["kind"], "invalid-input", "{plan}");

    // One that could be fetched is no mistake, and is not fetched; one that is kept is found.
    write(&host, &SHOP.replace("'base.img'", "'debian:12'"));
    host.must(["plan"]);
    write(&host, &SHOP.replace("'base.img'", "'ours:2'"));
    host.must(["image", "import", "base.img", "--name", "ours:1"]);
    assert!(host.vmkit(["plan"]).stderr.contains("did you mean ours:1?"));
    write(&host, &SHOP.replace("'base.img'", "'ours:1'"));
    host.must(["plan"]);
}

#[test]
fn a_file_unfit_for_a_disk_is_reported_before_anything_is_created() {
    let host = shop();
    for (file, bytes, said) in [
        ("empty.img", &b""[..], "the file is empty"),
        ("other.img", b"KDMV\x01\0\0\0", "vmdk"),
        ("small.img", b"\x1f\x8b\x08\0", "gzip"),
    ] {
        fs::write(host.file(file), bytes).unwrap();
        write(&host, &SHOP.replace("base.img", file));
        for command in ["plan", "up"] {
            let answer = host.vmkit([command]);
            assert_eq!(answer.code, Some(2), "{answer:?}");
            assert!(answer.stderr.contains("vmkit.toml:12:9]"), "{answer:?}");
            assert!(answer.stderr.to_lowercase().contains(said), "{said}: {answer:?}");
        }
    }
    fs::write(host.file("large.img"), vec![0; 3 << 20]).unwrap();
    write(&host, &SHOP.replace("image = 'base.img'", "image = 'large.img'\ndisk = '2MiB'"));
    for command in ["plan", "up"] {
        let answer = host.vmkit([command]);
        assert_eq!(answer.code, Some(2), "{answer:?}");
        assert!(answer.stderr.contains("vmkit.toml:13:8]"), "{answer:?}");
        assert!(answer.stderr.contains("use at least 3MiB"), "{answer:?}");
    }
    assert!(host.snapshot().keys().all(|path| !path.starts_with(host.home().join("vms"))));
}

#[test]
fn a_failure_is_reported_and_what_depends_on_it_is_skipped() {
    let host = shop();
    let answer = host.vmkit(["up", "--json"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(answer.stderr.contains("error: db: "), "{answer:?}");
    let outcome = json(&answer.stdout);
    assert_eq!(outcome["machines"][0]["outcome"], "failed");
    assert_eq!(outcome["machines"][1]["outcome"], "skipped");
    assert_eq!(outcome["machines"][1]["skipped_for"], "db");
    let status = json(&host.must(["status", "--json"]));
    assert_eq!((&status[1]["machine"], &status[1]["state"]), (&"web".into(), &Value::Null));
    host.must(["down", "--rm"]);
    assert_eq!(json(&host.must(["status", "--json"]))[0]["state"], Value::Null);
}

#[test]
fn a_command_whose_reader_left_ends_as_it_would_have() {
    let host = shop();
    for (arguments, code) in [(&["up", "wep"][..], 3), (&["up"], 2), (&["up", "--json"], 2), (&["plan"], 0)] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = host.command(arguments);
        command.stdout(writer.try_clone().unwrap()).stderr(writer);
        assert_eq!(command.status().unwrap().code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn an_interrupted_command_prints_what_to_do_and_ends_with_130() {
    let host = shop();
    host.vmkit(["up"]);
    let lock = fs::File::options().write(true).open(host.home().join("projects/shop.lock")).unwrap();
    lock.lock().unwrap();
    let mut up = host.command(["up"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(up.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.starts_with("waiting for the project `shop`, which is in use by process "), "{line}");
    kill_process(Pid::from_child(&up), Signal::INT).unwrap();
    assert_eq!(up.wait().unwrap().code(), Some(130));
    line.clear();
    said.read_to_string(&mut line).unwrap();
    assert!(line.starts_with("interrupted: `vmkit up` again") && line.lines().count() == 1, "{line}");
}

#[test]
fn a_script_that_no_guest_could_run_is_reported_by_the_plan() {
    let host = shop();
    for (script, said) in [
        (&b""[..], "the script is empty"),
        (b"\xff\xfee\0c\0h\0o\0", "the script is UTF-16 text"),
        (b"\x7fELF\x02\x01\0", "the script is a binary file"),
        (b"#!python3\nprint()\n", "line 1: `#!` names `python3`"),
    ] {
        fs::write(host.file("load.sh"), script).unwrap();
        let answer = host.vmkit(["plan"]);
        assert_eq!(answer.code, Some(2), "{answer:?}");
        assert!(answer.stderr.contains(said) && answer.stderr.contains("load.sh"), "{answer:?}");
    }
    for script in [&b"#!/bin/sh\r\necho\r\n"[..], b"\xef\xbb\xbf#!/usr/bin/env python3\n"] {
        fs::write(host.file("load.sh"), script).unwrap();
        host.must(["plan"]);
    }
}
