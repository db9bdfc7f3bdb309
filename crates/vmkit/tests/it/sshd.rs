//! OpenSSH's real server on a loopback port of the kernel's choice: one process for each
//! connection, ended by the test.

#![allow(dead_code, reason = "each test program takes what it needs")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vmkit::spec::GuestAccess;
use vmkit::ssh::{HostKey, Session, SshIdentity, SshTarget};

const PROGRAM: &str = "/usr/sbin/sshd";

pub(crate) struct Sshd {
    pub(crate) dir: TempDir,
    pub(crate) access: GuestAccess,
    pub(crate) address: SocketAddr,
    served: Arc<Mutex<Vec<Child>>>,
}

/// OpenSSH's real server as a guest runs it: one process that listens, and turns away whom it has
/// no room for.
pub(crate) struct Daemon {
    pub(crate) access: GuestAccess,
    pub(crate) address: SocketAddr,
    _dir: TempDir,
    child: Child,
}

impl Daemon {
    /// Starts one at a port of the kernel's choice.
    pub(crate) fn with(config: &str) -> Self {
        // The port may be taken between the question and the start: then another is.
        let started = (0..20).find_map(|_| {
            let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            Self::started(address, config)
        });
        started.expect("sshd listens")
    }

    /// Starts one at this address.
    pub(crate) fn at(address: SocketAddr, config: &str) -> Self {
        Self::started(address, config).expect("sshd listens")
    }

    fn started(address: SocketAddr, config: &str) -> Option<Self> {
        let (dir, access) = prepare(config);
        let mut child = Command::new(PROGRAM)
            .args(["-D", "-e", "-f"])
            .arg(dir.path().join("sshd_config"))
            .arg(format!("-oListenAddress={address}"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        if said.any(|line| line.is_ok_and(|line| line.contains("Server listening on"))) {
            // Read to its end, or the server would fail at its next word.
            thread::spawn(move || said.for_each(drop));
            return Some(Self { access, address, _dir: dir, child });
        }
        child.wait().unwrap();
        None
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        for pid in with_children(self.child.id()) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Sshd {
    /// Serves this user, whose only key is that of the access.
    pub(crate) fn new() -> Self {
        Self::with("")
    }

    /// Serves with further lines of configuration.
    pub(crate) fn with(config: &str) -> Self {
        let (dir, access) = prepare(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let served = Arc::new(Mutex::new(Vec::new()));
        let (children, file) = (Arc::clone(&served), dir.path().join("sshd_config"));
        // The thread ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                children.lock().unwrap().push(serve(&file, stream));
            }
        });
        Self { dir, access, address, served }
    }

    pub(crate) fn target(&self) -> SshTarget {
        SshTarget {
            name: "test".into(),
            address: self.address,
            user: self.access.user.clone(),
            identity: SshIdentity::of(&self.access.login_key).unwrap(),
            host_key: HostKey::known(&self.access.host_key.public).unwrap(),
        }
    }

    pub(crate) async fn session(&self) -> Session {
        Session::connect(&self.target(), soon()).await.unwrap()
    }

    /// Sends a signal to every process that serves a connection, its children too.
    pub(crate) fn signal(&self, signal: Signal) {
        for child in self.served.lock().unwrap().iter() {
            for pid in with_children(child.id()) {
                let _ = kill_process(pid, signal);
            }
        }
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        for child in self.served.lock().unwrap().iter_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Writes the keys and the configuration of a server.
fn prepare(config: &str) -> (TempDir, GuestAccess) {
    assert!(Path::new(PROGRAM).exists(), "`cargo xtask setup` installs openssh-server");
    if rustix::process::geteuid().is_root() {
        // What the distribution's own service makes before it starts the server.
        fs::create_dir_all("/run/sshd").unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("id").arg("-un").output().unwrap();
    let access = GuestAccess::generate(String::from_utf8(output.stdout).unwrap().trim()).unwrap();
    let (host_key, keys) = (dir.path().join("host_key"), dir.path().join("authorized_keys"));
    write_secret(&host_key, &access.host_key.private);
    write_secret(&keys, &access.login_key.public);
    let text = format!(
        "HostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n\
         PermitRootLogin prohibit-password\nPrintMotd no\nPidFile none\nSubsystem sftp internal-sftp\n{config}\n",
        host_key.display(),
        keys.display()
    );
    fs::write(dir.path().join("sshd_config"), text).unwrap();
    (dir, access)
}

fn serve(config: &Path, stream: TcpStream) -> Child {
    let end = |stream: &TcpStream| Stdio::from(OwnedFd::from(stream.try_clone().unwrap()));
    Command::new(PROGRAM)
        .args(["-i", "-e", "-f"])
        .arg(config)
        .stdin(end(&stream))
        .stdout(end(&stream))
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Returns a process that is the test's own, and what it has started.
fn with_children(pid: u32) -> Vec<Pid> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        let path = format!("/proc/{pid}/task/{pid}/children");
        let children = fs::read_to_string(path).unwrap_or_default();
        found.extend(children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        next += 1;
    }
    found.into_iter().filter_map(|pid| Pid::from_raw(pid.try_into().ok()?)).collect()
}

pub(crate) fn write_secret(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// More than anything here takes, even on a busy host.
pub(crate) fn soon() -> Duration {
    Duration::from_secs(60)
}
