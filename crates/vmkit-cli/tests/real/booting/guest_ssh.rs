//! Into a real Debian that vmkit has its own way into: programs, files and OpenSSH's programs.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{LONG, Life, until};
use crate::support::answer;
use rustix::process::{Signal, kill_process};
use vmkit::spec::{GuestAccess, VmName};
use vmkit::ssh::{CloudInitProgress, LoginOptions, ProcessEvent, Session, TerminalSize, TerminalSpec};
use vmkit::store::Home;
use vmkit::{QemuHypervisor, VmManager};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Measures how long it takes from nothing to a shell's prompt.
async fn prompt(manager: &VmManager<QemuHypervisor>, name: &VmName) -> Duration {
    let target = manager.ssh_target(name, &LoginOptions::default()).await.unwrap();
    let timeout = Duration::from_secs(60);
    let began = Instant::now();
    let session = Session::connect(&target, timeout).await.unwrap();
    let terminal = Some(TerminalSpec::new("dumb", TerminalSize { columns: 80, rows: 24 }));
    let shell = vmkit::ssh::GuestCommand { terminal, ..Default::default() };
    let (_input, mut output) = session.spawn(&shell, timeout).await.unwrap().split();
    let mut said = String::new();
    while !said.ends_with("$ ") {
        let ProcessEvent::Stdout(data) = output.next().await.unwrap() else { panic!("{said}") };
        said.push_str(&String::from_utf8_lossy(&data));
    }
    began.elapsed()
}

/// Enters the VM `deb`, which `launch` has left ready, by the library and by the command.
pub(super) fn enter_in_every_way(life: &Life) {
    let home = Home::at(life.home()).unwrap();
    let qemu = QemuHypervisor::builder(home.vms(), home.run()).keeper(env!("CARGO_BIN_EXE_vmkit")).build();
    let (manager, name) = (VmManager::new(qemu, home), VmName::new("deb").unwrap());
    runtime().block_on(async {
        let limit = Duration::from_secs(300);
        let session = manager.ssh_session(&name, &LoginOptions::default(), limit).await.unwrap();
        let done = session.cloud_init_done(limit, |_| {}).await.unwrap();
        assert_eq!(done.progress, CloudInitProgress::Done);
        assert_eq!(done.errors, Vec::<String>::new());
        eprintln!("a prompt after {:?}", prompt(&manager, &name).await);
    });
    programs(life);
    signals(life);
    files(life);
    openssh(life);
}

fn programs(life: &Life) {
    let code = |arguments: &[&str]| {
        let answer = life.vmkit([&["exec", "deb"], arguments].concat());
        (answer.code, answer.stdout, answer.stderr)
    };
    assert_eq!(code(&["--", "id", "-un"]), (Some(0), "vmkit\n".into(), String::new()));
    let said = code(&["--", "sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(said, (Some(7), "out\n".into(), "err\n".into()));
    assert_eq!(code(&["--", "printf", "%s|", "a  b", "it's", "$HOME"]).1, "a  b|it's|$HOME|");
    assert_eq!(code(&["sh", "-c", "kill -TERM $$"]).0, Some(143));
    let set = code(&["-w", "/usr/bin", "-e", "A=1 2", "--", "sh", "-c", "echo $PWD,$A"]);
    assert_eq!(set.1, "/usr/bin,1 2\n");
    let own = code(&["--user", "nobody-there", "--error-code", "99", "--", "true"]);
    assert_eq!(own.0, Some(99), "{own:?}");
    assert!(own.2.contains("does not accept the key"), "{own:?}");

    let mut command = life.command(["exec", "deb", "--", "wc", "-c"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&vec![b'x'; 3_000_000]).unwrap();
    let counted = answer(child.wait_with_output().unwrap());
    assert_eq!((counted.code, counted.stdout.as_str()), (Some(0), "3000000\n"), "{counted:?}");

    let agent = code(&["--via", "agent", "-e", "A=by agent", "--", "sh", "-c", "echo $A; exit 5"]);
    assert_eq!((agent.0, agent.1.as_str()), (Some(5), "by agent\n"), "{agent:?}");

    let mut command = life.command(["shell", "deb"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"echo from a shell\nexit 3\n").unwrap();
    let shell = answer(child.wait_with_output().unwrap());
    // A login may be greeted first.
    assert_eq!(shell.code, Some(3), "{shell:?}");
    assert!(shell.stdout.ends_with("from a shell\n"), "{shell:?}");
}

/// What this process is told to end by, its program in the guest ends by as well: OpenSSH itself
/// passes it on.
fn signals(life: &Life) {
    for signal in [Signal::INT, Signal::TERM] {
        let mut begun = life.begin(&["exec", "deb", "--", "sh", "-c", "echo up; exec sleep 1234"]);
        begun.output().hears("up");
        kill_process(begun.pid(), signal).unwrap();
        assert_eq!(begun.ended(LONG).code, None);
        let gone = || {
            life.must(["exec", "-n", "deb", "--", "sh", "-c", "ps -e -o args | grep -c '^sleep 1234' || :"])
        };
        assert!(until(LONG, || gone() == "0\n"), "{signal:?} did not reach the program");
    }
}

fn files(life: &Life) {
    fs::write(life.file("there"), "and back").unwrap();
    life.must(["cp", &life.file("there"), "deb:/tmp/there"]);
    life.must(["cp", "deb:/tmp/there", &life.file("returned")]);
    assert_eq!(fs::read_to_string(life.file("returned")).unwrap(), "and back");
    let tree = life.dir.path().join("tree");
    fs::create_dir_all(tree.join("sub")).unwrap();
    fs::write(tree.join("sub/file"), "hello").unwrap();
    let tree = tree.to_str().unwrap();
    life.must(["cp", "-r", tree, "deb:"]);
    assert_eq!(life.must(["exec", "deb", "--", "cat", "tree/sub/file"]), "hello");
    let back = life.file("back");
    life.must(["cp", "-r", "deb:tree", &back]);
    assert_eq!(fs::read(format!("{back}/sub/file")).unwrap(), b"hello");
    let refused = life.vmkit(["cp", &format!("{back}/sub/file"), "deb:/etc/vmkit-test"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
    assert!(refused.stderr.contains("deb:/etc/vmkit-test") && refused.stderr.contains("permission denied"));
    let flat = life.vmkit(["cp", tree, "deb:"]);
    assert_eq!(flat.code, Some(2), "{flat:?}");
}

/// OpenSSH's own programs get in with nothing but the block, and believe no other server.
fn openssh(life: &Life) {
    let config = life.file("ssh_config");
    fs::write(&config, life.must(["ssh-config"])).unwrap();
    let ssh = |arguments: &[&str]| {
        answer(
            Command::new("ssh").args(["-F", &config]).args(arguments).stdin(Stdio::null()).output().unwrap(),
        )
    };
    let said = ssh(&["deb", "id", "-un"]);
    assert_eq!((said.code, said.stdout.as_str(), said.stderr.as_str()), (Some(0), "vmkit\n", ""), "{said:?}");
    let known = life.home().join("vms/deb/kept/known_hosts");
    let other = GuestAccess::generate("other").unwrap();
    let line = fs::read_to_string(&known).unwrap();
    let alias = line.split(' ').next().unwrap();
    fs::write(&known, format!("{alias} {}\n", other.host_key.public)).unwrap();
    assert_eq!(ssh(&["deb", "true"]).code, Some(255), "another host key is not believed");
    life.must(["ssh-config", "deb"]);
    assert_eq!(ssh(&["deb", "true"]).code, Some(0), "and the block mends its files");
}
