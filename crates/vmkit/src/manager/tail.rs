//! The last lines that a VM's console has said: what a person wants to see of a guest that did not become what was awaited.

use std::path::Path;

use crate::boundedlog::{LogMark, tail_of_file, tail_of_log_since};
use crate::handle::{ConsoleEndpoint, VmHandle};

/// How much of the end is looked at, in bytes.
const MOST_BYTES: u64 = 4096;
/// How many lines are shown.
const MOST_LINES: usize = 10;

/// Answers the last lines of a VM's console, as far as they can be had.
///
/// Of a console at a WebSocket there is no log before its VM is stopped: while it lives its server is asked. What the log has else
/// is an earlier run's.
pub(crate) async fn console_tail(vm: &VmHandle) -> String {
    let console = vm.run.as_ref().map(|run| &run.console);
    let said = match (console, &vm.console_log) {
        (Some(ConsoleEndpoint::WebSocket(url)), _) if vm.state.is_live() => said_at(url).await,
        (Some(ConsoleEndpoint::WebSocket(_)), _) | (_, None) => None,
        (_, Some(log)) => logged(log, vm.console_since.as_ref()),
    };
    last_lines(&said.unwrap_or_default())
}

fn logged(log: &Path, since: Option<&LogMark>) -> Option<Vec<u8>> {
    match since {
        Some(since) => tail_of_log_since(log, since, MOST_BYTES).ok(),
        None => tail_of_file(log, MOST_BYTES).ok(),
    }
}

#[cfg(feature = "propolis")]
async fn said_at(url: &str) -> Option<Vec<u8>> {
    use crate::console::{SerialConsole, Since};
    /// Whoever asks has waited long enough already.
    const LIMIT: std::time::Duration = std::time::Duration::from_secs(2);
    let console = SerialConsole::at(url).ok()?;
    let past = tokio::time::timeout(LIMIT, console.history(Since::MostRecent(MOST_BYTES))).await;
    past.ok()?.ok().map(|past| past.bytes)
}

/// Answers nothing: only Propolis has such consoles.
#[cfg(not(feature = "propolis"))]
async fn said_at(_url: &str) -> Option<Vec<u8>> {
    None
}

/// Answers the last lines of what was said, fit to be shown on a terminal.
pub(crate) fn last_lines(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    // What the guest prints is not trusted with the reader's terminal.
    let clean: String = text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    let lines: Vec<&str> = clean.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(MOST_LINES)..].join("\n")
}
