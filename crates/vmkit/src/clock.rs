//! The correction of a guest's clock after its CPUs were stopped.
//!
//! A paused guest's clock stands still, and the guest does not notice: without a time server it
//! stays behind by the length of the pause. So resuming a guest sets its clock, with the guest
//! agent if there is one (the backend) and else over SSH (the manager). This module passes the
//! backend's result to the manager: both run in one task, and the trait between them has no
//! parameter for it.

use std::cell::Cell;
use std::time::Duration;
#[cfg(any(feature = "ssh", all(target_os = "linux", feature = "qemu")))]
use std::time::{SystemTime, UNIX_EPOCH};

/// How far a guest's clock may be off and still count as right: too little to notice, and more than
/// a busy host's delays.
#[cfg(any(feature = "ssh", all(target_os = "linux", feature = "qemu")))]
pub(crate) const CLOSE: Duration = Duration::from_millis(20);

/// The state shared by both sides of a resume.
#[derive(Debug, Clone, Copy, Default)]
struct ResumeContext {
    /// How long the guest was paused, if known.
    #[cfg_attr(
        not(all(target_os = "linux", feature = "qemu")),
        expect(dead_code, reason = "only QEMU's backend sets a clock")
    )]
    paused: Option<Duration>,
    /// Whether the clock is right, or need not be set.
    is_settled: bool,
}

tokio::task_local! {
    static RESUMPTION: Cell<ResumeContext>;
}

/// Resumes a guest that was paused for this long, and returns whether its clock is certainly right
/// afterwards.
pub(crate) async fn resuming<T>(paused: Option<Duration>, resume: impl Future<Output = T>) -> (T, bool) {
    let begun = Cell::new(ResumeContext { paused, is_settled: false });
    RESUMPTION
        .scope(begun, async {
            let done = resume.await;
            (done, RESUMPTION.with(|now| now.get().is_settled))
        })
        .await
}

/// Returns how long the guest that is being resumed was paused, if its manager knows.
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) fn paused() -> Option<Duration> {
    RESUMPTION.try_with(|now| now.get().paused).ok().flatten()
}

/// Notes that the clock needs no further correction.
#[cfg(all(target_os = "linux", feature = "qemu"))]
pub(crate) fn settled() {
    let _ = RESUMPTION.try_with(|now| now.set(ResumeContext { is_settled: true, ..now.get() }));
}

/// A reading of a guest's clock, compared to this host's.
#[cfg(any(feature = "ssh", all(target_os = "linux", feature = "qemu")))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClockReading {
    /// By how much it is ahead, in nanoseconds; negative if it is behind.
    pub(crate) ahead: i128,
    /// How long the request and its reply took.
    pub(crate) round_trip: Duration,
}

#[cfg(any(feature = "ssh", all(target_os = "linux", feature = "qemu")))]
impl ClockReading {
    /// Creates a reading from the guest's time, and the times of the request and the reply.
    pub(crate) fn of(guest: Duration, asked: Duration, answered: Duration) -> Self {
        let round_trip = answered.saturating_sub(asked);
        let nanos = |at: Duration| i128::try_from(at.as_nanos()).unwrap_or(i128::MAX);
        Self { ahead: nanos(guest) - nanos(asked + round_trip / 2), round_trip }
    }

    /// Returns whether the clock is right, as far as the reading shows.
    pub(crate) fn is_close(&self) -> bool {
        self.ahead.unsigned_abs() <= CLOSE.as_nanos()
    }

    /// Returns whether the clock is certainly wrong: a slow reply proves little.
    pub(crate) fn is_off(&self) -> bool {
        self.ahead.unsigned_abs() > (CLOSE + self.round_trip / 2).as_nanos()
    }

    /// Returns the difference of the clock as text.
    pub(crate) fn described(&self) -> String {
        let seconds = self.ahead.unsigned_abs() as f64 / 1e9;
        format!("{seconds:.3} s {}", if self.ahead < 0 { "behind" } else { "ahead" })
    }
}

/// Returns the time of this host, since 1970 in UTC.
#[cfg(any(feature = "ssh", all(target_os = "linux", feature = "qemu")))]
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(any(feature = "ssh", all(target_os = "linux", feature = "qemu")))]
    #[test]
    fn a_reading_counts_from_the_middle_of_its_round_trip() {
        let ms = Duration::from_millis;
        let reading = ClockReading::of(ms(1000), ms(41_000), ms(41_010));
        assert_eq!((reading.described(), reading.is_close()), ("40.005 s behind".to_owned(), false));
        assert!(ClockReading::of(ms(1015), ms(990), ms(1010)).is_close());
        assert!(!ClockReading::of(ms(1100), ms(990), ms(1010)).is_close());
        let slow = ClockReading::of(ms(1060), ms(900), ms(1100));
        assert!(!slow.is_close() && !slow.is_off());
        assert!(ClockReading::of(ms(1130), ms(900), ms(1100)).is_off());
    }

    #[cfg(all(target_os = "linux", feature = "qemu"))]
    #[tokio::test]
    async fn what_a_backend_has_settled_its_manager_learns_and_without_one_nothing_breaks() {
        settled();
        assert_eq!(paused(), None);
        let paused_for = Some(Duration::from_secs(40));
        let (found, is_settled) = resuming(paused_for, async { paused() }).await;
        assert_eq!((found, is_settled), (paused_for, false));
        let ((), is_settled) = resuming(None, async { settled() }).await;
        assert!(is_settled);
    }
}
