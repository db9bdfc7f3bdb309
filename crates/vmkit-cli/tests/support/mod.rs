//! The command in a home of its own, on a host whose QEMU is what the test says.
#![allow(clippy::unwrap_used, reason = "a test may panic")]
#![allow(dead_code, reason = "each test program uses what it needs of it")]

pub(crate) mod stream;
pub(crate) mod web;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// A QEMU that tells its version and refuses everything else.
pub(crate) const REFUSING_QEMU: &str = "#!/bin/sh\n\
    case \"$1\" in --version) echo 'QEMU emulator version 7.2.22';; \
    *) echo 'qemu: -nodefaults: refused by the test' >&2; exit 1;; esac\n";

/// What the command answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A home, files to make VMs from, and the programs that can be found.
pub(crate) struct Host {
    pub(crate) dir: TempDir,
    path: PathBuf,
}

impl Host {
    /// Creates a host whose QEMU refuses to run anything.
    pub(crate) fn with_refusing_qemu() -> Self {
        let host = Self::without_qemu();
        let program = host.path.join("qemu-system-x86_64");
        vmkit_testkit::write_program(&program, REFUSING_QEMU).unwrap();
        host
    }

    /// Creates a host on which no program is found.
    pub(crate) fn without_qemu() -> Self {
        let dir = tempfile::Builder::new().prefix("vmkit-cli").tempdir().unwrap();
        let path = dir.path().join("bin");
        fs::create_dir(&path).unwrap();
        fs::write(dir.path().join("vmlinuz"), vmkit_testkit::paper_kernel()).unwrap();
        fs::write(dir.path().join("base.img"), vec![0; 4 << 20]).unwrap();
        Self { dir, path }
    }

    /// Creates a host with the QEMU of this machine.
    pub(crate) fn with_real_qemu() -> Self {
        let host = Self::without_qemu();
        Self { path: std::env::var_os("PATH").unwrap().into(), ..host }
    }

    pub(crate) fn home(&self) -> PathBuf {
        self.dir.path().join("home")
    }

    /// Returns the path of a file that VMs are made from.
    pub(crate) fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// Returns the command in this home, nothing of this process's environment in it.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmkit"));
        command
            .args(arguments)
            .env_clear()
            .env("PATH", &self.path)
            .env("VMKIT_HOME", self.home())
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs the command to its end.
    pub(crate) fn vmkit<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Answer {
        answer(self.command(arguments).output().unwrap())
    }

    /// Runs the command, which has to succeed.
    pub(crate) fn must<S: AsRef<OsStr> + Clone>(&self, arguments: impl IntoIterator<Item = S>) -> String {
        let answer = self.vmkit(arguments);
        assert_eq!(answer.code, Some(0), "{answer:?}");
        answer.stdout
    }

    /// Creates a VM that boots a kernel and needs nothing else.
    pub(crate) fn create(&self, name: &str) {
        self.must(["create", name, "--kernel", "vmlinuz", "--accel", "tcg"]);
    }

    /// Returns everything in the home but its cache: path, mode and content.
    pub(crate) fn snapshot(&self) -> BTreeMap<PathBuf, (u32, Vec<u8>)> {
        let mut found = BTreeMap::new();
        walk(&self.home(), &self.home().join("cache"), &mut found);
        found
    }
}

/// What commands printed, one after the other, for a snapshot: standard error, and before it what
/// was on standard output; with `[DIR]` for the host's directory and `[TIME]` for how long
/// something took.
pub(crate) struct Transcript<'a> {
    host: &'a Host,
    text: String,
}

impl<'a> Transcript<'a> {
    pub(crate) fn of(host: &'a Host) -> Self {
        Self { host, text: String::new() }
    }

    /// Runs a command.
    pub(crate) fn run(&mut self, arguments: &[&str]) {
        let answer = self.host.vmkit(arguments);
        self.add(arguments, &answer);
    }

    /// Runs a command that has to be refused as bad input, and to leave the home as it is.
    pub(crate) fn refused(&mut self, arguments: &[&str]) {
        let before = self.host.snapshot();
        let answer = self.host.vmkit(arguments);
        assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""), "{arguments:?}: {answer:?}");
        assert!(self.host.snapshot() == before, "{arguments:?} changed something");
        self.add(arguments, &answer);
    }

    fn add(&mut self, arguments: &[&str], answer: &Answer) {
        let is_plain = |word: &str| !word.is_empty() && !word.contains([' ', '\n']);
        let quoted = |word: &&str| if is_plain(word) { (*word).to_owned() } else { format!("{word:?}") };
        let words: Vec<String> = arguments.iter().map(quoted).collect();
        let dir = self.host.dir.path().to_str().unwrap();
        let mut said = format!("$ vmkit {}\n", words.join(" "));
        if !answer.stdout.is_empty() {
            said.push_str(&format!("[standard output]\n{}", answer.stdout));
        }
        said.push_str(&answer.stderr);
        if answer.code != Some(0) {
            said.push_str(&format!("[exit code {}]\n", answer.code.unwrap()));
        }
        for line in said.replace(dir, "[DIR]").lines() {
            let (kept, time) = match line.split_once("ready in ") {
                Some((before, _)) => (before, "ready in [TIME]"),
                None => (line, ""),
            };
            self.text.extend([kept, time, "\n"]);
        }
        self.text.push('\n');
    }

    /// Returns all that was said.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }
}

fn walk(path: &Path, except: &Path, found: &mut BTreeMap<PathBuf, (u32, Vec<u8>)>) {
    let Ok(metadata) = fs::symlink_metadata(path) else { return };
    if path == except {
        return;
    }
    // A lock's content is the PID of who held it last.
    let is_lock = path.file_name() == Some(OsStr::new("lock"));
    let content = if metadata.is_file() && !is_lock { fs::read(path).unwrap() } else { Vec::new() };
    found.insert(path.to_owned(), (metadata.mode(), content));
    if metadata.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            walk(&entry.unwrap().path(), except, found);
        }
    }
}

/// Reads what a finished command said.
pub(crate) fn answer(output: Output) -> Answer {
    Answer {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Compares with a golden file; `UPDATE_GOLDEN=1` writes it again.
pub(crate) fn assert_golden(path: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, found).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        golden == found,
        "{} is not as golden (UPDATE_GOLDEN=1 writes it anew); found:\n{found}",
        path.display()
    );
}
