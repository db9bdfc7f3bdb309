//! The stand-ins for the host's tools say and do what the real ones do, and can be told to fail.

use std::process::{Command, Output};

use serde_json::json;
use tempfile::TempDir;
use vmkit_testkit::propolis::illumos::{CallFault, FakeIllumos};
use vmkit_testkit::propolis::{FakePropolis, FakeSetup, PropolisBehaviour};

use super::client::*;

const MIB: u64 = 1024 * 1024;

struct Host {
    fake: FakeIllumos,
    _dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tools = env!("CARGO_BIN_EXE_vmkit-fake-illumos").as_ref();
        let propolis = env!("CARGO_BIN_EXE_vmkit-fake-propolis").as_ref();
        let fake = FakeIllumos::new(dir.path(), tools, propolis).unwrap();
        fake.add_pool("tank").unwrap();
        fake.add_pool("tank/img").unwrap();
        fake.add_volume("tank/img/debian", b"a raw image").unwrap();
        fake.add_snapshot("tank/img/debian@base").unwrap();
        fake.add_link("igb0").unwrap();
        Self { fake, _dir: dir }
    }

    fn command(&self, line: &str) -> Command {
        let mut words = line.split(' ');
        let mut command = Command::new(self.fake.path().join(words.next().unwrap()));
        command.args(words).env("PATH", self.fake.path());
        command
    }

    fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// Runs what must succeed, and returns what it printed.
    fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs what must fail, and checks what it says.
    fn fails(&self, line: &str, code: i32, stderr: &str) {
        let output = self.run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said.trim_end()), (Some(code), stderr), "{line}");
    }
}

#[test]
fn a_volume_is_cloned_grown_and_destroyed() {
    let host = Host::new();
    host.ok("zfs clone -p tank/img/debian@base tank/vm/web/root");
    host.ok(&format!("zfs set volsize={} tank/vm/web/root", 8 * MIB));
    assert_eq!(host.ok("zfs get -H -p -o value volsize tank/vm/web/root"), format!("{}\n", 8 * MIB));
    assert_eq!(host.ok("zfs get -Hpo value origin tank/vm/web/root"), "tank/img/debian@base\n");
    let bytes = std::fs::read(host.fake.dev().join("zvol/rdsk/tank/vm/web/root")).unwrap();
    assert_eq!((bytes.len() as u64, &bytes[..11]), (8 * MIB, &b"a raw image"[..]));
    assert_eq!(host.ok("zfs list -H -p -o name -r tank/vm"), "tank/vm\ntank/vm/web\ntank/vm/web/root\n");
    assert_eq!(
        host.fake.leftovers().unwrap(),
        ["dataset tank/vm", "dataset tank/vm/web", "dataset tank/vm/web/root"]
    );
    host.ok("zfs destroy -r tank/vm");
    assert_eq!(host.fake.leftovers().unwrap(), [""; 0]);
    assert!(!host.fake.dev().join("zvol/rdsk/tank/vm/web/root").exists());
}

#[test]
fn zfs_refuses_with_its_own_message() {
    let host = Host::new();
    host.ok("zfs clone -p tank/img/debian@base tank/vm/web");
    for (line, code, stderr) in [
        ("zfs list -H -p -o name tank/no", 1, "cannot open 'tank/no': dataset does not exist"),
        (
            "zfs clone tank/img/debian@no tank/x",
            1,
            "cannot open 'tank/img/debian@no': dataset does not exist",
        ),
        (
            "zfs clone tank/img/debian@base tank/vm/web",
            1,
            "cannot create 'tank/vm/web': dataset already exists",
        ),
        ("zfs clone tank/img/debian@base tank/a/b", 1, "cannot create 'tank/a/b': parent does not exist"),
        ("zfs create -V 8m lake/x", 1, "cannot create 'lake/x': no such pool 'lake'"),
        (
            "zfs create -V 8000 tank/x",
            1,
            "cannot create 'tank/x': volume size must be a multiple of volume block size",
        ),
        (
            "zfs snapshot tank/no@a",
            1,
            "cannot create snapshot 'tank/no@a': dataset does not exist\nno snapshots were created",
        ),
        (
            "zfs snapshot tank/img/debian@base",
            1,
            "cannot create snapshot 'tank/img/debian@base': dataset already exists\nno snapshots were created",
        ),
        (
            "zfs destroy tank/img/debian@base",
            1,
            "cannot destroy 'tank/img/debian@base': snapshot has dependent clones\n\
             use '-R' to destroy the following datasets:\ntank/vm/web",
        ),
        (
            "zfs destroy -r tank/img",
            1,
            "cannot destroy 'tank/img': filesystem has dependent clones\n\
             use '-R' to destroy the following datasets:\ntank/vm/web",
        ),
        (
            "zfs destroy tank/vm",
            1,
            "cannot destroy 'tank/vm': filesystem has children\nuse '-r' to destroy the following datasets:\ntank/vm/web",
        ),
        ("zfs destroy tank/vm/no", 1, "cannot open 'tank/vm/no': dataset does not exist"),
        (
            "zfs set volsize=1000001 tank/vm/web",
            1,
            "cannot set property for 'tank/vm/web': 'volsize' must be a multiple of volume block size (8K)",
        ),
        (
            "zfs get -H -p -o value colour tank",
            2,
            "bad property list: invalid property 'colour'\nusage: zfs command args ...",
        ),
        ("zfs dance", 2, "unrecognized command 'dance'\nusage: zfs command args ..."),
    ] {
        host.fails(line, code, stderr);
    }
    host.ok("zfs destroy -R tank/img");
    assert_eq!(host.fake.leftovers().unwrap(), ["dataset tank/vm"], "the clone went with its origin");
}

#[test]
fn a_pool_is_not_destroyed() {
    let said = "cannot destroy 'tank': operation does not apply to pools\nuse 'zfs destroy -r tank' to destroy all datasets in \
                the pool\nuse 'zpool destroy tank' to destroy the pool itself";
    Host::new().fails("zfs destroy tank", 1, said);
}

#[test]
fn vnics_are_created_shown_and_deleted() {
    let host = Host::new();
    host.ok("pfexec dladm create-vnic -t -l igb0 -m 52:54:00:0a:0b:0c -p mtu=9000 vm0");
    assert_eq!(
        host.ok("dladm show-vnic -p -o link,over,macaddress,vid"),
        "vm0:igb0:52\\:54\\:0\\:a\\:b\\:c:0\n"
    );
    assert_eq!(host.ok("dladm show-vnic -p -o macaddress vm0"), "52:54:0:a:b:c\n");
    assert_eq!(host.ok("dladm show-link -p -o mtu vm0"), "9000\n");
    assert_eq!(host.fake.leftovers().unwrap(), ["link vm0"]);
    host.ok("dladm delete-vnic vm0");
    assert_eq!(host.fake.leftovers().unwrap(), [""; 0]);
    let calls = host.fake.calls().unwrap();
    assert_eq!(calls[0][..3], ["dladm", "create-vnic", "-t"], "{calls:?}");
    assert_eq!(calls.last().unwrap(), &["dladm", "delete-vnic", "vm0"]);
}

#[test]
fn dladm_refuses_with_its_own_message() {
    let host = Host::new();
    host.ok("dladm create-vnic -t -l igb0 -m 2:8:20:1:2:3 vm0");
    let long = format!("dladm create-vnic -t -l igb0 {}0", "v".repeat(31));
    for (line, stderr) in [
        ("dladm create-vnic -t -l igb0 web", "dladm: invalid link name 'web'"),
        ("dladm create-vnic -t -l igb0 0vm0", "dladm: invalid link name '0vm0'"),
        ("dladm create-vnic -t -l igb0 vm01", "dladm: invalid link name 'vm01'"),
        ("dladm create-vnic -t -l igb0 my-vm0", "dladm: invalid link name 'my-vm0'"),
        (&long, &format!("dladm: link name too long '{}0'", "v".repeat(31))),
        ("dladm create-vnic -t -l ixgbe7 vm1", "dladm: invalid link name 'ixgbe7'"),
        ("dladm create-vnic -t -l igb0 vm0", "dladm: vnic creation over igb0 failed: object already exists"),
        (
            "dladm create-vnic -t -l igb0 -m 2:8:20:1:2:3 vm1",
            "dladm: vnic creation over igb0 failed: MAC address is already in use",
        ),
        ("dladm delete-vnic vm9", "dladm: invalid link name 'vm9'"),
        ("dladm delete-vnic igb0", "dladm: 'igb0' is not a vnic"),
        ("dladm show-vnic -p -o link vm9", "dladm: invalid vnic name 'vm9': object not found"),
    ] {
        host.fails(line, 1, stderr);
    }
    host.ok(&format!("dladm create-vnic -t -l igb0 {}0", "v".repeat(30)));
}

#[test]
fn a_call_can_fail_before_or_after_its_effect_or_hang() {
    let host = Host::new();
    let fault = |stderr: &str| (stderr.to_owned(), 1);
    let (stderr, code) = fault("out of space");
    host.fake.plan_fault(1, CallFault::Fail { stderr, code }).unwrap();
    let (stderr, code) = fault("interrupted");
    host.fake.plan_fault(2, CallFault::FailAfterwards { stderr, code }).unwrap();
    host.fake.plan_fault(3, CallFault::Hang).unwrap();
    host.fails("zfs create tank/a", 1, "out of space");
    host.fails("zfs create tank/b", 1, "interrupted");
    let mut hanging = host.command("zfs create tank/c").spawn().unwrap();
    while host.fake.calls().unwrap().len() < 3 {
        std::thread::yield_now();
    }
    assert!(hanging.try_wait().unwrap().is_none());
    hanging.kill().unwrap();
    hanging.wait().unwrap();
    assert_eq!(host.fake.leftovers().unwrap(), ["dataset tank/b"]);
}

fn spec_on(host: &Host) -> serde_json::Value {
    host.ok("zfs clone -p tank/img/debian@base tank/vm/root");
    host.ok("dladm create-vnic -t -l igb0 vm0");
    let mut spec = spec_with_disk("/dev/zvol/rdsk/tank/vm/root".as_ref());
    spec["components"]["net0"] = json!({
        "type": "virtio_nic",
        "component": {
            "backend_id": "net0-backend",
            "interface_id": "00000000-0000-0000-0000-000000000000",
            "pci_path": { "bus": 0, "device": 8, "function": 0 },
        },
    });
    spec["components"]["net0-backend"] =
        json!({ "type": "virtio_network_backend", "component": { "vnic_name": "vm0" } });
    spec
}

fn server(host: &Host) -> FakePropolis {
    FakeSetup::default()
        .illumos(host.fake.dir())
        .spawn_process(&host.fake.path().join("propolis-server"))
        .unwrap()
}

#[test]
fn a_disk_and_a_link_in_use_are_busy_until_the_server_lets_go() {
    let host = Host::new();
    let spec = spec_on(&host);
    let fake = server(&host);
    assert_eq!(ensure(&fake, &spec).status, 201, "{}", fake.log());
    host.fails("zfs destroy tank/vm/root", 1, "cannot destroy 'tank/vm/root': dataset is busy");
    host.fails("dladm delete-vnic vm0", 1, "dladm: vnic deletion failed: link busy");
    let left = host.fake.leftovers().unwrap();
    assert!(left.contains(&format!("kernel VM {ID}")), "{left:?}");
    assert!(left.contains(&format!("server {}", fake.pid().unwrap())), "{left:?}");
    assert_eq!(put_state(&fake, "Stop").status, 204);
    wait_for(&fake, "Destroyed");
    host.ok("zfs destroy -r tank/vm");
    host.ok("dladm delete-vnic vm0");
    drop(fake);
    assert_eq!(host.fake.leftovers().unwrap(), [""; 0]);
}

#[test]
fn a_missing_link_or_disk_fails_and_only_the_log_names_it() {
    let host = Host::new();
    for (undo, told) in [
        ("dladm delete-vnic vm0", "failed to create viona device vm0: No such file or directory"),
        (
            "zfs destroy -r tank/vm",
            "failed to open file /dev/zvol/rdsk/tank/vm/root: No such file or directory",
        ),
    ] {
        let spec = spec_on(&host);
        host.ok(undo);
        let fake = server(&host);
        let answer = ensure(&fake, &spec);
        assert_eq!((answer.status, answer.message()), (500, "Internal Server Error"));
        // The process's log arrives by a pipe.
        while !fake.log().contains("\"response_code\":500") {
            std::thread::yield_now();
        }
        assert!(fake.log().contains(told), "{}", fake.log());
        drop(fake);
        if undo.starts_with("dladm") {
            host.ok("zfs destroy -r tank/vm");
        }
    }
}

#[test]
fn a_killed_server_leaks_its_kernel_vm_and_bhyvectl_takes_it_away() {
    let host = Host::new();
    let mut fake = server(&host);
    run(&fake);
    fake.kill();
    assert_eq!(host.fake.leftovers().unwrap(), [format!("kernel VM {ID}")]);
    host.ok(&format!("bhyvectl --destroy --vm={ID}"));
    let again = host.run(&format!("bhyvectl --destroy --vm={ID}"));
    assert_eq!(again.status.code(), Some(1));
    assert_eq!(String::from_utf8(again.stdout).unwrap(), format!("VM:{ID} is not created.\n"));
    assert_eq!(host.fake.leftovers().unwrap(), [""; 0]);
}

#[test]
fn a_server_whose_kernel_vm_is_taken_from_it_panics_while_that_runs() {
    let host = Host::new();
    let mut fake = server(&host);
    run(&fake);
    host.ok(&format!("bhyvectl --destroy --vm={ID}"));
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&fake.wait().unwrap()), Some(6));
    let mut idle = server(&host);
    ensure_well(&idle);
    host.ok(&format!("bhyvectl --destroy --vm={ID}"));
    assert_eq!(put_state(&idle, "Stop").status, 204, "one that does not run misses nothing");
    wait_for(&idle, "Destroyed");
    ensure_well(&idle);
    host.ok(&format!("bhyvectl --destroy --vm={ID}"));
    let body = json!("Run").to_string();
    let head =
        "PUT /instance/state HTTP/1.1\r\nhost: x\r\napi-version: 5.0.0\r\ncontent-type: application/json";
    let mut stream = std::net::TcpStream::connect(idle.address()).unwrap();
    let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&idle.wait().unwrap()), Some(6));
}

#[test]
fn a_server_on_the_host_behaves_as_the_host_is_set() {
    let host = Host::new();
    host.fake
        .behave(&PropolisBehaviour { refusal: Some("no viona".to_owned()), ..PropolisBehaviour::default() })
        .unwrap();
    host.fails("pfexec propolis-server run /nowhere 127.0.0.1:0", 1, "no viona");
}

#[test]
fn a_host_that_is_dropped_ends_the_servers_that_run_on_it() {
    let host = Host::new();
    let mut fake = server(&host);
    run(&fake);
    drop(FakeIllumos::open(host.fake.dir()));
    assert_eq!(ask(&fake, "GET", "/instance", None).status, 200, "the host is somebody else's");
    drop(host.fake);
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&fake.wait().unwrap()), Some(9));
}
