//! Tap networking for real: guests on a bridge with dnsmasq, in a network of the test's own.
//!
//! Each test runs itself once more in new network, mount and process namespaces. With that process
//! everything in them ends, however it ends: guests, dnsmasq, bridge and taps.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use vmkit::network::MacAddr;
use vmkit::spec::{BridgeName, MachineType, NetworkConfig, VmSpec};
use vmkit::{ErrorKind, Hypervisor, QemuHypervisor, VmHandle, VmState};
use vmkit_testkit::guest;

use crate::harness::{
    self, LONG, Place, agent, booted, builder, echoes, gone, in_own_namespaces, keeper_pid, pid, started,
    until,
};

const BRIDGE: &str = "br0";

/// Runs `ip` and returns what it prints.
fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split(' ')).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A bridge with an address, and a dnsmasq that gives the guests theirs.
struct Bridge {
    dnsmasq: Child,
    leases: PathBuf,
}

impl Bridge {
    fn new(place: &Place) -> Self {
        ip(&format!("link add {BRIDGE} type bridge"));
        ip(&format!("address add 192.0.2.1/24 dev {BRIDGE}"));
        ip(&format!("link set {BRIDGE} up"));
        ip("link set lo up");
        let leases = place.path().join("test.leases");
        let log = fs::File::create(place.path().join("dnsmasq.log")).unwrap();
        // Nothing of the host's: no configuration, no DNS, no file outside the test's directory.
        let dnsmasq = Command::new("dnsmasq")
            .args(["--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root", "--no-ping"])
            .args([&format!("--interface={BRIDGE}"), "--except-interface=lo", "--bind-interfaces"])
            .args(["--dhcp-range=192.0.2.10,192.0.2.99,1h", "--dhcp-authoritative", "--log-facility=-"])
            .arg(format!("--dhcp-leasefile={}", leases.display()))
            .arg(format!("--pid-file={}", place.path().join("dnsmasq.pid").display()))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("dnsmasq is installed");
        Self { dnsmasq, leases }
    }

    /// Returns the address that dnsmasq wrote down for a guest, once it has.
    async fn lease_of(&self, vm: &VmHandle) -> Ipv4Addr {
        let mac = MacAddr::of_vm(vm.id).to_string();
        let lease = async || {
            let text = fs::read_to_string(&self.leases).ok()?;
            let line = text.lines().find(|line| line.contains(&mac))?;
            line.split(' ').nth(2)?.parse().ok()
        };
        until(LONG, lease).await.unwrap_or_else(|| panic!("no lease: {}", harness::console_text(vm)))
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = self.dnsmasq.kill();
        let _ = self.dnsmasq.wait();
    }
}

fn on_bridge(name: &str, bridge: &str) -> VmSpec {
    let network = NetworkConfig::Tap { bridge: BridgeName::new(bridge).unwrap() };
    guest::tiny().spec(name, MachineType::Q35, "").network(network).build().unwrap()
}

fn tap_of(vm: &VmHandle) -> String {
    format!("vmk{}", harness::short_id(vm))
}

/// Returns the hypervisor with this file of leases alone.
fn with_leases(place: &Place, leases: &Path) -> QemuHypervisor {
    builder(place.path()).lease_files(vec![leases.to_owned()]).build()
}

fn echo_port(addr: Ipv4Addr) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(addr), 7)
}

#[test]
fn a_guest_on_a_bridge_is_found_by_its_agent_the_neighbour_table_and_its_lease() {
    in_own_namespaces(async || {
        let place = Place::new();
        let bridge = Bridge::new(&place);
        let (deaf, qemu) = (with_leases(&place, Path::new("/none")), with_leases(&place, &bridge.leases));
        let vm = booted(&deaf, &on_bridge("found", BRIDGE)).await;
        let lease = bridge.lease_of(&vm).await;
        harness::console_says(&vm, &format!("eth0 has {lease}")).await;
        let mut guest = agent(&vm).await;
        let mac = MacAddr::of_vm(vm.id).to_string();
        let seen = guest.interfaces(LONG).await.unwrap();
        let eth0 = seen.iter().find(|interface| interface.name == "eth0").unwrap();
        assert_eq!(eth0.mac.as_deref(), Some(mac.as_str()));

        // While this client holds the agent's channel, no other gets a reply there.
        ip(&format!("neighbour flush dev {BRIDGE}"));
        assert_eq!(deaf.guest_ip(&vm).await.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(qemu.guest_ip(&vm).await.unwrap(), lease.to_string(), "by its lease");
        assert!(echoes(echo_port(lease)).await);
        assert_eq!(deaf.guest_ip(&vm).await.unwrap(), lease.to_string(), "by the neighbour table");
        drop(guest);
        ip(&format!("neighbour flush dev {BRIDGE}"));
        let told = until(LONG, async || deaf.guest_ip(&vm).await.ok()).await;
        assert_eq!(told, Some(lease.to_string()), "by its agent");

        let vm = qemu.stop(&vm, LONG).await.unwrap();
        assert!(harness::console_text(&vm).contains("powering off: power button"));
        assert_eq!(qemu.guest_ip(&vm).await.unwrap_err().kind(), ErrorKind::InvalidState);
        qemu.destroy(vm).await.unwrap();
        assert_eq!(place.leftovers(), Vec::<String>::new());
    });
}

#[test]
fn two_guests_on_one_bridge_have_their_own_addresses_and_both_reply() {
    in_own_namespaces(async || {
        let place = Place::new();
        let bridge = Bridge::new(&place);
        let qemu = with_leases(&place, &bridge.leases);
        let one = started(&qemu, &on_bridge("one", BRIDGE)).await;
        let two = booted(&qemu, &on_bridge("two", BRIDGE)).await;
        assert_ne!(MacAddr::of_vm(one.id), MacAddr::of_vm(two.id));
        let (first, second) = (bridge.lease_of(&one).await, bridge.lease_of(&two).await);
        assert_ne!(first, second);
        for (vm, lease) in [(one, first), (two, second)] {
            harness::console_says(&vm, &format!("eth0 has {lease}")).await;
            assert!(echoes(echo_port(lease)).await, "{}", vm.name());
            assert_eq!(qemu.guest_ip(&vm).await.unwrap(), lease.to_string(), "{}", vm.name());
            qemu.destroy(vm).await.unwrap();
        }
    });
}

#[test]
fn a_tap_is_gone_when_its_vm_is_however_that_ended() {
    in_own_namespaces(async || {
        let place = Place::new();
        let _bridge = Bridge::new(&place);
        let qemu = place.hypervisor();
        let mut vm = started(&qemu, &on_bridge("short", BRIDGE)).await;
        let tap = tap_of(&vm);
        let there = || ip("-o link show").contains(&tap);
        assert!(ip(&format!("link show {tap}")).contains(&format!("master {BRIDGE}")));
        vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
        assert!(!there(), "after stop");

        vm = qemu.start(&vm).await.unwrap();
        assert!(there());
        let process = pid(&vm);
        rustix::process::kill_process(process, Signal::KILL).unwrap();
        gone(process).await;
        let state = harness::state_becomes(&qemu, &vm, |state| *state != VmState::Running).await;
        assert_eq!(state.name(), "failed");
        let vanished = until(LONG, async || (!there()).then_some(())).await;
        assert!(vanished.is_some(), "after QEMU was killed");

        vm = qemu.start(&vm).await.unwrap();
        let process = pid(&vm);
        let keeper = keeper_pid(process);
        rustix::process::kill_process(keeper, Signal::KILL).unwrap();
        gone(keeper).await;
        assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running, "QEMU outlives its keeper");
        assert!(there(), "the tap is QEMU's");
        vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
        assert!(!there(), "after a stop without a keeper");

        vm = qemu.start(&vm).await.unwrap();
        assert!(there());
        qemu.destroy(vm).await.unwrap();
        assert!(!there(), "after destroy");
        assert!(ip(&format!("link show {BRIDGE}")).contains(BRIDGE), "the bridge is the user's");
    });
}

#[test]
fn a_bridge_that_is_not_there_or_is_none_is_refused_by_name_and_leaves_nothing() {
    in_own_namespaces(async || {
        let place = Place::new();
        let _bridge = Bridge::new(&place);
        let qemu = place.hypervisor();
        let nothing = Vec::<String>::new();
        for (bridge, why) in [("br7", "no such network interface"), ("lo", "not a bridge")] {
            let error = qemu.prepare(&on_bridge("refused", bridge)).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
            let text = error.to_string();
            assert!(text.contains("network.bridge") && text.contains(bridge) && text.contains(why), "{text}");
            assert_eq!(place.leftovers(), nothing);
        }
        // The bridge of a prepared VM may go away before it starts.
        let vm = qemu.prepare(&on_bridge("late", BRIDGE)).await.unwrap();
        ip(&format!("link delete {BRIDGE}"));
        let error = qemu.start(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(BRIDGE), "{error}");
        assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Prepared);
        qemu.destroy(vm).await.unwrap();
        assert_eq!(place.leftovers(), nothing);
    });
}

#[test]
fn for_a_user_without_permission_for_taps_the_error_names_what_is_lacking() {
    in_own_namespaces(async || {
        let place = Place::new();
        let _bridge = Bridge::new(&place);
        let qemu = place.hypervisor();
        let vm = qemu.prepare(&on_bridge("poor", BRIDGE)).await.unwrap();
        let all = rustix::thread::capabilities(None).unwrap();
        let mut poor = all;
        poor.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, poor).unwrap();
        let error = qemu.start(&vm).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Host, "{error}");
        let text = error.to_string();
        assert!(text.contains("/dev/net/tun") && text.contains("CAP_NET_ADMIN"), "{text}");
        assert!(!place.run_dir(&vm).exists(), "nothing is left of the start");
        assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Prepared);
        rustix::thread::set_capabilities(None, all).unwrap();
        let vm = qemu.start(&vm).await.unwrap();
        qemu.destroy(vm).await.unwrap();
    });
}
