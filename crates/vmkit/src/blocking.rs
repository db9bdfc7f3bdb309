//! Work that blocks, on a thread of its own.
//!
//! Not on Tokio's pool of blocking threads: where the system refuses another thread, that pool
//! panics or never begins the work. Here the caller gets an error that names the limit.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;

use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::host::inherited::child_problem;

/// Work that runs on a thread of its own. The thread outlives this, and the process does not wait
/// for it: what takes long finds out for itself whether its result is still wanted.
#[derive(Debug)]
pub(crate) struct BlockingWork<T>(oneshot::Receiver<Result<T, Box<dyn Any + Send>>>);

impl<T: Send + 'static> BlockingWork<T> {
    /// Starts the work.
    ///
    /// # Errors
    /// `Host` with the limit, if the system refuses the thread; nothing was done then.
    pub(crate) fn begin(work: impl FnOnce() -> T + Send + 'static) -> Result<Self> {
        let (sender, outcome) = oneshot::channel();
        spawn("vmkit-blocking", move || {
            let done = catch_unwind(AssertUnwindSafe(work));
            // The caller may be gone.
            drop(sender.send(done));
        })?;
        Ok(Self(outcome))
    }

    /// Returns the result, once there is one; a panic of the work goes on in the caller.
    pub(crate) async fn outcome(self) -> T {
        let done = self.0.await.expect("the thread sends before it ends");
        done.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// Runs `work` on a thread of its own, and returns its result; a panic goes on in the caller.
///
/// A thread costs tens of microseconds: work of many blocks is one call.
///
/// # Cancel safety
/// As [`BlockingWork`].
///
/// # Errors
/// As [`BlockingWork::begin`].
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    Ok(BlockingWork::begin(work)?.outcome().await)
}

/// Starts a thread, which is not waited for.
///
/// # Errors
/// `Host` with the limit, if the system refuses it.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(work);
    spawned
        .map(drop)
        .map_err(|error| Error::host("a thread", format!("the system refuses it: {}", child_problem(&error))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_result_comes_back() {
        assert_eq!(blocking(|| 6 * 7).await.unwrap(), 42);
    }

    #[tokio::test]
    #[should_panic(expected = "as it was")]
    async fn a_panic_goes_on_in_the_caller() {
        let _ = blocking(|| panic!("as it was")).await;
    }
}
