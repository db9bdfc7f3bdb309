//! VMs in Propolis by the command, each with a server of its own, on stand-ins for an illumos host
//! and its tools.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Answer, Host, answer};
use vmkit_testkit::propolis::illumos::FakeIllumos;
use vmkit_testkit::propolis::{FakePropolis, FaultProxy, NetworkFault, PropolisBehaviour};

/// A home, and an illumos host with a pool, an image and a link.
struct World {
    host: Host,
    illumos: FakeIllumos,
}

/// Finds a program of the test kit, which a test of the whole workspace has built beside the
/// command.
fn stand_in(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_vmkit")).with_file_name(name);
    let how = "`cargo build -p vmkit-testkit --features propolis` makes it";
    assert!(path.exists(), "{} is missing: {how}", path.display());
    path
}

impl World {
    fn new() -> Self {
        let host = Host::without_qemu();
        let (tools, server) = (stand_in("vmkit-fake-illumos"), stand_in("vmkit-fake-propolis"));
        let illumos = FakeIllumos::new(&host.dir.path().join("illumos"), &tools, &server).unwrap();
        ["tank", "tank/img", "tank/vm"].into_iter().for_each(|pool| illumos.add_pool(pool).unwrap());
        illumos.add_volume("tank/img/debian", &vec![7; 1 << 20]).unwrap();
        illumos.add_snapshot("tank/img/debian@base").unwrap();
        illumos.add_link("net0").unwrap();
        Self { host, illumos }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.host.command(arguments);
        command
            .env("PATH", self.illumos.path())
            .env("VMKIT_PROPOLIS_BOOTROM", self.illumos.bootrom())
            .env("VMKIT_PROPOLIS_DATASET", "tank/vm")
            .env("VMKIT_PROPOLIS_DEV", self.illumos.dev());
        command
    }

    fn vmkit(&self, arguments: &[&str]) -> Answer {
        answer(self.command(arguments).output().unwrap())
    }

    fn must(&self, arguments: &[&str]) -> String {
        let answer = self.vmkit(arguments);
        assert_eq!(answer.code, Some(0), "{arguments:?}: {answer:?}");
        answer.stdout
    }

    fn create<'a>(&self, more: &[&'a str]) -> Answer {
        let mut arguments: Vec<&'a str> = vec!["create", "web", "--backend", "propolis"];
        for (flag, usual) in [("--image", "zfs:tank/img/debian@base"), ("--network", "vnic:net0")] {
            if !more.contains(&flag) {
                arguments.extend([flag, usual]);
            }
        }
        arguments.extend(more);
        self.vmkit(&arguments)
    }

    fn left(&self) -> Vec<String> {
        self.illumos.leftovers().unwrap()
    }
}

#[test]
fn a_vm_with_a_server_of_its_own_lives_twice_and_leaves_nothing() {
    let world = World::new();
    assert_eq!(world.create(&["--disk", "2MiB", "--data-disk", "1MiB", "--start"]).code, Some(0));
    let info: serde_json::Value = serde_json::from_str(&world.must(&["info", "web", "--json"])).unwrap();
    assert_eq!(info["state"], "running", "{info}");
    let first = info["run"]["pid"].as_u64().unwrap();

    world.must(&["stop", "web", "--timeout", "0"]);
    assert!(world.must(&["ls"]).contains("stopped"));
    assert!(world.must(&["logs", "web"]).contains("login: "), "the console is kept when its server is gone");

    world.must(&["start", "web"]);
    let info: serde_json::Value = serde_json::from_str(&world.must(&["info", "web", "--json"])).unwrap();
    assert_ne!(
        info["run"]["pid"].as_u64().unwrap(),
        first,
        "a Propolis VM needs a new server to start again"
    );
    let answer = world.vmkit(&["rm", "web"]);
    assert_eq!(answer.code, Some(4), "{answer:?}");
    world.must(&["rm", "--force", "web"]);
    assert_eq!(world.left(), Vec::<String>::new());
    assert!(!world.host.home().join("vms/web").exists());
}

#[test]
fn what_the_host_has_not_is_refused_by_name_and_leaves_nothing() {
    let world = World::new();
    let qcow2 = world.host.dir.path().join("debian.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&qcow2).arg("1M").status();
    assert!(made.unwrap().success());
    let qcow2 = qcow2.to_str().unwrap();
    for (more, said) in [
        (&["--image", "zfs:tank/img/none@base"][..], &["tank/img/none@base"][..]),
        (&["--image", "zfs:nopool/img/debian@base"], &["nopool"]),
        (&["--image", "/nowhere/debian.raw"], &["/nowhere/debian.raw"]),
        (&["--image", qcow2], &["takes raw ones", "vmkit image convert"]),
        (&["--backend-option", "dataset=nopool/vm"], &["nopool/vm"]),
        (&["--network", "vnic:net9"], &["net9"]),
        (&["--network", "user"], &["network", "user", "vnic:LINK"]),
        (&["--cpus", "33"], &["cpus", "33", "32"]),
        (&["--disk", "1MiB", "--image", "zfs:tank/img/debian@none"], &["tank/img/debian@none"]),
    ] {
        let answer = world.create(more);
        assert_eq!(answer.code, Some(2), "{more:?}: {answer:?}");
        said.iter().for_each(|said| assert!(answer.stderr.contains(said), "{more:?}: {answer:?}"));
        assert_eq!(world.left(), Vec::<String>::new(), "{more:?}");
        assert!(!world.must(&["ls"]).contains("web"), "{more:?}");
    }
}

#[test]
fn an_address_with_another_protocol_is_reported_as_no_propolis() {
    let world = World::new();
    let server = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let proxy = FaultProxy::new(server.address()).unwrap();
    let address = format!("address={}", proxy.address());
    let image = ["--image", "base.img", "--network", "none"];
    assert_eq!(world.create(&[&image[..], &["--backend-option", &address]].concat()).code, Some(0));
    for (fault, said) in [
        (NetworkFault::Html, "not a Propolis server"),
        (NetworkFault::Junk(b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec()), "not HTTP"),
    ] {
        proxy.set(Some(fault)).unwrap();
        let answer = world.vmkit(&["start", "web"]);
        assert_ne!(answer.code, Some(0), "{answer:?}");
        let place = proxy.address().to_string();
        assert!(answer.stderr.contains(said) && answer.stderr.contains(&place), "{answer:?}");
    }
    proxy.set(None).unwrap();
    world.must(&["rm", "web"]);
}
