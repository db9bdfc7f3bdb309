//! What a server says in its log: lines of JSON, as bunyan has them.
//!
//! Pure: text to what it tells. A line that is none of these tells nothing.

use std::net::SocketAddr;

use serde_json::Value;

/// From this level on a line tells of an error.
const ERROR_LEVEL: u64 = 50;

/// Answers where the server listens, if this line says so.
pub(super) fn listening(line: &str) -> Option<SocketAddr> {
    let line: Value = serde_json::from_str(line.trim()).ok()?;
    if line["msg"].as_str()? != "listening" {
        return None;
    }
    line["local_addr"].as_str()?.parse().ok()
}

/// Answers why the server failed to answer a request: what it hides behind `Internal Server Error`.
pub(super) fn why(log: &str, request_id: &str) -> Option<String> {
    if request_id.is_empty() {
        return None;
    }
    log.lines().rev().filter(|line| line.contains(request_id)).find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        line["error_message_internal"].as_str().map(str::to_owned)
    })
}

/// Answers the server's last words: the last lines that are errors, or are no JSON, such as a panic.
pub(super) fn last_words(log: &str) -> String {
    const MOST: usize = 5;
    let told = |line: &str| match serde_json::from_str::<Value>(line) {
        Ok(line) if line["level"].as_u64().is_some_and(|level| level >= ERROR_LEVEL) => {
            let message = line["msg"].as_str().unwrap_or_default();
            let cause = line["error_message_internal"].as_str().or(line["error"].as_str());
            Some(cause.map_or(message.to_owned(), |cause| format!("{message}: {cause}")))
        }
        Ok(_) => None,
        Err(_) => Some(line.chars().take(400).collect()).filter(|line: &String| !line.trim().is_empty()),
    };
    let mut words: Vec<String> = log.lines().rev().filter_map(told).take(MOST).collect();
    words.reverse();
    words.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LOG: &str = concat!(
        r#"{"msg":"listening","level":30,"local_addr":"127.0.0.1:41231"}"#,
        "\n",
        r#"{"msg":"request completed","level":30,"req_id":"7a","response_code":"500","error_message_internal":"VM initialization failed: no such VNIC"}"#,
        "\n",
        r#"{"msg":"VM went wrong","level":50,"error":"the moon"}"#,
        "\nthread 'main' panicked at com1\n",
    );

    #[test]
    fn the_address_is_in_the_line_that_says_listening() {
        let found: Vec<_> = LOG.lines().filter_map(listening).collect();
        assert_eq!(found, ["127.0.0.1:41231".parse().unwrap()]);
    }

    #[test]
    fn a_hidden_failure_is_found_by_its_request() {
        assert_eq!(why(LOG, "7a").as_deref(), Some("VM initialization failed: no such VNIC"));
        assert_eq!(why(LOG, "7b"), None);
        assert_eq!(why(LOG, ""), None);
    }

    #[test]
    fn the_last_words_are_errors_and_panics() {
        assert_eq!(last_words(LOG), "VM went wrong: the moon\nthread 'main' panicked at com1");
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            let _ = (listening(&text), why(&text, "a"), last_words(&text));
        }
    }
}
