//! What the server remembers of the guest's first serial port: its first mebibyte and its latest.
//!
//! Pure: bytes in, bytes out.
//!
//! Source: the history buffer of propolis-server, whose texts these are.

use std::collections::VecDeque;

/// How much is kept of the beginning, and how much of the end, in bytes.
const KEPT_BYTES: usize = 1024 * 1024;

/// How many bytes are returned without a limit in the request.
pub(super) const DEFAULT_BYTES: usize = 16 * 1024;

/// Where to read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HistoryOffset {
    /// Counted from the first byte since the instance was created.
    FromStart(u64),
    /// Counted back from the latest byte.
    MostRecent(u64),
}

impl HistoryOffset {
    /// Returns the offset of a query, or `None` where it names neither or both.
    pub(super) fn of(from_start: Option<u64>, most_recent: Option<u64>) -> Option<Self> {
        match (from_start, most_recent) {
            (Some(offset), None) => Some(Self::FromStart(offset)),
            (None, Some(offset)) => Some(Self::MostRecent(offset)),
            _ => None,
        }
    }
}

/// What the guest has said.
#[derive(Debug)]
pub(super) struct SerialHistory {
    beginning: Vec<u8>,
    latest: VecDeque<u8>,
    total: usize,
    kept: usize,
}

impl Default for SerialHistory {
    fn default() -> Self {
        Self { beginning: Vec::new(), latest: VecDeque::new(), total: 0, kept: KEPT_BYTES }
    }
}

impl SerialHistory {
    /// Takes what the guest says next.
    pub(super) fn record(&mut self, bytes: &[u8]) {
        self.latest.extend(bytes);
        self.total += bytes.len();
        let surplus = self.latest.len().saturating_sub(self.kept);
        let room = self.kept - self.beginning.len();
        self.beginning.extend(self.latest.drain(..surplus).take(room));
    }

    /// Returns how much the guest has said, in bytes.
    pub(super) fn total(&self) -> u64 {
        self.total as u64
    }

    /// Returns at most `max_bytes` from an offset on, and the offset behind them.
    ///
    /// An offset beyond the end is the end, one before the beginning the beginning. What begins in
    /// the kept beginning ends with it once there is a gap behind it.
    ///
    /// # Errors
    /// Says that the offset lies in the middle, which is lost.
    pub(super) fn read(&self, offset: HistoryOffset, max_bytes: usize) -> Result<(Vec<u8>, u64), String> {
        let start = match offset {
            HistoryOffset::FromStart(offset) => usize::try_from(offset).unwrap_or(usize::MAX).min(self.total),
            HistoryOffset::MostRecent(back) => {
                self.total.saturating_sub(usize::try_from(back).unwrap_or(usize::MAX))
            }
        };
        let back = self.total - start;
        let (first, last) = (self.beginning.len(), self.latest.len());
        let latest_from = |skipped: usize| self.latest.range(skipped..).copied();
        let data: Vec<u8> = if first + last == self.total {
            let all = self.beginning.iter().copied().chain(latest_from(0));
            all.skip(start).take(max_bytes).collect()
        } else if start < first {
            self.beginning[start..].iter().copied().take(max_bytes).collect()
        } else if back <= last {
            latest_from(last - back).take(max_bytes).collect()
        } else {
            return Err(format!(
                "Requested byte offset {start} (-{back}) is no longer cached: Only have first {first} + most recent {last} \
                 saved out of a total {} of output",
                self.total
            ));
        };
        let end = (start + data.len()) as u64;
        Ok((data, end))
    }
}

#[cfg(test)]
mod tests {
    use super::HistoryOffset::{FromStart, MostRecent};
    use super::*;

    fn small(text: &str) -> SerialHistory {
        let mut history = SerialHistory { kept: 4, ..SerialHistory::default() };
        for chunk in text.as_bytes().chunks(3) {
            history.record(chunk);
        }
        history
    }

    fn read(history: &SerialHistory, offset: HistoryOffset, max_bytes: usize) -> (String, u64) {
        let (data, end) = history.read(offset, max_bytes).expect("it is kept");
        (String::from_utf8(data).expect("text"), end)
    }

    #[test]
    fn what_fits_is_answered_from_either_side() {
        let history = small("abcdefg");
        assert_eq!(read(&history, FromStart(0), 100), ("abcdefg".to_owned(), 7));
        assert_eq!(read(&history, FromStart(2), 3), ("cde".to_owned(), 5));
        assert_eq!(read(&history, MostRecent(2), 100), ("fg".to_owned(), 7));
    }

    #[test]
    fn an_offset_beyond_the_end_is_the_end() {
        assert_eq!(read(&small("abc"), FromStart(50), 10), (String::new(), 3));
        assert_eq!(read(&small("abc"), MostRecent(50), 2), ("ab".to_owned(), 2));
    }

    #[test]
    fn the_middle_is_lost_and_its_ends_are_kept() {
        let history = small("abcdefghijkl");
        assert_eq!(read(&history, FromStart(1), 100), ("bcd".to_owned(), 4));
        assert_eq!(read(&history, FromStart(8), 100), ("ijkl".to_owned(), 12));
        assert_eq!(read(&history, MostRecent(4), 2), ("ij".to_owned(), 10));
        let problem = history.read(FromStart(5), 1).expect_err("it is lost");
        assert_eq!(
            problem,
            "Requested byte offset 5 (-7) is no longer cached: Only have first 4 + most recent 4 saved out of a total 12 of \
             output"
        );
    }

    #[test]
    fn no_output_yet() {
        assert_eq!(read(&SerialHistory::default(), FromStart(0), 10), (String::new(), 0));
        assert_eq!(read(&SerialHistory::default(), MostRecent(10), 10), (String::new(), 0));
    }
}
