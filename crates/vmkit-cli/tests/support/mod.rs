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
