//! The console of a Propolis VM, over connections that break and readers that are slow.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use vmkit::propolis::{ConsoleEnd, ConsoleEvent, HistoryRange, SerialConsole};
use vmkit::{ErrorKind, Result};
use vmkit_testkit::propolis::{FakePropolis, FakeSetup, FaultProxy, Gate, NetworkFault, PropolisBehaviour};

/// The fake guest's first output.
const BOOT: &str = "no guest runs here\r\nlogin: ";
const MIB: usize = 1 << 20;
/// The timeout of everything that must happen, on the slowest of machines.
const PATIENCE: Duration = Duration::from_secs(60);

fn put(server: SocketAddr, path: &str, body: &Value) {
    let mut stream = std::net::TcpStream::connect(server).unwrap();
    let body = body.to_string();
    let head = "host: x\r\nconnection: close\r\ncontent-type: application/json\r\napi-version: 1.0.0";
    write!(stream, "PUT {path} HTTP/1.1\r\n{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 20"), "{answer}");
}

/// Starts a server whose guest has printed its first output.
async fn running() -> FakePropolis {
    let fake = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let nil = "00000000-0000-0000-0000-000000000000";
    let metadata = json!({
        "silo_id": nil, "project_id": nil, "sled_id": nil,
        "sled_serial": "none", "sled_revision": 0, "sled_model": "none",
    });
    let properties = json!({
        "id": "6f0cf4d5-4b8c-4d2e-9d3a-7a0f4a0c9c11", "name": "web", "description": "", "metadata": metadata,
    });
    let chipset = json!({ "type": "i440_fx", "value": { "enable_pcie": false } });
    let spec = json!({
        "board": { "cpus": 1, "memory_mb": 512, "chipset": chipset },
        "components": { "com1": { "type": "serial_port", "component": { "num": "com1" } } },
    });
    let init = json!({ "method": "Spec", "value": { "spec": spec } });
    put(fake.address(), "/instance", &json!({ "properties": properties, "init": init }));
    put(fake.address(), "/instance/state", &json!("Run"));
    // No client is at the console meanwhile, the usual case.
    read_to(&fake, BOOT.len()).await;
    fake
}

/// Waits until the server has read this much of the console. Only a client is notified of that.
async fn read_to(fake: &FakePropolis, bytes: usize) {
    let console = console_at(fake.address());
    let read = async {
        while console.history(HistoryRange::MostRecent(0)).await.unwrap().end < bytes as u64 {
            // The fake has no event for it.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, read).await.expect("the server reads what its guest says");
}

/// A client that never reads. Once the guest has printed enough it stalls the server.
fn deaf(server: SocketAddr) -> std::net::TcpStream {
    let mut stream = std::net::TcpStream::connect(server).unwrap();
    let request = "GET /instance/serial HTTP/1.1\r\nhost: x\r\napi-version: 1.0.0\r\nconnection: upgrade\r\n\
                   upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    stream.read_exact(&mut [0; 12]).unwrap();
    stream
}

fn console_at(server: SocketAddr) -> SerialConsole {
    SerialConsole::at(&format!("ws://{server}/instance/serial")).unwrap()
}

/// An attached console, and the end that a user would hold.
struct Pumped {
    ours: UnixStream,
    heard: Vec<u8>,
    carrier: JoinHandle<Result<ConsoleEnd>>,
    events: Receiver<ConsoleEvent>,
}

impl Pumped {
    fn begin(server: SocketAddr, next: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (tell, events) = channel();
        let carrier = tokio::spawn(async move {
            console_at(server).pump(next, theirs, move |event| drop(tell.send(event))).await
        });
        Self { ours, heard: Vec::new(), carrier, events }
    }

    /// Reads until this many bytes were received.
    async fn hears(&mut self, bytes: usize) {
        while self.heard.len() < bytes {
            let read = timeout(PATIENCE, self.ours.read_buf(&mut self.heard)).await;
            let tail =
                || String::from_utf8_lossy(&self.heard[self.heard.len().saturating_sub(80)..]).into_owned();
            assert!(
                read.unwrap_or_else(|_| panic!("silent after {}", tail())).unwrap() > 0,
                "ends at {}",
                tail()
            );
        }
    }

    /// Waits until it has everything that the guest has printed so far.
    async fn is_live(&mut self) {
        let heard = self.heard.len();
        self.ours.write_all(b"x").await.unwrap();
        self.hears(heard + 1).await;
        self.heard.truncate(heard);
    }

    /// Reads until it has this many bytes of the guest's, without those reported as missing: a
    /// guest may print faster than a test's server sends its history. Returns the number of the
    /// missing bytes.
    async fn hears_or_misses(&mut self, bytes: usize) -> usize {
        let mut missed = 0;
        while self.heard.len() + missed < bytes {
            self.hears(self.heard.len() + 1).await;
            missed += self.missed() as usize;
        }
        assert_eq!(self.heard.len() + missed, bytes);
        missed
    }

    /// Reads to the end of the VM, and returns everything that was received.
    async fn rest(mut self) -> String {
        let read = timeout(PATIENCE, self.ours.read_to_end(&mut self.heard)).await;
        read.expect("it ends").unwrap();
        let heard = String::from_utf8(std::mem::take(&mut self.heard)).unwrap();
        assert_eq!(self.ending().await.unwrap(), ConsoleEnd::Stopped);
        heard
    }

    async fn ending(self) -> Result<ConsoleEnd> {
        timeout(PATIENCE, self.carrier).await.unwrap().unwrap()
    }

    fn missed(&self) -> u64 {
        let missed = |event| if let ConsoleEvent::Missed { bytes } = event { bytes } else { 0 };
        self.events.try_iter().map(missed).sum()
    }
}

#[tokio::test]
async fn what_is_typed_reaches_the_guest_and_its_output_comes_back() {
    let fake = running().await;
    let mut console = Pumped::begin(fake.address(), BOOT.len() as u64);
    console.ours.write_all(b"hello\r").await.unwrap();
    console.hears(7).await;
    assert_eq!(console.heard, b"hello\r\n");
    drop(console.ours);
    assert_eq!(timeout(PATIENCE, console.carrier).await.unwrap().unwrap().unwrap(), ConsoleEnd::Left);
}

#[tokio::test]
async fn each_byte_comes_once_to_the_first_client_that_attaches() {
    let fake = running().await;
    let mut console = Pumped::begin(fake.address(), 0);
    let mut late = Pumped::begin(fake.address(), BOOT.len() as u64);
    console.hears(BOOT.len()).await;
    console.is_live().await;
    assert!(fake.print(b" and more"));
    let expected = format!("{BOOT}x and more");
    console.hears(expected.len() - 1).await;
    late.hears(10).await;
    assert_eq!(String::from_utf8_lossy(&console.heard), format!("{BOOT} and more"));
    assert_eq!(String::from_utf8_lossy(&late.heard), "x and more");
    assert_eq!(
        console_at(fake.address()).history(HistoryRange::Start(0)).await.unwrap().bytes,
        expected.as_bytes()
    );
}

#[tokio::test]
async fn output_in_the_moment_of_attaching_is_not_missed() {
    let fake = running().await;
    // Another client has the last chunk, so the server sends the new one nothing.
    let mut other = Pumped::begin(fake.address(), 0);
    other.hears(BOOT.len()).await;
    other.is_live().await;
    let asked = || fake.log().matches("/instance/serial/history").count();
    let held = fake.hold(Gate::Attach).await;
    let before = asked();
    let mut console = Pumped::begin(fake.address(), 0);
    console.hears(BOOT.len() + 1).await;
    // The history, the next chunk, and that chunk again after the attach.
    while asked() < before + 2 {
        // The fake has no event for it.
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(fake.print(b"and more"));
    read_to(&fake, BOOT.len() + 9).await;
    drop(held);
    console.hears(BOOT.len() + 9).await;
    assert_eq!(String::from_utf8_lossy(&console.heard), format!("{BOOT}xand more"));
}

#[tokio::test]
async fn a_client_that_does_not_read_doubles_nothing_for_the_others() {
    let fake = running().await;
    let mut console = Pumped::begin(fake.address(), 0);
    console.hears(BOOT.len()).await;
    let deaf = deaf(fake.address());
    let order = format!("flood {}\r", 16 * MIB);
    console.ours.write_all(order.as_bytes()).await.unwrap();
    // It reads until the server stalls.
    let all = BOOT.len() + order.len() + 1 + 16 * MIB;
    let (mut heard, mut missed, mut at) = (BOOT.len(), 0, 0);
    let (mut chunk, began) = (vec![0; 64 << 10], std::time::Instant::now());
    loop {
        match timeout(Duration::from_millis(500), console.ours.read(&mut chunk)).await {
            Ok(read) => heard += read.unwrap(),
            Err(_) => {
                missed += console.missed() as usize;
                let now = console_at(fake.address()).history(HistoryRange::MostRecent(0)).await.unwrap().end;
                if now == at && heard + missed == now as usize && heard > BOOT.len() {
                    break;
                }
                assert!(began.elapsed() < PATIENCE, "{heard} and {missed} of {now}");
                at = now;
            }
        }
    }
    assert!(at < all as u64, "the server does not stall");
    for _ in 0..5 {
        console.ours.write_all(b"k").await.unwrap();
    }
    let doubled = timeout(Duration::from_millis(500), console.ours.read(&mut chunk)).await;
    assert!(doubled.is_err(), "the guest has said nothing: {doubled:?}");
    drop(deaf);
    let (all, mut known) = (all + 5, heard + missed);
    while known < all {
        known += timeout(PATIENCE, console.ours.read(&mut chunk)).await.unwrap().unwrap();
        known += console.missed() as usize;
    }
    assert_eq!(known, all);
}

#[tokio::test]
async fn a_connection_that_breaks_again_and_again_loses_and_doubles_nothing() {
    let fake = running().await;
    let proxy = FaultProxy::new(fake.address()).unwrap();
    let mut console = Pumped::begin(proxy.address(), 0);
    console.hears(BOOT.len()).await;
    let mut expected = BOOT.as_bytes().to_vec();
    for round in 0..20 {
        let said = format!("round {round} {}\r\n", "x".repeat(5000));
        assert!(fake.print(said.as_bytes()));
        expected.extend(said.as_bytes());
        console.hears(expected.len() - round * 200).await;
        proxy.cut().unwrap();
    }
    console.hears(expected.len()).await;
    assert!(console.heard == expected, "something was lost or doubled");
    assert_eq!(console.missed(), 0);
}

#[tokio::test]
async fn a_slow_reader_stalls_no_other_and_is_notified_of_what_it_missed() {
    let fake = running().await;
    let mut slow = Pumped::begin(fake.address(), 0);
    let mut quick = Pumped::begin(fake.address(), 0);
    quick.hears(BOOT.len()).await;
    let order = format!("flood {}\r", 4 * MIB);
    quick.ours.write_all(order.as_bytes()).await.unwrap();
    let all = BOOT.len() + order.len() + 1 + 4 * MIB;
    quick.hears_or_misses(all).await;

    // It finally reads: the bytes received and those reported as missing add up to all.
    let missed = slow.hears_or_misses(all).await;
    assert!(missed > 0 && slow.heard.len() > MIB, "{missed}, {}", slow.heard.len());
    assert!(quick.heard.ends_with(&slow.heard[slow.heard.len() - MIB / 2..]));
}

#[tokio::test]
async fn the_end_of_the_vm_is_the_end_of_the_console_and_all_is_handed_over_before() {
    let fake = running().await;
    let mut console = Pumped::begin(fake.address(), 0);
    console.hears(BOOT.len()).await;
    console.is_live().await;
    assert!(fake.print(b"last words"));
    // What the port still holds when the VM stops is lost.
    read_to(&fake, BOOT.len() + 11).await;
    put(fake.address(), "/instance/state", &json!("Stop"));
    console.hears(BOOT.len() + 10).await;
    assert!(console.heard.ends_with(b"last words"));
    assert_eq!(console.ending().await.unwrap(), ConsoleEnd::Stopped);
}

#[tokio::test]
async fn the_last_output_of_a_guest_that_powers_off_or_panics_is_delivered() {
    for (order, last) in
        [("poweroff", "reboot: Power down\r\n"), ("panic", "Kernel panic - not syncing: asked for\r\n")]
    {
        let fake = running().await;
        let mut console = Pumped::begin(fake.address(), 0);
        console.hears(BOOT.len()).await;
        let held = fake.hold(Gate::Event).await;
        console.ours.write_all(format!("{order}\r").as_bytes()).await.unwrap();
        let said = format!("{BOOT}{order}\r\n{last}");
        read_to(&fake, said.len()).await;
        if order == "panic" {
            put(fake.address(), "/instance/state", &json!("Stop"));
        }
        drop(held);
        assert_eq!(console.rest().await, said);
    }
}

#[tokio::test]
async fn no_output_is_doubled_when_a_guest_ends_in_the_middle_of_it() {
    for _ in 0..10 {
        let fake = running().await;
        let mut console = Pumped::begin(fake.address(), 0);
        console.hears(BOOT.len()).await;
        console.ours.write_all(b"poweroff\r").await.unwrap();
        let all = format!("{BOOT}poweroff\r\nreboot: Power down\r\n");
        let heard = console.rest().await;
        assert!(all.starts_with(&heard), "{heard:?}");
    }
}

#[tokio::test]
async fn a_guest_that_prints_a_little_at_a_time_is_not_asked_for_each_byte() {
    let fake = running().await;
    let mut console = Pumped::begin(fake.address(), 0);
    console.hears(BOOT.len()).await;
    let asked = || fake.log().matches("/instance/serial/history").count();
    let before = asked();
    let pieces = 2000;
    for piece in 0..pieces {
        assert!(fake.print(b"."));
        if piece % 10 == 0 {
            tokio::task::yield_now().await;
        }
    }
    console.hears(BOOT.len() + pieces).await;
    assert!(asked() - before < pieces / 2, "{} requests", asked() - before);
}

#[tokio::test]
async fn a_vm_that_moves_is_followed() {
    let (here, there) = (running().await, running().await);
    let mut console = Pumped::begin(here.address(), 0);
    console.hears(BOOT.len()).await;
    console.is_live().await;
    // It continues where it was: after the byte that only the first one has printed.
    assert!(there.print(b"xI am there"));
    assert!(here.say_migrating(there.address()));
    console.hears(BOOT.len() + 10).await;
    assert_eq!(String::from_utf8_lossy(&console.heard), format!("{BOOT}I am there"));
    let events: Vec<ConsoleEvent> = console.events.try_iter().collect();
    assert_eq!(events, [ConsoleEvent::Moved { server: there.address() }, ConsoleEvent::Restored]);
}

#[tokio::test]
async fn a_vm_that_has_not_come_yet_to_where_it_moves_is_waited_for() {
    let (here, later) = (running().await, running().await);
    let empty = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let there = FaultProxy::new(empty.address()).unwrap();
    let mut console = Pumped::begin(here.address(), 0);
    console.hears(BOOT.len()).await;
    console.is_live().await;
    assert!(later.print(b"xI am there"));
    assert!(here.say_migrating(there.address()));
    let denials = async {
        while empty.log().matches(r#""response_code":424"#).count() < 2 {
            // The fake has no event for it.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, denials).await.expect("it is asked, and asked again");
    there.replace(later.address()).unwrap();
    console.hears(BOOT.len() + 10).await;
    assert_eq!(String::from_utf8_lossy(&console.heard), format!("{BOOT}I am there"));
}

#[tokio::test]
async fn a_server_that_has_forgotten_its_vm_ends_the_console() {
    let (before, after) = (running().await, FakePropolis::spawn(PropolisBehaviour::default()).unwrap());
    let proxy = FaultProxy::new(before.address()).unwrap();
    let mut console = Pumped::begin(proxy.address(), 0);
    console.hears(BOOT.len()).await;
    proxy.replace(after.address()).unwrap();
    assert_eq!(console.ending().await.unwrap(), ConsoleEnd::Stopped);
}

#[tokio::test]
async fn a_server_that_hangs_up_after_every_upgrade_is_not_retried_forever() {
    let fake = running().await;
    let proxy = FaultProxy::new(fake.address()).unwrap();
    proxy.set(Some(NetworkFault::HangUpAfterUpgrade)).unwrap();
    let error = Pumped::begin(proxy.address(), 0).ending().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Hypervisor);
    assert!(error.to_string().contains("closes it"), "{error}");
}

#[tokio::test]
async fn without_an_active_vm_there_is_no_console() {
    let fake = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let error = Pumped::begin(fake.address(), 0).ending().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}");
    let error = console_at(fake.address()).history(HistoryRange::Start(0)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}");
}

#[tokio::test]
async fn a_server_too_old_for_the_console_is_called_so() {
    let old = FakeSetup::default().latest_version("0.9.0").spawn().unwrap();
    let error = Pumped::begin(old.address(), 0).ending().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Hypervisor);
    assert!(error.to_string().contains("too old") && error.to_string().contains("1.0.0"), "{error}");
    let error = console_at(old.address()).history(HistoryRange::Start(0)).await.unwrap_err();
    assert!(error.to_string().contains("too old"), "{error}");
}

#[tokio::test]
async fn an_address_that_refuses_is_distinguished_from_one_with_another_protocol() {
    let fake = running().await;
    let proxy = FaultProxy::new(fake.address()).unwrap();
    for (fault, text) in [
        (NetworkFault::Refuse, "nothing listens"),
        (NetworkFault::Html, "not a Propolis server"),
        (NetworkFault::Junk(b"SSH-2.0-OpenSSH\r\n".to_vec()), "not a Propolis server"),
    ] {
        proxy.set(Some(fault)).unwrap();
        let error = Pumped::begin(proxy.address(), 0).ending().await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(error.kind(), ErrorKind::Hypervisor);
    }
}

#[tokio::test]
async fn the_past_has_the_first_and_the_last_mebibyte_and_names_what_is_missing() {
    let fake = running().await;
    let past = console_at(fake.address()).history(HistoryRange::MostRecent(7)).await.unwrap();
    assert_eq!((past.bytes.as_slice(), past.end, past.missed), (&b"login: "[..], BOOT.len() as u64, 0));
    let mut console = Pumped::begin(fake.address(), 0);
    let order = format!("flood {}\r", 3 * MIB);
    console.ours.write_all(order.as_bytes()).await.unwrap();
    let all = BOOT.len() + order.len() + 1 + 3 * MIB;
    console.hears_or_misses(all).await;
    let past = console_at(fake.address()).history(HistoryRange::Start(0)).await.unwrap();
    assert_eq!((past.end, past.bytes.len() as u64 + past.missed), (all as u64, all as u64));
    assert_eq!(past.bytes[..MIB], console.heard[..MIB]);
    assert_eq!(past.bytes[past.bytes.len() - MIB..], console.heard[console.heard.len() - MIB..]);
}
