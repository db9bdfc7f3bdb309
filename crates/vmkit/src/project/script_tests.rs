//! Tasks in a real shell of this host.

use super::*;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::project::archive;

fn token() -> TaskToken {
    TaskToken::new(uuid::Uuid::new_v4().as_u128())
}

fn step(env: &[(&str, &str)], dir: Option<&str>) -> ProvisionStep {
    let text = format!(
        "version = 1\n[machine.web]\nimage = 'a'\n[[machine.web.provision]]\nname = 's'\nshell = 'x'\n{}",
        dir.map(|dir| format!("dir = '{dir}'\n")).unwrap_or_default()
    );
    let project = crate::vmfile::parse(Path::new("/p/vmkit.toml"), &text, &|_| Err(String::new())).unwrap();
    let mut step = project.machines[0].steps[0].clone();
    step.env =
        env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<BTreeMap<_, _>>();
    step
}

/// A guest with this host's own shell, and a `/tmp` of its own.
struct ShellGuest(tempfile::TempDir);

impl ShellGuest {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn begin(&self, script: &GuestScript) -> Child {
        let tmp = self.0.path().display();
        let own = |word: &String| {
            let word = word.replace("at=/tmp/", &format!("at={tmp}/"));
            word.replace("in /tmp/", &format!("in {tmp}/")).replace("#/tmp/", &format!("#{tmp}/"))
        };
        Command::new(&script.argv[0])
            .args(script.argv[1..].iter().map(own))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn run(&self, script: &GuestScript) -> Output {
        let mut child = self.begin(script);
        // It may end before it has read everything.
        let _ = child.stdin.take().unwrap().write_all(&script.input);
        child.wait_with_output().unwrap()
    }

    /// Starts a step and returns after its first line of output.
    fn begun(&self, text: &str, token: &TaskToken) -> Child {
        let script = told(&step(&[], None), text.as_bytes(), token);
        let mut child = self.begin(&script);
        child.stdin.take().unwrap().write_all(&script.input).unwrap();
        let mut first = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        child
    }

    fn folder(&self, token: &TaskToken) -> PathBuf {
        self.0.path().join(&token.0)
    }

    fn left(&self) -> usize {
        fs::read_dir(self.0.path()).unwrap().count()
    }
}

fn run(script: &GuestScript) -> Output {
    let guest = ShellGuest::new();
    let output = guest.run(script);
    assert_eq!(guest.left(), 0, "nothing is left behind");
    output
}

fn told(step: &ProvisionStep, text: &[u8], token: &TaskToken) -> GuestScript {
    of_step(step, &ScriptText::parse(text).unwrap(), "the script", token)
}

/// Returns what was printed before the mark of the end.
fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).split('\0').next().unwrap().to_owned()
}

fn run_step(step: &ProvisionStep, text: &[u8]) -> (Option<i32>, String) {
    let output = run(&told(step, text, &token()));
    (output.status.code(), said(&output))
}

#[test]
fn a_text_is_run_by_the_shell_which_stops_at_a_failure() {
    let plain = step(&[], None);
    assert_eq!(run_step(&plain, b"echo one\nfalse\necho two\n"), (Some(1), "one\n".to_owned()));
    assert_eq!(run_step(&plain, b"exit 7").0, Some(7));
}

#[test]
fn a_script_is_run_by_what_it_names() {
    let said = run_step(&step(&[], None), b"#!/bin/cat\nhello\n");
    assert_eq!(said, (Some(0), "#!/bin/cat\nhello\n".to_owned()));
}

#[test]
fn a_missing_interpreter_is_named_with_the_script() {
    let plain = step(&[], None);
    for (text, what) in [
        (&b"#!/no/such/shell -x\n"[..], "the guest has no interpreter /no/such/shell"),
        (
            b"#!/usr/bin/env no-such-program\n",
            "the guest has no program no-such-program for /usr/bin/env to start",
        ),
    ] {
        let output = run(&told(&plain, text, &token()));
        let printed = format!("{}{}", said(&output), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(127), "{output:?}");
        assert_eq!(printed, format!("the script: line 1: {what}\n"));
    }
    assert_eq!(
        run_step(&plain, b"#!/usr/bin/env -S sh -e\necho one\nfalse\n"),
        (Some(1), "one\n".to_owned())
    );
}

#[test]
fn a_user_whose_home_is_missing_works_in_the_root() {
    let homeless = step(&[("HOME", "/no/such/home")], None);
    assert_eq!(run_step(&homeless, b"pwd"), (Some(0), "/\n".to_owned()));
}

#[test]
fn a_hostile_environment_arrives_as_it_is() {
    let values = [
        ("A", "it's $HOME `id` \"x\""),
        ("B", "two\nlines"),
        ("C", ""),
        ("D", "ü'; exit 9; '"),
        // What the shell text calls things itself.
        ("at", "/srv"),
        ("group", "1"),
        ("IFS", "/"),
    ];
    let names = values.map(|(name, _)| format!(" \"${name}\"")).concat();
    let script = told(&step(&values, None), format!("printf '%s|'{names}").as_bytes(), &token());
    let output = run(&script);
    let expected = values.map(|(_, value)| format!("{value}|")).concat();
    // A shell takes no field separator out of its environment.
    let expected = expected.strip_suffix("/|").unwrap().to_owned() + " \t\n|";
    assert_eq!(said(&output), expected, "{output:?}");
    assert!(!script.argv.concat().contains("HOME `id`"), "no list of processes shows it");
}

#[test]
fn a_script_has_no_input_and_leaves_nothing() {
    let (guest, token) = (ShellGuest::new(), token());
    let output = guest.run(&told(&step(&[], Some("/")), b"cat; pwd; echo $0", &token));
    let said = said(&output);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines, ["/", guest.folder(&token).join("script").to_str().unwrap()], "{output:?}");
    assert_eq!(guest.left(), 0);
}

#[test]
fn a_missing_folder_fails_the_step() {
    let (code, said) = run_step(&step(&[], Some("/no/such/folder")), b"echo ran");
    assert_ne!(code, Some(0));
    assert!(!said.contains("ran") && said.contains("/no/such/folder"), "{said}");
}

#[test]
fn a_script_that_is_cut_off_anywhere_is_not_run() {
    let marker = tempfile::tempdir().unwrap();
    let text = format!("touch {0}/one\ntouch {0}/two\n", marker.path().display());
    let whole = told(&step(&[("A", "b")], None), text.as_bytes(), &token());
    for length in 0..whole.input.len() {
        let cut = GuestScript { input: whole.input[..length].to_vec(), ..whole.clone() };
        let output = run(&cut);
        assert!(!output.status.success(), "{length}: {output:?}");
        assert_eq!(fs::read_dir(marker.path()).unwrap().count(), 0, "{length}");
    }
    assert!(run(&whole).status.success());
    assert_eq!(fs::read_dir(marker.path()).unwrap().count(), 2);
}

fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}

#[test]
fn a_task_that_was_cut_off_is_ended_with_all_that_it_began() {
    let temp = tempfile::tempdir().unwrap();
    let pids = temp.path().join("pids");
    // One of them does not hear of SIGTERM.
    let text = format!(
        "#!/bin/sh\ntrap '' TERM\nsleep 600 & echo $! >{0}; trap - TERM; sleep 600 & echo $! >>{0}; echo $$ >>{0}\n\
         echo; wait",
        pids.display()
    );
    let guest = ShellGuest::new();
    let mut child = guest.begun(&text, &token());
    // As with a broken connection: the waiting process is gone, the rest goes on.
    child.kill().unwrap();
    child.wait().unwrap();
    let pids: Vec<u32> = fs::read_to_string(&pids).unwrap().lines().map(|pid| pid.parse().unwrap()).collect();
    assert!(pids.len() == 3 && pids.iter().all(|pid| lives(*pid)), "{pids:?}");
    let began = Instant::now();
    let ended = guest.run(&of_end(None));
    assert!(ended.status.success(), "{ended:?}");
    assert!(pids.iter().all(|pid| !lives(*pid)), "{pids:?}");
    assert!(began.elapsed() >= Duration::from_secs(5), "it was given the time to end by itself");
    assert_eq!(guest.left(), 0);
}

#[test]
fn what_ended_by_itself_and_foreign_processes_are_left_alone() {
    let mut other = Command::new("sleep").arg("600").spawn().unwrap();
    let guest = ShellGuest::new();
    for group in [other.id().to_string(), "rubbish -1\n".to_owned()] {
        let folder = guest.folder(&token());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("group"), group).unwrap();
    }
    fs::create_dir(guest.0.path().join("vmkit-step-by-step")).unwrap();
    assert!(guest.run(&of_end(None)).status.success());
    assert!(lives(other.id()), "a number alone is not believed");
    assert_eq!(guest.left(), 1);
    other.kill().unwrap();
    other.wait().unwrap();
}

#[test]
fn a_task_whose_folder_is_gone_does_not_begin() {
    let (guest, token, temp) = (ShellGuest::new(), token(), tempfile::tempdir().unwrap());
    let (folder, marker) = (guest.folder(&token), temp.path().join("ran"));
    let text = format!("touch {}", marker.display());
    let script = told(&step(&[], None), text.as_bytes(), &token);
    let mut child = guest.begin(&script);
    while !folder.join("env").exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::rename(&folder, folder.with_extension("ended")).unwrap();
    let _ = child.stdin.take().unwrap().write_all(&script.input);
    assert!(!child.wait_with_output().unwrap().status.success());
    assert!(!marker.exists());
}

fn copy_of(from: &Path, to: &Path, mode: Option<u32>) -> CopySpec {
    let text = format!(
        "version = 1\n[machine.web]\nimage = 'a'\nfiles = [{{ from = {from:?}, to = {to:?}, owner = '{}' }}]\n",
        rustix::process::geteuid().as_raw()
    );
    let project = crate::vmfile::parse(Path::new("/p/vmkit.toml"), &text, &|_| Err(String::new())).unwrap();
    let mut copy = project.machines[0].files[0].clone();
    copy.mode = mode;
    copy
}

fn archive_of(copy: &CopySpec) -> Vec<u8> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    archive::write(File::create(file.path()).unwrap(), copy).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn copied(from: &Path, to: &Path) -> Output {
    let copy = copy_of(from, to, None);
    run(&GuestScript { input: archive_of(&copy), ..of_copy(&copy, &token()) })
}

fn mode(path: PathBuf) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn set_mode(path: PathBuf, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_copy_replaces_a_file_and_joins_a_folder() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    fs::create_dir_all(at("app/sub/new")).unwrap();
    for name in ["app/sub/a", "app/.hidden", "app/-dash", "app/sub/new/b", "app/two words"] {
        fs::write(at(name), "new").unwrap();
    }
    symlink("nowhere", at("app/link")).unwrap();
    fs::create_dir(at("app/..odd")).unwrap();
    set_mode(at("app/sub/a"), 0o750);
    set_mode(at("app/sub/new"), 0o711);
    fs::create_dir_all(at("guest/app/sub")).unwrap();
    fs::write(at("guest/app/sub/a"), "old").unwrap();
    fs::write(at("guest/app/kept"), "kept").unwrap();
    let output = copied(&at("app"), &at("guest/app"));
    assert!(output.status.success(), "{output:?}");
    for name in ["sub/a", ".hidden", "-dash", "sub/new/b", "two words"] {
        assert_eq!(fs::read_to_string(at("guest/app").join(name)).unwrap(), "new", "{name}");
    }
    assert_eq!(fs::read_link(at("guest/app/link")).unwrap(), Path::new("nowhere"));
    assert!(at("guest/app/..odd").is_dir() && at("guest/app/kept").exists());
    assert_eq!((mode(at("guest/app/sub/a")), mode(at("guest/app/sub/new"))), (0o750, 0o711));
    let output = copied(&at("app/sub/a"), &at("guest/deep/er/b"));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::read_to_string(at("guest/deep/er/b")).unwrap(), "new");
    let refused = copied(&at("app/sub/a"), &at("guest/app"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is a directory"), "{refused:?}");
    let refused = copied(&at("app"), &at("guest/deep/er/b"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is not a directory"), "{refused:?}");
    fs::remove_dir_all(at("guest/app/sub")).unwrap();
    fs::write(at("guest/app/sub"), "a file").unwrap();
    let refused = copied(&at("app"), &at("guest/app"));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("sub exists, and is not a directory"));
    let left = fs::read_dir(at("guest"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with(".vmkit"));
    assert_eq!(left.count(), 0);
}

#[test]
fn a_folder_that_is_there_keeps_its_mode_and_owner_at_every_depth() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    fs::create_dir_all(at("from/sub")).unwrap();
    fs::write(at("from/sub/a"), "new").unwrap();
    set_mode(at("from"), 0o700);
    set_mode(at("from/sub"), 0o700);
    fs::create_dir_all(at("etc/sub")).unwrap();
    set_mode(at("etc"), 0o1777);
    set_mode(at("etc/sub"), 0o751);
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        std::os::unix::fs::chown(at("etc"), Some(65534), Some(65534)).unwrap();
        std::os::unix::fs::chown(at("etc/sub"), Some(65534), Some(65534)).unwrap();
    }
    // By a link too, as `/var/run` is one.
    symlink("etc", at("link")).unwrap();
    for to in ["etc", "link"] {
        let output = copied(&at("from"), &at(to));
        assert!(output.status.success(), "{output:?}");
        assert_eq!((mode(at("etc")), mode(at("etc/sub"))), (0o1777, 0o751));
        let owner = |name: &str| fs::metadata(at(name)).unwrap().uid();
        assert!(!is_root || (owner("etc"), owner("etc/sub"), owner("etc/sub/a")) == (65534, 65534, 0));
    }
}

#[test]
fn a_copy_that_is_cut_off_anywhere_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    fs::create_dir(at("from")).unwrap();
    for name in ["from/a", "from/b", "from/c"] {
        fs::write(at(name), "new").unwrap();
    }
    fs::create_dir_all(at("guest/to")).unwrap();
    let copy = copy_of(&at("from"), &at("guest/to"), None);
    let whole = archive_of(&copy);
    // A block is 512 bytes, and an archive may end after each of them: that is what looks whole
    // to some a tar.
    let last = whole.iter().rposition(|byte| *byte != 0).unwrap() / 512 * 512;
    for length in (0..=last).step_by(256) {
        for padding in [0, 1024] {
            let mut input = whole[..length].to_vec();
            input.resize(length + padding, 0);
            let output = run(&GuestScript { input, ..of_copy(&copy, &token()) });
            assert!(!output.status.success(), "{length}: {output:?}");
            assert_eq!(fs::read_dir(at("guest/to")).unwrap().count(), 0, "{length}");
            assert_eq!(fs::read_dir(at("guest")).unwrap().count(), 1, "{length}");
        }
    }
    assert!(run(&GuestScript { input: whole, ..of_copy(&copy, &token()) }).status.success());
    assert_eq!(fs::read_dir(at("guest/to")).unwrap().count(), 3);
}

#[test]
fn an_archive_with_a_file_that_became_shorter_has_no_last_entry() {
    let temp = tempfile::tempdir().unwrap();
    let from = temp.path().join("from");
    File::create(&from).unwrap().set_len(32 << 20).unwrap();
    let copy = copy_of(&from, &temp.path().join("to"), None);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let written = std::thread::spawn({
        let copy = copy.clone();
        move || archive::write(File::from(std::os::fd::OwnedFd::from(writer)), &copy)
    });
    // Its length was written, and little else fits into a pipe.
    let mut input = vec![0; 4096];
    reader.read_exact(&mut input).unwrap();
    File::options().write(true).open(&from).unwrap().set_len(1 << 20).unwrap();
    reader.read_to_end(&mut input).unwrap();
    let (path, error) = written.join().unwrap().unwrap_err();
    assert!(path == from && error.to_string().contains("became shorter"), "{error}");
    let output = run(&GuestScript { input, ..of_copy(&copy, &token()) });
    assert!(!output.status.success() && !temp.path().join("to").exists(), "{output:?}");
}

#[test]
fn what_can_not_be_copied_is_left_out_of_a_folder_and_refused_alone() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    fs::create_dir_all(at("site/.git")).unwrap();
    fs::write(at("site/index"), "x").unwrap();
    let socket = at("site/.git/fsmonitor--daemon.ipc");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert!(Command::new("mkfifo").arg(at("site/pipe")).status().unwrap().success());
    assert_eq!(archive::check(&at("site")).unwrap(), [socket.clone(), at("site/pipe")]);
    let output = copied(&at("site"), &at("to"));
    assert!(output.status.success(), "{output:?}");
    assert!(at("to/index").exists() && at("to/.git").is_dir() && !at("to/pipe").exists());
    assert_eq!(fs::read_dir(at("to/.git")).unwrap().count(), 0);
    let (path, _) = archive::check(&socket).unwrap_err();
    assert_eq!(path, socket);
    let copy = copy_of(&socket, &at("socket"), None);
    let file = tempfile::tempfile().unwrap();
    assert!(archive::write(file, &copy).is_err());
}

#[test]
fn an_archive_has_what_was_read_of_a_file_whatever_its_reported_length() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    for name in ["/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled"] {
        let Ok(content) = fs::read(name) else { continue };
        let output = copied(Path::new(name), &at("copy"));
        assert!(output.status.success(), "{name}: {output:?}");
        assert!(fs::read(at("copy")).unwrap() == content, "{name}");
    }
    fs::create_dir(at("logs")).unwrap();
    for name in ["logs/small", "logs/large"] {
        let bytes = if name == "logs/small" { 1 << 20 } else { 9 << 20 };
        fs::write(at(name), vec![b'x'; bytes]).unwrap();
    }
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let write = || {
            let open = |name: &str| File::options().append(true).open(at(name)).unwrap();
            let mut files = [open("logs/small"), open("logs/large")];
            while !ends.load(Ordering::Relaxed) {
                files.iter_mut().for_each(|file| file.write_all(&[b'x'; 5000]).unwrap());
                std::thread::yield_now();
            }
        };
        scope.spawn(write);
        let archive = archive_of(&copy_of(&at("logs"), &at("to"), None));
        ends.store(true, Ordering::Relaxed);
        let copy = copy_of(&at("logs"), &at("to"), None);
        let output = run(&GuestScript { input: archive, ..of_copy(&copy, &token()) });
        assert!(output.status.success(), "{output:?}");
    });
    for name in ["to/small", "to/large"] {
        let copy = fs::read(at(name)).unwrap();
        assert!(copy.len() >= 1 << 20 && copy.iter().all(|&byte| byte == b'x'), "{name}");
    }
}

#[test]
fn a_port_is_found_while_a_process_listens_there() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let script = listens(listener.local_addr().unwrap().port());
    assert_eq!(run(&script).status.code(), Some(0));
    drop(listener);
    assert_eq!(run(&script).status.code(), Some(1));
}
