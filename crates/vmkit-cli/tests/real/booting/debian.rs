//! The command with a real Debian in the VM: cloud-init, SSH, a clean end, and what outlives it.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::first_greeting;
use crate::harness::{Life, create_arguments};
use vmkit_testkit::guest;

/// How long the guest may take until SSH is ready, in seconds: one minute under emulation on an
/// idle host.
const BOOT_LIMIT: &str = "600";
/// How long the guest may take to shut itself down: five seconds on a quiet host.
const STOP_LIMIT: &str = "300";

/// A host, and the keys of one who logs in to its guests.
struct Debian(Life);

impl Debian {
    fn new() -> Self {
        let debian = Self(Life::new());
        debian.make_key("user");
        debian
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.dir.path().join(name)
    }

    /// Creates a key and returns its public half.
    fn make_key(&self, name: &str) -> String {
        let mut keygen = Command::new("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "vmkit test", "-f"]).arg(self.file(name));
        assert!(keygen.status().expect("the SSH client is installed").success());
        fs::read_to_string(self.file(&format!("{name}.pub"))).unwrap().trim().to_owned()
    }

    fn make(&self, options: &[&str]) {
        let mut arguments = create_arguments(&guest::debian(), "deb", "");
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        self.0.must(arguments);
    }

    fn ssh_port(&self) -> SocketAddr {
        let info = self.0.info("deb");
        info["run"]["forwards"][0]["host"].as_str().unwrap().parse().unwrap()
    }

    /// Runs a command in the guest, on a server with the key that was seen first, and returns what
    /// it printed.
    fn ssh(&self, user: &str, command: &str) -> String {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-p", &self.ssh_port().port().to_string()]).arg("-i").arg(self.file("user"));
        let known_hosts = format!("UserKnownHostsFile={}", self.file("known_hosts").display());
        let known = ["StrictHostKeyChecking=accept-new", "HostKeyAlias=deb"];
        for option in [known_hosts.as_str(), known[0], known[1], "IdentitiesOnly=yes", "BatchMode=yes"] {
            ssh.args(["-o", option]);
        }
        ssh.args(["-o", "ConnectTimeout=120", &format!("{user}@127.0.0.1"), "--", command]);
        let output = ssh.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "ssh {command}: {}: {said}", output.status);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Starts the VM and waits for SSH, which must not take much longer than SSH does.
    fn boot(&self) {
        self.0.must(["start", "deb"]);
        let greeted = first_greeting(self.ssh_port());
        self.0.must(["wait", "deb", "ssh", "--timeout", BOOT_LIMIT]);
        let waited = Instant::now();
        // It may have been the first to be greeted.
        let greeted = greeted.recv_timeout(Duration::from_secs(60)).unwrap();
        let late = waited.saturating_duration_since(greeted);
        eprintln!("`wait ssh` ended {late:?} after the first greeting");
        // Ten times what it takes on a busy host; `cargo xtask bench` measures it.
        assert!(late < Duration::from_secs(10), "SSH was there {late:?} before `wait` said so");
    }

    /// Stops the VM, which must be by its guest's own doing.
    fn shut_down(&self) {
        self.0.must(["stop", "deb", "--timeout", STOP_LIMIT]);
        assert_eq!(self.0.state("deb"), "stopped");
        let log = self.0.must(["logs", "deb"]);
        let end: Vec<&str> = log.lines().rev().take(10).collect();
        assert!(end.iter().any(|line| line.contains("Power down")), "{end:?}");
    }
}

#[test]
fn a_key_and_a_host_name_are_enough_to_log_in_and_data_outlives_a_stop() {
    let debian = Debian::new();
    let key = debian.file("user.pub");
    debian.make(&["--ssh-key", key.to_str().unwrap(), "--hostname", "typed"]);
    debian.boot();
    assert_eq!(debian.ssh("vmkit", "cloud-init status --wait >/dev/null; cloud-init status"), "status: done");
    assert_eq!(debian.ssh("vmkit", "hostname; id -un; sudo -n id -un"), "typed\nvmkit\nroot");
    let routes = debian.ssh("vmkit", "ip -4 route show default");
    assert!(routes.contains("proto dhcp"), "{routes}");
    let instance = debian.ssh("vmkit", "cat /run/cloud-init/.instance-id");
    let machine = debian.ssh("vmkit", "echo kept > data; cat /etc/machine-id");

    debian.shut_down();
    debian.boot();
    assert_eq!(debian.ssh("vmkit", "cat data /etc/machine-id"), format!("kept\n{machine}"));
    assert_eq!(debian.ssh("vmkit", "cat /run/cloud-init/.instance-id"), instance, "it is the same instance");
    let earlier =
        debian.ssh("vmkit", "sudo -n journalctl --boot=-1 --unit=init.scope --grep=shutdown --quiet");
    assert!(!earlier.is_empty(), "the journal of the boot before was ended in order");
    let crowds = "sudo -n journalctl --identifier=sshd --grep=MaxStartups --quiet || true";
    assert_eq!(debian.ssh("vmkit", crowds), "", "whoever waited for SSH was too many for its server");
    debian.0.must(["rm", "--force", "deb"]);
    debian.0.assert_empty("after rm --force");
}

#[test]
fn user_data_from_a_file_reaches_the_guest_as_it_is() {
    let debian = Debian::new();
    let (user, host) = (fs::read_to_string(debian.file("user.pub")).unwrap(), debian.make_key("host"));
    let private = fs::read_to_string(debian.file("host")).unwrap().replace('\n', "\n    ");
    let user_data = format!(
        "#cloud-config\n\
         hostname: raw\n\
         users:\n- name: ada\n  ssh_authorized_keys: [\"{}\"]\n\
         ssh_keys:\n  ed25519_public: {host}\n  ed25519_private: |\n    {}\n\
         write_files:\n- path: /etc/vmkit-test\n  content: \"a, b: 'c'\\n\"\n  permissions: \"0600\"\n  owner: root:root\n\
         runcmd:\n- [sh, -c, 'install -m 644 /etc/vmkit-test /run/seen']\n",
        user.trim(),
        private.trim_end(),
    );
    fs::write(debian.file("user-data"), user_data).unwrap();
    // The server must have the key that it was given.
    fs::write(debian.file("known_hosts"), format!("deb {host}\n")).unwrap();
    debian.make(&["--cloud-init", debian.file("user-data").to_str().unwrap()]);
    debian.boot();
    assert_eq!(debian.ssh("ada", "cloud-init status --wait >/dev/null; cloud-init status"), "status: done");
    assert_eq!(
        debian.ssh("ada", "hostname; stat -c %a /etc/vmkit-test; cat /run/seen"),
        "raw\n600\na, b: 'c'"
    );
    debian.shut_down();
    debian.0.must(["rm", "deb"]);
    debian.0.assert_empty("after rm");
}
