//! Where the console of a Propolis VM is, and what its server says beside the guest's words.
//!
//! Pure: texts to values.

use std::net::SocketAddr;

use serde::Deserialize;

use crate::error::{Error, Result};

/// Which bytes of the console's past are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HistoryRange {
    /// Those behind so many, counted from the boot.
    Start(u64),
    /// The last ones, so many of them.
    MostRecent(u64),
}

/// Reads the URL of a console, such as `ws://127.0.0.1:12400/instance/serial`, and returns whose it
/// is.
///
/// # Errors
/// `InvalidInput` for anything else.
pub(super) fn server(url: &str) -> Result<SocketAddr> {
    let address = url.strip_prefix("ws://").and_then(|rest| rest.strip_suffix("/instance/serial"));
    address.and_then(|address| address.parse().ok()).ok_or_else(|| {
        Error::invalid("console", url, "the console of a Propolis VM is at ws://IP:PORT/instance/serial")
    })
}

/// What the server says in a text message. Source: Propolis, `InstanceSerialConsoleControlMessage`.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(super) enum ControlMessage {
    /// The VM goes on at another server.
    Migrating {
        /// The other server's address.
        destination: SocketAddr,
    },
}

impl ControlMessage {
    /// Reads a text message; `None` for one that this program does not know.
    pub(super) fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_server_is_found_from_the_consoles_url() {
        for address in ["127.0.0.1:12400", "[::1]:9"] {
            let found = server(&format!("ws://{address}/instance/serial")).unwrap();
            assert_eq!(found, address.parse().unwrap());
        }
    }

    #[test]
    fn other_urls_are_refused_with_what_is_right() {
        for url in
            ["http://127.0.0.1:1/instance/serial", "/run/console.sock", "ws://", "ws://host/instance/serial"]
        {
            let error = server(url).unwrap_err().to_string();
            assert!(error.starts_with("console: ") && error.contains("ws://IP:PORT/"), "{url}: {error}");
        }
    }

    #[test]
    fn a_migration_is_understood_and_the_unknown_passed_over() {
        let text = r#"{"Migrating":{"destination":"10.0.0.2:12400","from_start":4711}}"#;
        let destination = "10.0.0.2:12400".parse().unwrap();
        assert_eq!(ControlMessage::read(text), Some(ControlMessage::Migrating { destination }));
        assert_eq!(ControlMessage::read(r#"{"Resized":{}}"#), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            let _ = (server(&text), ControlMessage::read(&text));
        }
    }
}
