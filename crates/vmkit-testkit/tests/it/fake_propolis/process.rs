//! The program: its command line, its log, and how it dies.

use std::net::TcpListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use vmkit_testkit::propolis::{
    DeathPoint, FakePropolis, FakeSetup, FaultProxy, NetworkFault, PropolisBehaviour,
};

use super::client::*;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmkit-fake-propolis");

fn process(behaviour: PropolisBehaviour) -> FakePropolis {
    FakeSetup::default().behaviour(behaviour).spawn_process(Path::new(PROGRAM)).unwrap()
}

#[test]
fn the_log_has_the_listening_address_in_bunyans_json() {
    let fake = process(PropolisBehaviour::default());
    let log = fake.log();
    let event: Value = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .find(|event: &Value| event["msg"] == "listening")
        .unwrap();
    assert_eq!(event["local_addr"], fake.address().to_string());
    assert_eq!(
        (&event["v"], &event["name"], &event["level"]),
        (&json!(0), &json!("propolis-server"), &json!(30))
    );
    run(&fake);
}

#[test]
fn without_com1_the_process_aborts() {
    let mut fake = process(PropolisBehaviour::default());
    let mut spec = spec();
    spec["components"] = json!({});
    put_last(&fake, "/instance", &ensure_body(&spec));
    assert_eq!(fake.wait().unwrap().signal(), Some(6));
    assert_eq!(fake.kernel_vms(), [ID]);
}

/// Sends a request that the server does not survive.
fn put_last(fake: &FakePropolis, path: &str, body: &Value) {
    let (head, body) = (format!("PUT {path} HTTP/1.1\r\nhost: x\r\napi-version: 5.0.0"), body.to_string());
    let request =
        format!("{head}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut stream = std::net::TcpStream::connect(fake.address()).unwrap();
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    // A reply and a closed connection are both fine; the server has the request.
    let _ = std::io::Read::read(&mut stream, &mut [0; 64]);
}

#[test]
fn a_server_dies_at_the_chosen_point_and_leaks_its_vm() {
    for death in [DeathPoint::Ensure, DeathPoint::Start, DeathPoint::Stop] {
        let mut fake = process(PropolisBehaviour { dies: Some(death), ..PropolisBehaviour::default() });
        match death {
            DeathPoint::Ensure => put_last(&fake, "/instance", &ensure_body(&spec())),
            _ => ensure_well(&fake),
        }
        match death {
            DeathPoint::Ensure => {}
            DeathPoint::Start => put_last(&fake, "/instance/state", &json!("Run")),
            DeathPoint::Stop => put_last(&fake, "/instance/state", &json!("Stop")),
        }
        assert_eq!(fake.wait().unwrap().signal(), Some(6), "{death:?}");
        assert_eq!(fake.kernel_vms(), [ID]);
    }
}

#[test]
fn a_panic_prints_three_lines_into_the_middle_of_a_line_of_the_log() {
    let behaviour = PropolisBehaviour { dies: Some(DeathPoint::Ensure), ..PropolisBehaviour::default() };
    let dir = tempfile::tempdir().unwrap();
    let bootrom = dir.path().join("OVMF_CODE.fd");
    std::fs::write(&bootrom, [0; 4096]).unwrap();
    // As vmkit's keeper starts it: one pipe for both streams.
    let (output, both) = std::io::pipe().unwrap();
    let mut child = Command::new(PROGRAM)
        .args(["run", bootrom.to_str().unwrap(), "127.0.0.1:0"])
        .current_dir(dir.path())
        .env(vmkit_testkit::propolis::BEHAVIOUR, serde_json::to_string(&behaviour).unwrap())
        .stdout(both.try_clone().unwrap())
        .stderr(both)
        .spawn()
        .unwrap();
    let mut said = std::io::BufReader::new(output);
    let mut address = None;
    while address.is_none() {
        let mut line = String::new();
        assert!(std::io::BufRead::read_line(&mut said, &mut line).unwrap() > 0);
        let event: Value = serde_json::from_str(&line).unwrap();
        address = event["local_addr"].as_str().map(|text| text.parse::<std::net::SocketAddr>().unwrap());
    }
    let body = ensure_body(&spec()).to_string();
    let head = "PUT /instance HTTP/1.1\r\nhost: x\r\napi-version: 5.0.0\r\ncontent-type: application/json";
    let request = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let mut stream = std::net::TcpStream::connect(address.unwrap()).unwrap();
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut said, &mut rest).unwrap();
    child.wait().unwrap();
    let lines: Vec<&str> = rest.lines().collect();
    let at =
        lines.iter().position(|line| line.contains("' panicked at ")).unwrap_or_else(|| panic!("{rest}"));
    assert!(lines[at].ends_with(':') && lines[at + 1] == "asked to die at ensure", "{rest}");
    assert!(lines[at + 2].starts_with("note: run with `RUST_BACKTRACE=1`"), "{rest}");
    assert!(serde_json::from_str::<Value>(lines[at - 1]).is_err(), "the half of a line: {rest}");
}

#[test]
fn a_wrong_command_line_ends_with_2_and_a_taken_address_with_1() {
    let run = |args: &[&str]| {
        let output = Command::new(PROGRAM).args(args).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for args in [&["run"][..], &["open-api"], &[], &["run", "a", "b"], &["run", "a", "127.0.0.1:0", "c"]] {
        let (code, said) = run(args);
        assert_eq!(code, Some(2), "{args:?}: {said}");
        assert!(said.contains("Usage: propolis-server run"), "{said}");
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (code, said) = run(&["run", "rom", &taken.local_addr().unwrap().to_string(), "--log-level", "error"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("failed to start server"), "{said}");
}

/// Sends a request through the proxy, and returns the whole reply, or nothing.
fn get(proxy: &FaultProxy) -> std::io::Result<String> {
    let mut stream = std::net::TcpStream::connect(proxy.address())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = "GET /instance HTTP/1.1\r\nhost: x\r\napi-version: 5.0.0\r\nconnection: close\r\n\r\n";
    std::io::Write::write_all(&mut stream, request.as_bytes())?;
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer)?;
    Ok(answer)
}

#[test]
fn a_proxy_forwards_disconnects_falsifies_and_refuses() {
    let fake = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let proxy = FaultProxy::new(fake.address()).unwrap();
    let set = |fault| proxy.set(Some(fault)).unwrap();
    assert!(get(&proxy).unwrap().starts_with("HTTP/1.1 424"));
    set(NetworkFault::DropAfter(12));
    assert_eq!(get(&proxy).unwrap(), "HTTP/1.1 424");
    set(NetworkFault::Junk(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()));
    assert_eq!(get(&proxy).unwrap(), "SSH-2.0-OpenSSH_9.2\r\n");
    set(NetworkFault::Html);
    assert!(get(&proxy).unwrap().contains("text/html"));
    set(NetworkFault::Refuse);
    assert_eq!(get(&proxy).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    proxy.set(None).unwrap();
    assert!(get(&proxy).unwrap().starts_with("HTTP/1.1 424"));
}

#[test]
fn a_stalled_connection_waits_until_it_is_cut() {
    let fake = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let proxy = FaultProxy::new(fake.address()).unwrap();
    proxy.set(Some(NetworkFault::Stall)).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| get(&proxy));
        while !fake.log().contains("\"response_code\":424") {
            std::thread::yield_now();
        }
        proxy.cut().unwrap();
        assert!(waiting.join().unwrap().map_or(true, |answer| answer.is_empty()));
    });
}

#[test]
fn a_server_that_was_started_again_has_forgotten_its_vm() {
    let first = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let second = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let proxy = FaultProxy::new(first.address()).unwrap();
    ensure_well(&first);
    assert!(get(&proxy).unwrap().starts_with("HTTP/1.1 200"));
    proxy.replace(second.address()).unwrap();
    assert!(get(&proxy).unwrap().starts_with("HTTP/1.1 424"));
}

#[test]
fn a_proxy_can_hang_up_right_after_an_upgrade() {
    let fake = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    run(&fake);
    let proxy = FaultProxy::new(fake.address()).unwrap();
    proxy.set(Some(NetworkFault::HangUpAfterUpgrade)).unwrap();
    assert!(get(&proxy).unwrap().starts_with("HTTP/1.1 200"), "what is no upgrade passes");
    let mut console = Console::open_at(proxy.address(), "?from_start=0");
    assert!(console.next().is_err());
}
