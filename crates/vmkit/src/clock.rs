//! Readings of a guest's clock, which is set after its CPUs were stopped: by the guest agent if
//! there is one (the backend, [`GuestClock`](crate::abilities::GuestClock)), else over SSH (the
//! manager).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How far a guest's clock may be off and still count as right: too little to notice, and more than
/// a busy host's delays.
pub(crate) const CLOSE: Duration = Duration::from_millis(20);
/// How far a clock that was set several times may be off: what comes between sending a time and
/// setting it differs by tens of milliseconds on a busy host, and no number of tries changes that.
pub(crate) const SET: Duration = Duration::from_secs(1);
/// After how many tries a clock that can't be set as close as `CLOSE` counts as right.
const CLOSE_TRIES: usize = 5;

/// A reading of a guest's clock, compared to this host's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ClockReading {
    /// By how much it is ahead, in nanoseconds; negative if it is behind.
    pub(crate) ahead: i128,
    /// How long the request and its reply took.
    pub(crate) round_trip: Duration,
}

impl ClockReading {
    /// Creates a reading from the guest's time, and the times of the request and the reply.
    pub(crate) fn of(guest: Duration, asked: Duration, answered: Duration) -> Self {
        let round_trip = answered.saturating_sub(asked);
        let nanos = |at: Duration| i128::try_from(at.as_nanos()).unwrap_or(i128::MAX);
        Self { ahead: nanos(guest) - nanos(asked + round_trip / 2), round_trip }
    }

    /// Returns the most that the clock can be off: nothing shows when within the round trip it was
    /// read.
    fn at_most_off(&self) -> u128 {
        self.ahead.unsigned_abs() + (self.round_trip / 2).as_nanos()
    }

    /// Returns whether the clock has to be set: it is certainly wrong, or the reply was too slow to
    /// show that it is not.
    pub(crate) fn is_to_be_set(&self) -> bool {
        let is_off = self.ahead.unsigned_abs() > (CLOSE + self.round_trip / 2).as_nanos();
        is_off || self.at_most_off() >= SET.as_nanos()
    }

    /// Returns whether a clock that was set so many times is right: after a few, as close as the
    /// host's delays allow.
    pub(crate) fn is_right_after(&self, tries: usize) -> bool {
        let is_close = self.ahead.unsigned_abs() <= CLOSE.as_nanos();
        self.at_most_off() < SET.as_nanos() && (is_close || tries >= CLOSE_TRIES)
    }

    /// Returns the difference of the clock as text.
    pub(crate) fn described(&self) -> String {
        let seconds = self.ahead.unsigned_abs() as f64 / 1e9;
        format!("{seconds:.3} s {}", if self.ahead < 0 { "behind" } else { "ahead" })
    }
}

/// Returns the time of this host, since 1970 in UTC.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_reading_applies_to_the_middle_of_its_round_trip() {
        let ms = Duration::from_millis;
        let reading = ClockReading::of(ms(1000), ms(41_000), ms(41_010));
        assert_eq!((reading.described(), reading.is_to_be_set()), ("40.005 s behind".to_owned(), true));
        assert!(ClockReading::of(ms(1015), ms(990), ms(1010)).is_right_after(1));
        assert!(!ClockReading::of(ms(1100), ms(990), ms(1010)).is_right_after(1));
        let slow = ClockReading::of(ms(1060), ms(900), ms(1100));
        assert!(!slow.is_right_after(1) && !slow.is_to_be_set());
        assert!(ClockReading::of(ms(1130), ms(900), ms(1100)).is_to_be_set());
    }

    #[test]
    fn a_busy_host_sets_a_clock_as_well_as_it_can_and_a_slow_reply_proves_nothing() {
        let ms = Duration::from_millis;
        // 28 ms behind by a quick reply, whatever is tried.
        let behind = ClockReading::of(ms(40_000), ms(40_027), ms(40_029));
        assert!(!behind.is_right_after(CLOSE_TRIES - 1) && behind.is_right_after(CLOSE_TRIES));
        // A clock that was not set is not right after any number of tries.
        assert!(!ClockReading::of(ms(40_000), ms(41_000), ms(41_002)).is_right_after(100));
        // In the middle of its round trip, and perhaps 5 s behind for all that.
        let vague = ClockReading::of(ms(45_000), ms(40_000), ms(50_000));
        assert!(vague.is_to_be_set() && !vague.is_right_after(100));
    }
}
