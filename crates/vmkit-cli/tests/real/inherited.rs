//! What the command inherits from the program that starts it: signals, limits, descriptors, a mask,
//! an environment.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::harness::{self, Life, create_arguments, until};
use crate::support::{Answer, Host, answer};
use rustix::process::Pid;
use vmkit_testkit::guest;

/// Runs `vmkit` with these arguments by a shell that has said something before, such as what it
/// ignores.
fn by_shell(host: &Host, before: &str, arguments: &[&str]) -> Answer {
    answer(shell(host, before, "exec \"$@\"", arguments).output().unwrap())
}

fn shell(host: &Host, before: &str, run: &str, arguments: &[&str]) -> Command {
    let vmkit = host.command(arguments);
    let mut shell = Command::new("/bin/bash");
    shell.args(["-c", &format!("{before}\n{run}"), "bash"]).arg(vmkit.get_program()).args(vmkit.get_args());
    shell.env_clear().envs(vmkit.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.current_dir(host.dir.path()).stdin(Stdio::null());
    shell
}

/// A user without processes.
const OTHER_USER: u32 = 61_234;

/// Returns a host with a home, `theirs`, of another user, and the program where that user may run
/// it.
fn host_of_other_user() -> Option<Host> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: only root becomes another user");
        return None;
    }
    let host = Host::with_refusing_qemu();
    fs::copy(env!("CARGO_BIN_EXE_vmkit"), host.file("vmkit")).unwrap();
    fs::create_dir(host.file("theirs")).unwrap();
    std::os::unix::fs::chown(host.file("theirs"), Some(OTHER_USER), None).unwrap();
    fs::set_permissions(host.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    Some(host)
}

/// Runs `vmkit` as the other user, by a program that limits it perhaps.
fn by_other_user(host: &Host, limited: &str, arguments: &[&str]) -> Answer {
    let become_other = format!("exec setpriv --reuid {OTHER_USER} --clear-groups {limited}");
    let run = format!("{become_other} ./vmkit --home \"$PWD/theirs\" \"${{@:2}}\"");
    let mut command = shell(host, "", &run, arguments);
    let path = format!("{}:{}", host.file("bin"), std::env::var("PATH").unwrap());
    answer(command.env("PATH", path).output().unwrap())
}

/// Returns a set of signals out of a process's status, such as `SigIgn`.
fn signals(pid: Pid, set: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with(set)).unwrap();
    u64::from_str_radix(line.split_whitespace().last().unwrap(), 16).unwrap()
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

#[test]
fn a_vm_lives_by_a_program_that_ignores_or_blocks_all_signals() {
    // The C library keeps 32 and 33 to itself.
    let own = bit(13) | bit(32) | bit(33);
    for before in
        ["trap '' CHLD PIPE HUP INT QUIT TERM USR1 XFSZ", "exec env --ignore-signal --block-signal \"$@\""]
    {
        let life = Life::new();
        let create = create_arguments(&guest::tiny(), "web", "");
        let create: Vec<&str> = create.iter().map(String::as_str).collect();
        for arguments in [create.as_slice(), &["start", "web"]] {
            let answer = by_shell(&life, before, arguments);
            assert_eq!(answer.code, Some(0), "{before}: {answer:?}");
        }
        let qemu = life.qemu("web");
        assert_eq!(signals(qemu, "SigIgn") & !own, 0, "{before}: QEMU ignores SIGPIPE by itself");
        let taken = bit(17) | bit(15) | bit(1);
        assert_eq!(signals(qemu, "SigBlk") & taken, 0, "{before}: QEMU blocks others by itself");
        let doctor = by_shell(&life, before, &["doctor"]);
        assert!(!doctor.stdout.contains("No child processes"), "{before}: {doctor:?}");
        assert_eq!(by_shell(&life, before, &["stop", "web", "--timeout", "0"]).code, Some(0));
        assert_eq!(life.state("web"), "stopped", "{before}: the keeper saw the end");
        life.must(["rm", "web"]);
    }
}

#[test]
fn a_limit_of_open_files_is_lifted_or_named() {
    let life = Life::new();
    let create = create_arguments(&guest::tiny(), "web", "");
    let create: Vec<&str> = create.iter().map(String::as_str).collect();
    life.must(create.clone());
    // A soft limit is raised.
    assert_eq!(by_shell(&life, "ulimit -Sn 64", &["start", "web"]).code, Some(0));
    life.must(["stop", "web", "--timeout", "0"]);
    let answer = by_shell(&life, "ulimit -n 150", &["start", "web"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(answer.stderr.contains("RLIMIT_NOFILE") && answer.stderr.contains("is 150 (expected at least 2"));
    assert!(answer.stderr.contains("vmkit doctor"), "{answer:?}");
    let doctor = by_shell(&life, "ulimit -n 150", &["doctor"]);
    assert!(doctor.stdout.contains("RLIMIT_NOFILE"), "the hint is true: {doctor:?}");
    assert_eq!(life.state("web"), "stopped");
}

#[test]
fn a_small_stack_is_raised_or_named() {
    let life = Life::new();
    let create = create_arguments(&guest::tiny(), "web", "");
    life.must(create);
    // QEMU's threads have stacks of the limit.
    assert_eq!(by_shell(&life, "ulimit -Ss 64", &["start", "web"]).code, Some(0));
    let limits = fs::read_to_string(format!("/proc/{}/limits", life.qemu("web"))).unwrap();
    let stack = limits.lines().find(|line| line.starts_with("Max stack size")).unwrap();
    assert!(stack.split_whitespace().any(|word| word == "8388608"), "{stack}");
    for arguments in [&["ls"][..], &["stop", "web", "--timeout", "0"]] {
        let answer = by_shell(&life, "ulimit -s 64", arguments);
        assert_eq!(answer.code, Some(2), "{answer:?}");
        assert!(answer.stderr.starts_with("error: RLIMIT_STACK: a stack has at most 65536 bytes"));
    }
    life.must(["stop", "web", "--timeout", "0"]);
}

#[test]
fn a_guest_that_used_up_its_cpu_time_has_failed_with_the_name_of_the_limit() {
    let life = Life::new();
    // A boot by TCG takes more than that.
    let create = create_arguments(&guest::tiny(), "web", "");
    life.must(create);
    assert_eq!(by_shell(&life, "ulimit -t 2", &["start", "web"]).code, Some(0));
    let waited = life.vmkit(["wait", "web", "stopped", "--timeout", "170"]);
    assert_eq!(waited.code, Some(4), "{waited:?}");
    assert!(waited.stderr.contains("SIGXCPU: RLIMIT_CPU"), "{waited:?}");
    let doctor = by_shell(&life, "ulimit -t 2", &["doctor"]);
    assert!(doctor.stdout.contains("RLIMIT_CPU"), "{doctor:?}");
}

#[test]
fn a_limit_of_few_processes_is_named_and_leaves_nothing() {
    let Some(host) = host_of_other_user() else { return };
    for arguments in [&["ls"][..], &["create", "web", "--image", "base.img", "--accel", "tcg"], &["doctor"]] {
        let answer = by_other_user(&host, "prlimit --nproc=2", arguments);
        assert_eq!(answer.code, Some(2), "{arguments:?}: {answer:?}");
        assert!(answer.stderr.starts_with("error: RLIMIT_NPROC: "), "{arguments:?}: {answer:?}");
        assert!(answer.stderr.contains("is 2, by `ulimit -u`"), "{arguments:?}: {answer:?}");
        assert!(!host.dir.path().join("theirs/vms/web").exists(), "{arguments:?}");
    }
}

#[test]
fn a_file_of_a_vm_that_another_user_has_got_is_named_with_the_way_out() {
    let Some(host) = host_of_other_user() else { return };
    let create =
        ["create", "web", "--image", "base.img", "--accel", "tcg", "--data-disk", "1MiB", "--user", "ann"];
    assert_eq!(by_other_user(&host, "", &create).code, Some(0));
    let vm = host.dir.path().join("theirs/vms/web");
    for name in ["root.qcow2", "data-0.qcow2", "seed.iso", "console.log", "qemu.log"] {
        let file = fs::OpenOptions::new().append(true).create(true).open(vm.join(name)).unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(vm.join(name), Some(0), None).unwrap();
        let refused = by_other_user(&host, "", &["start", "web"]);
        assert_eq!(refused.code, Some(2), "{name}: {refused:?}");
        let said = format!("{name} belongs to user root (0), and this is user {OTHER_USER}: ");
        assert!(refused.stderr.contains(&said), "{name}: {refused:?}");
        assert!(refused.stderr.contains(&format!("`sudo chown -R {OTHER_USER} ")), "{name}: {refused:?}");
        std::os::unix::fs::chown(vm.join(name), Some(OTHER_USER), None).unwrap();
    }
}

#[test]
fn a_file_beyond_the_limit_of_its_size_is_named_with_the_limit() {
    let host = Host::with_refusing_qemu();
    fs::write(host.dir.path().join("image.raw"), vec![1; 4 << 20]).unwrap();
    let answer = by_shell(&host, "ulimit -f 1024", &["image", "import", "image.raw", "--name", "mine"]);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    for said in ["File too large", "RLIMIT_FSIZE", "1048576 bytes", host.home().to_str().unwrap()] {
        assert!(answer.stderr.contains(said), "{said}: {answer:?}");
    }
    assert_eq!(host.must(["image", "ls"]).lines().count(), 1, "nothing is left of it");
}

#[test]
fn an_unusable_runtime_directory_gives_way_to_one_in_the_home() {
    let host = Host::with_refusing_qemu();
    let at = |name: &str| host.file(name);
    fs::write(at("file"), "").unwrap();
    let long = at(&"r".repeat(100));
    fs::create_dir(&long).unwrap();
    fs::create_dir(at("foreign")).unwrap();
    let mut dirs = vec![at("gone"), at("file"), long, "relative".to_owned()];
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(at("foreign"), Some(65534), None).unwrap();
        dirs.push(at("foreign"));
    }
    for (index, dir) in dirs.iter().enumerate() {
        let vmkit = |arguments: &[&str]| {
            let mut command = host.command(arguments);
            command.env_remove("VMKIT_HOME").env("HOME", host.dir.path()).env("XDG_RUNTIME_DIR", dir);
            answer(command.output().unwrap())
        };
        let name = format!("vm{index}");
        for arguments in
            [vec!["create", &name, "--kernel", "vmlinuz", "--accel", "tcg"], vec!["ls"], vec!["rm", &name]]
        {
            let answer = vmkit(&arguments);
            assert_eq!(answer.code, Some(0), "{dir} {arguments:?}: {answer:?}");
        }
        let doctor = vmkit(&["doctor"]);
        assert!(doctor.stdout.contains(&format!("not used: XDG_RUNTIME_DIR={dir}")), "{doctor:?}");
    }
}

#[test]
fn a_mask_of_zero_permissions_leaves_the_owner_what_vmkit_creates() {
    let host = Host::with_refusing_qemu();
    for (mask, name) in [("0777", "shut"), ("0", "open")] {
        let before = format!("umask {mask}");
        let arguments = ["create", name, "--kernel", "vmlinuz", "--accel", "tcg", "--data-disk", "1MiB"];
        assert_eq!(by_shell(&host, &before, &arguments).code, Some(0), "{mask}");
    }
    let mut found = Vec::new();
    all_below(&host.home(), &mut found);
    assert!(found.len() > 8, "{found:?}");
    for (path, mode) in found {
        assert_eq!(mode & 0o077, 0, "{path} is open to others: {mode:o}");
        assert_eq!(mode & 0o600, 0o600, "{path} is closed to its owner: {mode:o}");
    }
}

fn all_below(path: &Path, found: &mut Vec<(String, u32)>) {
    let metadata = fs::symlink_metadata(path).unwrap();
    found.push((path.display().to_string(), metadata.permissions().mode()));
    if metadata.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            all_below(&entry.unwrap().path(), found);
        }
    }
}

#[test]
fn closed_streams_become_no_files_of_vmkits() {
    let life = Life::new();
    let create = create_arguments(&guest::tiny(), "web", "");
    let create: Vec<&str> = create.iter().map(String::as_str).collect();
    for arguments in [create.as_slice(), &["start", "web"], &["ls"]] {
        let answer = answer(shell(&life, "", "exec \"$@\" <&- >&- 2>&-", arguments).output().unwrap());
        assert_eq!(answer.code, Some(0), "{arguments:?}");
    }
    assert_eq!(life.state("web"), "running");
    for entry in ["0", "1", "2"] {
        let of = fs::read_link(format!("/proc/{}/fd/{entry}", life.qemu("web").as_raw_pid())).unwrap();
        assert!(!of.starts_with(life.home()), "{}", of.display());
    }
    for path in ["vms/web/vm.json", "vms/web/run.json", "vms/web/alive"] {
        let file = life.home().join(path);
        let text = fs::read_to_string(&file).unwrap();
        assert!(!text.contains("NAME"), "{path} has what `ls` prints: {text}");
        assert_eq!(fs::metadata(&file).unwrap().uid(), rustix::process::geteuid().as_raw());
    }
    life.must(["rm", "--force", "web"]);
    assert!(until(harness::LONG, || life.qemus().is_empty()));
}

#[test]
fn what_is_read_once_may_come_through_a_pipe() {
    let host = Host::with_refusing_qemu();
    let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKqP3bKC0zJt0S2qLfv3Dc5jHMF0UfA1T0sGdXpSyhsW me";
    let key_file = format!("echo '{key}'");
    let file = "printf 'version = 1\n[machine.web]\nimage = \"./base.img\"\n'";
    let create = "create VM --kernel vmlinuz --accel tcg";
    for (index, (text, command)) in [
        ("printf '#cloud-config\n{}\n'", format!("{create} --cloud-init")),
        (key_file.as_str(), format!("{create} --ssh-key")),
        // The image is looked for with a spec of its own, before.
        (key_file.as_str(), "create VM --image base.img --accel tcg --ssh-key".to_owned()),
        (file, "plan -f".to_owned()),
        ("/bin/cat base.img", "image import --name imVM".to_owned()),
    ]
    .into_iter()
    .enumerate()
    {
        for (way, run) in [
            ("a", format!("$1 {command} <({text})")),
            ("b", format!("{text} | $1 {command} -")),
            ("c", format!("{text} | $1 {command} /dev/stdin")),
        ] {
            let run = run.replace("VM", &format!("{way}{index}"));
            let answer = answer(shell(&host, "", &run, &[]).output().unwrap());
            assert_eq!(answer.code, Some(0), "{run}: {answer:?}");
        }
    }
    let plan = answer(shell(&host, "", &format!("{file} | $1 plan -f -"), &[]).output().unwrap());
    assert!(plan.stdout.contains("web") && !plan.stdout.contains("/dev"), "{plan:?}");
    // What a VM goes on to need has to stay.
    fs::copy(host.file("base.img"), host.file("data.img")).unwrap();
    for (option, file) in [("--data-disk", "data.img"), ("--kernel", "vmlinuz")] {
        let run = format!("$1 create new {option} /dev/stdin --accel tcg <{file}");
        let answer = answer(shell(&host, "", &run, &[]).output().unwrap());
        assert_eq!(answer.code, Some(2), "{answer:?}");
        assert!(answer.stderr.contains("name the file itself, "), "{option}: {answer:?}");
    }
    for option in ["--image", "--kernel", "--data-disk"] {
        let run = format!("$1 create new {option} <(/bin/cat base.img) --accel tcg");
        let answer = answer(shell(&host, "", &run, &[]).output().unwrap());
        assert_eq!(answer.code, Some(2), "{answer:?}");
        assert!(answer.stderr.contains("this is a pipe"), "{option}: {answer:?}");
    }
}
