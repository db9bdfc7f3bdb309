//! Into a real Debian that vmkit has its own way into: programs, files, OpenSSH's programs, and how
//! soon.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::first_greeting;
use crate::harness::{LONG, Life, until};
use crate::support::answer;
use rustix::process::{Signal, kill_process};
use vmkit::spec::{Accel, Boot, CloudInitConfig, GuestAccess, Kernel, MachineType, RootDisk, VmName, VmSpec};
use vmkit::ssh::{CloudInitProgress, LoginOptions, ProcessEvent, Session, TerminalSize, TerminalSpec};
use vmkit::store::Home;
use vmkit::{QemuHypervisor, VmManager};
use vmkit_testkit::guest;

/// How long the guest may take until SSH is ready, in seconds: one minute under emulation on an
/// idle host.
const BOOT_LIMIT: &str = "600";

/// Creates the VM `deb`, which has an access of vmkit's own, by the library; the command finds it.
fn make(life: &Life) -> VmManager<QemuHypervisor> {
    let home = Home::at(life.home()).unwrap();
    let qemu = QemuHypervisor::builder(home.vms(), home.run()).keeper(env!("CARGO_BIN_EXE_vmkit")).build();
    let manager = VmManager::new(qemu, home);
    let guest = guest::debian();
    let kernel = Kernel {
        path: guest.kernel.clone(),
        initrd: Some(guest.initrd.clone()),
        cmdline: guest.cmdline(MachineType::Q35).to_owned(),
    };
    let access = Some(GuestAccess::generate("vmkit").unwrap());
    let spec = VmSpec::builder(VmName::new("deb").unwrap())
        .boot(Boot::Kernel(kernel))
        .disk(RootDisk { image: guest.disk.clone().unwrap(), size: None })
        .memory(guest.memory)
        .accel(Accel::Tcg)
        .cloud_init(CloudInitConfig { access, ..CloudInitConfig::default() })
        .build()
        .unwrap();
    runtime().block_on(manager.create(spec)).unwrap();
    manager
}

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

#[test]
fn a_guest_with_vmkits_own_key_is_entered_in_every_way() {
    let life = Life::new();
    let manager = make(&life);
    let name = VmName::new("deb").unwrap();

    let stopped = life.vmkit(["exec", "deb", "--", "true"]);
    assert_eq!(stopped.code, Some(4), "{stopped:?}");
    assert!(stopped.stderr.contains("prepared"), "{stopped:?}");

    life.must(["start", "deb"]);
    let forward = life.info("deb")["run"]["forwards"][0]["host"].as_str().unwrap().parse().unwrap();
    let greeted = first_greeting(forward, Duration::from_millis(5));
    life.must(["wait", "deb", "ssh", "--timeout", BOOT_LIMIT]);
    let waited = Instant::now();
    let greeted = greeted.recv_timeout(Duration::from_secs(60)).unwrap();
    let late = waited.saturating_duration_since(greeted);
    eprintln!("`wait ssh` ended {late:?} after the first greeting");
    // Ten times what it takes on a busy host; `cargo xtask bench` measures it.
    assert!(late < Duration::from_secs(10), "SSH was there {late:?} before `wait` said so");

    runtime().block_on(async {
        let session =
            manager.ssh_session(&name, &LoginOptions::default(), Duration::from_secs(300)).await.unwrap();
        let mut stages = Vec::new();
        let done = session
            .cloud_init_done(Duration::from_secs(300), |now| stages.push(now.stage.clone()))
            .await
            .unwrap();
        assert_eq!(done.progress, CloudInitProgress::Done);
        assert_eq!(done.errors, Vec::<String>::new());
        eprintln!("cloud-init went through {stages:?}");
        let mut prompts = Vec::new();
        for _ in 0..5 {
            prompts.push(prompt(&manager, &name).await);
        }
        eprintln!("a prompt after {prompts:?}");
    });

    programs(&life);
    signals(&life);
    files(&life);
    openssh(&life);
    life.must(["rm", "--force", "deb"]);
    life.assert_empty("after rm --force");
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
