//! Where the console of a Propolis VM is, and what its server says beside the guest's words.
//!
//! Pure: texts to values.

use serde::Deserialize;
use tokio_tungstenite::tungstenite::http::Uri;

use crate::error::{Error, Result};

/// The console of one server: everything else is found from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    /// The server's address, such as `127.0.0.1:12400`.
    pub(super) server: String,
    /// The path of the console there.
    path: String,
}

/// Which bytes of the console's past are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// Those behind so many, counted from the boot.
    Start(u64),
    /// The last ones, so many of them.
    MostRecent(u64),
}

impl Since {
    fn query(self) -> String {
        match self {
            Since::Start(bytes) => format!("from_start={bytes}"),
            Since::MostRecent(bytes) => format!("most_recent={bytes}"),
        }
    }
}

impl Address {
    /// Reads the address of a console, such as `ws://127.0.0.1:12400/instance/serial`.
    ///
    /// # Errors
    /// `InvalidInput` for anything else.
    pub(super) fn parse(url: &str) -> Result<Self> {
        let refused = |why: &str| Error::invalid("console", url, why);
        let uri: Uri = url.parse().map_err(|_| refused("this is no URL"))?;
        if uri.scheme_str() != Some("ws") {
            return Err(refused("a console is reached by ws://"));
        }
        let Some(authority) = uri.authority() else { return Err(refused("the URL names no server")) };
        let host = authority.host();
        let port = authority.port_u16().unwrap_or(80);
        Ok(Self { server: format!("{host}:{port}"), path: uri.path().trim_end_matches('/').to_owned() })
    }

    /// Answers the same console at another server: its VM has moved there.
    pub(super) fn at(&self, server: &str) -> Self {
        Self { server: server.to_owned(), path: self.path.clone() }
    }

    /// Answers where the live console is, from this byte on.
    pub(super) fn live(&self, since: Since) -> String {
        format!("ws://{}{}?{}", self.server, self.path, since.query())
    }

    /// Answers where its past is, at most so many bytes.
    pub(super) fn history(&self, since: Since, most_bytes: u64) -> String {
        format!("http://{}{}/history?{}&max_bytes={most_bytes}", self.server, self.path, since.query())
    }
}

/// What the server says in a text message. Source: Propolis, `InstanceSerialConsoleControlMessage`.
#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(super) enum Control {
    /// The VM goes on at another server.
    Migrating {
        /// The other server's address.
        destination: String,
    },
}

impl Control {
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
    fn everything_is_found_from_the_consoles_url() {
        let console = Address::parse("ws://127.0.0.1:12400/instance/serial").unwrap();
        assert_eq!(console.server, "127.0.0.1:12400");
        let live = console.live(Since::Start(7));
        assert_eq!(live, "ws://127.0.0.1:12400/instance/serial?from_start=7");
        let past = console.at("[::1]:9").history(Since::MostRecent(10), 20);
        assert_eq!(past, "http://[::1]:9/instance/serial/history?most_recent=10&max_bytes=20");
        assert_eq!(Address::parse("ws://[::1]:80/instance/serial").unwrap().server, "[::1]:80");
    }

    #[test]
    fn other_urls_are_refused_with_what_is_wrong() {
        for (url, why) in [
            ("http://127.0.0.1:1/instance/serial", "ws://"),
            ("/run/console.sock", "ws://"),
            ("ws://", "no URL"),
            ("a b", "no URL"),
        ] {
            let error = Address::parse(url).unwrap_err().to_string();
            assert!(error.starts_with("console: ") && error.contains(why), "{url}: {error}");
        }
    }

    #[test]
    fn a_migration_is_understood_and_the_unknown_passed_over() {
        let text = r#"{"Migrating":{"destination":"10.0.0.2:12400","from_start":4711}}"#;
        let expected = Control::Migrating { destination: "10.0.0.2:12400".to_owned() };
        assert_eq!(Control::read(text), Some(expected));
        assert_eq!(Control::read(r#"{"Resized":{}}"#), None);
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            let _ = (Address::parse(&text), Control::read(&text));
        }
    }
}
