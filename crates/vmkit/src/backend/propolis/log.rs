//! What a server says in its log: lines of JSON, as bunyan has them, and what its process says
//! besides.
//!
//! Pure: text to what it tells. A line that is none of these tells nothing.
//!
//! Both come by one pipe: a panic's words cut lines of JSON in two wherever they come.

use std::net::SocketAddr;

use serde_json::Value;

/// From this level on a line tells of an error.
const ERROR_LEVEL: u64 = 50;
/// The most lines of what is told.
const MOST_LINES: usize = 5;
/// The longest line of it, in characters.
const MOST_CHARS: usize = 400;
/// What stands in the first line of a panic.
const PANICKED: &str = " panicked at ";
/// What comes of a panic while another one is dealt with: no cause of anything.
const CONSEQUENCES: [&str; 3] = [
    "panic in a destructor during cleanup",
    "panic in a function that cannot unwind",
    "while processing panic",
];
/// So many lines of the log may come from other threads between the panics of one end.
const MOST_BETWEEN: usize = 20;

/// Returns where the server listens, if this line says so.
pub(super) fn listening(line: &str) -> Option<SocketAddr> {
    let line: Value = serde_json::from_str(line.trim()).ok()?;
    if line["msg"].as_str()? != "listening" {
        return None;
    }
    line["local_addr"].as_str()?.parse().ok()
}

/// Returns why the server failed to answer a request: what it hides behind `Internal Server Error`.
pub(super) fn why(log: &str, request_id: &str) -> Option<String> {
    if request_id.is_empty() {
        return None;
    }
    log.lines().rev().filter(|line| line.contains(request_id)).find_map(|line| {
        let line: Value = serde_json::from_str(line).ok()?;
        line["error_message_internal"].as_str().map(str::to_owned)
    })
}

/// Returns a server's last words: the panic that ended it, after the last lines that are errors;
/// without a panic also what is no JSON.
pub(super) fn last_words(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let (panic, before) = match first_cause(&lines) {
        Some(at) => (panic_at(&lines[at..]), &lines[..at]),
        None => (Vec::new(), &lines[..]),
    };
    let is_panic = !panic.is_empty();
    let told = |line: &&str| match serde_json::from_str::<Value>(line) {
        Ok(line) if line["level"].as_u64().is_some_and(|level| level >= ERROR_LEVEL) => {
            let message = line["msg"].as_str().unwrap_or_default();
            let cause = line["error_message_internal"].as_str().or(line["error"].as_str());
            Some(cause.map_or(message.to_owned(), |cause| format!("{message}: {cause}")))
        }
        Ok(_) => None,
        Err(_) if is_panic || line.trim().is_empty() || is_of_json(line) => None,
        Err(_) => Some(shortened(line)),
    };
    let room = MOST_LINES.saturating_sub(panic.len());
    let mut words: Vec<String> = before.iter().rev().filter_map(told).take(room).collect();
    words.reverse();
    words.extend(panic);
    words.join("\n")
}

/// Returns what a server died of in one line: its panic, or else the last of its last words.
pub(super) fn cause(log: &str) -> String {
    panic(log).unwrap_or_else(|| last_words(log).lines().next_back().unwrap_or_default().to_owned())
}

/// Returns the panic in a server's log in one line, if there is one.
pub(super) fn panic(log: &str) -> Option<String> {
    let lines: Vec<&str> = log.lines().collect();
    first_cause(&lines).map(|at| panic_at(&lines[at..]).join(" "))
}

/// Finds the line that begins the panic of which a server ended.
///
/// A panic while another one unwinds says its own words, after those of the first one and its
/// backtrace. What is far apart are two panics, of which the server survived the first.
fn first_cause(lines: &[&str]) -> Option<usize> {
    let panics = lines.iter().enumerate().filter(|(_, line)| line.contains(PANICKED));
    let mut panics: Vec<usize> = panics.map(|(at, _)| at).collect();
    let mut first = panics.pop()?;
    while let Some(earlier) = panics.pop() {
        let is_whole = |line: &&&str| serde_json::from_str::<Value>(line).is_ok_and(|line| line.is_object());
        let between = lines[earlier..first].iter().filter(is_whole).count();
        if between > MOST_BETWEEN && !is_consequence(&lines[first..]) {
            break;
        }
        first = earlier;
    }
    Some(first)
}

fn is_consequence(panic: &[&str]) -> bool {
    panic.iter().take(2).any(|line| CONSEQUENCES.iter().any(|text| line.contains(text)))
}

/// Returns the first line of a panic and its message, which are those of its thread alone.
fn panic_at(lines: &[&str]) -> Vec<String> {
    let Some((head, rest)) = lines.split_first() else { return Vec::new() };
    // What was on its way when the panic came stands before it in its line.
    let begin = head.find(PANICKED).and_then(|at| head[..at].rfind("thread ")).unwrap_or_default();
    let mut panic = vec![shortened(&head[begin..])];
    for line in rest {
        // A line of the log may begin anywhere in one of the message.
        let line = line.find(r#"{"msg":"#).map_or(*line, |at| &line[..at]);
        let is_over = ["note: run with", "stack backtrace:", "thread caused non-unwinding"];
        if is_over.iter().any(|text| line.trim_start().starts_with(text)) || line.contains(PANICKED) {
            break;
        }
        if !line.trim().is_empty() && !is_of_json(line) {
            panic.push(shortened(line));
        }
        if panic.len() >= MOST_LINES {
            break;
        }
    }
    panic
}

/// Returns whether a line is one of JSON, or a half of one: it has the names of members.
fn is_of_json(line: &str) -> bool {
    line.trim_start().starts_with("{\"")
        || line.matches("\":").count() > 1
        || line.trim_end().ends_with("\"}")
}

fn shortened(line: &str) -> String {
    line.trim().chars().take(MOST_CHARS).collect()
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
    const INFO: &str = r#"{"msg":"state driver handling event","v":0,"level":30}"#;
    const NOTE: &str = "note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace";
    const VCPU: &str = "vCPU 0: Unhandled vCPU error: No such device or address (os error 6)";
    const AT: &str = "thread 'vcpu-0' panicked at bin/propolis-server/src/lib/vm/state_driver.rs:329:17:";

    #[test]
    fn the_address_is_in_the_line_about_listening() {
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
    fn the_last_message_of_a_server_is_an_error_or_a_panic() {
        assert_eq!(last_words(LOG), "VM went wrong: the moon\nthread 'main' panicked at com1");
        assert_eq!(cause(LOG), "thread 'main' panicked at com1");
        assert_eq!(last_words("viona is too old\n"), "viona is too old");
    }

    #[test]
    fn a_panic_is_reported_by_its_message_and_never_by_the_note_below() {
        let log = format!("{INFO}\n\n{AT}\n{VCPU}\n{NOTE}\n");
        assert_eq!(last_words(&log), format!("{AT}\n{VCPU}"));
        assert_eq!(cause(&log), format!("{AT} {VCPU}"));
        let several = format!("{AT}\nassertion `left == right` failed\n  left: 1\n right: 2\n{NOTE}\n");
        assert_eq!(cause(&several), format!("{AT} assertion `left == right` failed left: 1 right: 2"));
    }

    #[test]
    fn lines_that_a_panic_has_cut_are_no_message() {
        let (half, rest) = (
            r#"{"msg":"instance spec","v":0,"spec":"Spec { board: Board { cpus: 2, "#,
            r#"memory_mb: 1024 } }","hostname":"sled","pid":1,"component":"vm"}"#,
        );
        for log in [
            format!("{INFO}\n{half}{AT}\n{VCPU}\n{NOTE}\n{rest}\n"),
            format!("{half}\n{AT}\n{VCPU}\n{NOTE}\n{rest}\n{INFO}\n"),
            format!("{AT}\n{rest}\n{VCPU}{half}\n{NOTE}\n"),
            format!("{half}{AT}\n{INFO}\n{VCPU}\n{rest}\n"),
        ] {
            assert_eq!(last_words(&log), format!("{AT}\n{VCPU}"), "{log}");
        }
        assert_eq!(last_words(&format!("{rest}\n{half}")), "");
    }

    #[test]
    fn of_a_panic_within_a_panic_the_first_is_the_cause() {
        let backtrace: String =
            (0..90).map(|frame| format!("  {frame}: 0x55d0 - core::ops::f{frame}\n")).collect();
        let second = "thread 'vcpu-0' panicked at library/core/src/panicking.rs:233:5:";
        let log = format!(
            "{AT}\n{VCPU}\nstack backtrace:\n{backtrace}{INFO}\n\n\
             thread 'vcpu-0' panicked at lib/a.rs:1:2:\ncalled `Result::unwrap()` on an `Err` value: Poisoned\n{NOTE}\n\
             {second}\npanic in a destructor during cleanup\nstack backtrace:\n{backtrace}\
             thread caused non-unwinding panic. aborting.\n"
        );
        assert_eq!(cause(&log), format!("{AT} {VCPU}"));
    }

    #[test]
    fn a_panic_that_the_server_survived_is_not_what_it_died_of() {
        let much = format!("{INFO}\n").repeat(MOST_BETWEEN + 1);
        let log =
            format!("thread 'old' panicked at a.rs:1:1:\nlong ago\n{NOTE}\n{much}{AT}\n{VCPU}\n{NOTE}\n");
        assert_eq!(cause(&log), format!("{AT} {VCPU}"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            let _ = (listening(&text), why(&text, "a"), last_words(&text), cause(&text));
        }

        #[test]
        fn any_lines_around_a_panic_are_read_without_panic(lines in prop::collection::vec(
            prop_oneof![Just(AT), Just(VCPU), Just(NOTE), Just(INFO), Just("é panicked at "), Just("{\"msg\":é")], 0..12,
        )) {
            let text = lines.concat() + &lines.join("\n");
            let _ = (last_words(&text), cause(&text));
        }
    }
}
