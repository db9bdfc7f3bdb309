//! The history of a console, which the server keeps.

use std::time::Duration;

use tokio::time::Instant;

use super::super::client::{ClientError, ClientResult, HISTORY_BYTES, HistoryStart, PropolisClient};
use super::super::instance_spec::SerialHistory;
use super::address::HistoryRange;
use crate::error::Error;
use crate::lifecycle::VmState;

/// The lowest version of the API that has all of this.
pub(super) const API_VERSION: &str = "1.0.0";
/// How long the server may take for one answer.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How much the server keeps of the beginning, and as much of the end, in bytes.
pub(super) const KEPT_BYTES: u64 = 1 << 20;

/// A piece of the past without a gap.
#[derive(Debug)]
pub(crate) struct HistoryPage {
    pub(crate) bytes: Vec<u8>,
    /// The number of the byte behind it.
    pub(crate) end: u64,
    /// Whether nothing comes behind it yet.
    pub(crate) is_last: bool,
}

impl HistoryPage {
    /// Returns the number of its first byte.
    pub(super) fn begin(&self) -> u64 {
        self.end.saturating_sub(self.bytes.len() as u64)
    }

    /// Returns what is in it from this byte on.
    pub(crate) fn since(&self, next: u64) -> &[u8] {
        let known = usize::try_from(next.saturating_sub(self.begin())).unwrap_or(usize::MAX);
        &self.bytes[known.min(self.bytes.len())..]
    }
}

/// Reads a piece of the past; if the server no longer has the first of these bytes, the latest
/// piece that it has. Returns nothing if no VM is active there.
pub(crate) async fn page(
    client: &PropolisClient,
    mut since: HistoryRange,
    deadline: Instant,
) -> ClientResult<Option<HistoryPage>> {
    loop {
        let from = match since {
            HistoryRange::Start(bytes) => HistoryStart::Start(bytes),
            HistoryRange::MostRecent(bytes) => HistoryStart::End(bytes),
        };
        match client.history(from, deadline).await {
            Ok(SerialHistory { data, last_byte_offset: end }) => {
                // One that is full has more behind it, and so may the end of what is kept of the
                // beginning.
                let has_more = data.len() as u64 >= HISTORY_BYTES || end == KEPT_BYTES && !data.is_empty();
                return Ok(Some(HistoryPage { bytes: data, end, is_last: !has_more }));
            }
            Err(failure) if failure.is_no_instance() => return Ok(None),
            Err(ClientError::Denied { refusal, .. })
                if matches!(since, HistoryRange::Start(_))
                    && refusal.message.contains("no longer cached") =>
            {
                since = HistoryRange::MostRecent(KEPT_BYTES);
            }
            Err(failure) => return Err(failure),
        }
    }
}

pub(super) fn no_vm(client: &PropolisClient) -> Error {
    Error::Ended {
        awaited: format!("the console at {}", client.address),
        state: VmState::Stopped,
        console: None,
    }
}
