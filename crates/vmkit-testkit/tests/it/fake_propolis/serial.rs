//! The serial port: history, several clients, and the end.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{Error, Message};
use vmkit_testkit::propolis::{FakePropolis, Gate, PropolisBehaviour};

use super::client::*;

const BOOT: &str = "no guest runs here\r\nlogin: ";
const MIB: usize = 1024 * 1024;

fn running() -> FakePropolis {
    let fake = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    run(&fake);
    fake
}

fn history(fake: &FakePropolis, query: &str) -> Answer {
    ask(fake, "GET", &format!("/instance/serial/history?{query}"), None)
}

fn text(answer: &Answer) -> String {
    let bytes: Vec<u8> = serde_json::from_value(answer.json()["data"].clone()).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// Waits until the port has been read this far. Only a client is notified of that, and here is
/// none.
fn read_to(fake: &FakePropolis, bytes: usize) {
    let began = Instant::now();
    while history(fake, "most_recent=0").json()["last_byte_offset"] != json!(bytes) {
        assert!(began.elapsed() < PATIENCE, "the port was read to another place than {bytes}");
        // The fake has no event for it.
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn history_comes_first_then_its_last_chunk_again_and_then_new_output() {
    let fake = running();
    read_to(&fake, BOOT.len());
    let mut console = Console::open(&fake, "?from_start=0");
    console.hear_bytes(2 * BOOT.len());
    assert!(fake.print(b"and more"));
    console.hear("and more");
    assert_eq!(String::from_utf8_lossy(&console.heard), format!("{BOOT}{BOOT}and more"));
    assert_eq!(console.frames, [BOOT.len(), BOOT.len(), 8]);
}

#[test]
fn a_chunk_that_a_client_was_sent_is_not_sent_to_the_next() {
    let fake = running();
    read_to(&fake, BOOT.len());
    let mut one = Console::open(&fake, "");
    one.hear(BOOT);
    let mut other = Console::open(&fake, "?from_start=0");
    other.hear(BOOT);
    assert!(fake.print(b"and more"));
    other.hear("and more");
    assert_eq!(String::from_utf8_lossy(&other.heard), format!("{BOOT}and more"));
}

#[tokio::test]
async fn output_between_the_history_and_the_registration_of_a_client_is_not_sent_to_it() {
    let fake = running();
    read_to(&fake, BOOT.len());
    let mut old = Console::open(&fake, "");
    old.hear(BOOT);
    let held = fake.hold(Gate::Attach).await;
    let mut late = Console::open(&fake, "?from_start=0");
    late.hear(BOOT);
    // The history is read until there is no more of it.
    fake.attaching(2).await;
    assert!(fake.print(b"unheard"));
    old.hear("unheard");
    // The last chunk may come again to a new client. The port reads the next one only once all
    // clients have the one before.
    assert!(fake.print(b"last"));
    old.hear("last");
    drop(held);
    late.type_in("x");
    late.hear("x");
    let heard = String::from_utf8_lossy(&late.heard).into_owned();
    let after = heard.strip_prefix(BOOT).unwrap_or_else(|| panic!("{heard:?}"));
    assert!(after.ends_with('x') && !after.contains("unheard"), "{heard:?}");
}

#[test]
fn a_ping_is_answered_by_the_server_of_the_client() {
    let fake = running();
    let mut console = Console::open(&fake, "");
    console.ping();
    while !matches!(console.next().unwrap(), Message::Pong(_)) {}
}

#[test]
fn what_is_typed_is_echoed_to_every_client() {
    let fake = running();
    let mut one = Console::open(&fake, "?from_start=0");
    let mut other = Console::open(&fake, "?from_start=0");
    one.hear(BOOT);
    other.hear(BOOT);
    one.type_in("hello\r");
    one.hear("hello\r\n");
    other.hear("hello\r\n");
}

#[test]
fn without_a_query_there_is_no_history() {
    for query in ["", "?from_start=0&most_recent=5"] {
        let fake = running();
        read_to(&fake, BOOT.len());
        let mut console = Console::open(&fake, query);
        console.hear_bytes(BOOT.len());
        // The echo comes after the client was put on the list.
        console.type_in("x");
        console.hear("x");
        assert_eq!(
            console.heard,
            format!("{BOOT}x").as_bytes(),
            "{query}: the last chunk, and what is said now"
        );
    }
}

#[test]
fn the_most_recent_bytes_are_counted_back() {
    let fake = running();
    read_to(&fake, BOOT.len());
    let mut console = Console::open(&fake, "?most_recent=7");
    console.hear("login: ");
    assert_eq!(console.frames[0], 7);
}

/// Opens a console that has the guest's output from its first byte on.
fn watching(fake: &FakePropolis) -> Console {
    read_to(fake, BOOT.len());
    // The last chunk, which is the whole output.
    let mut console = Console::open(fake, "");
    console.hear_bytes(BOOT.len());
    console
}

#[test]
fn history_is_sent_in_16_kib_and_new_output_in_1_kib() {
    let fake = running();
    let mut watcher = watching(&fake);
    watcher.type_in("flood 40000\r");
    let all = BOOT.len() + "flood 40000\r\n".len() + 40000;
    watcher.hear_bytes(all);
    assert!(watcher.frames.iter().all(|bytes| *bytes <= 1024), "{:?}", watcher.frames);
    let mut late = Console::open(&fake, "?from_start=0");
    late.hear_bytes(all);
    assert_eq!(late.heard, watcher.heard);
    assert_eq!(late.frames[..2], [16384, 16384]);
}

#[test]
fn the_history_has_the_first_mebibyte_and_the_latest_and_not_what_is_between() {
    let fake = running();
    let mut watcher = watching(&fake);
    watcher.type_in(&format!("flood {}\r", 3 * MIB));
    let all = BOOT.len() + format!("flood {}\r\n", 3 * MIB).len() + 3 * MIB;
    watcher.hear_bytes(all);
    assert_eq!(text(&history(&fake, "from_start=0&max_bytes=18")), "no guest runs here");
    let latest = history(&fake, "most_recent=64&max_bytes=1000");
    assert_eq!(latest.json()["last_byte_offset"], json!(all));
    assert_eq!(text(&latest).as_bytes(), &watcher.heard[all - 64..]);
    let lost = history(&fake, &format!("from_start={}", MIB + 5));
    assert_eq!(lost.status, 400);
    assert!(
        lost.message().starts_with(&format!(
            "Requested byte offset {} (-{}) is no longer cached",
            MIB + 5,
            all - MIB - 5
        )),
        "{}",
        lost.message()
    );
    let mut console = Console::open(&fake, &format!("?from_start={}", MIB + 5));
    assert!(console.next().is_err(), "a WebSocket that asks for it is closed");
}

#[test]
fn a_history_is_asked_for_by_one_offset() {
    let fake = running();
    for query in ["", "from_start=0&most_recent=0"] {
        let answer = history(&fake, query);
        assert_eq!(answer.status, 400);
        assert_eq!(answer.message(), "Exactly one of 'from_start' or 'most_recent' must be specified.");
    }
    let mut console = Console::open(&fake, "?from_start=0");
    console.hear(BOOT);
    let beyond = history(&fake, "from_start=1000000");
    assert_eq!(
        (&beyond.json()["data"], &beyond.json()["last_byte_offset"]),
        (&json!([]), &json!(BOOT.len()))
    );
}

#[test]
fn a_vm_that_stops_closes_the_console_of_every_client() {
    let fake = running();
    let mut consoles = [Console::open(&fake, "?from_start=0"), Console::open(&fake, "?from_start=0")];
    for console in &mut consoles {
        console.hear(BOOT);
    }
    for console in &mut consoles {
        console.ping();
        while !matches!(console.next().unwrap(), Message::Pong(_)) {}
    }
    assert_eq!(put_state(&fake, "Stop").status, 204);
    for console in &mut consoles {
        let Message::Close(Some(frame)) = console.next().unwrap() else { panic!("a farewell") };
        assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1001, "VM stopped"));
    }
}

/// Lets the guest print more than the buffers of a connection hold until another client, which
/// does not read, stalls the port. Returns the last chunk.
fn flood_until_stalled(fake: &FakePropolis, reader: &mut Console) -> Vec<u8> {
    reader.type_in(&format!("flood {}\r", 32 * MIB));
    reader.set_read_timeout(Duration::from_millis(500));
    let (mut last, mut read) = (Vec::new(), json!(null));
    loop {
        if let Ok(Message::Binary(bytes)) = reader.next() {
            last = bytes.to_vec();
            continue;
        }
        let now = history(fake, "most_recent=0").json()["last_byte_offset"].clone();
        if now == read && !last.is_empty() {
            return last;
        }
        read = now;
    }
}

#[test]
fn what_the_port_holds_when_the_vm_stops_is_lost() {
    let fake = running();
    let mut reader = watching(&fake);
    // A client that does not read also keeps the port from being read.
    let mut stalled = Console::open(&fake, "");
    stalled.ping();
    while !matches!(stalled.next().unwrap(), Message::Pong(_)) {}
    flood_until_stalled(&fake, &mut reader);
    let read = history(&fake, "most_recent=0").json()["last_byte_offset"].as_u64().unwrap();
    assert!(read < 32 * MIB as u64, "the port was read to its end");
    assert_eq!(put_state(&fake, "Stop").status, 204);
    reader.set_read_timeout(PATIENCE);
    let Message::Close(Some(_)) = reader.next().unwrap() else { panic!("a farewell, and no last words") };
    drop(stalled);
    wait_for(&fake, "Destroyed");
}

#[test]
fn while_one_client_does_not_read_each_key_sends_the_last_chunk_to_the_others_again() {
    let fake = running();
    let mut reader = watching(&fake);
    let mut stalled = Console::open(&fake, "");
    stalled.ping();
    while !matches!(stalled.next().unwrap(), Message::Pong(_)) {}
    let last = flood_until_stalled(&fake, &mut reader);
    reader.set_read_timeout(PATIENCE);
    for _ in 0..5 {
        reader.type_in("k");
        let Message::Binary(again) = reader.next().unwrap() else { panic!("the chunk") };
        assert_eq!(again, last);
    }
}

#[test]
fn a_client_that_disconnects_does_no_harm() {
    let fake = running();
    let mut one = Console::open(&fake, "?from_start=0");
    one.hear(BOOT);
    drop(one);
    let mut other = Console::open(&fake, "?from_start=0");
    other.hear(BOOT);
    other.type_in("still here");
    other.hear("still here");
}

#[test]
fn the_port_stays_open_across_a_reboot() {
    let fake = running();
    let mut console = watching(&fake);
    console.type_in("reboot\r");
    console.hear(&format!("Restarting system\r\n{BOOT}"));
    assert_eq!(monitor(&fake, 5).json()["state"], "Running");
}

#[tokio::test]
async fn a_guest_that_is_asked_to_powers_itself_off() {
    let fake = running();
    let mut console = watching(&fake);
    // The last output is lost if the VM stops before the port is read.
    let held = fake.hold(Gate::Event).await;
    console.type_in("poweroff\r");
    console.hear("reboot: Power down\r\n");
    drop(held);
    wait_for(&fake, "Destroyed");
    let Message::Close(Some(_)) = console.next().unwrap() else { panic!("a farewell") };
}

#[test]
fn a_move_is_shown_as_text() {
    let fake = running();
    let mut console = watching(&fake);
    assert!(fake.say_migrating("127.0.0.1:9".parse().unwrap()));
    let Message::Text(text) = console.next().unwrap() else { panic!("a message") };
    let told: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(told, json!({ "Migrating": { "destination": "127.0.0.1:9", "from_start": BOOT.len() } }));
}

#[test]
fn without_an_active_vm_the_connection_ends_right_after_its_upgrade() {
    let fake = FakePropolis::spawn(PropolisBehaviour::default()).unwrap();
    let mut console = Console::open(&fake, "");
    match console.next() {
        Err(Error::ConnectionClosed | Error::Protocol(_) | Error::Io(_)) => {}
        other => panic!("an end without a word, not {other:?}"),
    }
}

#[test]
fn a_plain_get_is_refused_since_an_upgrade_is_expected() {
    let fake = running();
    let answer = ask_raw(&fake, "GET /instance/serial HTTP/1.1\r\napi-version: 5.0.0", b"");
    assert_eq!((answer.status, answer.message()), (400, "expected connection upgrade"));
}

#[test]
fn one_client_that_does_not_read_stalls_the_others_until_it_leaves() {
    let fake = running();
    let mut reader = watching(&fake);
    let mut stalled = Console::open(&fake, "?from_start=0");
    stalled.hear(BOOT);
    // More than the buffers of a connection hold.
    let bytes = 32 * MIB;
    reader.type_in(&format!("flood {bytes}\r"));
    let all = BOOT.len() + format!("flood {bytes}\r\n").len() + bytes;
    reader.set_read_timeout(Duration::from_millis(500));
    let heard = loop {
        match reader.next() {
            Ok(Message::Binary(bytes)) => reader.heard.extend_from_slice(&bytes),
            Ok(other) => panic!("a guest says bytes, not {other:?}"),
            Err(_) => break reader.heard.len(),
        }
    };
    assert!(heard < all, "it has all {all} bytes though another does not read");
    reader.set_read_timeout(PATIENCE);
    drop(stalled);
    reader.hear_bytes(all);
}

/// Raw bytes: what a client sees that does not speak WebSocket after the upgrade.
#[test]
fn an_upgrade_is_answered_with_101() {
    let fake = running();
    let mut stream = TcpStream::connect(fake.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = "GET /instance/serial HTTP/1.1\r\nhost: x\r\napi-version: 5.0.0\r\nconnection: upgrade\r\n\
                   upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 101");
}
