//! A project's machines on the real QEMU: made in order, killed half way, changed, reloaded, failed
//! and removed.

use std::fs;
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};

use crate::harness::{Ear, LONG, Life, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vmkit::spec::MachineType;
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
        tiny.cmdline(MachineType::Q35),
        tiny.memory.mib()
    );
    let text = format!(
        "version = 1\nproject.name = 'trio'\ndefaults.accel = 'tcg'\n\n\
         [machine.db]\n{small}cpus = {}\nforwards = [{}]\n\n\
         [machine.web]\nimage = {:?}\nkernel = {:?}\ninitrd = {:?}\ncmdline = {:?}\nmemory = {}\n\
         depends_on = ['db']\n\
         files = [{{ from = 'page', to = '/srv/page' }}]\n\
         provision = [{{ name = 'count', shell = 'sleep 1000 & echo once >> /srv/count' }}{}]\n\
         ready.command = 'test -s /srv/count'\n\n\
         [machine.edge]\n{small}depends_on = ['web']\n",
        file.cpus,
        file.forwards,
        debian.disk.as_ref().unwrap(),
        debian.kernel,
        debian.initrd,
        debian.cmdline(MachineType::Q35),
        debian.memory.mib(),
        file.more_steps,
    );
    fs::write(life.file("vmkit.toml"), text).unwrap();
}

fn machines(life: &Life, arguments: &[&str]) -> Vec<Value> {
    let told: Value = serde_json::from_str(&life.must(arguments)).unwrap();
    told["machines"].as_array().or(told.as_array()).unwrap().clone()
}

/// Returns the process of each machine's QEMU.
fn qemus(life: &Life) -> Vec<Pid> {
    ["trio-db", "trio-web", "trio-edge"].map(|name| life.qemu(name)).to_vec()
}

#[test]
fn a_machine_that_will_let_nothing_in_is_reported_long_before_the_deadline() {
    let life = Life::new();
    let tiny = guest::tiny();
    let text = format!(
        "version = 1\nproject.name = 'odd'\n[machine.web]\naccel = 'tcg'\nkernel = {:?}\ninitrd = {:?}\n\
         cmdline = {:?}\nmemory = {}\ncloud_init = {{}}\nready = {{ ssh = true, timeout = '600s' }}\n",
        tiny.kernel,
        tiny.initrd,
        tiny.cmdline(MachineType::Q35),
        tiny.memory.mib()
    );
    fs::write(life.file("vmkit.toml"), text).unwrap();
    let mut up = life.command(["up"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = Ear::new(fs::File::from(OwnedFd::from(up.stderr.take().unwrap())));
    said.hears("warning: web: the guest is up, and has neither cloud-init nor an SSH server: ");
    said.hears("look in with `vmkit console odd-web`\n");
    cut(up, Signal::INT);
    life.must(["down", "--rm"]);
}

/// Brings up the trio with a step of `web` that fails, and reads what is said of it.
fn fails_at_its_step(life: &Life) {
    let failed = life.vmkit(["up"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    let log = life.home().join("vms/trio-web/kept/provision.log");
    for line in [
        "web  | so it goes",
        "db: unchanged; `vmkit console trio-db` attaches to it",
        "web: a step failed; `vmkit shell trio-web` opens a shell",
        "warning: edge was not changed, since it depends on web",
        "hint: `vmkit shell trio-web` opens a shell in it; `vmkit up` continues with this step",
        &format!(
            "error: the step `breaks` of the machine `web` failed: exit code 7 (its log: {})",
            log.display()
        ),
    ] {
        assert!(failed.stderr.lines().any(|said| said == line), "{line}: {failed:?}");
    }
    assert!(fs::read_to_string(log).unwrap().contains("so it goes"));
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
    fails_at_its_step(&life);
    let states = machines(&life, &["status", "--json"]);
    assert!(states.iter().all(|machine| machine["state"] == "running"), "{states:?}");

    life.must(["down", "--rm"]);
    assert_eq!(life.must(["ls", "--json"]).trim(), "[]");
    assert!(until(LONG, || life.processes().is_empty()), "{:?}", life.processes());
}

/// The size of a transfer that is to be interrupted: large enough to be still in progress then.
const LARGE_BYTES: usize = 48 << 20;

/// Runs at the beginning of a step: notes each earlier one of its name that still runs, and how
/// many there were.
const COUNTED: &str = "for pid in $(cat /srv/pids-$0 2>/dev/null); do if kill -0 $pid; then echo $pid >>/srv/twice; fi; done\n\
    echo $$ >>/srv/pids-$0\n";

/// Runs a script in the guest as root.
fn in_guest(life: &Life, text: &str) -> String {
    life.must(["exec", "cut-web", "--", "sudo", "sh", "-c", text])
}

/// Starts `up` with this one step, and reads its output.
fn begin_up(life: &Life, step: &str) -> (Child, Ear) {
    let debian = guest::debian();
    let text = format!(
        "version = 1\nproject.name = 'cut'\n[machine.web]\naccel = 'tcg'\nimage = {:?}\nkernel = {:?}\n\
         initrd = {:?}\ncmdline = {:?}\nmemory = {}\nprovision = [{step}]\n",
        debian.disk.as_ref().unwrap(),
        debian.kernel,
        debian.initrd,
        debian.cmdline(MachineType::Q35),
        debian.memory.mib(),
    );
    fs::write(life.file("vmkit.toml"), text).unwrap();
    let mut up = life.command(["up"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let said = Ear::new(fs::File::from(OwnedFd::from(up.stderr.take().unwrap())));
    (up, said)
}

/// Ends `up` by a signal, as it is in the middle of something.
fn cut(mut up: Child, signal: Signal) {
    kill_process(Pid::from_child(&up), signal).unwrap();
    let code = up.wait().unwrap().code();
    assert_eq!(code, (signal == Signal::INT).then_some(130));
}

#[test]
fn what_is_cut_off_in_a_guest_is_finished_by_the_next_up_and_never_runs_twice_at_once() {
    let life = Life::new();
    fs::create_dir(life.file("tree")).unwrap();
    for name in ["a", "z"] {
        fs::write(life.file("tree").as_str().to_owned() + "/" + name, name).unwrap();
    }
    fs::write(life.file("tree") + "/large", vec![b'x'; LARGE_BYTES]).unwrap();
    let (mut up, mut said) = begin_up(&life, "");
    up.wait().unwrap();
    assert_eq!(life.state("cut-web"), "running", "{}", said.rest());

    for (name, signal) in [("killed", Signal::KILL), ("interrupted", Signal::INT)] {
        // A step that is at work, and does not hear of SIGTERM either.
        let text = COUNTED.replace("$0", name);
        let step = format!(
            "{{ name = 'sleep {name}', shell = '''\n{text}trap \"\" TERM\necho at work\n\
             [ $(wc -l </srv/pids-{name}) -gt 1 ] || sleep 600\necho slept >>/srv/slept-{name}\n''' }}"
        );
        let (up, mut said) = begin_up(&life, &step);
        said.hears("| at work");
        cut(up, signal);
        life.must(["up"]);
        assert_eq!(in_guest(&life, &format!("cat /srv/slept-{name}; wc -l </srv/pids-{name}")), "slept\n2\n");

        // A script on its way.
        let mut script =
            format!("#!/bin/sh\n{text}echo ran >>/srv/ran-{name}\n").replace("/srv/pids", "/srv/script-pids");
        script.push_str(&format!("# {}\n", "x".repeat(60)).repeat(LARGE_BYTES / 63));
        fs::write(life.file("large.sh"), script).unwrap();
        let (up, _said) = begin_up(&life, &format!("{{ name = 'script {name}', script = 'large.sh' }}"));
        let comes =
            || !in_guest(&life, "find /tmp/vmkit-step-*/script -size +0 2>/dev/null || true").is_empty();
        assert!(until(LONG, comes), "the script does not come");
        cut(up, signal);
        assert_eq!(
            in_guest(&life, &format!("cat /srv/ran-{name} 2>/dev/null || true")),
            "",
            "half a script was run"
        );
        life.must(["up"]);
        assert_eq!(in_guest(&life, &format!("cat /srv/ran-{name}")), "ran\n");

        // A folder on its way.
        let copy = format!("{{ name = 'copy {name}', copy = {{ from = 'tree', to = '/srv/tree-{name}' }} }}");
        let (up, _said) = begin_up(&life, &copy);
        let comes = || !in_guest(&life, "find /srv/.vmkit-*/it/large 2>/dev/null || true").is_empty();
        assert!(until(LONG, comes), "the folder does not come");
        cut(up, signal);
        assert_eq!(in_guest(&life, &format!("ls -d /srv/tree-{name} 2>/dev/null || true")), "");
        life.must(["up"]);
        let there = in_guest(&life, &format!("cd /srv/tree-{name}; cat a z; wc -c <large"));
        assert_eq!(there, format!("az{LARGE_BYTES}\n"));
    }
    let left = "ls -d /srv/twice /srv/.vmkit-* /tmp/vmkit-step-* 2>/dev/null || true";
    assert_eq!(in_guest(&life, left), "", "nothing ran twice at once, and nothing is left behind");
    life.must(["down", "--rm"]);
}
