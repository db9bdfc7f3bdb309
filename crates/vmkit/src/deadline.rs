//! Instants in the future.
//!
//! Only arithmetic: the clock is read once, and nothing waits here.

use std::time::Duration;

use tokio::time::Instant;

/// Returns the instant after this duration; ten years from now if the clock can't represent it.
pub(crate) fn later(after: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(after).unwrap_or(now + Duration::from_secs(10 * 365 * 86_400))
}

/// Returns how long it is until this instant; zero once it has passed.
#[cfg(any(feature = "ssh", feature = "propolis", all(target_os = "linux", feature = "qemu")))]
pub(crate) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_clock_can_count_is_as_good_as_never() {
        let year = Duration::from_secs(365 * 86_400);
        assert!(later(Duration::MAX) > Instant::now() + year);
        assert!(later(Duration::ZERO) <= Instant::now());
    }
}
