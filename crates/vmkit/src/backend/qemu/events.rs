//! What QEMU reports of its own accord, from the log of its events.
//!
//! A monitor has one client at a time and is not held while waiting, so the keeper reads the events
//! on a monitor of their own and appends them to a log, which any number of processes follow.
//!
//! Source: QEMU, `qapi/run-state.json`.

use std::future::pending;

use super::facts::descriptor;
use super::layout::QemuLayout;
use super::qmp::codec::{QmpMessage, decode};
use crate::backend::supervise::EventsRequest;
use crate::error::Result;
use crate::logreader::LogReader;

/// The bound of the log, in bytes: an event has about 150.
const LOG_BYTES: u64 = 64 << 10;
/// The longest line that is looked at, in bytes.
const LINE_LIMIT_BYTES: usize = 64 << 10;
/// What a monitor needs to be told before it reports events.
const START: &str = "{\"execute\":\"qmp_capabilities\"}\n";

/// Returns what the keeper does to log the events of a run.
pub(super) fn request(layout: &QemuLayout) -> EventsRequest {
    EventsRequest {
        descriptor: descriptor::EVENTS,
        request: START.to_owned(),
        log: layout.events_log(),
        log_bytes: LOG_BYTES,
    }
}

/// Waits until QEMU reports a reset of the guest; never completes where nothing is logged.
///
/// # Errors
/// `Io` and `Host` where the log can't be read or watched.
pub(super) async fn reset(layout: &QemuLayout) -> Result<()> {
    let mut log = LogReader::open(&layout.events_log(), None)?;
    log.skip_to_last_lines(0)?;
    let mut lines = EventLines::default();
    while let Some(chunk) = log.next().await? {
        if lines.add(&chunk).any(|line| is_reset(&line)) {
            return Ok(());
        }
    }
    pending().await
}

/// Returns whether a line of the log is the event of a reset.
fn is_reset(line: &[u8]) -> bool {
    matches!(decode(line), Ok(QmpMessage::Event(event)) if event.name == "RESET")
}

/// The lines of a log that comes in pieces.
#[derive(Debug, Default)]
struct EventLines(Vec<u8>);

impl EventLines {
    /// Adds a piece, and returns the lines that are complete now.
    fn add(&mut self, piece: &[u8]) -> impl Iterator<Item = Vec<u8>> + use<> {
        self.0.extend_from_slice(piece);
        let end = self.0.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let rest = self.0.split_off(end);
        let complete = std::mem::replace(&mut self.0, rest);
        if self.0.len() > LINE_LIMIT_BYTES {
            self.0.clear();
        }
        let lines: Vec<Vec<u8>> = complete.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
        lines.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boundedlog::BoundedLog;
    use std::time::Duration;
    use tokio::time::timeout;

    const RESET: &[u8] = b"{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"RESET\", \
        \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\r\n";
    const OTHERS: &[u8] = b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n{\"return\": {}}\r\n\
        {\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"RESUME\"}\r\nRESET\r\n";

    async fn waits(waiting: impl Future<Output = Result<()>>) -> bool {
        timeout(Duration::from_millis(50), waiting).await.is_err()
    }

    fn layout(dir: &tempfile::TempDir) -> QemuLayout {
        QemuLayout { work: dir.path().to_owned(), run: dir.path().join("run") }
    }

    #[test]
    fn an_event_is_found_in_pieces_of_any_size() {
        for size in 1..RESET.len() {
            let mut lines = EventLines::default();
            let said = [OTHERS, RESET, OTHERS].concat();
            let found = said.chunks(size).flat_map(|piece| lines.add(piece).collect::<Vec<_>>());
            assert_eq!(found.filter(|line| is_reset(line)).count(), 1, "{size}");
        }
    }

    #[tokio::test]
    async fn a_reset_from_now_on_counts_in_either_half_of_the_log_and_an_earlier_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(&dir);
        let mut waiting = Box::pin(reset(&layout));
        assert!(waits(&mut waiting).await, "there is no log yet");
        let mut log = BoundedLog::open(&layout.events_log(), 1000).unwrap();
        log.append(OTHERS);
        assert!(waits(&mut waiting).await);
        for _ in 0..4 {
            log.append(RESET);
        }
        timeout(Duration::from_secs(30), waiting).await.unwrap().unwrap();
        let mut waiting = Box::pin(reset(&layout));
        assert!(waits(&mut waiting).await, "an earlier reset counts");
        log.append(&[OTHERS, RESET, OTHERS, OTHERS, OTHERS].concat());
        timeout(Duration::from_secs(30), waiting).await.unwrap().unwrap();
    }
}
