//! The command with real VMs of the tiny guest: everyday use, and failures of the VM and the host.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::harness::{self, Begun, Ear, LONG, Life, Moments, has_ended, in_own_mounts, mount, until};
use rustix::process::{Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::tcgetattr;
use serde_json::Value;
use vmkit_testkit::guest;

#[test]
fn a_vm_is_created_run_paused_and_shut_down() {
    let life = Life::new();
    let mut arguments = harness::create_arguments(&guest::tiny(), "web", "");
    life.must(&arguments);
    assert_eq!(life.state("web"), "prepared");
    life.must(["rm", "web"]);
    arguments.push("--start".into());
    life.must(&arguments);
    life.must(["wait", "web", "running"]);
    let first = life.qemu("web");
    life.must(["start", "web"]);
    assert_eq!(life.qemu("web"), first, "a second start is nothing");
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    the_commands_that_read_agree(&life);
    assert_eq!(life.info("web")["run"]["accel"], "tcg");

    life.must(["suspend", "web"]);
    assert_eq!(life.row("web")["state"], "suspended");
    assert_eq!(life.vmkit(["wait", "web", "running", "--timeout", "0.3"]).code, Some(5));
    let refused = life.vmkit(["start", "web"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert!(refused.stderr.contains("resume it"), "{refused:?}");
    life.must(["resume", "web"]);
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    assert_eq!(life.vmkit(["rm", "web"]).code, Some(4), "it runs");

    life.says("web", "vmkit-guest: ready");
    let stopped: Value =
        serde_json::from_str(&life.must(["stop", "web", "--timeout", "180", "--json"])).unwrap();
    assert_eq!((&stopped["state"], &stopped["run"]), (&"stopped".into(), &Value::Null));
    assert!(life.must(["logs", "web"]).contains("powering off: power button"), "the guest was asked");
    assert_eq!(life.vmkit(["ip", "web"]).code, Some(4));
    life.must(["restart", "web"]);
    assert_eq!(life.state("web"), "running");
    life.must(["stop", "web", "--timeout", "0"]);
    life.must(["rm", "web"]);
    assert_eq!(life.vmkit(["info", "web"]).code, Some(3));
    life.assert_empty("after rm");
}

fn the_commands_that_read_agree(life: &Life) {
    let (info, row) = (life.info("web"), life.row("web"));
    assert_eq!((&info["state"], &row["state"]), (&"running".into(), &"running".into()));
    assert_eq!(info["run"]["pid"], row["pid"]);
    assert_eq!(info["run"]["forwards"], row["forwards"]);
    let pid = i32::try_from(row["pid"].as_i64().unwrap()).unwrap();
    assert_eq!(life.qemus().iter().map(|qemu| qemu.pid.as_raw_pid()).collect::<Vec<_>>(), [pid]);
    let address: Value = serde_json::from_str(&life.must(["ip", "web", "--json"])).unwrap();
    assert_eq!((&address["address"], &address["forwards"]), (&"127.0.0.1".into(), &row["forwards"]));
    assert_eq!(life.must(["ip", "web"]), "127.0.0.1\n");
    let port = row["forwards"][0]["host"].as_str().unwrap();
    for table in [life.must(["ls"]), life.must(["info", "web"])] {
        assert!(table.contains("running") && table.contains(&format!("{port}->22")), "{table}");
    }
    let console = life.must(["console", "web", "--print-endpoint"]);
    assert_eq!(info["run"]["console"]["path"], console.trim_end());
    assert!(life.must(["logs", "web"]).contains("Linux version"));
}

#[test]
fn a_vm_that_runs_is_what_it_was_set_to_once_it_is_restarted() {
    let life = Life::new();
    life.boot("web", "");
    let (qemu, cpus) = (life.qemu("web"), || life.must(["exec", "web", "--", "nproc"]));
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    assert_eq!(cpus(), "1\n");
    let set = life.vmkit(["set", "web", "--cpus", "2", "--memory", "192MiB"]);
    assert!(set.stdout.starts_with("cpus: 1 -> 2, at the next start\nmemory: "), "{set:?}");
    assert_eq!(set.stderr, "web: the change waits for the next start: `vmkit restart web` applies it now\n");
    let set = life.must(["set", "web", "--memory", "320MiB"]);
    assert_eq!(set, "memory: 192MiB -> 320MiB, at the next start\n");
    let info = life.info("web");
    let waits: Vec<&Value> = info["next_start"].as_array().unwrap().iter().map(|next| &next["to"]).collect();
    assert_eq!((&info["cpus"], waits), (&1.into(), vec![&"2".into(), &"320MiB".into()]), "both wait");
    assert_eq!((life.qemu("web"), cpus().as_str()), (qemu, "1\n"), "the guest goes on as it was");

    life.must(["restart", "web", "--timeout", "0"]);
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    assert_eq!(cpus(), "2\n");
    let info = life.info("web");
    assert_eq!((&info["memory_mib"], &info["next_start"]), (&320.into(), &Value::Array(Vec::new())));
    let command = life.qemus().remove(0).cmdline;
    assert!(command.contains(" -m 320M "), "{command}");
}

/// A terminal with a command at it.
struct Terminal {
    ear: Ear,
    slave: File,
    begun: Begun,
}

impl Terminal {
    fn with(life: &Life, arguments: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let mut command = life.command(arguments);
        let at = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(at()).stdout(at()).stderr(at());
        Self { ear: Ear::new(File::from(master)), begun: Begun::of(&mut command), slave }
    }

    fn modes(&self) -> String {
        format!("{:?}", tcgetattr(&self.slave).unwrap())
    }
}

#[test]
fn a_person_at_the_console_sees_the_past_types_and_leaves() {
    let life = Life::new();
    life.boot("web", "");
    // The mode of an untouched terminal.
    let usual = Terminal::with(&life, &["--version"]).modes();
    let mut terminal = Terminal::with(&life, &["console", "web"]);
    terminal.ear.hears("Linux version");
    terminal.ear.hears("vmkit-guest# ");
    assert_ne!(terminal.modes(), usual, "the terminal is raw meanwhile");
    terminal.ear.types("echo he''llo\r");
    terminal.ear.hears("hello");

    let pid = terminal.begun.pid();
    let other = life.vmkit(["console", "web"]);
    assert_eq!(other.code, Some(6), "{other:?}");
    assert!(other.stderr.contains(&format!("in use by process {pid}")), "{other:?}");

    terminal.ear.types("\x1d");
    assert!(has_ended(pid, LONG), "Ctrl-] leaves");
    assert_eq!(terminal.modes(), usual, "the terminal is as it was");
    assert_eq!(terminal.begun.ended(LONG).code, Some(0));

    let mut terminal = Terminal::with(&life, &["console", "web"]);
    terminal.ear.hears("hello");
    assert_ne!(terminal.modes(), usual);
    kill_process(terminal.begun.pid(), Signal::TERM).unwrap();
    assert!(has_ended(terminal.begun.pid(), LONG));
    assert_eq!(terminal.modes(), usual, "it is as it was after a signal, too");
}

#[test]
fn a_log_is_followed_until_the_vm_is_removed_and_a_guest_may_end_itself() {
    let life = Life::new();
    life.boot("web", "");
    let mut follower = life.begin(&["logs", "web", "--follow", "--tail", "1"]);
    let mut followed = follower.output();
    let mut typist = life.begin(&["console", "web", "--timeout", "1"]);
    typist.input().write_all(b"echo fol''lowed\n").unwrap();
    followed.hears("followed\r\n");
    let typed = typist.ended(LONG);
    assert_eq!(typed.code, Some(0), "{typed:?}");
    assert!(typed.stdout.contains("Linux version") && typed.stdout.contains("followed"), "{typed:?}");

    let mut typist = life.begin(&["console", "web"]);
    typist.input().write_all(b"poweroff -f\n").unwrap();
    let typed = typist.ended(LONG);
    assert_eq!(typed.code, Some(0), "{typed:?}");
    assert!(typed.stderr.contains("the VM has ended"), "{typed:?}");
    assert_eq!(life.row("web")["state"], "stopped");
    assert_eq!(life.state("web"), "stopped");

    life.must(["rm", "web"]);
    assert_eq!(follower.ended(LONG).code, Some(0));
    life.assert_empty("after rm");
}

#[test]
fn a_wait_for_the_end_is_over_as_soon_as_the_stop_is_done() {
    let life = Life::new();
    life.boot("web", "");
    let waiting = life.begin(&["wait", "web", "stopped", "--timeout", "180"]);
    let idle = life.begin(&["wait", "web", "ssh", "--timeout", "180"]);
    assert!(until(LONG, || waiting.watches() && idle.watches()));
    let (stop, took) = life.timed(&["stop", "web", "--timeout", "180"]);
    assert_eq!(stop.code, Some(0), "{stop:?}");
    let stopped = Instant::now();
    let waiting = waiting.ended(LONG);
    assert_eq!(waiting.code, Some(0), "{waiting:?}, after a stop of {took:?}: {stop:?}");
    // A part of the timeout of 180 s; that it takes milliseconds is tested in the library.
    assert!(stopped.elapsed() < Duration::from_secs(30), "{:?} after the stop", stopped.elapsed());
    let idle = idle.ended(LONG);
    assert_eq!(idle.code, Some(4), "what awaits a guest that is gone ends, too: {idle:?}");
}

#[test]
fn a_disk_in_use_is_reported_with_the_vm_that_uses_it() {
    let life = Life::new();
    let create = |name: &str| {
        let mut arguments = harness::create_arguments(&guest::tiny(), name, "");
        arguments.extend(["--data-disk".to_owned(), life.file("data, [1].img")]);
        life.must(arguments);
    };
    fs::write(life.file("data, [1].img"), vec![1; 1 << 20]).unwrap();
    create("web");
    create("db");
    life.must(["start", "web"]);
    let refused = life.vmkit(["start", "db"]);
    assert_eq!(refused.code, Some(6), "{refused:?}");
    let said = format!(
        "error: the disk {} of the VM `db`, which the VM `web` runs with, is in use by process {}\n",
        life.file("data, [1].img"),
        life.qemu("web").as_raw_pid()
    );
    assert_eq!(refused.stderr, said);
    assert!(life.must(["logs", "--hypervisor", "db"]).contains("Failed to get"), "the log has QEMU's words");
    let table = life.must(["ls"]);
    let row = table.lines().find(|line| line.starts_with("db ")).unwrap();
    assert!(row.contains("another process uses the disk") && row.chars().count() < 140, "{row}");
    life.must(["stop", "web", "--timeout", "0"]);
    life.must(["start", "db"]);
}

#[test]
fn a_qemu_killed_from_outside_is_listed_as_failed_and_starts_again() {
    let life = Life::new();
    life.make("web", "");
    life.must(["start", "web"]);
    let shot = life.qemu("web");
    kill_process(shot, Signal::KILL).unwrap();
    let ended = life.vmkit(["wait", "web", "stopped", "--timeout", "180"]);
    assert_eq!(ended.code, Some(4), "{ended:?}");
    let row = life.row("web");
    let cause = &row["cause"]["kind"];
    assert_eq!((&row["state"], cause), (&"failed".into(), &"hypervisor-killed".into()), "{row}");
    let listed = life.must(["ls"]);
    assert!(listed.contains("signal 9 (SIGKILL)"), "{listed}");
    assert!(life.must(["info", "web"]).contains("signal 9 (SIGKILL)"));
    life.must(["start", "web"]);
    assert_eq!(life.state("web"), "running");
    assert_ne!(life.qemu("web"), shot);
    life.must(["rm", "--force", "web"]);
    life.assert_empty("after rm --force");
}

#[test]
fn a_panic_of_the_guest_ends_a_wait_and_is_reported() {
    let life = Life::new();
    life.make("web", "vmkit.panic");
    life.must(["start", "web"]);
    let waited = life.vmkit(["wait", "web", "ssh", "--timeout", "180"]);
    assert_eq!(waited.code, Some(4), "{waited:?}");
    assert!(waited.stderr.contains("panic"), "{waited:?}");
    let row = life.row("web");
    assert_eq!((&row["state"], &row["cause"]["kind"]), (&"failed".into(), &"guest-panic".into()), "{row}");
    let before = row["pid"].clone();
    life.must(["start", "web"]);
    let after = life.row("web");
    assert_ne!(after["pid"], before);
    life.must(["rm", "--force", "web"]);
    life.assert_empty("after rm --force");
}

#[test]
fn a_kernel_panic_without_a_panic_device_is_found_in_the_console() {
    let life = Life::new();
    // Neither an init nor a root file system: long before any module could be loaded.
    life.make("web", "rdinit=/nonexistent root=LABEL=nowhere panic=0");
    life.must(["start", "web"]);
    let waited = life.vmkit(["wait", "web", "agent", "--timeout", "170"]);
    assert_eq!(waited.code, Some(4), "it is no timeout: {waited:?}");
    assert!(
        waited.stderr.contains("the guest's kernel panicked: VFS: Unable to mount root fs"),
        "{waited:?}"
    );
    assert_eq!(life.state("web"), "failed");
    let refused = life.vmkit(["exec", "--via", "agent", "web", "--", "true"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert!(refused.stderr.contains("panicked"), "{refused:?}");
    // It ignores the power button, so the stop does not wait for that.
    let stopped = life.vmkit(["stop", "web", "--timeout", "170"]);
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    assert!(stopped.stderr.contains("can no longer react to its power button"), "{stopped:?}");
}

/// Returns the least difference of a guest's clock to ours: delays on the way are subtracted.
fn clock_error(life: &Life, name: &str) -> Duration {
    let socket = life.info(name)["run"]["agent"].as_str().unwrap().to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut agent = vmkit::qemu::GuestAgent::connect(socket.as_ref(), LONG).await.unwrap();
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let before = now();
        let guest = agent.time(LONG).await.unwrap();
        let after = now();
        before.saturating_sub(guest).max(guest.saturating_sub(after))
    })
}

#[test]
fn a_guest_whose_agent_runs_has_the_right_time_after_a_pause() {
    let life = Life::new();
    life.boot("web", "");
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    life.must(["suspend", "web"]);
    // The guest's clock would be wrong by this much.
    sleep(Duration::from_secs(5));
    let resumed = life.vmkit(["resume", "web"]);
    assert_eq!((resumed.code, resumed.stderr.as_str()), (Some(0), ""), "{resumed:?}");
    let error = clock_error(&life, "web");
    // Milliseconds on an idle host, and up to this on one that is too busy for better.
    assert!(error < Duration::from_secs(1), "it is {error:?} off");
}

#[test]
fn a_guest_whose_clock_cannot_be_set_goes_on_at_once_with_a_warning() {
    let life = Life::new();
    life.make("web", "rdinit=/bin/sh");
    life.must(["start", "web"]);
    life.says("web", "#");
    life.must(["suspend", "web"]);
    // The guest's clock is wrong by this much.
    sleep(Duration::from_secs(2));
    let resumed = life.vmkit(["resume", "web"]);
    assert_eq!(resumed.code, Some(0), "{resumed:?}");
    assert!(resumed.stderr.contains("clock") && resumed.stderr.contains("no guest agent"), "{resumed:?}");
    assert_eq!(life.state("web"), "running");
}

#[test]
fn without_its_runtime_directory_a_vm_is_asked_and_shut_down_in_order() {
    let life = Life::new();
    life.boot("web", "");
    let run = fs::read_dir(life.home().join("run")).unwrap().next().unwrap().unwrap().path();
    fs::rename(&run, life.home().join("elsewhere")).unwrap();
    assert_eq!(life.row("web")["state"], "running");
    life.must(["suspend", "web"]);
    assert_eq!(life.row("web")["state"], "suspended");
    life.must(["resume", "web"]);
    let console = life.vmkit(["exec", "--via", "agent", "web", "--", "true"]);
    assert!(console.stderr.contains("agent.sock"), "{console:?}");
    let stopped = life.vmkit(["stop", "web", "--timeout", "170"]);
    assert_eq!((stopped.code, stopped.stderr.as_str()), (Some(0), ""), "{stopped:?}");
    assert!(life.must(["logs", "web"]).contains("powering off: power button"), "the guest was asked");
    fs::remove_dir_all(life.home().join("elsewhere")).unwrap();

    // Even without the spare monitor, its state is `running`, and the stop is honest about how it
    // ended.
    life.must(["start", "web"]);
    fs::remove_dir_all(&run).unwrap();
    fs::remove_file(life.home().join("vms/web/spare.sock")).unwrap();
    assert_eq!(life.row("web")["state"], "running");
    let (stopped, took) = life.timed(&["stop", "web", "--timeout", "170"]);
    assert_eq!(stopped.code, Some(0), "{stopped:?}");
    assert!(
        stopped.stderr.contains("can't be asked") && took < Duration::from_secs(100),
        "{took:?} {stopped:?}"
    );
    life.must(["start", "web"]);
    fs::remove_dir_all(&run).unwrap();
    life.must(["rm", "--force", "web"]);
    life.assert_empty("after rm");
}

#[test]
fn a_wait_that_times_out_names_what_was_awaited_and_shows_the_console() {
    let life = Life::new();
    life.boot("web", "");
    let (waited, took) = life.timed(&["wait", "web", "ssh", "--timeout", "1.5"]);
    assert_eq!(waited.code, Some(5), "{waited:?}");
    assert!(took < Duration::from_secs(15), "{took:?}");
    let said = waited.stderr;
    assert!(said.starts_with("error: waited 1.5 s for `ssh` of the VM `web`, which is running"), "{said}");
    assert!(said.contains("the console's last lines:\n") && said.contains("vmkit-guest: ready"), "{said}");
    assert!(said.contains("hint: `vmkit logs web` prints"), "{said}");
    assert!(!said.contains('\u{1b}'), "what the guest printed commands no terminal: {said}");
}

#[test]
fn a_command_killed_at_any_moment_is_repaired_by_the_next_one() {
    const NOW: [&str; 2] = ["--timeout", "0"];
    let life = Life::new();
    life.make("web", "");
    let (_, starting) = life.timed(&["start", "web"]);
    let (_, stopping) = life.timed(&["stop", "web", NOW[0], NOW[1]]);
    let (_, removing) = life.timed(&["rm", "web"]);
    let mut moments = Moments::new();
    for turn in 0..10 {
        life.make("web", "");
        let at = moments.kill(&life, &["start", "web"], starting);
        let after = format!("turn {turn}, start killed after {at:?}");
        let answer = life.vmkit(["start", "web"]);
        assert_eq!(answer.code, Some(0), "{after}: {answer:?}");
        assert_eq!(life.qemus().len(), 1, "{after}: {:?}", life.qemus());
        assert_eq!(life.state("web"), "running", "{after}");

        let at = moments.kill(&life, &["stop", "web", NOW[0], NOW[1]], stopping);
        let after = format!("turn {turn}, stop killed after {at:?}");
        let answer = life.vmkit(["stop", "web", NOW[0], NOW[1]]);
        assert_eq!(answer.code, Some(0), "{after}: {answer:?}");
        assert_eq!(life.state("web"), "stopped", "{after}");
        assert_eq!(life.qemus().len(), 0, "{after}: {:?}", life.qemus());

        life.must(["start", "web"]);
        let at = moments.kill(&life, &["rm", "--force", "web"], removing * 2);
        let after = format!("turn {turn}, rm killed after {at:?}");
        let listed = life.vmkit(["ls"]);
        assert_eq!(listed.code, Some(0), "{after}: {listed:?}");
        let answer = life.vmkit(["rm", "--force", "web"]);
        assert!(matches!(answer.code, Some(0 | 3)), "{after}: {answer:?}");
        life.assert_empty(&after);
    }
}

#[test]
fn what_another_boot_left_blocks_nothing_and_names_no_process() {
    let life = Life::new();
    life.make("web", "");
    life.must(["start", "web"]);
    let qemu = life.qemu("web");
    // As after a power cut: no record is updated, and the sockets stay.
    for process in life.processes().iter().filter(|process| process.pid != qemu) {
        kill_process(process.pid, Signal::KILL).unwrap();
        assert!(has_ended(process.pid, LONG));
    }
    kill_process(qemu, Signal::KILL).unwrap();
    assert!(has_ended(qemu, LONG));
    assert!(!life.home().join("run").read_dir().unwrap().flatten().collect::<Vec<_>>().is_empty());

    // The recorded process ids now belong to a foreign process.
    let mut stranger = Command::new("sleep").arg("600").spawn().unwrap();
    let file = life.home().join("vms/web/qemu.json");
    let mut run: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for process in ["hypervisor", "keeper"] {
        run[process]["boot_id"] = "6b1f4f0e-0000-4000-8000-000000000000".into();
        run[process]["pid"] = stranger.id().into();
    }
    fs::write(&file, run.to_string()).unwrap();

    assert_eq!(life.state("web"), "stopped");
    assert_eq!(life.row("web")["state"], "stopped");
    life.must(["start", "web"]);
    assert_eq!(life.state("web"), "running");
    assert_eq!(life.qemus().len(), 1);
    fs::write(&file, run.to_string()).unwrap();
    // No record has the QEMU that runs, but it holds its lock.
    let again = life.vmkit(["start", "web"]);
    assert_eq!(life.qemus().len(), 1, "{again:?}");
    let lives = stranger.try_wait().unwrap().is_none();
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    assert!(lives, "a stranger's process was killed");
}

#[test]
fn a_removal_waits_for_a_stop_at_work_but_not_for_ever() {
    let life = Life::new();
    life.make("web", "vmkit.nobutton");
    life.must(["start", "web"]);
    let stop = life.begin(&["stop", "web", "--timeout", "150"]);
    assert!(until(LONG, || life.row("web")["operation"]["operation"] == "stop"));
    let (refused, took) = life.timed(&["rm", "--force", "web"]);
    assert_eq!(refused.code, Some(6), "{refused:?}");
    let said = format!("error: VM `web` is in use by process {}\n", stop.pid());
    assert_eq!(refused.stderr, said);
    // The stop would take 150 s.
    assert!(took < Duration::from_secs(120), "{took:?}");
    stop.kill();
    let (removed, took) = life.timed(&["rm", "--force", "web"]);
    assert_eq!(removed.code, Some(0), "{removed:?}");
    assert!(took < Duration::from_secs(60), "{took:?}");
    life.assert_empty("after rm --force");
}

#[test]
fn after_an_interrupted_stop_a_later_kill_is_still_a_failure() {
    let life = Life::new();
    life.make("web", "vmkit.nobutton");
    life.must(["start", "web"]);
    let stop = life.begin(&["stop", "web", "--timeout", "150"]);
    assert!(until(LONG, || life.row("web")["operation"]["operation"] == "stop"));
    // Time to ask QEMU as well, for which there is no event.
    sleep(Duration::from_millis(500));
    stop.kill();
    assert_eq!(life.state("web"), "running");
    kill_process(life.qemu("web"), Signal::KILL).unwrap();
    let row = life.row("web");
    assert_eq!(
        (&row["state"], &row["cause"]["kind"]),
        (&"failed".into(), &"hypervisor-killed".into()),
        "{row}"
    );
    life.must(["stop", "web"]);
    assert_eq!(life.state("web"), "stopped", "what has failed is stopped by `stop`");
}

#[test]
fn a_list_waits_for_no_qemu_that_hangs() {
    let life = Life::new();
    for name in ["hung", "well"] {
        life.make(name, "");
        life.must(["start", name]);
    }
    let hung = life.qemu("hung");
    kill_process(hung, Signal::STOP).unwrap();
    let (listed, took) = life.timed(&["ls", "--json"]);
    // QEMU would hang for ever, and the list waits one second.
    assert!(took < Duration::from_secs(10), "{took:?}");
    let rows: Vec<Value> = serde_json::from_str(&listed.stdout).unwrap();
    assert_eq!((&rows[0]["state"], &rows[0]["error"]["kind"]), (&"unknown".into(), &"timed-out".into()));
    assert_eq!(rows[0]["memory_mib"], guest::tiny().memory.mib(), "what was recorded is shown");
    assert_eq!(rows[1]["state"], "running");
    let (told, took) = life.timed(&["info", "hung"]);
    assert_eq!(told.code, Some(5), "{told:?}");
    assert!(took < Duration::from_secs(50), "{took:?}");

    kill_process(hung, Signal::CONT).unwrap();
    assert_eq!(life.state("hung"), "running");
    for (name, by) in [("hung", ["stop", "--timeout=0"]), ("well", ["rm", "--force"])] {
        let qemu = life.qemu(name);
        kill_process(qemu, Signal::STOP).unwrap();
        let (done, took) = life.timed(&[by[0], by[1], name]);
        assert!(done.code == Some(0) && took < Duration::from_secs(60), "{done:?} after {took:?}");
        assert!(has_ended(qemu, Duration::ZERO));
    }
    life.must(["rm", "hung"]);
    life.assert_empty("after rm --force");
}

/// Writes until there is no room left.
fn fill(life: &Life) {
    let mut file = File::create(life.home().join("full")).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

/// Creates files until no inode is left.
fn use_up_inodes(life: &Life) {
    let left = |number: u32| File::create(life.home().join(format!("full-{number}"))).is_ok();
    assert!((0..100_000).any(|number| !left(number)), "the disk has inodes without end");
}

#[test]
fn on_a_full_disk_nothing_new_is_created_and_what_runs_can_be_ended() {
    in_own_mounts(|| {
        let life = Life::new();
        fs::create_dir(life.home()).unwrap();
        mount(&["-t", "tmpfs", "-o", "size=8m,nr_inodes=100,mode=700", "none"], &life.home());
        for name in ["one", "two"] {
            life.make(name, "");
            life.must(["start", name]);
        }
        fill(&life);
        use_up_inodes(&life);
        let files = life.files();
        let refused = life.vmkit(harness::create_arguments(&vmkit_testkit::guest::tiny(), "three", ""));
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains("No space left"), "{refused:?}");
        assert_eq!(life.files(), files, "nothing is left of what could not be made");
        assert_eq!(life.row("one")["state"], "running");
        assert_eq!(life.state("two"), "running");
        let stopped: Value =
            serde_json::from_str(&life.must(["stop", "one", "--timeout", "0", "--json"])).unwrap();
        assert_eq!(stopped["state"], "stopped");
        assert_eq!(life.qemus().len(), 1, "{:?}", life.qemus());
        life.must(["rm", "one"]);
        life.must(["rm", "--force", "two"]);
        life.assert_empty("after rm");
    });
}

#[test]
fn in_a_read_only_home_vms_are_listed_and_none_is_created() {
    in_own_mounts(|| {
        let life = Life::new();
        fs::create_dir(life.home()).unwrap();
        mount(&["-t", "tmpfs", "-o", "size=8m,mode=700", "none"], &life.home());
        life.make("web", "");
        life.must(["start", "web"]);
        let files = life.files();
        // A log that is open for writing keeps its file system writable, but not another mount of
        // it.
        // it.
        mount(&["--bind", life.home().to_str().unwrap()], &life.home());
        mount(&["-o", "remount,bind,ro"], &life.home());
        let refused = life.vmkit(harness::create_arguments(&vmkit_testkit::guest::tiny(), "other", ""));
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains("Read-only file system"), "{refused:?}");
        assert_eq!(life.row("web")["state"], "running");
        assert_eq!(life.state("web"), "running");
        assert_eq!(life.files(), files);
        let stopped = life.vmkit(["stop", "web", "--timeout", "0"]);
        assert_eq!(stopped.code, Some(0), "{stopped:?}");
        assert_eq!(life.qemus().len(), 0, "a guest can be ended even so");
    });
}

#[test]
fn two_homes_know_nothing_of_each_other() {
    let (one, other) = (Life::new(), Life::new());
    for life in [&one, &other] {
        life.make("web", "");
        life.must(["start", "web"]);
    }
    assert_ne!(one.qemu("web"), other.qemu("web"));
    one.must(["rm", "--force", "web"]);
    one.assert_empty("after rm --force");
    assert_eq!(one.must(["ls", "--json"]), "[]\n");
    assert_eq!(other.row("web")["state"], "running");
}

#[test]
fn twenty_starts_at_once_are_one_qemu() {
    let life = Life::new();
    life.make("web", "");
    let starts: Vec<Begun> = (0..20).map(|_| life.begin(&["start", "web", "--json"])).collect();
    let mut pids: Vec<Value> = Vec::new();
    for start in starts {
        let answer = start.ended(LONG);
        assert_eq!(answer.code, Some(0), "{answer:?}");
        let vm: Value = serde_json::from_str(&answer.stdout).unwrap();
        pids.push(vm["run"]["pid"].clone());
    }
    pids.dedup();
    assert_eq!(pids.len(), 1, "{pids:?}");
    assert_eq!(life.qemus().len(), 1, "{:?}", life.qemus());
}

#[test]
fn a_port_is_led_into_a_vm_that_runs_and_outlives_its_restart() {
    let life = Life::new();
    life.boot("vm", "");
    life.says("vm", "eth0 has 10.0.2.15");
    let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let forwarded = lines(life.must(["forward", "vm", "7"]));
    let echo = forwarded.iter().find_map(|line| line.strip_suffix("->7")).expect("a line for the port");
    let greets = || {
        let mut stream = TcpStream::connect(echo)?;
        stream.set_read_timeout(Some(LONG))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        std::io::Result::Ok(&greeting == b"vmkit-guest: hello")
    };
    assert!(until(LONG, || greets().unwrap_or(false)), "nobody greets at {echo}");
    assert_eq!(lines(life.must(["forward", "vm"])), forwarded, "it is listed");
    assert_eq!(lines(life.must(["forward", "vm", "7"])), forwarded, "once more is the same");

    life.create("other");
    let port = echo.rsplit(':').next().unwrap();
    let taken = life.vmkit(["forward", "vm", &format!("{port}:9")]);
    assert_eq!(taken.code, Some(2), "{taken:?}");
    assert!(taken.stderr.contains(&format!("the host's port {port} is in use by the VM `vm`")), "{taken:?}");
    life.must(["restart", "vm", "--timeout", "0"]);
    assert!(life.must(["forward", "vm"]).contains("->7"), "it is there after a restart");
    let left = life.must(["forward", "vm", "7", "--remove"]);
    assert!(!left.contains("->7"), "{left}");
    let gone = life.vmkit(["forward", "vm", "7", "--remove"]);
    assert_eq!((gone.code, gone.stderr.as_str()), (Some(3), "error: vm: forward `7` does not exist\n"));
    life.must(["rm", "--force", "vm", "other"]);
    life.assert_empty("after rm");
}

#[test]
fn a_program_by_the_guest_agent_is_reported_and_ended_as_one_by_ssh() {
    let life = Life::new();
    life.make("web", "--network none");
    life.must(["start", "web"]);
    life.must(["wait", "web", "agent", "--timeout", "180"]);
    let missing = life.vmkit(["exec", "--via", "agent", "web", "--", "nosuchprog"]);
    let expected = "error: cannot run `nosuchprog` in the guest: there is no such program\n";
    assert_eq!((missing.code, missing.stderr.as_str()), (Some(127), expected), "{missing:?}");
    let nowhere = life.vmkit(["exec", "web", "-w", "/nosuch", "--", "true"]);
    assert_eq!(nowhere.code, Some(126), "{nowhere:?}");
    assert!(nowhere.stderr.contains("there is no directory /nosuch in the guest"), "{nowhere:?}");

    let script =
        "echo up > /tmp/up; echo the program is up > /dev/console; sleep 54321; echo anew > /tmp/anew";
    let begun = life.begin(&["exec", "-n", "web", "--", "sh", "-c", script]);
    // The agent serves one client at a time, so the test reads the console.
    life.says("web", "the program is up");
    kill_process(begun.pid(), Signal::TERM).unwrap();
    let answer = begun.ended(Duration::from_secs(30));
    assert_eq!(answer.code, None, "it dies of the signal: {answer:?}");
    let left =
        life.must(["exec", "web", "--", "sh", "-c", "cat /tmp/up; ls /tmp/anew; ps | grep '5432[1]'; :"]);
    assert_eq!(left, "up\n");
}
