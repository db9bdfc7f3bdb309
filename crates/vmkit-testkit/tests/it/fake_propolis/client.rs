//! A client that does not use the server's types, and checks every reply against the published
//! description.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{self, Message, WebSocket};
use vmkit_testkit::propolis::{FakePropolis, check_answer, check_ensure_request};

/// The timeout of everything that must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const ID: &str = "6f0cf4d5-4b8c-4d2e-9d3a-7a0f4a0c9c11";

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Option<Value>,
    pub(crate) text: String,
    pub(crate) request_id: Option<String>,
}

impl Answer {
    pub(crate) fn message(&self) -> &str {
        self.body.as_ref().and_then(|body| body["message"].as_str()).unwrap_or_default()
    }

    pub(crate) fn code(&self) -> Option<&str> {
        self.body.as_ref()?["error_code"].as_str()
    }

    pub(crate) fn json(&self) -> &Value {
        self.body.as_ref().unwrap_or(&Value::Null)
    }
}

/// Returns a spec that a well-behaved server accepts.
pub(crate) fn spec() -> Value {
    json!({
        "board": {
            "cpus": 2,
            "memory_mb": 512,
            "chipset": { "type": "i440_fx", "value": { "enable_pcie": false } },
        },
        "components": { "com1": { "type": "serial_port", "component": { "num": "com1" } } },
    })
}

/// Returns a spec with one disk more, a file.
pub(crate) fn spec_with_disk(path: &Path) -> Value {
    let mut spec = spec();
    spec["components"]["root"] = json!({
        "type": "virtio_disk",
        "component": { "backend_id": "root-backend", "pci_path": { "bus": 0, "device": 16, "function": 0 } },
    });
    spec["components"]["root-backend"] = json!({
        "type": "file_storage_backend",
        "component": { "path": path, "readonly": false, "block_size": 512, "workers": null },
    });
    spec
}

pub(crate) fn ensure_body(spec: &Value) -> Value {
    let nil = "00000000-0000-0000-0000-000000000000";
    json!({
        "properties": {
            "id": ID,
            "name": "web",
            "description": "a test",
            "metadata": {
                "silo_id": nil,
                "project_id": nil,
                "sled_id": nil,
                "sled_serial": "none",
                "sled_revision": 0,
                "sled_model": "none",
            },
        },
        "init": { "method": "Spec", "value": { "spec": spec } },
    })
}

/// Sends a raw request; returns the reply, unchecked.
pub(crate) fn ask_raw(fake: &FakePropolis, head: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(fake.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head =
        format!("{head}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    // A server that refuses a body may close the connection before it has read all of it.
    let _ = stream.write_all(body);
    let mut lines = BufReader::new(stream);
    let mut status = String::new();
    lines.read_line(&mut status).unwrap();
    let mut request_id = None;
    loop {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        if let Some(id) = line.to_lowercase().strip_prefix("x-request-id: ") {
            request_id = Some(id.trim().to_owned());
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut text = String::new();
    lines.read_to_string(&mut text).unwrap();
    let status = status.split(' ').nth(1).unwrap_or_default().parse().unwrap();
    Answer { status, body: serde_json::from_str(&text).ok(), text, request_id }
}

/// Sends a request as version 5.0.0, and checks that the reply fits the description.
pub(crate) fn ask(fake: &FakePropolis, method: &str, path: &str, body: Option<&Value>) -> Answer {
    let bytes = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
    let head = format!("{method} {path} HTTP/1.1\r\napi-version: 5.0.0\r\ncontent-type: application/json");
    let answer = ask_raw(fake, &head, &bytes);
    let path = path.split('?').next().unwrap_or_default();
    check_answer(method, path, answer.status, answer.body.as_ref()).unwrap();
    assert!(answer.request_id.is_some(), "every answer has a request id: {answer:?}");
    if answer.status >= 400 {
        assert_eq!(answer.json()["request_id"].as_str(), answer.request_id.as_deref());
        assert!(answer.text.starts_with("{\n  \""), "errors are printed prettily: {}", answer.text);
    }
    answer
}

pub(crate) fn ensure(fake: &FakePropolis, spec: &Value) -> Answer {
    let body = ensure_body(spec);
    check_ensure_request(&body).unwrap();
    ask(fake, "PUT", "/instance", Some(&body))
}

/// Ensures a VM from a spec that a well-behaved server accepts.
pub(crate) fn ensure_well(fake: &FakePropolis) {
    let answer = ensure(fake, &spec());
    assert_eq!(
        (answer.status, answer.json()),
        (201, &json!({ "migrate": null })),
        "{answer:?}\n{}",
        fake.log()
    );
}

pub(crate) fn put_state(fake: &FakePropolis, state: &str) -> Answer {
    ask(fake, "PUT", "/instance/state", Some(&json!(state)))
}

pub(crate) fn monitor(fake: &FakePropolis, generation: u64) -> Answer {
    ask(fake, "GET", "/instance/state-monitor", Some(&json!({ "gen": generation })))
}

/// Follows the states until this one.
pub(crate) fn wait_for(fake: &FakePropolis, state: &str) -> u64 {
    let mut next = 0;
    loop {
        let answer = monitor(fake, next);
        assert_eq!(answer.status, 200, "awaiting {state}: {answer:?}");
        let generation = answer.json()["gen"].as_u64().unwrap();
        assert!(generation >= next, "a generation that was passed is not answered");
        if answer.json()["state"] == state {
            return generation;
        }
        next = generation + 1;
    }
}

/// Ensures a VM and starts it.
pub(crate) fn run(fake: &FakePropolis) {
    ensure_well(fake);
    assert_eq!(put_state(fake, "Run").status, 204);
    wait_for(fake, "Running");
}

/// A client of a VM's serial port.
pub(crate) struct Console {
    socket: WebSocket<TcpStream>,
    pub(crate) heard: Vec<u8>,
    pub(crate) frames: Vec<usize>,
}

impl Console {
    pub(crate) fn open(fake: &FakePropolis, query: &str) -> Self {
        Self::open_at(fake.address(), query)
    }

    pub(crate) fn open_at(address: SocketAddr, query: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut request = format!("ws://{address}/instance/serial{query}").into_client_request().unwrap();
        request.headers_mut().insert("api-version", "5.0.0".parse().unwrap());
        let (socket, _) = tungstenite::client(request, stream).unwrap();
        Self { socket, heard: Vec::new(), frames: Vec::new() }
    }

    pub(crate) fn next(&mut self) -> Result<Message, tungstenite::Error> {
        self.socket.read()
    }

    pub(crate) fn set_read_timeout(&mut self, timeout: Duration) {
        self.socket.get_mut().set_read_timeout(Some(timeout)).unwrap();
    }

    pub(crate) fn type_in(&mut self, text: &str) {
        self.socket.send(Message::binary(text.as_bytes().to_vec())).unwrap();
    }

    /// Sends a ping, which only a client on the list gets a reply to.
    pub(crate) fn ping(&mut self) {
        self.socket.send(Message::Ping(Vec::new().into())).unwrap();
    }

    /// Reads until the guest has printed this many bytes.
    pub(crate) fn hear_bytes(&mut self, bytes: usize) {
        while self.heard.len() < bytes {
            match self.next().unwrap() {
                Message::Binary(bytes) => {
                    self.frames.push(bytes.len());
                    self.heard.extend_from_slice(&bytes);
                }
                other => panic!("a guest says bytes, not {other:?}"),
            }
        }
    }

    /// Reads until the guest has printed this text.
    pub(crate) fn hear(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.heard).contains(text) {
            let more = self.heard.len() + 1;
            self.hear_bytes(more);
        }
    }
}
