//! A project's machines on the real QEMU: made in order, killed half way, changed, reloaded, failed and removed.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod real;
mod support;

use std::fs;
use std::process::Stdio;

use real::{LONG, Life, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmkit::spec::Machine;
use vmkit_testkit::guest;

/// What the file says that the test changes.
struct File {
    forwards: &'static str,
    cpus: u32,
    more_steps: &'static str,
}

/// Three machines, one after the other: two of a kernel alone around a whole Debian.
fn write(life: &Life, file: &File) {
    let (tiny, debian) = (guest::tiny(), guest::debian());
    let small = format!(
        "kernel = {:?}\ninitrd = {:?}\ncmdline = {:?}\nmemory = {}\n",
        tiny.kernel,
        tiny.initrd,
        tiny.cmdline(Machine::Q35),
        tiny.memory.mib()
    );
    let text = format!(
        "version = 1\nproject.name = 'trio'\ndefaults.accel = 'tcg'\n\n\
         [machine.db]\n{small}cpus = {}\nforwards = [{}]\n\n\
         [machine.web]\nimage = {:?}\nkernel = {:?}\ninitrd = {:?}\ncmdline = {:?}\nmemory = {}\n\
         depends_on = ['db']\n\
         files = [{{ from = 'page', to = '/srv/page' }}]\n\
         provision = [{{ name = 'count', shell = 'echo once >> /srv/count' }}{}]\n\
         ready.command = 'test -s /srv/count'\n\n\
         [machine.edge]\n{small}depends_on = ['web']\n",
        file.cpus,
        file.forwards,
        debian.disk.as_ref().unwrap(),
        debian.kernel,
        debian.initrd,
        debian.cmdline(Machine::Q35),
        debian.memory.mib(),
        file.more_steps,
    );
    fs::write(life.file("vmkit.toml"), text).unwrap();
}

fn machines(life: &Life, arguments: &[&str]) -> Vec<Value> {
    let told: Value = serde_json::from_str(&life.must(arguments)).unwrap();
    told["machines"].as_array().or(told.as_array()).unwrap().clone()
}

/// Answers the process of each machine's QEMU.
fn qemus(life: &Life) -> Vec<Pid> {
    ["trio-db", "trio-web", "trio-edge"].map(|name| life.qemu(name)).to_vec()
}

#[test]
fn three_machines_come_up_in_order_whatever_happens_to_the_command() {
    let life = Life::new();
    fs::create_dir(life.file("page")).unwrap();
    fs::write(life.file("page/index"), "hello\n").unwrap();
    let mut file = File { forwards: "", cpus: 1, more_steps: "" };
    write(&life, &file);

    // Killed while the second machine boots: the first one runs, the third one is not begun.
    let mut up = life.command(["up"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let log = life.home().join("vms/trio-web/console.log");
    let boots = || fs::metadata(&log).is_ok_and(|log| log.len() > 0);
    assert!(until(LONG, boots), "the second machine does not boot");
    kill_process(Pid::from_raw(i32::try_from(up.id()).unwrap()).unwrap(), Signal::KILL).unwrap();
    up.wait().unwrap();
    assert_eq!(life.state("trio-db"), "running");
    assert_eq!(life.vmkit(["info", "trio-edge"]).code, Some(3));

    life.must(["up"]);
    let before = qemus(&life);
    assert_eq!(
        life.must(["exec", "trio-web", "--", "cat", "/srv/page/index", "/srv/count"]),
        "hello\nonce\n"
    );

    // Again: everything is right, and is left alone.
    for machine in machines(&life, &["plan", "--json"]) {
        assert_eq!(
            (&machine["action"], machine["steps"].as_array().unwrap().len()),
            (&"keep".into(), 0),
            "{machine}"
        );
    }
    life.must(["up"]);
    assert_eq!(qemus(&life), before);
    assert_eq!(life.must(["exec", "trio-web", "--", "cat", "/srv/count"]), "once\n");

    // What applies at once is applied at once.
    file.forwards = "'7'";
    write(&life, &file);
    life.must(["up"]);
    let forwards = life.info("trio-db")["run"]["forwards"].as_array().unwrap().clone();
    assert!(forwards.iter().any(|it| it["guest_port"] == 7), "{forwards:?}");
    assert_eq!(qemus(&life), before);

    // What waits for the next start does, until `reload`.
    file.cpus = 2;
    write(&life, &file);
    life.must(["up", "db"]);
    assert_eq!(life.info("trio-db")["next_start"][0]["field"], "cpus");
    life.must(["reload", "db"]);
    let db = life.info("trio-db");
    assert_eq!((db["cpus"].as_u64(), db["next_start"].as_array().unwrap().len()), (Some(2), 0));

    // A step that fails is named with its code, and the machine's neighbours live on.
    file.more_steps = ", { name = 'breaks', shell = 'echo so it goes; exit 7' }";
    write(&life, &file);
    let failed = life.vmkit(["up"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let said = format!("{}{}", failed.stdout, failed.stderr);
    assert!(said.contains("breaks") && said.contains('7') && said.contains("so it goes"), "{failed:?}");
    let states = machines(&life, &["status", "--json"]);
    assert!(states.iter().all(|machine| machine["state"] == "running"), "{states:?}");

    life.must(["down", "--rm"]);
    assert_eq!(life.must(["ls", "--json"]).trim(), "[]");
    assert!(until(LONG, || life.processes().is_empty()), "{:?}", life.processes());
}
