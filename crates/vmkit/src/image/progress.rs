//! How far an image is on its way: data, for whoever shows it.
//!
//! It is sent over a [`watch`] channel, which keeps only the newest: a slow reader holds up nobody.

use tokio::sync::watch;

/// How far an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PullProgress {
    /// What is being done.
    pub stage: PullStage,
    /// How many bytes are here, as they came, packed or not; those of an earlier try among them.
    pub done_bytes: u64,
    /// How many there are in all, where the server said so.
    pub total_bytes: Option<u64>,
}

/// What is being done for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PullStage {
    /// It is found out what there is, and what it must hash to.
    #[default]
    Asking,
    /// Another process or task fetches the same image, and this one waits for it.
    Waiting,
    /// It comes, and is hashed and unpacked on the way.
    Fetching,
    /// It is written in another form; the bytes are those of the disk.
    Converting,
    /// It is all here; what it hashed to is compared, and it is written through to the disk.
    Finishing,
}

/// Answers a sender of progress that nobody looks at.
pub fn unwatched() -> watch::Sender<PullProgress> {
    watch::Sender::new(PullProgress::default())
}
