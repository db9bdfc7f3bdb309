//! The output of the commands for a file of machines, for people and for programs, without a
//! terminal: the real QEMU with nothing to boot.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use crate::harness::Life;
use crate::support::Transcript;
use crate::support::web::{disk, serve, wait_for_download};
use serde_json::Value;
use vmkit_testkit::guest;

/// Two machines for which vmkit waits for nothing.
const SHOP: &str = "version = 1
[project]
name = 'shop'

[defaults]
accel = 'tcg'
ready = { ssh = false, cloud_init = false }

[machine.db]
image = 'base.img'

[machine.web]
kernel = 'vmlinuz'
depends_on = ['db']
";

fn write(life: &Life, text: &str) {
    // QEMU reads its header, so it has to be an image.
    let kernel = guest::tiny().kernel;
    let text = text.replace("vmlinuz", kernel.to_str().unwrap());
    fs::write(life.file("vmkit.toml"), text).unwrap();
}

/// Returns a command's standard error without the durations.
fn said(life: &Life, arguments: &[&str]) -> String {
    let answer = life.vmkit(arguments);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(0), ""), "{answer:?}");
    let cut = |line: &str| match line.split_once("ready in ") {
        Some((before, _)) => format!("{before}ready in …\n"),
        None => format!("{line}\n"),
    };
    answer.stderr.lines().map(cut).collect()
}

/// Returns a machine from a command's JSON.
fn machine(life: &Life, arguments: &[&str], place: usize) -> Value {
    let answer = life.vmkit(arguments);
    let told: Value = serde_json::from_str(&answer.stdout).unwrap_or_else(|_| panic!("{answer:?}"));
    told["machines"].get(place).or(told.get(place)).unwrap().clone()
}

#[test]
fn every_stage_and_its_outcome_is_printed_without_a_terminal() {
    let life = Life::new();
    write(&life, SHOP);
    let mut transcript = Transcript::of(&life);
    transcript.run(&["up"]);
    transcript.run(&["up", "db"]);

    // A change that waits for the next start is reported until it takes effect.
    write(&life, &SHOP.replace("[machine.web]", "memory = 600\nforwards = ['80']\n[machine.web]"));
    transcript.run(&["up", "db"]);
    transcript.run(&["up"]);
    let db = machine(&life, &["up", "--json"], 0);
    assert_eq!(
        (&db["outcome"], &db["pending"]),
        (&"unchanged".into(), &serde_json::json!(["memory"])),
        "{db}"
    );
    transcript.run(&["reload", "--timeout", "0", "db"]);
    let db = machine(&life, &["up", "--json"], 0);
    assert_eq!((&db["pending"], &db["anew"]), (&serde_json::json!([]), &serde_json::json!([])), "{db}");

    // A change that needs the machine recreated is no success.
    write(&life, &SHOP.replace("[machine.web]", "cloud_init.hostname = 'other'\n[machine.web]"));
    let db = machine(&life, &["up", "--json"], 0);
    assert_eq!(
        (&db["outcome"], &db["anew"]),
        (&"failed".into(), &serde_json::json!(["cloud_init.hostname"])),
        "{db}"
    );

    write(&life, SHOP);
    transcript.run(&["down", "--timeout", "0", "web"]);
    transcript.run(&["down", "--timeout", "0"]);
    transcript.run(&["down", "--rm", "db"]);
    transcript.run(&["down", "--rm"]);
    insta::assert_snapshot!(transcript.text());
}

#[test]
fn a_project_whose_folder_was_renamed_reports_the_vms_left_behind() {
    let life = Life::new();
    let root = fs::canonicalize(life.dir.path()).unwrap();
    let (old, new) = (root.join("one"), root.join("two"));
    fs::create_dir(&old).unwrap();
    fs::write(
        old.join("vmkit.toml"),
        "version = 1\n[machine.web]\nimage = '../base.img'\nready.ssh = false\n",
    )
    .unwrap();
    let file = |folder: &std::path::Path| folder.join("vmkit.toml").to_str().unwrap().to_owned();
    life.must(["up", "-f", &file(&old)]);
    fs::rename(&old, &new).unwrap();
    let warning = format!(
        "warning: `one-web` is a VM of {}, which no longer exists: move it back, or `vmkit rm one-web`\n",
        file(&old)
    );
    let info: Value = serde_json::from_str(&life.must(["info", "one-web", "--json"])).unwrap();
    assert_eq!(
        (&info["labels"]["vmkit.project"], &info["labels"]["vmkit.machine"]),
        (&file(&old).into(), &"web".into())
    );
    assert!(life.must(["info", "one-web"]).contains("vmkit.machine=web\n"));
    for command in ["status", "plan", "down", "up"] {
        let answer = life.vmkit([command, "--json", "-f", &file(&new)]);
        assert!(answer.stderr.starts_with(&warning), "{answer:?}");
        if command == "status" {
            continue;
        }
        let told: Value = serde_json::from_str(&answer.stdout).unwrap();
        let lost = serde_json::json!([{ "machine": "web", "vm": "one-web", "file": file(&old) }]);
        assert_eq!(told["lost"], lost, "{told}");
    }
    assert!(!said(&life, &["up", "-f", &file(&new)]).contains("warning"));
    let status = life.vmkit(["status", "-f", &file(&new)]);
    assert!(status.code == Some(0) && status.stderr.is_empty(), "{status:?}");
    life.must(["rm", "--force", "one-web", "two-web"]);
}

#[test]
fn the_plan_of_a_start_has_the_changes_that_wait_for_it() {
    let life = Life::new();
    write(&life, SHOP);
    life.must(["up", "db"]);
    let grown = SHOP.replace("[machine.web]", "memory = 600\n[machine.web]");
    write(&life, &grown);
    life.must(["up", "db"]);
    assert!(life.must(["plan", "db"]).contains("memory: changed, at the next start: `vmkit reload`"));
    life.must(["down", "--timeout", "0", "db"]);
    let plan = life.must(["plan", "db"]);
    assert!(plan.starts_with("db  start\n") && plan.contains("memory: changed, with this start\n"), "{plan}");
    write(&life, &grown.replace("memory = 600", "memory = 700"));
    let plan = life.must(["plan", "db"]);
    assert!(plan.contains("memory: 600MiB -> 700MiB, with this start\n"), "{plan}");
    life.must(["down", "--rm", "--timeout", "0"]);
}

#[test]
fn status_shows_what_a_machine_lacks_to_be_ready() {
    let life = Life::new();
    write(&life, SHOP);
    life.must(["up", "db"]);
    let asks = "ready = { ssh = false, cloud_init = false, tcp = [80], timeout = '1s' }\nforwards = ['80']\n";
    write(&life, &SHOP.replace("[machine.web]", &format!("{asks}[machine.web]")));
    assert_eq!(life.vmkit(["up", "db"]).code, Some(5));
    let table = life.must(["status", "--timeout", "1", "db"]);
    let row = table.lines().nth(1).unwrap();
    assert!(
        row.contains("  no: tcp 80  ")
            && row.ends_with(
                "for the guest's TCP port 80, as `ready.tcp` asks for (nothing is known to listen there)"
            ),
        "{table}"
    );
    let db = machine(&life, &["status", "--timeout", "1", "--json"], 0);
    assert_eq!((&db["ready"], &db["unready"]["probe"]), (&false.into(), &"tcp 80".into()), "{db}");
    life.must(["down", "--rm", "--timeout", "0"]);
}

#[test]
fn an_up_that_was_killed_while_it_fetched_an_image_is_finished_by_the_next() {
    let life = Life::new();
    let (address, starts) = serve(disk(), 4096, Duration::from_millis(10));
    write(&life, &SHOP.replace("'base.img'", &format!("'{address}/disk.raw'")));
    let mut up = life.command(["up"]).stderr(Stdio::null()).spawn().unwrap();
    assert_eq!(starts.recv().unwrap(), 0);
    wait_for_download(&life.home(), 100_000);
    up.kill().unwrap();
    up.wait().unwrap();
    assert!(
        !life.home().join("vms").exists() || fs::read_dir(life.home().join("vms")).unwrap().next().is_none()
    );
    let said = said(&life, &["up"]);
    assert!(said.contains("% of 976.56 KiB fetched\n") && said.contains("db: made, started"), "{said}");
    let from = starts.recv().unwrap();
    assert!(from >= 100_000, "it went on from {from}");
    assert_eq!((life.state("shop-db"), life.state("shop-web")), ("running".into(), "running".into()));
    life.must(["down", "--rm", "--timeout", "0"]);
}

#[test]
fn a_record_of_a_run_that_is_lost_is_warned_of_once_by_a_command() {
    let life = Life::new();
    life.must(["create", "a", "--image", "base.img", "--memory", "64MiB", "--accel", "tcg"]);
    life.must(["start", "a"]);
    let record = life.home().join("vms/a/qemu.json");
    for line in ["ls", "info a", "suspend a", "resume a", "stop --timeout 0 a", "start a"] {
        fs::write(&record, "{").unwrap();
        let answer = life.vmkit(line.split(' '));
        assert_eq!(answer.code, Some(0), "{line}: {answer:?}");
        let warned = answer.stderr.matches("the record of a VM's last run is lost").count();
        assert_eq!(warned, 1, "{line}: {answer:?}");
        assert_eq!(answer.stderr.matches("qemu.json").count(), 1, "{line}: {answer:?}");
    }
    life.must(["rm", "--force", "a"]);
    life.assert_empty("after rm");
}

#[test]
fn a_record_of_a_run_by_a_newer_vmkit_is_refused_and_kept_and_its_vm_runs_on() {
    let life = Life::new();
    life.must(["create", "a", "--image", "base.img", "--memory", "64MiB", "--accel", "tcg"]);
    life.must(["start", "a"]);
    let record = life.home().join("vms/a/qemu.json");
    let known = fs::read(&record).unwrap();
    let newer = "{\"version\": 2}";
    fs::write(&record, newer).unwrap();
    for line in ["info a", "start a", "suspend a", "stop --timeout 0 a", "rm --force a"] {
        let refused = life.vmkit(line.split(' '));
        assert!(refused.code.is_some_and(|code| code != 0), "{line}: {refused:?}");
        let expected = "qemu.json: the record has version 2, and this vmkit reads version 1";
        assert!(refused.stderr.contains(expected), "{line}: {refused:?}");
        assert_eq!(fs::read_to_string(&record).unwrap(), newer, "{line}");
        assert_eq!(life.qemus().len(), 1, "{line}");
    }
    fs::write(&record, known).unwrap();
    assert_eq!(life.state("a"), "running");
    life.must(["rm", "--force", "a"]);
    life.assert_empty("after rm");
}
