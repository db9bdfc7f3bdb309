//! The life of a real VM by its commands. The guest runs under TCG, so it takes its time.

use std::io::Write;
use std::process::Stdio;

use serde_json::Value;
use vmkit::spec::MachineType;
use vmkit_testkit::guest::{DebianGuest, tiny};

use crate::harness::Life;
use crate::support::Host;
use crate::support::stream::Heard;

/// Waiting for a guest under TCG on a busy host: far more than it takes.
const PATIENCE: [&str; 2] = ["--timeout", "300"];

/// A VM of the tiny guest; whatever is left of it ends with the test.
struct Vm {
    host: Host,
}

impl Vm {
    fn started() -> Self {
        let guest = tiny();
        let vm = Self { host: Host::with_real_qemu() };
        vm.host.must(arguments(&guest));
        vm
    }

    fn info(&self) -> Value {
        serde_json::from_str(&self.host.must(["info", "web", "--json"])).unwrap()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.host.vmkit(["rm", "--force", "web"]);
    }
}

fn arguments(guest: &DebianGuest) -> Vec<String> {
    let path = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let fixed = ["create", "web", "--start", "--accel", "tcg", "--memory"].map(str::to_owned);
    let mut arguments = Vec::from(fixed);
    arguments.push(guest.memory.to_string());
    arguments.extend([
        "--kernel".to_owned(),
        path(&guest.kernel),
        "--initrd".to_owned(),
        path(&guest.initrd),
    ]);
    arguments.extend(["--cmdline".to_owned(), guest.cmdline(MachineType::Q35).to_owned()]);
    arguments
}

#[test]
fn a_vm_lives_from_create_to_rm() {
    let vm = Vm::started();
    let host = &vm.host;
    assert_eq!(vm.info()["state"], "running");
    host.must([&["wait", "web", "agent"], &PATIENCE[..]].concat());

    let run = &vm.info()["run"];
    let ssh = run["forwards"][0]["host"].as_str().unwrap().to_owned();
    let row = host.must(["ls"]);
    assert!(row.contains("running") && row.contains(&format!("{ssh}->22")), "{row}");
    let ip: Value = serde_json::from_str(&host.must(["ip", "web", "--json"])).unwrap();
    assert_eq!((&ip["address"], &ip["forwards"]), (&Value::from("127.0.0.1"), &run["forwards"]));

    host.must(["start", "web"]);
    assert_eq!(vm.info()["run"]["pid"], run["pid"], "a second start is nothing");

    host.must(["suspend", "web"]);
    assert_eq!(vm.info()["state"], "suspended");
    let refused = host.vmkit(["start", "web"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert!(refused.stderr.contains("resume it"), "{refused:?}");
    host.must(["resume", "web"]);

    let refused = host.vmkit(["rm", "web"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    let stopped: Value =
        serde_json::from_str(&host.must(["stop", "web", "--timeout", "300", "--json"])).unwrap();
    assert_eq!((&stopped["state"], &stopped["run"]), (&Value::from("stopped"), &Value::Null));
    assert!(host.must(["logs", "web"]).contains(&tiny().ready_line));

    host.must(["restart", "web"]);
    assert_eq!(vm.info()["state"], "running");
    host.must(["stop", "web", "--timeout", "0"]);
    host.must(["rm", "web"]);
    assert!(!host.home().join("vms/web").exists());
    assert_eq!(host.vmkit(["info", "web"]).code, Some(3));
}

#[test]
fn a_shell_in_the_guest_replies_at_the_console() {
    let vm = Vm::started();
    let host = &vm.host;
    host.must([&["wait", "web", "agent"], &PATIENCE[..]].concat());
    let mut command = host.command(["console", "web"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut said = Heard::new(child.stdout.take().unwrap());
    said.until(&tiny().ready_line);

    let second = host.vmkit(["console", "web"]);
    assert_eq!(second.code, Some(6), "{second:?}");
    assert!(second.stderr.contains(&format!("by process {}", child.id())), "{second:?}");

    let mut stdin = child.stdin.take().unwrap();
    // QEMU logs a byte after it has sent it: once a later one is here, the first answer is in the
    // log, killed or not.
    stdin.write_all(b"\necho $((6 * 7 * 1000)); echo $((43 * 1000))\n").unwrap();
    said.until("43000");
    host.must(["stop", "web", "--timeout", "0"]);
    assert!(crate::support::stream::ended(&mut child).success());
    assert!(host.must(["logs", "web", "--tail", "20"]).contains("42000"));
}

#[test]
fn a_wait_that_times_out_names_what_was_awaited_and_shows_the_last_lines() {
    let vm = Vm::started();
    let host = &vm.host;
    host.must([&["wait", "web", "agent"], &PATIENCE[..]].concat());
    let answer = host.vmkit(["wait", "web", "stopped", "--timeout", "0.5"]);
    assert_eq!(answer.code, Some(5), "{answer:?}");
    assert!(answer.stderr.starts_with("error: waited 0.5 s for "), "{answer:?}");
    assert!(answer.stderr.contains("the console's last lines:\n"), "{answer:?}");
    assert!(answer.stderr.contains("hint: `vmkit logs web` prints"), "{answer:?}");
    assert!(!answer.stderr.contains('\u{1b}'), "what the guest printed commands no terminal: {answer:?}");
}

#[test]
fn a_vm_whose_qemu_was_killed_is_failed_with_the_cause_and_starts_again() {
    let vm = Vm::started();
    let pid = vm.info()["run"]["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let ended = vm.host.vmkit([&["wait", "web", "stopped"], &PATIENCE[..]].concat());
    assert_eq!(ended.code, Some(4), "{ended:?}");
    let info = vm.info();
    assert_eq!((&info["state"], &info["cause"]["kind"]), (&"failed".into(), &"hypervisor-killed".into()));
    let listed = vm.host.must(["ls"]);
    assert!(listed.contains("failed") && listed.contains("SIGKILL"), "{listed}");
    vm.host.must(["start", "web"]);
    assert_eq!(vm.info()["state"], "running");
}

#[test]
fn a_vm_that_does_not_reply_is_listed_as_unknown_and_ends_by_force() {
    let vm = Vm::started();
    let pid = vm.info()["run"]["pid"].as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let listed: Value = serde_json::from_str(&vm.host.must(["ls", "--json"])).unwrap();
    let row = &listed[0];
    assert_eq!((&row["state"], &row["error"]["kind"]), (&"unknown".into(), &"timed-out".into()), "{row}");
    assert_eq!(row["memory_mib"], 256, "what was recorded is shown");
    assert_eq!(vm.host.vmkit(["info", "web"]).code, Some(5));
    vm.host.must(["stop", "web", "--timeout", "0"]);
    assert_eq!(vm.info()["state"], "stopped");
}

#[test]
fn a_saved_guest_continues_unless_its_memory_is_discarded() {
    let life = Life::new();
    life.boot("web", "");
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    life.must(["suspend", "--to-disk", "web"]);
    assert_eq!(life.state("web"), "saved");
    let refused = life.vmkit(["suspend", "web"]);
    let expected = "error: web: cannot suspend a VM that is saved: its memory is on disk already\n\
                    hint: `vmkit start web` continues it\n";
    assert_eq!((refused.code, refused.stderr.as_str()), (Some(4), expected), "{refused:?}");
    let refused = life.vmkit(["ip", "web"]);
    assert!(refused.stderr.contains("hint: `vmkit start web` continues it"), "{refused:?}");
    let changed = life.vmkit(["set", "web", "--cpus", "2"]);
    assert!(changed.stderr.contains("the change waits until the saved guest boots again"), "{changed:?}");
    let plan = life.must(["start", "--dry-run", "web"]);
    assert!(plan.contains("continue the guest saved in") && plan.contains("1,sockets=1"), "{plan}");

    life.must(["start", "--all"]);
    assert_eq!(life.state("web"), "running");
    let printed = life.must(["logs", "web"]);
    assert_eq!(printed.matches("vmkit-guest: ready").count(), 1, "it did not boot again: {printed}");

    life.must(["suspend", "--to-disk", "web"]);
    let info: serde_json::Value = serde_json::from_str(&life.must(["info", "--json", "web"])).unwrap();
    let mib = info["saved_mib"].as_u64().unwrap();
    assert!((1..=512).contains(&mib), "{info}");
    let shown = life.must(["info", "web"]);
    assert!(shown.lines().any(|line| line.ends_with(&format!(" {mib} MiB on disk"))), "{shown}");
    let memory = life.home().join("vms/web/memory");
    std::fs::File::options().write(true).open(&memory).unwrap().set_len(4096).unwrap();
    let refused = life.vmkit(["start", "web"]);
    let (start, end) = (
        "error: web: cannot continue the saved guest (expected its memory, disks and host as they were)\n  \
         caused by: ",
        "\nhint: `vmkit start --discard-saved web` boots it without its memory\n",
    );
    assert!(refused.code == Some(2) && refused.stderr.starts_with(start), "{refused:?}");
    assert!(refused.stderr.ends_with(end), "{refused:?}");
    life.must(["start", "--discard-saved", "web"]);
    life.says("web", "vmkit-guest: ready");
    let plan = life.must(["info", "--json", "web"]);
    assert!(plan.contains("\"cpus\": 2") || plan.contains("\"cpus\":2"), "the change applies: {plan}");
    life.must(["suspend", "--to-disk", "web"]);
    life.must(["rm", "web"]);
    assert_eq!(life.must(["ls", "--json"]), "[]\n");
}
