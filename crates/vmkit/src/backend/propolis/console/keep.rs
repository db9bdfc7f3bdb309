//! Keeping what a console said: its server forgets it with the VM.
//!
//! ```text
//!  history ──▶ console.log ◀── what comes while the guest is told to go, until the VM is gone
//! ```
//!
//! How far the log has come is in a file beside it, so that a stop that was interrupted and begun
//! again writes nothing twice but what it wrote in its last moment.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout, timeout_at};

use super::super::client::PropolisClient;
use super::super::files;
use super::super::layout::PropolisLayout;
use super::address::HistoryRange;
use super::event::ConsoleEvent;
use super::history::page;
use super::pump::ConsolePump;
use crate::boundedlog::BoundedLog;
use crate::error::{Error, Result};
use crate::spec::Mib;

/// How long reading the history and attaching may take.
const ATTACH_LIMIT: Duration = Duration::from_secs(8);
/// How long the console may take to tell its last words once the VM is gone.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(500);

/// Writes the console's output to its log.
pub(in super::super) struct LogWriter<'a> {
    client: PropolisClient,
    layout: &'a PropolisLayout,
    log: BoundedLog,
    /// How many bytes of this run are in the log, or are known to be lost.
    at: u64,
}

impl<'a> LogWriter<'a> {
    /// Opens the log, to go on where it ends; `None`, with a warning, where there can be no log.
    pub(in super::super) fn begin(
        client: PropolisClient,
        layout: &'a PropolisLayout,
        bound: Mib,
    ) -> Option<Self> {
        let log = match BoundedLog::open(&layout.console_log(), bound.bytes()) {
            Ok(log) => log,
            Err(error) => {
                tracing::warn!(%error, "the console's last output can't be stored");
                return None;
            }
        };
        let at = fs::read_to_string(layout.console_mark()).ok().and_then(|text| text.trim().parse().ok());
        Some(Self { client, layout, log, at: at.unwrap_or(0) })
    }

    /// Writes down what was said so far, and what is said until this work is done.
    ///
    /// The work begins once the console is attached, or can't be. If `ends` says that it ended the
    /// VM, the console's last words are waited for.
    pub(in super::super) async fn during<T>(
        &mut self,
        work: impl Future<Output = T>,
        ends: impl Fn(&T) -> bool,
    ) -> T {
        let deadline = Instant::now() + ATTACH_LIMIT;
        // All of these are large, and the stack of a debug build is not.
        let mut work = Box::pin(work);
        let attached = timeout_at(deadline, Box::pin(self.attached(deadline)));
        let attached = match attached.await {
            Ok(Ok(attached)) => Some(attached),
            Ok(Err(error)) => {
                tracing::debug!(%error, "the console can't be followed");
                None
            }
            Err(_) => None,
        };
        let Some(attached) = attached else { return work.await };
        let mut following = Box::pin(attached.write(self));
        let done = tokio::select! {
            done = &mut work => done,
            () = &mut following => return work.await,
        };
        if ends(&done) {
            let _ = timeout(LAST_WORDS_LIMIT, following).await;
        }
        done
    }

    async fn attached(&mut self, deadline: Instant) -> Result<AttachedLog> {
        self.history(deadline).await;
        AttachedLog::at(self).await
    }

    /// Writes down what the server has.
    async fn history(&mut self, deadline: Instant) {
        loop {
            match page(&self.client, HistoryRange::Start(self.at), deadline).await {
                Ok(Some(page)) if page.end >= self.at => {
                    self.log.append(page.since(self.at));
                    self.reach(page.end);
                    if page.is_last {
                        return;
                    }
                }
                Ok(_) => return,
                Err(failure) => {
                    tracing::warn!(%failure, "the console's output can't be stored");
                    return;
                }
            }
        }
    }

    fn reach(&mut self, at: u64) {
        self.at = at;
        if let Err(error) = files::write(&self.layout.console_mark(), &self.at) {
            tracing::debug!(%error, "the position in the console's log can't be stored");
        }
    }
}

/// A console that is attached behind what is in the log.
struct AttachedLog {
    pump: ConsolePump<Box<dyn FnMut(ConsoleEvent) + Send>>,
    words: UnixStream,
    missed: Arc<AtomicU64>,
}

impl AttachedLog {
    async fn at(keeping: &LogWriter<'_>) -> Result<Self> {
        let (words, theirs) = UnixStream::pair().map_err(Error::io("make", "a pair of sockets"))?;
        let missed = Arc::<AtomicU64>::default();
        let counted = Arc::clone(&missed);
        let tell = Box::new(move |event| {
            if let ConsoleEvent::Missed { bytes } = event {
                counted.fetch_add(bytes, Ordering::Relaxed);
            }
        });
        let mut pump: ConsolePump<Box<dyn FnMut(ConsoleEvent) + Send>> =
            ConsolePump::new(keeping.client, keeping.at, theirs, tell);
        pump.attach().await?;
        Ok(Self { pump, words, missed })
    }

    /// Writes down what is said until the console ends.
    async fn write(self, keeping: &mut LogWriter<'_>) {
        let Self { pump, words, missed } = self;
        let mut words = BufReader::new(words);
        let writing = async {
            let mut said = Vec::new();
            while let Ok(1..) = words.read_buf(&mut said).await {
                keeping.log.append(&said);
                keeping.reach(keeping.at + said.len() as u64 + missed.swap(0, Ordering::Relaxed));
                said.clear();
            }
        };
        let (ended, ()) = tokio::join!(pump.run(), writing);
        if let Err(error) = ended {
            tracing::debug!(%error, "the console's connection broke");
        }
    }
}
