//! The conversation with a monitor's clients, one after the other.

use std::cell::RefCell;
use std::io;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::UnixListener;

use crate::machine::{CommandResult, FakeMachine, version, write_line};

/// Serves the clients of one monitor; the next has to wait until the one before has gone.
pub(crate) async fn serve(listener: UnixListener, machine: Rc<RefCell<FakeMachine>>) {
    while let Ok((stream, _)) = listener.accept().await {
        let Ok(stream) = stream.into_std() else { return };
        let stream = Rc::new(stream);
        let talk =
            MonitorClient { stream: Rc::clone(&stream), machine: Rc::clone(&machine), negotiated: false };
        // However a conversation ends, it is over.
        let _ = talk.hold().await;
        machine.borrow_mut().leave(&stream);
    }
}

/// One client.
struct MonitorClient {
    /// For writing; what is read comes by a copy.
    stream: Rc<UnixStream>,
    machine: Rc<RefCell<FakeMachine>>,
    negotiated: bool,
}

impl MonitorClient {
    async fn hold(mut self) -> io::Result<()> {
        let behaviour = self.machine.borrow().behaviour().clone();
        let reader = BufReader::new(tokio::net::UnixStream::from_std(self.stream.try_clone()?)?);
        if behaviour.greet {
            match &behaviour.greeting {
                Some(line) => io::Write::write_all(&mut &*self.stream, format!("{line}\r\n").as_bytes())?,
                None => self.say(&json!({ "QMP": { "version": version(), "capabilities": ["oob"] } })),
            }
        }
        let mut lines = reader.split(b'\n');
        while let Some(line) = lines.next_segment().await? {
            if !behaviour.greet || line.trim_ascii().is_empty() {
                continue;
            }
            let request = serde_json::from_slice::<Value>(&line);
            let command = request.as_ref().ok().and_then(|it| it["execute"].as_str()).unwrap_or_default();
            if behaviour.mute.iter().any(|it| it == command) {
                continue;
            }
            if behaviour.hang_up.iter().any(|it| it == command) {
                return Ok(());
            }
            if behaviour.junk {
                io::Write::write_all(&mut &*self.stream, b"\x1b[31mthis is not JSON\r\n")?;
            }
            let reply = match &request {
                Ok(request) => self.reply(request, behaviour.refuse.get(command)),
                Err(_) => refusal("GenericError", "JSON parse error"),
            };
            self.say(&reply);
        }
        Ok(())
    }

    fn say(&self, line: &Value) {
        write_line(&self.stream, line);
    }

    fn reply(&mut self, request: &Value, refused: Option<&String>) -> Value {
        let Some(request) = request.as_object() else {
            return refusal("GenericError", "QMP input must be a JSON object");
        };
        let mut reply = match self.answer(request, refused) {
            Ok(value) => json!({ "return": value }),
            Err((class, desc)) => refusal(class, &desc),
        };
        if let Some(id) = request.get("id") {
            reply["id"] = id.clone();
        }
        reply
    }

    fn answer(&mut self, request: &Map<String, Value>, refused: Option<&String>) -> CommandResult {
        let generic = |text: String| Err(("GenericError", text));
        for key in request.keys() {
            if !matches!(key.as_str(), "execute" | "arguments" | "id") {
                return generic(format!("QMP input member '{key}' is unexpected"));
            }
        }
        let Some(command) = request.get("execute").and_then(Value::as_str) else {
            return generic("QMP input lacks member 'execute'".to_owned());
        };
        let arguments = request.get("arguments").cloned().unwrap_or_else(|| json!({}));
        if !arguments.is_object() {
            return generic("QMP input member 'arguments' must be an object".to_owned());
        }
        if let Some(text) = refused {
            return generic(text.clone());
        }
        if !self.negotiated {
            if command != "qmp_capabilities" {
                let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
                return Err(("CommandNotFound", text.to_owned()));
            }
            self.negotiated = true;
            self.machine.borrow_mut().join(Rc::clone(&self.stream));
            return Ok(json!({}));
        }
        self.machine.borrow_mut().execute(command, &arguments)
    }
}

fn refusal(class: &str, desc: &str) -> Value {
    json!({ "error": { "class": class, "desc": desc } })
}
