//! What a console said, each byte once and in order, from the server's history to a reader.

use std::io;
use std::time::Duration;

use hyper::body::Bytes;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::super::client::PropolisClient;
use super::address::HistoryRange;
use super::event::ConsoleEvent;
use super::history::{ANSWER_LIMIT, HistoryPage, page};
use crate::error::{Error, Result};

/// How many frames are kept that the history has not confirmed; each has at most 1 KiB.
pub(super) const MOST_FRAMES: usize = 16;
/// How much of what was said last is kept, to be compared with such frames, in bytes.
const RECENT_BYTES: usize = 2 * (MOST_FRAMES << 10);
/// The history is asked for once in this time on average, however often it rings: each time is a
/// connection.
const PACE: Duration = Duration::from_millis(10);
/// For how long it may be asked for as often as it rings.
const BURST: Duration = Duration::from_millis(200);

/// What came of asking for what was said.
pub(super) enum TapeRead {
    /// The reader has all that there is.
    All,
    /// No VM is active there, or another one.
    NoVm,
    /// The reader has left.
    Left,
    /// The server could not be asked.
    Failed(Error),
}

/// Where a reader is in what a console says.
pub(super) struct ConsoleTape<T> {
    /// The server that the VM is at now.
    pub(super) client: PropolisClient,
    /// The number of the first byte that was not taken yet.
    pub(super) next: u64,
    /// What was taken, and not handed to the reader yet: one page at most.
    spool: Vec<u8>,
    /// What stands right before `next`.
    recent: Vec<u8>,
    /// Whether the page taken last was the last one that there was.
    is_level: bool,
    /// What came since that page was requested, as it came.
    frames: Vec<Bytes>,
    reader: OwnedWriteHalf,
    pub(super) tell: T,
}

impl<T: FnMut(ConsoleEvent) + Send> ConsoleTape<T> {
    pub(super) fn new(client: PropolisClient, next: u64, reader: OwnedWriteHalf, tell: T) -> Self {
        let (spool, recent, frames) = (Vec::new(), Vec::new(), Vec::new());
        Self { client, next, spool, recent, is_level: false, frames, reader, tell }
    }

    /// Reads the first page, and what stands right before it, if the server still has that.
    pub(super) async fn begin(&mut self) -> TapeRead {
        let begin = self.next.saturating_sub(RECENT_BYTES as u64);
        match page(&self.client, HistoryRange::Start(begin), Instant::now() + ANSWER_LIMIT).await {
            Ok(Some(page)) if page.begin() == begin && page.end >= self.next => {
                let before = page.bytes.len() - page.since(self.next).len();
                self.recent = page.bytes[..before].to_vec();
                self.take(&page);
                TapeRead::All
            }
            Ok(Some(_)) => self.ask().await,
            Ok(None) => TapeRead::NoVm,
            Err(failure) => TapeRead::Failed(failure.into_error(&self.client, "report its console", None)),
        }
    }

    /// Reads the next page. A page that comes while the last one is not handed over yet is read
    /// again later.
    pub(super) async fn ask(&mut self) -> TapeRead {
        match page(&self.client, HistoryRange::Start(self.next), Instant::now() + ANSWER_LIMIT).await {
            // The numbers of a VM only grow.
            Ok(Some(page)) if page.end >= self.next => {
                if self.spool.is_empty() {
                    self.take(&page);
                }
                TapeRead::All
            }
            Ok(_) => TapeRead::NoVm,
            Err(failure) => TapeRead::Failed(failure.into_error(&self.client, "report its console", None)),
        }
    }

    fn take(&mut self, page: &HistoryPage) {
        let missed = page.begin().saturating_sub(self.next);
        if missed > 0 {
            (self.tell)(ConsoleEvent::Missed { bytes: missed });
        }
        self.add(page.since(self.next));
        self.next = page.end;
        self.is_level = page.is_last;
        // All that came before the page was requested is in it.
        self.frames.clear();
    }

    fn add(&mut self, words: &[u8]) {
        self.spool.extend(words);
        self.recent.extend(&words[words.len().saturating_sub(RECENT_BYTES)..]);
        self.recent.drain(..self.recent.len().saturating_sub(RECENT_BYTES));
    }

    /// Reads and hands over what the server has whenever the bell rings, until the bell is gone.
    pub(super) async fn follow(&mut self, rings: &mut mpsc::Receiver<Bytes>) -> Result<TapeRead> {
        let mut next = Instant::now();
        while let Some(frame) = rings.recv().await {
            self.keep(frame);
            sleep_until(next).await;
            let now = Instant::now();
            next = now.checked_sub(BURST).map_or(next, |earliest| next.max(earliest)) + PACE;
            loop {
                if !self.hand_over().await? {
                    return Ok(TapeRead::Left);
                }
                self.keep_all(rings);
                match self.ask().await {
                    TapeRead::All if self.is_level => break,
                    TapeRead::All => {}
                    other => return Ok(other),
                }
            }
            if !self.hand_over().await? {
                return Ok(TapeRead::Left);
            }
        }
        Ok(TapeRead::All)
    }

    /// Keeps the frames that have come, as long as none is missing in between.
    pub(super) fn keep_all(&mut self, rings: &mut mpsc::Receiver<Bytes>) {
        while let Ok(frame) = rings.try_recv() {
            self.keep(frame);
        }
    }

    fn keep(&mut self, frame: Bytes) {
        if self.frames.len() < MOST_FRAMES {
            self.frames.push(frame);
        }
    }

    /// Writes all that was taken to the reader; returns false if it has left.
    pub(super) async fn hand_over(&mut self) -> Result<bool> {
        while !self.spool.is_empty() {
            if self.reader.writable().await.is_err() {
                return Ok(false);
            }
            match self.reader.try_write(&self.spool) {
                Ok(bytes) => drop(self.spool.drain(..bytes)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) =>
                {
                    return Ok(false);
                }
                Err(error) => return Err(Error::io("write to", "the console's reader")(error)),
            }
        }
        Ok(true)
    }

    /// Hands over the last words: what came after the last page, when the server has no page any
    /// more.
    pub(super) async fn last_words(&mut self) -> Result<bool> {
        let said = self.frames.concat();
        let is_known = said.len() <= self.recent.len() || self.recent.len() as u64 == self.next;
        if self.is_level && is_known {
            let known = overlap(&self.recent, &self.frames);
            self.add(&said[known..]);
        }
        self.frames.clear();
        self.hand_over().await
    }
}

/// Returns how many bytes of the frames what was said ends with already: some of the first frames,
/// whole.
fn overlap(recent: &[u8], frames: &[Bytes]) -> usize {
    let said = frames.concat();
    let ends = frames.iter().scan(0, |end, frame| {
        *end += frame.len();
        Some(*end)
    });
    ends.filter(|end| recent.ends_with(&said[..*end])).last().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_that_the_history_had_are_distinguished_from_new_ones() {
        for (recent, frames, new) in [
            ("login: ", &["login: "][..], ""),
            ("login: ", &["login: ", "power"], "power"),
            ("login: ", &["login: ", "p", "o"], "po"),
            ("login: p", &["login: ", "p", "o"], "o"),
            ("login: p", &["", "p", "o"], "o"),
            ("login: ", &["gin: x"], "gin: x"),
            ("", &["off"], "off"),
            ("...", &["."], ""),
        ] {
            let frames: Vec<Bytes> = frames.iter().map(|text| Bytes::from_static(text.as_bytes())).collect();
            let known = overlap(recent.as_bytes(), &frames);
            assert_eq!(&frames.concat()[known..], new.as_bytes(), "{recent} {frames:?}");
        }
    }
}
