//! What is printed at the console, on a thread of its own: a terminal that takes no output stalls
//! that thread and nothing else, so that keys and signals are still heard.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::failure::Failure;
use crate::output;

/// How much waits for a slow terminal before no more is read from the console.
const MOST_WAITING_BYTES: usize = 64 << 10;

enum PrintItem {
    Words(Vec<u8>),
    Notice(String),
    /// Nothing more comes.
    End,
}

/// The thread that prints, and what waits for it.
pub(super) struct PrintThread {
    items: Sender<PrintItem>,
    /// Hears a byte for each item that is printed, and the end.
    bell: UnixStream,
    waiting_bytes: Arc<AtomicUsize>,
    thread: JoinHandle<Result<(), Failure>>,
}

impl PrintThread {
    pub(super) fn start() -> io::Result<Self> {
        let (bell, rings) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        rings.set_nonblocking(true)?;
        let (items, to_print) = channel();
        let waiting_bytes = Arc::new(AtomicUsize::new(0));
        let waiting = Arc::clone(&waiting_bytes);
        let thread = std::thread::Builder::new().name("printer".into()).spawn(move || {
            for item in to_print {
                match item {
                    PrintItem::Words(words) => {
                        output::bytes(&words)?;
                        waiting.fetch_sub(words.len(), Ordering::SeqCst);
                    }
                    PrintItem::Notice(notice) => output::notice(notice),
                    PrintItem::End => break,
                }
                // A bell that has not been heard yet is full, and rings all the same.
                let _ = io::Write::write(&mut &rings, &[0]);
            }
            Ok(())
        })?;
        Ok(Self { items, bell, waiting_bytes, thread })
    }

    /// Queues these bytes for printing as they are.
    pub(super) fn words(&self, words: &[u8]) {
        if words.is_empty() {
            return;
        }
        self.waiting_bytes.fetch_add(words.len(), Ordering::SeqCst);
        self.hand_over(PrintItem::Words(words.to_vec()));
    }

    /// Queues a message for the user.
    pub(super) fn notice(&self, notice: impl Into<String>) {
        self.hand_over(PrintItem::Notice(notice.into()));
    }

    /// Returns a sender of messages to the user, for another thread.
    pub(super) fn teller(&self) -> impl Fn(String) + Send + 'static {
        let items = self.items.clone();
        // A user who has left gets no more messages.
        move |notice| drop(items.send(PrintItem::Notice(notice)))
    }

    fn hand_over(&self, item: PrintItem) {
        // A thread that has failed tells why at the end.
        let _ = self.items.send(item);
    }

    /// Returns whether more should be printed now.
    pub(super) fn has_room(&self) -> bool {
        self.waiting_bytes.load(Ordering::SeqCst) < MOST_WAITING_BYTES
    }

    /// Hears the bell; false where the thread has ended.
    pub(super) fn hear(&self) -> bool {
        let mut rung = [0; 256];
        !matches!((&self.bell).read(&mut rung), Ok(0))
    }

    /// Says that nothing more comes; the bell is closed once all is printed.
    pub(super) fn finish(&self) {
        self.hand_over(PrintItem::End);
    }

    /// Returns how it went; to be called once the bell is closed.
    pub(super) fn outcome(self) -> Result<(), Failure> {
        self.finish();
        match self.thread.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl AsFd for PrintThread {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
