//! Bytes to lines, lines to messages, commands to lines.
//!
//! Pure. Knows the frame of the protocol and none of its commands: names, values and keys it has
//! never heard of pass.
//!
//! Source: QEMU, `docs/interop/qmp-spec.txt`.

use std::time::Duration;

use serde_json::{Map, Value, json};

/// What QEMU says, one line each.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum QmpMessage {
    /// The first line of a connection.
    Greeting {
        /// QEMU's version: major, minor, micro.
        version: [u64; 3],
    },
    /// A command succeeded.
    Return {
        /// The command's id; `None` where it is not one of ours.
        id: Option<u64>,
        /// What it answered.
        value: Value,
    },
    /// A command failed, or (without an id) was not understood as one.
    Error {
        /// The command's id; `None` where it is not one of ours.
        id: Option<u64>,
        /// The class that QEMU put the error in.
        class: String,
        /// The text for people.
        desc: String,
    },
    /// Something happened.
    Event(QmpEvent),
    /// An object that is none of these.
    Other(Map<String, Value>),
}

/// Something that happened in QEMU.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct QmpEvent {
    /// Its name, such as `SHUTDOWN`.
    pub(crate) name: String,
    /// Its data; `null` where it has none.
    pub(crate) data: Value,
    /// When, since the Unix epoch on the host's clock, where QEMU knew.
    pub(crate) timestamp: Option<Duration>,
}

/// A line that is not a JSON object.
#[derive(Debug)]
pub(crate) struct MalformedLine {
    /// The beginning of the line, and what is wrong with it.
    pub(crate) problem: String,
    /// Where it is no JSON.
    pub(crate) source: Option<serde_json::Error>,
}

/// Returns what a line says; its line end may be there or not.
pub(crate) fn decode(line: &[u8]) -> Result<QmpMessage, MalformedLine> {
    let mut map = object(line)?;
    if let Some(value) = map.remove("return") {
        return Ok(QmpMessage::Return { id: id(&map), value });
    }
    if let Some(Value::Object(error)) = map.get("error") {
        return Ok(QmpMessage::Error {
            id: id(&map),
            class: text(error, "class"),
            desc: text(error, "desc"),
        });
    }
    if let Some(Value::String(name)) = map.get("event") {
        let name = name.clone();
        let timestamp = map.get("timestamp").and_then(instant);
        return Ok(QmpMessage::Event(QmpEvent {
            name,
            data: map.remove("data").unwrap_or_default(),
            timestamp,
        }));
    }
    if let Some(greeting) = map.get("QMP") {
        let number = |part| greeting["version"]["qemu"][part].as_u64().unwrap_or(0);
        return Ok(QmpMessage::Greeting { version: [number("major"), number("minor"), number("micro")] });
    }
    Ok(QmpMessage::Other(map))
}

/// Returns the line that says a command, its end included.
pub(crate) fn encode(id: u64, command: &str, arguments: Option<Value>) -> Vec<u8> {
    let mut request = json!({ "execute": command, "id": id });
    if let Some(arguments) = arguments {
        request["arguments"] = arguments;
    }
    let mut line = request.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Returns the JSON object of a line.
pub(crate) fn object(line: &[u8]) -> Result<Map<String, Value>, MalformedLine> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(MalformedLine { problem: format!("{} is not an object", excerpt(line)), source: None }),
        Err(error) => {
            Err(MalformedLine { problem: format!("{} is not JSON", excerpt(line)), source: Some(error) })
        }
    }
}

/// Returns the text of a key, or nothing where it is missing or no text.
pub(crate) fn text(map: &Map<String, Value>, key: &str) -> String {
    map.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn id(map: &Map<String, Value>) -> Option<u64> {
    map.get("id").and_then(Value::as_u64)
}

fn instant(timestamp: &Value) -> Option<Duration> {
    // QEMU says -1 for both where its clock failed.
    let seconds = timestamp.get("seconds")?.as_u64()?;
    let micros = timestamp.get("microseconds")?.as_u64()?;
    Some(Duration::from_secs(seconds).saturating_add(Duration::from_micros(micros)))
}

/// Returns the beginning of a line, fit for an error's text.
fn excerpt(line: &[u8]) -> String {
    let head = &line[..line.len().min(80)];
    let dots = if head.len() < line.len() { "…" } else { "" };
    format!("`{}{dots}`", head.escape_ascii())
}

/// Cuts what arrives into lines, however it arrives.
#[derive(Debug)]
pub(crate) struct LineBuffer {
    bytes: Vec<u8>,
    /// How many of them are known to hold no line end.
    scanned: usize,
    limit: usize,
}

/// A line grew beyond the limit; its end was never seen, so nothing after it can be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooLong {
    /// The limit in bytes.
    pub(crate) limit: usize,
}

impl LineBuffer {
    /// Creates an empty buffer for lines of at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), scanned: 0, limit }
    }

    /// Returns where to append what arrives.
    pub(crate) fn tail(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Takes the next whole line, without its end; `None` until more arrives.
    pub(crate) fn next_line(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        let end = self.bytes[self.scanned..].iter().position(|byte| *byte == b'\n');
        let length = end.map_or(self.bytes.len(), |end| self.scanned + end);
        if length > self.limit {
            return Err(TooLong { limit: self.limit });
        }
        if end.is_none() {
            self.scanned = length;
            return Ok(None);
        }
        let mut line: Vec<u8> = self.bytes.drain(..=length).collect();
        self.scanned = 0;
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Ok(Some(line))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn replies_of_qemu_7_2_are_parsed() {
        let greeting = br#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "Debian"}, "capabilities": ["oob"]}}"#;
        assert_eq!(decode(greeting).unwrap(), QmpMessage::Greeting { version: [7, 2, 22] });
        assert_eq!(
            decode(b"{\"return\": {}, \"id\": 7}\r\n").unwrap(),
            QmpMessage::Return { id: Some(7), value: json!({}) }
        );
        let event = br#"{"timestamp": {"seconds": 1795379978, "microseconds": 180441}, "event": "SHUTDOWN", "data": {"guest": false, "reason": "host-qmp-quit"}}"#;
        let Ok(QmpMessage::Event(event)) = decode(event) else { panic!("not an event") };
        assert_eq!(event.name, "SHUTDOWN");
        assert_eq!(event.data["reason"], "host-qmp-quit");
        assert_eq!(event.timestamp, Some(Duration::from_micros(1_795_379_978_180_441)));
    }

    #[test]
    fn an_error_without_an_id_belongs_to_no_command() {
        let line =
            br#"{"error": {"class": "GenericError", "desc": "JSON parse error, invalid keyword 'junk'"}}"#;
        let Ok(QmpMessage::Error { id, class, .. }) = decode(line) else { panic!("not an error") };
        assert_eq!((id, class.as_str()), (None, "GenericError"));
    }

    #[test]
    fn unknown_names_pass() {
        let line =
            br#"{"event": "COMET_SIGHTED", "timestamp": {"seconds": -1, "microseconds": -1}, "tail": 3}"#;
        let expected = QmpEvent { name: "COMET_SIGHTED".into(), data: Value::Null, timestamp: None };
        assert_eq!(decode(line).unwrap(), QmpMessage::Event(expected));
        assert!(matches!(decode(br#"{"novelty": 1}"#), Ok(QmpMessage::Other(map)) if map["novelty"] == 1));
    }

    #[test]
    fn a_line_that_is_no_object_is_shown() {
        let list = decode(b"[1]").unwrap_err();
        assert_eq!((list.problem.as_str(), list.source.is_some()), ("`[1]` is not an object", false));
        let words = decode(b"\x1b[0mBoo").unwrap_err();
        assert_eq!((words.problem.as_str(), words.source.is_some()), (r"`\x1b[0mBoo` is not JSON", true));
    }

    #[test]
    fn a_line_beyond_the_limit_is_an_error_even_without_its_end() {
        let mut lines = LineBuffer::new(4);
        lines.tail().extend(b"1234\n12345");
        assert_eq!(lines.next_line(), Ok(Some(b"1234".to_vec())));
        assert_eq!(lines.next_line(), Err(TooLong { limit: 4 }));
        lines.tail().extend(b"\n1\n");
        assert_eq!(lines.next_line(), Err(TooLong { limit: 4 }));
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(any::<String>(), inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn message() -> impl Strategy<Value = QmpMessage> {
        let id = prop::option::of(any::<u64>());
        prop_oneof![
            (id.clone(), json_value()).prop_map(|(id, value)| QmpMessage::Return { id, value }),
            (id, any::<String>(), any::<String>()).prop_map(|(id, class, desc)| QmpMessage::Error {
                id,
                class,
                desc
            }),
            (any::<String>(), json_value(), prop::option::of(any::<u32>())).prop_map(|(name, data, at)| {
                QmpMessage::Event(QmpEvent {
                    name,
                    data,
                    timestamp: at.map(|at| Duration::from_secs(at.into())),
                })
            }),
            any::<[u64; 3]>().prop_map(|version| QmpMessage::Greeting { version }),
        ]
    }

    /// Says a message as QEMU does.
    fn said(message: &QmpMessage) -> String {
        let with_id = |mut line: Value, id: &Option<u64>| {
            if let Some(id) = id {
                line["id"] = json!(id);
            }
            line
        };
        match message {
            QmpMessage::Greeting { version: [major, minor, micro] } => {
                json!({"QMP": {"version": {"qemu": {"major": major, "minor": minor, "micro": micro}}}})
            }
            QmpMessage::Return { id, value } => with_id(json!({ "return": value }), id),
            QmpMessage::Error { id, class, desc } => {
                with_id(json!({"error": {"class": class, "desc": desc}}), id)
            }
            QmpMessage::Event(QmpEvent { name, data, timestamp }) => {
                let seconds = timestamp.map_or(-1, |at| at.as_secs() as i64);
                let micros = timestamp.map_or(-1, |at| i64::from(at.subsec_micros()));
                json!({"event": name, "data": data, "timestamp": {"seconds": seconds, "microseconds": micros}})
            }
            QmpMessage::Other(map) => Value::Object(map.clone()),
        }
        .to_string()
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn no_object_makes_it_panic(key in "return|error|event|QMP|timestamp|id", value in json_value(), more in json_value()) {
            let line = json!({ key: value, "data": more.clone(), "id": more }).to_string();
            prop_assert!(decode(line.as_bytes()).is_ok());
        }

        #[test]
        fn guest_agent_replies_are_parsed(message in message()) {
            prop_assert_eq!(decode(said(&message).as_bytes()).unwrap(), message);
        }

        #[test]
        fn a_command_is_one_line(id: u64, command: String, arguments in prop::option::of(json_value())) {
            let line = encode(id, &command, arguments.clone());
            prop_assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1));
            let said: Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(&said["execute"], &json!(command));
            prop_assert_eq!(&said["id"], &json!(id));
            prop_assert_eq!(said.get("arguments"), arguments.as_ref());
        }

        #[test]
        fn lines_do_not_depend_on_how_they_arrive(
            lines in prop::collection::vec("[^\r\n]{0,20}", 0..10),
            cuts in prop::collection::vec(1_usize..30, 1..10),
        ) {
            let sent: Vec<u8> = lines.iter().flat_map(|line| format!("{line}\r\n").into_bytes()).collect();
            let (mut buffer, mut found, mut rest) = (LineBuffer::new(200), Vec::new(), sent.as_slice());
            for cut in cuts.iter().cycle() {
                let (head, tail) = rest.split_at((*cut).min(rest.len()));
                buffer.tail().extend(head);
                while let Some(line) = buffer.next_line().unwrap() {
                    found.push(String::from_utf8(line).unwrap());
                }
                rest = tail;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(found, lines);
        }
    }
}
