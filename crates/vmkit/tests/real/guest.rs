//! What reaches into a guest and what it reaches: forwards, the agent, the console, the monitor,
//! the screen.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use des::Des;
use des::cipher::{BlockCipherEncrypt, KeyInit};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufStream};
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::time::timeout;
use vmkit::network::MacAddr;
use vmkit::qemu::{GuestAgent, ShutdownMode};
use vmkit::spec::{MachineType, NetworkConfig, Protocol, UserNetwork, VmSpecBuilder, Vnc};
use vmkit::{
    ErrorKind, GuestExitStatus, Hypervisor, PortForwarding, QemuHypervisor, VmHandle, VmState, VncAddress,
};
use vmkit_testkit::guest;

use crate::harness::{self, LONG, Place, agent, booted, console, echoes, run, started, until};

fn tiny(name: &str) -> VmSpecBuilder {
    guest::tiny().spec(name, MachineType::Q35, "")
}

fn forwarding(name: &str, forwards: &[&str], restrict: bool) -> VmSpecBuilder {
    let forwards = forwards.iter().map(|text| text.parse().unwrap()).collect();
    tiny(name).network(NetworkConfig::User(UserNetwork { forwards, restrict }))
}

/// Returns where the host listens for this port of the guest's.
fn forward_to(vm: &VmHandle, protocol: Protocol, guest_port: u16) -> SocketAddr {
    let forwards = &run(vm).forwards;
    let found = forwards.iter().find(|it| it.protocol == protocol && it.guest_port.get() == guest_port);
    found.unwrap_or_else(|| panic!("no forward to {guest_port}: {forwards:?}")).host.into()
}

/// Returns whether the guest's datagram service on port 7 sends back what it gets there.
async fn echoes_datagrams(addr: SocketAddr) -> bool {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let heard = async || {
        socket.send_to(b"datagram", addr).await.ok()?;
        let mut buffer = [0; 64];
        let (bytes, _) = timeout(Duration::from_secs(1), socket.recv_from(&mut buffer)).await.ok()?.ok()?;
        (&buffer[..bytes] == b"datagram").then_some(())
    };
    until(Duration::from_secs(20), heard).await.is_some()
}

#[tokio::test(flavor = "current_thread")]
async fn the_ports_of_two_guests_do_not_meet_and_lead_each_into_its_own() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let one = started(&qemu, &forwarding("one", &["7", "7/udp"], false).build().unwrap()).await;
    let two = booted(&qemu, &forwarding("two", &["7", "7/udp"], false).build().unwrap()).await;
    harness::console_says(&one, "vmkit-guest: ready").await;
    let mut ports = Vec::new();
    for vm in [&one, &two] {
        harness::console_says(vm, "eth0 has 10.0.2.15").await;
        assert_eq!(qemu.guest_ip(vm).await.unwrap(), "127.0.0.1");
        let (tcp, udp) = (forward_to(vm, Protocol::Tcp, 7), forward_to(vm, Protocol::Udp, 7));
        assert!(tcp.ip().is_loopback() && udp.ip().is_loopback());
        assert!(echoes(tcp).await, "{}: no echo by TCP", vm.name());
        assert!(echoes_datagrams(udp).await, "{}: no echo by UDP", vm.name());
        // Who starts what runs already learns the same ports.
        assert_eq!(run(&qemu.start(vm).await.unwrap()), run(vm));
        ports.push(tcp.port());
    }
    assert_ne!(ports[0], ports[1]);
    qemu.destroy(one).await.unwrap();
    let tcp = forward_to(&two, Protocol::Tcp, 7);
    assert!(echoes(tcp).await, "the other one's end does not matter");
    qemu.destroy(two).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_named_host_port_that_is_in_use_is_refused_by_its_number() {
    let place = Place::new();
    let qemu = place.hypervisor();
    // Below the ports that the kernel hands out, so that no other test gets it in between.
    let mut free = (20_000..30_000).filter_map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok());
    let taken = free.next().expect("a free port");
    let port = taken.local_addr().unwrap().port();
    let spec = forwarding("named", &[&format!("{port}:7")], false).build().unwrap();
    let says_so = |error: vmkit::Error| {
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(&format!("the host's port {port} is in use")), "{error}");
    };
    says_so(qemu.prepare(&spec).await.unwrap_err());
    assert_eq!(place.leftovers(), Vec::<String>::new());

    drop(taken);
    let vm = qemu.prepare(&spec).await.unwrap();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    says_so(qemu.start(&vm).await.unwrap_err());
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Prepared);
    drop(taken);
    let vm = qemu.start(&vm).await.unwrap();
    assert_eq!(forward_to(&vm, Protocol::Tcp, 7).port(), port);
    qemu.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_forward_that_comes_while_the_guest_runs_leads_into_it_and_is_gone_when_taken_away() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = booted(&qemu, &forwarding("late", &[], false).build().unwrap()).await;
    harness::console_says(&vm, "eth0 has 10.0.2.15").await;
    let (tcp, udp) = ("7".parse().unwrap(), "7/udp".parse().unwrap());
    let once = qemu.add_forward(&vm, &tcp).await.unwrap();
    let vm = qemu.add_forward(&once, &udp).await.unwrap();
    assert_eq!(run(&vm).forwards.len(), 2, "{:?}", run(&vm).forwards);
    let again = qemu.add_forward(&vm, &tcp).await.unwrap();
    assert_eq!(run(&again), run(&vm));
    let host = forward_to(&vm, Protocol::Tcp, 7);
    assert!(echoes(host).await, "no echo by TCP");
    assert!(echoes_datagrams(forward_to(&vm, Protocol::Udp, 7)).await, "no echo by UDP");

    let same = format!("{}:9", host.port()).parse().unwrap();
    let error = qemu.add_forward(&vm, &same).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    let pid = run(&vm).pid.unwrap();
    let expected = format!("the host's port {} is in use by the VM `late` (process {pid})", host.port());
    assert!(error.to_string().contains(&expected), "{error}");

    qemu.suspend(&vm).await.unwrap();
    let vm = qemu.remove_forward(&vm, &tcp).await.unwrap();
    assert_eq!(run(&qemu.remove_forward(&vm, &tcp).await.unwrap()), run(&vm));
    assert_eq!(run(&vm).forwards.iter().map(|it| it.protocol).collect::<Vec<_>>(), [Protocol::Udp]);
    assert!(TcpStream::connect(host).await.is_err(), "somebody listens still");
    let vm = qemu.stop(&vm, Duration::ZERO).await.unwrap();
    let error = qemu.add_forward(&vm, &tcp).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}");
    qemu.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_restricted_guest_does_not_reach_the_host_but_is_reached_by_its_forwards() {
    let place = Place::new();
    let qemu = place.hypervisor();
    for restrict in [false, true] {
        let host = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = host.local_addr().unwrap().port().to_string();
        let vm = booted(&qemu, &forwarding("kept", &["7"], restrict).build().unwrap()).await;
        harness::console_says(&vm, "eth0 has 10.0.2.15").await;
        let mut guest = agent(&vm).await;
        // 10.0.2.2 is the host's loopback, as the guest sees it.
        let call = ["-w", "3", "10.0.2.2", &port, "-e", "/bin/true"];
        let called = guest.exec("nc", &call, None, LONG).await.unwrap();
        let answered = timeout(Duration::from_millis(500), host.accept()).await.is_ok();
        assert_eq!(answered, !restrict, "restrict {restrict}: {called:?}");
        assert!(echoes(forward_to(&vm, Protocol::Tcp, 7)).await, "restrict {restrict}");
        qemu.destroy(vm).await.unwrap();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn the_agent_reports_addresses_runs_programs_and_shuts_the_guest_down() {
    let place = Place::new();
    let qemu = place.hypervisor();
    for machine in [MachineType::Q35, MachineType::Microvm] {
        let vm = booted(&qemu, &guest::tiny().spec("agent", machine, "").build().unwrap()).await;
        agent_works(&qemu, vm).await;
    }
}

async fn agent_works(qemu: &QemuHypervisor, vm: VmHandle) {
    harness::console_says(&vm, "eth0 has 10.0.2.15").await;
    let mut guest = agent(&vm).await;
    guest.ping(LONG).await.unwrap();
    let seen = guest.interfaces(LONG).await.unwrap();
    let eth0 = seen.iter().find(|interface| interface.name == "eth0").unwrap();
    assert_eq!(eth0.mac, Some(MacAddr::of_vm(vm.id).to_string()));
    assert!(eth0.addrs.contains(&Ipv4Addr::new(10, 0, 2, 15).into()), "{eth0:?}");

    let script = ["-c", "cat; echo aside >&2; exit 3"];
    let output = guest.exec("sh", &script, Some(b"\x00through\xff"), LONG).await.unwrap();
    assert_eq!(output.exit, GuestExitStatus::Code(3));
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"\x00through\xff"[..], &b"aside\n"[..]));
    let output = guest.exec("sh", &["-c", "kill -9 $$"], None, LONG).await.unwrap();
    assert_eq!(output.exit, GuestExitStatus::Signal("KILL".into()));
    let error = guest.exec("/no/such/program", &[""; 0], None, LONG).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Guest, "{error}");
    assert!(error.to_string().contains("guest-exec"), "{error}");

    // A program that outlives the caller's patience does not spoil the next call.
    let soon = Duration::from_millis(300);
    let error = guest.exec("sleep", &["60"], None, soon).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    guest.ping(LONG).await.unwrap();

    guest.shutdown(ShutdownMode::PowerDown, LONG).await.unwrap();
    harness::gone(harness::pid(&vm)).await;
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Stopped);
    assert!(harness::console_text(&vm).contains("guest agent asks for shutdown -P"));
    let old = run(&vm).agent.clone().unwrap();
    let error = GuestAgent::connect(&old, LONG).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    qemu.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_boots_again_is_the_same_running_vm() {
    let place = Place::new();
    let qemu = place.hypervisor();
    // Not on microvm: of a few resets there one hangs under TCG, after the kernel's last words
    // (seen with 7.2.22).
    let vm = booted(&qemu, &tiny("again").build().unwrap()).await;
    // This guest may be down before its agent says another word, which then never comes.
    let soon = Duration::from_secs(5);
    let told = agent(&vm).await.shutdown(ShutdownMode::Reboot, soon).await;
    assert!(told.as_ref().is_err_and(|it| it.kind() == ErrorKind::TimedOut) || told.is_ok(), "{told:?}");
    let twice =
        async || (harness::console_text(&vm).matches("vmkit-guest: ready").count() == 2).then_some(());
    assert!(until(LONG, twice).await.is_some(), "{}", harness::console_text(&vm));
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running);
    assert_eq!(run(&qemu.start(&vm).await.unwrap()), run(&vm));
    agent(&vm).await.ping(LONG).await.unwrap();
    qemu.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn a_person_s_monitor_sees_what_vmkit_does_at_the_same_time() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = started(&qemu, &tiny("watched").build().unwrap()).await;
    let monitor = UnixStream::connect(run(&vm).monitor.as_ref().unwrap()).await.unwrap();
    let mut monitor = BufStream::new(monitor);
    assert!(line(&mut monitor).await.contains("\"QMP\""));
    monitor.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").await.unwrap();
    monitor.flush().await.unwrap();
    assert!(line(&mut monitor).await.contains("return"));
    qemu.suspend(&vm).await.unwrap();
    assert!(line(&mut monitor).await.contains("\"STOP\""));
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Suspended);
    monitor.write_all(b"{\"execute\":\"cont\"}\n").await.unwrap();
    monitor.flush().await.unwrap();
    assert!(line(&mut monitor).await.contains("\"RESUME\""));
    assert_eq!(qemu.state(&vm).await.unwrap(), VmState::Running, "vmkit sees what the person did");
    qemu.destroy(vm).await.unwrap();
}

async fn line(stream: &mut BufStream<UnixStream>) -> String {
    let mut line = String::new();
    timeout(LONG, stream.read_line(&mut line)).await.expect("a line in time").unwrap();
    line
}

#[tokio::test(flavor = "current_thread")]
async fn a_command_typed_at_the_console_is_carried_out() {
    let place = Place::new();
    let qemu = place.hypervisor();
    for machine in [MachineType::Q35, MachineType::Microvm] {
        let spec = guest::tiny().spec("typed", machine, "").build().unwrap();
        let vm = booted(&qemu, &spec).await;
        let mut console = console(&qemu, &vm).await;
        console.write_all(b"echo $((6 * 7)) is the answer\n").await.unwrap();
        let mut heard = Vec::new();
        let answer = async {
            while !String::from_utf8_lossy(&heard).contains("42 is the answer") {
                assert_ne!(console.read_buf(&mut heard).await.unwrap(), 0, "the console was closed");
            }
        };
        let answered = timeout(LONG, answer).await;
        assert!(answered.is_ok(), "{machine:?}: {}", String::from_utf8_lossy(&heard));
        // What a person saw is in the log, too.
        harness::console_says(&vm, "42 is the answer").await;
        drop(console);
        let vm = qemu.stop(&vm, LONG).await.unwrap();
        assert!(harness::console_text(&vm).contains("powering off: power button"), "{machine:?}");
        qemu.destroy(vm).await.unwrap();
    }
}

#[tokio::test(flavor = "current_thread")]
async fn the_screen_is_on_a_unix_socket_or_not_at_all() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let vm = started(&qemu, &tiny("screen").build().unwrap()).await;
    let Some(VncAddress::Unix(path)) = &run(&vm).vnc else { panic!("{:?}", run(&vm).vnc) };
    let types = vnc_security_types(&mut UnixStream::connect(path).await.unwrap()).await;
    assert_eq!(types, [1], "the socket's owner needs no password");
    qemu.destroy(vm).await.unwrap();
    let vm = started(&qemu, &tiny("none").vnc(Vnc::Off).build().unwrap()).await;
    assert_eq!(run(&vm).vnc, None);
    qemu.destroy(vm).await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn the_screen_on_loopback_opens_to_its_password_alone() {
    let place = Place::new();
    let qemu = place.hypervisor();
    let one = started(&qemu, &tiny("one").vnc(Vnc::Loopback).build().unwrap()).await;
    let two = started(&qemu, &tiny("two").vnc(Vnc::Loopback).build().unwrap()).await;
    let (addr, file) = vnc_on_loopback(&one);
    let (other_addr, other_file) = vnc_on_loopback(&two);
    let (password, other) = (std::fs::read(file).unwrap(), std::fs::read(other_file).unwrap());
    assert_ne!(addr, other_addr);
    assert_ne!(password, other);
    assert_eq!(password.len(), 8);
    assert_eq!(std::fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(vnc_opens(addr, &password).await);
    assert!(vnc_opens(other_addr, &other).await);
    assert!(!vnc_opens(addr, &other).await, "another VM's password");
    assert!(!vnc_opens(addr, b"").await, "no password");

    // A start of a running VM returns the same address, and the password stays.
    assert_eq!(run(&qemu.start(&one).await.unwrap()), run(&one));
    assert!(vnc_opens(addr, &password).await);
    let file = file.to_owned();
    qemu.destroy(one).await.unwrap();
    assert!(!file.exists());
    qemu.destroy(two).await.unwrap();
}

fn vnc_on_loopback(vm: &VmHandle) -> (SocketAddr, &Path) {
    match &run(vm).vnc {
        Some(VncAddress::Tcp { addr, password_file }) if addr.ip().is_loopback() => {
            ((*addr).into(), password_file)
        }
        other => panic!("not on loopback: {other:?}"),
    }
}

/// Greets a VNC server and returns the kinds of security that it offers. Source: RFC 6143, 7.1.
async fn vnc_security_types(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> Vec<u8> {
    let mut greeting = [0; 12];
    timeout(LONG, stream.read_exact(&mut greeting)).await.expect("a greeting in time").unwrap();
    assert_eq!(&greeting, b"RFB 003.008\n");
    stream.write_all(&greeting).await.unwrap();
    let mut types = vec![0; usize::from(stream.read_u8().await.unwrap())];
    stream.read_exact(&mut types).await.unwrap();
    types
}

/// Returns whether a screen opens to this password. Source: RFC 6143, 7.2.2.
async fn vnc_opens(addr: SocketAddr, password: &[u8]) -> bool {
    const VNC_AUTHENTICATION: u8 = 2;
    let mut stream = TcpStream::connect(addr).await.unwrap();
    assert_eq!(vnc_security_types(&mut stream).await, [VNC_AUTHENTICATION], "never without a password");
    stream.write_all(&[VNC_AUTHENTICATION]).await.unwrap();
    let mut challenge = [0; 16];
    stream.read_exact(&mut challenge).await.unwrap();
    let mut key = [0; 8];
    for (byte, letter) in key.iter_mut().zip(password) {
        // VNC hands DES its key with the bits of each byte the other way round.
        *byte = letter.reverse_bits();
    }
    let cipher = Des::new(&key.into());
    for block in challenge.chunks_exact_mut(8) {
        cipher.encrypt_block(block.try_into().unwrap());
    }
    stream.write_all(&challenge).await.unwrap();
    stream.read_u32().await.unwrap() == 0
}
