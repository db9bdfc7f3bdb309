//! Instants that lie ahead.
//!
//! Only arithmetic: the clock is asked once, and nobody waits here.

use std::time::Duration;

use tokio::time::Instant;

/// Answers the instant after this long; what can't be reckoned any more is ten years, which is as good as never.
pub(crate) fn later(after: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(after).unwrap_or(now + Duration::from_secs(10 * 365 * 86_400))
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
