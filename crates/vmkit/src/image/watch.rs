//! The channel through which the progress of a pull or an import is sent.

use tokio::sync::watch;

use super::progress::PullProgress;

/// Waits for `work`, and meanwhile calls `on_progress` with each state that it sends.
pub async fn watch_progress<T>(
    work: impl Future<Output = T>,
    mut progress: watch::Receiver<PullProgress>,
    on_progress: &mut (dyn FnMut(PullProgress) + Send),
) -> T {
    tokio::pin!(work);
    loop {
        tokio::select! {
            // The end has priority: progress is no longer news then.
            biased;
            done = &mut work => return done,
            Ok(()) = progress.changed() => on_progress(*progress.borrow_and_update()),
        }
    }
}

/// Returns a sender of progress without a receiver.
pub fn no_progress() -> watch::Sender<PullProgress> {
    watch::Sender::new(PullProgress::default())
}
