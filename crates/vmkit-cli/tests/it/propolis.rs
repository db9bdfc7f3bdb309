//! VMs in Propolis by the command, with a fake server that runs already.

use std::io::Write;
use std::process::Stdio;

use crate::support::stream::{Heard, ended};
use crate::support::{Answer, Host};
use vmkit_testkit::propolis::{FakePropolis, FakeSetup, FaultProxy, NetworkFault, PropolisBehaviour};

/// What the fake's guest says first.
const BOOT: &str = "no guest runs here\r\nlogin: ";

/// A host whose VMs run at a server that is there.
struct Served {
    host: Host,
    server: FakePropolis,
}

impl Served {
    fn new() -> Self {
        Self::by(FakeSetup::default())
    }

    fn by(setup: FakeSetup) -> Self {
        Self { host: Host::with_refusing_qemu(), server: setup.spawn().unwrap() }
    }

    fn create(&self, name: &str, more: &[&str]) -> Answer {
        let address = format!("address={}", self.server.address());
        let mut arguments = vec!["create", name, "--backend", "propolis", "--backend-option", &address];
        arguments.extend(["--image", "base.img", "--network", "none"]);
        arguments.extend(more);
        self.host.vmkit(arguments)
    }
}

#[test]
fn a_vm_lives_its_whole_life_by_the_command() {
    let served = Served::new();
    let Served { host, server } = &served;
    assert_eq!(served.create("web", &[]).code, Some(0));
    host.create("qemu-vm");
    host.must(["start", "web"]);
    let list = host.must(["ls"]);
    assert!(list.contains("web") && list.contains("propolis") && list.contains("qemu-vm"), "{list}");

    let url = host.must(["console", "web", "--print-endpoint"]);
    assert_eq!(url.trim_end(), format!("ws://{}/instance/serial", server.address()));

    let mut console = host.command(["console", "web"]);
    let mut console =
        console.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut heard = Heard::new(console.stdout.take().unwrap());
    heard.until(BOOT);
    console.stdin.as_mut().unwrap().write_all(b"hello\r").unwrap();
    heard.until("hello\r\n");
    assert!(host.must(["logs", "web"]).starts_with(&format!("{BOOT}hello\r\n")));
    assert_eq!(host.must(["logs", "web", "--tail", "1"]), "login: hello\r\n");

    host.must(["stop", "web", "--timeout", "0"]);
    assert_eq!(ended(&mut console).code(), Some(0));
    let said = Heard::new(console.stderr.take().unwrap()).rest();
    assert!(said.contains("the VM has ended"), "{said}");
    // What the server has forgotten by now lies in the log.
    assert!(host.must(["logs", "web"]).starts_with(&format!("{BOOT}hello\r\n")));
    let answer = host.vmkit(["console", "web"]);
    assert_eq!(answer.code, Some(4), "{answer:?}");
    host.must(["rm", "web"]);
    assert!(server.kernel_vms().is_empty());
}

#[test]
fn what_propolis_cannot_do_is_reported_before_anything_is_created() {
    let served = Served::new();
    for (more, code, said) in [
        (&["--network", "user"][..], 2, "network"),
        (&["--network", "vnic:network-without-digit"], 2, "ends with a digit"),
        (&["--network", "vnic:a234567890123456789012345678901234567890"], 2, "31"),
        (&["--cpus", "33"], 2, "32"),
        (&["--backend-option", "pool=tank"], 2, "backend_options.pool"),
        (&["--backend-option", "address=server:1"], 2, "IP:PORT"),
    ] {
        let address = format!("address={}", served.server.address());
        let mut arguments = vec!["create", "web", "--backend", "propolis", "--image", "base.img"];
        if !more.iter().any(|word| word.contains("address=")) {
            arguments.extend(["--backend-option", &address]);
        }
        if !more.contains(&"--network") {
            arguments.extend(["--network", "none"]);
        }
        arguments.extend(more);
        let answer = served.host.vmkit(arguments);
        assert_eq!(answer.code, Some(code), "{more:?}: {answer:?}");
        assert!(answer.stderr.contains(said), "{more:?}: {answer:?}");
        assert!(!served.host.must(["ls", "--json"]).contains("web"), "{more:?}");
    }
}

#[test]
fn an_address_without_a_listener_is_named() {
    let mut served = Served::new();
    let answer = served.create("web", &[]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    served.server.kill();
    let answer = served.host.vmkit(["start", "web"]);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert!(answer.stderr.contains(&served.server.address().to_string()), "{answer:?}");
    served.host.must(["rm", "--force", "web"]);
}

#[test]
fn a_server_that_is_too_old_is_named_with_the_version_that_is_needed() {
    let served = Served::by(FakeSetup::default().latest_version("1.0.0"));
    let serial = ["--backend-option", "serial-number=rack-7"];
    assert_eq!(served.create("web", &serial).code, Some(0));
    let answer = served.host.vmkit(["start", "web"]);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    let place = served.server.address().to_string();
    for said in ["too old", "2.0.0", &place] {
        assert!(answer.stderr.contains(said), "{said}: {answer:?}");
    }
    served.host.must(["rm", "web"]);
}

#[test]
fn a_network_that_fails_keeps_the_record_of_a_vm_that_runs() {
    let Served { host, server } = Served::new();
    let proxy = FaultProxy::new(server.address()).unwrap();
    let address = format!("address={}", proxy.address());
    let create = ["create", "web", "--backend", "propolis", "--image", "base.img", "--network", "none"];
    host.must([&create[..], &["--backend-option", &address, "--start"]].concat());
    proxy.set(Some(NetworkFault::DropAfter(0))).unwrap();
    let answer = host.vmkit(["rm", "--force", "web"]);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert_eq!(server.kernel_vms().len(), 1);
    proxy.set(None).unwrap();
    assert!(host.must(["ls"]).contains("web"));
    host.must(["rm", "--force", "web"]);
    assert!(server.kernel_vms().is_empty());
}

#[test]
fn disks_and_networks_of_a_server_elsewhere_are_its_own() {
    let host = Host::with_refusing_qemu();
    let create = |more: &[&str]| {
        let start = ["create", "web", "--backend", "propolis", "--backend-option", "address=192.0.2.7:12400"];
        host.vmkit([&start[..], more].concat())
    };
    let there = "/dev/zvol/rdsk/tank/web";
    for (more, said) in [
        (&["--image", there, "--network", "vnic:net0"][..], "option vnic"),
        (&["--image", there, "--network", "none", "--backend-option", "vnic=web0"], "vnic:LINK"),
        (&["--image", there, "--network", "none", "--disk", "8GiB"], "has its size there"),
        (&["--image", "zfs:tank/img/debian@base", "--network", "none"], "/dev/zvol/rdsk/POOL/NAME"),
        (&["--image", there, "--network", "none", "--data-disk", "1GiB"], "create it on that host"),
    ] {
        let answer = create(more);
        assert_eq!(answer.code, Some(2), "{more:?}: {answer:?}");
        assert!(answer.stderr.contains(said), "{more:?}: {answer:?}");
    }
    let vnic = ["--network", "vnic:net0", "--backend-option", "vnic=web0"];
    let disks = ["--image", there, "--data-disk", "/dev/zvol/rdsk/tank/shared"];
    let answer = create(&[&disks[..], &vnic].concat());
    assert_eq!(answer.code, Some(0), "{answer:?}");
    host.must(["rm", "web"]);
}

#[test]
fn suspending_is_reported_as_unsupported() {
    let served = Served::new();
    assert_eq!(served.create("web", &["--start"]).code, Some(0));
    let answer = served.host.vmkit(["suspend", "web"]);
    assert_eq!(answer.code, Some(7), "{answer:?}");
    served.host.must(["rm", "--force", "web"]);
}

#[test]
fn the_doctor_reports_what_propolis_lacks_only_on_request() {
    let host = Host::with_refusing_qemu();
    assert!(!host.vmkit(["doctor"]).stdout.contains("propolis-server"));
    let answer = host.vmkit(["doctor", "--backend", "propolis"]);
    assert_eq!(answer.code, Some(2), "{answer:?}");
    for lacking in ["propolis-server", "zfs", "dladm", "bhyvectl", "bootrom", "vmmctl", "viona"] {
        assert!(answer.stdout.contains(lacking), "{answer:?}");
    }
    let mut command = host.command(["ls"]);
    let output = command.env("VMKIT_PROPOLIS_PFEXEC", "maybe").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("VMKIT_PROPOLIS_PFEXEC"), "{output:?}");
}

#[test]
fn a_dry_run_prints_the_request_and_changes_nothing() {
    let served = Served::new();
    let before = served.host.snapshot();
    let answer = served.create("web", &["--dry-run", "--json"]);
    assert_eq!(answer.code, Some(0), "{answer:?}");
    assert!(answer.stdout.contains("serial_port"), "{answer:?}");
    assert_eq!(served.host.snapshot(), before);
}

#[test]
fn a_vm_that_comes_after_its_start_was_killed_is_removed_with_its_record() {
    let slow = PropolisBehaviour { asks_host_millis: 3000, ..PropolisBehaviour::default() };
    let served = Served::by(FakeSetup::default().behaviour(slow));
    assert_eq!(served.create("web", &[]).code, Some(0));
    for operation in ["stop", "rm"] {
        let mut start = served.host.command(["start", "web"]);
        let mut start = start.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // The server has been asked: what tells is the VM that it asks for CPUID.
        while served.server.kernel_vms().is_empty() {
            // The fake has no event for it.
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        start.kill().unwrap();
        start.wait().unwrap();
        let answer = served.host.vmkit([operation, "web"]);
        assert_eq!(answer.code, Some(0), "{operation}: {answer:?}");
        assert!(answer.stderr.contains("may still appear"), "{operation}: {answer:?}");
        assert!(
            served.server.kernel_vms().is_empty(),
            "{operation}: it left {:?}",
            served.server.kernel_vms()
        );
    }
    assert!(!served.host.must(["ls"]).contains("web"));
}

#[test]
fn what_a_server_elsewhere_hides_is_found_by_the_request_and_no_empty_log_is_hinted_at() {
    let fails =
        PropolisBehaviour { ensure_fails: Some("no such VNIC".to_owned()), ..PropolisBehaviour::default() };
    let served = Served::by(FakeSetup::default().behaviour(fails));
    assert_eq!(served.create("web", &[]).code, Some(0));
    let answer = served.host.vmkit(["start", "web"]);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    let log = served.server.log();
    let line = log.lines().find(|line| line.contains("no such VNIC") && line.contains("req_id")).unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert!(answer.stderr.contains(line["req_id"].as_str().unwrap()), "{answer:?}\n{line}");
    assert!(!answer.stderr.contains("logs --hypervisor"), "that prints nothing: {answer:?}");
    let answer = served.host.vmkit(["logs", "--hypervisor", "web"]);
    assert_eq!(answer.code, Some(3), "{answer:?}");
    served.host.must(["rm", "web"]);

    let served = Served::by(
        FakeSetup::default()
            .behaviour(PropolisBehaviour { start_fails: true, ..PropolisBehaviour::default() }),
    );
    assert_eq!(served.create("web", &[]).code, Some(0));
    let answer = served.host.vmkit(["start", "web"]);
    assert!(answer.stderr.contains("its server reports Failed\n"), "{answer:?}");
    assert!(!answer.stderr.contains("logs --hypervisor"), "{answer:?}");
}

#[test]
fn a_vm_in_propolis_is_shown_as_what_it_is() {
    let served = Served::new();
    assert_eq!(served.create("web", &[]).code, Some(0));
    let info = served.host.must(["info", "web"]);
    let value = |key: &str| {
        let line = info.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("{info}"));
        line[key.len()..].trim_start_matches(':').trim().to_owned()
    };
    assert_eq!((value("firmware").as_str(), value("accel").as_str()), ("uefi", "bhyve"), "{info}");
    let json: serde_json::Value = serde_json::from_str(&served.host.must(["info", "web", "--json"])).unwrap();
    assert_eq!((&json["boot"]["firmware"], &json["accel"]), (&"uefi".into(), &"bhyve".into()), "{json}");
    // It has a console like any other, which is known while it runs.
    let answer = served.host.vmkit(["console", "web"]);
    assert_eq!(answer.code, Some(4), "{answer:?}");
    assert!(!answer.stderr.contains("support"), "{answer:?}");
}

#[test]
fn a_vm_whose_devices_pause_is_listed_shown_and_stopped() {
    let slow = PropolisBehaviour { pause_millis: 14_000, ..PropolisBehaviour::default() };
    let served = Served::by(FakeSetup::default().behaviour(slow));
    assert_eq!(served.create("web", &["--start"]).code, Some(0));
    assert!(served.server.power_off());
    while !served.server.is_pausing() {
        // The fake has no event for it.
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let list = served.host.must(["ls"]);
    assert!(list.contains("running") && !list.contains("unknown"), "{list}");
    assert!(served.host.must(["info", "web"]).contains("running"));
    served.host.must(["stop", "web"]);
    assert!(served.host.must(["ls"]).contains("stopped"));
    served.host.must(["rm", "web"]);
    assert!(served.server.kernel_vms().is_empty());
}

#[test]
fn an_interrupted_removal_is_reported_once() {
    let served = Served::new();
    assert_eq!(served.create("web", &["--start"]).code, Some(0));
    let proxy = FaultProxy::new(served.server.address()).unwrap();
    let address = format!("address={}", proxy.address());
    let create = ["create", "two", "--backend", "propolis", "--image", "base.img", "--network", "none"];
    served.host.must(["stop", "web", "--timeout", "0"]);
    served.host.must([&create[..], &["--backend-option", &address, "--start"]].concat());
    proxy.set(Some(NetworkFault::DropAfter(0))).unwrap();
    assert_eq!(served.host.vmkit(["rm", "--force", "two"]).code, Some(1));
    proxy.set(None).unwrap();
    assert!(served.server.power_off());
    while !served.server.kernel_vms().is_empty() {
        // The fake has no event for it.
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let list = served.host.must(["ls"]);
    let line = list.lines().find(|line| line.contains("two")).unwrap();
    assert!(line.matches("was interrupted").count() <= 1, "{line}");
    served.host.must(["rm", "--force", "two"]);
}
