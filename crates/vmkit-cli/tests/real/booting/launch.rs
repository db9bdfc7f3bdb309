//! `launch` with real VMs: to a shell on Debian, and what remains after an interruption.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::thread::sleep;
use std::time::Duration;

use super::guest_ssh::enter_in_every_way;
use crate::harness::{self, LONG, Life, create_arguments, until};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use vmkit_testkit::guest::{self, DebianGuest};

/// Returns the arguments that launch this guest; the tiny one has no disk, so it gets an empty one.
fn launch_arguments(life: &Life, guest: &DebianGuest, more: &[&str]) -> Vec<String> {
    let image = guest.disk.as_ref().map_or_else(|| life.file("base.img"), |disk| disk.display().to_string());
    let mut created = create_arguments(guest, "unused", "").split_off(2);
    if let Some(at) = created.iter().position(|argument| argument == "--image") {
        created.drain(at..at + 2);
    }
    let mut arguments = vec!["launch".to_owned(), image];
    arguments.extend(created);
    let (options, command) = more.split_at(more.iter().position(|word| *word == "--").unwrap_or(more.len()));
    arguments.extend(options.iter().chain(command).map(|word| (*word).to_owned()));
    arguments
}

fn tiny(life: &Life, more: &[&str]) -> Vec<String> {
    launch_arguments(life, &guest::tiny(), more)
}

fn begin(life: &Life, arguments: &[String]) -> harness::Begun {
    life.begin(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn a_launched_guest_is_entered_in_every_way() {
    let life = Life::new();
    let launched =
        life.must(launch_arguments(&life, &guest::debian(), &["--json", "--timeout", "900", "deb"]));
    let launched: Value = serde_json::from_str(&launched).unwrap();
    let stages = launched["stages"].as_array().unwrap();
    let stages: Vec<&str> = stages.iter().map(|stage| stage["stage"].as_str().unwrap()).collect();
    assert_eq!(stages, ["image", "disk", "boot", "network", "ssh", "cloud-init"]);
    assert_eq!((&launched["vm"]["name"], &launched["vm"]["state"]), (&"deb".into(), &"running".into()));

    enter_in_every_way(&life);

    // The guest's own SSH server a second time, at a port that was not forwarded when the VM was
    // created.
    let forwards = life.must(["forward", "deb", "22/udp", "2222"]);
    assert!(forwards.contains("->2222") && forwards.contains("->22/udp"), "{forwards}");
    let mut foreground = life.begin(&["forward", "deb", "22", "--foreground"]);
    let mut said = foreground.output();
    said.hears("->22");
    let address = said.heard.lines().find_map(|line| line.strip_suffix("->22")).unwrap().to_owned();
    let mut stream = TcpStream::connect(address).unwrap();
    let mut greeting = [0; 4];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"SSH-");
    life.must(["rm", "--force", "deb"]);
    foreground.ended(LONG);
    life.assert_empty("after rm");

    // cloud-init reboots the guest at the end of its first boot: the launch goes on after that.
    let theirs = life.file("user-data");
    let reboots =
        "#cloud-config\nbootcmd: [echo boot >> /var/log/boots]\npower_state: {mode: reboot, timeout: 600}\n";
    fs::write(&theirs, reboots).unwrap();
    let mut once = vec!["--rm", "--timeout", "900", "--cloud-init", &theirs, "--", "sh", "-c"];
    once.push("cat; cat /var/log/boots; exit 9");
    let once = life.vmkit(launch_arguments(&life, &guest::debian(), &once));
    assert_eq!((once.code, once.stdout.as_str()), (Some(9), "boot\nboot\n"), "{once:?}");
    life.assert_empty("after launch --rm");
}

#[test]
fn a_vm_without_a_name_is_called_after_its_image() {
    let life = Life::new();
    assert_eq!(life.must(tiny(&life, &["--no-wait"])), "base-1\n");
    let second: Value = serde_json::from_str(&life.must(tiny(&life, &["--no-wait", "--json"]))).unwrap();
    assert_eq!(second["vm"]["name"], "base-2");
    assert_eq!(
        second["image"].as_str().unwrap(),
        fs::canonicalize(life.file("base.img")).unwrap().to_str().unwrap()
    );
    let taken = life.vmkit(tiny(&life, &["base-1", "--no-wait"]));
    assert_eq!(taken.code, Some(2), "{taken:?}");
    let unfetched = life.vmkit(["launch", "http://127.0.0.1:9/none.qcow2", "base-1"]);
    assert!(unfetched.code == Some(2) && unfetched.stderr.contains("already exists"), "{unfetched:?}");
    assert_eq!(life.state("base-1"), "running");
    life.must(["rm", "--force", "base-1", "base-2"]);
    life.assert_empty("after rm");
}

#[test]
fn a_launch_reports_a_cloud_init_that_failed_before_the_first_login() {
    let life = Life::new();
    let theirs = life.file("user-data");
    fs::write(&theirs, "#include\nhttp://127.0.0.1:1/x\n").unwrap();
    let failed = life.vmkit(launch_arguments(
        &life,
        &guest::debian(),
        &["--cloud-init", &theirs, "--timeout", "900", "deb"],
    ));
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let said = &failed.stderr;
    assert!(
        said.contains("the launch failed at the stage ssh") && said.contains("http://127.0.0.1:1/x"),
        "{said}"
    );
    assert!(said.contains("vmkit console") && said.contains("--no-wait"), "{said}");
    life.must(["rm", "--force", "deb"]);
}

#[test]
fn a_guest_that_cloud_init_powers_off_ends_its_launch() {
    let life = Life::new();
    let theirs = life.file("user-data");
    fs::write(&theirs, "#cloud-config\npower_state: {mode: poweroff, timeout: 600}\n").unwrap();
    let options = ["--cloud-init", &theirs, "--timeout", "900", "deb"];
    let ended = life.vmkit(launch_arguments(&life, &guest::debian(), &options));
    assert_eq!(ended.code, Some(4), "{ended:?}");
    assert!(ended.stderr.contains("whose guest powered off"), "{}", ended.stderr);
    assert_eq!(life.state("deb"), "stopped");
    life.must(["rm", "deb"]);
}

#[test]
fn a_requested_login_is_created_by_cloud_init_and_replaces_no_existing_one() {
    let life = Life::new();
    let seed = |vm: &str| {
        let seed = fs::read(life.home().join(format!("vms/{vm}/seed.iso")));
        String::from_utf8_lossy(&seed.unwrap()).into_owned()
    };
    life.must(tiny(&life, &["one", "--no-wait", "--user", "ann"]));
    assert!(seed("one").contains("name: ann") && !seed("one").contains("name: vmkit"), "{}", seed("one"));
    let theirs = life.file("user-data");
    fs::write(&theirs, "#cloud-config\nusers:\n- default\n- name: vmkit\n").unwrap();
    life.must(tiny(&life, &["two", "--no-wait", "--cloud-init", &theirs]));
    assert!(seed("two").contains("name: vmkit-access\n"), "{}", seed("two"));
    let refused = |content: &str, more: &[&str], expected: &str| {
        fs::write(&theirs, content).unwrap();
        let mut options = vec!["three", "--no-wait", "--cloud-init", theirs.as_str()];
        options.extend(more);
        let refused = life.vmkit(tiny(&life, &options));
        assert!(refused.code == Some(2) && refused.stderr.contains(expected), "{refused:?}");
        assert!(!life.must(["ls"]).contains("three"));
    };
    refused("#cloud-config\nusers:\n- name: ann\n", &["--user", "ann"], "line 3 of the user-data");
    refused("#cloud-config\npackages: [x]\nusers: 5\n", &[], "line 3, column 8: `users` is not a list");
    refused(
        "#cloud-config\nssh_keys: {ed25519_private: \"x\\n\"}\n",
        &[],
        "line 2: `ssh_keys.ed25519_private`",
    );
    life.must(["rm", "--force", "one", "two"]);
    life.assert_empty("after rm");
}

#[test]
fn a_guest_that_does_not_get_ready_is_left_with_its_last_lines() {
    let life = Life::new();
    let late = life.vmkit(tiny(&life, &["web", "--timeout", "30"]));
    assert_eq!(late.code, Some(5), "{late:?}");
    let (notice, failure) = late.stderr.split_once("the launch failed").unwrap();
    assert!(notice.contains("the guest is up, and has neither cloud-init nor an SSH server"), "{late:?}");
    for said in [notice, failure] {
        assert!(said.contains("`vmkit console`") && said.contains("--no-wait"), "{late:?}");
    }
    assert!(late.stderr.contains("the launch failed at the stage ssh"), "{late:?}");
    assert!(
        late.stderr.contains("the console's last lines") && late.stderr.contains("vmkit-guest"),
        "{late:?}"
    );
    assert_eq!(life.state("web"), "running");
    life.must(["rm", "--force", "web"]);

    let mut panicking = tiny(&life, &["web", "--timeout", "180"]);
    let at = panicking.iter().position(|word| word == "--cmdline").unwrap() + 1;
    panicking[at].push_str(" vmkit.poweroff");
    let ended = life.vmkit(panicking);
    assert_eq!(ended.code, Some(4), "{ended:?}");
    life.must(["rm", "--force", "web"]);
    life.assert_empty("after rm");
}

#[test]
fn an_ephemeral_vm_goes_with_its_command_however_that_ends() {
    let life = Life::new();
    for signal in [Signal::TERM, Signal::INT, Signal::KILL] {
        let begun = begin(&life, &tiny(&life, &["once", "--rm", "--", "true"]));
        assert!(until(LONG, || !life.qemus().is_empty()), "it never ran");
        assert!(life.must(["ls"]).contains("once"), "its owner lives, so it stays");
        kill_process(begun.pid(), signal).unwrap();
        let answer = begun.ended(LONG);
        assert_eq!(answer.code, None, "{signal:?}: {answer:?}");
        if signal == Signal::KILL {
            assert!(!life.qemus().is_empty(), "nobody was there to end it");
            assert!(!life.must(["ls"]).contains("once"));
        }
        life.assert_empty(&format!("after {signal:?}"));
    }
}

#[test]
fn an_ephemeral_launch_never_removes_a_vm_that_it_did_not_create() {
    let life = Life::new();
    life.make("mine", "");
    let taken = life.vmkit(tiny(&life, &["mine", "--rm", "--", "true"]));
    assert_eq!(taken.code, Some(2), "{taken:?}");
    assert_eq!(life.state("mine"), "prepared");
}

#[test]
fn a_launch_that_is_killed_anywhere_leaves_what_can_be_removed_or_launched_again() {
    let life = Life::new();
    for millis in [0, 20, 40, 60, 90, 120, 160, 220, 300, 500] {
        let begun = begin(&life, &tiny(&life, &["web", "--timeout", "60"]));
        // The test needs this very moment.
        sleep(Duration::from_millis(millis));
        begun.kill();
        let listed = life.must(["ls", "--json"]);
        let listed: Vec<Value> = serde_json::from_str(&listed).unwrap();
        let again = match listed.first() {
            // There was no VM yet, or only an incomplete one.
            None => life.vmkit(tiny(&life, &["web", "--no-wait"])),
            Some(row) if row["state"] == "failed" => life.vmkit(tiny(&life, &["web", "--no-wait"])),
            Some(_) => life.vmkit(["start", "web"]),
        };
        assert_eq!(again.code, Some(0), "after {millis} ms: {listed:?} {again:?}");
        assert_eq!(life.state("web"), "running", "after {millis} ms");
        life.must(["rm", "--force", "web"]);
        life.assert_empty(&format!("after {millis} ms"));
    }
}

#[test]
fn a_command_in_a_machine_without_a_network_goes_by_the_guest_agent() {
    let life = Life::new();
    let more = ["--network", "none", "--timeout", "180", "web", "--", "sh", "-c", "echo in; exit 7"];
    let answer = life.vmkit(tiny(&life, &more));
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(7), "in\n"), "{answer:?}");
    assert_eq!(life.state("web"), "running");
    // A guest without an agent: the VM is left running, and the message says so.
    let base = life.file("base.img");
    let silent =
        ["launch", &base, "mute", "--accel", "tcg", "--network", "none", "--timeout", "2", "--", "true"];
    let answer = life.vmkit(silent);
    assert_eq!(answer.code, Some(5), "{answer:?}");
    assert!(
        answer.stderr.contains("the VM `mute` is left; ") && answer.stderr.contains("the guest agent"),
        "{answer:?}"
    );
    assert!(answer.stderr.contains("`vmkit rm --force mute`"), "{answer:?}");
}
