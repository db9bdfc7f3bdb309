//! Readings of a guest's clock, which is set after its CPUs were stopped: by the guest agent if
//! there is one (the backend, [`GuestClock`](crate::abilities::GuestClock)), else over SSH (the
//! manager).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How far a guest's clock may be off and still count as right: too little to notice, and more than
/// a busy host's delays.
pub(crate) const CLOSE: Duration = Duration::from_millis(20);

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
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
