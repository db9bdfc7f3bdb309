//! SSH without a guest: a QEMU with nothing to boot, and OpenSSH's real server on loopback in place
//! of the guest's.

use std::fs;
use std::io::{ErrorKind, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::harness::{LONG, Life, in_own_mounts, mount, until};
use crate::sshd::{Daemon, Sshd};
use crate::support::answer;
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use vmkit::spec::{
    Accel, CloudInitConfig, GuestAccess, NetworkConfig, RootDisk, UserNetwork, VmName, VmSpec,
};
use vmkit::store::Home;
use vmkit::{QemuHypervisor, VmManager};

/// A running VM whose SSH server is the test's.
struct Web {
    life: Life,
    sshd: Sshd,
}

impl Web {
    fn new() -> Self {
        Self::with("")
    }

    /// Runs one whose server has additional lines of configuration.
    fn with(config: &str) -> Self {
        let sshd = Sshd::with(config);
        Self { life: led_to(&sshd.access, sshd.address), sshd }
    }

    fn keys(&self) -> std::path::PathBuf {
        self.sshd.dir.path().join("authorized_keys")
    }
}

/// Runs the VM `web`, whose SSH server is at this address and accepts these keys.
fn led_to(access: &GuestAccess, address: SocketAddr) -> Life {
    let life = Life::new();
    let config = CloudInitConfig { access: Some(access.clone()), ..CloudInitConfig::default() };
    let network = NetworkConfig::User(UserNetwork::with_ssh(Vec::new()));
    make(&life, |spec| spec.network(network).cloud_init(config));
    life.must(["start", "web"]);
    lead_to(&life, address);
    life
}

/// Creates the VM `web` with the library, which accepts given keys.
fn make(life: &Life, with: impl FnOnce(vmkit::spec::VmSpecBuilder) -> vmkit::spec::VmSpecBuilder) {
    let home = Home::at(life.home()).unwrap();
    let qemu = QemuHypervisor::builder(home.vms(), home.run()).keeper(env!("CARGO_BIN_EXE_vmkit")).build();
    let manager = VmManager::new(qemu, home);
    let disk = RootDisk { image: life.file("base.img").into(), size: None };
    let spec = VmSpec::builder(VmName::new("web").unwrap()).disk(disk).accel(Accel::Tcg);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(manager.create(with(spec).build().unwrap())).unwrap();
}

/// Sets the address of the guest's SSH server in the record of the run.
fn lead_to(life: &Life, address: SocketAddr) {
    let path = life.home().join("vms/web/run.json");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    forwards(&mut record).unwrap()[0]["host"] = address.to_string().into();
    fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
}

/// Returns the forwards of the run, wherever the record has them.
fn forwards(value: &mut Value) -> Option<&mut Value> {
    match value {
        Value::Object(fields) => {
            if fields.get("run").is_some_and(|run| run.get("forwards").is_some()) {
                return fields.get_mut("run")?.get_mut("forwards");
            }
            fields.values_mut().find_map(forwards)
        }
        _ => None,
    }
}

fn is_alive(pid: &str) -> bool {
    Path::new("/proc").join(pid).exists()
}

#[test]
fn a_program_without_standard_input_finds_its_end_at_once() {
    let web = Web::new();
    // Open for as long as the command runs: unread output does not end either.
    for option in ["-n", "-tn"] {
        let begun = web.life.begin(&["exec", option, "web", "--", "cat"]);
        let answer = begun.ended(LONG);
        assert_eq!(answer.code, Some(0), "{option}: {answer:?}");
    }
}

#[test]
fn input_from_a_pipe_has_its_end_at_a_terminal_too() {
    let web = Web::new();
    for words in ["one line\n", "half a line"] {
        let mut begun =
            web.life.begin(&["exec", "-t", "web", "--", "sh", "-c", "stty -echo; echo up; exec cat"]);
        let mut ear = begun.output();
        ear.hears("up");
        begun.input().write_all(words.as_bytes()).unwrap();
        ear.hears(words.trim());
        assert_eq!(begun.ended(LONG).code, Some(0), "{words:?}");
    }
}

#[test]
fn a_signal_to_the_command_ends_the_program_in_the_guest() {
    let web = Web::new();
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let script = "echo up $$; exec sleep 1000";
        let mut begun = web.life.begin(&["exec", "web", "--", "sh", "-c", script]);
        let mut ear = begun.output();
        ear.hears("\n");
        let pid = ear.heard.trim().strip_prefix("up ").unwrap().to_owned();
        kill_process(begun.pid(), signal).unwrap();
        let answer = begun.ended(Duration::from_secs(30));
        assert_eq!(answer.code, None, "it dies of {signal:?}: {answer:?}");
        assert!(until(LONG, || !is_alive(&pid)), "{signal:?} did not reach the program");
    }
}

#[test]
fn a_guest_may_refuse_until_its_users_exist_and_not_after_a_first_login() {
    let web = Web::new();
    let keys = fs::read_to_string(web.keys()).unwrap();
    fs::write(web.keys(), "").unwrap();
    let begun = web.life.begin(&["exec", "-n", "web", "--", "echo", "in"]);
    // Time for one refused connection; a later one is accepted at once, and passes as well.
    std::thread::sleep(Duration::from_secs(2));
    fs::write(web.keys(), keys).unwrap();
    let answer = begun.ended(LONG);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(0), "in\n"), "{answer:?}");

    fs::write(web.keys(), "").unwrap();
    let (refused, took) = web.life.timed(&["exec", "-n", "web", "--", "true"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("does not accept the key"), "{refused:?}");
    assert!(took < Duration::from_secs(60), "{took:?}");
}

/// Applies a fault to the first connections of a server, one after the other, and forwards the
/// later ones.
fn front(server: SocketAddr, oddities: Vec<fn(TcpStream)>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut oddities = oddities.into_iter();
        for client in listener.incoming().flatten() {
            match oddities.next() {
                Some(odd) => odd(client),
                None => pass_on(client, TcpStream::connect(server).unwrap()),
            }
        }
    });
    address
}

fn pass_on(client: TcpStream, server: TcpStream) {
    for (mut from, mut to) in [
        (client.try_clone().unwrap(), server.try_clone().unwrap()),
        (server.try_clone().unwrap(), client.try_clone().unwrap()),
    ] {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Write);
        });
    }
}

#[test]
fn forty_commands_at_once_all_run_though_the_server_turns_away_all_but_two() {
    let daemon = Daemon::with("MaxStartups 2:100:2");
    let life = led_to(&daemon.access, daemon.address);
    // A user's own programs, which ignore vmkit's locks, use a part of the connections.
    let busy = TcpStream::connect(daemon.address).unwrap();
    let begun: Vec<_> =
        (0..40).map(|number| life.begin(&["exec", "-n", "web", "--", "echo", &number.to_string()])).collect();
    for (number, begun) in begun.into_iter().enumerate() {
        let answer = begun.ended(LONG);
        assert_eq!((answer.code, answer.stdout), (Some(0), format!("{number}\n")), "{}", answer.stderr);
    }
    drop(busy);
}

#[test]
fn a_server_that_refuses_connections_is_retried_and_quoted_at_the_end() {
    let sshd = Sshd::new();
    let penalty = |mut client: TcpStream| client.write_all(b"Not allowed at this time\r\n").unwrap();
    let late = |mut client: TcpStream| client.write_all(b"SSH-2.0-OpenSSH_9.9\r\n").unwrap();
    let reset = |client: TcpStream| {
        rustix::net::sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
    };
    // More connections than any small number of attempts.
    let odd: [fn(TcpStream); 6] = [penalty, late, reset, drop, reset, penalty];
    let life = led_to(&sshd.access, front(sshd.address, odd.to_vec()));
    let answer = life.vmkit(["exec", "-n", "web", "--", "echo", "in"]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(0), "in\n"), "{answer:?}");

    lead_to(&life, front(sshd.address, vec![penalty; 1000]));
    let answer = life.vmkit(["exec", "-n", "--timeout", "4", "web", "--", "echo", "in"]);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert!(answer.stderr.contains("\"Not allowed at this time\""), "{answer:?}");
}

#[test]
fn a_guest_that_never_accepts_the_login_is_reported_with_what_it_refused() {
    let web = Web::new();
    fs::write(web.keys(), "").unwrap();
    let refused = web.life.vmkit(["exec", "--timeout", "4", "web", "--", "true"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("does not accept the key"), "{refused:?}");
}

#[test]
fn a_vm_that_ends_ends_what_is_done_in_it_even_where_its_connection_stays() {
    let web = Web::new();
    let mut begun = web.life.begin(&["exec", "web", "--", "sh", "-c", "echo up; exec sleep 1000"]);
    begun.output().hears("up");
    web.life.must(["stop", "web", "--timeout", "0"]);
    let began = Instant::now();
    let answer = begun.ended(Duration::from_secs(50));
    assert_eq!(answer.code, Some(255), "{answer:?}");
    assert!(answer.stderr.contains("the VM has ended"), "{answer:?} after {:?}", began.elapsed());
}

#[test]
fn a_panic_of_a_guest_ends_its_sessions_with_that_reason() {
    let web = Web::new();
    let mut begun = web.life.begin(&["exec", "web", "--", "sh", "-c", "echo up; exec sleep 1000"]);
    begun.output().hears("up");
    // Like the kernel of a guest without a device that reports panics to QEMU.
    let log = web.life.home().join("vms/web/console.log");
    let mut console = fs::OpenOptions::new().append(true).open(log).unwrap();
    let words = "Kernel panic - not syncing: sysrq triggered crash";
    write!(console, "[  100.000001] {words}\r\n[  100.000002] ---[ end {words} ]---\r\n").unwrap();
    let answer = begun.ended(Duration::from_secs(50));
    assert_eq!(answer.code, Some(255), "{answer:?}");
    assert!(answer.stderr.contains("the guest's kernel panicked: sysrq triggered crash"), "{answer:?}");
    let refused = web.life.vmkit(["exec", "web", "--", "true"]);
    assert_eq!(refused.code, Some(4), "{refused:?}");
    assert!(refused.stderr.contains("the guest's kernel panicked"), "{refused:?}");
    // A guest that continues to print has not panicked.
    console.write_all(b"\r\nweb login: ").unwrap();
    web.life.must(["exec", "-n", "web", "--", "true"]);
}

#[test]
fn a_reset_of_a_guest_ends_its_sessions_at_once_with_that_reason() {
    let web = Web::new();
    let mut begun = web.life.begin(&["exec", "web", "--", "sh", "-c", "echo up; exec sleep 1000"]);
    begun.output().hears("up");
    web.life.reset("web");
    let began = Instant::now();
    let answer = begun.ended(Duration::from_secs(50));
    assert_eq!(answer.code, Some(255), "{answer:?}");
    assert!(answer.stderr.contains("the guest was restarted"), "{answer:?}");
    // The limit is two seconds; a busy host takes some, and the keep-alive 60.
    assert!(began.elapsed() < Duration::from_secs(10), "{answer:?} after {:?}", began.elapsed());
    // What is begun after the reset is not of the guest before it.
    web.life.must(["exec", "-n", "web", "--", "true"]);
}

#[test]
fn a_qemu_that_is_killed_ends_what_is_done_in_its_guest_with_the_cause() {
    let web = Web::new();
    let mut begun = web.life.begin(&["exec", "web", "--", "sh", "-c", "echo up; exec sleep 1000"]);
    begun.output().hears("up");
    kill_process(web.life.qemu("web"), Signal::KILL).unwrap();
    let answer = begun.ended(Duration::from_secs(50));
    assert_eq!(answer.code, Some(255), "{answer:?}");
    assert!(answer.stderr.contains("the VM has ended: QEMU ended, killed by signal 9"), "{answer:?}");
}

#[test]
fn a_suspended_guest_is_reported_as_suspended_at_once() {
    let web = Web::new();
    web.life.must(["suspend", "web"]);
    for command in [&["exec", "web", "--", "true"][..], &["cp", "base.img", "web:"], &["shell", "web"]] {
        let refused = web.life.vmkit(command);
        assert_eq!(refused.code, Some(4), "{command:?}: {refused:?}");
        assert!(refused.stderr.contains("suspended"), "{command:?}: {refused:?}");
    }
}

#[test]
fn without_the_runtime_directory_a_guest_is_reached_by_ssh_in_every_way() {
    let web = Web::new();
    let run = fs::read_dir(web.life.home().join("run")).unwrap().next().unwrap().unwrap().path();
    fs::remove_dir_all(&run).unwrap();
    let file = web.life.file("words");
    fs::write(&file, "words").unwrap();
    let copy = web.life.file("copy");
    web.life.must(["exec", "-n", "web", "--", "true"]);
    web.life.must(["cp", &file, &format!("web:{copy}")]);
    assert_eq!(fs::read_to_string(&copy).unwrap(), "words");
    assert!(web.life.must(["ssh-config", "web"]).contains("HostName 127.0.0.1"));
    let console = web.life.vmkit(["console", "web"]);
    assert!(console.code != Some(0) && console.stderr.contains("console.sock"), "{console:?}");
}

#[test]
fn what_replies_instead_of_an_ssh_server_is_reported() {
    let web = Web::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    lead_to(&web.life, listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.write_all(b"220 mail.example ESMTP\r\n");
        }
    });
    let waited = web.life.vmkit(["wait", "web", "ssh", "--timeout", "3"]);
    assert_eq!(waited.code, Some(5), "{waited:?}");
    assert!(waited.stderr.contains("220 mail.example ESMTP"), "{waited:?}");
}

#[test]
fn nothing_that_the_guest_agent_can_not_do_is_left_undone() {
    let life = Life::new();
    make(&life, |spec| spec.network(NetworkConfig::None));
    life.must(["start", "web"]);
    let key = life.file("key");
    let mut keygen = std::process::Command::new("ssh-keygen");
    assert!(keygen.args(["-q", "-t", "ed25519", "-N", "", "-f", &key]).status().unwrap().success());
    for (option, name) in [
        (vec!["--user", "nobody"], "user"),
        (vec!["--identity", &key, "--user", "x", "--any-host-key"], "user"),
        (vec!["--tty"], "tty"),
        (vec!["--via", "agent", "--identity", &key], "identity"),
    ] {
        let refused = life.vmkit([&["exec"], option.as_slice(), &["web", "--", "true"]].concat());
        assert_eq!(refused.code, Some(2), "{refused:?}");
        assert!(refused.stderr.contains(&format!("{name}: ")), "{refused:?}");
        assert!(refused.stderr.contains("as root"), "{refused:?}");
    }
}

#[test]
fn half_of_a_login_is_refused_with_the_other_half_named() {
    let life = Life::new();
    make(&life, |spec| spec.network(NetworkConfig::User(UserNetwork::with_ssh(Vec::new()))));
    life.must(["start", "web"]);
    let refused = life.vmkit(["exec", "--user", "ada", "web", "--", "true"]);
    assert_eq!(refused.code, Some(3), "{refused:?}");
    assert!(refused.stderr.contains("--identity"), "{refused:?}");
}

#[test]
fn a_missing_ssh_agent_is_reported_before_anything_is_tried() {
    let web = Web::new();
    let refused = web.life.vmkit(["exec", "--ssh-agent", "web", "--", "true"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("SSH_AUTH_SOCK"), "{refused:?}");
    let both = web.life.vmkit(["exec", "--ssh-agent", "--identity", "key", "web", "--", "true"]);
    assert_eq!(both.code, Some(2), "{both:?}");
}

#[test]
fn a_hang_up_in_the_middle_of_output_keeps_what_was_printed() {
    let web = Web::new();
    let mut command = web.life.command(["exec", "web", "--", "sh", "-c", "echo said; kill -HUP $$"]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.signal(), None);
    let answer = answer(output);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(129), "said\n"), "{answer:?}");
}

/// A refused copy, for both directions: options, source, target, exit code, and
/// the end of the message.
const REFUSED_COPIES: &[(&str, &[&str], &str, i32, &str)] = &[
    ("", &["none"], "x", 3, "there is no such file"),
    ("", &["f/x"], "x", 3, "there is no such file"),
    ("", &["d"], "x", 2, "this is a directory, which is copied only recursively"),
    ("", &["/dev/null"], "x", 2, "the file AT_FROM is a device (expected a regular file)"),
    ("", &["f"], "no/such/x", 3, "there is no directory DIR/no/such AT_TO"),
    ("-r", &["d"], "no/such/x", 3, "there is no directory DIR/no/such AT_TO"),
    ("", &["f"], "f/x", 3, "there is no directory DIR/f AT_TO"),
    ("", &["f"], "no/", 3, "there is no such directory AT_TO"),
    ("", &["f", "f"], "no", 3, "there is no such directory AT_TO"),
    ("", &["f", "f"], "f", 2, "the destination AT_TO is not a directory"),
    ("-r", &["d"], "f", 2, "a file of that name exists AT_TO"),
    ("", &["f"], "/dev/null", 2, "the file AT_TO is a"),
    ("", &["f"], "/sys/x", 2, "permission denied AT_TO"),
    ("", &["f"], "/proc/x", 2, "nothing can be created in the directory /proc AT_TO"),
    ("-r", &["d"], "/proc/x", 2, "nothing can be created in the directory /proc AT_TO"),
];

#[test]
fn a_copy_is_refused_alike_in_both_directions_and_in_one_sentence() {
    let web = Web::new();
    let dir = web.life.dir.path().join("copies");
    fs::create_dir_all(dir.join("d")).unwrap();
    fs::write(dir.join("f"), "x").unwrap();
    let dir = dir.to_str().unwrap();
    let place = |name: &str| if name.starts_with('/') { name.to_owned() } else { format!("{dir}/{name}") };
    let guest = |name: &str| format!("web:{}", place(name));
    let is_denied = fs::write("/sys/x", "").is_err_and(|error| error.kind() == ErrorKind::PermissionDenied);
    for (option, from, to, code, expected) in REFUSED_COPIES {
        if *to == "/sys/x" && !is_denied {
            println!("SKIP: /sys is not what denies a file here");
            continue;
        }
        for into in [true, false] {
            let (at_from, at_to) =
                if into { ("on this host", "in the guest") } else { ("in the guest", "on this host") };
            let mut places: Vec<String> =
                from.iter().map(|name| if into { place(name) } else { guest(name) }).collect();
            places.push(if into { guest(to) } else { place(to) });
            let option = Some(*option).filter(|option| *option == "-r");
            let refused =
                web.life.vmkit(["cp"].into_iter().chain(option).chain(places.iter().map(String::as_str)));
            let expected = expected.replace("AT_FROM", at_from).replace("AT_TO", at_to).replace("DIR", dir);
            let (first, last) = (&places[0], &places[places.len() - 1]);
            let sentence = format!("error: cannot copy {first} to {last}: {expected}");
            assert_eq!(refused.code, Some(*code), "{refused:?}");
            assert!(refused.stderr.starts_with(&sentence), "{refused:?}, and not {sentence}");
            assert!(!refused.stderr.contains("caused by"), "{refused:?}");
        }
    }
    web.life.must(["stop", "web", "--timeout", "0"]);
    // A missing file of the host is reported without asking the guest.
    for places in [[place("none"), guest("x")], [guest("f"), place("no/such/x")]] {
        let refused = web.life.vmkit(["cp", &places[0], &places[1]]);
        assert_eq!(refused.code, Some(3), "{refused:?}");
    }
    for places in [[place("f"), guest("x")], [guest("f"), place("x")]] {
        let refused = web.life.vmkit(["cp", &places[0], &places[1]]);
        assert_eq!(refused.code, Some(4), "{refused:?}");
    }
}

#[test]
fn a_refused_login_as_root_is_reported_with_sudo() {
    let web = Web::new();
    web.life.must(["exec", "web", "--", "true"]);
    fs::write(web.keys(), "").unwrap();
    let refused = web.life.vmkit(["exec", "-u", "root", "web", "--", "true"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.starts_with("error: the SSH server refused"), "{refused:?}");
    assert!(refused.stderr.contains("hint: `vmkit exec web -- sudo COMMAND`"), "{refused:?}");
    assert_eq!(refused.stderr.matches("hint: ").count(), 1, "{refused:?}");
}

#[test]
fn a_refused_login_is_reported_with_the_user_of_vmkit() {
    let web = Web::new();
    web.life.must(["exec", "web", "--", "true"]);
    fs::write(web.keys(), "").unwrap();
    let own = &web.sshd.access.user;
    let other = if own == "nobody" { "daemon" } else { "nobody" };
    for verb in [&["exec"][..], &["shell"]] {
        let command: &[&str] = if verb == ["exec"] { &["--", "true"] } else { &[] };
        let refused = web.life.vmkit([verb, &["-u", other, "web"], command].concat());
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let hint = format!(
            "hint: with its own key vmkit logs in as `{own}` only: `vmkit exec web -- sudo -u {other} "
        );
        assert!(refused.stderr.contains(&hint), "{refused:?}");
    }
    // If its own user is refused there is no other to name.
    let refused = web.life.vmkit(["exec", "web", "--", "true"]);
    assert!(refused.stderr.contains("does not accept the key") && !refused.stderr.contains("by its own key"));
}

#[test]
fn a_vm_that_does_not_run_is_reported_before_any_key_is_asked_for() {
    let life = Life::new();
    make(&life, |spec| spec.network(NetworkConfig::User(UserNetwork::with_ssh(Vec::new()))));
    for arguments in [
        &["exec", "web", "--", "true"][..],
        &["exec", "--via", "ssh", "web", "--", "true"],
        &["exec", "--via", "agent", "web", "--", "true"],
        &["shell", "web"],
        &["cp", "web:/etc/hosts", "x"],
        &["ssh-config", "web"],
    ] {
        let refused = life.vmkit(arguments);
        assert_eq!(refused.code, Some(4), "{arguments:?}: {refused:?}");
        assert!(refused.stderr.contains("it is prepared"), "{arguments:?}: {refused:?}");
        assert!(refused.stderr.contains("`vmkit start web`"), "{arguments:?}: {refused:?}");
    }
}

#[test]
fn a_key_that_can_not_be_read_is_bad_input_by_the_name_of_its_option() {
    let life = Life::new();
    make(&life, |spec| spec);
    for option in ["--host-key", "--identity"] {
        let refused = life.vmkit(["exec", option, "nosuchfile", "web", "--", "true"]);
        assert_eq!(refused.code, Some(2), "{refused:?}");
        let expected = format!("error: {}: \"nosuchfile\": there is no such file", &option[2..]);
        assert!(refused.stderr.starts_with(&expected), "{refused:?}");
    }
}

#[test]
fn a_missing_directory_is_distinguished_from_a_program_that_failed() {
    let web = Web::new();
    let refused = web.life.vmkit(["exec", "-w", "/no such", "web", "--", "echo", "ran"]);
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(126), ""), "{refused:?}");
    assert!(refused.stderr.contains("error: there is no directory /no such in the guest"), "{refused:?}");
}

#[test]
fn a_shell_without_a_network_is_pointed_to_the_ways_that_there_are() {
    let life = Life::new();
    make(&life, |spec| spec.network(NetworkConfig::None));
    life.must(["start", "web"]);
    let refused = life.vmkit(["shell", "web"]);
    assert_eq!(refused.code, Some(7), "{refused:?}");
    assert!(refused.stderr.contains("`vmkit exec web -- COMMAND`"), "{refused:?}");
    assert!(refused.stderr.contains("`vmkit console web`"), "{refused:?}");
}

#[test]
fn a_dash_is_standard_input_and_output_and_a_shells_pipe_is_read_to_its_end() {
    let web = Web::new();
    let dir = web.life.dir.path().join("streams");
    fs::create_dir(&dir).unwrap();
    let guest = |name: &str| format!("web:{}", dir.join(name).display());
    let fed = |arguments: &[&str], input: &[u8]| {
        let mut command = web.life.command(arguments);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let _ = child.stdin.take().unwrap().write_all(input);
        child.wait_with_output().unwrap()
    };
    for (stdin, name) in [("-", "one"), ("/dev/stdin", "two")] {
        let output = fed(&["cp", stdin, &guest(name)], b"from a pipe\n");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(fs::read(dir.join(name)).unwrap(), b"from a pipe\n");
    }
    for stdout in ["-", "/dev/stdout"] {
        let answer = web.life.vmkit(["cp", &guest("one"), stdout]);
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(0), "from a pipe\n"), "{answer:?}");
    }
    let refused = answer(fed(&["cp", "-", &format!("web:{}", dir.display())], b"x"));
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("streams/NAME)"), "{refused:?}");
    let refused = web.life.vmkit(["cp", "-r", &format!("web:{}", dir.display()), "-"]);
    assert_eq!((refused.code, refused.stdout.as_str()), (Some(2), ""), "{refused:?}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);

    let vmkit = web.life.command(["cp"]);
    let mut bash = std::process::Command::new("bash");
    for (name, value) in vmkit.get_envs() {
        match value {
            Some(value) => bash.env(name, value),
            None => bash.env_remove(name),
        };
    }
    let script = "set -e; \"$@\" cp <(printf 'of %s' bash) \"$PLACE.in\"; \
                  \"$@\" cp \"$PLACE.in\" >(cat >\"$OUT\"); wait; while [ ! -s \"$OUT\" ]; do :; done";
    bash.args(["-c", script, "bash"])
        .arg(vmkit.get_program())
        .args(vmkit.get_args().filter(|it| *it != "cp"));
    bash.env("PLACE", guest("three")).env("OUT", dir.join("out"));
    let output = bash.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read(dir.join("three.in")).unwrap(), b"of bash");
    assert_eq!(fs::read(dir.join("out")).unwrap(), b"of bash");
}

#[test]
fn what_can_not_be_copied_keeps_nothing_else_from_being_copied() {
    let web = Web::new();
    let dir = web.life.dir.path().join("partial");
    for end in ["here", "there"] {
        fs::create_dir_all(dir.join(end).join("m")).unwrap();
        for name in ["a", "m/a", "m/b", "m/c", "z"] {
            fs::write(dir.join(end).join(name), "x").unwrap();
        }
        drop(std::os::unix::net::UnixListener::bind(dir.join(end).join("m/socket")).unwrap());
        for to in ["to", "all"] {
            fs::create_dir_all(dir.join(end).join(to).join("m/b/in the way")).unwrap();
        }
    }
    let place = |name: &str| dir.join(name).display().to_string();
    let guest = |name: &str| format!("web:{}", place(name));
    for (from, to, target, is_into) in [
        (place("here/m"), guest("there/to"), place("there/to"), true),
        (guest("there/m"), place("here/to"), place("here/to"), false),
    ] {
        let copied = web.life.vmkit(["cp", "-r", &from, &to]);
        assert_eq!(copied.code, Some(1), "{copied:?}");
        assert!(copied.stderr.contains(&format!("error: cannot copy {from}/b to {to}/m/b: ")), "{copied:?}");
        assert!(copied.stderr.contains("a directory"), "{copied:?}");
        assert!(copied.stderr.contains(&format!("warning: {from}/socket was skipped")), "{copied:?}");
        for name in ["m/a", "m/c"] {
            assert!(Path::new(&target).join(name).exists(), "{name}: {copied:?}");
        }
        // The same with several sources: the error is that of the first that fails.
        let (end, at) = if is_into { ("here", place("there/all")) } else { ("there", place("here/all")) };
        let source = |name: &str| {
            let name = format!("{end}/{name}");
            if is_into { place(&name) } else { guest(&name) }
        };
        let all = if is_into { guest("there/all") } else { place("here/all") };
        let copied =
            web.life.vmkit(["cp", "-r", &source("a"), &source("none"), &source("m"), &source("z"), &all]);
        assert_eq!(copied.code, Some(3), "{copied:?}");
        assert!(
            copied.stderr.contains("none to ") && copied.stderr.contains("m/b could not be copied"),
            "{copied:?}"
        );
        for name in ["a", "m/a", "m/c", "z"] {
            assert!(Path::new(&at).join(name).is_file(), "{name}: {copied:?}");
        }
    }
}

#[test]
fn an_end_that_is_full_is_named_and_nothing_half_written_is_left_there() {
    in_own_mounts(|| {
        let web = Web::new();
        let dir = web.life.dir.path().join("full");
        fs::create_dir_all(dir.join("tree")).unwrap();
        for name in ["tree/big", "tree/later"] {
            fs::write(dir.join(name), vec![7; 4 << 20]).unwrap();
        }
        for end in ["here", "there"] {
            fs::create_dir(dir.join(end)).unwrap();
            mount(&["-t", "tmpfs", "-o", "size=1m", "none"], &dir.join(end));
        }
        let (place, guest) = (
            |name: &str| dir.join(name).display().to_string(),
            |name: &str| format!("web:{}", dir.join(name).display()),
        );
        let is_empty = |name: &str| fs::read_dir(dir.join(name)).unwrap().next().is_none();
        let into = web.life.vmkit(["cp", &place("tree/big"), &guest("there/big")]);
        assert_eq!(into.code, Some(1), "{into:?}");
        assert!(into.stderr.contains("full/there in the guest is full"), "{into:?}");
        assert!(is_empty("there"), "{into:?}");
        let out = web.life.vmkit(["cp", &guest("tree/big"), &place("here/big")]);
        assert_eq!(out.code, Some(2), "{out:?}");
        assert!(out.stderr.contains("No space left on device"), "{out:?}");
        assert!(is_empty("here"), "{out:?}");
        // Nothing else would fit either.
        for (from, to) in [(place("tree"), guest("there/tree")), (guest("tree"), place("here/tree"))] {
            let copied = web.life.vmkit(["cp", "-r", &from, &to]);
            assert_eq!(copied.stderr.matches("error: ").count(), 1, "{copied:?}");
        }
        assert!(is_empty("there/tree") && is_empty("here/tree"));
    });
}

#[test]
fn a_name_of_any_kind_and_a_directory_without_writing_go_both_ways() {
    let web = Web::new();
    let dir = web.life.dir.path().join("names");
    fs::create_dir_all(dir.join("from/read only/empty")).unwrap();
    let names =
        ["new\nline", "quo'te\"s", "-dash", "co:lon", " blanks ", "*", "u\u{308}", "back\\slash", "#~"];
    for name in names {
        fs::write(dir.join("from").join(name), name).unwrap();
        fs::write(dir.join("from/read only").join(name), name).unwrap();
    }
    fs::hard_link(dir.join("from/*"), dir.join("from/same")).unwrap();
    fs::set_permissions(dir.join("from/read only"), fs::Permissions::from_mode(0o555)).unwrap();
    let place = |name: &str| dir.join(name).display().to_string();
    let guest = |name: &str| format!("web:{}", place(name));
    web.life.must(["cp", "-r", &place("from"), &guest("to")]);
    web.life.must(["cp", "-r", &guest("to"), &place("back")]);
    for end in ["to", "back"] {
        for name in names {
            for below in ["", "read only"] {
                let copy = dir.join(end).join(below).join(name);
                assert_eq!(fs::read(&copy).unwrap(), name.as_bytes(), "{copy:?}");
            }
        }
        assert!(dir.join(end).join("read only/empty").is_dir());
        assert_eq!(fs::read(dir.join(end).join("same")).unwrap(), b"*");
    }
    fs::create_dir_all(dir.join("alone/back")).unwrap();
    for name in names {
        web.life.must(["cp", "--", &place(&format!("from/{name}")), &guest("alone")]);
        assert_eq!(fs::read(dir.join("alone").join(name)).unwrap(), name.as_bytes(), "{name:?}");
        web.life.must(["cp", "--", &guest(&format!("alone/{name}")), &place("alone/back")]);
        assert_eq!(fs::read(dir.join("alone/back").join(name)).unwrap(), name.as_bytes(), "{name:?}");
    }
}
