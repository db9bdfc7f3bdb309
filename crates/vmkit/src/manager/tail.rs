//! The last lines that a VM's console has said: what a person wants to see of a guest that did not
//! become what was awaited.

use std::path::Path;

use crate::boundedlog::{LogPosition, tail_of_file, tail_of_log_since};
use crate::error::ConsoleTail;
use crate::handle::{ConsoleEndpoint, VmHandle};

/// How much of the end is looked at, in bytes.
const MOST_BYTES: u64 = 4096;
/// How many lines are shown.
const MOST_LINES: usize = 10;

/// How much of what a guest has printed in a run is read for what went wrong in it, in bytes.
#[cfg(all(feature = "ssh", feature = "images"))]
const MOST_OF_RUN: u64 = 256 << 10;

/// Returns what a guest has printed in this run, without what commands a terminal; none where the
/// log can't be read.
#[cfg(all(feature = "ssh", feature = "images"))]
pub(super) fn this_run(log: &Path, since: Option<&LogPosition>) -> Option<String> {
    let said = match since {
        Some(since) => tail_of_log_since(log, since, MOST_OF_RUN),
        None => tail_of_file(log, MOST_OF_RUN),
    };
    Some(without_sequences(&String::from_utf8_lossy(&said.ok()?)).replace('\r', ""))
}

/// Returns the last lines of a VM's console, as far as they can be had.
///
/// Of a console at a WebSocket there is no log before its VM is stopped: while it lives its server
/// is asked. What the log has else is an earlier run's.
pub(crate) async fn console_tail(vm: &VmHandle) -> Option<ConsoleTail> {
    let console = vm.run.as_ref().map(|run| &run.console);
    let said = match (console, &vm.console_log) {
        (Some(ConsoleEndpoint::WebSocket(url)), _) if vm.state.is_live() => said_at(url).await,
        (Some(ConsoleEndpoint::WebSocket(_)), _) | (_, None) => None,
        (_, Some(log)) => logged(log, vm.console_since.as_ref()),
    };
    last_lines(&said.unwrap_or_default())
}

fn logged(log: &Path, since: Option<&LogPosition>) -> Option<Vec<u8>> {
    match since {
        Some(since) => tail_of_log_since(log, since, MOST_BYTES).ok(),
        None => tail_of_file(log, MOST_BYTES).ok(),
    }
}

#[cfg(feature = "propolis")]
async fn said_at(url: &str) -> Option<Vec<u8>> {
    use crate::console::{HistoryRange, SerialConsole};
    /// The caller has waited long enough already.
    const LIMIT: std::time::Duration = std::time::Duration::from_secs(2);
    let console = SerialConsole::at(url).ok()?;
    let past = tokio::time::timeout(LIMIT, console.history(HistoryRange::MostRecent(MOST_BYTES))).await;
    past.ok()?.ok().map(|past| past.bytes)
}

/// Returns nothing: only Propolis has such consoles.
#[cfg(not(feature = "propolis"))]
async fn said_at(_url: &str) -> Option<Vec<u8>> {
    None
}

/// Returns the last lines of what was said, fit to be shown on a terminal.
pub(crate) fn last_lines(said: &[u8]) -> Option<ConsoleTail> {
    let text = String::from_utf8_lossy(said);
    // What the guest prints is not trusted with the reader's terminal.
    let clean: String =
        without_sequences(&text).chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    let lines: Vec<&str> = clean.lines().filter(|line| !line.trim().is_empty()).collect();
    ConsoleTail::new(&lines[lines.len().saturating_sub(MOST_LINES)..].join("\n"))
}

/// Returns the text without what commands a terminal: colours, cursor movements, titles.
///
/// Source: ECMA-48, 5.3 to 5.6 and 8.3.89.
fn without_sequences(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        if char != '\u{1b}' {
            plain.push(char);
            continue;
        }
        match rest.next() {
            // Up to its final byte.
            Some('[') => drop(rest.find(|c| matches!(c, '@'..='~'))),
            // Up to BEL, or to the ESC of the string terminator, whose other half is one character.
            Some(']' | 'P' | 'X' | '^' | '_') => {
                let end = rest.find(|c| matches!(c, '\u{7}' | '\u{1b}'));
                end.filter(|end| *end == '\u{1b}').and_then(|_| rest.next());
            }
            // A character set has its name behind it.
            Some('(' | ')' | '*' | '+') => drop(rest.next()),
            _ => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_says_to_its_terminal_is_not_shown() {
        let said = b"\x1b[2J\x1b[0;32m  OK  \x1b[0m] Started \x1b[0;1;39mssh\x1b[0m\r\n\x1b]0;title\x07\x1b(Blogin: \x1b[6n\n";
        let shown = |said: &[u8]| last_lines(said).map(|tail| tail.as_str().to_owned());
        assert_eq!(shown(said).as_deref(), Some("  OK  ] Started ssh\nlogin:"));
        assert_eq!(shown(b"cut off \x1b[").as_deref(), Some("cut off"));
        assert_eq!(shown("\u{1b}]never ended".as_bytes()), None);
    }
}
